"""One rank of the demo: `mpiexec -n P python -m mpi4py -m cubn.cli.demo_ranks inputs.npz` prints P and the digests."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

from cubn.cli.demo import digests_of_steps, step


def main(path: str) -> None:
    """Forward and backward of this rank's images through every normalisation."""
    comm = MPI.COMM_WORLD
    with np.load(path) as inputs:
        layers = [inputs[name] for name in inputs.files]
    start, stop = (len(layers[0]) * rank // comm.size for rank in (comm.rank, comm.rank + 1))
    results = comm.gather([step(x, slice(start, stop), comm) for x in layers])
    if results is not None:
        print(comm.size, *digests_of_steps(results))


if __name__ == "__main__":
    main(sys.argv[1])
