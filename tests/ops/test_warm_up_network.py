"""`python -m cubn warm-up resnet50`: which layers networks have, and what is compiled for them."""

import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

import cubn
from cubn.__main__ import main
from cubn.backends import folder, kernel_files
from cubn.backends.cuda import planned
from cubn.backends.cuda.compile import compiler
from cubn.backends.cuda.machine_code import MachineCode
from cubn.cli.networks import NETWORKS
from cubn.cli.warm_up_network import Kind, kinds
from tests.cuda.stand_in import Nvrtc

RESNET50 = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}


def test_a_resnet_50_has_the_53_layers_that_everybody_measures():
    assert Counter((layer.channels, layer.size) for layer in NETWORKS["resnet50"](224)) == RESNET50


@pytest.mark.parametrize(
    ("name", "layers", "residual", "plain"),
    [("resnet18", 20, 8, 3), ("resnet34", 36, 16, 3), ("resnet50", 53, 16, 4), ("resnet101", 104, 33, 4)],
)
def test_networks_have_as_many_layers_as_torchvision_s(name, layers, residual, plain):
    found = list(NETWORKS[name](224))
    assert len(found) == layers
    assert sum(layer.residual for layer in found) == residual
    assert sum(not layer.relu for layer in found) == plain


def test_layers_of_odd_images_are_rounded_up():
    assert {layer.size for layer in NETWORKS["resnet18"](97)} == {49, 25, 13, 7, 4}


def test_a_network_that_does_not_fuse_has_plain_layers_once():
    found = kinds("resnet50", 8, 224, ["float16"], True, False)
    assert len(found) == len(RESNET50)
    assert found[0] == Kind((8, 64, 112, 112), "float16", True, False, False)
    assert {kind[3:] for kind in kinds("resnet50", 8, 224, ["float16"], True, True)} == {
        (False, True),
        (True, True),
        (False, False),
    }


@pytest.fixture
def nvrtc(tmp_path, monkeypatch):
    """The compiler, a stand-in, and a device of compute capability 9.0."""
    monkeypatch.setenv("CUBN_CACHE_DIR", str(tmp_path))
    for function in (folder._walked, kernel_files.tell):
        function.cache_clear()
    compiling = Nvrtc()
    device = SimpleNamespace(
        machine_code=lambda capability: MachineCode(compiler(compiling, capability)),
        limits_of=lambda index: planned.USUAL[9, 0],
    )
    monkeypatch.setitem(sys.modules, "cubn.backends.cuda.cupy_device", device)
    yield compiling
    folder._walked.cache_clear()


def test_kernels_are_compiled_for_a_device_that_is_not_here(nvrtc, capsys, tmp_path):
    command = ["warm-up", "resnet50", "--dtypes", "bfloat16", "--batch", "8", "--fuse", "--channels-last"]
    assert main([*command, "--architecture", "80"]) == 0
    number = len(nvrtc.compiled)
    assert number == len(list((tmp_path / "cuda-sm_80-nvrtc-13.1").iterdir())) > 10
    first = capsys.readouterr().out
    assert first.startswith(f"Compiled {number} kernels in ") and first.endswith("for 16 kinds of layers on sm_80.\n")
    assert main([*command, "--architecture", "80"]) == 0
    assert capsys.readouterr().out.startswith("Compiled 0 kernels ")
    assert main([*command, "--device", "cuda"]) == 0
    assert (tmp_path / "cuda-sm_90-nvrtc-13.1").is_dir()


def test_a_warm_up_for_cuda_that_keeps_nothing_fails(nvrtc, capsys, monkeypatch):
    monkeypatch.setenv("CUBN_CACHE_DIR", "")
    assert main(["warm-up", "resnet18", "--architecture", "90"]) == 1
    assert "could not be kept" in capsys.readouterr().err


def test_an_architecture_nothing_is_known_of_is_one_line(nvrtc, capsys):
    assert main(["warm-up", "resnet18", "--architecture", "91"]) == 1
    assert capsys.readouterr().err == "cubn: nothing is known of sm_91. Choose one of 75, 80, 86, 89, 90, 100, 120\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["resnet50", "--layouts", "2d"], "--layouts is for a warm-up without a network"),
        (["resnet50", "--fused", "relu"], "--fused is for a warm-up without a network"),
        (["--channels-last"], "--channels-last is for a warm-up with a network"),
        (["--architecture", "90"], "--architecture is for a warm-up with a network"),
        (["resnet50", "--batch", "0"], "must be a whole number, 1 or more; got 0"),
        (["resnet50", "--device", "gpu"], "must be cpu, cuda or the like of cuda:1; got gpu"),
        (["resnet51"], "resnet51"),
    ],
)
def test_options_that_mean_nothing_are_refused(command, said, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["warm-up", *command])
    assert said in capsys.readouterr().err


ON_CPU = """
import cubn, numpy as np
from cubn.backends.cpu.compile import compiled_here
from cubn.cli.warm_up_network import Kind, make

cubn.set_num_threads(2)
for shape, channels_last in (((16, 64, 32, 32), False), ((16, 64, 32, 32), True), ((64, 64, 7, 7), False)):
    made = make(Kind(shape, "float32", channels_last, True, True))
    before = len(compiled_here)
    x = np.zeros(shape, np.float32)
    if channels_last:
        x = np.moveaxis(np.zeros(np.moveaxis(x, 1, -1).shape, np.float32), -1, 1)
    state = cubn.BatchNormState(64)
    _, saved = cubn.forward_train(x, state, residual=x.copy("K"), relu=True)
    cubn.backward(x, saved)
    cubn.forward(x, state, residual=x.copy("K"), relu=True)
    print(len(made) > 0, compiled_here[before:])
"""


def test_after_a_warm_up_nothing_is_left_to_compile_for_the_cpu(tmp_path):
    environment = os.environ | {"CUBN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ON_CPU], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "True []\n" * 3, done.stderr


def test_without_cupy_a_warm_up_for_cuda_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "cubn.backends.cuda.cupy_device", raising=False)
    assert main(["warm-up", "resnet18", "--architecture", "90"]) == 1
    assert "pip install cupy-cuda13x" in capsys.readouterr().err
    with pytest.raises(ImportError, match="pip install cupy-cuda13x"):
        cubn.warm_up((4, 8), device="cuda")
