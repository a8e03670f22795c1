"""Every kernel, by small arrays, held to digests of what the CPU backend gives: what runs first, and under sanitizers.

python -m tests.gpu.smoke                   every case
python -m tests.gpu.smoke --part 3 14       of every fourteen the fourth
python -m tests.gpu.smoke --launches        one training step on chip in each layout: whether anything works
python -m tests.gpu.smoke --clusters        three small ones on clusters of blocks
python -m tests.gpu.smoke --no-pools        every allocation is the driver's own, so that its end is known
"""

import argparse
import json
import os
import sys
import time

import cupy

import cubn
from tests.gpu import device_arrays, digests
from tests.gpu.digests import CASES, CLUSTERS, Case

LAUNCHES = (Case("resident", "float32", "dense"), Case("resident, channels", "float32", "channels_last"))


def training_step(case):
    """The digest of y alone: one launch."""
    x, *_ = map(device_arrays.to_cupy, digests.stores(case))
    y, _ = cubn.forward_train(x, cubn.BatchNormState(x.shape[1], like=x))
    return {"forward_train, plain: y": digests.digest(device_arrays.store_of(y))}


def everything(case):
    return digests.computed(case, device_arrays.to_cupy, device_arrays.store_of)


def check(case, run):
    """What differs from the CPU's, or what went wrong."""
    begin = time.monotonic()
    record = {"case": str(case)}
    try:
        expected = digests.expected(case)
        wrong = [name for name, digest in run(case).items() if digest != expected[name]]
        record |= {"differs": wrong} if wrong else {"as_on_the_cpu": True}
    except Exception as error:  # the other cases are worth having
        record["error"] = f"{type(error).__name__}: {error}"[:600]
    return record | {"took": round(time.monotonic() - begin, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("PART", "PARTS"))
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--clusters", action="store_true")
    parser.add_argument("--no-pools", action="store_true")
    parser.add_argument("--from", type=int, default=0, dest="begin", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.no_pools:
        cupy.cuda.set_allocator(None)
    part, parts = options.part
    cases = (LAUNCHES if options.launches else CLUSTERS if options.clusters else CASES)[part::parts]
    wrong = options.begin > 0
    for number in range(options.begin, len(cases)):
        record = check(cases[number], training_step if options.launches else everything)
        print(json.dumps(record), flush=True)
        if "error" in record:  # after some, a process can do nothing more on the device: another goes on
            os.execv(sys.executable, [*sys.orig_argv, "--from", str(number + 1)])
        wrong |= "differs" in record
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
