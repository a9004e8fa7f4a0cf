"""Trainings in several processes, as torchrun would start them: for the tests of distributed.py.

The processes are forked from a server that has imported PyTorch and train.py, so that they start at once.
"""

import hashlib
import multiprocessing
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_quick
from trainings import arguments, at_updates

import checkpoints
import config
import console
import decoding
import train
import trainer

GIVE_UP_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    status: int  # of its exit, negative for a signal
    seconds: float  # until then, after the first process had ended
    stdout: str
    stderr: str
    states: str  # a line for each checkpoint: a hash of its tensors
    decoded: int  # files that it read
    threads: str  # the names of those it had left at the end, on Linux

    @property
    def errors(self) -> list[str]:
        """What it printed on stderr beside notes and warnings."""
        return [line for line in self.stderr.splitlines() if not line.startswith(("note: ", "warning: "))]


def kill(number, rank, *kinds):
    """Send signals to the process of a rank, if it is this one."""
    if rank in (number, "all"):
        for kind in kinds:
            os.kill(os.getpid(), kind)


def in_validation(stage, update, act):
    """Call `act` once, as the first own batch of a validation has been taken."""
    real, done = trainer.Trainer.until_stopped, []

    def until_stopped(self, batches):
        for batch in real(self, batches):
            if (self.stage, self.update) == (stage, update) and not done:
                done.append(act())
            yield batch

    trainer.Trainer.until_stopped = until_stopped


def thread_names():
    """Yield the names of this process's threads, on Linux."""
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has ended
            yield path.read_text()


def record(path, decoded):
    """Write a hash of each checkpoint's tensors to a file, in the processes without a run directory too."""
    for kind in (checkpoints.Run, checkpoints.NoRun):

        def save_checkpoint(run, tensors, real=kind.save_checkpoint, **header):
            hashed = hashlib.sha256()
            for name in sorted(tensors):
                hashed.update(tensors[name].contiguous().numpy().tobytes())
            with open(path, "a") as file:
                file.write(f"{header['stage']} {header.get('update')} {hashed.hexdigest()}\n")
            real(run, tensors, **header)

        kind.save_checkpoint = save_checkpoint
    read_file = decoding.read_file

    def counted(file):
        with open(decoded, "a") as count:
            count.write(".")
        return read_file(file)

    decoding.read_file = counted


def run_process(number, count, port, folder, options, acts):
    """Train as process `number` of `count`; this is where a process starts.

    `acts` are signals: ("update" or "validation", stage, update, rank, signals).
    """
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ["PROSTATEVQ_CACHE"] = str(folder / "cache")
    sys.stdout, sys.stderr = (open(folder / f"{name}-{number}", "w") for name in ("stdout", "stderr"))  # noqa: SIM115
    torch.set_num_threads(1)
    trainer.LOG_LINES = 10**6  # a line for each update
    # Parts of a batch are rounded differently from the whole: in bfloat16, too differently for a comparison.
    for place in (train, trainer, *(sys.modules[name] for name in ("optimiser", "validation"))):
        place.autocast = lambda device: torch.autocast(device.type, enabled=False)
    config.PRESETS["tiny"] = TINY
    make_quick(pytest.MonkeyPatch())
    record(folder / f"states-{number}", folder / f"decoded-{number}")
    for where, stage, update, rank, *kinds in acts:
        if where == "update":
            at_updates(pytest.MonkeyPatch(), {(stage, update): lambda: kill(number, rank, *kinds)})  # noqa: B023
        else:
            in_validation(stage, update, lambda: kill(number, rank, *kinds))  # noqa: B023
    try:
        console.run_command(lambda: train.main(arguments(**options)))
    finally:
        (folder / f"threads-{number}").write_text("".join(thread_names()))


class Processes:
    """Starts trainings; each has a folder for what its processes print."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["processes"])

    def train(self, count, options, *acts):
        """Train in `count` processes, and return how each ended."""
        self.number += 1
        folder = self.folder / f"call-{self.number}"
        folder.mkdir()
        (folder / "cache").symlink_to(self.folder / "cache")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        given = count, port, folder, options, acts
        started = [self.context.Process(target=run_process, args=(number, *given)) for number in range(count)]
        for process in started:
            process.start()
        try:
            ends = self.wait(started)
        finally:
            for process in started:
                process.kill()
        return [Ended(started[number].exitcode, ends[number], *texts(folder, number)) for number in range(count)]

    def wait(self, started):
        """Return the seconds between the end of the first process and that of each."""
        ends, give_up = {}, time.monotonic() + GIVE_UP_SECONDS
        while len(ends) < len(started):
            assert time.monotonic() < give_up, "the processes do not end"
            multiprocessing.connection.wait([process.sentinel for process in started if process not in ends], 1)
            ends |= {p: time.monotonic() for p in started if p not in ends and p.exitcode is not None}
        return [ends[process] - min(ends.values()) for process in started]


def texts(folder, number):
    """Return what a process left: stdout, stderr, states, the number of files that it decoded, and its threads."""
    paths = [folder / f"{name}-{number}" for name in ("stdout", "stderr", "states", "decoded", "threads")]
    *printed, decoded, threads = (path.read_text() if path.exists() else "" for path in paths)
    return *printed, len(decoded), threads
