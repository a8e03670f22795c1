"""What is no array of plain numbers is refused in words, and left as it was."""

import array
import re
import warnings

import numpy as np
import pytest

from cubn import _arrays
from cubn.errors import reporting_as

HERE = "shape=(2, 3), dtype=float32, device=cpu"


def refused(x, error, text, *options):
    """Describing x fails with exactly this message, cause included."""
    with pytest.raises(error, match=f"^{re.escape(text)}$") as caught, reporting_as("forward"):
        _arrays.describe(x, "x", *options)
    return caught.value


# --- row 1: no array ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "got"),
    [
        ([[1.0, 2.0]], "a list. Pass numpy.asarray(x)."),
        (memoryview(b"12"), "a memoryview (shape=(2,)). Pass numpy.asarray(x)."),
        (array.array("f", [1, 2]), "an array.array. Pass numpy.asarray(x)."),
        (np.float32(1), "a numpy.float32 (shape=(), dtype=float32, device=cpu)."),
        (1, "an int."),
        (1.0, "a float."),
        (None, "a NoneType."),
        ("x", "a str."),
        (np.ndarray, "a type."),
    ],
)
def test_what_is_not_an_array_is_refused(x, got):
    refused(x, TypeError, f"forward: x must be an array with __dlpack__; got {got}")


def test_sparse_arrays_of_jax_are_refused():
    pytest.importorskip("jax")
    from jax.experimental import sparse

    x = sparse.BCOO.fromdense(np.ones((2, 3), np.float32))
    refused(
        x,
        TypeError,
        "forward: x must be an array with __dlpack__; got a jax.BCOO (shape=(2, 3), dtype=float32). Pass x.todense().",
    )


# --- row 4: dtypes --------------------------------------------------------------------------------------------------

FLOATS = (
    "forward: x must have dtype float16, bfloat16, float32 or float64; got {0} (shape=(2, 3), dtype={0}, device=cpu). "
)
AS_FLOATS = {
    "numpy": "Pass x.astype('float32').",
    "torch": "Pass x.to(torch.float32).",
    "jax": "Pass x.astype('float32').",
}


def conversion(library, dtype):
    return "Pass x.real and x.imag apart." if dtype.startswith("complex") else AS_FLOATS[library]


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int32", "int64", "bool", "complex64", "complex128", "object", "longdouble"]
)
def test_numpy_dtypes_that_are_no_floats_are_refused(dtype):
    x = np.zeros((2, 3), dtype)
    refused(x, TypeError, FLOATS.format(x.dtype.name) + conversion("numpy", dtype))


def test_numpy_strings_and_times():
    for dtype in ("U4", "S4", "V4", "datetime64[s]", "timedelta64[s]", np.dtypes.StringDType()):
        x = np.zeros((2, 3), dtype)
        text = FLOATS.replace("dtype={0}", "dtype={1}").format(x.dtype.name, x.dtype)
        refused(x, TypeError, text + "It holds no numbers.")


def test_numpy_structures_are_refused():
    x = np.zeros((2, 3), [("a", "f4"), ("b", "f4")])
    text = FLOATS.replace("dtype={0}", "dtype={1}").format(x.dtype.name, x.dtype)
    refused(x, TypeError, text + "Pass x[x.dtype.names[0]] or another of its fields.")


def test_random_keys_of_jax():
    jax = pytest.importorskip("jax")
    for x, shape in ((jax.random.key(0), ()), (jax.random.split(jax.random.key(0), 3), (3,))):
        facts = f"got key<fry> (shape={shape}, dtype=key<fry>, device=cpu). It holds no numbers."
        refused(x, TypeError, f"forward: x must have dtype float16, bfloat16, float32 or float64; {facts}")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4"])
def test_dtypes_that_numpy_has_from_ml_dtypes(dtype):
    x = np.zeros((2, 3), getattr(pytest.importorskip("ml_dtypes"), dtype))
    refused(x, TypeError, FLOATS.format(dtype) + AS_FLOATS["numpy"])


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_dtypes_of_torch_and_jax(library, dtype):
    module = pytest.importorskip(library)
    make = module.zeros if library == "torch" else module.numpy.zeros
    x = make((2, 3), dtype=getattr(module if library == "torch" else module.numpy, dtype))
    refused(x, TypeError, FLOATS.format(dtype) + conversion(library, dtype))


def test_four_bit_arrays_of_jax_are_refused():
    jax = pytest.importorskip("jax")
    refused(jax.numpy.zeros((2, 3), "int4"), TypeError, FLOATS.format("int4") + AS_FLOATS["jax"])


@pytest.mark.parametrize("library", ["array_api_strict", "tvm_ffi"])
def test_dtypes_of_other_libraries(library):
    module = pytest.importorskip(library)
    x = module.from_dlpack(np.zeros((2, 3), np.int32))
    refused(x, TypeError, FLOATS.format("int32") + "Convert it first.")


