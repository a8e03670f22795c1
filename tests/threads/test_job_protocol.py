"""Workers and callers understand each other however their steps fall: in a model of native_pool.py, all of them.

A change of the protocol there belongs in the model too.
"""

import pytest

from tests.threads.job_protocol import Broken, Protocol, explored

CASES = [
    {"helpers": (1,), "rounds": 3, "workers": 1, "spins": 1},
    {"helpers": (1, 1), "rounds": 2, "workers": 1, "spins": 0},
    {"helpers": (1, 1), "rounds": 1, "workers": 1, "spins": 1, "early": True},
    {"helpers": (2,), "rounds": 2, "workers": 2, "spins": 0},
    {"helpers": (1, 1), "rounds": 1, "workers": 2, "spins": 0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_job_is_done_once_and_nobody_waits_for_ever(case):
    assert explored(Protocol(**case)) > 100


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("reserved without comparing", "nobody will wake it|given two jobs|not been run as often"),
        ("number after the job", "two workers have one number"),
        ("nobody woken", "nobody will wake it"),
        ("taken back without comparing", "caller has returned|not been run as often|waits for ever"),
        ("done before the kernel", "caller has returned|not been run as often"),
        ("asleep without comparing", "given two jobs|waits for ever|nobody will wake it"),
    ],
)
def test_a_protocol_with_a_mistake_is_found_out(mistake, found):
    with pytest.raises(Broken, match=found):
        [explored(Protocol(**case, mistake=mistake)) for case in CASES]
