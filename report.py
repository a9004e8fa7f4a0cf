"""The report of a run, one HTML file: numbers and slices in, HTML out.

`evaluate.py` writes RUN/report.html from the template report.html. The file loads nothing from elsewhere. It never
holds a path or the name of a data file; whether it holds slices of patients is decided by whoever calls `write_report`.
"""

import base64
import hashlib
import html
import io
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, tostring

import numpy as np
from PIL import Image

from charts import Line, bar_chart, element, histogram_lines, line_chart
from config import RunConfig
from console import printable
from dataset import SPLIT_TITLES
from model_card import describe_metrics, describe_run, judgements, quality_warnings, redact
from nifti import left_right_axis
from plots import PANELS, Curves, to_display
from tables import (
    COMPARISONS,
    MEMBERSHIP_ROWS,
    NETWORK_ROWS,
    SAMPLE_ROWS,
    SLICE_ROWS,
    TableRow,
    describe_attacked,
    describe_samples,
    membership_columns,
    network_columns,
    sample_columns,
    slice_columns,
)
from utils import write_file

TEMPLATE = Path(__file__).resolve().parent / "report.html"
MAX_SHOWN, MAX_PIXELS = 64, 1 << 21  # samples in a report, and their pixels: 64 of 256x128
PAIRS = 3  # samples that are shown beside their nearest training slice under the heading on copying
STYLES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")  # colours and dashes of the template
# Grey levels, of 255, that are white in a picture of a difference: half the range, and a fifth for reconstructions.
COPY_LIMIT, RECONSTRUCTION_LIMIT = 128, 51


class SampleSlices(NamedTuple):
    """The n samples of a report, the lowest position first."""

    slices: np.ndarray  # (n, H, W) in [-1, 1]
    numbers: np.ndarray  # (n,): of the samples, as in the names of predict.py's files
    positions: np.ndarray  # (n,) in [0, 1], NaN for unknown
    scores: np.ndarray  # (n,): similarity to the nearest training slice
    copied: np.ndarray  # (n,) bool: called copies of a training slice
    incoherent: np.ndarray  # (n,) bool: anatomy as in the low tail of unseen patients
    nearest: np.ndarray | None  # (n, H, W): the nearest training slices, aligned; None if they are left out


class HeldOutSlices(NamedTuple):
    """Some held-out slices (m, H, W) in [-1, 1]."""

    slices: np.ndarray
    decoded: np.ndarray  # their decoded codes
    refined: np.ndarray  # the same, refined


class Evidence(NamedTuple):
    """What a report draws, besides the content of evaluation.json."""

    curves: Mapping[str, Curves]  # stage to what was logged; empty if there is no log
    samples: SampleSlices
    held_out: HeldOutSlices | None  # None if they are left out
    phantom: bool  # no slice is of a patient
    distances: Mapping[str, np.ndarray]  # from the nearest training slice, (N,) by kind of slices
    rates: Mapping[str, tuple[np.ndarray, np.ndarray]]  # false and true positive rates by attack


