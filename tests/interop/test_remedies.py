"""What an error says to do instead is done here, and works."""

import contextlib
import re
import types
import warnings

import numpy as np
import pytest

import cubn
from tests.interop.exporter import Exporter
from tests.interop.test_outputs import run

F32 = np.arange(6, dtype=np.float32).reshape(2, 3)
ONES = np.ones(3, np.float32)


def swapped():
    return F32.astype(F32.dtype.newbyteorder())


def misaligned():
    return np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)


def records():
    return np.zeros((2, 3), [("{a}", "f4"), ("b", "f4")])


def sparse_matrix():
    return pytest.importorskip("scipy.sparse").csr_array(F32)


def sparse_jax():
    return pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(F32)


def of_ml_dtypes(name):
    return F32.astype(getattr(pytest.importorskip("ml_dtypes"), name))


def of_torch(make):
    return lambda: make(pytest.importorskip("torch"))


def of_jax(dtype):
    return lambda: pytest.importorskip("jax").numpy.ones((2, 3), dtype)


def nested(torch):
    return torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])


def masked(torch):
    from torch.masked import masked_tensor

    return masked_tensor(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))


def frozen():
    x = F32.copy()
    x.flags.writeable = False
    return x


X = {
    "a list": (F32.tolist, "numpy.asarray(x)"),
    "a buffer": (lambda: memoryview(F32), "numpy.asarray(x)"),
    "an array interface": (
        lambda: types.SimpleNamespace(__array_interface__=F32.__array_interface__),
        "numpy.asarray(x)",
    ),
    "NumPy's integers": (lambda: F32.astype(int), "x.astype('float32')"),
    "NumPy's objects": (lambda: F32.astype(object), "x.astype('float32')"),
    "NumPy's complex numbers": (lambda: F32.astype("complex64"), "x.real"),
    "NumPy's long doubles": (lambda: F32.astype(np.clongdouble).real, "x.astype('float32')"),
    "eight bits": (lambda: of_ml_dtypes("float8_e4m3fn"), "x.astype('float32')"),
    "records": (records, "x[x.dtype.names[0]]"),
    "bytes the other way round": (swapped, "x.astype(x.dtype.newbyteorder('='))"),
    "a matrix": (lambda: np.matrix(F32), "numpy.asarray(x)"),
    "a misaligned array": (misaligned, "a copy"),
    "a sparse matrix": (sparse_matrix, "x.toarray()"),
    "a sparse JAX array": (sparse_jax, "x.todense()"),
    "JAX's integers": (of_jax("int32"), "x.astype('float32')"),
    "JAX's four bits": (of_jax("int4"), "x.astype('float32')"),
    "JAX's complex numbers": (of_jax("complex64"), "x.real"),
    "torch's integers": (of_torch(lambda torch: torch.ones(2, 3, dtype=int)), "x.to(torch.float32)"),
    "torch's eight bits": (of_torch(lambda torch: torch.ones(2, 3).to(torch.float8_e5m2)), "x.to(torch.float32)"),
    "torch's complex numbers": (of_torch(lambda torch: torch.ones(2, 3, dtype=torch.cfloat)), "x.real"),
    "a quantised tensor": (
        of_torch(lambda torch: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)),
        "x.dequantize()",
    ),
    "a sparse tensor": (of_torch(lambda torch: torch.ones(2, 3).to_sparse()), "x.to_dense()"),
    "sparse rows": (of_torch(lambda torch: torch.ones(2, 3).to_sparse_csr()), "x.to_dense()"),
    "a nested tensor": (of_torch(nested), "torch.nested.to_padded_tensor(x, 0)"),
    "a jagged tensor": (
        of_torch(lambda torch: torch.nested.nested_tensor([torch.ones(3)] * 2, layout=torch.jagged)),
        "torch.nested.to_padded_tensor(x, 0)",
    ),
    "a masked tensor": (of_torch(masked), "x.get_data()"),
    "a tensor that wants a gradient": (of_torch(lambda torch: torch.ones(2, 3, requires_grad=True)), "x.detach()"),
    "a parameter": (of_torch(lambda torch: torch.nn.Parameter(torch.ones(2, 3))), "x.detach()"),
    "a tensor without numbers": (
        of_torch(lambda torch: torch.ones(2, 3, device="meta")),
        "torch.empty_like(x, device='cpu')",
    ),
}
"""What cannot be x, and what the error says to pass instead."""


def applied(remedy, **given):
    """The value of a remedy, an expression."""
    (x,) = given.values()
    if remedy == "a copy":
        return x.clone() if hasattr(x, "clone") else x.copy()
    modules = {name: pytest.importorskip(name) for name in ("numpy", "torch", "jax") if f"{name}." in remedy}
    return eval(remedy, {**modules, **given})


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated kinds of arrays
        yield


@pytest.mark.parametrize("case", X)
def test_remedies_for_x(case):
    make, remedy = X[case]
    with quiet():
        x = make()
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            cubn.moments(x)
        assert re.search(
            rf"\. (It holds no numbers: fill|Pass) {re.escape(remedy)}(\.$|,? (and|or) )", str(caught.value)
        )
        assert cubn.moments(applied(remedy, x=x)).count == 2


