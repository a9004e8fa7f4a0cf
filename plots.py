"""Figures: numbers and slices in, a PNG out.

Slices are (n, H, W) in [-1, 1], curves (split, name) to updates and values, as `checkpoints.Run.curves` gives them.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

from console import RunError, logger, printable
from utils import make_folder, write_file

TRAIN, VALIDATE = "#9aa5b1", "#c2410c"
PLAIN = {"parse_math": False}  # of text that holds a name: two dollar signs would make mathematics of it
LONGEST_CAPTION = 40  # letters
COMPARED = {"samples": "#c2410c", "decoder alone": "#0f766e", "prior alone": "#b59f3b", "floor": "#9aa5b1"}


def upright(slices: np.ndarray) -> np.ndarray:
    """Slices (..., H, W) as they are looked at (..., W, H): front of the patient on top, sides left and right."""
    return slices.swapaxes(-1, -2)


def evenly_spaced(count: int, most: int = 6) -> np.ndarray:
    """At most `most` indices evenly spread over [0, count): what a figure shows of many."""
    return np.unique(((np.arange(most) + 0.5) * count / most).astype(int))


def caption(name: str) -> str:
    """A slice's name for a figure, without its folder and ending. It is to be drawn with **PLAIN."""
    name = printable(name.rpartition("/")[2].removesuffix(".gz").removesuffix(".nii"))
    return name if len(name) <= LONGEST_CAPTION else f"{name[: LONGEST_CAPTION - 3]}..."


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Where it cannot be written that is said: it ends no training."""
    try:
        make_folder(path.parent)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # names may be in any script: boxes are drawn
            write_file(path, lambda part: figure.savefig(part, format="png", dpi=120))
    except RunError as error:
        logger.warning("%s", error)


# ---------------------------------------------------------------- training


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


def refiner_loss_figure(path: Path, curves: dict) -> None:
    """The loss of stage 3, in units in which plain noise of the right spread has 1.74."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, "flow_loss", "loss of the refiner", "MSE of the velocity")
    updates, losses = curves["validate", "flow_loss"]
    best = int(np.argmin(losses))
    axes.plot(updates[best], losses[best], "o", color=VALIDATE, label=f"kept: {losses[best]:.3f}")
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


# ---------------------------------------------------------------- slices


def draw_strips(figure: Figure | SubFigure, strips: dict[str, np.ndarray]) -> None:
    """Rows of slices (n, H, W) in [-1, 1] with their names."""
    columns = len(next(iter(strips.values())))
    for row, (label, slices) in zip(figure.subplots(len(strips), columns, squeeze=False), strips.items()):
        row[0].set_ylabel(label, fontsize=9)
        for axes, picture in zip(row, upright(slices)):
            axes.imshow(picture, cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)


def refinement_figure(path: Path, strips: dict[str, np.ndarray], titles: Sequence[str]) -> None:
    """Strips of slices (n, H, W) in [-1, 1], each under its name, and a title over each column."""
    count, height, width = upright(next(iter(strips.values()))).shape
    figure = Figure(figsize=(2.4 * count, 2.4 * len(strips) * height / width + 0.4), layout="constrained")
    draw_strips(figure, strips)
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title, fontsize=8, **PLAIN)
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
        rows[0, column].set_title(title, fontsize=8, **PLAIN)
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


# ---------------------------------------------------------------- evaluation

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
    figure.suptitle(printable(title), fontsize=11, x=0.008, ha="left", **PLAIN)
    above, middle, below = figure.subfigures(3, 1, height_ratios=(inches, 2.1, 2.6), hspace=0.03)
    draw_strips(above, strips)

    parts = [results, *(results[name.replace(" ", "_")] for name in list(COMPARED)[1:])]
    panels = middle.subplots(1, len(PANELS), sharey=True)
    for axes, (name, panel, form, better) in zip(panels, PANELS):
        values = dict(zip(COMPARED, [part["samples"][name] for part in parts]))
        draw_bars(axes, values, COMPARED.values(), form, panel, better)
        axes.axvline(values["floor"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    middle.supxlabel(
        "samples: beside held-out slices  ·  decoder alone: refined reconstructions of training slices"
        "  ·  prior alone: samples beside such reconstructions of held-out slices  ·  floor: training slices",
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
