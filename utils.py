"""The run directory (config, checkpoints, metrics log), figures, device and seed."""

import argparse
import errno
import io
import json
import math
import os
import pickletools
import platform
import re
import secrets
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import get_type_hints

try:
    import fcntl
except ImportError:  # not on Windows: there run directories are not locked
    fcntl = None

import nibabel as nib
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

LIBRARIES = ("torch", "numpy", "nibabel", "torchmetrics", "safetensors")
# Options that say where a run's files go or what computes them, not what it is.
FREE_OPTIONS = ("run", "images", "device", "data", "checkpoint_every", "allow_changed_data")

# Ranges of train.py's options, of which config.json is a copy.
LIMITS = {
    "updates": (1, 10_000_000),  # the losses since the last log line, of which there are 250, are kept in memory
    "prior_updates": (1, 10_000_000),
    "detail_updates": (1, 10_000_000),
    "batch_size": (1, 65_536),  # 8 GB of slices of 256x128
    "checkpoint_every": (1, 10_000_000),
    "seed": (0, 2**32 - 1),
}


class RunError(Exception):
    """A run directory that cannot be used as asked; its text is one line that is safe to print, for the user."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text with what would break a line, steer a terminal or be no Unicode escaped: names may hold any of it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def say(text: str) -> None:
    """Print a line, whatever names are in it."""
    print(printable(text))


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line starting `error:`, exit status 2."""

    def error(self, message: str):
        fail(f"{message} (--help lists the options)")


def fail(message: object):
    """Print `error: message` on stderr and exit with status 2."""
    print(f"error: {printable(str(message))}", file=sys.stderr)
    raise SystemExit(2)


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
        raise RunError(f"--device {name}: {in_short(error)}") from None


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


def left_right_axis(affine: np.ndarray) -> int | None:
    """The axis of slices (N, 1, H, W) that runs from side to side: 2 in HipMRI's, none in sagittal slices."""
    sides = [code in ("L", "R") for code in nib.aff2axcodes(affine)[:2]]
    return 2 + sides.index(True) if any(sides) else None


class StopSignals:
    """While it is entered, SIGINT raises SystemExit(130) and SIGTERM SystemExit(143), wherever the program is.

    Between `hold` and `release` it waits in `.received`. Once one has come, further SIGTERMs are ignored: torchrun and
    Slurm send several to one process. A second SIGINT is for the handler from before: a person who wants to stop now.
    """

    def __enter__(self):
        self.received, self.held = None, False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
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


# ---------------------------------------------------------------- files

# What a file may hold. A run directory may be a stranger's: a limit keeps memory and time in bounds.
MAX_CONFIG = 1 << 20  # bytes: a config takes 4 kB
MAX_DATA = 1 << 24  # bytes of data.json: HipMRI's 12,660 files take 0.7 MB, and Python twenty times as much
MAX_LOG = 1 << 24  # bytes: three stages of 270 lines take 0.1 MB
MAX_TENSORS = 1 << 30  # bytes of weights or a checkpoint: fifty times the largest preset's
MAX_HEADER = 1 << 20  # bytes that name a file's tensors: the largest preset's take 10 kB
MAX_PICKLE = 1 << 22  # bytes of a checkpoint's plain values: 10 kB, and a megabyte of losses at the most updates


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


def write_tensors(path: Path, content: bytes, before: Path | None = None) -> None:
    """`write_file` of weights or a checkpoint, which is read back before it takes the old one's place."""
    if len(content) > MAX_TENSORS:
        raise RunError(f"{path} would have {len(content)} bytes, and {MAX_TENSORS} at most are read again")

    def write(part: Path) -> None:
        part.write_bytes(content)
        flush(part)
        if part.read_bytes() != content:
            raise OSError(errno.EIO, "it reads other than it was written")

    write_file(path, write, before)


