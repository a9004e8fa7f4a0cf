"""The run directory: config.json, weights, the checkpoint that resuming needs, and the metrics log.

A run directory may come from an untrusted source: every file is bounded in size, JSON is read into strict models, and
tensors are compared with the network's in number, name, shape and type before they are used.
"""

import errno
import json
import math
import os
import platform
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from io import FileIO
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import portalocker
import safetensors
import safetensors.torch
import torch
from annotated_types import Ge, Le, MaxLen
from pydantic import ConfigDict, Field, RootModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import (
    FORMAT,
    FREE_OPTIONS,
    MOST_UPDATES,
    Model,
    RunConfig,
    StrictModel,
    Text,
    TrainConfig,
    check_format,
    network_model,
    parse_json,
    validate,
)
from console import RunError, logger, run_command, say, summarise
from utils import flush, make_folder, write_file, writing

Network = TypeVar("Network", bound=nn.Module)
Curves = dict[tuple[str, str], tuple[list[int], list[float]]]  # (split, name) to updates and values

# The largest files that are read: they bound memory and time.
MAX_CONFIG = 1 << 20  # bytes: a config takes 5 kB
MAX_DATA = 1 << 28  # bytes of data.json: HipMRI's 12,660 files take 0.7 MB, a million 70
MAX_DATA_LINES = 1_000_000  # of data.json, one a slice: as many as a data folder may have
MAX_DATA_LINE = 1 << 15  # bytes: a path has 4096, and JSON may need six for each
MAX_LOG = 1 << 24  # bytes: three stages of 270 lines take 0.1 MB
MAX_TENSORS = 1 << 30  # bytes of weights or a checkpoint: fifty times the largest preset's
MAX_HEADER = 1 << 23  # bytes that name a file's tensors: the largest preset's checkpoint takes 0.1 MB


# ---------------------------------------------------------------- files


def read_bytes(path: Path, most: int) -> bytes:
    """Return a file's content. Raises ValueError if it has more than `most` bytes or is no plain file."""
    check_file(path, most)
    return path.read_bytes()


def check_file(path: Path, most: int) -> None:
    """Raise FileNotFoundError, or ValueError for a file of more than `most` bytes, a device, a pipe or the like."""
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most} bytes")
    if not path.is_file():
        raise ValueError("it is not a plain file")


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """Yield a path to a file for libraries that want UTF-8: a file's name may hold any bytes."""
    with open(path, "rb") as file:
        yield str(path) if str(path).isprintable() else f"/dev/fd/{file.fileno()}"


def strict_json(value: dict[str, Any]) -> str:
    """Return JSON that every reader accepts: NaN and infinity become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(of) for name, of in part.items()}
        if isinstance(part, list | tuple):
            return [finite(of) for of in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=1, allow_nan=False)


# ---------------------------------------------------------------- tensors


def save_tensors(path: Path, header: dict[str, Any], tensors: dict[str, Tensor], previous: Path | None = None) -> None:
    """Write tensors as safetensors, with a header, the run format and a checksum as JSON in the file's metadata.

    The file is read back before it replaces the old one, which is kept as `previous`. Raises RunError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = {"format": FORMAT, "checksum": checksum(header, tensors)} | header
    # One entry: several would be written in random order, and the same weights would give different files.
    content = safetensors.torch.save(tensors, {"header": json.dumps(fields, allow_nan=False)})
    if len(content) > MAX_TENSORS:
        raise RunError(f"{path} would have {len(content)} bytes, and {MAX_TENSORS} at most are read again")

    def write(part: Path) -> None:
        part.write_bytes(content)
        flush(part)
        if part.read_bytes() != content:
            raise OSError(errno.EIO, "its content differs from what was written")

    write_file(path, write, previous)


