"""The first signal asks, the second one insists."""

from __future__ import annotations

import signal
import threading

import pytest

from library.runtime import signals
from library.runtime.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_mark_and_a_second_one_ends_the_run(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch):
    """torch's launcher sends its processes the Ctrl-C that the terminal has sent to all of them."""
    now = [100.0]
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.4
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested == signal.SIGINT
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_exit_status_is_that_of_shells():
    assert (signals.exit_status(signal.SIGINT), signals.exit_status(signal.SIGTERM)) == (130, 143)


def test_other_threads_have_no_signals():
    found = []

    def use():
        with Interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [0]
