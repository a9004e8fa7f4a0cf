"""Check that a GPU computes the same as the CPU, and how fast.

    python benchmarks/gpu.py [--device cuda] [--out runs/gpu]
    python benchmarks/gpu.py --device cpu --tiny        # without a GPU: check that the script runs

Trains all three networks on a small phantom, with a stop and a resume. Compares training, networks, samples,
reconstructions and evaluation with those of the CPU. Then runs benchmarks/training.py and benchmarks/sampling.py with
the published sizes and K = 2048. Writes OUT/report.json and OUT/report.md. The exit status is 1 if a value is out of
its tolerance.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import ROOT, machine, run_benchmark
from torch import Tensor

import evaluate
import metrics
import phantom
import predict
import train
from checkpoints import read_config
from console import RunError, nonempty, run_command
from dataset import load_dataset
from modules import RowSampler
from utils import autocast, pick_device

SIZES = {True: (64, 32), False: (128, 64)}  # of slices, by --tiny
UPDATES = {True: (12, 6, 6), False: (300, 300, 300)}  # of the three networks
TOLERANCES = {  # of values in evaluation.json, relative to the CPU's
    ("reconstructions", "ssim"): 1e-3,
    ("reconstructions", "psnr"): 1e-3,
    ("codes", "perplexity"): 1e-3,
    ("prior", "bits_per_code"): 1e-3,
    ("baseline", "samples", "random_feature_frechet"): 1e-3,
    ("baseline", "samples", "sliced_wasserstein"): 1e-3,
    ("baseline", "samples", "ms_ssim_diversity"): 1e-3,
    ("baseline", "samples", "coverage"): 1e-3,
    ("baseline", "copying", "median_distance"): 1e-3,
}
SAMPLED = {("samples", "c2st_accuracy"), ("samples", "coverage"), ("copying", "median_distance")}


@dataclass(frozen=True)
class Row:
    """A value on both devices and the tolerance of their difference; without a tolerance it is only reported."""

    name: str
    cpu: float
    gpu: float
    tolerance: float | None = None

    @property
    def fits(self) -> bool:
        return self.tolerance is None or abs(self.cpu - self.gpu) <= self.tolerance


def arguments(run: Path, device: torch.device) -> list[str]:
    """Return the command-line options of a run."""
    return ["--run", str(run), "--images", str(run.parent / "images"), "--device", str(device)]


def train_options(out: Path, device: torch.device, tiny: bool) -> list[str]:
    """Return the options of a training of the demo's networks."""
    names = ("--updates", "--prior-updates", "--refiner-updates")
    updates = [text for name, count in zip(names, UPDATES[tiny]) for text in (name, str(count))]
    return [*arguments(out / "run", device), "--data", str(out.parent / "slices"), "--preset", "demo", *updates]


def train_with_a_stop(options: list[str], run: Path) -> None:
    """Run train.py, stop it by two SIGTERMs once the prior is in training, and resume it."""
    command = [sys.executable, str(ROOT / "train.py"), *options]
    with subprocess.Popen(command) as process:
        while process.poll() is None and '"stage": "prior"' not in text_of(run / "metrics.jsonl"):
            time.sleep(0.02)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
    if process.returncode not in (143, 0):  # 0: it was complete before the signal
        raise SystemExit(f"train.py ended with {process.returncode}")
    subprocess.run(command, check=True)


def text_of(path: Path) -> str:
    """Return a file's text, "" if it does not exist."""
    return path.read_text() if path.exists() else ""


def compare_trainings(out: Path) -> Iterator[Row]:
    """Compare the last validations. Dropout, noise and augmentation have each device's own random numbers."""
    last = []
    for device in ("cpu", "gpu"):
        lines = [json.loads(line) for line in (out / device / "run" / "metrics.jsonl").read_text().splitlines()]
        last.append({line["stage"]: line for line in lines if line["split"] == "validate"})
    for stage, name, share in (
        ("vqvae", "reconstruction_loss", 0.15),
        ("vqvae", "ssim", 0.05),
        ("prior", "bits_per_code", 0.05),
        ("refiner", "flow_loss", 0.05),
    ):
        cpu, gpu = (of[stage][name] for of in last)
        yield Row(f"trained: {stage}, {name}", cpu, gpu, share * abs(cpu))