def load_tensors(path: Path, model: type[Model]) -> tuple[Model, dict[str, Tensor]]:
    """Return the header and the tensors that `save_tensors` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        Exception: Of any type, for a damaged or hostile file.
    """
    check_file(path, MAX_TENSORS)
    with open(path, "rb") as start:
        if int.from_bytes(start.read(8), "little") > MAX_HEADER:
            raise ValueError(f"its header claims more than {MAX_HEADER} bytes")
    with utf8_path(path) as name, safetensors.safe_open(name, "pt") as file:
        fields = json.loads((file.metadata() or {}).get("header", "null"))
        if not isinstance(fields, dict):
            raise ValueError("it has no header of this project")
        check_format(fields)
        expected = fields.pop("format", None), fields.pop("checksum", None)
        header = validate(model, fields)
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no dict
    if expected != (FORMAT, checksum(fields, tensors)):
        raise ValueError("its checksum is wrong: it is damaged")
    return header, tensors


def checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of a header and of the tensors' names and values."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].cpu().flatten().view(torch.uint8).numpy().data
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def check_tensors(expected: dict[str, Tensor], given: dict[str, Tensor], half: bool = False) -> None:
    """Raise ValueError naming the first tensor that is missing, unknown, of another shape or type, or not finite.

    With `half`, float16 may stand for float32.
    """
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            raise ValueError(f"its {name} is missing")
        if name not in expected:
            raise ValueError(f"its {name:.60} is unknown to this network")
        shape, dtype = tuple(given[name].shape), given[name].dtype
        read = torch.float32 if half and dtype == torch.float16 else dtype
        if (shape, read) != (tuple(expected[name].shape), expected[name].dtype):
            raise ValueError(f"its {name} has shape {shape} and type {dtype}, which does not fit this network")
        if not given[name].isfinite().all():
            raise ValueError(f"its {name} is not finite")


# ---------------------------------------------------------------- weights

# The first is the product of the others: an export leaves it out.
SUMS, SIZES, EMBEDDINGS = "codebook.sums", "codebook.cluster_sizes", "codebook.embeddings"


def save_weights(path: Path, network: nn.Module) -> None:
    """Write a network's weights and config as safetensors. Raises RunError."""
    config: Any = network.config  # a dataclass
    save_tensors(path, asdict(config), network.state_dict())


def export_weights(path: Path, network: nn.Module, half: bool) -> None:
    """Write the least that `load_weights` needs.

    Args:
        path: Of the file.
        network: Its weights and config are written.
        half: Whether matrices and kernels are rounded to float16, to 11 significant bits. Vectors, such as biases and
            the sizes of clusters, take little room and stay as they are.

    Raises:
        RunError: The file cannot be written, or a weight is too large for float16.
    """
    config: Any = network.config
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name != SUMS}
    if half:
        tensors = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise RunError(f"{name} of {path.name} does not fit into float16: leave out --half")
    save_tensors(path, asdict(config), tensors)


