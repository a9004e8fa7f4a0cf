"""Inspect a data folder before a training: print what was found, and draw one slice of each case.

python dataset.py DIR [--out contact_sheet.png] [options of train.py that say how files become slices]
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import nibabel as nib
import numpy as np

from config import TrainConfig, add_option, configure
from console import Parser, log_notices, nonempty, run_command, say
from containers import parts_of, read_grid
from dataset import SPLIT_TITLES, THREADS, DataSplits, load_dataset
from files import Reading, SliceFile, abbreviate, counted, file_name, walk_files
from intensity import PERCENTILE, STANDARD_DEVIATIONS
from plots import bin_centres, caption, contact_sheet_figure
from splits import find_data
from utils import check_folder
from volumes import affine_of_slices
from workers import map_threads

DATA_OPTIONS = (*Reading._fields, "slice_size", "seed")  # of train.py, on which the slices and their splits depend
MAX_SHOWN = 120  # cases on a contact sheet
MAX_LISTED = 6  # values of a property


class InspectOptions(Namespace):
    """Options of the command itself."""

    folder: Path
    out: Path


class Geometry(NamedTuple):
    """How a slice lies in the patient."""

    stored: str  # axes of its file, as LPS
    orientation: str  # directions of rows and columns
    spacing: str  # pixel size and distance of slices, in mm


def parse_options(arguments: Sequence[str] | None) -> tuple[InspectOptions, TrainConfig]:
    """Parse the command line; return the command's own options, and those of train.py."""
    parser = Parser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "folder", type=nonempty(Path), metavar="DIR", help="the folder that --data of train.py will name"
    )
    parser.add_argument(
        "--out", type=nonempty(Path), default=Path("contact_sheet.png"), help="the contact sheet (default: %(default)s)"
    )
    for name in DATA_OPTIONS:
        add_option(parser, name, TrainConfig.model_fields[name])
    options = parser.parse_args(arguments, InspectOptions())
    return options, configure({name: value for name, value in vars(options).items() if name in DATA_OPTIONS})


# ---------------------------------------------------------------- what was found


def geometry_of(file: SliceFile) -> Geometry:
    """Read how the slices of a file lie from its header, which could be read before."""
    grid = read_grid(file.path)
    if grid is None:
        return Geometry("unknown", "unknown", "unknown")
    shape, affine = grid
    own = affine if file.axis is None else affine_of_slices(shape, affine, file.axis)
    spacing = "x".join(f"{step:.3g}" for step in nib.affines.voxel_sizes(own))
    return Geometry("".join(map(str, nib.aff2axcodes(affine))), "".join(map(str, nib.aff2axcodes(own)[:2])), spacing)


