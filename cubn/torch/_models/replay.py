"""A model run on a batch, and again on some of its samples, with each module given what it was given in the first run.

A run again changes nothing but what is compared: where bits differ, the first run's take their place. So a difference
is of the module that made it, or of what is computed since the one before, and of nothing further up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cubn.torch._models import bits
from cubn.torch._models.bits import NONE, Difference
from cubn.torch._models.cuts import Arguments, Cut, IncomparableError, Values

Definition = Literal["mixes by definition", "random by definition"]
"""What a layer may do in training without being guilty of anything."""


class Finding:
    """What runs again have shown of one thing: a call, what is computed before it, or the whole model."""

    def __init__(self) -> None:
        self.excuse = ""  # why it may give other bits than before
        self.compared: set[Cut] = set()
        self.differences: dict[Cut, Difference] = {}
        self.reasons: dict[str, None] = {}  # why it was not compared, in order

    def settle(self, recorded: Values, actual: Any, cut: Cut, excuse: str = "") -> tuple[Any, Difference | None]:
        """What `Values.settle` gives, which is noted here; no difference where there was nothing to compare."""
        try:
            settled, found = recorded.settle(actual, cut)
        except IncomparableError as reason:
            self.reasons[str(reason)] = None
            return actual, None
        self.add(cut, found, excuse)
        return settled, found

    def add(self, cut: Cut, found: Difference, excuse: str = "") -> None:
        if found == NONE:
            self.compared.add(cut)
            return
        if cut.whole:
            self.excuse = self.excuse or "other bits from the same inputs"
        if reason := self.excuse or excuse:
            self.reasons[reason] = None
        else:
            self.compared.add(cut)
            self.differences[cut] = found


class Call:
    """Of a module that calls no other."""

    def __init__(self, path: str, module: nn.Module, inputs: Values) -> None:
        self.path, self.module, self.inputs = path, module, inputs
        self.output: Values | None = None  # None: it calls others
        self.finding, self.before = Finding(), Finding()


class Run:
    """The first run, which is recorded, and those that follow it."""

    def __init__(self, model: nn.Module, arguments: Arguments, samples: int) -> None:
        self.model, self.arguments = model, arguments
        self.paths = dict[nn.Module, str]()
        _look_into(model, "", self.paths)
        tensors = *arguments[0], *arguments[1].values(), *model.parameters(), *model.buffers()
        self.devices = cuda_devices(tensors)
        self.calls, self.whole = list[Call](), Finding()
        with unchanged(self.model, self.devices):
            begin = self.random_state = self._random_state()  # at the end of the last call
            with _around(self.paths, self._record):
                output = self._output(Cut(0, samples, samples))
            self.end = Call("", model, Values(output))  # what comes after the last call
            self._excuse(self.end.before, self.random_state)
            self._excuse(self.whole, begin)

    def _record(self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call = Call(self.paths[module], module, Values((args, kwargs)))
        self._excuse(call.before, self.random_state)
        self.calls.append(call)
        count, begin = len(self.calls), self._random_state()
        output = forward(*args, **kwargs)
        if len(self.calls) == count:
            call.output = Values(output)
            self._excuse(call.finding, begin)
            self.random_state = self._random_state()
        else:
            call.inputs = Values(())  # nobody will ask for them
        return output

    def _excuse(self, finding: Finding, since: bytes) -> None:
        """Of other bits, where random numbers were drawn since then."""
        if self._random_state() != since:
            finding.excuse = "draws random numbers"

    def again(self, cut: Cut) -> None:
        """Run on some of the samples, and compare what each module gives and is given, and then the model's output."""
        follower = _Follower(self, cut)
        try:
            with unchanged(self.model, self.devices):
                with _around(self.paths, follower):
                    output = self._output(cut)
                follower.end(output)
        except IncomparableError:
            self._compare_whole(cut)
            raise
        if follower.same:
            self.whole.add(cut, NONE)
        else:
            self._compare_whole(cut)

    def _compare_whole(self, cut: Cut) -> None:
        if not any(by_definition(self.model, call.module) for call in self.calls):
            with unchanged(self.model, self.devices):
                self.whole.settle(self.end.inputs, self._output(cut), cut)

    def _output(self, cut: Cut) -> Any:
        args, kwargs = cut.of(self.arguments)
        return self.model(*args, **kwargs)

    def _random_state(self) -> bytes:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]
        return b"".join(state.numpy().tobytes() for state in states)


