"""Healthy runs on seeds that nobody looked at, and every planted fault: what `docs/health.md` says of thresholds.

python -m tests.health.runs.campaign            train, diagnose, write campaign.json, print the table
python -m tests.health.runs.campaign --table    the table of campaign.json
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import cubn
from cubn.health.rules import RULES
from tests.health.runs.faults import FAULTS
from tests.health.runs.judging import judged
from tests.health.runs.settings import draw
from tests.health.runs.training import train

RESULT = Path(__file__).with_name("campaign.json")
SEEDS = range(40_000, 40_100)
"""Looked at by nobody; take others once thresholds were set by what these showed."""


def of_healthy_runs():
    """How often each rule spoke, of running statistics alone and of them beside the data."""
    networks, by_rule = Counter(), {"alone": Counter(), "with moments": Counter()}
    for seed in SEEDS:
        run = train(draw(seed))
        networks[run.settings.network] += 1
        for given, moments in (("alone", None), ("with moments", run.moments)):
            for found in cubn.diagnose(run.subject, moments).findings:
                by_rule[given][f"{found.severity} {found.rule}"] += 1
                if found.severity != "info":
                    print(run.settings, given, found, sep="\n", flush=True)
    return {"seeds": [SEEDS.start, SEEDS.stop], "networks": sorted_(networks)} | {
        given: sorted_(counts) for given, counts in by_rule.items()
    }


def of_faults():
    """By its name, which rules named each fault, where it was missed, and what else was blamed."""
    verdicts = {}
    for fault in FAULTS:
        verdict = judged(fault, fault.run())
        blamed = [str(found) for found in verdict.blamed]
        verdicts[fault.name] = {"rules": verdict.rules, "missed": verdict.missed, "blamed": blamed}
    return verdicts


def sorted_(counts):
    return dict(sorted(counts.items()))


def table(result):
    """What each rule said, in Markdown."""
    healthy, faults = result["healthy"], result["faults"].values()
    seeds = range(*healthy["seeds"])
    lines = [
        f"| {len(seeds)} healthy runs, {len(faults)} faults | errors | warnings | infos | faults it named |",
        "|---|---|---|---|---|",
    ]
    for rule in RULES:
        counts = [
            " / ".join(str(healthy[given].get(f"{severity} {rule}", 0)) for given in ("alone", "with moments"))
            for severity in ("error", "warning", "info")
        ]
        lines.append(f"| `{rule}` | {' | '.join(counts)} | {sum(rule in fault['rules'] for fault in faults)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.health.runs.campaign", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--table", action="store_true", help="of the committed result, without a run")
    if not parser.parse_args().table:
        RESULT.write_text(json.dumps({"healthy": of_healthy_runs(), "faults": of_faults()}, indent=1) + "\n")
    print(table(json.loads(RESULT.read_text())), end="")


if __name__ == "__main__":
    main()
