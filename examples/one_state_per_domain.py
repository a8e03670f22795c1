"""One state per domain: ranks see day or night images, and each domain has statistics of its own.

A state for each domain, and a communicator of the ranks that hold it. Over MPI that is a Split:
`mpiexec -n 4 python -m mpi4py examples/one_state_per_domain.py`. Started as plain Python, the ranks are threads.
"""

import sys

import numpy as np

import cubn
from cubn.sync import threads

DOMAINS = {"day": 3.0, "night": -1.0}
STEPS = 20


def batch(domain, step):
    """16 images of a domain; every rank could make all of them."""
    rng = np.random.default_rng([list(DOMAINS).index(domain), step])
    return rng.normal(DOMAINS[domain], 1, (16, 4, 6, 6)).astype(np.float32)


def train(comm, domain, rank, size):
    """The state of a domain, trained on this rank's share of each batch."""
    state = cubn.BatchNormState(4)
    for step in range(STEPS):
        share = batch(domain, step)[16 * rank // size : 16 * (rank + 1) // size]
        y, saved = cubn.forward_train(share, state, comm=comm)
        gradients = cubn.backward(y, saved, parameter_gradients="global")
        state.gamma -= np.float32(1e-3) * gradients.dgamma
    return state


def alone(domain):
    """The same without ranks."""
    return train(None, domain, 0, 1)


def report(domain, states):
    expected = alone(domain)
    for state in states:
        assert np.array_equal(state.running_mean, expected.running_mean)
        assert np.array_equal(state.running_var, expected.running_var)
        assert np.array_equal(state.gamma, expected.gamma)
    mean = expected.running_mean.mean()
    print(f"{domain}: running mean {mean:+.2f}, gamma and statistics equal on {len(states)} ranks and on one")


def main():
    if "mpi4py.run" in sys.modules:  # python -m mpi4py
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        domain = list(DOMAINS)[world.rank % 2]
        comm = world.Split(world.rank % 2)
        states = comm.gather(train(comm, domain, comm.rank, comm.size))
        if states:
            report(domain, states)
    else:
        for domain in DOMAINS:
            report(domain, threads.run(2, lambda comm, domain=domain: train(comm, domain, comm.rank, comm.size)))


if __name__ == "__main__":
    main()
