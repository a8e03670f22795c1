"""What goes wrong on one rank is an error on all, nothing is changed, and nobody waits for ever. Also under mpiexec."""

import re
import sys
import threading

import numpy as np
import pytest

import cubn
from cubn.backends.cpu.backend import CpuBackend
from cubn.errors import CollectiveMismatch
from cubn.sync import Communicator, communicator, threads
from tests.mpi.parts import CUTS, Batch, C, assert_one_answer, step

SAME = "must do the same thing; got"
REMEDY = "Call the same operations with the same options in the same order on all of them."


def contents(state):
    return {name: None if value is None else np.array(value) for name, value in state.to_dict().items()}


def raised(call, *arguments, **options):
    """What a call raises; an AssertionError if nothing, which is no more to be caught."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def refused(outcomes, size, body):
    """Every rank raises, and leaves its state as it was; the errors of all ranks. The communicator still works."""
    batch = Batch()

    def call(comm):
        comm = communicator(comm)
        state = batch.state()
        before = contents(state)
        error = raised(body, comm, batch.x[4 * comm.rank : 4 * comm.rank + 4], state)
        np.testing.assert_equal(contents(state), before)
        after = step(batch, *batch.range(CUTS["31-1"] + [0] * (size - 2), comm.rank), comm=comm)
        return error, after, left_behind(comm)

    pairs = outcomes(size, call)
    for _, error in pairs:
        if error is not None:
            raise error
    assert_one_answer([after for (_, after, _), _ in pairs], step(batch, 0, 32))
    assert not any(left for (_, _, left), _ in pairs)
    return [error for (error, _, _), _ in pairs]


def left_behind(comm):
    """Gathers of this rank that nobody waited for; those of MPI know."""
    if isinstance(comm, threads.ThreadCommunicator):
        return []
    from cubn.sync import mpi

    return [pending for pending in mpi._UNDER_WAY if pending.comm is comm._comm]


def differing(name):
    """A forward_train whose rank 1 does something else."""

    def body(comm, x, state):
        odd, state = comm.rank == 1, state.copy()
        match name:
            case "C":
                x, state = (x[:, :5], cubn.BatchNormState(5)) if odd else (x, state)
            case "dtype":
                x = x.astype(np.float64) if odd else x
            case "eps":
                state.eps = 1e-3 if odd else 1e-5
            case "momentum":
                state.momentum = None if odd else 0.1
            case "variance":
                state.running_variance = "biased" if odd else "unbiased"
            case "relu" | "update":
                return cubn.forward_train(x, state, comm=comm, **{name: odd})
            case "residual":
                return cubn.forward_train(x, state, comm=comm, residual=x if odd else None)
            case "renorm":
                return cubn.forward_train(x, state, comm=comm, renorm=(3, 5) if odd else None)
            case "limits":
                return cubn.forward_train(x, state, comm=comm, renorm=(3, 5 + odd))
            case "operation":
                return cubn.moments(x, comm=comm) if odd else cubn.forward_train(x, state, comm=comm)
            case "start":
                return cubn.moments(x, comm=comm, start=7 if odd else 0)
            case "second":
                with cubn.together(comm):
                    for wide in (False, odd):
                        cubn.forward_train_start(x, state, comm=comm, relu=wide)
            case "number":
                with cubn.together(comm):
                    for _ in range(1 + odd):
                        cubn.forward_train_start(x, state, comm=comm)
            case "order":
                both = [cubn.forward_train(x, cubn.BatchNormState(C), comm=comm)[1] for _ in range(2)]
                return cubn.backward(x, both[odd])
            case "gradients":
                _, saved = cubn.forward_train(x, cubn.BatchNormState(C), comm=comm)
                return cubn.backward(x, saved, parameter_gradients="global" if odd else "local")
            case "order of second":
                both = [cubn.forward_train(x, cubn.BatchNormState(C), comm=comm)[1] for _ in range(2)]
                return cubn.double_backward(x, None, None, x, both[odd])
        return cubn.forward_train(x, state, comm=comm)

    return body


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("second", r"operations with hash \w{16} on ranks 0, 2; operations with hash \w{16} on rank 1"),
        ("C", "C=6 on ranks 0, 2; C=5 on rank 1"),
        ("dtype", "dtype=float32 on ranks 0, 2; dtype=float64 on rank 1"),
        ("eps", "eps=1e-05 on ranks 0, 2; eps=0.001 on rank 1"),
        ("momentum", "momentum=0.1 on ranks 0, 2; momentum=None on rank 1"),
        ("variance", "update on ranks 0, 2; update, biased on rank 1"),
        ("start", "start=0 on ranks 0, 2; start=7 on rank 1"),
        ("number", "1 operations, C=6 on ranks 0, 2; 2 operations, C=12 on rank 1"),
        ("order", "of forward 1 on ranks 0, 2; of forward 2 on rank 1"),
        ("order of second", "of forward 1 on ranks 0, 2; of forward 2 on rank 1"),
        ("relu", "update on ranks 0, 2; update, relu on rank 1"),
        ("update", "no options on ranks 0, 2; update on rank 1"),
        ("residual", "update on ranks 0, 2; update, residual on rank 1"),
        ("renorm", "update on ranks 0, 2; update, renorm on rank 1"),
        ("limits", r"limits of renorm with hash \w{16} on ranks 0, 2; limits of renorm with hash \w{16} on rank 1"),
        ("gradients", "no options on ranks 0, 2; global parameter gradients on rank 1"),
    ],
)
def test_ranks_that_disagree_hear_who_said_what(outcomes, name, said):
    errors = refused(outcomes, 3, differing(name))
    assert {type(error) for error in errors} == {CollectiveMismatch}
    (text,) = {str(error) for error in errors}
    assert re.fullmatch(rf"\w+: ranks {SAME} {said}\. {REMEDY}", text), text


def test_another_operation_is_named(outcomes):
    errors = refused(outcomes, 3, differing("operation"))
    for error, function in zip(errors, ("forward_train", "moments", "forward_train"), strict=True):
        assert type(error) is CollectiveMismatch
        said = "forward_train on ranks 0, 2; moments on rank 1"
        assert str(error) == f"{function}: ranks {SAME} {said}. {REMEDY}"


def bad_argument(comm, x, state):
    return cubn.forward_train(x, state, comm=comm, mask=np.ones((2, 2), bool) if comm.rank == 1 else None)


def bad_state(comm, x, state):
    return cubn.forward_train(x, None if comm.rank == 1 else state, comm=comm)


def bad_sizes(comm, x, state):
    return cubn.moments(x, comm=comm, sizes=[4, 4] if comm.rank == 1 else None)


def bad_gradient(comm, x, state):
    _, saved = cubn.forward_train(x, cubn.BatchNormState(C), comm=comm)
    return cubn.backward(x[:, :, :2] if comm.rank == 1 else x, saved)


def error_in_the_block(comm, x, state):
    with cubn.together(comm):
        started = cubn.forward_train_start(x, state, comm=comm)
        if comm.rank == 1:
            raise ValueError("must fit")
    return started.finish()


def finished_in_the_block(comm, x, state):
    with cubn.together(comm):
        started = cubn.forward_train_start(x, state, comm=comm)
        if comm.rank == 1:
            started.finish()
    return started.finish()


def whole_in_the_block(comm, x, state):
    with cubn.together(comm):
        if comm.rank == 1:
            cubn.forward_train(x, state, comm=comm)
        return cubn.forward_train_start(x, state, comm=comm)


def bad_second_gradient(comm, x, state):
    _, saved = cubn.forward_train(x, cubn.BatchNormState(C), comm=comm)
    return cubn.double_backward(x[:2] if comm.rank == 1 else x, None, None, x, saved)


def other_samples_together(comm, x, state):
    with cubn.together(comm):
        cubn.forward_train_start(x, state, comm=comm)
        cubn.forward_train_start(x[1:] if comm.rank == 1 else x, state, comm=comm)


def other_sizes_together(comm, x, state):
    with cubn.together(comm):
        cubn.forward_train_start(x, state, comm=comm)
        cubn.forward_train_start(x, state, comm=comm, sizes=[4, 4, 4] if comm.rank == 1 else None)


def too_many_together(comm, x, state):
    with cubn.together(comm):
        for _ in range(33 if comm.rank == 1 else 32):
            cubn.forward_train_start(x, state, comm=comm)


INSIDE = (
    "finish: what was started in a `with together` block can be finished only after the block. "
    "Start operations inside with forward_train_start or backward_start."
)


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (bad_argument, ValueError, "forward_train: mask must have x's shape"),
        (bad_state, TypeError, "forward_train: state must be a BatchNormState; got NoneType."),
        (bad_sizes, ValueError, "moments: sizes must be the number of samples of each of the 3 ranks; got [4, 4]."),
        (bad_gradient, ValueError, "backward: dy must have x's shape"),
        (bad_second_gradient, ValueError, "double_backward: ddx must have x's shape"),
        (error_in_the_block, ValueError, "must fit"),
        (finished_in_the_block, ValueError, INSIDE),
        (whole_in_the_block, ValueError, INSIDE),
        (
            other_samples_together,
            ValueError,
            "forward_train: x must have 4 samples, as in the first",
        ),
        (other_sizes_together, ValueError, "forward_train: sizes must be the same throughout a `with together` block"),
        (too_many_together, ValueError, "forward_train: a `with together` block holds 32 operations at most. Begin"),
    ],
)
def test_an_error_of_one_rank_is_one_of_all(outcomes, body, kind, text):
    errors = refused(outcomes, 3, body)
    assert type(errors[1]) is kind and str(errors[1]).startswith(text), errors[1]
    for error in (errors[0], errors[2]):
        assert type(error) is CollectiveMismatch
        assert str(error).endswith(f"ranks {SAME} an error on rank 1. Its own error says more."), error


@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
@pytest.mark.parametrize("operation", ["forward_train", "backward", "double_backward"])
def test_an_error_while_computing_reaches_the_others(outcomes, operation, declared, monkeypatch):
    """After the header: by the payload. Rank 1, whose samples are four of all ten, has too little memory."""
    method = "moments" if operation == "forward_train" else "backward_sums"
    honest = getattr(CpuBackend, method)

    def fails(backend, extents, *arguments, **options):
        if extents.N == 4:
            raise MemoryError("no memory")
        return honest(backend, extents, *arguments, **options)

    def body(comm, x, state):
        x = x if comm.rank == 1 else x[:3]
        sizes = [3, 4, 3] if declared else None
        if operation == "forward_train":
            return cubn.forward_train(x, state, comm=comm, sizes=sizes)
        _, saved = cubn.forward_train(x, cubn.BatchNormState(C), comm=comm, sizes=sizes)
        return cubn.backward(x, saved) if operation == "backward" else cubn.double_backward(x, None, None, x, saved)

    monkeypatch.setattr(CpuBackend, method, fails)
    errors = refused(outcomes, 3, body)
    assert type(errors[1]) is MemoryError
    for error in (errors[0], errors[2]):
        assert str(error) == f"{operation}: ranks {SAME} an error on rank 1. Its own error says more."


@pytest.mark.parametrize(
    ("sizes", "kind", "text"),
    [
        ([4, 4], ValueError, "sizes must be the number of samples of each of the 3 ranks; got [4, 4]."),
        ([4, 4, -4], ValueError, "sizes must be the number of samples of each of the 3 ranks; got [4, 4, -4]."),
        ([4, 5, 4], ValueError, "sizes must be 4 for rank 1, the samples of its x; got (4, 5, 4)."),
        (4, TypeError, "sizes must be the number of samples of each of the 3 ranks; got 4."),
        ([4, 4.0, 4], TypeError, "sizes must be an integer; got 4.0."),
    ],
)
def test_bad_sizes_are_refused_where_they_are_declared(sizes, kind, text):
    """By forward_frozen, which exchanges nothing, and not only by its backward."""

    def body(comm):
        x, state = np.ones((4, C, 3), np.float32), cubn.BatchNormState(C)
        if comm.rank == 1:
            with pytest.raises(kind, match="^" + re.escape(f"forward_frozen: {text}")):
                cubn.forward_frozen(x, state, comm=comm, sizes=sizes)

    threads.run(3, body)


def test_sizes_are_read_once():
    """What the caller does with the list afterwards is nothing to a backward, nor that an iterator has an end."""

    def body(comm):
        x, state, sizes = np.ones((4, C, 3), np.float32), cubn.BatchNormState(C), [4, 4]
        _, saved = cubn.forward_frozen(x, state, comm=comm, sizes=sizes)
        sizes.append(3)
        _, again = cubn.forward_frozen(x, state, comm=comm, sizes=iter([4, 4]))
        return [cubn.backward(x, s).dgamma for s in (saved, again, again)]

    for dgamma in threads.run(2, body):
        assert all((a == b).all() for a, b in zip(dgamma, dgamma[:1] * 3, strict=True))


@pytest.mark.parametrize("operation", ["forward_train", "backward", "frozen"])
def test_an_error_of_a_rank_without_a_record_reaches_the_others(outcomes, operation, monkeypatch):
    """Rank 1 has no samples, or sums that nobody else needs."""
    method = "moments" if operation == "forward_train" else "backward_sums"
    honest, here, due = getattr(CpuBackend, method), 4 if operation == "frozen" else 0, []

    def fails(backend, extents, *arguments, **options):
        if due and here == extents.N:
            raise due.pop()
        return honest(backend, extents, *arguments, **options)

    def body(comm, x, state):
        x = x[: here if comm.rank == 1 else 3]
        due.extend([MemoryError("no memory")] if comm.rank == 1 else [])
        if operation == "forward_train":
            return cubn.forward_train(x, state, comm=comm)
        forward = cubn.forward_frozen if operation == "frozen" else cubn.forward_train
        _, saved = forward(x, cubn.BatchNormState(C), comm=comm)
        return cubn.backward(x, saved)

    monkeypatch.setattr(CpuBackend, method, fails)
    errors = refused(outcomes, 3, body)
    assert type(errors[1]) is MemoryError
    for error in (errors[0], errors[2]):
        assert str(error).endswith(f"ranks {SAME} an error on rank 1. Its own error says more.")


@pytest.mark.parametrize(
    ("method", "error"),
    [("moments", KeyboardInterrupt()), ("staging", MemoryError("no room for the records of all"))],
    ids=["interrupt", "memory"],
)
def test_who_leaves_an_exchange_cannot_begin_another(outcomes, method, error, monkeypatch):
    """Between header and record: what rank 1 sent next, the others would take for the record they wait for."""
    honest, rank = getattr(CpuBackend, method), threading.local()

    def fails(backend, *arguments, **options):
        rows = arguments[0][0] if method == "staging" else 0  # one in a rank's own record
        if rank.fails and rows != 1:
            raise error
        return honest(backend, *arguments, **options)

    def body(comm):
        comm, state = communicator(comm), Batch().state()
        before, rank.fails, caught = contents(state), comm.rank == 1, None
        try:
            cubn.forward_train_start(Batch().x[:4], state, comm=comm)
        except (KeyboardInterrupt, MemoryError) as found:
            caught = found
        np.testing.assert_equal(contents(state), before)
        rank.fails = False
        return caught and (repr(caught), str(raised(cubn.moments, Batch().x, comm=comm)))

    monkeypatch.setattr(CpuBackend, method, fails)
    why = f"this rank left an exchange with {error!r}"
    heard = f"cubn: comm can no longer be used, for its ranks are out of step: {why}. Make a new communicator."
    assert outcomes(2, body) == [(None, None), ((repr(error), heard), None)]


def test_a_block_that_was_interrupted_ends_the_communicator():
    def body(comm):
        started = []

        def block():
            with cubn.together(comm):
                started.append(cubn.forward_train_start(Batch().x[:4], Batch().state(), comm=comm))
                if comm.rank:
                    raise KeyboardInterrupt
            return started[0].finish()

        kind = KeyboardInterrupt if comm.rank else threads.RankEnded
        with pytest.raises(kind):
            block()
        comm.end()
        assert type(raised(cubn.moments, Batch().x, comm=comm)) is CollectiveMismatch
        with pytest.raises(kind):
            started[0].finish()

    threads.run(2, body)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_rank_alone_is_always_in_step(outcomes, error, monkeypatch):
    def fails(*arguments, **options):
        raise error

    def body(comm):
        def moments(**mask):
            return cubn.moments(Batch().x, comm=comm, sizes=[32], **mask).count

        with monkeypatch.context() as patched:
            patched.setattr(CpuBackend, "moments", fails)
            with pytest.raises(error):
                moments()
        with pytest.raises(ValueError, match="mask must have x's shape"):
            moments(mask=np.ones((9, 9), bool))
        return moments()

    assert outcomes(1, body) == [(Batch().x.size // C, None)]


@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_over_all_ranks(outcomes, count, declared):
    def body(comm, x, state):
        here = count * (comm.rank == 1)
        return cubn.forward_train(x[:here, :, 0, 0], state, comm=comm, sizes=[0, count, 0] if declared else None)

    (text,) = {str(error) for error in refused(outcomes, 3, body) if type(error) is ValueError}
    assert text.startswith(
        "forward_train: x must have more than one value per channel over all ranks; got 1. The variance of one value"
        if count
        else "forward_train: x must have values to take statistics of over all ranks; got 0. "
        "Skip the empty batch, or use forward, which takes one and returns an empty y."
    )


def test_masks_that_leave_one_value_in_all(outcomes):
    def body(comm, x, state):
        mask = np.zeros((4, 5, 7), bool)
        mask[2, 1, 3] = comm.rank == 2
        return cubn.forward_train(x, state, comm=comm, mask=mask)

    texts = {str(error) for error in refused(outcomes, 3, body)}
    assert len(texts) == 1 and "more than one value per channel over all ranks; got 1." in texts.pop()


def test_what_was_started_in_a_failed_block_fails_too(outcomes):
    def body(comm, x, state):
        started = []

        def block():
            with cubn.together(comm):
                started.append(cubn.forward_train_start(x, state, comm=comm))
                if comm.rank == 1:
                    raise KeyError("mine")

        error = raised(block)
        assert raised(started[0].finish) is error
        assert raised(started[0].finish) is error
        raise error

    assert [type(error) for error in refused(outcomes, 2, body)] == [CollectiveMismatch, KeyError]


@pytest.mark.parametrize(("sizes", "text"), [(8, "the 2 ranks; got 8."), ([4.0, 4], "be an integer; got 4.0.")])
def test_sizes_must_be_integers(outcomes, sizes, text):
    def body(comm, x, state):
        cubn.moments(x, comm=comm, sizes=sizes)

    for error in refused(outcomes, 2, body):
        assert type(error) is TypeError and str(error).endswith(text)


@pytest.mark.parametrize("sizes", [[4], [4, 4, 4], [5, -1], []])
def test_sizes_must_be_one_number_for_each_rank(outcomes, sizes):
    def body(comm, x, state):
        cubn.moments(x, comm=comm, sizes=sizes)

    text = f"moments: sizes must be the number of samples of each of the 2 ranks; got {sizes}."
    for error in refused(outcomes, 2, body):
        assert type(error) is ValueError and str(error) == text


@pytest.mark.parametrize(("operations", "what"), [(1, "sizes"), (2, "operations or sizes")])
def test_ranks_that_declare_other_sizes_hear_so(outcomes, operations, what):
    def body(comm):
        x, state = Batch().x[: 4 - comm.rank], Batch().state()
        with cubn.together(comm):
            started = [cubn.forward_train_start(x, state, comm=comm, sizes=[4, len(x)]) for _ in range(operations)]
        started[0].finish()

    said = rf"got {what} with hash \w{{16}} on rank 0; {what} with hash \w{{16}} on rank 1\."
    for _, error in outcomes(2, body):
        assert re.search(said, str(error)), error


@pytest.mark.parametrize("error", ["own", "mismatch", "undeclared"])
def test_with_declared_sizes_a_disagreement_ends_the_communicator(outcomes, error):
    """The statistics went out before anybody knew; the communicator may be out of step, and says so."""
    batch = Batch()

    def body(comm):
        comm = communicator(comm)
        x, state = batch.x[:4], batch.state()
        before = contents(state)
        odd = comm.rank == 1
        state.eps = 1e-3 if odd and error == "mismatch" else 1e-5
        mask = np.ones((9, 9), bool) if odd and error == "own" else None
        sizes = None if odd and error == "undeclared" else [4, 4]
        first = raised(cubn.forward_train, x, state, comm=comm, sizes=sizes, mask=mask)
        state.eps = 1e-5
        np.testing.assert_equal(contents(state), before)
        return type(first), raised(cubn.forward_train, x, state, comm=comm)

    (zero, nothing), (one, also_nothing) = outcomes(2, body)
    assert nothing is also_nothing is None
    assert [kind for kind, _ in (zero, one)] == [
        CollectiveMismatch,
        ValueError if error == "own" else CollectiveMismatch,
    ]
    for _, second in (zero, one):
        assert type(second) is CollectiveMismatch
        assert re.search(r"comm can no longer be used, for its ranks are out of step: .*rank 1", str(second))


def test_declared_sizes_must_be_true(outcomes):
    def body(comm):
        return cubn.forward_train(Batch().x[:4], Batch().state(), comm=comm, sizes=[4, 5])

    (_, first), (_, second) = outcomes(2, body)
    assert type(first) is CollectiveMismatch
    assert str(second) == "forward_train: sizes must be 4 for rank 1, the samples of its x; got (4, 5)."


def test_backward_start_needs_a_comm():
    _, saved = cubn.forward_train(Batch().x, Batch().state())
    with pytest.raises(ValueError, match=r"^backward_start: saved must be of a forward with comm=; got one without"):
        cubn.backward_start(Batch().dy, saved)


def test_parameter_gradients_are_local_or_global():
    _, saved = cubn.forward_train(Batch().x, Batch().state())
    with pytest.raises(ValueError, match=r"^backward: parameter_gradients must be 'local' or 'global'; got 'mean'\.$"):
        cubn.backward(Batch().dy, saved, parameter_gradients="mean")


@pytest.mark.parametrize("comm", [True, 3, "world", object()])
def test_comm_must_be_a_communicator(comm):
    with pytest.raises(TypeError, match=r"^cubn: comm must be an mpi4py communicator, a torch.distributed process"):
        cubn.forward_train(Batch().x, Batch().state(), comm=comm)


def test_a_thread_that_ended_is_not_waited_for():
    def body(comm):
        if comm.rank == 1:
            raise RuntimeError("gone")
        cubn.moments(Batch().x, comm=comm)

    with pytest.raises(ExceptionGroup) as caught:
        threads.run(3, body)
    kinds = sorted(type(error).__name__ for error in caught.value.exceptions)
    assert kinds == ["RankEnded", "RankEnded", "RuntimeError"]


def test_a_thread_that_exits_has_failed():
    with pytest.raises(BaseExceptionGroup) as caught:
        threads.run(2, lambda comm: sys.exit(3) if comm.rank else None)
    (error,) = caught.value.exceptions
    assert type(error) is SystemExit
    assert error.__notes__ == ["on rank 1"]


def test_an_abstract_communicator_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Communicator(0, 1)
