import os
import signal

import pytest

from job.run.stop import SIGNALS, Stop


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = Stop()
    assert stop.signal is None
    assert [signal.getsignal(number) for number in SIGNALS] == [stop.note] * len(SIGNALS)
    stop.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_was_told_to_stop_can_be_told_so_until_its_end(number):
    stop = Stop()
    os.kill(os.getpid(), number)
    assert stop.signal == number
    stop.restore()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN  # else it would end here
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signal.getsignal(signal.SIGTERM) == stop.before[signal.SIGTERM]
