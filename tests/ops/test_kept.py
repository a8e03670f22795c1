"""What is kept for later calls is bounded by bytes, whatever is asked for and by how many threads."""

import threading

import numpy as np
import pytest

from cubn._kept import ENTRY, Kept, kept

SIZE = 10_000
MOST = 10 * (SIZE + ENTRY)


@pytest.fixture
def made():
    """Keys in the order in which they were computed."""
    return []


@pytest.fixture
def table(made):
    @kept(MOST)
    def table(key, size=SIZE):
        made.append(key)
        return np.full(size, key, np.int8)

    return table


def test_what_was_found_is_not_computed_again(table, made):
    assert table(1) is table(1)
    assert made == [1]


def test_a_long_series_stays_within_its_bytes(table):
    for key in range(1000):
        assert table(key % 100, 1 + key * 37 % (3 * SIZE))[0] == key % 100
        assert 0 < table.nbytes <= MOST


def test_what_is_asked_for_again_and_again_stays(table, made):
    for key in range(1000):
        table(-1)
        table(key % 100)
    assert made.count(-1) == 1


def test_what_is_larger_than_all_the_room_drives_nothing_out(table, made):
    table(1)
    assert len(table(2, MOST + 1)) == MOST + 1
    table(1)
    assert made == [1, 2]


def test_what_takes_nearly_all_the_room_drives_the_others_out(table, made):
    for key in (1, 2):
        table(key)
    large = MOST - ENTRY - 1
    assert len(table(3, large)) == large
    table(3, large)
    assert made == [1, 2, 3]
    assert table.nbytes <= MOST


def test_nothing_is_kept_of_a_function_that_raises():
    @kept(MOST)
    def refuse(key):
        raise KeyError(key)

    for _ in range(2):
        with pytest.raises(KeyError):
            refuse(1)
    assert refuse.nbytes == 0


def test_many_threads_get_what_they_ask_for(table):
    wrong = []

    def ask(first):
        for key in range(first, first + 3000):
            if table(key % 50)[0] != key % 50:
                wrong.append(key)

    threads = [threading.Thread(target=ask, args=(7 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    table(99)
    assert table.nbytes <= MOST


def test_a_handler_that_asks_in_the_midst_of_a_call_is_served(made):
    """There is no lock it could wait for."""

    def table(key):
        made.append(key)
        if key:
            again(key - 1)
        return np.zeros(SIZE)

    again = Kept(table, MOST)
    again(3)
    assert made == [3, 2, 1, 0]
