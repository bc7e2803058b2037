"""Signals that stop a worker."""

import os
import signal

import pytest

from job.cluster.stop import SIGNALS, Stop


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_restore_puts_handlers_back_and_ignores_usr2():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Stop()
    assert stop.signal is None
    assert [signal.getsignal(number) for number in SIGNALS] == [stop.note] * len(SIGNALS)
    stop.restore()
    expected = before | {signal.SIGUSR2: signal.SIG_IGN}
    assert {number: signal.getsignal(number) for number in SIGNALS} == expected
    os.kill(os.getpid(), signal.SIGUSR2)  # by default the program would end here


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_recorded(number):
    stop = Stop()
    os.kill(os.getpid(), number)
    assert stop.signal == number


@pytest.mark.parametrize("number", SIGNALS)
def test_later_signals_are_ignored(number):
    stop = Stop()
    stop.ignore()
    stop.restore()
    os.kill(os.getpid(), number)  # by default the program would end here


def test_sighup_stays_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal is None
    stop.restore()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