@torch.no_grad()
def compare_networks(
    networks: Callable[[torch.device], predict.Networks], slices: Tensor, device: torch.device
) -> Iterator[Row]:
    """Compare the same networks on the same slices (N, 1, H, W), in float32 and in the data type of training."""
    on_cpu, on_gpu = networks(torch.device("cpu")), networks(device)
    codes, on_device = on_cpu.vqvae.encode(slices), slices.to(device)
    equal = (on_gpu.vqvae.encode(on_device).cpu() == codes).double().mean().item()
    yield Row("share of codes that are equal", 1.0, equal, 1e-3)
    decoded, decoded_on_gpu = on_cpu.vqvae.decode(codes), on_gpu.vqvae.decode(codes.to(device))
    yield Row("largest difference of a decoded pixel", 0.0, largest_difference(decoded, decoded_on_gpu), 1e-4)
    ssim = metrics.reconstruction_metrics()(decoded, slices)["ssim"].item()
    ssim_on_gpu = metrics.reconstruction_metrics().to(device)(decoded.to(device), on_device)["ssim"].item()
    yield Row("SSIM of the same reconstructions", ssim, ssim_on_gpu, 1e-4)
    positions = torch.linspace(0, 1, len(slices))
    given = codes.to(device), positions.to(device)
    nats = on_cpu.prior.nll(codes, positions).item()
    yield Row("prior, nats per code", nats, on_gpu.prior.nll(*given).item(), 1e-3)
    with autocast(device):
        yield Row("prior, nats per code, as in training", nats, on_gpu.prior.nll(*given).item(), 2e-2)
    torch.manual_seed(0)
    x, times = torch.randn(slices.shape), torch.linspace(0, 1, len(slices))
    velocities = [
        of.refiner(
            x.to(where),
            times.to(where),
            of.refiner.condition(codes.to(where), of.vqvae.decode(codes.to(where))),
        )
        for of, where in ((on_cpu, "cpu"), (on_gpu, device))
    ]
    yield Row("largest difference of a velocity", 0.0, largest_difference(*velocities), 1e-3)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors, on any devices."""
    return (one.cpu() - other.cpu()).abs().max().item()


def compare_sampling(networks: predict.Networks, device: torch.device, count: int) -> Iterator[Row]:
    """Compare sampling by a CUDA graph with sampling without it, and a batch with single samples."""
    prior, positions = networks.prior, torch.linspace(0, 1, count, device=device)
    settings: dict[str, Any] = {"top_p": predict.TOP_P, "guide": networks.guide}
    replayed = prior.sample(range(count), positions, **settings)
    with mock.patch.object(RowSampler, "capture_graph", lambda sampler: sampler.sample_row):
        computed = prior.sample(range(count), positions, **settings)
    yield Row("share of equal codes, CUDA graph vs. no graph", 1.0, share_equal(replayed, computed), 0.0)
    single = [prior.sample([n], positions[n : n + 1], **settings) for n in range(4)]
    yield Row("share of equal codes, batch vs. single samples", 1.0, share_equal(replayed[:4], torch.cat(single)), 1e-2)


def share_equal(one: Tensor, other: Tensor) -> float:
    """Return the share of elements that are equal."""
    return (one == other).double().mean().item()


def run_commands(out: Path, run: Path, device: torch.device, count: int) -> dict[str, Any]:
    """Sample, reconstruct and evaluate on a copy of the run; return the content of evaluation.json."""
    copied = out / "of_gpu"
    shutil.copytree(run, copied)
    common, folder = arguments(copied, device), ["--out", str(out / "slices")]
    predict.main([*common, *folder, "--num", str(count)])
    predict.main([*common, *folder, "--reconstruct", str(out.parent / "slices" / "keras_slices_test")])
    evaluate.main([*common, "--num", str(count)])
    return json.loads((copied / "evaluation.json").read_text())


def compare_evaluations(cpu: dict[str, Any], gpu: dict[str, Any]) -> Iterator[Row]:
    """Compare evaluations of the same networks; samples have each device's random numbers and are only reported."""
    for path in (*TOLERANCES, *sorted(SAMPLED)):
        one, other = (value_at(path, results) for results in (cpu, gpu))
        tolerance = TOLERANCES[path] * abs(one) if path in TOLERANCES else None
        yield Row("evaluation: " + ", ".join(path), one, other, tolerance)


