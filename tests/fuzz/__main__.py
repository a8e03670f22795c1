"""`python -m tests.fuzz PART --seed S [--case K | --cases N | --seconds T]` runs cases of a part by hand."""

import argparse
import os
import sys

from tests.fuzz import harness


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("part", help="valid_calls, bad_input, capsules, signals, modes, cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    parser.add_argument("--cases", type=int, help="how many")
    parser.add_argument("--seconds", type=float, help="for how long; 10 without --case and --cases")
    parser.add_argument("--journal", help="a file for the case that is under way")
    given = parser.parse_args()
    if given.journal:
        harness.end_with_the_test()
    if given.case is not None:
        given.first, given.cases = given.case, 1
        if not given.journal:
            print(harness.case_of(harness.part_named(given.part), given.seed, given.case), flush=True)
    elif given.cases is None and given.seconds is None:
        given.seconds = 10.0
    numbers = harness.numbers(given.first, given.cases)
    status = harness.work(given.part, given.seed, numbers, given.seconds, given.journal)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # whatever a case has broken, it is not what ends this process


if __name__ == "__main__":
    main()
