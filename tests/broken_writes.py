"""Fault injection at named points: the calls that write a run's files, and what an interrupted call leaves.

A point is, for instance, `prior 4: replace prior.safetensors`: the last update that began, the call, the file.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import trainer
from checkpoints import Run

CALLS = (  # all that write a run's files or read them back
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "read_bytes"),
    (os, "fsync"),
    (os, "replace"),
    (os, "truncate"),
    (Run, "log"),
)


def file_of(call: str, given: tuple) -> str:
    """Return the name of the file that a call concerns, without the ending of a temporary one; `.` for a folder."""
    if call == "log":
        return "metrics.jsonl"
    given_path = os.readlink(f"/proc/self/fd/{given[0]}") if call == "fsync" else given[call == "replace"]
    path = Path(given_path)
    return "." if path.is_dir() else re.sub(r"\.[0-9a-f]{8}\.part$", "", path.name)


def on_writes(patch: pytest.MonkeyPatch, act: Callable[[str, Callable, tuple], object]) -> None:
    """Replace each of CALLS by act(point, the real function, its arguments)."""
    last, seed_update = ["start"], trainer.seed_update

    def begin(seed: int, stage: str, update: int) -> None:
        last[0] = f"{stage} {update}"
        seed_update(seed, stage, update)

    patch.setattr(trainer, "seed_update", begin)
    for place, call in CALLS:
        real = getattr(place, call)

        def replaced(*given, call=call, real=real):
            return act(f"{last[0]}: {call} {file_of(call, given)}", real, given)

        patch.setattr(place, call, replaced)


def half_done(real: Callable, given: tuple) -> None:
    """Leave what a call leaves if it is interrupted halfway."""
    if real.__name__ in ("write_bytes", "write_text"):
        path, content = given
        real(path, content[: len(content) // 2])
    elif real.__name__ == "log":
        with open(given[0].log_path, "a") as file:
            file.write('{"stage": "vq')
