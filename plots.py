"""Figures: numbers and slices in, a PNG out.

Slices are (n, H, W) in [-1, 1]. Curves map (split, name) to updates and values, as `checkpoints.Run.curves` returns
them.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from console import RunError, logger, printable
from containers import without_ending
from utils import make_folder, write_file

Curves = Mapping[tuple[str, str], tuple[Sequence[int], Sequence[float]]]

TRAINING_COLOUR, VALIDATION_COLOUR = "#9aa5b1", "#c2410c"
COMPARISON_COLOURS = {
    "samples": "#c2410c",
    "decoder alone": "#0f766e",
    "prior alone": "#b59f3b",
    "baseline": "#9aa5b1",
}
ATTACK_COLOURS = ("#9aa5b1", "#2563eb", "#b59f3b", "#c2410c", "#0f766e", "#4b5563", "#7c3aed", "#be185d")
MAX_CAPTION_LENGTH = 40  # characters
CONTACT_COLUMNS, CONTACT_WIDTH = 6, 250  # of a contact sheet: slices per row, pixels of each


# ---------------------------------------------------------------- shared


def as_array(slices: Tensor) -> np.ndarray:
    """Return slices (N, 1, H, W) on any device as an array (N, H, W) in [-1, 1]."""
    return slices[:, 0].float().clamp(-1, 1).cpu().numpy()


def to_display(slices: np.ndarray) -> np.ndarray:
    """Transpose slices (..., H, W) to images (..., W, H): anterior on top, left and right at the sides."""
    return slices.swapaxes(-1, -2)


def bin_centres(count: int, most: int = 6) -> np.ndarray:
    """Return the middle indices of at most `most` equal parts of [0, count)."""
    return np.unique(((np.arange(most) + 0.5) * count / most).astype(int))


def caption(name: str) -> str:
    """Shorten a slice's name for a figure: no folder, no extension. Draw it with parse_math=False: it may hold a $."""
    name = printable(without_ending(name.rpartition("/")[2]))
    return name if len(name) <= MAX_CAPTION_LENGTH else f"{name[: MAX_CAPTION_LENGTH - 3]}..."


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. If that fails, print a warning: a full disk must not end a training."""
    try:
        make_folder(path.parent)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # names may be in any script; boxes are drawn
            write_file(path, lambda part: figure.savefig(part, format="png", dpi=120))
    except RunError as error:
        logger.warning(str(error))


# ---------------------------------------------------------------- training


def draw_curves(axes: Axes, curves: Curves, name: str, title: str, unit: str) -> None:
    """Draw the training and validation curves of one logged value over the updates."""
    for split, colour, width in (("train", TRAINING_COLOUR, 1.0), ("validate", VALIDATION_COLOUR, 1.8)):
        if (split, name) in curves:
            label = {"train": "training", "validate": "validation"}[split]
            axes.plot(*curves[split, name], color=colour, linewidth=width, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("update")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def mark_best(axes: Axes, curves: Curves, name: str, template: str) -> None:
    """Mark the lowest validation loss, whose weights are kept."""
    updates, losses = curves["validate", name]
    best = int(np.argmin(losses))
    axes.plot(updates[best], losses[best], "o", color=VALIDATION_COLOUR, label=f"kept: {template.format(losses[best])}")
    axes.legend(frameon=False)


def draw_optimisation(gradient_axes: Axes, rate_axes: Axes, curves: Curves) -> None:
    """Draw the gradient norm and the learning rate."""
    draw_curves(gradient_axes, curves, "gradient_norm", "gradient norm", "before clipping")
    gradient_axes.set_yscale("log")
    draw_curves(rate_axes, curves, "learning_rate", "learning rate", "")


def vqvae_loss_figure(path: Path, curves: Curves) -> None:
    """Plot the three losses of the VQ-VAE, the SSIM of reconstructions, the gradient norm and the learning rate."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = (
        ("reconstruction_loss", "reconstruction loss", "MSE, slices in [-1, 1]"),
        ("embedding_loss", "embedding loss", "commitment"),
        ("total_loss", "total loss", "sum"),
    )
    losses, others = figure.subplots(2, 3)
    for axes, (name, title, unit) in zip(losses, panels):
        draw_curves(axes, curves, name, title, unit)
        axes.set_yscale("log")
    draw_curves(others[0], curves, "ssim", "reconstructions", "SSIM")
    draw_optimisation(others[1], others[2], curves)
    losses[0].legend(frameon=False)
    save_figure(figure, path)


