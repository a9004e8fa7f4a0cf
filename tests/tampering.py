"""Damage files and run directories, or change them as an attacker would; load such runs and judge the outcome."""

import json
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from numpy.random import Generator

import train
import trainer
from checkpoints import Checkpoint, checksum
from console import RunError
from dataset import DataError


def pick(rng: Generator, choices):
    """Return one of the choices; rng.choice would convert them to an array and change their types."""
    return choices[rng.integers(len(choices))]


def flip_bits(rng: Generator, raw: bytearray) -> bytes:
    for place in rng.integers(8 * len(raw), size=rng.integers(1, 20)).tolist():
        raw[place // 8] ^= 1 << place % 8
    return raw


def set_pixels(rng: Generator, raw: bytearray) -> bytes:
    """Set some bytes to all ones, which are NaN in floats, to zeros, or at random."""
    start, length = int(rng.integers(len(raw))), int(rng.integers(1, 64))
    raw[start : start + length] = pick(rng, (b"\xff" * length, bytes(length), rng.bytes(length)))
    return raw


def truncate(rng: Generator, raw: bytearray) -> bytes:
    return raw[: pick(rng, (rng.integers(400), rng.integers(len(raw)), len(raw) - 1))]


def extend(rng: Generator, raw: bytearray) -> bytes:
    return raw + pick(rng, (rng.bytes(rng.integers(1, 5000)), bytes(rng.integers(1, 100_000)), raw))


def move(rng: Generator, raw: bytearray) -> bytes:
    """Remove or repeat some bytes."""
    start, length = rng.integers(len(raw)), rng.integers(1, 100)
    return raw[:start] + raw[start + length * pick(rng, (1, -1)) :]


# What a field may be set to; all can be written as JSON.
EXTREMES = (0, 1, -1, 2, 7, 10**6, 10**9, 2**63, 10**40, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), None)
EXTREMES += (True, False, "", "1", "x" * 5000, "\n\x1b[2J\ud800", [], {}, [[]], [1, 2], [10**6] * 2, {"a": 1})


