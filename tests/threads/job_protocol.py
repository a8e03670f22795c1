"""A model of the pool's job protocol (native_pool.py), and all the ways in which its steps may be interleaved.

Each access to memory that others may see is a step of its own. Callers run kernels, one after the other, whose jobs lie
at the same place of their stack; workers serve for ever. A state is a tuple: mailboxes, numbers, semaphores, counts of
jobs done, then callers and workers, each of which is where it stands and what it knows.
"""

from collections import deque
from typing import NamedTuple

ASLEEP, IDLE, RESERVED, BUSY, JOB = range(5)
"""States of a mailbox; JOB + c is the job of caller c."""


class Broken(Exception):
    """A state or step that must not be."""


class Caller(NamedTuple):
    at: str = "begin"
    worker: int = 0
    seen: int = 0  # in its mailbox
    given: int = 0
    rounds: int = 0  # that are over
    ran: int = 0  # kernels by workers in this round


class Worker(NamedTuple):
    at: str = "load"
    seen: int = 0
    number: int = 0
    waited: int = 0


class State(NamedTuple):
    mailboxes: tuple[int, ...]
    numbers: tuple[int, ...]
    posted: tuple[int, ...]
    done: tuple[int, ...]
    callers: tuple[Caller, ...]
    workers: tuple[Worker, ...]