def strict_json(value: dict) -> str:
    """Values as JSON that every reader takes: what is no finite number is null."""

    def finite(part: object) -> object:
        if isinstance(part, dict):
            return {name: finite(of) for name, of in part.items()}
        if isinstance(part, list | tuple):
            return [finite(of) for of in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=1, allow_nan=False)


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content. Raises ValueError where it has more than `most` bytes, or is a device, a pipe or the like."""
    check_file(path, most)
    return path.read_bytes()


def check_file(path: Path, most: int) -> None:
    """Raise FileNotFoundError, or ValueError where it is no plain file or has more than `most` bytes."""
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most} bytes")
    if not path.is_file():
        raise ValueError("it is not a plain file")


@contextmanager
def plainly_named(path: Path) -> Iterator[str]:
    """A name for a file that libraries take which want UTF-8; a name made elsewhere may hold any bytes."""
    with open(path, "rb") as file:
        yield str(path) if str(path).isprintable() else f"/dev/fd/{file.fileno()}"


def in_short(error: Exception) -> str:
    """What another library's error says, in its first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}"


# ---------------------------------------------------------------- checks of what was read

Check = Callable[[object], bool]


def whole(low: int, high: int) -> Check:
    """Whether a value is a whole number in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def real(low: float, high: float) -> Check:
    """Whether a value is a number in [low, high]; NaN is not."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def text(value: object) -> bool:
    """Whether a value is a string no longer than a path may be."""
    return isinstance(value, str) and len(value) <= 4096


def listed(check: Check, *lengths: int) -> Check:
    """Whether a value is a list of one of these lengths, each of whose items passes the check."""
    return lambda value: isinstance(value, list) and len(value) in lengths and all(map(check, value))


def optional(check: Check) -> Check:
    """Whether a value is missing or passes the check."""
    return lambda value: value is None or check(value)


def check_fields(given: object, fields: dict, where: str = "") -> None:
    """Raise ValueError naming what is unknown in a dict, missing, or fails its check in `fields`."""
    if not isinstance(given, dict):
        raise ValueError(f"{where.rstrip('.') or 'it'} is no set of named values")
    unknown = sorted(map(str, given.keys() - fields.keys()))
    if unknown:
        raise ValueError(f"{where}{unknown[0]:.40} is unknown to this version" + " and more are" * (len(unknown) > 1))
    for name, check in fields.items():
        value = given.get(name)
        if isinstance(check, dict):
            check_fields(value, check, f"{where}{name}.")
        elif not check(value):
            raise ValueError(f"{where}{name} cannot be {value!r:.60}" if name in given else f"{where}{name} is missing")


def is_affine(value: object) -> bool:
    """Whether a value is a voxel grid's (4, 4) affine, in mm: finite, with an area in the plane and a third axis."""
    if not listed(listed(real(-1e13, 1e13), 4), 4)(value):
        return False
    rows, columns, across = np.array(value, float)[:3, :3].T
    return bool(np.linalg.norm(np.cross(rows, columns)) >= 1e-12 and np.linalg.norm(across) >= 1e-6)


def is_series(value: object) -> bool:
    """Whether a value is a dict of lists of numbers, none of them empty."""
    lists = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(numbers, list) and numbers and all(map(real(-1e300, 1e300), numbers)) for numbers in lists)


FORMAT = 1  # of a run directory; raise it when an older version would misread what this one writes
SIDE = whole(1, 4096)  # pixels: longer than any slice that dataset.py reads
FLOAT32 = np.finfo(np.float32)
CONFIG = {
    "format": optional(whole(1, FORMAT)),  # none before there were several
    "options": {
        **{name: optional(whole(*limits)) for name, limits in LIMITS.items()},
        **{name: optional(text) for name in ("data", "run", "images", "preset", "device")},
        "slice_size": optional(listed(SIDE, 2)),
        "augmentation": optional(real(0, 4)),
        "allow_changed_data": optional(lambda value: isinstance(value, bool)),
    },
    "slice_size": listed(SIDE, 2),
    "intensity": {"percentile": real(0, 100), "scale": real(float(FLOAT32.tiny), float(FLOAT32.max))},
    "affine": is_affine,
    "positions": {"quantiles": listed(real(0, 1), 0, 101), "unknown": real(0, 1)},
    "fingerprint": text,
    "libraries": dict.fromkeys(LIBRARIES, text),
}


def refuse_newer(config: object) -> None:
    """Raise ValueError where a config says that it is of a newer version."""
    newer = config.get("format") if isinstance(config, dict) else None
    if type(newer) is int and newer > FORMAT:
        raise ValueError(f"it is of format {str(newer):.20}, of a newer version than this one, which knows {FORMAT}")


