"""The run directory: config.json, weights, the metrics log, and what resuming needs.

A run directory may be a stranger's: what is read is bounded in size and checked field by field and tensor by tensor.
"""

import errno
import io
import json
import math
import os
import pickletools
import platform
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import get_type_hints

try:
    import fcntl
except ImportError:  # not on Windows: there run directories are not locked
    fcntl = None

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from config import FREE_OPTIONS, MOST_UPDATES, check_options
from utils import RunError, StopSignals, flush, in_short, make_folder, say, write_file, writing

LIBRARIES = ("torch", "numpy", "nibabel", "torchmetrics", "safetensors", "pydantic")


# ---------------------------------------------------------------- files

# What a file may hold. A run directory may be a stranger's: a limit keeps memory and time in bounds.
MAX_CONFIG = 1 << 20  # bytes: a config takes 4 kB
MAX_DATA = 1 << 24  # bytes of data.json: HipMRI's 12,660 files take 0.7 MB, and Python twenty times as much
MAX_LOG = 1 << 24  # bytes: three stages of 270 lines take 0.1 MB
MAX_TENSORS = 1 << 30  # bytes of weights or a checkpoint: fifty times the largest preset's
MAX_HEADER = 1 << 20  # bytes that name a file's tensors: the largest preset's take 10 kB
MAX_PICKLE = 1 << 22  # bytes of a checkpoint's plain values: 10 kB, and a megabyte of losses at the most updates


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


FORMAT = 2  # of a run directory; raise it when this version and an older one would misread each other's
SIDE = whole(1, 4096)  # pixels: longer than any slice that dataset.py reads
FLOAT32 = np.finfo(np.float32)
CONFIG = {
    "format": whole(FORMAT, FORMAT),
    "slice_size": listed(SIDE, 2),
    "intensity": {"percentile": real(0, 100), "scale": real(float(FLOAT32.tiny), float(FLOAT32.max))},
    "affine": is_affine,
    "positions": {"quantiles": listed(real(0, 1), 0, 101), "unknown": real(0, 1)},
    "fingerprint": text,
    "libraries": dict.fromkeys(LIBRARIES, text),
}


def check_format(config: object) -> None:
    """Raise ValueError where a config says that it is of another version's format, or says none, as the first did."""
    given = config.get("format", 1) if isinstance(config, dict) else FORMAT
    if type(given) is int and given != FORMAT:
        age = "a newer" if given > FORMAT else "an older"
        raise ValueError(f"it is of run format {str(given):.20}, of {age} version than this one, which reads {FORMAT}")


def read_config(path: Path) -> dict:
    """A run's config.json, checked field by field. Raises RunError where there is none or it cannot be used."""
    try:
        config = json.loads(read_bytes(path / "config.json", MAX_CONFIG))
        check_format(config)
        if isinstance(config, dict):
            check_options(config.get("options"))
        check_fields(config, CONFIG | {"options": lambda _: True})
        if not config["positions"]["quantiles"] and config["positions"]["unknown"] < 1:
            raise ValueError("positions.quantiles is empty")
        return config
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (no config.json): train first, or name one with --run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path / 'config.json'} cannot be used: {in_short(error)}") from None


# ---------------------------------------------------------------- run directory

STAGES = ("vqvae", "prior", "refiner", "done")
# The first three are written in this order, so that where there is a config, the run's beginning is complete.
FILES = ("lock", "data.json", "config.json", "metrics.jsonl", "training.pt", "training.pt.before")
FILES += ("vqvae.safetensors", "prior.safetensors", "refiner.safetensors")


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
        self.config = config
        self.write_config(files)
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

    def accept_data(self, fingerprint: str, files: dict[str, str]) -> None:
        """Take changed data for the run's own from now on."""
        self.config["fingerprint"] = fingerprint
        self.write_config(files)

    def write_config(self, files: dict[str, str]) -> None:
        """Write data.json, unless the data have too many files to name, then config.json."""
        known = json.dumps(files, indent=0)
        if len(known) <= MAX_DATA:
            write_file(self.path / "data.json", lambda part: part.write_text(known))
        config = json.dumps(self.config, indent=1, allow_nan=False)
        write_file(self.path / "config.json", lambda part: part.write_text(config))

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
                known = {"stage": text, "split": text, "update": whole(0, MOST_UPDATES)}
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


def read_data_files(run: Path) -> dict[str, str]:
    """The files of a run's data, name to content id; {} where they were too many to keep."""
    path = run / "data.json"
    try:
        files = json.loads(read_bytes(path, MAX_DATA)) if path.exists() else {}
        if not isinstance(files, dict) or not all(map(text, files.values())):
            raise ValueError("it is no list of files")
        return files
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be used: {in_short(error)}") from None


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
    check_format(fields)
    kinds = get_type_hints(config)
    checks = {name: LAYERS if name in ("residual_blocks", "dilation_cycles") else KINDS[kinds[name]] for name in kinds}
    check_fields(fields, checks | {"format": whole(FORMAT, FORMAT), "checksum": optional(text)})
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