def prior_loss_figure(path: Path, curves: Curves, codes: int) -> None:
    """Plot the loss of the prior with that of the uniform distribution over `codes` codes, and the optimisation."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, gradient, rate = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    draw_curves(loss, curves, "bits_per_code", "loss of the prior", "bits per code")
    loss.axhline(math.log2(codes), color="black", linewidth=0.8, linestyle=":", label=f"uniform over {codes} codes")
    mark_best(loss, curves, "bits_per_code", "{:.2f} bits")
    draw_optimisation(gradient, rate, curves)
    save_figure(figure, path)


def refiner_loss_figure(path: Path, curves: Curves) -> None:
    """Plot the flow-matching loss of the refiner and the optimisation.

    The loss is 1.74 for Gaussian residuals of the right standard deviation.
    """
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, gradient, rate = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    draw_curves(loss, curves, "flow_loss", "loss of the refiner", "MSE of the velocity")
    mark_best(loss, curves, "flow_loss", "{:.3f}")
    draw_optimisation(gradient, rate, curves)
    save_figure(figure, path)


def codebook_figure(path: Path, curves: Curves, counts: np.ndarray) -> None:
    """Plot codebook usage: the perplexity over the updates, and the sorted shares of the codes at the end.

    Args:
        path: Of the PNG.
        curves: With "perplexity".
        counts: Occurrences of each code in the validation slices, (K,).
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, curves, "perplexity", f"perplexity of the codes (at most {len(counts)})", "codes")
    left.axhline(len(counts), color="black", linewidth=0.8, linestyle=":")
    left.set_ylim(0, 1.05 * len(counts))
    left.legend(frameon=False, loc="lower right")
    share = np.sort(counts / counts.sum())[::-1]
    right.fill_between(np.arange(len(share)), share, step="mid", color=VALIDATION_COLOUR, alpha=0.8)
    right.axhline(1 / len(share), color="black", linewidth=0.8, linestyle=":", label="uniform usage")
    right.set_title(f"usage on validation slices: {(counts > 0).mean():.0%} of codes", fontsize=10, loc="left")
    right.set_xlabel("code, sorted by frequency")
    right.set_ylabel("share of all codes")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_xlim(0, len(share))
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    save_figure(figure, path)


# ---------------------------------------------------------------- slices


def draw_rows(figure: Figure | SubFigure, rows: Mapping[str, np.ndarray]) -> None:
    """Draw rows of slices (n, H, W), each with its label."""
    columns = len(next(iter(rows.values())))
    for row, (label, slices) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items()):
        row[0].set_ylabel(label.replace(" ", "\n"), fontsize=9)  # a slice is lower than a label is long
        for axes, image in zip(row, to_display(slices)):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)


def refinement_figure(path: Path, rows: Mapping[str, np.ndarray], titles: Sequence[str]) -> None:
    """Plot rows of slices (n, H, W), each with its label, and a title over each column."""
    count, height, width = to_display(next(iter(rows.values()))).shape
    figure = Figure(figsize=(2.4 * count, 2.4 * len(rows) * height / width + 0.4), layout="constrained")
    draw_rows(figure, rows)
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title, fontsize=8, parse_math=False)
    save_figure(figure, path)


