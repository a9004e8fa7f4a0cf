"""What the commands share: messages and options, device and seed, stop signals, files written whole."""

import argparse
import errno
import io
import math
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


class UserError(Exception):
    """What a user has to mend; its text is one line that is safe to print."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class RunError(UserError):
    """A run directory, an option or a device that cannot be used as asked."""


def printable(text: str) -> str:
    """Text with what would break a line, steer a terminal or be no Unicode escaped: names may hold any of it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(text: str) -> None:
    """Print a line on stdout, above a progress bar where there is one.

    No name in it is an error, whatever stdout can encode, nor is a stdout that is gone: nothing that was computed is
    lost because nobody listens any more.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        tqdm.write(line)
    except OSError:
        sys.stdout = io.StringIO()  # takes the rest


def fail(message: object):
    """Print `error: message` on stderr and exit with status 2."""
    print(f"error: {printable(str(message))}", file=sys.stderr)
    raise SystemExit(2)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what a user can mend ends it with one line on stderr and exit status 2, no traceback."""
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(f"out of memory, try a smaller --batch-size or other --device ({in_short(error)})")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def in_short(error: Exception) -> str:
    """What another library's error says, in its first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}"


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line starting `error:`, exit status 2."""

    def error(self, message: str):
        fail(f"{message} (--help lists the options)")


def filled(kind: Callable[[str], object]) -> Callable[[str], object]:
    """A type for argparse: a path or name that is not empty. "" is what a script makes of a variable that is not set,
    and as a path it would be the current folder."""

    def parse(text: str) -> object:
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty; is a variable not set?")
        return kind(text)

    return parse


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            start = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {start}" + f" and at most {high}" * (high < math.inf))
        return value

    parse.__name__ = kind.__name__  # argparse names it in `invalid int value`
    return parse


# ---------------------------------------------------------------- device and seed


def pick_device(name: str) -> torch.device:
    """The device of that name, ready to compute: `cpu`, `cuda`, `cuda:1` and so on, or `auto`.

    `auto` is the GPU where there is one that computes, and the CPU elsewhere; it says why a GPU is not used. Raises
    RunError for a device that does not compute, and for other kinds of devices.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return start_gpu(torch.device("cuda"))
        except RuntimeError as error:
            print(f"warning: the GPU cannot be used ({in_short(error)}): computing on the CPU", file=sys.stderr)
            return torch.device("cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", name):
        raise RunError(f"--device {name}: choose auto, cpu, cuda, or cuda:1 and so on")
    try:
        return torch.device("cpu") if name == "cpu" else start_gpu(torch.device(name))
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        raise RunError(f"--device {name}: {in_short(error)} (--device auto takes what there is)") from None


def start_gpu(device: torch.device) -> torch.device:
    """A GPU by its number, tried with a convolution and a product and made the current one. Raises RuntimeError.

    A card that PyTorch sees need not compute: each build has kernels for some generations of cards only. TF32 is
    switched off: SSIM subtracts squares and loses its third digit to it. Training loses no speed, since it runs in
    bfloat16 on every card that has TF32.
    """
    picture = torch.ones(1, 1, 8, 8, device=device)
    (F.conv2d(picture, picture[:, :, :3, :3], padding=1) @ picture).sum().item()
    torch.cuda.set_device(picture.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return picture.device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the processor computes in it natively; off elsewhere, where it would be slower."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def seed_update(seed: int, stage: str, update: int) -> None:
    """Seed PyTorch for one update, so that a resumed run draws what an unbroken one does, with no state kept."""
    torch.manual_seed(np.random.SeedSequence([seed, *stage.encode(), update]).generate_state(1, np.uint64).item())


# ---------------------------------------------------------------- stop signals and time


class StopSignals:
    """Turn stop signals into SystemExit(128 + signal): SIGINT (130), SIGTERM (143), and SIGHUP (129) of a terminal.

    Between `hold` and `release` a signal waits in `.received`. Once one has come, further ones are ignored: torchrun
    and Slurm send several to one process. A second SIGINT is for the handler from before: a person wants to stop now.
    Signals that the process was started to ignore, by nohup for example, stay ignored.
    """

    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __enter__(self):
        self.received, self.held = None, False
        heeded = [number for number in self.NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def note(self, number: int, frame) -> None:
        self.received = number
        for other, handler in self.before.items():
            # Not SIG_IGN: Python reports a signal that is already pending as ignored.
            signal.signal(other, handler if other == signal.SIGINT else lambda *_: None)
        if not self.held:
            self.release()

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        if self.received:
            raise SystemExit(128 + self.received)

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Clock:
    """Says when `seconds` have passed since it last said so."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether it is time; starts anew if so."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


# ---------------------------------------------------------------- files


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Make an OSError a RunError that names what cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder where it is missing. Raises RunError where that cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(option: str, path: Path) -> None:
    """Raise RunError where a folder, or the one that it would be made in, takes no files. Leaves nothing behind."""
    place = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    with writing(f"{option} {path}"), tempfile.TemporaryFile(dir=place):
        pass


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not every network file system can flush a folder
            raise
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], object], before: Path | None = None) -> None:
    """`write(temporary path)`, flush to disk, rename: path holds all of the old or all of the new.

    The old one is kept as `before` where that is given. Raises RunError where it cannot be written.
    """
    # A name of its own, since another process may be writing a file of this name too: figures of several runs.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            write(temporary)
            flush(temporary)
            if before and path.exists():
                os.replace(path, before)
            os.replace(temporary, path)
            flush(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
