"""Valid calls give the oracle's bits and touch no memory but their own; and the campaign would see it if not."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest

import cubn
from cubn import _calls, reference
from cubn.backends.cpu import plan, pool
from cubn.backends.cpu.parameters import FIELDS
from tests import oracle
from tests.fuzz import cases, given, harness, memory, plans, valid_calls


def test_valid_calls_give_the_oracle_s_bits_and_touch_no_other_memory(campaign):
    campaign("valid_calls")


def _of_few_kernels(rng):
    """A case that needs few kernels compiled."""
    case = dataclasses.replace(valid_calls.draw(rng), dtype="float32", library="numpy", wild=0.0, out="fresh")
    rank = len(case.shape)
    dense = {"x": memory.dense(rank), "others": memory.dense(rank), "vectors": memory.dense(1)}
    return cases.settled(dataclasses.replace(case, **dense))


FEW_KERNELS = SimpleNamespace(__name__="few kernels", draw=_of_few_kernels, run=valid_calls.run)


def _fused(x, mean, invstd, gamma, beta, residual=None):
    """One rounding of the product and the sum, as a fused multiply-add has it."""
    scale = invstd.astype(x.dtype) * gamma.astype(x.dtype)
    y = reference.centre(x, mean).astype(np.float64) * scale[:, None] + beta.astype(np.float64)[:, None]
    y = y.astype(x.dtype)
    return y if residual is None else y + residual.astype(x.dtype)


def _weighted(a, b):
    """Means weighted by counts, where the contract moves one mean by a share of the difference."""
    (n, mean_a, m2_a), (m, mean_b, m2_b) = a, b
    count = n + m
    some = np.maximum(count, 1)
    mean = (mean_a * n + mean_b * m) / some.astype(mean_a.dtype)
    d = mean_b - mean_a
    return (
        count,
        mean.astype(mean_a.dtype),
        (m2_a + m2_b + d * d * (n * m / some).astype(mean_a.dtype)).astype(m2_a.dtype),
    )


_sum_rows, _update, _gradient, _tree = oracle._sum_rows, oracle.update, reference.input_gradient, oracle.tree
CHANGED = {
    "a fused multiply-add": (reference, "output", _fused),
    "rows the other way round": (
        oracle,
        "_sum_rows",
        lambda terms, present: _sum_rows(terms[..., ::-1, :], present[..., ::-1, :]),
    ),
    "means by weight": (reference, "merge", _weighted),
    "no ReLU": (reference, "relu", lambda v: v),
    "the biased variance": (
        oracle,
        "update",
        lambda state, stats, *options: _update(
            state, dataclasses.replace(stats, m2=stats.var * (np.float64(stats.count) - 1)), *options
        ),
    ),
    "a gradient without its mean": (
        reference,
        "input_gradient",
        lambda dy, x, mean, invstd, gamma, count, sum_dy, sums: _gradient(
            dy, x, mean, invstd, gamma, count, 0 * sum_dy, sums
        ),
    ),
    "no mask": (oracle, "_present", lambda N, S, mask: np.ones((N, 1, S), bool)),
    "every part from sample 0": (oracle, "tree", lambda node, combine, start=0: _tree(node, combine)),
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_oracle_that_is_a_little_wrong_is_found(change, monkeypatch, seed):
    where, name, changed = CHANGED[change]
    monkeypatch.setattr(where, name, changed)
    with np.errstate(all="ignore"):
        assert harness.first_failure(FEW_KERNELS, seed, 100) is not None


def _of_x_alone(store, x, state, mask, residual, out, *options):
    """A known call that reads x in the residual's place."""
    found = _calls_find(store, x, state, mask, residual, out, *options)
    return found and (*found[:3], found[2] if residual is not None else 0, *found[4:])


_calls_find = _calls.find


@pytest.mark.parametrize("known", [True, False])
def test_a_known_call_that_reads_another_array_is_found(known, monkeypatch, seed):
    """But not where no call is known."""

    def draw(rng):
        return dataclasses.replace(_of_few_kernels(rng), known=known, operation="forward", residual=True, constants=())

    def run(case):
        _calls.clear()
        valid_calls.run(case)

    monkeypatch.setattr(_calls, "find", _of_x_alone)
    few = SimpleNamespace(__name__="few kernels", draw=draw, run=run)
    with np.errstate(all="ignore"):
        assert (harness.first_failure(few, seed, 20) is not None) == known


