"""What the ranks of DDP and FSDP check together. `test_distributed` starts them:

python -m tests.torch.ranks gloo FILE SIZE RANK; mpiexec -n 3 python -m mpi4py -m tests.torch.ranks mpi FILE
"""

import functools
import sys
from itertools import accumulate as sums
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cubn
import cubn.torch
from tests.torch.training import assert_same, batches, network, statistics, step

CUTS = {1: [[12]], 2: [[6, 6], [11, 1], [0, 12]], 3: [[4, 4, 4], [5, 0, 7]], 4: [[3, 3, 3, 3], [1, 0, 8, 3]]}
C = 6


def batch(seed, N=12):
    """x and dy, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, C, 3, 5, generator=generator) * scale + 1 for scale in (4, 1)]


def layer(**options):
    made = cubn.torch.BatchNorm2d(C, **options)
    with torch.no_grad():
        for vector in (made.weight, made.bias):
            vector += torch.arange(C) / 10
    return made


def forward_and_backward(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad]


# --- over one batch ---------------------------------------------------------------------------------------------------


def check_a_lone_layer(comm, group, cut, momentum=0.1, wrap=lambda model: model):
    """y, dx and the running statistics are those of one process; the mean of local sums is a part of its dgamma."""
    rank, size = group.rank(), group.size()
    lo, hi = list(pairwise(sums(cut, initial=0)))[rank]
    alone = layer(momentum=momentum)
    model = DistributedDataParallel(layer(momentum=momentum, comm=comm), process_group=group)
    magnitude = torch.zeros(2, C)
    for seed in range(2):
        x, dy = batch(seed)
        expected = forward_and_backward(alone, x, dy)
        got = forward_and_backward(wrap(model), x[lo:hi], dy[lo:hi])
        assert_same(got, [tensor[lo:hi] for tensor in expected])
        unit = torch.nn.functional.batch_norm(x, None, None, training=True)
        magnitude += torch.stack([(dy * unit).abs().sum((0, 2, 3)), dy.abs().sum((0, 2, 3))])
    assert_same(statistics(model.module), statistics(alone))
    assert alone.num_batches_tracked == 2
    for mean, whole, most in zip(model.parameters(), alone.parameters(), magnitude, strict=True):
        # each rank rounds its sums, divides them, and adds those of the others; and so twice, into .grad
        bound = torch.finfo().eps * (2 * size + 4) * most
        assert ((mean.grad * size - whole.grad).abs() <= bound).all()


def check_that_ranks_need_each_other(group, cut):
    """The control: without comm= the parts differ."""
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    x, dy = batch(0)
    whole, part = layer(), layer()
    expected = forward_and_backward(whole, x, dy)
    got = forward_and_backward(part, x[lo:hi], dy[lo:hi])
    assert not any(torch.equal(a, b[lo:hi]) for a, b in zip(got, expected, strict=True))
    assert not part.running_mean.equal(whole.running_mean)


def check_checkpointing(comm, group, cut):
    """Ranks exchange in the recomputation too, and count once."""
    again = functools.partial(functools.partial, checkpoint)
    check_a_lone_layer(comm, group, cut, wrap=lambda model: again(model, use_reentrant=False))
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    alone, shared = layer(), layer(comm=comm)
    x, dy = batch(0)
    expected = forward_and_backward(alone, x, dy)
    got = forward_and_backward(again(shared, use_reentrant=True), x[lo:hi], dy[lo:hi])
    assert_same(got, [tensor[lo:hi] for tensor in expected])
    assert_same(statistics(shared), statistics(alone))


def check_accumulate(comm, group, cut):
    """One update by the micro-batches of all ranks."""
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    shared, state = layer(comm=comm), cubn.BatchNormState(C)
    xs = [batch(seed)[0] for seed in range(3)]
    with cubn.torch.accumulate(shared):
        for x in xs:
            shared(x[lo:hi])
    cubn.update(state, cubn.moments(torch.cat(xs)))
    assert (shared.running_mean.numpy() == state.running_mean).all()
    assert (shared.running_var.numpy() == state.running_var).all()
    assert shared.num_batches_tracked == 1


# --- each rank by its own batch ---------------------------------------------------------------------------------------


def check_two_forwards_before_a_backward(group, broadcast_buffers):
    """Each is an update; where DDP broadcasts buffers, of what rank 0 had."""
    rank = group.rank()

    def own(i, rank):
        return batch(10 * i + rank)[0]

    alone = layer()
    alone(own(0, 0 if broadcast_buffers else rank))
    alone(own(1, rank))
    made = layer()
    model = DistributedDataParallel(made, process_group=group, broadcast_buffers=broadcast_buffers)
    loss = sum(model(own(i, rank).requires_grad_()).square().mean() for i in range(2))
    assert_same(statistics(made), statistics(alone))
    loss.backward()
    assert_same(statistics(made), statistics(alone))
    assert made.num_batches_tracked == 2


def check_synchronised_forwards_before_a_backward(comm, group, cut, broadcast_buffers):
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    alone, made = layer(), layer(comm=comm)
    model = DistributedDataParallel(made, process_group=group, broadcast_buffers=broadcast_buffers)
    xs = [batch(seed)[0] for seed in range(2)]
    got = [x[lo:hi].clone().requires_grad_() for x in xs]
    sum(model(x).sin().sum() for x in got).backward()
    whole = [x.requires_grad_() for x in xs]
    sum(alone(x).sin().sum() for x in whole).backward()
    assert_same([x.grad for x in got], [x.grad[lo:hi] for x in whole])
    assert_same(statistics(made), statistics(alone))


def check_fsdp(checkpointed):
    """Parameters are sharded and computed with in bfloat16; statistics are neither."""
    rank = dist.get_rank()
    alone, model = network().bfloat16(), network()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    forward = functools.partial(checkpoint, model, use_reentrant=False) if checkpointed else model
    assert type(model[1].weight).__name__ == "DTensor"
    for x in batches():
        expected = step(alone, (x + rank).bfloat16())
        assert_same(step(model, (x + rank).bfloat16(), forward), expected)
    assert model[1].running_var.dtype == torch.float32
    assert_same(statistics(model), statistics(alone))
    assert model[1].num_batches_tracked == 3


def check_a_sharded_lone_layer(cut):
    """FSDP where ranks share their statistics."""
    group = dist.group.WORLD
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    alone, shared = layer(), layer(comm=group)
    fully_shard(shared, mesh=init_device_mesh("cpu", (group.size(),)))
    for seed in range(2):
        x, dy = batch(seed)
        got = forward_and_backward(shared, x[lo:hi], dy[lo:hi])
        assert_same(got, [tensor[lo:hi] for tensor in forward_and_backward(alone, x, dy)])
    assert_same(statistics(shared), statistics(alone))


def check_compiled(comm, group, cut):
    lo, hi = list(pairwise(sums(cut, initial=0)))[group.rank()]
    alone, shared = layer(), layer(comm=comm)
    compiled = torch.compile(shared, backend="aot_eager", fullgraph=True)
    for model in (compiled, functools.partial(checkpoint, compiled, use_reentrant=False)):
        x, dy = batch(0)
        got = forward_and_backward(model, x[lo:hi], dy[lo:hi])
        assert_same(got, [tensor[lo:hi] for tensor in forward_and_backward(alone, x, dy)])
        assert_same(statistics(shared), statistics(alone))


# --- starting ---------------------------------------------------------------------------------------------------------


def check_group(group, comms):
    for comm in comms:
        for cut in CUTS[group.size()]:
            for momentum in (0.1, None):
                check_a_lone_layer(comm, group, cut, momentum)
            check_checkpointing(comm, group, cut)
            check_accumulate(comm, group, cut)
            for broadcast_buffers in (False, True):
                check_synchronised_forwards_before_a_backward(comm, group, cut, broadcast_buffers)


def main(kind, file, *place):
    if kind == "mpi":
        from mpi4py import MPI

        size, rank = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
    else:
        size, rank = map(int, place)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    for part in {"mpi": (2, 3), "gloo": (1, 2, 4)}[kind]:
        group = dist.new_group(range(part))
        comms = [group]
        if kind == "mpi":
            comms = [MPI.COMM_WORLD.Split(0 if rank < part else MPI.UNDEFINED)]
        if rank < part:
            check_group(group, comms)
    if kind == "gloo":
        check_that_ranks_need_each_other(dist.group.WORLD, CUTS[size][0])
        for cut in CUTS[size]:
            check_a_sharded_lone_layer(cut)
            check_compiled(dist.group.WORLD, dist.group.WORLD, cut)
        for flag in (False, True):
            check_two_forwards_before_a_backward(dist.group.WORLD, flag)
            check_fsdp(flag)
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
