"""The file that a recalibration is resumed from: whole at any moment, and refused where it does not fit."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn.sync import threads
from tests.health.recalibrating import assert_same_statistics, data, state_of

ROOT = Path(__file__).parents[2]

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import cubn
from cubn.health.recalibration.file import RecordFile

path, kills = Path(sys.argv[1]), int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(40_000, 300))
covered = 0

def batches(told):
    for i in range(0, len(x), 2):
        if i >= 2 * covered:
            os.write(told, b".")
        yield x[i:i + 2]

cubn.moments(x[:2])
for kill in range(kills):
    random.seed(kill)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        cubn.recalibrate(cubn.BatchNormState(300), batches(tell), checkpoint=path, checkpoint_every=1)
        os._exit(1)  # it came to its end
    more = random.randint(1, 4)
    for _ in range(more + 1):
        os.read(told, 1)
    time.sleep(random.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(told), os.close(tell)
    record = RecordFile(path, {}).read()
    pooled, whole = record.pools[""][0], cubn.moments(x[:2 * record.batches])
    assert (pooled.mean == whole.mean).all() and (pooled.m2 == whole.m2).all(), record.batches
    assert record.batches >= covered + more, "an older file came back"
    covered = record.batches
assert set(path.parent.iterdir()) <= {path, path.with_name(path.name + ".tmp")}
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_point_the_file_is_the_old_or_the_new_one(times, tmp_path):
    """Each process goes on from what the one before left."""
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "pooled"), str(times)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUBN_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


def interrupted(x, state, path, **options):
    """What is there after five of eight batches."""

    def batches():
        yield from np.array_split(x, 8)[:5]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cubn.recalibrate(state, batches(), checkpoint=path, **options)


@pytest.fixture
def x():
    return data(40, (3,), "float32")


@pytest.fixture
def path(x, tmp_path):
    path = tmp_path / "pooled.npz"
    interrupted(x, state_of(x), path)
    return path


def test_the_file_is_an_npz_without_pickled_objects(path):
    with np.load(path, allow_pickle=False) as entries:
        assert '"batches": 5' in str(entries["header"])
        assert all(entries[name].dtype != object for name in entries.files)


def test_the_file_is_written_after_so_many_batches(x, tmp_path):
    path, found = tmp_path / "pooled", []

    def batches():
        for batch in np.array_split(x, 8):
            found.append(path.exists() and path.stat().st_mtime_ns)
            yield batch

    cubn.recalibrate(state_of(x), batches(), checkpoint=path, checkpoint_every=3)
    written = [before != after for before, after in pairwise(found)]
    assert written == [False, False, True, False, False, True, False]


def test_a_file_cut_short_is_refused_at_any_length(x, path):
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^recalibrate: checkpoint must be a file that recalibrate wrote; got .*"):
            cubn.recalibrate(state_of(x), np.array_split(x, 8), checkpoint=path)
        assert path.read_bytes() == whole[:length]


def test_a_file_with_a_pickle_runs_nothing(x, tmp_path):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil.npz"
    np.savez(path, header=np.array([Touch()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="must be a file that recalibrate wrote"):
        cubn.recalibrate(state_of(x), [x], checkpoint=path)
    assert not (tmp_path / "executed").exists()


OTHERS = {
    "other channels": (lambda x: cubn.BatchNormState(5), {}, "subject"),
    "other axis": (lambda x: cubn.BatchNormState(4, channel_axis=2), {}, "subject"),
    "several states": (lambda x: [state_of(x)], {}, "subject"),
    "a start": (state_of, {"start": 7}, "start"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_recalibration_is_refused(name, x, path):
    make, options, different = OTHERS[name]
    text = rf"^recalibrate: checkpoint must be of the same recalibration; got .*pooled.npz, whose {different} differ"
    with pytest.raises(ValueError, match=text):
        cubn.recalibrate(make(x), [x], checkpoint=path, **options)
    assert path.exists()


def test_fewer_batches_than_the_file_has_are_refused(x, path):
    with pytest.raises(ValueError, match="batches must be those of the checkpoint, which is of 5; got fewer"):
        cubn.recalibrate(state_of(x), np.array_split(x, 8)[:4], checkpoint=path)
    assert_same_statistics(state := state_of(x), cubn.recalibrate(state, np.array_split(x, 8), checkpoint=path), x)


def test_a_folder_that_is_not_there_is_refused_before_any_work(x, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint must be in a folder that exists"):
        cubn.recalibrate(state_of(x), [x], checkpoint=tmp_path / "none" / "pooled")


def test_ranks_resume_each_its_own_file(x, tmp_path):
    """Of which one was interrupted, and the other had pooled all it has."""
    path, parts = tmp_path / "pooled", (x[:11], x[11:])

    def first(comm):
        state = state_of(x)
        options = {"comm": comm, "start": 11 * comm.rank, "checkpoint": path}
        if comm.rank:
            interrupted(parts[1], state, **{"path": path} | {k: v for k, v in options.items() if k != "checkpoint"})
        else:
            with pytest.raises(cubn.CollectiveMismatch, match="an error on rank 1"):
                cubn.recalibrate(state, [parts[0]], **options)
        assert not state.tracked.any()

    def again(comm):
        state, batches = state_of(x), [[parts[0]], np.array_split(parts[1], 8)][comm.rank]
        return state, cubn.recalibrate(state, batches, comm=comm, start=np.int64(11 * comm.rank), checkpoint=path)

    threads.run(2, first)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["pooled.0", "pooled.1"]
    for state, pooled in threads.run(2, again):
        assert_same_statistics(state, pooled, x)
    assert not [*tmp_path.iterdir()]
