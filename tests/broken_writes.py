"""The calls that write a run's files, and what is left of one that is killed or finds the disk full."""

import os
from collections.abc import Callable
from pathlib import Path

from checkpoints import Run

CHECKPOINT_CALLS = (  # all through which a run's files are written, and read back
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "read_bytes"),
    (os, "fsync"),
    (os, "replace"),
    (os, "truncate"),
    (Run, "log"),
)


def half_done(real: Callable, given: tuple) -> None:
    """What is left of a call that did not come to its end."""
    if real.__name__ in ("write_bytes", "write_text"):
        path, content = given
        real(path, content[: len(content) // 2])
    elif real.__name__ == "log":
        with open(given[0].log_path, "a") as file:
            file.write('{"stage": "vq')