def tally(name: str, values: Iterable[str], cases: Iterable[str], noun: str) -> str:
    """Count values, the most common one first; the rarer ones are named with a case that has them."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for value, case in zip(values, cases):
        counts[value] += 1
        examples.setdefault(value, case)
    ordered = counts.most_common()
    first = [f"{value} ({counted(count, noun)})" for value, count in ordered[:1]]
    return f"{name}: " + abbreviate(
        first + [f"{value} ({count}, as {examples[value]})" for value, count in ordered[1:]], MAX_LISTED
    )


def describe_range(values: Sequence[float] | np.ndarray) -> str:
    """Return the extremes and the median of values."""
    low, middle, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def describe_files(files: list[SliceFile], folder: Path, pixel_size: float | None) -> list[str]:
    """Return lines on cases, volumes, slices and geometry, with the sizes after resampling to `pixel_size`, if any."""
    groups = [file.case or file.name for file in files]
    cases, volumes = Counter(groups), {file.volume for file in files}
    splits = Counter(file.split for file in files)
    parts = ", ".join(f"{splits[split]} {title}" for split, title in SPLIT_TITLES.items())
    by_path = {file.path: file for file in files}
    geometries = dict(zip(by_path, map_threads(geometry_of, list(by_path.values()), THREADS)))
    of_slices: list[tuple[str, Callable[[SliceFile], str]]] = [
        ("slice sizes", lambda file: "x".join(map(str, file.shape or ()))),
        ("pixel sizes and distances in mm", lambda file: geometries[file.path].spacing),
        ("directions of rows and columns", lambda file: geometries[file.path].orientation),
    ]
    if pixel_size:
        resampled = f"slice sizes with pixels of {pixel_size:g} mm"
        of_slices.insert(2, (resampled, lambda file: "x".join(map(str, file.resampled or ()))))
    stored = [file for file in by_path.values() if file.axis is not None]
    lines = [
        f"{folder}: {counted(len(cases), 'case')}, {counted(len(volumes), 'volume')}, "
        f"{counted(len(files), 'slice')} ({parts}) in {counted(len(by_path), 'file')}",
        f"slices a case: {describe_range(list(cases.values()))}",
        *(tally(name, map(value, files), groups, "slice") for name, value in of_slices),
    ]
    if stored:
        order = "axes of the volumes as stored"
        lines.append(tally(order, (geometries[file.path].stored for file in stored), map(file_name, stored), "volume"))
    return lines


def describe_networks_view(data: DataSplits, files: list[SliceFile], reading: Reading) -> list[str]:
    """Return lines on the slices as networks see them: their size, and which values are black and white."""
    height, width = data.slice_size
    rows, columns, _ = nib.affines.voxel_sizes(data.affine)
    middle = "the body" if reading.crop == "body" else "each slice"
    parts = (data.train, data.validate, data.test)
    one_per_volume = list({file.volume: row for row, file in enumerate(files)}.values())
    limits = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lows", "scales"))
    black, white = (describe_range(values[one_per_volume]) for values in limits)
    values = f"{black} is black, {white} is white"
    if reading.intensity == "percentile":
        values = f"0 is black; the {PERCENTILE}th percentile of a volume, {white}, is white"
    elif reading.intensity == "zscore":
        spread = f"{STANDARD_DEVIATIONS} standard deviations"
        values = f"the mean of a volume's body minus {spread}, {black}, is black; plus as many, {white}, is white"
    return [
        f"networks see {height}x{width} pixels of {rows:.3g}x{columns:.3g} mm about the middle of {middle}",
        f"intensities: {values}",
    ]


def describe_others(folder: Path, files: list[SliceFile]) -> list[str]:
    """Return a line on the files of a folder that are not read, if there are any."""
    read = {os.path.abspath(part) for path in {file.path for file in files} for part in parts_of(path)}
    others = [path for entry in walk_files(folder) if (path := os.path.abspath(entry.path)) not in read]
    if not others:
        return []
    endings = Counter("".join(PurePath(path).suffixes[-2:]).lower() or "without ending" for path in others)
    listed = abbreviate([f"{ending}: {count}" for ending, count in endings.most_common()], MAX_LISTED)
    return [f"other files, not read: {len(others)} ({listed})"]


# ---------------------------------------------------------------- contact sheet


def middle_slices(data: DataSplits) -> dict[str, np.ndarray]:
    """Return the slice in the middle of each case's, (H, W) in [-1, 1], by a title with the case and its split."""
    chosen = {}
    for split, title in SPLIT_TITLES.items():
        slices = getattr(data, split)
        rows: dict[str, list[int]] = {}
        for row, case in enumerate(slices.cases):
            rows.setdefault(case or caption(slices.names[row]), []).append(row)
        for case, own in rows.items():
            middle = own[len(own) // 2]
            known = [row for row in own if np.isfinite(slices.positions[row])]
            if known:
                middle = min(known, key=lambda row: abs(float(slices.positions[row]) - 0.5))
            chosen[f"{case}, {title}"] = slices.batch([middle])[0, 0].numpy()
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `python dataset.py`."""
    options, training = parse_options(arguments)
    check_folder("--out", options.out.parent)
    reading, side = Reading.of(training), training.downsampling  # so that a training finds the cache filled
    found = find_data(options.folder, training.seed, THREADS, reading)
    size, seed = training.slice_size, training.seed
    data = load_dataset(str(options.folder), size, (side, side), seed, reading=reading, recheck=True)
    lines = describe_files(found.files, found.folder, reading.pixel_size)
    lines += describe_others(options.folder, found.files) + describe_networks_view(data, found.files, reading)
    for line in lines:
        say(line)
    log_notices(data.notices)
    middles = middle_slices(data)
    shown = [list(middles)[i] for i in bin_centres(len(middles), min(len(middles), MAX_SHOWN))]
    title = f"{options.folder}: the middle slice of {len(shown)} of {counted(len(middles), 'case')}, as trained on"
    contact_sheet_figure(options.out, np.stack([middles[name] for name in shown]), shown, title)
    say(f"look at {options.out} before training: is every patient the same way up, and the contrast right?")


if __name__ == "__main__":
    run_command(main)
