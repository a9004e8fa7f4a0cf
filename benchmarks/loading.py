"""Slices per second of the first pass over a folder, and the cost of reopening its cache, on the phantom. Linux only.

python benchmarks/loading.py [--slices 12660] [--workers 2] [--profile]
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import interleave, machine, profile, report
from peers import monai_slices
from reference import NibabelSlices

import phantom
from dataset import load_dataset

FIRST_PASS = 2000  # slices; 20 per volume
OPEN = """
import re, sys, time
import numpy, torch, nibabel, tqdm, phantom
from dataset import batch_indices, load_dataset
def peak():  # kilobytes; getrusage would count the parent's too
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
start = time.perf_counter()
data = load_dataset(sys.argv[1])
data.train.batch(batch_indices(len(data.train), 32, 0, 0))
seconds = time.perf_counter() - start
print(seconds, (peak() - before) / 1024)
"""


def write(folder: Path, slices: int) -> None:
    """Write phantom slices of HipMRI's size, 20 per patient, with about 5 % each for validation and test."""
    patients = slices // 20
    few = max(1, patients // 20)
    phantom.write_phantom(folder, cases=(patients - 2 * few, few, few))


def first_pass(folder: Path, workers: int) -> None:
    """Decode the folder into an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PROSTATEVQ_CACHE"] = cache
        load_dataset(str(folder), workers=workers)


def reopen(folder: Path, cache: Path) -> tuple[float, float]:
    """Return the seconds to the first batch and the megabytes beyond the imports, in a process of its own."""
    environment = os.environ | {"PROSTATEVQ_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", OPEN, str(folder)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    seconds, megabytes = map(float, printed.split())
    return seconds, megabytes


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--slices", type=int, default=12_660, help="slices in the reopened cache (default: 12660, as in HipMRI)"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads of the first pass (default: 2)")
    parser.add_argument("--profile", action="store_true", help="also print where the first pass spends its time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        few, many, cache = (Path(temporary, name) for name in ("few", "many", "cache"))
        write(few, FIRST_PASS)
        images = sorted(few.glob("keras_slices_[tv]*/*.nii.gz"))
        plain = NibabelSlices(images)
        readers: dict[str, Callable[[], object]] = {"nibabel": lambda: [plain[i] for i in range(500)]}
        if monai := monai_slices(images):
            readers["monai"] = lambda: [monai(i) for i in range(500)]
        seconds = interleave({"ours": lambda: first_pass(few, options.workers), **readers}, 3)
        ours, nibabel = len(images) / seconds["ours"], 500 / seconds["nibabel"]
        write(many, options.slices)
        os.environ["PROSTATEVQ_CACHE"] = str(cache)
        start = time.perf_counter()
        load_dataset(str(many), workers=options.workers)
        total = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        opened = sorted(reopen(many, cache) for _ in range(3))[1]
    settings = {"slice_size": [256, 128], "workers": options.workers, "machine": machine(torch.device("cpu"))}
    report("first_pass_slices_per_second", ours, "slices/s", slices=len(images), **settings)
    for name in readers:
        report(f"{name}_slices_per_second", 500 / seconds[name], "slices/s", slices=500, **settings | {"workers": 1})
    report("first_pass_speedup", ours / nibabel, "times", **settings)
    report("first_pass_whole_seconds", total, "s", slices=options.slices, **settings)
    report("first_pass_peak_megabytes", peak, "MB", slices=options.slices, **settings)
    report("cache_open_seconds", opened[0], "s", slices=options.slices, **settings)
    report("cache_open_megabytes", opened[1], "MB", slices=options.slices, **settings)
    if options.profile:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary), 200)
            profile(lambda: first_pass(Path(temporary), options.workers), torch.device("cpu"))
    print(
        f"On {settings['machine']}: the first pass reads {ours:.0f} slices/s ({ours / nibabel:.1f} times as fast as "
        f"nibabel); {options.slices} slices take {total:.1f} s once, and {opened[0]:.2f} s and {opened[1]:.0f} MB "
        "afterwards."
    )


if __name__ == "__main__":
    main()
