"""Processes forked from one that computes, and workers of other libraries: right bits, and no hang."""

import os
from pathlib import Path

import pytest

from tests.threads.programs import CHOICES, every_choice, needs_torch, run

ROOT = str(Path(__file__).parents[2])
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@needs_fork
@every_choice
def test_a_child_never_enters_a_team(choice):
    """Nor does a grandchild, nor one forked by a signal handler in the midst of a call, or while others compute."""
    run(
        """
        def in_pool():
            right = same(train())
            return right and not region_words() and pool._chosen.teams_of is None and pool._workers == THREADS - 1

        def in_grandchild():
            right = in_pool()
            in_child(in_pool)
            return right

        assert same(train())
        in_child(in_pool)
        in_child(in_grandchild)
        assert same(train())

        # what a handler of a signal does that came when a launch knew already whose threads compute
        module, parent = sys.modules["cubn.backends.cpu.pool"], os.getpid()
        ask_for = module.ask_for

        def fork(helpers):
            has_team = ask_for(helpers)
            children.append(os.fork())
            signal.alarm(0 if children[-1] else 60)
            return has_team

        children, module.ask_for = [], fork
        found = cubn.forward(x, cubn.BatchNormState(8))
        module.ask_for = ask_for
        right = np.array_equal(found, cubn.forward(x, cubn.BatchNormState(8)))
        if os.getpid() != parent:
            os._exit(0 if right else 1)
        assert right and len(children) == 1
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0

        stop = threading.Event()

        def keep_training():
            while not stop.is_set():
                train()

        threads = [threading.Thread(target=keep_training) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            in_child(in_pool)
        stop.set()
        for thread in threads:
            thread.join()
        assert same(train())
        """,
        **CHOICES[choice],
    )


@needs_fork
@needs_torch
@pytest.mark.parametrize("choice", ["own", "auto"])
def test_a_child_heeds_what_torch_is_told_there(choice):
    """As a DataLoader's worker does, by launches that its parent prepared."""
    run(
        """
        def on_one_thread():
            torch.set_num_threads(1)
            threads = tasks()
            return same(train()) and pool._workers == 0 and tasks() == threads

        assert same(train())
        in_child(on_one_thread)
        """,
        **CHOICES[choice],
    )


@needs_torch
@pytest.mark.parametrize("choice", ["own", "auto"])
def test_workers_of_a_data_loader(choice):
    run(
        """
        from torch.utils.data import DataLoader
        from tests.threads import in_workers

        data = in_workers.Normalised()
        wanted = [in_workers.collated([data[i], data[i + 1]]) for i in (0, 2)]
        assert same(train())
        for context in ("fork", "spawn"):
            loader = DataLoader(
                data, 2, num_workers=2, multiprocessing_context=context, collate_fn=in_workers.collated, timeout=100
            )
            assert all(map(torch.equal, loader, wanted)), context
        """,
        PYTHONPATH=ROOT,
        **CHOICES[choice],
    )


@pytest.mark.parametrize("choice", ["own", "auto"])
def test_workers_of_multiprocessing_and_joblib(choice):
    pytest.importorskip("joblib")
    run(
        """
        import multiprocessing
        import joblib
        from tests.threads import in_workers

        seeds = range(4)
        wanted = [*map(in_workers.trained, seeds)]
        for context in ("spawn", "forkserver"):
            with multiprocessing.get_context(context).Pool(2) as processes:
                assert processes.map_async(in_workers.trained, seeds).get(100) == wanted, context
        for backend in ("loky", "threading"):
            jobs = [joblib.delayed(in_workers.trained)(seed) for seed in seeds]
            assert joblib.Parallel(2, backend=backend, timeout=100)(jobs) == wanted, backend
        """,
        PYTHONPATH=ROOT,
        **CHOICES[choice],
    )