def test_a_mask_is_bool():
    refused(
        np.ones((2, 3), np.float32),
        TypeError,
        f"forward: x must have dtype bool; got float32 ({HERE}). Pass x.astype('bool').",
        _arrays.BOOL,
    )


# --- row 5: byte order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["f2", "f4", "f8"])
def test_byte_swapped_arrays_are_refused(code):
    dtype = np.dtype(code).newbyteorder("S")
    x = np.ones((2, 3), dtype)
    refused(
        x,
        TypeError,
        f"forward: x must have this machine's byte order; got {dtype.str} (shape=(2, 3), dtype={dtype}, device=cpu). "
        "Pass x.astype(x.dtype.newbyteorder('=')).",
    )
    assert (x == 1).all()


# --- row 9: devices -------------------------------------------------------------------------------------------------


def test_meta_tensors_are_refused():
    torch = pytest.importorskip("torch")
    refused(
        torch.ones(2, 3, device="meta"),
        NotImplementedError,
        "forward: x must be on a CPU or CUDA device; got meta (shape=(2, 3), dtype=float32). "
        "It holds no numbers: fill torch.empty_like(x, device='cpu') and pass that.",
    )


class Elsewhere:
    """An array on a device that this machine may not have."""

    shape = (2, 3)
    dtype = "float32"

    def __init__(self, device):
        self._device = device

    def __dlpack__(self, **options):
        raise AssertionError("nothing is exported from a device that is not understood")

    def __dlpack_device__(self):
        return self._device


@pytest.mark.parametrize(
    ("kind", "name"), [(10, "rocm"), (8, "metal"), (3, "pinned host memory"), (99, "DLPack device type 99")]
)
def test_other_devices_are_refused(kind, name):
    refused(
        Elsewhere((kind, 0)),
        NotImplementedError,
        f"forward: x must be on a CPU or CUDA device; got {name} (shape=(2, 3), dtype=float32). Move it there first.",
    )


def test_torch_on_rocm_is_refused(monkeypatch):
    torch = pytest.importorskip("torch")
    library = _arrays.describe(torch.ones(1), "x").library

    class OnRocm:
        layout, is_nested, is_cpu, is_cuda = torch.strided, False, False, True
        shape, dtype = (2, 3), torch.float32

    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(
        NotImplementedError,
        match=re.escape("cubn: x must be on a CPU or CUDA device; got rocm (shape=(2, 3), dtype=float32)."),
    ):
        library.describe(OnRocm(), "x", _arrays.FLOATS, False)


# --- row 18: gradients ----------------------------------------------------------------------------------------------


def test_an_x_that_requires_a_gradient():
    torch = pytest.importorskip("torch")
    for x in (torch.ones(2, 3, requires_grad=True), torch.nn.Parameter(torch.ones(2, 3))):
        refused(
            x,
            TypeError,
            f"forward: x must not require a gradient; got requires_grad=True ({HERE}). Pass x.detach().",
        )


def test_a_forward_mode_dual_tensor():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its decompositions here
        x = torch.autograd.forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3))
        refused(
            x,
            TypeError,
            f"forward: x must have no forward-mode tangent; got a dual tensor ({HERE}). Pass x.detach().",
        )


# --- row 19: what stands for numbers --------------------------------------------------------------------------------


def stand_in(kind, facts=HERE):
    return (
        f"forward: x must hold numbers in memory, not stand for them; got a {kind} ({facts}). "
        "Call it outside tracing, vmap and the like."
    )


@pytest.mark.parametrize("mode", ["vmap", "grad", "functionalize"])
def test_inside_a_torch_transformation(mode):
    torch = pytest.importorskip("torch")
    asked = []

    def f(x):
        refused(x, TypeError, stand_in("torch.Tensor"))
        asked.append(mode)
        return x.sum()

    wrapped = getattr(torch.func, mode)
    wrapped(f)(torch.ones(4, 2, 3) if mode == "vmap" else torch.ones(2, 3))
    assert asked


