"""The first signal asks, the second one insists."""

from __future__ import annotations

import signal
import threading

import pytest

from library.runtime.signals import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_mark_and_a_second_one_ends_the_run(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(number)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_other_threads_have_no_signals():
    found = []

    def use():
        with Interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]
