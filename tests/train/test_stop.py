"""Signals stop a run; these are sent to the process of the tests."""

import contextlib
import hashlib
import os
import signal
import threading
import time

import pytest

from mmfm_jax.cli import main
from mmfm_jax.train import stop
from mmfm_jax.train.stop import StopSignal


@pytest.fixture
def left():
    """What `leave` was called with."""
    return []


@pytest.fixture
def stopping(left):
    with StopSignal(lambda *how: left.append(how)) as stopping:
        yield stopping


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def until(what) -> None:
    deadline = time.monotonic() + 10
    while not what() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert what()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_an_end_by_name_and_the_second_leaves(stopping, left, capsys, number):
    stopping.begins()
    assert not stopping.reached(1) and stopping.cause is None
    send(number)
    until(lambda: stopping.reached(2))
    assert stopping.cause == number.name and not left
    assert f"{number.name}: saves after the step under way and stops" in capsys.readouterr().err
    send(signal.SIGINT)
    until(lambda: left)
    assert left == [(signal.SIGINT, True)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_anything_to_save_a_signal_leaves_though_a_program_is_being_compiled(stopping, left, number):
    """Compiling is one long call that Python's own handlers wait for; so is this."""
    heard = []
    threading.Timer(0.1, send, [number]).start()
    threading.Thread(target=lambda: (until(lambda: left), heard.append(time.monotonic()))).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
    ended = time.monotonic()
    until(lambda: heard)
    assert left == [(number, False)] and heard[0] < ended - 0.2


def test_leaving_says_so_in_one_sentence_and_to_the_launcher(monkeypatch, capsys, tmp_path):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setenv("MMFM_OUTCOME", str(tmp_path / "outcome"))
    stop.leave(signal.SIGINT, begun=False)
    said = capsys.readouterr().err
    assert ended == [130] and said.count("\n") == 1
    assert said.startswith("mmfm: SIGINT: left before the first step; nothing is lost; the same command")
    assert (tmp_path / "outcome").read_text() == "stopped\n"


def test_handlers_are_as_before_afterwards_and_a_signal_that_is_ignored_stays_so(left):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as bash starts what is in the background
    try:
        with StopSignal(lambda *how: left.append(how)) as stopping:
            send(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            stopping.begins()
            send(signal.SIGTERM)
            until(lambda: stopping.cause)
        assert stopping.cause == "SIGTERM" and not left
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_within_a_program_of_its_user_a_second_signal_is_a_keyboard_interrupt():
    with StopSignal() as stopping:
        send(signal.SIGINT)
        assert stopping.reached(1) and stopping.cause == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt):
        send(signal.SIGINT)
        pytest.fail("the handler before was not put back")


def test_one_process_of_several_hands_ctrl_c_on_as_the_signal_that_jax_tells_all_of_them(stopping, left, monkeypatch):
    sent = []
    monkeypatch.setattr(stop, "in_group", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: sent.append(number))
        signal.raise_signal(signal.SIGINT)
        until(lambda: sent)
    assert sent == [signal.SIGTERM] and stopping.cause == "SIGINT" and not left


@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_ctrl_c_in_another_command_is_one_sentence(monkeypatch, capsys, verb):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mmfm_jax.cli.{verb}", interrupted)
    monkeypatch.setattr(interrupted, "__name__", verb, raising=False)
    monkeypatch.setattr(interrupted, "__doc__", "Does nothing.", raising=False)
    with pytest.raises(SystemExit) as exit:
        main([verb, "somewhere"])
    assert exit.value.code == 130 and capsys.readouterr().err == "mmfm: stopped by Ctrl-C\n"
