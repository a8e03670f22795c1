"""The ledger of what is in flight, with events that are done when a test says so."""

import gc
import weakref

from cubn.backends.cuda.in_flight import InFlight


class Event:
    done = False

    def record(self, stream):
        self.done = False
        stream.append(self)


class Thing:
    """What can be asked whether it is still there."""


def test_things_go_in_any_order_in_which_they_are_done():
    ledger, stream = InFlight(Event), []
    things = [Thing() for _ in range(3)]
    there = list(map(weakref.ref, things))
    for thing in things:
        ledger.hold(stream, (thing,))
    things.clear()
    del thing
    stream[1].done = True
    ledger.hold(stream, ())
    assert [reference() is not None for reference in there] == [True, False, True]


def test_an_event_is_used_again_only_once_it_is_done():
    ledger, stream = InFlight(Event), []
    for _ in range(3):
        ledger.hold(stream, ())
    assert len(set(map(id, stream))) == 3
    stream[2].done = True
    ledger.hold(stream, ())
    assert stream[3] is stream[2]
    ledger.hold(stream, ())
    assert len(set(map(id, stream))) == 4


def test_what_is_for_good_stays():
    ledger, thing = InFlight(Event), Thing()
    there = weakref.ref(thing)
    ledger.hold_for_good((thing,))
    del thing
    for _ in range(2):
        ledger.hold([], ())
    assert there() is not None


def test_a_thing_whose_event_cannot_be_recorded_stays():
    """As where an interrupt comes: its work may be under way."""

    class Interrupted(Event):
        def record(self, stream):
            raise KeyboardInterrupt

    ledger, thing = InFlight(Interrupted), Thing()
    there = weakref.ref(thing)
    try:
        ledger.hold([], (thing,))
    except KeyboardInterrupt:
        del thing
    gc.collect()
    assert there() is not None


def test_what_goes_may_hold_more():
    """Python may collect garbage wherever something is made, and finalizers may call cubn."""
    ledger, stream = InFlight(Event), []
    for _ in range(50):
        ledger.hold(stream, ())
    threshold, calls = gc.get_threshold(), []

    def hold_more(phase, info):
        if len(calls) < 200:
            calls.append(phase)
            ledger.hold_for_good(())

    gc.callbacks.append(hold_more)
    gc.set_threshold(1)
    try:
        for _ in range(50):
            ledger.hold(stream, ([],))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(hold_more)
    assert calls