def cuda_devices(tensors: Iterable[Any]) -> list[torch.device]:
    """Those that random numbers may be drawn on."""
    devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
    return [device for device in devices if device.type == "cuda"]


@contextmanager
def unchanged(model: nn.Module, devices: Iterable[torch.device]) -> Iterator[None]:
    """Afterwards a model's buffers, and random numbers, are as before."""
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    held = [dict(module._buffers) for module in plain]
    buffers = list(model.buffers())
    values = [buffer.detach().clone() for buffer in buffers]
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type="cuda"):
            yield
    finally:
        for module, own in zip(plain, held, strict=True):
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                if not (bits.is_dense(buffer) and bits.equal(buffer, value)):
                    buffer.copy_(value)


class _Follower:
    """What is done around the forwards of a run again."""

    def __init__(self, run: Run, cut: Cut) -> None:
        self.run, self.cut = run, cut
        self.calls = iter(run.calls)
        self.same = True  # whether everything had the bits of before, so far
        self.doubt = ""  # why differences between modules say nothing, from here on

    def __call__(self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call = next(self.calls, self.run.end)
        if call.module is not module or call is self.run.end:
            self._part(call, "other")
        if call.output is None:
            return forward(*args, **kwargs)
        (args, kwargs), comparable = self._settle(call.before, call.inputs, (args, kwargs), self.doubt)
        if by_definition(self.run.model, module):
            return call.inputs.result_for((args, kwargs), call.output, self.cut)
        excuse = "" if comparable else "inputs that could not be compared"
        return self._settle(call.finding, call.output, forward(*args, **kwargs), excuse)[0]

    def end(self, output: Any) -> None:
        if missed := next(self.calls, None):
            self._part(missed, "fewer")
        self._settle(self.run.end.before, self.run.end.inputs, output, self.doubt)

    def _part(self, call: Call, which: str) -> NoReturn:
        reason = f"{which} modules are called for a batch of {self.cut.size}"
        call.before.reasons[reason] = None
        raise IncomparableError(reason)

    def _settle(self, finding: Finding, recorded: Values, actual: Any, excuse: str) -> tuple[Any, bool]:
        settled, found = finding.settle(recorded, actual, self.cut, excuse)
        if found is None:
            self.doubt = "behind what could not be compared"
        self.same &= found == NONE
        return settled, found is not None


def by_definition(model: nn.Module, module: nn.Module) -> Definition | None:
    """What a module does by definition while a model trains, if so: no run has to show it."""
    if not (model.training and module.training):
        return None
    if isinstance(module, _BatchNorm) and not getattr(module, "frozen", False):
        return "mixes by definition"
    return "random by definition" if isinstance(module, _DropoutNd) else None


def _look_into(module: nn.Module, path: str, paths: dict[nn.Module, str]) -> None:
    """The modules whose calls are looked at, with their paths: what is inside compiled ones cannot be seen."""
    if module in paths:
        return
    paths[module] = path
    compiled = "_orig_mod" in module._modules or _is_compiled(module) or isinstance(module, torch.jit.ScriptModule)
    if compiled or isinstance(module, _BatchNorm):
        return
    for name, child in module.named_children():
        if name != "parametrizations":  # called to get a parameter, by a module that is a leaf all the same
            _look_into(child, f"{path}.{name}" if path else name, paths)


def _is_compiled(module: nn.Module) -> bool:
    """By `module.compile()`."""
    return vars(module).get("_compiled_call_impl") is not None


@contextmanager
def _around(modules: Iterable[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """`around(module, forward, *args, **kwargs)` in place of every forward.

    Not by hooks: a module's own would be seen as part of it, and torch's transformer layers take another way with any.
    """
    kept = list[tuple[dict[str, Any], str, Any]]()
    try:
        for module in modules:
            name = "_compiled_call_impl" if _is_compiled(module) else "forward"
            own = vars(module)  # not setattr, which modules redefine
            kept.append((own, name, own.get(name)))
            own[name] = partial(around, module, getattr(module, name))
        yield
    finally:
        for own, name, value in kept:
            own.pop(name)
            if value is not None:
                own[name] = value