def reconstructions_figure(
    path: Path,
    slices: np.ndarray,
    reconstructions: np.ndarray,
    titles: Sequence[str],
    labels: tuple[str, str] = ("slice", "reconstruction"),
    limit: float = 0.2,
) -> None:
    """Plot slices above their reconstructions and the differences.

    Args:
        path: Of the PNG.
        slices: (n, H, W) in [-1, 1].
        reconstructions: (n, H, W) in [-1, 1].
        titles: One per column.
        labels: Of the first two rows.
        limit: Largest difference of the colour scale, as a share of the intensity range.
    """
    height, width = to_display(slices).shape[1:]
    figure = Figure(figsize=(2.4 * len(slices), 2.4 * 3 * height / width + 0.5), layout="constrained")
    rows = figure.subplots(3, len(slices), squeeze=False)
    for column, title in enumerate(titles):
        rows[0, column].set_title(title, fontsize=8, parse_math=False)
        rows[0, column].imshow(to_display(slices[column]), cmap="gray", vmin=-1, vmax=1)
        rows[1, column].imshow(to_display(reconstructions[column]), cmap="gray", vmin=-1, vmax=1)
        difference = (reconstructions - slices)[column] / 2
        shown = rows[2, column].imshow(to_display(difference), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for row, label in zip(rows, (*labels, "difference")):
        row[0].set_ylabel(label, fontsize=9)
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=rows[2].tolist(), fraction=0.02, pad=0.01, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


def samples_figure(path: Path, slices: np.ndarray, title: str, columns: int = 8) -> None:
    """Plot a grid of slices (n, H, W) in [-1, 1]; small ones are enlarged by an integer factor."""
    images = to_display(slices)
    n, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = 3
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap))
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    inches = np.array(sheet.shape[::-1]) * max(1, 256 // width) / 120
    figure = Figure(figsize=(inches[0], inches[1] + 0.35))
    axes = figure.add_axes((0, 0, 1, inches[1] / (inches[1] + 0.35)))
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.text(0.004, 1 - 0.18 / (inches[1] + 0.35), title, va="center", fontsize=11)
    save_figure(figure, path)


def contact_sheet_figure(path: Path, slices: np.ndarray, titles: Sequence[str], title: str) -> None:
    """Plot a grid of slices (n, H, W) in [-1, 1], each under its own title; small ones are enlarged."""
    images = to_display(slices)
    n, height, width = images.shape
    columns = min(n, CONTACT_COLUMNS)
    rows = -(-n // columns)
    scale = CONTACT_WIDTH / width  # pixels of the figure per pixel of a slice
    cell_height, cell_width = round(height * scale) + 22, CONTACT_WIDTH + 6
    inches = np.array((columns * cell_width, rows * cell_height + 34)) / 120
    figure = Figure(figsize=(inches[0], inches[1]))
    figure.text(0.004, 1 - 0.13 / inches[1], printable(title), va="center", fontsize=10, parse_math=False)
    for i, (image, name) in enumerate(zip(images, titles)):
        left, top = i % columns * cell_width, i // columns * cell_height + 34 + 22
        box = (left, 120 * inches[1] - top - height * scale, CONTACT_WIDTH, height * scale)
        axes = figure.add_axes(tuple(np.array(box) / (120 * np.tile(inches, 2))))
        axes.imshow(image, cmap="gray", vmin=-1, vmax=1, aspect="auto")
        axes.set_axis_off()
        axes.set_title(printable(name), fontsize=8, loc="left", pad=3, parse_math=False)
    save_figure(figure, path)


# ---------------------------------------------------------------- evaluation

# Metrics of samples: key in evaluation.json, title, format, reading.
PANELS = (
    ("c2st_accuracy", "C2ST accuracy", ".2f", "0.5 is best, 1 is worst"),
    ("coverage_by_patient", "coverage, by patient", ".2f", "higher is better"),
    ("density_by_patient", "density, by patient", ".2f", "the baseline's is best"),
    ("random_feature_frechet", "random-feature Fréchet", ".1f", "lower is better"),
    ("sliced_wasserstein", "sliced Wasserstein", ".3f", "lower is better"),
    ("ms_ssim_diversity", "MS-SSIM diversity", ".2f", "the baseline's is best"),
)


def evaluation_figure(
    path: Path,
    results: Mapping[str, Any],
    rows: Mapping[str, np.ndarray],
    distances: Mapping[str, np.ndarray],
    title: str,
) -> None:
    """Plot an evaluation: rows of slices, metrics of samples, distances from training slices, bits per slice.

    Args:
        path: Of the PNG.
        results: The content of evaluation.json.
        rows: Slices (n, H, W) by label, the same number in each row.
        distances: From the nearest training slice, (N,) by label, samples first.
        title: Of the figure.
    """
    count, height, width = next(iter(rows.values())).shape
    inches = len(rows) * 11.6 / count * width / height
    figure = Figure(figsize=(12, inches + 5.2), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    figure.suptitle(printable(title), fontsize=11, x=0.008, ha="left", parse_math=False)
    subfigures = figure.subfigures(3, 1, squeeze=False, height_ratios=(inches, 2.1, 2.6), hspace=0.03)
    above, middle, below = subfigures[:, 0]
    draw_rows(above, rows)

    comparisons = [results, *(results[name.replace(" ", "_")] for name in list(COMPARISON_COLOURS)[1:])]
    panels = middle.subplots(1, len(PANELS), sharey=True)
    for axes, (key, panel, format_, reading) in zip(panels, PANELS):
        values = dict(zip(COMPARISON_COLOURS, [comparison["samples"][key] for comparison in comparisons]))
        draw_bars(axes, values, COMPARISON_COLOURS.values(), format_, panel, reading)
        axes.axvline(values["baseline"], color="black", linewidth=0.8, linestyle=":", zorder=0)
    middle.supxlabel(
        "samples: vs. held-out slices  ·  decoder alone: refined reconstructions of training slices vs. held-out slices"
        "  ·  prior alone: samples vs. refined reconstructions of held-out slices  ·  baseline: training vs. held-out",
        fontsize=8,
    )

    left, right = below.subplots(1, 2, width_ratios=(2, 1))
    copying = results["prior_alone"]["copying"]
    draw_distances(
        left,
        distances,
        f"prior alone: data-copying C_T {copying['c_t']:+.1f} (far below 0 for copies), "
        f"memorisation rate {copying['memorisation_rate']:.1%}",
    )
    bits = {
        "prior": results["prior"]["bits_per_slice"],
        "JPEG 2000": results["prior"]["jpeg2000_bits_per_slice"],
        "uniform prior": results["reconstructions"]["bits_per_pixel"] * height * width,
    }
    colours = (COMPARISON_COLOURS["samples"], COMPARISON_COLOURS["baseline"], COMPARISON_COLOURS["baseline"])
    panel = f"bits per held-out slice at {results['reconstructions']['psnr']:.1f} dB"
    draw_bars(right, bits, colours, ",.0f", panel, "lower is better")
    save_figure(figure, path)


def outliers_figure(path: Path, rows: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Plot the least coherent slices (n, H, W) of each set, the worst first, each with its number and score."""
    count = max(len(slices) for slices, _ in rows.values())
    height, width = to_display(next(iter(rows.values()))[0]).shape[1:]
    figure = Figure(figsize=(12, len(rows) * (12 / count * height / width + 0.3) + 0.3), layout="constrained")
    figure.suptitle("least coherent anatomy: score, from 0, worst, to 1", fontsize=10, x=0.01, ha="left")
    for row, (label, (slices, titles)) in zip(figure.subplots(len(rows), count, squeeze=False), rows.items()):
        row[0].set_ylabel(label, fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image, title in zip(row, to_display(slices), titles):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1)
            axes.set_title(title, fontsize=8)
    save_figure(figure, path)


def membership_figure(
    path: Path, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], areas: Mapping[str, float], title: str
) -> None:
    """Plot the ROC curve of each attack, on logarithmic axes: few wrong accusations are what an attacker wants.

    Args:
        path: Of the PNG.
        curves: False and true positive rates by attack.
        areas: Under the curves.
        title: Of the figure.
    """
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    lowest = min(rates[rates > 0].min() for pair in curves.values() for rates in pair)
    for (name, (false, true)), colour in zip(curves.items(), ATTACK_COLOURS):
        label = f"{name.replace('_', '-')}, AUC {areas[name]:.2f}"
        axes.plot(false.clip(min=lowest), true.clip(min=lowest), drawstyle="steps-post", color=colour, label=label)
    axes.plot([lowest, 1], [lowest, 1], color="black", linewidth=0.8, linestyle=":", label="gives nobody away")
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.05))
    axes.set_xlabel("share of held-out slices wrongly taken for training slices")
    axes.set_ylabel("share of training slices found")
    axes.set_title(f"membership inference\n{printable(title)}", fontsize=10, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, path)


def draw_bars(
    axes: Axes, values: Mapping[str, float], colours: Iterable[str], format_: str, title: str, reading: str
) -> None:
    """Draw values as labelled bars from top to bottom, each with its number; `reading` says which way is better."""
    bars = axes.barh(list(values), list(values.values()), color=list(colours), height=0.7)
    for label in axes.bar_label(bars, [f"{value:{format_}}" for value in values.values()], padding=3, fontsize=8):
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max(values.values()) or 1)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(reading, fontsize=8, loc="left")
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_distances(axes: Axes, distances: Mapping[str, np.ndarray], title: str) -> None:
    """Draw histograms of distances from the nearest training slice, on the same bins."""
    pooled = np.concatenate(list(distances.values()))
    bins = np.linspace(pooled.min(), pooled.max() + 1e-6, 41).tolist()
    colours = (COMPARISON_COLOURS["samples"], COMPARISON_COLOURS["decoder alone"], "black")
    for (label, values), colour in zip(distances.items(), colours):
        share = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.25)
        axes.hist(values, bins, weights=share, color=colour, histtype="step", linewidth=1.4, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("distance from the nearest training slice (RMS, intensities in [-1, 1])", fontsize=8)
    axes.set_ylabel("share of slices", fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