def leaves(value, place=()):
    """Return the places of all values in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] * bool(place) + [leaf for key, below in items for leaf in leaves(below, (*place, key))]


def set_value(rng: Generator, nested: dict) -> None:
    """Remove a value of nested lists and dicts, add one, or set one to an extreme."""
    *above, last = pick(rng, leaves(nested))
    for key in above:
        nested = nested[key]
    way = rng.random()
    if way < 0.1:
        del nested[last]
    elif way < 0.2 and isinstance(nested, dict):
        nested[pick(rng, ("colour", "__class__", "x" * 300, "a\nb", "../config"))] = pick(rng, EXTREMES)
    else:
        nested[last] = pick(rng, EXTREMES)


def tamper_with_text(rng: Generator, path: Path, canary: Path) -> bool:
    """Change values of well-formed JSON, or write JSON that is nested very deeply."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    values = [json.loads(line) for line in lines]
    if not values or rng.random() < 0.05:
        path.write_text(pick(rng, ("[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"' + "\\ud800" * 1000 + '"')))
        return True
    for _ in range(rng.integers(1, 4)):
        set_value(rng, pick(rng, values) or values[0])
    path.write_text("\n".join(map(json.dumps, values)) + "\n")
    return False


def tamper_with_safetensors(rng: Generator, path: Path, canary: Path) -> bool:
    """Write a well-formed safetensors file with other tensors or another header, half of the time with its checksum."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    fields = json.loads(header["header"])
    if rng.random() < 0.4 or not tensors:
        for _ in range(rng.integers(1, 3)):
            set_value(rng, fields)
    else:
        tamper_with_tensors(rng, tensors)
    if rng.random() < 0.5:  # as its writer would have made it
        content = {name: value for name, value in fields.items() if name not in ("format", "checksum")}
        fields["checksum"] = checksum(content, tensors)
    header["header"] = json.dumps(fields)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, header)
    return False


def tamper_with_tensors(rng: Generator, tensors: dict) -> None:
    name, other = pick(rng, list(tensors)), pick(rng, list(tensors))
    tensor = tensors[name]
    ways = (
        lambda: {name: tensors[other], other: tensor},
        lambda: {"more": tensor, "../more": tensor},
        lambda: {name: tensor[..., None] if tensor.ndim < 3 else tensor.flatten()},
        lambda: {name: torch.zeros(3, 5)},
        lambda: {name: tensor.double()},
        lambda: {name: tensor.bfloat16()},
        lambda: {name: torch.full_like(tensor, pick(rng, (torch.nan, torch.inf)))},
        lambda: {name: torch.zeros(0)},
    )
    changed = pick(rng, ways)()
    del tensors[name]
    tensors.update(changed)


class Evil:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def plain_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(canary)))


def tamper_with_bytes(rng: Generator, path: Path, canary: Path) -> bool:
    """Damage, truncate or extend a file, or replace it by another file or a hostile pickle."""
    content = bytearray(path.read_bytes()) or bytearray(b"\0")
    other = pick(rng, [file for file in sorted(path.parent.iterdir()) if file.is_file()])
    if rng.random() < 0.1:
        plain_pickle(path, canary)
        return True
    if path.suffix == ".safetensors" and rng.random() < 0.2:  # its header's length, or its JSON
        place = int(rng.integers(8 + int.from_bytes(content[:8], "little")))
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        return False
    way = pick(rng, (flip_bits, flip_bits, set_pixels, truncate, truncate, extend, move, None))
    path.write_bytes(way(rng, content) if way else other.read_bytes())
    return False


def tamper_with_place(rng: Generator, path: Path, canary: Path) -> bool:
    """Put something else in place of a file."""
    path.unlink()
    ways = (
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(canary.with_name("outside")),
        lambda: path.symlink_to(path),
        lambda: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 40 << 30),  # a sparse file of 40 GB
    )
    pick(rng, ways)()
    return False


def tamper(rng: Generator, run: Path, canary: Path) -> tuple[str, bool]:
    """Tamper with a file of a run; return its name, and whether it must be refused."""
    names = [file.name for file in sorted(run.iterdir()) if file.suffix in (".json", ".jsonl", ".safetensors")]
    names.remove("checkpoint.previous.safetensors")  # it is read in place of the last one, see below
    path = run / pick(rng, names)
    content = tamper_with_safetensors if path.suffix == ".safetensors" else tamper_with_text
    way = pick(rng, (content,) * 3 + (tamper_with_bytes,) * 2 + (tamper_with_place,))
    evil = way(rng, path, canary)
    if path.name == "data.json":  # it is read only if the data changed
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"fingerprint": "0"}))
    if path.name == "checkpoint.safetensors":  # otherwise the previous one would be used
        previous = run / "checkpoint.previous.safetensors"
        previous.unlink()
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 10**9:
            shutil.copy(path, previous)
    return path.name, evil


class Resumed(BaseException):
    """A run was loaded and would resume."""


def judge_run(load: Callable[[], None], run: Path) -> tuple[str, str]:
    """Load a run; return "loaded", "refused" or "crashed", with details."""
    try:
        load()
    except Resumed:
        pass
    except (RunError, DataError) as refusal:
        message = str(refusal)
        if message.isprintable() and len(message) < 1000 and str(run) in message:
            return "refused", message
        return "crashed", f"the message is not one line that names the run: {message!r}"
    except BaseException:
        return "crashed", traceback.format_exc()
    return "loaded", ""


def resume(arguments: list[str]) -> None:
    """Resume a training up to its first update."""

    def fit(self: trainer.Trainer, checkpoint: Checkpoint | None, progress: trainer.Progress) -> None:
        if checkpoint and checkpoint.header.stage == self.stage:
            self.restore(checkpoint)
        raise Resumed

    trainer.Trainer.fit = fit
    train.main(arguments)
