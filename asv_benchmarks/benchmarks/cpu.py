"""The CPU suite: each operation as a multiple of a copy and of torch's time; host overhead; first calls."""

import os
import subprocess
import sys
import tempfile

import numpy as np

import cubn

from .host import SHAPES, calls, compiled_calls
from .models import steps
from .shares import Blocks, alternate_blocks, difference, share_ratio
from .workloads import WORKLOADS, alternate, arrays, operations, random, use_threads

NAMED = {f"{workload.name} {workload.layout}": workload for workload in WORKLOADS}


class _Ratios:
    params = (list(NAMED),)
    param_names = ("array",)
    operation: str

    def setup(self, array: str) -> None:
        use_threads()
        self.operations = operations(arrays(NAMED[array]))

    def track_over_copy(self, array: str) -> float:
        ours, copy = alternate([self.operations[self.operation].cubn, self.operations["copy"].cubn])
        return ours / copy

    def track_over_torch(self, array: str) -> float:
        ours, theirs = alternate(list(self.operations[self.operation]))
        return ours / theirs

    track_over_copy.unit = "copies"
    track_over_torch.unit = "of torch's time"


class ForwardTrain(_Ratios):
    operation = "forward_train"


class Forward(_Ratios):
    operation = "forward"


class Moments(_Ratios):
    operation = "moments"


class Backward(_Ratios):
    operation = "backward"


class BackwardInto(_Ratios):
    operation = "backward into dx"


class Groups:
    """A forward and its backward by ghost batches, as a multiple of the same without."""

    params = (["256@14² nchw", "256@14² nhwc", "(1024, 1024) 2-d"], [2, 8, 32])
    param_names = ("array", "groups")

    def setup(self, array: str, groups: int) -> None:
        use_threads()
        x = random(NAMED[array])
        state = cubn.BatchNormState(x.shape[1], like=x)

        def step(**options: int) -> None:
            y, saved = cubn.forward_train(x, state, **options)
            cubn.backward(y, saved)

        self.by_groups, self.plain = lambda: step(groups=groups), step

    def track_over_plain(self, array: str, groups: int) -> float:
        by_groups, plain = alternate([self.by_groups, self.plain])
        return by_groups / plain

    track_over_plain.unit = "of a plain step"


class Share:
    """What of a network's training step is batch norm's: the step minus that of the network without it."""

    params = (["resnet20 nchw", "resnet20 nhwc", "mlp 2-d"],)
    param_names = ("network",)

    def setup_cache(self) -> dict[str, Blocks]:
        use_threads()
        return {network: alternate_blocks(steps(*network.split()), 12) for network in self.params[0]}

    setup_cache.timeout = 600

    def track_share(self, blocks: dict[str, Blocks], network: str) -> float:
        return float(difference("cubn", "none")(blocks[network]) / np.median(blocks[network]["cubn"]))

    def track_over_torch(self, blocks: dict[str, Blocks], network: str) -> float:
        return float(share_ratio("cubn", "torch", "none")(blocks[network]))

    def track_fused_over_torch(self, blocks: dict[str, Blocks], network: str) -> float:
        """With the additions and ReLUs around it."""
        return float(share_ratio("fused", "torch", "bare")(blocks[network]))

    track_share.unit = "of a step"
    track_over_torch.unit = track_fused_over_torch.unit = "of torch's share"


class Overhead:
    """The time of a call whose arithmetic is nothing, on one thread."""

    params = (["numpy", "torch"], SHAPES)
    param_names = ("contestant", "shape")

    def setup(self, contestant: str, shape: tuple[int, ...]) -> None:
        use_threads(1)
        self.calls = calls(shape)[contestant]

    def time_forward(self, *_: object) -> None:
        self.calls["forward"]()

    def time_forward_train(self, *_: object) -> None:
        self.calls["forward_train"]()

    def time_backward(self, *_: object) -> None:
        self.calls["backward"]()

    def time_moments(self, *_: object) -> None:
        self.calls["moments"]()

    def time_normalize(self, *_: object) -> None:
        self.calls["normalize"]()

    def time_update(self, *_: object) -> None:
        self.calls["update"]()


class OverheadOfTorch:
    """The same of torch, which has three of the operations: its operators, and its modules under autograd."""

    params = (["aten", "torch.nn"], SHAPES)
    param_names = Overhead.param_names
    setup = Overhead.setup
    time_forward = Overhead.time_forward
    time_forward_train = Overhead.time_forward_train
    time_backward = Overhead.time_backward


class OverheadOfModules:
    """Modules under autograd, those of torch and of cubn: a forward, and a forward with its backward."""

    params = (["torch.nn", "cubn.torch"], SHAPES)
    param_names = Overhead.param_names
    setup = Overhead.setup
    time_forward = Overhead.time_forward
    time_forward_train = Overhead.time_forward_train

    def time_step(self, *_: object) -> None:
        self.calls["step"]()


class CompiledModules:
    """The same through torch.compile; torch's own becomes one fused kernel."""

    params = (["torch.nn, compiled", "cubn.torch, compiled"], SHAPES)
    param_names = Overhead.param_names
    time_forward = Overhead.time_forward
    time_forward_train = Overhead.time_forward_train
    time_step = OverheadOfModules.time_step
    timeout = 300

    def setup(self, contestant: str, shape: tuple[int, ...]) -> None:
        use_threads(1)
        self.calls = compiled_calls(shape)[contestant]


class FirstCall:
    """The first call in a new process, import of cubn left out, with an empty and with a filled kernel cache."""

    params = (["forward", "forward_train", "moments"], ["empty", "filled"])
    param_names = ("operation", "cache")
    unit = "s"
    timeout = 300

    def track_first_call(self, operation: str, cache: str) -> float:
        argument = "x" if operation == "moments" else "x, cubn.BatchNormState(8)"
        code = (
            "import time, numpy, cubn; x = numpy.ones((4, 8, 5, 5), 'float32'); begin = time.perf_counter(); "
            f"cubn.{operation}({argument}); print(time.perf_counter() - begin)"
        )
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"CUBN_CACHE_DIR": folder}
            for _ in range(1 if cache == "empty" else 2):
                run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        return float(run.stdout)

    track_first_call.unit = "s"


class Import:
    """`import cubn` beyond `import numpy`, in a new process."""

    def track_import(self) -> float:
        code = "import numpy, time; begin = time.perf_counter(); import cubn; print(time.perf_counter() - begin)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
        return min(float(run.stdout) for run in runs)

    track_import.unit = "s"
