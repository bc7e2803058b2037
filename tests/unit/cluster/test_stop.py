import os
import signal

import pytest

from job.cluster.stop import SIGNALS, Stop


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if nohup runs the tests
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handlers_are_put_back_but_for_usr2_which_is_not_heard_any_more():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Stop()
    assert stop.signal is None
    assert [signal.getsignal(number) for number in SIGNALS] == [stop.note] * len(SIGNALS)
    stop.restore()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before | {
        signal.SIGUSR2: signal.SIG_IGN
    }
    os.kill(os.getpid(), signal.SIGUSR2)  # by default the program would end here


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted(number):
    stop = Stop()
    os.kill(os.getpid(), number)
    assert stop.signal == number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_late_copy_of_a_signal_does_not_end_a_worker_that_stops(number):
    stop = Stop()
    stop.ignore()
    stop.restore()
    os.kill(os.getpid(), number)  # by default the program would end here


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal is None
    stop.restore()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
