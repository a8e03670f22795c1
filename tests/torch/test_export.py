"""Programs for elsewhere: of torch's operators alone, that load and run where there is no cubn."""

import subprocess
import sys
import textwrap

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402

import cubn.torch  # noqa: E402
from cubn.torch import convert, fold  # noqa: E402
from tests.torch.comparing import batch  # noqa: E402

SHAPE = (4, 3, 8, 8)
EPS = torch.finfo(torch.float32).eps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.other(x))


@pytest.fixture(scope="module")
def model():
    """Fused, with statistics of its own, in eval mode."""
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Block(), nn.SyncBatchNorm(3)), fuse=True)
    assert [type(model[0]), type(model[2].bn)] == [cubn.torch.BatchNormReLU2d, cubn.torch.BatchNormAddReLU2d]
    model(batch(SHAPE))
    return model.eval()


def close(y, expected, layers=4):
    """As near as torch's way and cubn's of one float32 batch norm after another."""
    return y.shape == expected.shape and (y - expected).abs().max() <= 8 * layers * EPS * (1 + expected.abs().max())


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


OF_TORCH = {"aten.batch_norm.default", "aten.conv2d.default", "aten.add.Tensor", "aten.relu.default"}

LOAD = """
    import sys
    sys.modules["cubn"] = None
    import torch
    x, y = torch.load(sys.argv[3])
    program = torch.{load}(sys.argv[1]){module}
    torch.save(program(x), sys.argv[2])
"""


def elsewhere(tmp_path, path, x, load, module=""):
    """What a saved program gives in a process that cannot import cubn."""
    torch.save((x, None), tmp_path / "x")
    script = textwrap.dedent(LOAD.format(load=load, module=module))
    arguments = [sys.executable, "-W", "ignore", "-c", script, path, tmp_path / "y", tmp_path / "x"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path / "y")


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_of_torchs_operators(model, strict):
    program = torch.export.export(model, (batch(SHAPE),), dynamic_shapes=({0: Dim("N")},), strict=strict)
    assert operators(program) == OF_TORCH
    x = batch((7, *SHAPE[1:]), seed=2)
    with torch.no_grad():
        assert close(program.module()(x), model(x))


def test_an_exported_model_runs_without_cubn(model, tmp_path):
    path, x = tmp_path / "model.pt2", batch(SHAPE)
    torch.export.save(torch.export.export(model, (x,)), path)
    assert close(elsewhere(tmp_path, path, x, "export.load", ".module()"), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_model_runs_without_cubn(model, tmp_path):
    path, x = tmp_path / "model.pt", batch(SHAPE)
    traced = torch.jit.trace(model, x)
    assert close(traced(x), model(x))
    traced.save(path)
    assert close(elsewhere(tmp_path, path, x, "jit.load"), model(x))


def test_a_folded_model_is_exported(model):
    folded, report = fold(nn.Sequential(nn.Conv2d(3, 4, 1), convert(nn.BatchNorm2d(4))).eval())
    assert report.done
    assert operators(torch.export.export(folded, (batch(SHAPE),))) == {"aten.conv2d.default"}


@pytest.mark.parametrize("mask", [(4, 8, 8), (4, 1, 1)])
def test_a_mask_is_exported(mask):
    bn = cubn.torch.BatchNormReLU2d(3).eval()
    x, kept = batch(SHAPE), batch(mask) > 0
    x[0, 0, 0, 0] = torch.nan
    kept[0, 0, 0] = False
    y = torch.export.export(bn, (x, kept)).module()(x, kept)
    assert close(y, bn(x, kept)) and not y.isnan().any() and (y[0, :, 0, 0] == 0).all()


@pytest.mark.parametrize(
    ("of_x", "of_module"), [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64")]
)
def test_dtypes_that_differ_are_exported(of_x, of_module):
    bn = cubn.torch.BatchNormAddReLU2d(3, dtype=getattr(torch, of_module)).eval()
    x, residual = (batch(SHAPE, seed, getattr(torch, of_x)) for seed in range(2))
    y = torch.export.export(bn, (x, residual)).module()(x, residual)
    assert y.dtype == x.dtype
    assert (y - bn(x, residual)).abs().max() <= torch.finfo(x.dtype).eps * y.abs().max()


def test_functional_is_exported():
    class Functional(nn.Module):
        def forward(self, x, mean, var):
            return cubn.torch.functional.batch_norm(x, mean, var, relu=True)

    arguments = batch(SHAPE), torch.zeros(3), torch.ones(3)
    program = torch.export.export(Functional(), arguments)
    assert operators(program) == {"aten.batch_norm.default", "aten.relu.default"}
    assert close(program.module()(*arguments), Functional()(*arguments))


def exported(model, x):
    return torch.export.export(model, (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("export", [exported, torch.jit.trace])
def test_a_model_in_training_mode_is_not_exported(export):
    bn = cubn.torch.BatchNorm2d(3)
    with pytest.raises(
        RuntimeError, match=r"export: model must normalise by running statistics; .* Call model\.eval\(\)"
    ):
        export(bn, batch(SHAPE))
    assert bn.num_batches_tracked == 0 and not bn.running_mean.any()


def test_a_model_without_running_statistics_is_not_exported():
    bn = cubn.torch.BatchNorm2d(3, track_running_stats=False).eval()
    with pytest.raises(RuntimeError, match="model must normalise by running statistics"):
        exported(bn, batch(SHAPE))


def test_a_frozen_model_is_exported_also_in_training():
    bn = cubn.torch.BatchNorm2d(3).freeze()
    assert operators(exported(bn, batch(SHAPE))) == {"aten.batch_norm.default"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripting_is_refused_and_changes_nothing():
    model = nn.Sequential(cubn.torch.BatchNorm2d(3)).eval()
    with pytest.raises(
        TypeError, match=r"^torch\.jit\.script: model must hold .* got a cubn\.BatchNorm2d\. Pass an example"
    ):
        torch.jit.script(model)
    assert type(model[0]) is cubn.torch.BatchNorm2d


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of onnxscript
def test_an_onnx_model_runs_in_onnxruntime(model, tmp_path):
    pytest.importorskip("onnxscript", reason="NOT TESTED: torch.onnx.export needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="NOT TESTED: what torch.onnx exports needs onnxruntime")
    path, x = str(tmp_path / "model.onnx"), batch((7, *SHAPE[1:]), seed=2)
    torch.onnx.export(model, (batch(SHAPE),), path, dynamo=True, verbose=False, dynamic_shapes=({0: Dim("N")},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert close(torch.from_numpy(y), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*in training mode")
def test_a_model_in_training_mode_does_not_become_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="NOT TESTED: torch.onnx.export needs onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as refusal:
        torch.onnx.export(cubn.torch.BatchNorm2d(3), (batch(SHAPE),), str(tmp_path / "model.onnx"), dynamo=True)
    assert "Call model.eval()" in str(refusal.value)
