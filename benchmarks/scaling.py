"""Seconds per update of the full preset in one process and in several, which torchrun starts.

    python benchmarks/scaling.py [--processes 1 2] [--device cpu] [--rounds 3]

On a CPU the processes share its cores: one with two threads, two with one thread each, and so on. Also the seconds that
adding up the gradients of each network takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, report

import distributed
import phantom
import train
import trainer
from checkpoints import NoRun
from config import TrainConfig
from dataset import load_dataset
from modules import VQVAE, VQVAEConfig
from utils import channels_last, pick_device

SIZE, CASES = (256, 128), (8, 1, 1)  # slices, and patients of the phantom
WARM_UP = 2  # updates before the first that is timed


def trainers(data: str, device: torch.device) -> Iterator[trainer.Trainer]:
    """Yield the trainers of the full preset's three networks, with random weights."""
    options = TrainConfig(encoder_warmup=0, std_slices=32)
    splits, run, stop = load_dataset(data), NoRun(Path(data)), trainer.StopSignals()
    loader = trainer.BatchLoader(splits.train, 2, options, device)
    yield train.VQVAETrainer(run, stop, options, loader, splits)
    torch.manual_seed(0)
    vqvae = channels_last(VQVAE(VQVAEConfig()), device).eval()
    yield train.PriorTrainer(run, stop, options, loader, splits, vqvae)
    yield train.RefinerTrainer(run, stop, options, loader, splits, vqvae)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, begun by all processes together and measured until the GPU has finished."""
    distributed.wait_for_all()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(data: str, device_name: str, updates: int) -> None:
    """Print the medians of this number of processes as JSON: what each of the processes runs."""
    with distributed.processes():
        device = pick_device(distributed.device_name(device_name))
        found: dict[str, object] = {"machine": machine(device)}
        for made in trainers(data, device):
            seconds = []
            for made.update in range(1, WARM_UP + updates + 1):
                seconds.append(seconds_of(made.train_update, device))
            gradients = [weight.grad for weight in made.model.parameters() if weight.grad is not None]
            exchange = [seconds_of(lambda: distributed.average(gradients, 1.0), device) for _ in range(20)]  # noqa: B023
            found[f"{made.stage}_update"] = statistics.median(seconds[WARM_UP:])
            found[f"{made.stage}_exchange"] = statistics.median(exchange) if distributed.size() > 1 else 0.0
        if distributed.is_first():
            print(json.dumps(found), flush=True)


def run(count: int, data: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start processes that `measure`; return what the first prints."""
    command = [sys.executable, __file__, "--data", data, "--device", options.device, "--updates", str(options.updates)]
    if count > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the benchmark: print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: GPUs if there are any)")
    parser.add_argument("--updates", type=int, default=5, help="timed updates of each network (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each number of processes (default: 3)")
    parser.add_argument("--data", help=argparse.SUPPRESS)  # given to the processes that this script starts
    options = parser.parse_args()
    if options.data:
        measure(options.data, options.device, options.updates)
        return
    medians: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_phantom(Path(folder), CASES, slices=8, size=SIZE)
        for _ in range(options.rounds):  # in turn, so that slow minutes of the machine affect all
            for count in options.processes:
                found = run(count, folder, options)
                device = found.pop("machine")
                for name, seconds in found.items():
                    medians[count, name].append(seconds)
    for (count, name), seconds_found in medians.items():
        report(f"{name}_seconds", statistics.median(seconds_found), "s", processes=count, machine=device)


if __name__ == "__main__":
    main()
