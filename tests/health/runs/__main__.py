"""`python -m tests.health.runs --seeds 200 --show`: train, diagnose, and print how far healthy runs go.

Seeds begin where those of the tests end, so that thresholds are set on other runs than they are judged by.
"""

import argparse
from collections import Counter

import cubn
from tests.health.runs.distributions import of_run, table
from tests.health.runs.settings import TESTED, draw
from tests.health.runs.training import train


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.health.runs", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="how many runs")
    parser.add_argument("--first", type=int, default=TESTED, metavar="SEED", help="the first of them (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print the distributions, too")
    arguments = parser.parse_args()
    rows, found = [], Counter()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        run = train(draw(seed))
        rows.append(of_run(run))
        for finding in cubn.diagnose(run.subject, run.moments).findings:
            found[finding.severity, finding.rule] += 1
            if finding.severity != "info":
                print(run.settings, finding, sep="\n", flush=True)
    for (severity, rule), times in sorted(found.items()):
        print(f"{severity:8} {rule:20} {times}")
    if arguments.show:
        print(table(rows))


if __name__ == "__main__":
    main()
