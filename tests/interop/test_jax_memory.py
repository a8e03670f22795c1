"""What cubn asks of XLA before memory that JAX has dropped is used again: it must be done whenever cubn is called."""

import contextlib

import pytest

from cubn._arrays import dlpack
from cubn._arrays.jax import Jax

jax = pytest.importorskip("jax")

WITHIN = {
    "nothing": lambda call: call(1.0),
    "jit": lambda call: jax.jit(call)(1.0),
    "grad": lambda call: jax.grad(call)(1.0),
    "vmap": lambda call: jax.vmap(call)(jax.numpy.ones(3)),
    "scan": lambda call: jax.lax.scan(lambda carry, _: (call(carry), None), 1.0, length=2),
}
MODES = {"as usual": contextlib.nullcontext, "without jit": jax.disable_jit, "of 64 bits": lambda: jax.enable_x64(True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("made", ["before", "there"])
def test_xla_makes_an_array_even_while_something_is_traced(within, mode, made):
    library, device = Jax(jax), jax.devices()[0]
    if made == "before":
        library._tick(device)
    found = []

    def call(x):
        found.append(library._tick(device)())
        return 2 * x

    with MODES[mode]():
        WITHIN[within](call)
    for array in found:
        assert not isinstance(array, jax.core.Tracer)
        assert dlpack.read(dlpack.export(array)).shape == ()
    assert found