def write_report(path: Path, name: str, config: RunConfig, results: Mapping[str, Any], evidence: Evidence) -> None:
    """Write the report of a run.

    Args:
        path: Of the HTML file.
        name: Of the run.
        config: Of the run.
        results: The content of evaluation.json, NaN for null.
        evidence: Curves and slices.

    Raises:
        RunError: The file cannot be written.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    parts = dict(sections(name, redact(config), results, evidence))
    # The page runs this script only, by its hash, even if a name in it were not escaped.
    parts["script_hash"] = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    content = Template(template).substitute({key: "\n".join(map(to_html, own)) for key, own in parts.items()})
    write_file(path, lambda part: part.write_text(content, encoding="utf-8"))


def to_html(part: str | Element) -> str:
    """Return an element as HTML, or a text with its special characters escaped."""
    return html.escape(part) if isinstance(part, str) else tostring(part, encoding="unicode", method="html")


# ---------------------------------------------------------------- sections


def sections(
    name: str, config: RunConfig, results: Mapping[str, Any], evidence: Evidence
) -> Iterator[tuple[str, Sequence[str | Element]]]:
    """Yield the name and the content of each place in the template."""
    settings = results["settings"]
    held_out = f"{settings['heldout_slices']} {SPLIT_TITLES[settings['split']]} slices"
    split_title = f"{held_out} (cases: {settings['heldout_cases']})"
    yield "name", [printable(name)]
    yield (
        "subtitle",
        [
            f"A generative model of 2D prostate MR slices, trained on {settings['training_slices']} slices of "
            f"{settings['training_cases']} patients{' of the phantom' * evidence.phantom}, evaluated on {held_out} of "
            f"{settings['heldout_cases']} patients and {settings['samples']} samples."
        ],
    )
    yield "conclusions", [conclusion_list(results)]
    yield "privacy", [privacy_note(evidence)]
    yield "tiles", [tiles(results)]
    yield "samples_text", [samples_text(evidence.samples, config, settings)]
    yield "samples", sample_sheet(evidence.samples, config)
    yield "reconstructions", reconstruction_sheets(evidence.held_out, config)
    yield "run", [facts(config, results)]
    yield "curves", [element("div", *curve_charts(evidence.curves, config), class_="charts")]
    yield "network_table", [table(f"Networks, on {split_title}", NETWORK_ROWS, network_columns(results))]
    yield "samples_title", [describe_samples(settings)]
    yield "comparisons", [comparison_list()]
    yield "bars", [element("div", *comparison_bars(results), class_="charts")]
    yield "sample_table", [table("Samples", SAMPLE_ROWS, sample_columns(results))]
    yield "slice_table", [table("Single slices", SLICE_ROWS, slice_columns(results))]
    yield "copying", [*copy_pairs(evidence.samples, config), distance_chart(evidence.distances)]
    yield "attacked", [describe_attacked(results)]
    yield "rates", [element("div", rate_chart(evidence.rates, results["membership"]["attacks"]), class_="charts")]
    yield "membership_table", [table("Attacks", MEMBERSHIP_ROWS, membership_columns(results))]
    yield "commands", [commands(config, settings)]


def conclusion_list(results: Mapping[str, Any]) -> Element:
    """List what speaks against relying on the run, then what may be concluded about sharing."""
    items = [note(heading, text, "warn") for heading, text in quality_warnings(results)]
    for heading, text in judgements(results):
        items.append(note(heading, text, "bad" if text.startswith("Do not share") else ""))
    return element("ul", *items, class_="notes")


def note(heading: str, text: str, style: str = "") -> Element:
    """Return an item of a list of notes; text between backticks is code."""
    parts = re.split("`([^`]+)`", text)
    content = [element("code", part) if i % 2 else part for i, part in enumerate(parts)]
    return element("li", element("strong", f"{heading}."), " ", *content, class_=style)


def privacy_note(evidence: Evidence) -> Element:
    """Say whose slices the page shows."""
    if evidence.phantom:
        return notice("Privacy", "All slices on this page are of the phantom, which is a drawing: nobody is shown.")
    if evidence.held_out:
        return notice(
            "Privacy",
            "This page shows slices of patients, because `--report-real-slices` was given. Share it as you may share "
            "the data themselves.",
            "bad",
        )
    return notice(
        "Privacy",
        "This page shows samples only. Held-out slices, their reconstructions, training slices, and samples that are "
        "called copies are left out, because they show patients; so are the names and paths of files. A sample may "
        "still show a patient: read the conclusions before you share this page. (`--report-real-slices` embeds the "
        "slices for your own use.)",
    )


def notice(heading: str, text: str, style: str = "") -> Element:
    """Return a note that stands alone."""
    return element("ul", note(heading, text, style), class_="notes")


def tiles(results: Mapping[str, Any]) -> Element:
    """Return the figures of the model card; membership has a table of its own."""
    rows = [row for row in describe_metrics(results) if not row[0].startswith("membership")]
    return element(
        "dl",
        *(
            element("div", element("dt", name), element("dd", value), element("dd", reference))
            for name, value, reference in rows
        ),
        class_="tiles",
    )


def facts(config: RunConfig, results: Mapping[str, Any]) -> Element:
    """Return what was trained on what, as a table."""
    options = config.options
    side = options.downsampling
    rows = {
        "data": "the phantom" if options.on_phantom else "a folder of slices",
        "pixel size": f"{' x '.join(f'{size:.2f}' for size in pixel_size(config))} mm",
        "codes": f"one for {side}x{side} pixels, of {options.codebook_size}",
        "updates of VQ-VAE, prior, refiner": f"{options.updates:,}, {options.prior_updates:,}, "
        f"{options.refiner_updates:,}",
        "slices per update": f"{options.batch_size}; {options.small_batch_size} for prior and refiner",
    } | describe_run(config, results)
    body = (
        element("tr", element("th", key, scope="row"), element("td", printable(str(value))))
        for key, value in rows.items()
    )
    return element("table", element("tbody", *body), class_="facts")


def commands(config: RunConfig, settings: Mapping[str, Any]) -> Element:
    """Return the command lines that train, evaluate, and write the samples again."""
    sampling = [
        part
        for name in ("seed", "temperature", "top_p", "guidance", "refiner_noise")
        for part in (f"--{name.replace('_', '-')}", str(settings[name]))
    ]
    sampling = ["--run", "RUN", "--num", str(settings["samples"]), *sampling]
    lines = [
        ["git", "checkout", config.git_revision.removesuffix("-dirty")] if config.git_revision else [],
        config.command,
        ["python", "evaluate.py", "--split", settings["split"], *sampling],
        ["python", "predict.py", *sampling, "--out", "SAMPLES"],
    ]
    return element("div", *(command_line(line) for line in lines if line), class_="commands")


def command_line(arguments: Sequence[str]) -> Element:
    """Return a command line that is wrapped between arguments only, not after a hyphen."""
    parts: list[str | Element] = []
    for argument in arguments:
        parts += [element("span", printable(shlex.quote(argument))), " "]
    return element("code", *parts)


# ---------------------------------------------------------------- slices


def shown_samples(count: int, pixels: int) -> int:
    """Return how many of `count` samples of so many pixels a report shows."""
    return min(count, max(1, min(MAX_SHOWN, MAX_PIXELS // pixels)))


def pixel_size(config: RunConfig) -> np.ndarray:
    """Return the lengths (2,) of a pixel along both axes of a slice, in mm."""
    return np.linalg.norm(np.array(config.affine)[:3, :2], axis=0)


def image(slice_: np.ndarray, config: RunConfig, alt: str, **attributes: str) -> Element:
    """Return a slice (H, W) in [-1, 1] as an 8-bit grey PNG in a data URI, with the sides that it has in the body."""
    grey = np.round((to_display(slice_).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "png", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    across, down = pixel_size(config)
    height, width = grey.shape
    return element(
        "img", src=source, alt=alt, width=str(width), height=str(round(height * down / across)), **attributes
    )


def slice_button(
    picture: Element, group: str, title: str, caption: Sequence[str | Element], **beside: str | float
) -> Element:
    """Return a slice that opens in the viewer, where arrow keys go through the slices of its group.

    Args:
        picture: The slice.
        group: What the slice is.
        title: In the viewer.
        caption: On the page.
        beside: What the viewer shows beside it, if anything: `data_other`, the id of an image, `data_beside`, what that
            is, and `data_limit`, the difference in grey levels that is drawn white.
    """
    text = element("span", *caption)
    return element("button", picture, text, type="button", class_="slice", data_group=group, data_title=title, **beside)


def height(position: float) -> str:
    """Return a position in words."""
    return "height unknown" if math.isnan(position) else f"height {position:.2f}"


def samples_text(samples: SampleSlices, config: RunConfig, settings: Mapping[str, Any]) -> str:
    """Say which samples are shown, in which order, and how."""
    width, depth = np.array(config.slice_size) * pixel_size(config)
    axial = left_right_axis(np.array(config.affine)) == 2
    orientation = ", anterior on top; sides are not marked, because training mirrors slices at random" if axial else ""
    return (
        f"{len(samples.slices)} of {settings['samples']} samples, chosen by height in the pelvis only, from 0, the "
        "lowest training slices, to 1, the highest. Neighbours belong to no common volume. A slice covers "
        f"{width:.0f} x {depth:.0f} mm{orientation}."
    )


def sample_sheet(samples: SampleSlices, config: RunConfig) -> list[Element]:
    """Return the samples, and hidden beside them their nearest training slices for the viewer."""
    buttons, hidden = [], []
    for i, (own, number) in enumerate(zip(samples.slices, samples.numbers)):
        flags = ["called a copy"] * bool(samples.copied[i]) + ["incoherent anatomy"] * bool(samples.incoherent[i])
        title = f"Sample {number}, {height(samples.positions[i])}"
        details = ", ".join([title, f"similarity {samples.scores[i]:.1f}", *flags])
        caption: list[str | Element] = [title]
        for flag in flags:
            caption += [" ", element("b", f"({flag})")]
        beside: dict[str, str | float] = {}
        if samples.nearest is not None:
            hidden.append(image(samples.nearest[i], config, "", id=f"nearest-{number}", hidden=""))
            beside = {"data_other": f"nearest-{number}", "data_beside": "nearest training slice, aligned"}
            beside["data_limit"] = COPY_LIMIT
        buttons.append(slice_button(image(own, config, ""), "sample", details, caption, **beside))
    marks = element(
        "p",
        element("b", "Incoherent anatomy"),
        " fits together as badly as in the worst 2 % of real slices, for at least half of the groups of unseen "
        "patients that a slice is compared with: of a hundred real slices, two to four would be marked, too. ",
        element("b", "Called a copy"),
        ": it matches a training slice better than a new patient's slice would.",
        class_="muted",
    )
    sheet = element("div", *buttons, *hidden, class_="sheet", id="sheet")
    return [sheet, marks]


def reconstruction_sheets(held_out: HeldOutSlices | None, config: RunConfig) -> list[Element]:
    """Return held-out slices, each above both kinds of reconstructions, which open beside their originals."""
    if held_out is None:
        return [element("p", "They are left out, because they show patients.", class_="muted")]
    columns = []
    for i, pictures in enumerate(zip(*held_out)):
        buttons = []
        for kind, own in zip(("original", "decoded", "decoded and refined"), pictures):
            made = image(own, config, "", id=f"{kind.replace(' ', '-')}-{i}")
            beside: dict[str, str | float] = {"data_other": f"original-{i}", "data_beside": "original"}
            beside = {} if kind == "original" else beside | {"data_limit": RECONSTRUCTION_LIMIT}
            buttons.append(slice_button(made, kind, f"Held-out slice {i + 1}, {kind}", [kind], **beside))
        columns.append(element("div", *buttons, class_="column"))
    return [element("div", *columns, class_="sheet")]


def copy_pairs(samples: SampleSlices, config: RunConfig) -> list[Element]:
    """Return the samples that resemble a training slice most, each above it."""
    if samples.nearest is None:
        text = "Training slices are left out, because they show patients; see `copying.png`, which is not for sharing."
        return [notice("Most similar pairs", text)]
    pairs = []
    for i in np.argsort(-samples.scores)[:PAIRS]:
        title = f"Sample {samples.numbers[i]}, similarity {samples.scores[i]:.1f}"
        called = "called a copy" if samples.copied[i] else "not called a copy"
        pictures = (
            image(own[i], config, f"{title}, {which}")
            for own, which in ((samples.slices, "sample"), (samples.nearest, "its nearest training slice"))
        )
        pairs.append(element("figure", *pictures, element("figcaption", f"{title}, {called}"), class_="pair"))
    heading = element("h3", "Most similar of the samples above, each above its nearest training slice")
    return [heading, element("div", *pairs, class_="sheet wide")]


# ---------------------------------------------------------------- charts and tables


def curve_charts(curves: Mapping[str, Curves], config: RunConfig) -> Iterator[Element]:
    """Yield the curves of the three stages."""
    size = config.options.codebook_size
    uniform = f"uniform over {size} codes", math.log2(size)
    charts: tuple[tuple[str, str, str, str, bool, tuple[str, float] | None], ...] = (
        ("vqvae", "reconstruction_loss", "VQ-VAE: reconstruction loss", "MSE, grey levels in [-1, 1]", True, None),
        ("vqvae", "embedding_loss", "VQ-VAE: embedding loss", "commitment term", True, None),
        ("vqvae", "total_loss", "VQ-VAE: total loss", "sum of both", True, None),
        ("vqvae", "ssim", "VQ-VAE: reconstructions", "SSIM", False, None),
        ("vqvae", "perplexity", "VQ-VAE: codebook use", "perplexity of codes", False, (f"all {size} codes", size)),
        ("prior", "bits_per_code", "Prior: loss", "bits per code", False, uniform),
        ("refiner", "flow_loss", "Refiner: flow loss", "MSE of the velocity", False, None),
    )
    kept = {"reconstruction_loss", "bits_per_code", "flow_loss"}
    for stage, key, title, label, log, limit in charts:
        own = {
            split: curves[stage][split, key] for split in ("train", "validate") if (split, key) in curves.get(stage, {})
        }
        if own:
            yield curve_chart(own, title, label, log, limit, key in kept)
    if not curves:
        yield element("p", "The log of the training, metrics.jsonl, is missing or cannot be read.")


def curve_chart(
    own: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    label: str,
    log: bool,
    limit: tuple[str, float] | None,
    mark_best: bool,
) -> Element:
    """Draw one logged value over the updates.

    Args:
        own: Updates and values, by split.
        title: Above the chart.
        label: Of the y axis, with the unit.
        log: Whether that axis is logarithmic.
        limit: A value to compare with, and its name.
        mark_best: Whether the lowest validation loss is that of the weights that were kept.
    """
    names = {"train": "training", "validate": "validation"}
    lines = [Line(names[split], names[split], *values) for split, values in own.items()]
    ends = [f"{line.label} from {line.ys[0]:.4g} to {line.ys[-1]:.4g}" for line in lines]
    marks = []
    if mark_best and "validate" in own:
        updates, losses = own["validate"]
        best = int(np.argmin(losses))
        marks.append((updates[best], losses[best]))
        ends.append(f"lowest validation {losses[best]:.4g} at update {updates[best]}")
    if limit:
        first, last = (pick(value for line in lines for value in line.xs) for pick in (min, max))
        lines.append(Line(limit[0], "limit", (first, last), (limit[1], limit[1])))
    return line_chart(title, f"{title}, {label}: {'; '.join(ends)}", lines, ("update", label), (False, log), marks)


def comparison_list() -> Element:
    """Explain the columns of the metrics of samples."""
    items = (element("li", element("strong", name.replace("_", " ")), f": {of}") for name, of in COMPARISONS.items())
    return element("ul", *items, class_="plain")


def comparison_bars(results: Mapping[str, Any]) -> Iterator[Element]:
    """Yield the metrics of samples as bars, for each comparison."""
    for key, title, number, reading in PANELS:
        values = (column["samples"][key] for column in sample_columns(results).values())
        bars = dict(zip(sample_columns(results), zip(values, STYLES)))
        yield bar_chart(title, reading, bars, number)


def distance_chart(distances: Mapping[str, np.ndarray]) -> Element:
    """Draw histograms of the distances from the nearest training slice."""
    title = "Distance from the nearest training slice"
    medians = ", ".join(f"{name} {np.median(own):.3f}" for name, own in distances.items())
    labels = "RMS difference, grey levels in [-1, 1]", "% of slices"
    chart = line_chart(title, f"{title}, medians: {medians}", histogram_lines(distances, STYLES), labels)
    return element("div", chart, class_="charts")


def rate_chart(rates: Mapping[str, tuple[np.ndarray, np.ndarray]], attacks: Mapping[str, Any]) -> Element:
    """Draw the ROC curves of the attacks on logarithmic axes: few wrong accusations are what an attacker wants."""
    lowest = min(own[own > 0].min() for pair in rates.values() for own in pair)
    lines = []
    for (name, (false, true)), style in zip(rates.items(), STYLES):
        xs, ys = np.repeat(false, 2)[1:], np.repeat(true, 2)[:-1]  # a step keeps its height until the next threshold
        label = f"{name.replace('_', '-')}, AUC {attacks[name]['auc']:.2f}"
        lines.append(Line(label, style, xs.clip(min=lowest).tolist(), ys.clip(min=lowest).tolist()))
    description = f"ROC curves: {', '.join(line.label for line in lines)}; 0.5 gives nobody away"
    lines.append(Line("gives nobody away", "limit", (lowest, 1), (lowest, 1)))
    labels = "share of held-out slices wrongly accused", "share of training slices found"
    return line_chart("Attacks, ROC curves", description, lines, labels, (True, True))


def table(caption: str, rows: Sequence[TableRow], columns: Mapping[str, Mapping[str, Any]]) -> Element:
    """Return rows of evaluation.json with a sentence each on how to read them."""
    head = (element("th", title, scope="col") for title in columns)
    body = []
    for row in rows:
        meaning = element("th", row.label.strip(), element("span", row.sentence), scope="row")
        cells = (element("td", row.cell(own), data_column=title) for title, own in columns.items())
        body.append(element("tr", meaning, *cells))
    return element(
        "table",
        element("caption", caption),
        element("thead", element("tr", element("th", "metric", scope="col"), *head)),
        element("tbody", *body),
        class_="numbers",
    )