class Protocol:
    """What may happen next, where callers want `helpers` workers each, `rounds` times; with one mistake, perhaps."""

    def __init__(self, helpers, rounds, workers, spins, mistake="", early=False):
        self.helpers, self.rounds, self.spins, self.mistake, self.early = helpers, rounds, spins, mistake, early
        self.first = State(
            (IDLE,) * workers,
            (0,) * workers,
            (0,) * workers,
            (0,) * len(helpers),
            (Caller(),) * len(helpers),
            (Worker(),) * workers,
        )

    def steps(self, state):
        for c, caller in enumerate(state.callers):
            if caller.at == "number" and not self.mistake:  # which nobody else sees: before all else
                yield from self.by_caller(state, c, caller)
                return
        for w, worker in enumerate(state.workers):
            if worker.at == "run" and not self.mistake:
                yield from self.by_worker(state, w, worker)
                return
        for c in range(len(self.helpers)):
            yield from self.by_caller(state, c, state.callers[c])
        for w in range(len(state.workers)):
            yield from self.by_worker(state, w, state.workers[w])

    def by_caller(self, s, c, me):
        w, job = me.worker, JOB + c
        last = w + 1 == len(s.workers)

        def at(place, state=s, **known):
            return state._replace(callers=replaced(state.callers, c, me._replace(at=place, **known)))

        def after_submit(given, state=s):
            if last or given == self.helpers[c]:
                return at("withdraw", state, worker=0, given=given, seen=0)
            return at("submit", state, worker=w + 1, given=given, seen=0)

        def posted(state):
            post = me.seen == ASLEEP and self.mistake != "nobody woken"
            return at("post", state) if post else after_submit(me.given, state)

        if me.at == "begin" and me.rounds < self.rounds:
            yield at("submit", s._replace(done=replaced(s.done, c, 0)), worker=0, given=0, ran=0)
        elif me.at == "submit":
            seen = s.mailboxes[w]
            yield at("reserve", seen=seen) if ASLEEP <= seen <= IDLE else after_submit(me.given)
        elif me.at == "reserve":
            if s.mailboxes[w] == me.seen or self.mistake == "reserved without comparing":
                store_first = self.mistake == "number after the job"
                yield at("put" if store_first else "number", mailbox(s, w, RESERVED), given=me.given + 1)
            else:
                yield after_submit(me.given)
        elif me.at == "number":
            numbered = s._replace(numbers=replaced(s.numbers, w, me.given))
            yield posted(numbered) if self.mistake == "number after the job" else at("put", numbered)
        elif me.at == "put":
            if s.mailboxes[w] != RESERVED:
                raise Broken("a mailbox is given two jobs")
            if self.mistake == "number after the job":
                yield at("number", mailbox(s, w, job))
            else:
                yield posted(mailbox(s, w, job))
        elif me.at == "post":
            yield after_submit(me.given, s._replace(posted=replaced(s.posted, w, s.posted[w] + 1)))
        elif me.at == "withdraw":
            found = s.mailboxes[w] == job
            yield at("take back") if found else at("wait" if last else "withdraw", worker=w + (not last))
        elif me.at == "take back":
            taken = s.mailboxes[w] == job
            after = mailbox(s, w, IDLE) if taken or self.mistake == "taken back without comparing" else s
            given = me.given - (taken or self.mistake == "taken back without comparing")
            yield at("wait" if last else "withdraw", after, worker=w + (not last), given=given)
        elif me.at == "wait" and s.done[c] == me.given:
            if me.ran != me.given:
                raise Broken("a caller returns, and its kernel has not been run as often as it was given away")
            yield at("begin", rounds=me.rounds + 1, worker=0, seen=0, given=0, ran=0)

    def by_worker(self, s, w, me):
        def at(place, state=s, **known):
            return state._replace(workers=replaced(state.workers, w, me._replace(at=place, **known)))

        c = me.seen - JOB
        if me.at == "load":
            seen, waited = s.mailboxes[w], min(me.waited + 1, self.spins + 1)
            if seen > BUSY:
                yield at("take", seen=seen)
            else:
                yield at("sleep" if waited > self.spins else "load", waited=waited)
        elif me.at == "take":
            if s.mailboxes[w] == me.seen:
                yield at("run", mailbox(s, w, BUSY))
            else:
                yield at("load", seen=0, waited=0)
        elif me.at == "run":
            running = [other for other in s.workers if other.at == "end" and other.seen == me.seen]
            if any(other.number == s.numbers[w] for other in running):
                raise Broken("two workers have one number, and one scratch memory")
            self.must_be_there(s, c)
            early = self.mistake == "done before the kernel"
            after = s._replace(numbers=replaced(s.numbers, w, 0))  # which is not read again
            yield at("end", counted(after, c) if early else after, number=s.numbers[w])
        elif me.at == "end":
            self.must_be_there(s, c)
            ran = s.callers[c]._replace(ran=s.callers[c].ran + 1)
            yield at("idle", s._replace(callers=replaced(s.callers, c, ran)), number=0)
        elif me.at == "idle":
            if self.mistake == "done before the kernel":
                yield at("load", mailbox(s, w, IDLE), seen=0, waited=0)
            else:
                yield at("done", mailbox(s, w, IDLE))
        elif me.at == "done":
            self.must_be_there(s, c)
            yield at("load", counted(s, c), seen=0, waited=0)
        elif me.at == "sleep":
            if s.mailboxes[w] == IDLE or self.mistake == "asleep without comparing":
                yield at("look", mailbox(s, w, ASLEEP), waited=0)
            else:
                yield at("load")
        elif me.at == "look":
            yield at("semaphore") if s.mailboxes[w] == ASLEEP else at("load")
        elif me.at == "semaphore":
            if s.posted[w]:
                yield at("look", s._replace(posted=replaced(s.posted, w, s.posted[w] - 1)))
            elif self.early:  # a wait may end early
                yield at("look")
            self.must_be_woken(s, w)

    def must_be_there(self, s, c):
        """A job lies on its caller's stack."""
        if s.callers[c].at == "begin":
            raise Broken("a worker uses a job whose caller has returned")

    def must_be_woken(self, s, w):
        """Who waits for a semaphore that nobody will post is found asleep by the next caller."""
        posting = any(
            other.worker == w and other.seen == ASLEEP and other.at in ("number", "put", "post") for other in s.callers
        )
        if s.mailboxes[w] != ASLEEP and not s.posted[w] and not posting:
            raise Broken("a worker sleeps, and nobody will wake it")


def replaced(values, i, value):
    return (*values[:i], value, *values[i + 1 :])


def mailbox(state, w, value):
    return state._replace(mailboxes=replaced(state.mailboxes, w, value))


def counted(state, c):
    return state._replace(done=replaced(state.done, c, state.done[c] + 1))


def explored(protocol):
    """How many states there are. From each, all callers can finish; Broken says what is wrong."""
    before, waiting = {protocol.first: []}, deque([protocol.first])
    while waiting:
        state = waiting.popleft()
        for after in protocol.steps(state):
            if after not in before:
                before[after] = []
                waiting.append(after)
            before[after].append(state)
    finished = [s for s in before if all(c.at == "begin" and c.rounds == protocol.rounds for c in s.callers)]
    reached, waiting = set(finished), deque(finished)
    while waiting:
        for state in before[waiting.popleft()]:
            if state not in reached:
                reached.add(state)
                waiting.append(state)
    if len(reached) < len(before):
        raise Broken("a caller waits for ever")
    return len(before)
