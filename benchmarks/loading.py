"""Slices per second of the first pass over a folder, and the cost of reopening its cache, on the phantom. Linux only.

python benchmarks/loading.py [--slices 12660] [--workers 2] [--profile]
python benchmarks/loading.py --links 1000000    # a folder of links to few small slices: what grows with their number
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, interleave, machine, profile, report
from peers import monai_slices, optimiser_step
from reference import NibabelSlices

import phantom
from config import configure, network_config
from dataset import SPLITS, load_dataset
from modules import VQVAE, VQVAEConfig
from trainer import BatchLoader, make_optimiser
from utils import channels_last

FIRST_PASS = 2000  # slices; 20 per volume
FEW = 2400  # slices of the training whose updates are compared with those on many
LINKED_SIZE, ORIGINALS = (32, 32), 6  # pixels, and volumes of 20 slices; a file may have some 65,000 links
UPDATES = 20  # timed, of each
CPU = torch.device("cpu")
OPEN = """
import json, re, sys, time
import numpy, torch, nibabel, tqdm, phantom
from dataset import batch_indices, load_dataset
def peak():  # megabytes; getrusage would count the parent's too
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
start, processor = time.perf_counter(), time.process_time()
data = load_dataset(sys.argv[1], recheck="recheck" in sys.argv)
data.train.batch(batch_indices(len(data.train), 32, 0, 0))
seconds, processor = time.perf_counter() - start, time.process_time() - processor
print(json.dumps({"seconds": seconds, "cpu_seconds": processor, "megabytes": peak() - before, "resident": peak()}))
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


def settle(folder: Path) -> None:
    """Date all folders back: those that were modified a moment ago are listed anew at each start."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        os.utime(place, (0, 0))


def reopen(folder: Path, cache: Path, *options: str) -> dict[str, float]:
    """Return the seconds to the first batch, those of the processor, the megabytes beyond the imports, and in all."""
    environment = os.environ | {"PROSTATEVQ_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN, str(folder), *options]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def write_links(folder: Path, slices: int) -> None:
    """Fill a folder with links to few small slices, 20 a patient, with about 5 % each for validation and test."""
    originals = folder.with_name("originals")
    if not originals.exists():
        phantom.write_phantom(originals, cases=(ORIGINALS, 1, 1), size=LINKED_SIZE)
    of_split = {"train": slices - 2 * (slices // 20), "validate": slices // 20, "test": slices // 20}
    patient = 0
    for split in SPLITS:
        files = sorted(originals.glob(f"keras_slices_{split}/*.nii.gz"))
        target = folder / f"keras_slices_{split}"
        target.mkdir(parents=True)
        for number in range(of_split[split]):
            name = f"case_{patient + number // 20:06}_week_0_slice_{number % 20}.nii.gz"
            os.link(files[number % (20 * ORIGINALS if split == "train" else 20)], target / name)
        patient += -(-of_split[split] // 20)
    settle(folder)


def updates_on(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what loads the next batch of 32 slices, and an update of the demo preset's VQ-VAE on such a batch."""
    options = configure({"preset": "demo"})
    loader = BatchLoader(load_dataset(str(folder)).train, 3, options, CPU)
    model = channels_last(VQVAE(network_config(VQVAEConfig, options)), CPU)
    optimiser, numbers = make_optimiser(model, options), count(1)

    def load() -> torch.Tensor:
        return loader(next(numbers))[0]

    def loads() -> None:
        for _ in range(UPDATES):
            load()

    def updates() -> None:
        for _ in range(UPDATES):
            slices = load()
            reconstructions, embedding_loss, *_ = model(slices)
            optimiser_step(optimiser, [F.mse_loss(reconstructions, slices) + embedding_loss], options.gradient_clip)

    return loads, updates


