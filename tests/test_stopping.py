"""Ctrl-C and SIGTERM: the first is a request, the second interrupts."""

from __future__ import annotations

import signal
import threading

import pytest

from vidsieve.io.stopping import stop_on_signal


def test_the_first_signal_sets_the_flag_and_the_second_interrupts(ctrl_c):
    notes, before = [], signal.getsignal(signal.SIGTERM)  # Ray leaves a handler of its own
    with pytest.raises(KeyboardInterrupt), stop_on_signal(lambda: notes.append("stopping")) as flag:
        assert not flag.stop
        signal.raise_signal(signal.SIGTERM)
        assert flag.stop and notes == ["stopping"]
        signal.raise_signal(signal.SIGINT)
    assert notes == ["stopping"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_patient_block_is_never_interrupted(ctrl_c):
    with stop_on_signal(patient=True) as flag:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
    assert flag.stop and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored_and_other_threads_catch_none(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    flags = []

    def elsewhere():
        with stop_on_signal() as flag:
            flags.append(flag)

    with stop_on_signal() as flag:
        signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert not flag.stop and not flags[0].stop