class NoRandomWeights(TorchFunctionMode):
    """Leave out `init.normal_`: on the meta device it would import TorchDynamo, which takes a second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **kwargs)


def load_weights(path: Path, network: Callable[[Any], Network], config: type, prefix: str = "") -> Network:
    """Return the network that `save_weights` or `export_weights` wrote, in evaluation mode and float32.

    Args:
        path: The weights.
        network: Makes a network from a config.
        config: The class of the config.
        prefix: Of the options that the config's fields come from; their ranges apply here too.

    Raises:
        RunError: The file is missing, damaged, of another version, or does not fit its own config.
    """
    try:
        fields, tensors = load_tensors(path, network_model(config, prefix))
        chosen = config(**fields.model_dump())
        with torch.device("meta"), NoRandomWeights():  # shapes without memory
            expected = network(chosen).state_dict()
        stored = {name: of for name, of in expected.items() if name != SUMS or SUMS in tensors}
        check_tensors(stored, tensors, half=True)
        if stored.keys() != expected.keys():
            tensors[SUMS] = tensors[SIZES][:, None] * tensors[EMBEDDINGS]
        made = network(chosen)
        made.load_state_dict(tensors)
        return made.eval()
    except FileNotFoundError:
        reason = "train.py has not come that far, or the run is of an older version"
        raise RunError(f"{path} does not exist: {reason}") from None
    except Exception as error:  # see load_tensors
        raise RunError(f"{path} cannot be used: {summarise(error)}") from error


# ---------------------------------------------------------------- config.json and data.json

LIBRARIES = ("torch", "numpy", "nibabel", "torchmetrics", "safetensors", "pydantic")


def describe_code() -> dict[str, Any]:
    """Return the fields of a RunConfig that describe the code: library versions, command line, git revision."""
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return {"libraries": libraries, "command": sys.argv, "git_revision": git_revision()}


def git_revision() -> str | None:
    """Return the commit of these files, with `-dirty` if they were changed; None outside a git repository."""
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
        return described.stdout.strip()[:100] or None
    return None


def read_config(path: Path) -> RunConfig:
    """Return the config of a run directory. Raises RunError if there is none or it cannot be used."""
    try:
        return parse_json(RunConfig, read_bytes(path / "config.json", MAX_CONFIG))
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (no config.json): train first, or name one with --run") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path / 'config.json'} cannot be used: {summarise(error)}") from None


def write_config(path: Path, config: RunConfig) -> None:
    """Write config.json into a run directory or an export. Raises RunError."""
    content = json.dumps(config.model_dump(mode="json"), indent=1, allow_nan=False)
    write_file(path / "config.json", lambda part: part.write_text(content))


def read_data_files(run: Path) -> dict[str, str]:
    """Return the files of a run's data, name to content hash; {} without data.json. Raises RunError."""
    path = run / "data.json"
    try:
        return parse_data_files(read_bytes(path, MAX_DATA)) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be used: {summarise(error)}") from None


def parse_data_files(content: bytes) -> dict[str, str]:
    """Return the names and content hashes of a data.json. Raises ValueError.

    It is parsed in parts, whose number and size are bounded: JSON of short entries takes fifty times its size in
    memory.
    """
    content = content.strip()
    if not (content.startswith(b"{") and content.endswith(b"}")):
        raise ValueError("it is no JSON object")
    lines = content[1:-1].strip().split(b"\n")
    if len(lines) > MAX_DATA_LINES or max(map(len, lines)) > MAX_DATA_LINE:
        raise ValueError(f"it has more than {MAX_DATA_LINES} lines, or one of more than {MAX_DATA_LINE} bytes")
    files: dict[str, str] = {}
    for start in range(0, len(lines), 100):
        part = b"\n".join(lines[start : start + 100]).removesuffix(b",")
        files |= parse_json(RootModel[dict[str, Text]], b"{" + part + b"}").root
    return files


def write_data_files(path: Path, files: dict[str, str]) -> None:
    """Write data.json: a JSON object with one entry a line."""
    separators = chain([""], repeat(","))
    with open(path, "w") as file:
        file.write("{")
        file.writelines(
            f"{separator}\n{json.dumps(name)}: {json.dumps(content)}"
            for separator, (name, content) in zip(separators, files.items())
        )
        file.write("\n}")


# ---------------------------------------------------------------- run directory

WEIGHTS = tuple(f"{network}.safetensors" for network in ("vqvae", "prior", "guide", "refiner"))
# The first three are written in this order, so that a run with a config was created completely.
FILES = ["lock", "data.json", "config.json", "metrics.jsonl", "checkpoint.safetensors"]
FILES += ["checkpoint.previous.safetensors", *WEIGHTS]


class CheckpointHeader(StrictModel):
    """The plain values of a checkpoint."""

    stage: Literal["vqvae", "prior", "refiner", "done"]
    update: Annotated[int, Ge(0), Le(MOST_UPDATES)] = Field(0, description="the last that was completed")
    best: float | None = Field(None, description="lowest validation loss; null before the first validation")
    validation_pending: bool = Field(False, description="stopped before the validation after this update was complete")
    validations_since_best: Annotated[int, Ge(0), Le(MOST_UPDATES)] = Field(0, description="for --patience")
    losses: Annotated[list[Text], MaxLen(100)] = Field([], description="names of the rows of the tensor `losses`")
    log_bytes: Annotated[int, Ge(0), Le(MAX_LOG)] = Field(description="length of metrics.jsonl at that update")


