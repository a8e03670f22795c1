"""Process groups of torch.distributed, with gloo, in processes of their own."""

import subprocess
import sys

import pytest

from cubn.sync import communicator
from tests.mpi.launch import ROOT

PROGRAM = """
import sys
import numpy as np
import torch.distributed as dist
import cubn
from cubn.sync import communicator
from tests.mpi.parts import Batch, assert_one_answer, step

rank, size, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=size)
world = dist.group.WORLD


def everywhere(result, group):
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, result, group)
    return parts


batch = Batch("bfloat16", masked=True)
whole = step(batch, 0, 32)
for cut in ([16, 16, 0], [11, 11, 10], [0, 31, 1]):
    for sizes in (None, cut):
        part = step(batch, *batch.range(cut, rank), comm=world, sizes=sizes)
        assert_one_answer(everywhere(part, world), whole)
assert communicator(world) is communicator(world)

alone = dist.new_group([0])  # so that rank 0 is in one group more than the others
if rank == 0:
    step(batch, 0, 32, comm=alone)
pair = dist.new_group([0, 2])  # the others are in no group of this call
if rank != 1:
    cut = [20, 12]
    part = step(batch, *batch.range(cut, rank // 2), comm=pair)
    assert_one_answer(everywhere(part, pair), whole)
else:
    assert pair == dist.GroupMember.NON_GROUP_MEMBER

try:
    cubn.moments(np.zeros((1, 6 - (rank == 1))), comm=world)
except cubn.CollectiveMismatch as error:
    assert "C=6 on ranks 0, 2; C=5 on rank 1" in str(error)
else:
    raise AssertionError("nothing was raised")
dist.destroy_process_group()
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets through a file here")
def test_ranks_of_a_process_group(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "3", str(tmp_path / "meeting")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        outcomes = [(*rank.communicate(timeout=120), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for out, err, status in outcomes:
        assert (out, status) == ("done\n", 0), err


def test_no_group_of_this_process_is_refused():
    import torch.distributed as dist

    with pytest.raises(ValueError) as caught:
        communicator(dist.GroupMember.NON_GROUP_MEMBER)
    assert str(caught.value) == (
        "cubn: comm must be a process group this process is in; got torch's NON_GROUP_MEMBER. "
        "Call it on the ranks of the group alone."
    )


@pytest.mark.parametrize("comm", [3, -99, "world", object(), True])
def test_what_is_no_communicator(comm):
    import torch.distributed  # noqa: F401

    with pytest.raises(TypeError, match=r"comm must be an mpi4py communicator, a torch\.distributed process group"):
        communicator(comm)