def test_the_remedy_for_a_masked_array():
    x = np.ma.masked_array(F32, np.array([[0, 1, 0], [0, 0, 0]], bool))
    with pytest.raises(TypeError, match=r"Pass x\.filled\(0\), with mask=~numpy\.ma\.getmaskarray\(x\)\.any") as caught:
        cubn.moments(x)
    values, mask = re.search(r"Pass (.*?), with mask=(.*): a", str(caught.value)).groups()
    channel_axis = 1
    names = {"numpy": np, "x": x, "channel_axis": channel_axis}
    m = cubn.moments(eval(values, names), mask=eval(mask, names))
    assert m.count == 1
    np.testing.assert_array_equal(m.mean, F32[1])


def test_the_remedy_for_a_masked_array_beside_x():
    residual = np.ma.masked_array(F32, F32 > 3)
    state = cubn.BatchNormState(3)
    with pytest.raises(TypeError, match=r"Pass residual\.filled\(0\), or with what should stand where it is masked\.$"):
        cubn.forward(F32, state, residual=residual)
    cubn.forward(F32, state, residual=residual.filled(0))
    mask = np.ma.masked_array(np.ones(2, bool), [True, False])
    with pytest.raises(TypeError, match=r"Pass mask\.filled\(0\)"):
        cubn.moments(F32, mask=mask)
    assert cubn.moments(F32, mask=mask.filled(0)).count == 1


def test_remedies_for_masks():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for x, mask, remedy in (
        (F32, np.ones(2, int), "mask.astype('bool')"),
        (torch.ones(2, 3), torch.ones(2), "mask.to(torch.bool)"),
        (jax.numpy.ones((2, 3), "float32"), jax.numpy.ones(2), "mask.astype('bool')"),
    ):
        with pytest.raises(TypeError, match=rf"Pass {re.escape(remedy)}\.$"):
            cubn.moments(x, mask=mask)
        assert cubn.moments(x, mask=applied(remedy, mask=mask)).count == 2


def test_remedies_for_parameters():
    torch = pytest.importorskip("torch")
    for gamma, remedy in (
        ([1.0, 1.0, 1.0], "numpy.asarray(gamma)"),
        (np.ma.masked_array(ONES, ONES > 2), "gamma.filled(0)"),
        (np.ones(3, int), "gamma.astype('float32')"),
        (torch.ones(3, dtype=int), "gamma.to(torch.float32)"),
        (np.zeros(13, np.uint8)[1:].view(np.float32), "a copy"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"Pass {re.escape(remedy)}"):
            cubn.BatchNormState.from_arrays(gamma=gamma)
        cubn.BatchNormState.from_arrays(gamma=applied(remedy, gamma=gamma))


def test_remedies_for_running_statistics():
    torch = pytest.importorskip("torch")
    read_only, pair = ONES.copy(), np.ones((3, 2), np.float32)
    read_only.flags.writeable = False
    for running_mean, remedy in (
        (read_only, "a copy"),
        (np.broadcast_to(np.float32(1), 3), "a copy"),
        (torch.ones(3).requires_grad_(), "running_mean.detach()"),
        (torch.ones(1).expand(3), "a copy"),
        (Exporter(shape=(3,), strides=(1,), version=None), "numpy.from_dlpack(running_mean).copy()"),
    ):
        state = cubn.BatchNormState.from_arrays(running_mean=running_mean, running_var=pair[:, 0].copy())
        with pytest.raises(ValueError, match=rf"running_mean must .* Pass {re.escape(remedy)}\.$"):
            cubn.forward_train(F32, state)
        state.running_mean = applied(remedy, running_mean=running_mean)
        cubn.forward_train(F32, state)


def test_remedies_for_out():
    jax = pytest.importorskip("jax")
    state = cubn.BatchNormState(3)
    immutable = jax.numpy.asarray(F32)
    old = Exporter(version=None)
    for x, out, remedy in (
        (F32, frozen(), "Pass a copy."),
        (immutable, immutable + 1, "Leave it out."),
        (Exporter(), old, "Leave it out."),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"out must .* {re.escape(remedy)}$"):
            cubn.forward(x, state, out=out)
    cubn.forward(F32, state, out=frozen().copy())


def test_remedies_for_jax_arrays_on_several_devices():
    pytest.importorskip("jax")
    program = """
import jax, numpy as np, cubn, os
mesh = jax.make_mesh((2,), ("a",))
for spec, remedies in (
    (("a",), ("jax.device_put(x, jax.devices()[0])", "x.addressable_data(0)")),
    ((), ("x.addressable_data(0)",)),
):
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = jax.device_put(np.ones((2, 3), "float32"), sharding)
    try:
        cubn.moments(x)
    except ValueError as error:
        assert all(remedy in str(error) for remedy in remedies), error
    print([int(cubn.moments(eval(remedy)).count) for remedy in remedies], flush=True)
os._exit(0)
"""
    assert run(program, XLA_FLAGS="--xla_force_host_platform_device_count=2") == "[2, 1]\n[2]"


def test_the_remedy_for_distributed_tensors():
    pytest.importorskip("torch.distributed.tensor")
    program = """
import torch, cubn
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = DTensor.from_local(torch.ones(2, 3), init_device_mesh("cpu", (1,)))
try:
    cubn.moments(x)
except TypeError as error:
    assert str(error).endswith("Pass x.to_local() or x.full_tensor()."), error
print(cubn.moments(x.to_local()).count, cubn.moments(x.full_tensor()).count)
dist.destroy_process_group()
"""
    assert run(program) == "2 2"