def read_config(path: Path) -> dict:
    """A run's config.json, checked field by field. Raises RunError where there is none or it cannot be used."""
    try:
        config = json.loads(read_bytes(path / "config.json", MAX_CONFIG))
        refuse_newer(config)
        check_fields(config, CONFIG)
        if not config["positions"]["quantiles"] and config["positions"]["unknown"] < 1:
            raise ValueError("positions.quantiles is empty")
        return config
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (no config.json): train first, or name one with --run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path / 'config.json'} cannot be used: {in_short(error)}") from None


# ---------------------------------------------------------------- run directory

STAGES = ("vqvae", "prior", "detail", "done")
# The first three are written in this order, so that where there is a config, the run's beginning is complete.
FILES = ("lock", "data.json", "config.json", "metrics.jsonl", "training.pt", "training.pt.before")
FILES += ("vqvae.safetensors", "prior.safetensors", "detail.safetensors")


class Run:
    """One training's directory, which no other process can train in meanwhile.

    `with Run(...) as run:` lets go of it in the end. On a stop by a signal (SystemExit, see `run.signals`) it saves
    `run.unsaved` first, a checkpoint that is newer than the last one, where there is one.

    files: of the data, name to content id; what they were when the run began is in `data.json`.

    Raises RunError where the directory holds something else, another process trains in it, or a run made with other
    options.
    """

    def __init__(self, path: Path, config: dict, files: dict[str, str]):
        self.path, self.unsaved, self.saved = path, None, (None, None)
        self.signals = StopSignals()
        self.log_path, self.checkpoint_path = path / "metrics.jsonl", path / "training.pt"
        self.before_path = path / "training.pt.before"
        refuse_others(path)
        make_folder(path)
        self.lock = lock(path)
        try:
            for left in path.glob("*.part"):  # of a process that was killed as it wrote
                left.unlink(missing_ok=True)
            self.config = self.begin(json.loads(json.dumps(config)), files)  # as it will be read back
            with writing(self.log_path):
                self.log_path.touch()
        except BaseException:
            os.close(self.lock)
            raise

    def begin(self, config: dict, files: dict[str, str]) -> dict:
        """The config of the run that is there; of a new one, written."""
        if (self.path / "config.json").exists():
            old = read_config(self.path)
            refuse_differences(self.path, old["options"], config["options"])
            return old
        config["libraries"] = {name: metadata.version(name) for name in LIBRARIES}
        known = json.dumps(files, indent=0)
        if len(known) <= MAX_DATA:
            write_file(self.path / "data.json", lambda part: part.write_text(known))
        write_file(self.path / "config.json", lambda part: part.write_text(json.dumps(config, indent=1)))
        return config

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            if kind is SystemExit:
                if self.unsaved:
                    self.save(**self.unsaved)
                stage, update = self.saved
                after = "" if update is None else f" after {stage} update {update}"
                say(f"stopped{after}; the same command goes on from there")
        finally:
            self.signals.__exit__()
            os.close(self.lock)

    def files(self) -> dict[str, str]:
        """The data's files as they were when the run began; {} where they were too many to keep."""
        path = self.path / "data.json"
        try:
            files = json.loads(read_bytes(path, MAX_DATA)) if path.exists() else {}
            if not isinstance(files, dict) or not all(map(text, files.values())):
                raise ValueError("it is no list of files")
            return files
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be used: {in_short(error)}") from None

    def log_bytes(self) -> int:
        """Where the metrics log ends."""
        with writing(self.log_path):
            return self.log_path.stat().st_size

    def save(self, **state) -> None:
        """Write training.pt: plain types and tensors, and where the metrics log ended then. Keeps the one before."""
        state = {"log_bytes": self.log_bytes()} | state
        with writing(self.log_path):
            flush(self.log_path)
        content = io.BytesIO()
        torch.save(state, content)
        write_tensors(self.checkpoint_path, content.getvalue(), self.before_path)
        self.saved, self.unsaved = (state["stage"], state.get("update")), None

    def load(self) -> dict:
        """What `save` was last given, or {}; lines logged after it are dropped: they will be logged anew.

        A checkpoint that does not read is named, and the one before it is used. Raises RunError where neither reads.
        """
        state, problems = {}, []
        for path in (self.checkpoint_path, self.before_path):
            if path.exists() and not state:
                try:
                    state = read_checkpoint(path)
                except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
                    problems.append(f"{path} cannot be used ({in_short(error)})")
        if problems and not state:
            raise RunError(f"{'; '.join(problems)}: choose another --run")
        if problems:
            say(f"warning: {problems[0]}: going on from the checkpoint before it")
        with writing(self.log_path):
            os.truncate(self.log_path, min(state.get("log_bytes", 0), self.log_bytes()))
        self.lines()
        self.saved = state.get("stage"), state.get("update")
        return state

    def log(self, stage: str, split: str, update: int, values: dict[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        line = {"stage": stage, "split": split, "update": update}
        line |= {name: float(f"{value:.6g}") for name, value in values.items()}
        with writing(self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict]:
        """All that was logged. Raises RunError where something else stands there."""
        lines = []
        try:
            for content in read_bytes(self.log_path, MAX_LOG).splitlines():
                line = json.loads(content)
                known = {"stage": text, "split": text, "update": whole(0, LIMITS["updates"][1])}
                check_fields(line, {name: real(-1e300, 1e300) for name in line} | known)
                lines.append(line)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{self.log_path} line {len(lines) + 1} cannot be used: {in_short(error)}") from None
        return lines

    def curves(self, stage: str) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """(split, name) to updates and values, of all that was logged in a stage."""
        curves = defaultdict(lambda: ([], []))
        for line in self.lines():
            if line.pop("stage") == stage:
                split, update = line.pop("split"), line.pop("update")
                for name, value in line.items():
                    curves[split, name][0].append(update)
                    curves[split, name][1].append(value)
        return dict(curves)


def refuse_others(path: Path) -> None:
    """Raise RunError where a path is something other than a run directory, or one whose files lead elsewhere."""
    if not os.path.lexists(path):
        return
    names = {file.name for file in path.iterdir()} if path.is_dir() else {"a file"}
    begun = "lock" in names and all(name in ("lock", "data.json") or name.endswith(".part") for name in names)
    if names and "config.json" not in names and not begun:
        raise RunError(f"{path} exists and is not a run directory: choose another --run")
    for name in names & set(FILES):
        if (path / name).is_symlink() or not (path / name).is_file():
            raise RunError(f"{path / name} is not a plain file: choose another --run")


def lock(path: Path) -> int:
    """Lock a run directory for this process, however it ends; gives the handle whose closing unlocks it."""
    with writing(path / "lock"), ExitStack() as failed:
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        failed.callback(os.close, handle)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            raise RunError(f"{path} is in use by {holder}: wait for it, or choose another --run") from None
        except OSError as error:
            say(f"warning: {path} cannot be locked here ({error.strerror}): let no other process train in it")
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        failed.pop_all()
        return handle


def refuse_differences(path: Path, old: dict, new: dict) -> None:
    """Raise RunError naming each option in which two configs differ."""
    differing = [
        f"--{name.replace('_', '-')} was {old.get(name)}, is {new[name]}"
        for name in new
        if name not in FREE_OPTIONS and old.get(name) != new[name]
    ]
    if differing:
        raise RunError(f"{path} holds a run made with other options ({'; '.join(differing)}): choose another --run")


# ---------------------------------------------------------------- checkpoints

PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch LongStorage"}


def read_checkpoint(path: Path) -> dict:
    """What `Run.save` wrote. Raises what it comes to where a byte of it changed, or it could do more than hold values.

    PyTorch's `weights_only` runs no code, but what it does build may take any memory, and it compares no checksums.
    The tensors stay in the file until they are read.
    """
    check_file(path, MAX_TENSORS)
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims more than it holds")
        damaged = file.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                check_pickle(file.read(entry))
    with plainly_named(path) as name:
        state = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or state.get("stage") not in STAGES or not whole(0, MAX_LOG)(state.get("log_bytes")):
        raise ValueError("it is no checkpoint of a run")
    return state


def is_complete(run: Path) -> bool:
    """Whether train.py came to its end in a run directory; so it seems, too, where no checkpoint is left that reads."""
    try:
        return read_checkpoint(run / "training.pt")["stage"] == "done"
    except Exception:  # see Run.load; weights alone are enough to sample with
        return True


def check_pickle(pickle: bytes) -> None:
    """Raise ValueError where a pickle names other than tensors, or uses a list or the like twice.

    With nothing used twice, what it builds grows no faster than its length.
    """
    if len(pickle) > MAX_PICKLE:
        raise ValueError(f"its plain values take more than {MAX_PICKLE} bytes")
    plain, before = set(), ""
    for operation, argument, _ in pickletools.genops(pickle):
        name = operation.name
        if name == "GLOBAL" and argument not in PICKLED:
            raise ValueError(f"it names {argument.replace(' ', '.'):.60}, which is no part of a checkpoint")
        if name in ("BINPUT", "LONG_BINPUT"):
            (plain.add if before in ("BINUNICODE", "GLOBAL") else plain.discard)(argument)
        if name in ("BINGET", "LONG_BINGET") and argument not in plain:
            raise ValueError("it uses a value twice")
        before = name


def tensors_in(nested: dict) -> Iterator[Tensor]:
    """The tensors in a dict and in the dicts that it holds."""
    for value in nested.values():
        yield from tensors_in(value) if isinstance(value, dict) else [value]


@torch.no_grad()
def restore(live: dict, saved: object) -> None:
    """Copy the tensors of a checkpoint into those that stand in the same places of `live`, a dict of dicts of tensors.

    Raises ValueError naming the first that is not there, has another shape or type, or is not finite; nothing is
    copied then.
    """
    pairs = list(paired(live, saved, "its"))
    for tensor, value in pairs:
        tensor.copy_(value)


def paired(live: Tensor | dict, saved: object, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(live, dict):
        if not isinstance(saved, dict) or saved.keys() != live.keys():
            raise ValueError(f"{name} entries are not those of this network")
        for key in live:
            yield from paired(live[key], saved[key], f"{name} {key}")
    elif not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (live.shape, live.dtype):
        raise ValueError(f"{name} does not fit this network")
    elif not saved.isfinite().all():
        raise ValueError(f"{name} is not finite")
    else:
        yield live, saved


# ---------------------------------------------------------------- weights

# What a network's config may claim, by the kind of a field: far more than is of use here. The shapes that follow from
# it are compared with the file's before there is any tensor; but each layer takes time, if no memory.
LAYERS = whole(1, 100)
KINDS = {int: whole(1, 65_536), float: real(0, 100), tuple[int, int]: listed(whole(1, 65_536), 2)}


def save_weights(path: Path, network: nn.Module) -> None:
    """Weights as safetensors, with the network's config, its format and a checksum as JSON in the file's metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    config = asdict(network.config)
    header = json.dumps({"format": FORMAT, "checksum": checksum(config, tensors)} | config)
    write_tensors(path, safetensors.torch.save(tensors, {"config": header}))  # more entries would come in any order


def checksum(config: dict, tensors: dict[str, Tensor]) -> str:
    """CRC-32 of a network's config and of its tensors' names and values."""
    crc = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].cpu().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def load_weights(path: Path, network: Callable[..., nn.Module], config: type) -> nn.Module:
    """The network that `save_weights` wrote, in evaluation mode.

    Raises RunError where it is missing, damaged, of a newer version, or does not fit its config or this version.
    """
    try:
        check_file(path, MAX_TENSORS)
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise ValueError(f"its header claims more than {MAX_HEADER} bytes")
        with plainly_named(path) as name, safetensors.safe_open(name, "pt") as file:
            return read_network(file, network, config).eval()
    except FileNotFoundError:
        reason = "train.py has not come that far, or the run is of an older version"
        raise RunError(f"{path} does not exist: {reason}") from None
    except Exception as error:  # a stranger's file raises whatever its first wrong byte leads to
        raise RunError(f"{path} cannot be used: {in_short(error)}") from error


def read_network(file: safetensors.safe_open, network: Callable[..., nn.Module], config: type) -> nn.Module:
    """The network in an open file. Raises ValueError and others where there is none that can be used."""
    header = file.metadata() or {}
    if "config" not in header:
        raise ValueError("it holds no config of a network")
    fields = json.loads(header["config"])
    refuse_newer(fields)
    kinds = get_type_hints(config)
    checks = {name: LAYERS if name in ("blocks", "cycles") else KINDS[kinds[name]] for name in kinds}
    check_fields(fields, checks | {"format": optional(whole(1, FORMAT)), "checksum": optional(text)})
    expected = fields.pop("checksum", None)
    fields = {name: fields[name] for name in kinds}
    given = config(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    with torch.device("meta"):  # shapes alone, which take no memory
        shapes = {name: list(tensor.shape) for name, tensor in network(given).state_dict().items()}
    names = set(file.keys())
    for name in sorted(shapes.keys() | names):
        there = file.get_slice(name).get_shape() if name in names else None
        if there != shapes.get(name):
            raise ValueError(f"its {name:.60} has shape {there}, and its config asks for {shapes.get(name)}")
    made = network(given)
    tensors = {name: file.get_tensor(name) for name in shapes}
    if expected not in (None, checksum(fields, tensors)):
        raise ValueError("its checksum is another: it is damaged")
    restore(made.state_dict(), tensors)
    return made


def tensorboard(path: Path, update: int):
    """A TensorBoard writer that goes on at `update`, or None where tensorboard is not installed, or takes no such name:
    it wants UTF-8."""
    if util.find_spec("tensorboard") is None or not str(path).isprintable():
        return None
    from torch.utils.tensorboard import SummaryWriter  # costs a second; needed by train.py alone

    # Flushed with each checkpoint instead: a full disk is then an error here, not in a thread of its own.
    return SummaryWriter(path, purge_step=update + 1, flush_secs=10**9)


def close_tensorboard(writer) -> None:
    """Close it without a word: what it cannot write stands in metrics.jsonl too, and of a full disk it was told."""
    with suppress(OSError):
        writer.close()


# ---------------------------------------------------------------- figures

TRAIN, VALIDATE = "#9aa5b1", "#c2410c"
PLAIN = {"parse_math": False}  # of text that holds a name: two dollar signs would make mathematics of it
LONGEST_CAPTION = 40  # letters
COMPARED = {"samples": "#c2410c", "decoder alone": "#0f766e", "prior alone": "#b59f3b", "floor": "#9aa5b1"}


def upright(slices: np.ndarray) -> np.ndarray:
    """Slices (..., H, W) as they are looked at (..., W, H): front of the patient on top, sides left and right."""
    return slices.swapaxes(-1, -2)


def spread(count: int, most: int = 6) -> np.ndarray:
    """At most `most` indices evenly spread over [0, count): what a figure shows of many."""
    return np.unique(((np.arange(most) + 0.5) * count / most).astype(int))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Where it cannot be written that is said: it ends no training."""
    try:
        make_folder(path.parent)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # names may be in any script: boxes are drawn
            write_file(path, lambda part: figure.savefig(part, format="png", dpi=120))
    except RunError as error:
        say(f"warning: {error}")


def caption(name: str) -> str:
    """A slice's name for a figure, without its folder and ending. It is to be drawn with **PLAIN."""
    name = printable(name.rpartition("/")[2].removesuffix(".gz").removesuffix(".nii"))
    return name if len(name) <= LONGEST_CAPTION else f"{name[: LONGEST_CAPTION - 3]}..."


def draw_curves(axes: Axes, curves: dict, name: str, title: str, unit: str) -> None:
    """Training and validation of one logged value against updates."""
    for split, colour, width in (("train", TRAIN, 1.0), ("validate", VALIDATE, 1.8)):
        if (split, name) in curves:
            label = {"train": "training", "validate": "validation"}[split]
            axes.plot(*curves[split, name], color=colour, linewidth=width, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def vqvae_loss_figure(path: Path, curves: dict) -> None:
    """The three losses of stage 1, and SSIM."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = (
        ("reconstruction_loss", "reconstruction loss", "MSE, slices in [-1, 1]"),
        ("embedding_loss", "embedding loss", "commitment"),
        ("total_loss", "total loss", "sum"),
    )
    all_axes = figure.subplots(1, 4)
    for axes, (name, title, unit) in zip(all_axes, panels):
        draw_curves(axes, curves, name, title, unit)
        axes.set_yscale("log")
    draw_curves(all_axes[3], curves, "ssim", "reconstructions", "SSIM")
    all_axes[0].legend(frameon=False)
    save_figure(figure, path)


def prior_loss_figure(path: Path, curves: dict, codes: int) -> None:
    """The loss of stage 2, with the uniform distribution's as the mark to start from."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, "bits_per_code", "loss of the prior", "bits a code")
    axes.axhline(math.log2(codes), color="black", linewidth=0.8, linestyle=":", label=f"uniform over {codes} codes")
    updates, losses = curves["validate", "bits_per_code"]
    best = int(np.argmin(losses))
    axes.plot(updates[best], losses[best], "o", color=VALIDATE, label=f"kept: {losses[best]:.2f} bits")
    axes.legend(frameon=False)
    save_figure(figure, path)


def detail_loss_figure(path: Path, curves: dict) -> None:
    """The loss of stage 3, in units in which plain noise of the right spread has 1.74."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, "flow_loss", "loss of the detail", "mean squared error of the velocity")
    updates, losses = curves["validate", "flow_loss"]
    best = int(np.argmin(losses))
    axes.plot(updates[best], losses[best], "o", color=VALIDATE, label=f"kept: {losses[best]:.3f}")
    axes.legend(frameon=False)
    save_figure(figure, path)


def detail_figure(path: Path, strips: dict[str, np.ndarray], titles: Sequence[str]) -> None:
    """Strips of slices (n, H, W) in [-1, 1], each under its name, and a title over each column."""
    count, height, width = upright(next(iter(strips.values()))).shape
    figure = Figure(figsize=(2.4 * count, 2.4 * len(strips) * height / width + 0.4), layout="constrained")
    draw_strips(figure, strips)
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title, fontsize=8, **PLAIN)
    save_figure(figure, path)


def codebook_figure(path: Path, curves: dict, counts: np.ndarray) -> None:
    """How many codes are used and how evenly: over the updates, and at the end on validation slices."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, curves, "perplexity", f"perplexity of the codes (at most {len(counts)})", "codes")
    left.axhline(len(counts), color="black", linewidth=0.8, linestyle=":")
    left.set_ylim(0, 1.05 * len(counts))
    left.legend(frameon=False, loc="lower right")
    share = np.sort(counts / counts.sum())[::-1]
    right.fill_between(np.arange(len(share)), share, step="mid", color=VALIDATE, alpha=0.8)
    right.axhline(1 / len(share), color="black", linewidth=0.8, linestyle=":", label="even use")
    right.set_title(f"use on validation slices: {(counts > 0).mean():.0%} of codes", fontsize=10, loc="left")
    right.set_xlabel("code, most used first")
    right.set_ylabel("share of all codes")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_xlim(0, len(share))
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    save_figure(figure, path)


def reconstructions_figure(
    path: Path,
    slices: np.ndarray,
    reconstructions: np.ndarray,
    titles: Sequence[str],
    labels: tuple[str, str] = ("slice", "reconstruction"),
    limit: float = 0.2,
) -> None:
    """Slices (n, H, W) in [-1, 1] above their reconstructions, or what `labels` says, and the difference, up to `limit`
    of the range."""
    height, width = upright(slices).shape[1:]
    figure = Figure(figsize=(2.4 * len(slices), 2.4 * 3 * height / width + 0.5), layout="constrained")
    rows = figure.subplots(3, len(slices), squeeze=False)
    for column, title in enumerate(titles):
        rows[0, column].set_title(title, fontsize=8, **PLAIN)
        rows[0, column].imshow(upright(slices[column]), cmap="gray", vmin=-1, vmax=1)
        rows[1, column].imshow(upright(reconstructions[column]), cmap="gray", vmin=-1, vmax=1)
        difference = (reconstructions - slices)[column] / 2
        shown = rows[2, column].imshow(upright(difference), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for row, label in zip(rows, (*labels, "difference")):
        row[0].set_ylabel(label, fontsize=9)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=rows[2].tolist(), fraction=0.02, pad=0.01, format=PercentFormatter(1, decimals=0))
    bar.set_label("of the range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


# Figures of samples: name in evaluation.json, title, format, what is better.
PANELS = (
    ("two_sample_accuracy", "two-sample accuracy", ".2f", "0.5 is perfect, 1 the worst"),
    ("coverage", "coverage", ".2f", "higher is better"),
    ("density", "density", ".2f", "the floor's is best"),
    ("frechet_distance", "Fréchet distance", ".1f", "lower is better"),
    ("sliced_wasserstein", "sliced Wasserstein", ".3f", "lower is better"),
    ("ms_ssim_diversity", "MS-SSIM diversity", ".2f", "the floor's is best"),
)


def evaluation_figure(
    path: Path, results: dict, strips: dict[str, np.ndarray], distances: dict[str, np.ndarray], title: str
) -> None:
    """What an evaluation found, as in evaluation.json, from top to bottom: strips of slices (n, H, W), each under its
    name; the figures of samples; distances (N,) from the nearest training slice, samples first; bits a slice."""
    count, height, width = next(iter(strips.values())).shape
    inches = len(strips) * 11.6 / count * width / height
    figure = Figure(figsize=(12, inches + 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    figure.suptitle(printable(title), fontsize=11, x=0.008, ha="left", **PLAIN)
    above, middle, below = figure.subfigures(3, 1, height_ratios=(inches, 2.1, 2.6), hspace=0.03)
    draw_strips(above, strips)

    parts = [results, *(results[name.replace(" ", "_")] for name in list(COMPARED)[1:])]
    panels = middle.subplots(1, len(PANELS), sharey=True)
    for axes, (name, panel, form, better) in zip(panels, PANELS):
        values = dict(zip(COMPARED, [part["samples"][name] for part in parts]))
        draw_bars(axes, values, COMPARED.values(), form, panel, better)
        axes.axvline(values["floor"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    middle.supxlabel(
        "samples: beside held-out slices  ·  decoder alone: reconstructions of training slices, with detail"
        "  ·  prior alone: samples beside such reconstructions of held-out slices  ·  floor: training slices",
        fontsize=8,
    )

    left, right = below.subplots(1, 2, width_ratios=(2, 1))
    copying = results["prior_alone"]["copying"]
    nearer = f"{copying['share_nearer_than_heldout']:.1%} of samples nearer than any reconstruction"
    draw_distances(left, distances, f"copying: statistic {copying['statistic']:+.1f} (copies: far below 0), {nearer}")
    bits = {
        "prior": results["prior"]["bits_per_slice"],
        "JPEG 2000": results["prior"]["jpeg2000_bits_per_slice"],
        "plain codes": results["reconstructions"]["bits_per_pixel"] * height * width,
    }
    colours = (COMPARED["samples"], COMPARED["floor"], COMPARED["floor"])
    quality = f"bits a held-out slice at {results['reconstructions']['psnr']:.1f} dB"
    draw_bars(right, bits, colours, ",.0f", quality, "fewer are better")
    save_figure(figure, path)


def draw_strips(figure: Figure | SubFigure, strips: dict[str, np.ndarray]) -> None:
    """Rows of slices (n, H, W) in [-1, 1] with their names."""
    columns = len(next(iter(strips.values())))
    for row, (label, slices) in zip(figure.subplots(len(strips), columns, squeeze=False), strips.items()):
        row[0].set_ylabel(label, fontsize=9)
        for axes, picture in zip(row, upright(slices)):
            axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)


def draw_bars(axes: Axes, values: dict[str, float], colours: Iterable[str], form: str, title: str, better: str) -> None:
    """Named values as bars from top to bottom, each with its number."""
    bars = axes.barh(list(values), list(values.values()), color=list(colours), height=0.7)
    for label in axes.bar_label(bars, [f"{value:{form}}" for value in values.values()], padding=3, fontsize=8):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(values.values()) or 1)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(better, fontsize=8, loc="left")
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_distances(axes: Axes, distances: dict[str, np.ndarray], title: str) -> None:
    """Histograms of distances from the nearest training slice, on the same bins."""
    every = np.concatenate(list(distances.values()))
    bins = np.linspace(every.min(), every.max() + 1e-6, 41)
    for (label, values), colour in zip(distances.items(), (COMPARED["samples"], COMPARED["decoder alone"], "black")):
        share = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.25)
        axes.hist(values, bins, weights=share, color=colour, histtype="step", linewidth=1.4, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("distance from the nearest training slice, root mean square of slices in [-1, 1]", fontsize=8)
    axes.set_ylabel("share of slices", fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def samples_figure(path: Path, slices: np.ndarray, title: str, columns: int = 8) -> None:
    """A sheet of slices (n, H, W) in [-1, 1]; small ones are drawn larger, by a whole number."""
    pictures = upright(slices)
    n, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = 3
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    inches = np.array(sheet.shape[::-1]) * max(1, 256 // width) / 120
    figure = Figure(figsize=(inches[0], inches[1] + 0.35))
    axes = figure.add_axes((0, 0, 1, inches[1] / (inches[1] + 0.35)))
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.text(0.004, 1 - 0.18 / (inches[1] + 0.35), title, va="center", fontsize=11)
    save_figure(figure, path)


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