def test_a_plan_that_leaves_out_a_task_is_found(monkeypatch, seed):
    """Also where the right one had been kept."""
    honest = plan.elementwise_tasks

    def one_less(extents, layout, itemsize):
        tasks, rows = honest(extents, layout, itemsize)
        return max(1, tasks - 1), rows

    def failure(numbers):
        with plans.planned((("BLOCK_BYTES", 64),)):
            return next(
                (n for n in numbers if harness.failure(FEW_KERNELS, harness.case_of(FEW_KERNELS, seed, n))), None
            )

    monkeypatch.setattr(plan, "elementwise_tasks", one_less)
    found = failure(range(60))
    assert found is not None
    monkeypatch.setattr(plan, "elementwise_tasks", honest)
    assert failure([found]) is None
    monkeypatch.setattr(plan, "elementwise_tasks", one_less)
    assert failure([found]) == found


PROBES = [
    ((16, 40, 6, 50), (0, 1, 2, 3)),
    ((16, 40, 300), (0, 2, 1)),
    ((300, 40, 3), (0, 2, 1)),
    ((4, 1024, 20), (0, 1, 2)),
    ((40, 3, 100), (0, 2, 1)),
    ((5000, 200), (0, 1)),
    ((40000, 4), (0, 1)),
    ((900, 4, 3), (0, 1, 2)),
]
"""Shapes of x, and its axes from the outermost to the innermost."""
PLANNED = ("tasks", "chunk", "chunks", "pass_tasks", "block", "period", "stream", "steps", "scratch_size")


def _plans(monkeypatch):
    """What was planned for training steps and moments of the probes, without addresses."""
    found = []
    prepare = pool.prepare

    def recorded(program):
        block = dict(zip(FIELDS, program.block, strict=False))  # which ends in padding
        found.append(([stage.threads for stage in program.stages], [block[name] for name in PLANNED]))
        return prepare(program)

    with monkeypatch.context() as patch, plans.planned((("LANES", plan.LANES),)):  # anew
        patch.setattr(pool, "prepare", recorded)
        for shape, order in PROBES:
            x = np.ones([shape[axis] for axis in order], np.float32).transpose(np.argsort(order))
            cubn.forward_train(x, cubn.BatchNormState(shape[1]))
            cubn.moments(x)
    return found


@pytest.mark.parametrize("constant", plans.CONSTANTS)
def test_constants_that_are_drawn_plan_anew(constant, monkeypatch):
    """Nothing planned before is used with them, nor what they planned after."""
    cubn.set_num_threads(3)
    before = _plans(monkeypatch)
    drawn = []
    for value in plans.CONSTANTS[constant]:
        with plans.planned(((constant, value),)):
            drawn.append(_plans(monkeypatch))
    assert any(planned != before for planned in drawn)
    assert _plans(monkeypatch) == before


def test_a_write_beside_an_array_is_found():
    for step, at in ((2, 1), (1, -1), (1, 5)):
        placed = memory.Placed(np.zeros(5, np.float32), memory.Memory((0,), step=step, offset=1))
        placed.check_neighbours("x")
        beside = np.ndarray((1,), np.float32, placed.bytes, placed.array.ctypes.data - placed.pages.address + 4 * at)
        beside[0] = 1
        with pytest.raises(AssertionError, match="memory beside x was written to"):
            placed.check_neighbours("x")


def test_a_case_is_the_same_every_time_and_prints_itself_as_code():
    names = {**vars(valid_calls), **vars(memory)}
    for number in range(50):
        case = harness.case_of(valid_calls, 3, number)
        assert case == harness.case_of(valid_calls, 3, number)
        assert case == eval(repr(case), names)


def test_simpler_cases_are_valid_too():
    rng = random.Random(0)
    case = valid_calls.draw(rng)
    for _ in range(30):
        candidates = list(valid_calls.simpler(case))
        if not candidates:
            break
        case = rng.choice(candidates)
        given.Given(case)
