"""console.py: messages, errors and the argument parser."""

import argparse
import errno
import io
import logging
import sys

import pytest

import console
from console import Parser, RunError, UserError, number

# ---------------------------------------------------------------- errors and messages


def test_run_error_escapes_control_characters():
    assert str(RunError("two\nlines \x1b[31mred\udcff é")) == "two\\nlines \\x1b[31mred\\udcff é"


def say_to(stream, *lines):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        for line in lines:
            console.say(line)


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


def test_warnings_go_to_stderr_and_results_to_stdout(capsys):
    record = logging.makeLogRecord({"msg": "the folder %s", "args": ("two\nlines",), "levelname": "WARNING"})
    record.levelno = logging.WARNING
    console.StderrHandler().emit(record)
    console.say("SSIM 0.8")
    out, err = capsys.readouterr()
    assert out == "SSIM 0.8\n"
    assert err == "warning: the folder two\\nlines\n"


def test_notices_are_logged_by_their_prefix(caplog):
    caplog.set_level(logging.INFO, "prostatevq")
    console.log_notices(["warning: a data leak", "ignored 3 label maps"])
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "a data leak"),
        ("INFO", "ignored 3 label maps"),
    ]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("choose another --run"), 2, "error: choose another --run\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (MemoryError(), 2, "error: out of memory, try a smaller --batch-size or other --device (MemoryError)\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_an_error_ends_a_command_with_one_line_and_its_status(capsys, error, status, message):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        console.run_command(fail)
    assert stop.value.code == status
    assert capsys.readouterr().err == message


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (number(int, 1), ["1", "32", "1000000"], ["0", "-3"]),
        (number(int, 0, 9), ["0", "9"], ["10", "-1"]),
        (number(float, 0, exclusive=True), ["0.1", "7"], ["0", "-1", "nan"]),
        (number(float, 0, 1, exclusive=True), ["1", "1e-9"], ["0", "1.001", "nan", "inf"]),
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
        (number(float, 0, 1, exclusive=True), "2", "2 is not above 0 and at most 1"),
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
def test_a_wrong_option_is_a_user_error(arguments, part):
    parser = Parser()
    parser.add_argument("--count", type=number(int, 1))
    with pytest.raises(UserError) as error:
        parser.parse_args(arguments)
    assert part in str(error.value)
    assert "\n" not in str(error.value)