class Checkpoint(NamedTuple):
    """All that resuming needs."""

    header: CheckpointHeader
    tensors: dict[str, Tensor]  # Trainer.learned_tensors, and "losses" (names, updates) since the last log line


class LogLine(StrictModel):
    """A line of metrics.jsonl: these fields, and named values."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    stage: Text
    split: Text
    update: Annotated[int, Ge(0), Le(MOST_UPDATES)]


class Run:
    """The directory of one training, locked against other processes until the end of its `with` block.

    Args:
        path: The directory, which is made unless it exists.
        config: Of the training. An existing run must have the same options, except for those that are free.
        files: Of the data, name to content hash, for data.json.

    Raises:
        RunError: The directory holds something else or a run made with other options, or another process uses it.
    """

    def __init__(self, path: Path, config: RunConfig, files: dict[str, str]):
        self.path, self.last_saved = path, ""
        self.log_path, self.checkpoint_path = path / "metrics.jsonl", path / "checkpoint.safetensors"
        self.previous_path = path / "checkpoint.previous.safetensors"
        check_is_run_directory(path)
        make_folder(path)
        self.lock = lock_run(path)
        try:
            for part in path.glob("*.part"):  # left by a process that was killed while it wrote
                part.unlink(missing_ok=True)
            self.config = self.open_or_create(config, files)
            with writing(self.log_path):
                self.log_path.touch()
        except BaseException:
            self.lock.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lock.close()
        if kind is SystemExit:
            say(f"stopped{self.last_saved}; the same command resumes")

    def open_or_create(self, config: RunConfig, files: dict[str, str]) -> RunConfig:
        """Return the config of the existing run, or write the given one."""
        if (self.path / "config.json").exists():
            old = read_config(self.path)
            check_same_options(self.path, old.options, config.options)
            return old
        self.write_config(config, files)
        return config

    def accept_data(self, fingerprint: str, files: dict[str, str]) -> None:
        """Record changed data as the run's own."""
        self.config = self.config.model_copy(update={"fingerprint": fingerprint})
        self.write_config(self.config, files)

    def write_config(self, config: RunConfig, files: dict[str, str]) -> None:
        """Write data.json, then config.json."""
        write_file(self.path / "data.json", lambda part: write_data_files(part, files))
        write_config(self.path, config)

    def save_checkpoint(self, tensors: dict[str, Tensor], **header: Any) -> None:
        """Write checkpoint.safetensors, with the fields of a `CheckpointHeader`, and keep the previous one."""
        with writing(self.log_path):
            flush(self.log_path)
            log_bytes = self.log_path.stat().st_size
        checked = CheckpointHeader(log_bytes=log_bytes, **header)
        save_tensors(self.checkpoint_path, checked.model_dump(), tensors, self.previous_path)
        self.last_saved = f" after {checked.stage} update {checked.update}"

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the last checkpoint, or the previous one if the last is damaged; None before the first.

        Lines that were logged after it are dropped: training logs them anew. Raises RunError if neither can be read.
        """
        checkpoint, problems = None, []
        for path in (self.checkpoint_path, self.previous_path):
            if path.exists() and not checkpoint:
                try:
                    checkpoint = Checkpoint(*load_tensors(path, CheckpointHeader))
                except Exception as error:  # see load_tensors
                    problems.append(f"{path} cannot be used ({summarise(error)})")
        if problems and not checkpoint:
            raise RunError(f"{'; '.join(problems)}: choose another --run")
        if problems:
            logger.warning(f"{problems[0]}: resuming from the previous checkpoint")
        with writing(self.log_path):
            end = checkpoint.header.log_bytes if checkpoint else 0
            os.truncate(self.log_path, min(end, self.log_path.stat().st_size))
        read_log(self.path)
        if checkpoint:
            self.last_saved = f" after {checkpoint.header.stage} update {checkpoint.header.update}"
        return checkpoint

    def log(self, stage: str, split: str, update: int, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, with six significant digits."""
        line = {"stage": stage, "split": split, "update": update}
        line |= {name: float(f"{value:.6g}") for name, value in values.items()}
        with writing(self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def curves(self, stage: str) -> Curves:
        """Return what was logged in a stage, as `read_curves` does."""
        return read_curves(self.path, stage)


class NoRun(Run):
    """In place of the run directory in all but the first of several processes: nothing is read or written."""

    def __init__(self, path: Path):
        self.path, self.checkpoint_path = path, path / "checkpoint.safetensors"

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def save_checkpoint(self, tensors: dict[str, Tensor], **header: Any) -> None:
        pass

    def log(self, stage: str, split: str, update: int, values: dict[str, float]) -> None:
        pass


def read_log(run: Path) -> list[LogLine]:
    """Return the lines of a run's metrics.jsonl. Raises RunError if one cannot be used."""
    path = run / "metrics.jsonl"
    lines: list[LogLine] = []
    try:
        for content in read_bytes(path, MAX_LOG).splitlines():
            lines.append(parse_json(LogLine, content))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} line {len(lines) + 1} cannot be used: {summarise(error)}") from None
    return lines


