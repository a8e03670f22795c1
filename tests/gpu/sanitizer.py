"""One tool of compute-sanitizer over small runs of the kernels.

python -m tests.gpu.sanitizer racecheck --clusters          further options are those of tests.gpu.smoke

Prints what the tool found, as JSON. That it is not installed, or cannot watch this device, is a result, not a failure.
"""

import json
import re
import subprocess
import sys

from tests.gpu.tools import path_of

SUMMARY = re.compile(r"^=+ (.*SUMMARY: .*)$", re.MULTILINE)
REFUSED = re.compile(
    r"^=+ (?:Error: )?(Device not supported.*|.*insufficient permission.*|.*failed to initialize.*)$", re.M | re.I
)
FOUND = 3000  # characters of the first findings


def main(tool, options):
    program = path_of("compute-sanitizer")
    if program is None:
        print(json.dumps({"tool": tool, "refused": "compute-sanitizer is not installed"}))
        return 0
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.smoke", "--no-pools", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    summary, refused = SUMMARY.findall(run.stdout), REFUSED.search(run.stdout)
    record = {"tool": tool, "exit": run.returncode, "summary": summary}
    record["as_on_the_cpu"] = run.stdout.count('"as_on_the_cpu"')
    passed = run.returncode == 0 and summary and record["as_on_the_cpu"]  # some say 0 errors, and ran nothing
    if refused:
        record["refused"] = refused[1]
    elif not passed:
        lines = [line for line in run.stdout.splitlines() if line.startswith("=========")]
        record["found"] = "\n".join(lines)[:FOUND] or run.stdout[-FOUND:]
    print(json.dumps(record))
    return int(not (passed or refused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