def test_torch_tensors_without_memory():
    torch = pytest.importorskip("torch")
    refused(torch._efficientzerotensor((2, 3)), TypeError, stand_in("torch.Tensor"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        refused(torch.ones(2, 3), TypeError, stand_in("torch.FakeTensor"))
        refused(torch.ones(0, 3), TypeError, stand_in("torch.FakeTensor", HERE.replace("2", "0", 1)))


def test_outputs_under_a_fake_tensor_mode():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = _arrays.describe(torch.ones(2, 3), "x")
    with (
        FakeTensorMode(),
        pytest.raises(
            TypeError,
            match="^cubn: an output must hold numbers in memory, not stand for them; got a torch.FakeTensor "
            rf"{re.escape(f'({HERE})')}\. Call it outside tracing, vmap and the like\.$",
        ),
    ):
        _arrays.empty_like(x)


@pytest.mark.parametrize("mode", ["jit", "grad", "vmap"])
def test_jax_tracers_are_refused(mode):
    jax = pytest.importorskip("jax")
    asked = []

    def f(x):
        kind = type(x).__qualname__
        refused(x, TypeError, stand_in(f"jax.{kind}", "shape=(2, 3), dtype=float32"))
        asked.append(mode)
        return x.sum()

    getattr(jax, mode)(f)(jax.numpy.ones((4, 2, 3) if mode == "vmap" else (2, 3), "float32"))
    assert asked


# --- row 20: more than numbers --------------------------------------------------------------------------------------


def test_masked_arrays_and_matrices():
    x = np.ma.masked_equal(np.ones((2, 3), np.float32), 0)
    refused(
        x,
        TypeError,
        f"forward: x must be a plain numpy.ndarray; got a numpy.MaskedArray ({HERE}). "
        "Pass x.filled(0), with mask=~numpy.ma.getmaskarray(x).any(channel_axis): a position is present in all "
        "channels or in none.",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        x = np.matrix(np.ones((2, 3), np.float32))
    refused(
        x,
        TypeError,
        f"forward: x must be a plain numpy.ndarray; got a numpy.matrix ({HERE}). Pass numpy.asarray(x).",
    )


@pytest.mark.parametrize("kind", ["nested", "sparse_coo", "sparse_csr"])
def test_torch_layouts_that_are_not_strided_are_refused(kind):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls these layouts unfinished
        if kind == "nested":
            x, facts = torch.nested.nested_tensor([torch.ones(2, 3)]), "dtype=float32, device=cpu"
        else:
            x, facts = torch.ones(2, 3).to_sparse(layout=getattr(torch, kind)), HERE
    remedy = "torch.nested.to_padded_tensor(x, 0)" if kind == "nested" else "x.to_dense()"
    refused(x, TypeError, f"forward: x must be a dense tensor; got a {kind} one ({facts}). Pass {remedy}.")


def test_quantised_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        x = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8)
    refused(x, TypeError, FLOATS.format("quint8") + "Pass x.dequantize().")


def test_masked_tensors_are_refused():
    torch = pytest.importorskip("torch")
    from torch.masked import masked_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        x = masked_tensor(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    outside = "Call it outside tracing, vmap and the like."
    refused(x, TypeError, stand_in("torch.MaskedTensor").replace(outside, "Pass x.get_data()."))


# --- row 21: JAX arrays that are gone or in pieces ------------------------------------------------------------------


def test_a_deleted_jax_array():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((2, 3), "float32")
    x.delete()
    refused(
        x,
        ValueError,
        "forward: x must not be deleted; got a deleted array (shape=(2, 3), dtype=float32). Donate a copy instead.",
    )


def test_a_jax_array_on_several_devices():
    from tests.interop.test_outputs import run

    pytest.importorskip("jax")
    program = """
import jax, numpy as np
from cubn import _arrays
mesh = jax.make_mesh((2,), ("a",))
x = jax.device_put(np.ones((2, 3), "float32"), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("a")))
try:
    _arrays.describe(x, "x")
except ValueError as error:
    print(error)
"""
    assert run(program, XLA_FLAGS="--xla_force_host_platform_device_count=2") == (
        "cubn: x must be on one device; got one on 2 devices (shape=(2, 3), dtype=float32). "
        "Pass jax.device_put(x, jax.devices()[0]), or one shard, x.addressable_data(0)."
    )


# --- row 25: alignment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_misaligned_address(dtype):
    memory = np.zeros(64 + 1, np.uint8)
    size = np.dtype(dtype).itemsize
    x = memory[1 : 1 + 6 * size].view(dtype).reshape(2, 3)
    refused(
        x,
        ValueError,
        f"forward: x must be aligned to its elements; got address {x.ctypes.data:#x} "
        f"(shape=(2, 3), dtype={dtype}, device=cpu). Pass a copy.",
    )


def test_steps_of_no_whole_element():
    x = np.zeros((2, 3), [("a", "f4"), ("b", "u1")])["a"]
    refused(
        x,
        ValueError,
        f"forward: x must be aligned to its elements; got strides of (15, 5) bytes ({HERE}). Pass a copy.",
    )
    assert _arrays.describe(np.zeros((1, 1), [("a", "f4"), ("b", "u1")])["a"], "x").shape == (1, 1)


@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_misaligned_in_another_library(library):
    module = pytest.importorskip(library)
    x = np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)
    x = module.asarray(x) if library == "array_api_strict" else module.from_numpy(x)
    pointer = x.data_ptr() if library == "torch" else x._array.ctypes.data
    refused(
        x,
        ValueError,
        f"forward: x must be aligned to its elements; got address {pointer:#x} ({HERE}). Pass a copy.",
    )


class Unfriendly:
    """Raises whatever it is asked for."""

    def __getattr__(self, name):
        raise RuntimeError(name)


def test_an_object_that_answers_nothing():
    refused(Unfriendly(), TypeError, "forward: x must be an array with __dlpack__; got a tests.Unfriendly.")