def read_curves(run: Path, stage: str) -> Curves:
    """Return (split, name) to updates and values, of everything logged in a stage. Raises RunError."""
    curves: Curves = defaultdict(lambda: ([], []))
    for line in read_log(run):
        if line.stage == stage:
            for name, value in line.__pydantic_extra__.items():
                updates, values = curves[line.split, name]
                updates.append(line.update)
                values.append(value)
    return dict(curves)


def is_complete(run: Path) -> bool:
    """Return whether the training of a run finished; True also if no readable checkpoint is left."""
    try:
        return load_tensors(run / "checkpoint.safetensors", CheckpointHeader)[0].stage == "done"
    except Exception:  # see load_tensors; sampling needs the weights alone
        return True


def check_is_run_directory(path: Path) -> None:
    """Raise RunError for a path that is something else, or for a run directory with links in place of files."""
    if not os.path.lexists(path):
        return
    names = {file.name for file in path.iterdir()} if path.is_dir() else {"a file"}
    begun = "lock" in names and all(name in ("lock", "data.json") or name.endswith(".part") for name in names)
    if names and "config.json" not in names and not begun:
        raise RunError(f"{path} exists and is not a run directory: choose another --run")
    for name in names & set(FILES):
        if (path / name).is_symlink() or not (path / name).is_file():
            raise RunError(f"{path / name} is not a plain file: choose another --run")


def check_same_options(path: Path, old: TrainConfig, new: TrainConfig) -> None:
    """Raise RunError naming each option in which two trainings differ."""
    before, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    differences = [
        f"--{name.replace('_', '-')} was {before[name]}, is {now[name]}"
        for name in now
        if name not in FREE_OPTIONS and before[name] != now[name]
    ]
    if differences:
        raise RunError(f"{path} holds a run made with other options ({'; '.join(differences)}): choose another --run")


def lock_run(path: Path) -> FileIO:
    """Lock a run directory and return the file whose closing, or the end of the process, unlocks it.

    Raises:
        RunError: Another process has locked it; its number and host are named. Or the lock cannot be written.
    """
    with writing(path / "lock"), ExitStack() as failed:
        file = failed.enter_context(open(path / "lock", "a+b", buffering=0))
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.AlreadyLocked:
            file.seek(0)
            owner = file.read(200).decode(errors="replace") or "another process"
            raise RunError(f"{path} is in use by {owner}: wait for it, or choose another --run") from None
        except portalocker.LockException as error:
            reason = summarise(error.args[0])
            logger.warning(f"{path} cannot be locked here ({reason}): let no other process train in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        failed.pop_all()
        return file


if __name__ == "__main__":
    from export import main  # here, because it needs the networks, which nothing above knows

    run_command(main)
