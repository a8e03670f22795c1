"""Steps of a run: whatever becomes of one, the results of the others are there."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import run
from tests.gpu.steps import Step
from tests.gpu.steps import run as run_step

SAYS = ("echo", '{"found": 1}')
FAILURES = {
    "ends in error": (sys.executable, "-c", "print('{\"found\": 1}'); raise SystemExit('it broke')"),
    "is killed": ("sh", "-c", "echo '{\"found\": 1}'; kill -9 $$"),
    "hangs": ("sh", "-c", "echo '{\"found\": 1}'; sleep 600"),
    "floods its output": ("sh", "-c", "echo '{\"found\": 1}'; head -c 1000000 /dev/zero; exit 3"),
}


def records_of(step, seconds=60.0):
    records, log = [], []
    last = run_step(step, time.monotonic() + seconds, records.append, log.append)
    assert records[-1] == last
    return records, "".join(log)


def results(records):
    return [record["found"] for record in records if "found" in record]


def test_what_a_step_prints_is_written_down_as_it_comes():
    seen = []
    command = ("sh", "-c", "echo '{\"found\": 1}'; echo said; sleep 1; echo '{\"found\": 2}'; echo '{no object'")
    log = []
    run_step(
        Step("one", 60, [command]), time.monotonic() + 60, lambda r: seen.append((time.monotonic(), r)), log.append
    )
    (first, a), (second, b), (_, last) = seen
    assert (a["step"], a["found"], b["found"], last["status"]) == ("one", 1, 2, "passed")
    assert second - first > 0.5
    assert "said\n{no object\n" in log[0]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_process_that(failure):
    """Its results until then, and those of the others, are there; the step has failed, in time."""
    begin = time.monotonic()
    records, log = records_of(Step("one", 3, [SAYS, failure, SAYS]))
    assert results(records) == [1, 1, 1]
    assert records[-1]["status"] == ("out of time" if failure is FAILURES["hangs"] else "failed")
    assert records[-1]["processes"][::2] == ["0", "0"]
    assert time.monotonic() - begin < 30
    assert failure is not FAILURES["ends in error"] or ("it broke" in records[-1]["error"] and "it broke" in log)


def test_what_a_process_leaves_running_is_ended_with_it():
    command = ("sh", "-c", 'sleep 600 & echo "{\\"found\\": $!}"; exit 3')
    records, _ = records_of(Step("one", 60, [command]))
    (left,) = results(records)
    deadline = time.monotonic() + 30
    while is_running(left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(left)


def is_running(pid):
    """Or is not yet buried."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_that_is_not_there():
    records, _ = records_of(Step("one", 60, [SAYS, ("/no/such/program",)]))
    assert results(records) == [1]
    assert records[-1]["status"] == "failed" and "/no/such/program" in records[-1]["error"]


def test_the_stage_s_end_is_every_step_s():
    records, _ = records_of(Step("one", 600, [FAILURES["hangs"]]), seconds=1.0)
    assert results(records) == [1] and records[-1]["status"] == "out of time"
    records, _ = records_of(Step("two", 600, [SAYS]), seconds=-1.0)
    assert records == [{"step": "two", "status": "not run: no time left", "seconds": 0.0}]


def planted(stage, at):
    """The stage, its commands replaced by quick ones, of which those of one step fail."""
    steps = [step._replace(commands=[SAYS], seconds=10.0) for step in stage.steps]
    steps[at] = steps[at]._replace(commands=[FAILURES["is killed"]])
    return stage._replace(steps=tuple(steps))


@pytest.mark.parametrize("name", run.stages())
def test_a_step_that_fails_leaves_the_results_of_all_others(name, tmp_path, monkeypatch):
    stage = run.stages()[name]
    for at, broken in enumerate(stage.steps):
        monkeypatch.setattr(run, "stages", lambda rehearse, at=at: {name: planted(stage, at)})
        assert run.main(tmp_path, [name]) == 1
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "found" in line] == [step.name for step in stage.steps]
        statuses = {
            step: last["status"]
            for step, last in json.loads((tmp_path / "summary.json").read_text())[name]["steps"].items()
        }
        assert statuses == {step.name: "failed" if step is broken else "passed" for step in stage.steps}


def test_stages_that_are_named_join_in_the_summary(tmp_path, monkeypatch):
    stages = {name: stage._replace(steps=(Step("one", 10, [SAYS]),)) for name, stage in run.stages().items()}
    monkeypatch.setattr(run, "stages", lambda rehearse: stages)
    assert run.main(tmp_path, ["second"]) == run.main(tmp_path, ["tests", "first"]) == 0
    assert list(json.loads((tmp_path / "summary.json").read_text())) == ["second", "tests", "first"]
    assert run.main(tmp_path, ["third"]) == 2
