"""Shared by the benchmarks: interleaved timing, JSON lines, a description of the machine."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the project's files are not installed

Key = TypeVar("Key")

MIN_SECONDS = 0.05  # of a timing: in less, launching a GPU's kernels would dominate


def interleave(functions: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Return the median seconds of each function. They take turns, so that slow minutes of the machine affect all.

    Each is called twice before: to initialise, and to find how many calls a timing of MIN_SECONDS needs.
    """
    calls: dict[Key, int] = {}
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        time_calls(function, 1)
        calls[name] = math.ceil(MIN_SECONDS / time_calls(function, 1))
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(time_calls(function, calls[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_calls(function: Callable[[], object], count: int) -> float:
    """Return the seconds per call of a function that is called `count` times, until the current GPU has finished."""
    start = time.perf_counter()
    for _ in range(count):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def report(name: str, value: float, unit: str, **settings: object) -> None:
    """Print one JSON line."""
    print(json.dumps({"name": name, "value": float(f"{value:.4g}"), "unit": unit, **settings}), flush=True)


def run_benchmark(script: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run a script of this folder; yield its JSON lines as they come, and print its other lines on stderr.

    Raises:
        CalledProcessError: It fails.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout  # it is a pipe
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def machine(device: torch.device) -> str:
    """Describe the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def profile(function: Callable[[], object], device: torch.device) -> None:
    """Print the ten operations in which one call spends most time on stderr."""
    with torch.profiler.profile() as profiler:
        function()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=time_of, row_limit=10, max_name_column_width=40), file=sys.stderr)