def value_at(path: Sequence[str], results: Any) -> float:
    """Return the value at a path of keys in nested objects."""
    for name in path:
        results = results[name]
    return results


def table(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [f"{report['machine']}, PyTorch {report['torch']}, {report['date']}", ""]
    lines += ["| value | CPU | GPU | tolerance | |", "|---|---|---|---|---|"]
    for row in report["rows"]:
        tolerance = "" if row["tolerance"] is None else f"{row['tolerance']:.2g}"
        verdict = "" if row["tolerance"] is None else "yes" if row["fits"] else "NO"
        lines.append(f"| {row['name']} | {row['cpu']:.5g} | {row['gpu']:.5g} | {tolerance} | {verdict} |")
    if report["speeds"]:
        lines += ["", "| speed | |", "|---|---|"]
        lines += [f"| {of['name'].replace('_', ' ')} | {of['value']:.4g} {of['unit']} |" for of in report["speeds"]]
    return "\n".join([*lines, "", f"{report['seconds']:.0f} s"])


def check(out: Path, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Run all comparisons and benchmarks; return the report."""
    start, count = time.monotonic(), 4 if tiny else 64
    print(f"On {machine(device)}")
    phantom.write_phantom(out / "slices", cases=(6, 2, 2), slices=4 if tiny else 10, size=SIZES[tiny], workers=1)
    train_with_a_stop(train_options(out / "gpu", device, tiny), out / "gpu" / "run")
    train.main(train_options(out / "cpu", torch.device("cpu"), tiny))
    run = out / "gpu" / "run"
    config, data = read_config(run), load_dataset(str(out / "slices"), SIZES[tiny])

    def networks(where: torch.device) -> predict.Networks:
        return predict.load_networks(run, config, where)

    rows = [*compare_trainings(out), *compare_networks(networks, data.test.batch(range(len(data.test))), device)]
    rows += compare_sampling(networks(device), device, count)
    evaluations = [
        run_commands(out / name, run, where, count) for name, where in (("cpu", torch.device("cpu")), ("gpu", device))
    ]
    rows += compare_evaluations(*evaluations)
    given = ("--device", str(device), "--codes", "2048")
    scripts = () if tiny else ("training.py", "sampling.py")
    speeds = [line for script in scripts for line in run_benchmark(script, *given)]
    return {
        "machine": machine(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.monotonic() - start,
        "rows": [asdict(row) | {"fits": row.fits} for row in rows],
        "speeds": speeds,
    }


def main() -> None:
    """Run the check, print the table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu (default: cuda)")
    parser.add_argument(
        "--out",
        type=nonempty(Path),
        default=Path("runs/gpu"),
        help="folder of the report, replaced if it holds one (default: %(default)s)",
    )
    parser.add_argument("--tiny", action="store_true", help="a few updates on small slices, no benchmarks")
    options = parser.parse_args()
    device = pick_device(options.device)
    if (options.out / "report.json").exists():
        shutil.rmtree(options.out)
    elif options.out.exists():
        raise RunError(f"{options.out} exists and holds no report of this check: choose another --out")
    options.out.mkdir(parents=True)
    (options.out / "report.json").write_text("{}")  # so that an interrupted check can be repeated
    report = check(options.out, device, options.tiny)
    (options.out / "report.json").write_text(json.dumps(report, indent=1))
    (options.out / "report.md").write_text(table(report) + "\n")
    print(table(report))
    if not all(row["fits"] for row in report["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
