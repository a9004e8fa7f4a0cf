"""What a user waits for: seconds of whole commands, from the shell to the last file, and their peak memory. Linux only.

    python benchmarks/commands.py [--run RUN] [--nums 1 1000] [--rounds 3]

Without --run, networks of the full preset are trained for a few updates: the speed does not depend on their weights.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import ROOT, interleave, machine, report

import phantom
from utils import pick_device

FEW_UPDATES = ("--updates", 12, "--prior-updates", 2, "--refiner-updates", 2)
CASES = (4, 1, 1)  # patients of the phantom for these updates, 20 slices of 256x128 each


def run_command(*arguments: object) -> tuple[float, float]:
    """Run a command of the project; return its wall-clock seconds and its peak memory in MB.

    The memory is at least what this process has used before: Linux counts it for the child, too.

    Raises:
        CalledProcessError: It fails.
    """
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr  # it is a pipe
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)  # Popen.wait does not tell the peak memory
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.decode()[-1000:])
    return seconds, usage.ru_maxrss / 1024


def train_briefly(folder: Path, device: str) -> Path:
    """Train networks of the full preset for a few updates; return the run directory, which is made in `folder`."""
    phantom.write_phantom(folder / "slices", CASES)
    places = ("--data", folder / "slices", "--run", folder / "run", "--images", folder / "images")
    run_command("train.py", *places, "--device", device, *FEW_UPDATES)
    return folder / "run"


def sample(run: Path, num: int, device: str) -> tuple[float, float]:
    """Draw samples with the defaults of predict.py into a new folder; return seconds and peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        places = ("--run", run, "--images", Path(folder) / "images", "--out", Path(folder) / "samples")
        return run_command("predict.py", *places, "--device", device, "--num", num)


def main() -> None:
    """Run the benchmark: print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="run directory (default: one trained for a few updates)")
    parser.add_argument("--nums", type=int, nargs="+", default=[1, 1000], help="samples (default: 1 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of --help and of a single sample (default: 3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    options = parser.parse_args()
    settings = {"machine": machine(pick_device(options.device)), "torch": torch.__version__}
    helps: dict[str, Callable[[], object]] = {
        name: partial(run_command, name, "--help") for name in ("train.py", "predict.py", "evaluate.py")
    }
    for name, seconds in interleave(helps, options.rounds).items():
        report(f"{name} --help", seconds, "s", **settings)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROSTATEVQ_CACHE"] = f"{folder}/cache"
        run = options.run.resolve() if options.run else train_briefly(Path(folder), options.device)
        for num in options.nums:
            found = [sample(run, num, options.device) for _ in range(options.rounds if num == 1 else 1)]
            report(f"predict.py --num {num}", statistics.median(seconds for seconds, _ in found), "s", **settings)
            report(f"predict.py --num {num}, peak memory", max(peak for _, peak in found), "MB", **settings)


if __name__ == "__main__":
    main()
