"""Signal handlers that compute, and exceptions that they raise: nothing is half done, nobody writes into memory that is
free, nobody waits for ever, and no right to a team is lost.
"""

import signal

import pytest

from tests.threads.programs import CHOICES, every_choice, run

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this platform")


@every_choice
def test_a_handler_computes_or_raises_at_any_moment(choice):
    run(
        """
        right = []

        def compute(*_):
            right.append(same(train()))
            signal.setitimer(signal.ITIMER_REAL, 3e-3 * (len(right) < 20))

        signal.signal(signal.SIGALRM, compute)
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        while len(right) < 20:
            assert same(train())
        assert all(right)

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        start = time.perf_counter()
        for _ in range(10):
            train()
        once = (time.perf_counter() - start) / 10
        lost = []
        sys.unraisablehook = lost.append  # told of an exception in a callback, which goes no further
        for _ in range(40):
            guards = [np.full(x.shape, 7, np.float32) for _ in range(4)]
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + rng.random() * 1.2 * once)
                train()
                while not lost:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                pass
            assert not lost, lost
            guards += [np.full(x.shape, 7, np.float32) for _ in range(4)]  # in memory that the call has left
            time.sleep(1e-3)
            assert all((guard == 7).all() for guard in guards), "somebody wrote into memory of others"
        assert same(train())
        """,
        **CHOICES[choice],
    )


@every_choice
def test_between_any_two_bytecodes_of_the_choice(choice):
    """In a thread that has asked for nobody yet: raised there, or computed there by a handler."""
    run(
        """
        import itertools
        from cubn.backends.cpu import launch, whose_threads

        files = {module.__file__ for module in (launch, whose_threads, sys.modules[type(pool).__module__])}
        state = cubn.BatchNormState(8)
        infer = lambda: cubn.forward(x, state)
        wanted = infer()
        if torch is not np:
            torch.set_num_threads(1)  # the choice is the same, and no time is spent in regions

        class Stop(BaseException):
            pass

        def stop():
            raise Stop

        def compute():
            sys.settrace(None)
            assert np.array_equal(infer(), wanted)

        def reached(bytecode, then):
            "Whether the work came so far."
            left = bytecode

            def each(frame, event, _):
                nonlocal left
                if event == "opcode":
                    left -= 1
                    if left == 0:
                        then()
                return each

            def trace(frame, *_):
                frame.f_trace_opcodes = frame.f_code.co_filename in files
                return each if frame.f_trace_opcodes else None

            pool._chosen, pool._thread = None, type(pool._thread)()
            sys.settrace(trace)
            try:
                assert np.array_equal(infer(), wanted)
            except Stop:
                pass
            finally:
                sys.settrace(None)
            return left <= 0

        signal.alarm(200)
        for then in (stop, compute):
            for bytecode in itertools.count(1):
                came = reached(bytecode, then)
                assert np.array_equal(infer(), wanted)
                assert len(pool._members) == bool(pool._chosen.teams_of), "one thread, one right"
                if not came:
                    break
            assert bytecode > 100, "the choice was watched"
        print(bytecode)
        """,
        **CHOICES[choice],
    )
