"""How many threads take part: what torch, variables and the system say, in the teams of every runtime."""

import importlib.metadata
import os
import sys

import pytest

from tests.threads.programs import CHOICES, needs_torch, run

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the system as Linux does")


@linux
@needs_torch
@pytest.mark.parametrize("choice", ["own", "auto"])
def test_torch_with_one_thread_has_cubn_use_one(choice):
    """On the very thread that set it and on another, which torch has not computed in: nobody else runs meanwhile."""
    run(
        """
        assert same(train())

        def others():
            "How often each other thread has run."
            me = threading.get_native_id()
            files = [f"/proc/self/task/{task}/schedstat" for task in os.listdir("/proc/self/task") if int(task) != me]
            return {file: open(file).read().split()[2] for file in files}

        def alone():
            train()
            found = others()
            right = all(same(train()) for _ in range(5))
            return right and others() == found

        torch.set_num_threads(1)
        for _ in range(1000):  # threads may still be on their way to sleep
            found = others()
            time.sleep(0.01)
            if others() == found:
                break
        # Not at the first try, perhaps: a thread that had work before may still be on its way to sleep.
        assert any(alone() for _ in range(50))
        result = []
        thread = threading.Thread(target=lambda: result.append(any(alone() for _ in range(50))))
        thread.start()
        thread.join()
        assert result == [True]
        """,
        **CHOICES[choice],
    )


@needs_torch
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "2"},
        {"OMP_NUM_THREADS": "4,2", "OMP_MAX_ACTIVE_LEVELS": "2"},
        {"OMP_NUM_THREADS": "nonsense", "OMP_WAIT_POLICY": "passive"},
    ],
    ids=str,
)
def test_fewer_or_more_threads_than_asked_for(variables):
    run(
        """
        for threads in (2, 3, 7):
            cubn.set_num_threads(threads)
            assert same(train())
            torch.set_num_threads(threads)
            assert same(train())
        assert pool._workers == 0 and region_words()
        """,
        **CHOICES["auto"] | variables,
    )


@linux
@needs_torch
def test_on_one_core_of_many():
    run(
        """
        from cubn.backends.cores import cores

        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert cores() == 1
        assert same(train())
        """,
        **CHOICES["auto"],
    )


def llvm_runtime():
    """LLVM's, of a package that the tests install."""
    try:
        files = importlib.metadata.files("cmeel-libomp") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name == "libomp.so"]
    return found[0] if found else pytest.skip("needs cmeel-libomp, which has LLVM's runtime")


@pytest.mark.parametrize("entry", ["GOMP_parallel", "__kmpc_fork_call"])
def test_llvms_runtime(entry):
    """Both ways in; from eight threads, in a child, and on as many threads as it is told."""
    run(
        f"""
        from cubn.backends.cpu import openmp

        if {entry == "__kmpc_fork_call"}:
            address = openmp._address
            openmp._address = lambda library, name: name != "GOMP_parallel" and address(library, name)
        library = ctypes.CDLL({llvm_runtime()!r})
        import json.tool  # more modules: it is looked again
        assert same(train())
        assert pool._chosen.teams_of.file.endswith("libomp.so") and pool._workers == 0
        assert pool._chosen.teams_of.is_gnu == {entry == "GOMP_parallel"}
        assert tasks() >= before + THREADS - 1
        assert all(at_once(8, lambda: same(train())))
        in_child(lambda: same(train()) and not region_words())
        library.omp_set_num_threads(1)
        threads = pool._workers
        assert same(train()) and pool._workers == threads
        """,
        **CHOICES["alone"],
    )


def test_functions_of_two_runtimes_are_not_taken_for_one(monkeypatch):
    """Where the number of a thread came from another runtime than its team, two threads would be number 0."""
    import ctypes

    from cubn.backends.cpu import openmp

    monkeypatch.setattr(openmp, "_address", lambda library, name: {"omp_get_thread_num": 1}.get(name, 2))
    monkeypatch.setattr(openmp, "_file_of", lambda address: f"lib{address}.so")
    assert openmp._runtime(ctypes.CDLL(None) if os.name == "posix" else None) is None
    monkeypatch.setattr(openmp, "_address", lambda library, name: 1 + (name == "GOMP_parallel"))
    assert openmp._runtime(None) == ("lib1.so", 1, 1, 1, False)
