"""The run directory (config, checkpoints, metrics log), figures, device and seed."""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path

import nibabel as nib
import numpy as np
import safetensors
import safetensors.torch
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from torch import nn

LIBRARIES = ("torch", "numpy", "nibabel", "torchmetrics", "safetensors")
# Options that say where a run's files go or what computes them, not what it is.
FREE_OPTIONS = ("run", "images", "device", "data")


class RunError(Exception):
    """A run directory that cannot be used as asked; its text is for the user."""


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line starting `error:`, exit status 2."""

    def error(self, message: str):
        fail(f"{message} (--help lists the options)")


def fail(message: object):
    """Print `error: message` on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number of `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            start = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {start}" + f" and at most {high}" * (high < math.inf))
        return value

    parse.__name__ = kind.__name__  # argparse names it in `invalid int value`
    return parse


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where PyTorch sees one. Raises RunError for others."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        there = torch.zeros(1, device=name)
        there.cpu()  # "meta" has no values to copy
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return there.device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the processor computes in it natively; off elsewhere, where it would be slower."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, lambda: False)() for name in asked)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def seed_update(seed: int, stage: str, update: int) -> None:
    """Seed PyTorch for one update, so that a resumed run draws what an unbroken one does, with no state kept."""
    torch.manual_seed(np.random.SeedSequence([seed, *stage.encode(), update]).generate_state(1, np.uint64).item())


def left_right_axis(affine: np.ndarray) -> int | None:
    """The axis of slices (N, 1, H, W) that runs from side to side: 2 in HipMRI's, none in sagittal slices."""
    sides = [code in ("L", "R") for code in nib.aff2axcodes(affine)[:2]]
    return 2 + sides.index(True) if any(sides) else None


class StopSignals:
    """While it is entered, SIGINT and SIGTERM are noted in `.received`; the second one stops at once."""

    def __enter__(self):
        self.received = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- run directory


def make_folder(path: Path) -> None:
    """Make a folder where it is missing. Raises RunError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path} cannot be a folder: {error.strerror}") from None


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary path)`, flush to disk, rename: path holds all of the old or all of the new."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Run:
    """One training's directory.

    Raises RunError where the directory holds something else, or a run made with other options or data.
    """

    def __init__(self, path: Path, config: dict):
        self.path = path
        config = json.loads(json.dumps(config))  # as it will be read back
        if (path / "config.json").exists():
            refuse_differences(path, read_config(path), config)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} exists and is not a run directory: choose another --run")
        else:
            config["libraries"] = {name: metadata.version(name) for name in LIBRARIES}
            make_folder(path)
            write_file(path / "config.json", lambda part: part.write_text(json.dumps(config, indent=1)))
        self.log_path = path / "metrics.jsonl"
        self.log_path.touch()

    def save(self, **state) -> None:
        """Write training.pt: plain types and tensors, and where the metrics log ends."""
        with open(self.log_path, "rb+") as file:
            os.fsync(file.fileno())
            state["log_bytes"] = os.fstat(file.fileno()).st_size
        write_file(self.path / "training.pt", lambda part: torch.save(state, part))

    def load(self) -> dict:
        """What `save` was last given, or {}; lines logged after it are dropped: they will be logged anew."""
        path = self.path / "training.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
            raise RunError(f"{path} cannot be used ({type(error).__name__}): choose another --run") from None
        os.truncate(self.log_path, min(state.get("log_bytes", 0), self.log_path.stat().st_size))
        return state

    def log(self, stage: str, split: str, update: int, values: dict[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        line = {"stage": stage, "split": split, "update": update}
        line |= {name: float(f"{value:.6g}") for name, value in values.items()}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def curves(self, stage: str) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """(split, name) to updates and values, of all that was logged in a stage."""
        curves = defaultdict(lambda: ([], []))
        for line in map(json.loads, self.log_path.read_text().splitlines()):
            if line.pop("stage") == stage:
                split, update = line.pop("split"), line.pop("update")
                for name, value in line.items():
                    curves[split, name][0].append(update)
                    curves[split, name][1].append(value)
        return dict(curves)


def refuse_differences(path: Path, old: dict, new: dict) -> None:
    """Raise RunError naming each option in which two configs differ."""
    names = [name for name in new["options"] if name not in FREE_OPTIONS]
    differing = [
        f"--{name.replace('_', '-')} was {old['options'].get(name)}, is {new['options'][name]}"
        for name in names
        if old["options"].get(name) != new["options"][name]
    ]
    if old["fingerprint"] != new["fingerprint"]:
        differing.append(f"the data differ: --data was {old['options']['data']}, is {new['options']['data']}")
    if differing:
        raise RunError(f"{path} holds a run made with other options ({'; '.join(differing)}): choose another --run")


def read_config(path: Path) -> dict:
    """A run's config.json. Raises RunError where there is none or it cannot be read."""
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict) or not {"options", "fingerprint"} <= config.keys():
            raise ValueError("it is not a run's config")
        return config
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (no config.json): train first, or name one with --run") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path / 'config.json'} cannot be read: {error}") from None


