"""What the benchmarks share: interleaved timing, JSON lines, the machine in words."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's files are not installed


def interleave(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a machine's slow minutes fall on all of them.

    Each is called once before, untimed. On a GPU each call is waited for.
    """
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(name: str, value: float, unit: str, **settings) -> None:
    """One JSON line."""
    print(json.dumps({"name": name, "value": float(f"{value:.4g}"), "unit": unit, **settings}), flush=True)


def machine(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def profile(function: Callable[[], object], device: torch.device) -> None:
    """The ten operations that one call spends most time in, on stderr."""
    with torch.profiler.profile() as profiler:
        function()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=time_of, row_limit=10, max_name_column_width=40), file=sys.stderr)
