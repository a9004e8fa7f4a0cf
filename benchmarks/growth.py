"""How the cost of sampling and training grows: with samples, with training slices, with pixels. Linux only.

    python benchmarks/growth.py [--nums 100 1000 10000] [--figure images/growth.png]

With networks of the full preset, in 8x8 pixels per code. Seconds and peak memory of predict.py are those of whole
commands. Many training slices are links to few files of 32x32 pixels (see loading.py), which leaves little to compute:
what grows with their number would show. Prints JSON lines and draws a figure.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path

import torch
from commands import sample, train_briefly
from common import interleave, machine, report
from loading import write_links
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sampling import make_networks, sample_and_decode
from scaling import trainers

import phantom
from modules import VQVAEConfig
from plots import save_figure
from trainer import Trainer
from utils import pick_device

LINKS = (2400, 240_000)  # slices
SIZES = ((128, 64), (256, 128), (512, 256))  # of slices, in pixels
CASES, SLICES_PER_CASE = (4, 1, 1), 16  # of the phantom at each of these sizes: two batches for training
SAMPLES = 32  # of each size: a batch of predict.py
STYLES = {  # label, colour and marker
    "sample": ("one sample", "#c2410c", "o"),
    "vqvae": ("update, VQ-VAE", "#0f766e", "s"),
    "prior": ("update, prior", "#b59f3b", "^"),
    "refiner": ("update, refiner", "#4b5563", "D"),
}

Curve = Mapping[int, float]  # values by what they grow with


def updates_of(folder: Path, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return what makes the next update on a folder of slices, by network."""

    def update(made: Trainer, numbers: Iterator[int]) -> None:
        made.update = next(numbers)
        made.train_update()

    return {made.stage: partial(update, made, count(1)) for made in trainers(str(folder), device)}


def in_turns(groups: Mapping[int, Mapping[str, Callable[[], object]]], rounds: int) -> dict[str, dict[int, float]]:
    """Return the seconds of functions, by name and amount; the amounts of a name take turns."""
    names = next(iter(groups.values()))
    return {name: interleave({amount: of[name] for amount, of in groups.items()}, rounds) for name in names}


def measure_links(folder: Path, device: torch.device, rounds: int) -> dict[str, dict[int, float]]:
    """Return the seconds per update of each network, by the number of slices."""
    for slices in LINKS:
        write_links(folder / f"links_{slices}", slices)
    return in_turns({slices: updates_of(folder / f"links_{slices}", device) for slices in LINKS}, rounds)


def measure_sizes(folder: Path, device: torch.device, rounds: int) -> dict[str, dict[int, float]]:
    """Return the seconds per sample, and per update of each network, by the number of pixels of a slice."""
    groups: dict[int, dict[str, Callable[[], object]]] = {}
    for height, width in SIZES:
        slices, config = folder / f"{height}x{width}", VQVAEConfig()
        phantom.write_phantom(slices, CASES, slices=SLICES_PER_CASE, size=(height, width))
        networks = make_networks(config, (height // config.downsampling, width // config.downsampling), device)
        draw = partial(sample_and_decode, networks, SAMPLES, SAMPLES, device)
        groups[height * width] = {"sample": draw, **updates_of(slices, device)}
    found = in_turns(groups, rounds)
    found["sample"] = {pixels: seconds / SAMPLES for pixels, seconds in found["sample"].items()}
    return found


def draw_growth(axes: Axes, curves: Mapping[str, Curve], ticks: Mapping[int, str], texts: tuple[str, str, str]) -> None:
    """Draw curves, by their style, over a logarithmic axis; `texts` are the title and the labels of both axes."""
    for style, curve in curves.items():
        label, colour, marker = STYLES[style]
        axes.plot(list(curve), list(curve.values()), color=colour, marker=marker, markersize=5, label=label)
    title, below, left = texts
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xscale="log", xlabel=below, ylabel=left)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)
    axes.set_ylim(0, 1.1 * max(value for curve in curves.values() for value in curve.values()))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def growth_figure(
    path: Path, seconds: Curve, megabytes: Curve, links: Mapping[str, Curve], sizes: Mapping[str, Curve]
) -> None:
    """Draw a sample's seconds and the peak memory by the number of samples, then the results of `measure_...`."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    time, memory, many, size = figure.subplots(1, 4, width_ratios=(3, 3, 3, 4))
    samples, slices = ({amount: f"{amount:,}" for amount in amounts} for amounts in (seconds, LINKS))
    pixels = {height * width: f"{height}x{width}" for height, width in SIZES}
    milliseconds = {name: {amount: 1000 * value for amount, value in curve.items()} for name, curve in links.items()}
    draw_growth(time, {"sample": seconds}, samples, ("predict.py", "samples", "seconds per sample"))
    draw_growth(memory, {"sample": megabytes}, samples, ("predict.py: memory", "samples", "peak in MB"))
    draw_growth(many, milliseconds, slices, ("updates by number of slices", "slices of 32x32 pixels", "milliseconds"))
    draw_growth(size, sizes, pixels, ("by size of slices", "pixels", "seconds"))
    first, last = min(pixels), max(pixels)
    reference = 0.6 * min(curve[first] for curve in sizes.values())
    size.plot([first, last], [reference, reference * last / first], ":k", linewidth=0.8, label="proportional")
    size.set_yscale("log")
    size.autoscale(axis="y")
    size.yaxis.set_major_formatter("{x:g}")
    many.legend(frameon=False, fontsize=8, loc="lower left")
    size.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def main() -> None:
    """Run the benchmark: print JSON lines, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nums", type=int, nargs="+", default=[100, 1000], help="samples (default: 100 1000)")
    parser.add_argument("--rounds", type=int, default=2, help="timings of each update (default: 2)")
    parser.add_argument("--figure", type=Path, default=Path("images/growth.png"), help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    options = parser.parse_args()
    device = pick_device(options.device)
    settings = {"machine": machine(device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["PROSTATEVQ_CACHE"] = f"{folder}/cache"
        run = train_briefly(folder, options.device)
        of_sample, megabytes = dict[int, float](), dict[int, float]()
        for num in options.nums:  # before the updates in this process: see `run_command`
            seconds, megabytes[num] = sample(run, num, options.device)
            of_sample[num] = seconds / num
            report("predict_seconds_per_sample", of_sample[num], "s", samples=num, **settings)
            report("predict_peak_memory", megabytes[num], "MB", samples=num, **settings)
        links = measure_links(folder, device, options.rounds)
        for stage, curve in links.items():
            for slices, seconds in curve.items():
                report(f"{stage}_update_seconds", seconds, "s", slices=slices, slice_size=[32, 32], **settings)
        sizes = measure_sizes(folder, device, options.rounds)
        for name, curve in sizes.items():
            what = "seconds_per_sample" if name == "sample" else f"{name}_update_seconds"
            for (height, width), seconds in zip(SIZES, curve.values()):
                report(what, seconds, "s", slice_size=[height, width], **settings)
    growth_figure(options.figure, of_sample, megabytes, links, sizes)
    print(options.figure)


if __name__ == "__main__":
    main()