def save_weights(path: Path, network: nn.Module) -> None:
    """Weights as safetensors, with the network's config as JSON in the file's metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    header = {"config": json.dumps(asdict(network.config))}
    content = safetensors.torch.save(tensors, header)  # save_file would hide the file from a group's other members
    write_file(path, lambda part: part.write_bytes(content))


def load_weights(path: Path, network: Callable[..., nn.Module], config: type) -> nn.Module:
    """The network that `save_weights` wrote, in evaluation mode. Raises RunError where it cannot be."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["config"])
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            made = network(config(**fields))
            made.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 not a dict
    except FileNotFoundError:
        raise RunError(f"{path} does not exist: train.py has not come that far") from None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} cannot be used: {error}") from None
    return made.eval()


def tensorboard(path: Path, update: int):
    """A TensorBoard writer that goes on at `update`, or None where tensorboard is not installed."""
    if util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # costs a second; needed by train.py alone

    return SummaryWriter(path, purge_step=update + 1)


# ---------------------------------------------------------------- figures

TRAIN, VALIDATE = "#9aa5b1", "#c2410c"
COMPARED = {"samples": "#c2410c", "decoder alone": "#0f766e", "prior alone": "#b59f3b", "floor": "#9aa5b1"}


def upright(slices: np.ndarray) -> np.ndarray:
    """Slices (..., H, W) as they are looked at (..., W, H): front of the patient on top, sides left and right."""
    return slices.swapaxes(-1, -2)


def spread(count: int, most: int = 6) -> np.ndarray:
    """At most `most` indices evenly spread over [0, count): what a figure shows of many."""
    return np.unique(((np.arange(most) + 0.5) * count / most).astype(int))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    make_folder(path.parent)
    write_file(path, lambda part: figure.savefig(part, format="png", dpi=120))


