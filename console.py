"""The terminal: errors and messages for users, and the argument parser of the commands."""

import argparse
import io
import logging
import math
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from tqdm import tqdm

logger = logging.getLogger("prostatevq")


# ---------------------------------------------------------------- errors and messages


class UserError(Exception):
    """A mistake that the user can correct; its text is one line that is safe to print."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class RunError(UserError):
    """A run directory, an option or a device that cannot be used as asked."""


def printable(text: str) -> str:
    """Escape line breaks, terminal codes and invalid Unicode: file names may contain any of them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def summarise(error: Exception) -> str:
    """Return the first line of another library's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}"


def write_line(text: str, stream: str) -> None:
    """Print a line on "stdout" or "stderr", above a progress bar. A closed stream is no error: work goes on."""
    file = getattr(sys, stream)
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        tqdm.write(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
    except OSError:
        setattr(sys, stream, io.StringIO())  # takes the rest


def say(text: str) -> None:
    """Print a line of results on stdout."""
    write_line(text, "stdout")


def log_notices(notices: Iterable[str]) -> None:
    """Log the notices of a dataset: those that start with `warning: ` as warnings, the others as information."""
    for notice in notices:
        logger.log(
            logging.WARNING if notice.startswith("warning: ") else logging.INFO, notice.removeprefix("warning: ")
        )


class StderrHandler(logging.Handler):
    """Write log records as lines `warning: message` on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        name = {logging.INFO: "note"}.get(record.levelno, record.levelname.lower())
        write_line(f"{name}: {record.getMessage()}", "stderr")


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a `UserError` ends it with one line on stderr and exit status 2, without a traceback."""
    logging.basicConfig(handlers=[StderrHandler()])
    logger.setLevel(logging.INFO)
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, OSError) as error:
        message = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        message = f"out of memory, try a smaller --batch-size or other --device ({summarise(error)})"
    else:
        return
    write_line(f"error: {message}", "stderr")
    raise SystemExit(2)


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def nonempty(kind: Callable[[str], object]) -> Callable[[str], object]:
    """Return an argparse type for a path or name. An empty one is refused: it is often an unset variable of a script,
    and as a path it would be the current folder."""

    def parse(text: str) -> object:
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty; is a variable not set?")
        return kind(text)

    return parse


def number(kind: type, low: float, high: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """Return an argparse type for a number of a kind in [low, high], or in (low, high] if `exclusive`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (exclusive and value == low):
            start = f"above {low}" if exclusive else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {start}" + f" and at most {high}" * (high < math.inf))
        return value

    parse.__name__ = kind.__name__  # argparse names it in `invalid int value`
    return parse
