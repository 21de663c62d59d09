"""Stopping: the first signal asks, the second Ctrl-C insists, and handlers are put back."""

import os
import signal
import threading

import pytest

from qkv_jax.training.preemption import StopSignal


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_the_first_signal_only_asks(number):
    with StopSignal() as stop:
        assert not stop.requested and stop.name == ""
        signal.raise_signal(number)
        assert stop.requested and stop.name == number.name


def test_a_signal_from_another_process_arrives():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_the_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)


def test_a_scheduler_that_repeats_itself_does_not_end_the_save():
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_name_is_that_of_the_first_signal():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGINT"


def test_handlers_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), StopSignal():
        1 / 0  # noqa: B018


def test_other_threads_go_without():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
