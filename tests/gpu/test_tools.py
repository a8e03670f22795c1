"""What is made of the output of NVIDIA's tools, and that a tool which is missing or may not work is no failure."""

import json

import pytest

from tests.gpu import sanitizer, traffic


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A function that installs a program which says something."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("tests.gpu.tools.PLACES", ())

    def install(name, says, status=0, also=""):
        (tmp_path / "says").write_text(says)
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{also}\ncat {tmp_path}/says\nexit {status}\n")
        program.chmod(0o755)

    return install


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- traffic ----------------------------------------------------------------------------------------------------------

COUNTED = """\
==PROF== Connected to process 1234 (/usr/bin/python3.12)
==PROF== Profiling "slab": 0%....50%....100% - 1 pass
==PROF== Profiling "apply_rows": 0%....50%....100% - 1 pass
==PROF== Disconnected from process 1234
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","byte","byte","nsecond"
"0","1234","slab","51,380,224","50,000,000","30,720"
"1","1234","apply_rows","7","8","9.5"
"""
WRITE_DOWN = 'for last; do :; done; echo \'[{"kernel": "slab"}, {"kernel": "apply_rows"}]\' >"$last"'


def test_bytes_are_put_beside_the_launches_they_belong_to(tool, capsys):
    tool("ncu", COUNTED, also=WRITE_DOWN)
    assert traffic.main() == 0
    first, second = lines(capsys)
    assert first == {"kernel": "slab"} | dict(zip(traffic.COUNTERS, (51380224, 50000000, 30720), strict=True))
    assert second["kernel"] == "apply_rows" and second["gpu__time_duration.sum"] == 9.5


def test_launches_that_were_not_counted_are_a_failure(tool, capsys):
    tool("ncu", COUNTED.rpartition('"1"')[0], also=WRITE_DOWN)
    assert traffic.main() == 1
    assert len(lines(capsys)) == 1


def test_counters_that_may_not_be_read_are_a_result(tool, capsys):
    says = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
    tool("ncu", says, status=1)
    assert traffic.main() == 0
    assert lines(capsys) == [{"refused": "ERR_NVGPUCTRPERM - The user does not have permission"}]


def test_a_profiler_that_says_nothing_of_use_is_a_failure(tool, capsys):
    tool("ncu", "Traceback: it broke")
    assert traffic.main() == 1
    assert "it broke" in lines(capsys)[0]["error"]


# --- sanitizers -------------------------------------------------------------------------------------------------------

CASE = '{"case": "resident", "as_on_the_cpu": true, "took": 1.0}\n'
CLEAN = f"========= COMPUTE-SANITIZER\n{CASE}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = "========= Error: Race reported between Write access\n========= RACECHECK SUMMARY: 1 hazard displayed\n"


def test_a_clean_run(tool, capsys):
    tool("compute-sanitizer", CLEAN)
    assert sanitizer.main("racecheck", []) == 0
    (record,) = lines(capsys)
    assert record["as_on_the_cpu"] == 1 and record["summary"] == [
        "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    ]


FAILURES = {
    "a race": (RACE, 9, "Race reported"),
    "a clean summary of nothing": ("========= ERROR SUMMARY: 0 errors\n", 0, "0 errors"),
    "no summary": (CASE, 0, "as_on_the_cpu"),
    "an error of the program": (
        '========= Program hit "operation not supported" on CUDA API call\n========= ERROR SUMMARY: 1 error\n',
        9,
        "operation not supported",
    ),
}


@pytest.mark.parametrize(("says", "status", "found"), FAILURES.values(), ids=FAILURES)
def test_a_run_that_is_not_clean(says, status, found, tool, capsys):
    tool("compute-sanitizer", says, status)
    assert sanitizer.main("racecheck", []) == 1
    (record,) = lines(capsys)
    assert found in record["found"] and "refused" not in record


def test_a_device_that_cannot_be_watched_is_a_result(tool, capsys):
    tool("compute-sanitizer", "========= Error: Device not supported. Please refer to the documentation\n", status=1)
    assert sanitizer.main("memcheck", []) == 0
    assert lines(capsys)[0]["refused"].startswith("Device not supported")


@pytest.mark.parametrize(
    ("run", "name"), [(lambda: sanitizer.main("memcheck", []), "compute-sanitizer"), (traffic.main, "ncu")]
)
def test_a_tool_that_is_not_installed_is_a_result(run, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tests.gpu.tools.PLACES", ())
    assert run() == 0
    assert lines(capsys)[0]["refused"] == f"{name} is not installed"