def draw_curves(axes: Axes, curves: dict, name: str, title: str, unit: str) -> None:
    """Training and validation of one logged value against updates."""
    for split, colour, width in (("train", TRAIN, 1.0), ("validate", VALIDATE, 1.8)):
        if (split, name) in curves:
            label = {"train": "training", "validate": "validation"}[split]
            axes.plot(*curves[split, name], color=colour, linewidth=width, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def vqvae_loss_figure(path: Path, curves: dict) -> None:
    """The three losses of stage 1, and SSIM."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = (
        ("reconstruction_loss", "reconstruction loss", "MSE, slices in [-1, 1]"),
        ("embedding_loss", "embedding loss", "commitment"),
        ("total_loss", "total loss", "sum"),
    )
    all_axes = figure.subplots(1, 4)
    for axes, (name, title, unit) in zip(all_axes, panels):
        draw_curves(axes, curves, name, title, unit)
        axes.set_yscale("log")
    draw_curves(all_axes[3], curves, "ssim", "reconstructions", "SSIM")
    all_axes[0].legend(frameon=False)
    save_figure(figure, path)


def prior_loss_figure(path: Path, curves: dict, codes: int) -> None:
    """The loss of stage 2, with the uniform distribution's as the mark to start from."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, "bits_per_code", "loss of the prior", "bits a code")
    axes.axhline(math.log2(codes), color="black", linewidth=0.8, linestyle=":", label=f"uniform over {codes} codes")
    updates, losses = curves["validate", "bits_per_code"]
    best = int(np.argmin(losses))
    axes.plot(updates[best], losses[best], "o", color=VALIDATE, label=f"kept: {losses[best]:.2f} bits")
    axes.legend(frameon=False)
    save_figure(figure, path)


def codebook_figure(path: Path, curves: dict, counts: np.ndarray) -> None:
    """How many codes are used and how evenly: over the updates, and at the end on validation slices."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, curves, "perplexity", f"perplexity of the codes (at most {len(counts)})", "codes")
    left.axhline(len(counts), color="black", linewidth=0.8, linestyle=":")
    left.set_ylim(0, 1.05 * len(counts))
    left.legend(frameon=False, loc="lower right")
    share = np.sort(counts / counts.sum())[::-1]
    right.fill_between(np.arange(len(share)), share, step="mid", color=VALIDATE, alpha=0.8)
    right.axhline(1 / len(share), color="black", linewidth=0.8, linestyle=":", label="even use")
    right.set_title(f"use on validation slices: {(counts > 0).mean():.0%} of codes", fontsize=10, loc="left")
    right.set_xlabel("code, most used first")
    right.set_ylabel("share of all codes")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_xlim(0, len(share))
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    save_figure(figure, path)


def reconstructions_figure(
    path: Path,
    slices: np.ndarray,
    reconstructions: np.ndarray,
    titles: Sequence[str],
    labels: tuple[str, str] = ("slice", "reconstruction"),
    limit: float = 0.2,
) -> None:
    """Slices (n, H, W) in [-1, 1] above their reconstructions, or what `labels` says, and the difference, up to `limit`
    of the range."""
    height, width = upright(slices).shape[1:]
    figure = Figure(figsize=(2.4 * len(slices), 2.4 * 3 * height / width + 0.5), layout="constrained")
    rows = figure.subplots(3, len(slices), squeeze=False)
    for column, title in enumerate(titles):
        rows[0, column].set_title(title, fontsize=8)
        rows[0, column].imshow(upright(slices[column]), cmap="gray", vmin=-1, vmax=1)
        rows[1, column].imshow(upright(reconstructions[column]), cmap="gray", vmin=-1, vmax=1)
        difference = (reconstructions - slices)[column] / 2
        shown = rows[2, column].imshow(upright(difference), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for row, label in zip(rows, (*labels, "difference")):
        row[0].set_ylabel(label, fontsize=9)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=rows[2].tolist(), fraction=0.02, pad=0.01, format=PercentFormatter(1, decimals=0))
    bar.set_label("of the range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


# Figures of samples: name in evaluation.json, title, format, what is better.
PANELS = (
    ("two_sample_accuracy", "two-sample accuracy", ".2f", "0.5 is perfect, 1 the worst"),
    ("coverage", "coverage", ".2f", "higher is better"),
    ("density", "density", ".2f", "the floor's is best"),
    ("frechet_distance", "Fréchet distance", ".1f", "lower is better"),
    ("sliced_wasserstein", "sliced Wasserstein", ".3f", "lower is better"),
    ("ms_ssim_diversity", "MS-SSIM diversity", ".2f", "the floor's is best"),
)


def evaluation_figure(
    path: Path, results: dict, strips: dict[str, np.ndarray], distances: dict[str, np.ndarray], title: str
) -> None:
    """What an evaluation found, as in evaluation.json, from top to bottom: strips of slices (n, H, W), each under its
    name; the figures of samples; distances (N,) from the nearest training slice, samples first; bits a slice."""
    count, height, width = next(iter(strips.values())).shape
    inches = len(strips) * 11.6 / count * width / height
    figure = Figure(figsize=(12, inches + 5.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    figure.suptitle(title, fontsize=11, x=0.008, ha="left")
    above, middle, below = figure.subfigures(3, 1, height_ratios=(inches, 2.1, 2.6), hspace=0.03)
    draw_strips(above, strips)

    parts = [results, *(results[name.replace(" ", "_")] for name in list(COMPARED)[1:])]
    panels = middle.subplots(1, len(PANELS), sharey=True)
    for axes, (name, panel, form, better) in zip(panels, PANELS):
        values = dict(zip(COMPARED, [part["samples"][name] for part in parts]))
        draw_bars(axes, values, COMPARED.values(), form, panel, better)
        axes.axvline(values["floor"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    middle.supxlabel(
        "samples: beside held-out slices  ·  decoder alone: reconstructions of training slices in their place  ·  "
        "prior alone: samples beside reconstructions of held-out slices  ·  floor: training slices in their place",
        fontsize=8,
    )

    left, right = below.subplots(1, 2, width_ratios=(2, 1))
    copying = results["prior_alone"]["copying"]
    nearer = f"{copying['share_nearer_than_heldout']:.1%} of samples nearer than any reconstruction"
    draw_distances(left, distances, f"copying: statistic {copying['statistic']:+.1f} (copies: far below 0), {nearer}")
    bits = {
        "prior": results["prior"]["bits_per_slice"],
        "JPEG 2000": results["prior"]["jpeg2000_bits_per_slice"],
        "plain codes": results["reconstructions"]["bits_per_pixel"] * height * width,
    }
    colours = (COMPARED["samples"], COMPARED["floor"], COMPARED["floor"])
    quality = f"bits a held-out slice at {results['reconstructions']['psnr']:.1f} dB"
    draw_bars(right, bits, colours, ",.0f", quality, "fewer are better")
    save_figure(figure, path)


def draw_strips(figure: SubFigure, strips: dict[str, np.ndarray]) -> None:
    """Rows of slices (n, H, W) in [-1, 1] with their names."""
    columns = len(next(iter(strips.values())))
    for row, (label, slices) in zip(figure.subplots(len(strips), columns, squeeze=False), strips.items()):
        row[0].set_ylabel(label, fontsize=9)
        for axes, picture in zip(row, upright(slices)):
            axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)


def draw_bars(axes: Axes, values: dict[str, float], colours: Iterable[str], form: str, title: str, better: str) -> None:
    """Named values as bars from top to bottom, each with its number."""
    bars = axes.barh(list(values), list(values.values()), color=list(colours), height=0.7)
    for label in axes.bar_label(bars, [f"{value:{form}}" for value in values.values()], padding=3, fontsize=8):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(values.values()) or 1)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(better, fontsize=8, loc="left")
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_distances(axes: Axes, distances: dict[str, np.ndarray], title: str) -> None:
    """Histograms of distances from the nearest training slice, on the same bins."""
    every = np.concatenate(list(distances.values()))
    bins = np.linspace(every.min(), every.max() + 1e-6, 41)
    for (label, values), colour in zip(distances.items(), (COMPARED["samples"], COMPARED["decoder alone"], "black")):
        share = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.25)
        axes.hist(values, bins, weights=share, color=colour, histtype="step", linewidth=1.4, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("distance from the nearest training slice, root mean square of slices in [-1, 1]", fontsize=8)
    axes.set_ylabel("share of slices", fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def samples_figure(path: Path, slices: np.ndarray, title: str, columns: int = 8) -> None:
    """A sheet of slices (n, H, W) in [-1, 1]; small ones are drawn larger, by a whole number."""
    pictures = upright(slices)
    n, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = 3
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    inches = np.array(sheet.shape[::-1]) * max(1, 256 // width) / 120
    figure = Figure(figsize=(inches[0], inches[1] + 0.35))
    axes = figure.add_axes((0, 0, 1, inches[1] / (inches[1] + 0.35)))
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.text(0.004, 1 - 0.18 / (inches[1] + 0.35), title, va="center", fontsize=11)
    save_figure(figure, path)


class Clock:
    """Says when `seconds` have passed since it last said so."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether it is time; starts anew if so."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
