"""cubn.warm_up: first calls of layers find all of their kernels."""

import numpy as np
import pytest

import cubn
from cubn.backends.cuda.backend import CudaBackend
from tests.backends import forget_backends
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda_on_cpu.device import CpuDevice


class Compiling(CpuDevice):
    """Knows which kernels were compiled before they were launched; launches nothing."""

    def __init__(self, limits):
        super().__init__(limits)
        self.compiled = set()
        self.missed = []

    def compile(self, launches):
        self.compiled |= {(launch.kernel, launch.options) for launch in launches}

    def launch(self, launch, *rest):
        self.launched.append(launch)
        if (launch.kernel, launch.options) not in self.compiled:
            self.missed.append(launch)


@pytest.fixture(params=[RESIDENT, PASSES], ids=["resident", "passes"])
def device(request, monkeypatch):
    device = Compiling(request.param)
    cuda = CudaBackend(device)
    monkeypatch.setattr("cubn.backends.cpu.backend", lambda: cuda)
    forget_backends()
    yield device
    forget_backends()


SHAPES = {
    "nchw": ((4, 32, 14, 14), 1, False),
    "nchw, odd": ((3, 6, 7, 7), 1, False),
    "nchw, one channel": ((3, 1, 7, 7), 1, False),
    "channels last": ((4, 32, 14, 14), 1, True),
    "channels last, one channel": ((3, 1, 7, 7), 1, True),
    "nhwc": ((4, 14, 14, 32), -1, False),
    "2-D": ((200, 24), 1, False),
    "2-D, odd": ((200, 33), -1, False),
    "channels first": ((8, 200), 0, False),
    "a volume": ((2, 16, 3, 4, 5), 1, True),
}
FUSED = [{"residual": residual, "relu": relu} for residual in (False, True) for relu in (False, True)]


def call(shape, axis, channels_last, dtype, residual, relu):
    """The operations that a warm-up is for."""
    x = np.zeros(shape, dtype)
    if channels_last:
        x = np.moveaxis(np.zeros(np.moveaxis(x, axis, -1).shape, x.dtype), -1, axis)
    options = {"residual": x.copy("K") if residual else None, "relu": relu}
    state = cubn.BatchNormState(shape[axis], channel_axis=axis)
    _, saved = cubn.forward_train(x, state, **options)
    cubn.backward(x, saved)
    cubn.forward(x, state, **options)


@pytest.mark.parametrize("fused", FUSED, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_after_a_warm_up_every_kernel_on_the_device_is_compiled(name, fused, device):
    shape, axis, channels_last = SHAPES[name]
    for dtype in ("float16", "float64"):
        cubn.warm_up(shape, dtype=dtype, channel_axis=axis, channels_last=channels_last, **fused)
        assert not device.launched
        warm = set(device.compiled)
        call(shape, axis, channels_last, dtype, **fused)
        assert device.launched and {(launch.kernel, launch.options) for launch in device.launched} <= warm
        device.launched.clear()


def test_kernels_of_all_shapes_are_compiled_together(device):
    together = []
    compile_some = device.compile
    device.compile = lambda launches: (together.append(len(launches)), compile_some(launches))
    cubn.warm_up([(4, 32, 14, 14), (4, 32, 7, 7), (4, 32, 14, 14)])
    assert len(together) == 1


@pytest.mark.parametrize("asked", ["training", "inference"])
def test_only_what_is_asked_for_is_compiled(asked, device):
    cubn.warm_up((4, 32, 14, 14), **({"training": False, "inference": False} | {asked: True}))
    normalises = {any("OPERATION=GRADIENT" in option for option in options) for _, options in device.compiled}
    assert (True in normalises) == (asked == "training")
    assert ("frozen" in {kernel for kernel, _ in device.compiled}) == (asked == "inference")


def test_a_call_compiles_all_its_kernels_before_it_launches_any(device):
    call((4, 32, 14, 14), 1, False, "float32", True, True)
    assert not device.missed


@pytest.mark.parametrize("operation", ["normalize", "moments", "update"])
def test_other_calls_compile_all_their_kernels_first(operation, device):
    x = np.zeros((4, 32, 14, 14), np.float32)
    found = cubn.moments(x)
    if operation == "normalize":
        cubn.normalize(x, found)
    elif operation == "update":
        cubn.update(cubn.BatchNormState(32), found)
    assert device.launched and not device.missed


def test_no_shape_is_no_work(device):
    cubn.warm_up([])
    assert not device.compiled


def test_an_array_says_where_and_of_which_dtype(device):
    cubn.warm_up((4, 32, 14, 14), like=np.zeros(3, np.float16))
    options = {option for _, options in device.compiled for option in options}
    assert "-DELEMENT=float16" in options and "-DELEMENT=float" not in options


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), "torch.float16"])
def test_a_dtype_may_be_any_library_s(dtype, device):
    if dtype == "torch.float16":
        torch = pytest.importorskip("torch")
        dtype = torch.float16
    cubn.warm_up((4, 32), dtype=dtype)
    assert any("-DELEMENT=float16" in options for _, options in device.compiled)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"shapes": 3}, TypeError, "warm_up: shapes must be a shape, or several; got 3"),
        ({"shapes": (3,)}, ValueError, "warm_up: shapes must have two axes or more"),
        ({"shapes": [(3, 0)]}, ValueError, "each with an extent of 1 or more; got (3, 0)"),
        ({"shapes": [(3, 1.5)]}, TypeError, "warm_up: shapes must be an integer; got 1.5"),
        (
            {"dtype": "int8"},
            ValueError,
            "warm_up: dtype must be one of float16, bfloat16, float32, float64; got 'int8'",
        ),
        ({"dtype": object()}, ValueError, "warm_up: dtype must be one of"),
        ({"device": "tpu"}, ValueError, 'warm_up: device must be "cpu", "cuda" or the like of "cuda:1"; got \'tpu\''),
        ({"device": "cpu:1"}, ValueError, "got 'cpu:1'"),
        ({"channel_axis": 2}, np.exceptions.AxisError, "channel_axis must be at least -2 and below 2"),
        ({"relu": 1}, TypeError, "warm_up: relu must be True or False; got 1"),
        ({"channels_last": "yes"}, TypeError, "warm_up: channels_last must be True or False"),
        ({"training": None}, TypeError, "warm_up: training must be True or False"),
        ({"like": "x"}, TypeError, "like"),
    ],
)
def test_a_wrong_argument_is_named(options, error, said):
    with pytest.raises(error) as raised:
        cubn.warm_up(**({"shapes": (4, 8)} | options))
    assert said in str(raised.value)


def test_a_device_that_is_not_here_is_named():
    with pytest.raises((ImportError, cubn.BackendUnavailable), match=r"^cubn: .*"):
        cubn.warm_up((4, 8), device="cuda")
