"""Whose threads compute: the same bits in all of them, a bounded number of them, and what a user is told."""

import os
import subprocess
import sys

import pytest

from tests.threads.programs import CHOICES, every_choice, needs_torch, run

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


@linux
@every_choice
def test_right_bits_on_a_bounded_number_of_threads(choice):
    """One caller, callers one after the other, eight at once; each with a team or with the pool's workers."""
    run(
        """
        in_teams = pool.choose().teams_of is not None
        assert in_teams == (os.environ["LIBRARY"] == "torch" and os.environ["CUBN_THREADING"] != "own")
        assert bool(region_words()) == in_teams
        assert same(train())
        assert tasks() - before == THREADS - 1, "as many as were asked for take part"
        assert pool._workers == (0 if in_teams else THREADS - 1)
        for _ in range(2 * 4):
            assert all(map(same, at_once(1, train)))
        assert pool._workers == (0 if in_teams else THREADS - 1), "a thread's right to a team ends with the thread"

        def work():
            right = all(same(train()) for _ in range(3))
            return right, tasks()

        right, counts = zip(*at_once(8, work))
        assert all(right)
        assert max(counts) - before <= 8 + 5 * (THREADS - 1)
        assert pool._workers == THREADS - 1
        assert same(train())
        """,
        **CHOICES[choice],
    )


@needs_torch
def test_a_runtime_that_comes_late_is_used_by_what_was_prepared_before():
    """NumPy arrays first, on workers; then torch, whose number of threads holds at once, and its team."""
    run(
        """
        assert same(train()) and pool._workers == THREADS - 1
        assert "PyTorch brings one" in pool._chosen.reason
        import torch

        torch.set_num_threads(1)
        assert same(train())
        limited = pool._chosen.limited_by
        assert "torch" in limited.file and limited.threads == 1
        assert pool._chosen.teams_of and region_words()
        torch.set_num_threads(THREADS)
        threads = tasks()
        assert same(train()) and tasks() == threads + THREADS - 1
        """,
        **CHOICES["alone"],
    )


@needs_torch
def test_of_two_runtimes_pytorchs_is_used():
    """Even if the other one came first: threads were in its teams then."""
    pytest.importorskip("sklearn")
    run(
        """
        from sklearn.cluster import KMeans

        assert same(train())
        assert "scikit_learn" in pool._chosen.teams_of.file and pool._workers == 0
        assert same(at_once(1, train)[0])
        import torch

        torch.set_num_threads(2)
        before = tasks()
        assert same(train())
        assert "torch" in pool._chosen.teams_of.file and pool._workers == 0
        assert tasks() == before + 1, "a team of as many as torch was told"
        """,
        **CHOICES["alone"],
    )


@needs_torch
def test_words_of_two_runtimes_are_never_mixed():
    """Threads that compute while one runtime takes another's place."""
    pytest.importorskip("sklearn")
    run(
        """
        from sklearn.cluster import KMeans

        stop, wrong = threading.Event(), []

        def keep_training():
            while not stop.is_set():
                if not same(train()):
                    wrong.append(1)

        threads = [threading.Thread(target=keep_training) for _ in range(3)]
        for thread in threads:
            thread.start()
        while not pool._runtimes:
            time.sleep(0.01)
        import torch

        for _ in range(20):
            assert same(train())
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong and len(pool._runtimes) == 2
        """,
        **CHOICES["alone"],
    )


def test_what_cannot_be_chosen_is_refused_before_anything_is_changed():
    run(
        """
        wrong = {"opnmp": "be auto, openmp or own; got 'opnmp'. Unset it", "openmp": "got openmp, and none. Import"}
        for asked, text in wrong.items():
            os.environ["CUBN_THREADING"] = asked
            state, out = cubn.BatchNormState(8), np.zeros_like(x)
            for _ in range(2):
                try:
                    cubn.forward_train(x, state, out=out)
                except ValueError as error:
                    assert str(error).startswith("cubn: CUBN_THREADING must "), error
                    assert text in str(error), error
                else:
                    raise AssertionError(asked)
            assert not out.any() and not state.tracked.any() and (state.running_var == 1).all()
        os.environ["CUBN_THREADING"] = " Own "
        assert same(train())
        """,
        **CHOICES["alone"],
    )


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("own", ", in a pool of cubn's own: CUBN_THREADING=own"),
        ("", ", in a pool of cubn's own: no OpenMP runtime is loaded; PyTorch brings one"),
        ("nonsense", "CUBN_THREADING must be auto, openmp or own; got 'nonsense'"),
        ("openmp", "CUBN_THREADING must find a loaded runtime; got openmp, and none"),
    ],
)
def test_info_says_what_was_chosen_and_why(asked, text):
    code = "from cubn.cli.info import _cpu_settings; print(_cpu_settings()['threads'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CUBN_THREADING": asked},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert text in done.stdout


@needs_torch
def test_info_names_the_runtime():
    assert "in a team of an OpenMP runtime's: " in run(
        """
        from cubn.cli.info import _cpu_settings

        text = _cpu_settings()["threads"]
        assert text.endswith(pool._chosen.teams_of.file)
        print(text)
        """
    )


def test_workers_are_asleep_when_nothing_runs():
    """Soon after a call; those that were started before another library's threads came, too."""
    run(
        """
        assert same(train()) and pool._workers == THREADS - 1
        states = [pool._address + words.HEADER + words.MAILBOX * i for i in range(pool._workers)]
        for _ in range(1000):
            if all(word(state) == words.ASLEEP for state in states):
                break
            time.sleep(0.01)
        else:
            raise AssertionError([word(state) for state in states])
        assert same(train())
        """,
        **CHOICES["alone"],
    )
