"""What a user waits for: seconds of whole commands, from the shell to the last file, on the phantom. Linux only.

    python benchmarks/commands.py [--run RUN] [--nums 1 100 1000]

Without --run, networks of the full preset are trained for a few updates: the speed does not depend on their weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, report

from utils import pick_device

ROOT = Path(__file__).parent.parent
FEW_UPDATES = ("--updates", "12", "--prior-updates", "2", "--refiner-updates", "2")


def run_command(*arguments: object) -> tuple[float, float]:
    """Run a command of the project; return its wall-clock seconds and its peak memory in MB.

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


def main() -> None:
    """Run the benchmark: print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, help="run directory (default: one trained for a few updates)")
    parser.add_argument("--nums", type=int, nargs="+", default=[1, 100], help="samples (default: 1 100)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    options = parser.parse_args()
    settings = {"machine": machine(pick_device(options.device)), "torch": torch.__version__}
    for name in ("train.py", "predict.py", "evaluate.py"):
        report(f"{name} --help", run_command(name, "--help")[0], "s", **settings)
    with tempfile.TemporaryDirectory() as folder:
        run, images = options.run or Path(folder) / "run", Path(folder) / "images"
        common = ("--run", run, "--images", images, "--device", options.device)
        if not options.run:
            run_command("train.py", *common, *FEW_UPDATES)
        for num in options.nums:
            seconds, peak = run_command("predict.py", *common, "--num", num, "--out", Path(folder) / f"samples_{num}")
            report("predict.py", seconds, "s", num=num, peak_mb=round(peak), **settings)


if __name__ == "__main__":
    main()