def measure_links(slices: int, workers: int, settings: dict[str, Any]) -> None:
    """Measure what grows with the number of slices, beside FEW: print JSON lines and a summary."""
    settings = settings | {"slice_size": list(LINKED_SIZE)}
    with tempfile.TemporaryDirectory() as temporary:
        many, few, cache = (Path(temporary, name) for name in ("many", "few", "cache"))
        write_links(many, slices)
        write_links(few, FEW)
        os.environ["PROSTATEVQ_CACHE"] = str(cache)
        start = time.perf_counter()
        code = "import sys, dataset; dataset.load_dataset(sys.argv[1], workers=int(sys.argv[2]))"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(many), str(workers)], env=environment, check=True)
        first = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        opened = sorted((reopen(many, cache) for _ in range(3)), key=lambda one: one["seconds"])[1]
        listed = reopen(many, cache, "recheck")
        load_few, update_few = updates_on(few)
        load_many, update_many = updates_on(many)
        seconds = interleave(
            {"load_few": load_few, "load_many": load_many, "update_few": update_few, "update_many": update_many}, 7
        )
    of_update = {name: value / UPDATES for name, value in seconds.items()}
    report("links_first_pass_seconds", first, "s", slices=slices, **settings)
    report("links_first_pass_peak_megabytes", peak, "MB", slices=slices, **settings)
    for name, found in (("open", opened), ("recheck", listed)):
        report(f"links_{name}_seconds", found["seconds"], "s", slices=slices, **settings)
        report(f"links_{name}_cpu_seconds", found["cpu_seconds"], "s", slices=slices, **settings)
        report(f"links_{name}_resident_megabytes", found["resident"], "MB", slices=slices, **settings)
    for name, shown in (("few", FEW), ("many", slices)):
        report("links_batch_milliseconds", 1000 * of_update[f"load_{name}"], "ms", slices=shown, **settings)
        report("links_update_milliseconds", 1000 * of_update[f"update_{name}"], "ms", slices=shown, **settings)
    print(
        f"On {settings['machine']}: of {slices} slices the first batch takes {opened['seconds']:.2f} s "
        f"({listed['seconds']:.1f} s with --recheck) and {opened['resident']:.0f} MB; an update takes "
        f"{of_update['update_many'] / of_update['update_few']:.2f} times as long as of {FEW}."
    )


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--slices", type=int, default=12_660, help="slices in the reopened cache (default: 12660, as in HipMRI)"
    )
    parser.add_argument("--links", type=int, metavar="N", help="measure a folder of so many links instead")
    parser.add_argument("--workers", type=int, default=2, help="threads of the first pass (default: 2)")
    parser.add_argument("--profile", action="store_true", help="also print where the first pass spends its time")
    options = parser.parse_args()
    settings: dict[str, Any] = {"workers": options.workers, "machine": machine(CPU)}
    if options.links:
        measure_links(options.links, options.workers, settings)
        return
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
        settle(many)
        os.environ["PROSTATEVQ_CACHE"] = str(cache)
        start = time.perf_counter()
        load_dataset(str(many), workers=options.workers)
        total = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        opened = sorted((reopen(many, cache) for _ in range(3)), key=lambda one: one["seconds"])[1]
    settings["slice_size"] = [256, 128]
    report("first_pass_slices_per_second", ours, "slices/s", slices=len(images), **settings)
    for name in readers:
        report(f"{name}_slices_per_second", 500 / seconds[name], "slices/s", slices=500, **settings | {"workers": 1})
    report("first_pass_speedup", ours / nibabel, "times", **settings)
    report("first_pass_whole_seconds", total, "s", slices=options.slices, **settings)
    report("first_pass_peak_megabytes", peak, "MB", slices=options.slices, **settings)
    report("cache_open_seconds", opened["seconds"], "s", slices=options.slices, **settings)
    report("cache_open_megabytes", opened["megabytes"], "MB", slices=options.slices, **settings)
    if options.profile:
        with tempfile.TemporaryDirectory() as temporary:
            write(Path(temporary), 200)
            profile(lambda: first_pass(Path(temporary), options.workers), torch.device("cpu"))
    print(
        f"On {settings['machine']}: the first pass reads {ours:.0f} slices/s ({ours / nibabel:.1f} times as fast as "
        f"nibabel); {options.slices} slices take {total:.1f} s once, and {opened['seconds']:.2f} s and "
        f"{opened['megabytes']:.0f} MB "
        "afterwards."
    )


if __name__ == "__main__":
    main()
