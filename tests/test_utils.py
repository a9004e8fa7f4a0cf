"""utils.py: options, devices, seeds, stop signals, and files that are written whole."""

import argparse
import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import utils
from utils import Clock, Parser, RunError, StopSignals, number, seed_update

# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (number(int, 1), ["1", "32", "1000000"], ["0", "-3"]),
        (number(int, 0, 9), ["0", "9"], ["10", "-1"]),
        (number(float, 0, above=True), ["0.1", "7"], ["0", "-1", "nan"]),
        (number(float, 0, 1, above=True), ["1", "1e-9"], ["0", "1.001", "nan", "inf"]),
    ],
)
def test_number_keeps_its_range(parse, good, bad):
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not"):
            parse(text)
    with pytest.raises(ValueError):
        parse("many")


def test_number_gives_an_int_or_a_float():
    assert isinstance(number(int, 0)("3"), int)
    assert isinstance(number(float, 0)("3"), float)
    with pytest.raises(ValueError):
        number(int, 0)("2.5")


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (number(int, 1), "0", "0 is not at least 1"),
        (number(int, 0, 9), "10", "10 is not at least 0 and at most 9"),
        (number(float, 0, 1, above=True), "2", "2 is not above 0 and at most 1"),
    ],
)
def test_number_says_what_is_allowed(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--count", "0"], "argument --count: 0 is not at least 1"),
        (["--count", "x"], "invalid int value: 'x'"),
        (["--what", "x"], "unrecognized arguments: --what x"),
        (["--count"], "expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, arguments, part):
    parser = Parser()
    parser.add_argument("--count", type=number(int, 1))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert part in error
    assert error.count("\n") == 1


def test_pick_device():
    assert utils.pick_device("cpu") == torch.device("cpu")
    assert utils.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "", "meta", "hpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(RunError) as error:
        utils.pick_device(name)
    assert str(error.value).startswith(f"--device {name}")
    assert "\n" not in str(error.value)


def test_run_error_escapes_control_characters():
    assert str(RunError("two\nlines \x1b[31mred\udcff é")) == "two\\nlines \\x1b[31mred\\udcff é"


# ---------------------------------------------------------------- seeds, signals, clock


def test_seed_update_gives_each_stage_and_update_its_own_random_numbers():
    def drawn(*key):
        seed_update(*key)
        return tuple(torch.rand(4).tolist())

    stages = ("vqvae", "prior", "refiner", "refiner validation")
    keys = [(seed, stage, update) for seed in (0, 1, 2**32 - 1) for stage in stages for update in range(5)]
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_exits_at_once_and_restores_the_handlers(kind, status):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, StopSignals():
        assert signal.getsignal(kind) not in before
        os.kill(os.getpid(), kind)
        pytest.fail("went on")
    assert stop.value.code == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_stop_signal_waits_where_it_is_held():
    done = []
    with pytest.raises(SystemExit) as stop, StopSignals() as signals:
        signals.hold()
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        done.append("what may not be left half done")
        signals.release()
        pytest.fail("went on")
    assert stop.value.code == 143
    assert done


def test_handlers_are_restored_without_a_signal_and_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals() as signals:
        signals.hold()
        signals.release()  # nothing came
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signals.hold()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_a_second_interrupt_goes_to_the_outer_handler():
    with pytest.raises(SystemExit) as stop, StopSignals(), StopSignals() as inner:
        inner.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")
    assert stop.value.code == 130


def test_two_signals_at_once_are_no_error():
    """Python runs both handlers one after the other, the second with the handlers that the first has installed."""
    with pytest.raises(SystemExit) as stop, StopSignals() as signals:
        signals.hold()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
        signals.release()
    assert stop.value.code in (143, 129)


def test_signals_that_are_ignored_stay_ignored():
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def say_to(stream, *lines):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        for line in lines:
            utils.say(line)


def test_say_escapes_what_stdout_cannot_encode():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    say_to(stream, "K\u00f6ln \u524d \udcf6 \n")
    assert stream.buffer.getvalue() == rb"K\xf6ln \u524d \udcf6 \n" + b"\n"


def test_say_survives_a_closed_stdout():
    """A reader like `head` that has gone, or a log on a full disk."""

    class Full(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise OSError(errno.ENOSPC, "No space left on device")

    tried = []
    say_to(Full(), "one", "two")
    assert tried == ["one"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_repeated_sigterm_is_ignored(first):
    """torchrun and Slurm send several to a process."""
    with pytest.raises(SystemExit) as stop, StopSignals() as signals:
        signals.hold()
        for kind in (first, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), kind)
        signals.release()
    assert stop.value.code == 128 + first


def test_clock_is_due_after_each_interval(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.time.monotonic", lambda: now[0])
    clock = Clock(60)
    answers = []
    for now[0] in (100, 159, 160, 161, 219, 225, 284, 285):
        answers.append(clock.due())
    assert answers == [False, False, True, False, False, True, False, True]


# ---------------------------------------------------------------- files


def test_write_file_keeps_the_old_content_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    utils.write_file(path, lambda part: part.write_text("old"))

    def fail_half_way(part):
        part.write_text("ne")
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="file cannot be written: No space left on device"):
        utils.write_file(path, fail_half_way)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
    utils.write_file(path, lambda part: part.write_text("new"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "new")]


def test_write_file_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def replace(old, new):
        done.append((old.name, new.name))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    utils.write_file(tmp_path / "file", lambda part: part.write_text("new"))
    part = Path(done[0])
    assert part.match(f"{tmp_path}/file.*.part")
    assert done[1:] == [(part.name, "file"), str(tmp_path)]


def test_check_folder_leaves_nothing_behind(tmp_path):
    utils.check_folder("--out", tmp_path)
    utils.check_folder("--out", tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/1/new"])
def test_check_folder_says_where_nothing_can_be_written(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=f"--out .*{place} cannot be written: "):
        utils.check_folder("--out", tmp_path / place)


def test_write_file_has_a_temporary_file_of_its_own(tmp_path):
    """Two runs that share a folder of figures: neither overwrites the other's temporary file."""
    path = tmp_path / "loss.png"

    def write(part):
        utils.write_file(path, lambda other: other.write_text("other"))
        part.write_text("mine")

    utils.write_file(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("loss.png", "mine")]
