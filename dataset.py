"""Load a data folder: find the slices, check them, split them by patient, scale their intensity and serve batches.

A first pass decodes every file (decoding.py) and stores the result in an on-disk cache (cache.py), which later runs map
into memory. files.py finds the slices and interprets their names, nifti.py reads a single file.

python dataset.py DIR      # prints what is in a folder, and writes contact_sheet.png (inspection.py)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

import phantom
from cache import (
    Listing,
    PixelWriter,
    cache_folder,
    listing_notices,
    map_pixels,
    new_cache_entry,
    read_index,
    read_listing,
    thin_out,
    write_index,
    write_listing,
)
from console import printable, run_command
from decoding import MIN_VALUES, THREADS, Decoded, decode_files, pixel_digests
from files import (
    Reading,
    SliceFile,
    abbreviate,
    assign_volumes,
    compile_pattern,
    counted,
    describe_files,
    find_slices,
    find_volumes,
    identify,
    identify_by_pattern,
    is_label_map,
    is_slice,
    label_map_notices,
    no_slices_error,
    other_kind_notices,
    positions_of,
    sort_key,
    with_forward_slashes,
)
from geometry import check_slice_size
from intensity import PERCENTILE
from nifti import DataError, describe_stats
from splits import SPLIT_TITLES, SPLITS, find_data
from volumes import SAME_SPACING
from workers import map_threads

CACHE_FORMAT = 7  # raise it when the same files would give other pixels or another index, notices included

AS_NAMED = Reading()
INDEX_BYTES = 80  # per slice, the most that is read of a cache entry's index: an intact one has fewer


# ---------------------------------------------------------------- public API


@dataclass(frozen=True)
class Slices:
    """The slices of one split."""

    pixels: np.ndarray  # (N, H, W) uint8, memory-mapped or in memory: 0 is -1, 255 is +1
    names: list[str]  # (N,) paths below the folder of the splits, or of the slices, with forward slashes
    cases: list[str | None]  # (N,) patients, as case_004; None where the name gives none
    positions: np.ndarray  # (N,) float32: normalised height in the volume, 0 lowest, 1 highest; NaN where unknown
    scales: np.ndarray  # (N,) float32: the value, in the data's units, that maps to +1
    lows: np.ndarray  # (N,) float32: the value that maps to -1

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the slices at `indices` as (n, 1, H, W) float32 in [-1, 1]."""
        return to_float(torch.from_numpy(self.pixels[np.asarray(indices, dtype=np.int64)]))

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Yield all slices in order, at most `size` at a time, as `batch` returns them."""
        yield from map(self.batch, batch_rows(len(self), size))

    def draw_patients(self, most: int) -> Slices:
        """Return the slices of patients drawn at random, at most so many, in memory; or these, if they are no more.

        The last patient that is drawn may lack slices. A slice of an unknown patient counts as a patient of its own.
        """
        if len(self) <= most:
            return self
        patients = [row if case is None else case for row, case in enumerate(self.cases)]
        distinct = list(dict.fromkeys(patients))
        rank = dict(zip(distinct, np.random.default_rng(0).permutation(len(distinct))))
        rows = np.sort(np.argsort([rank[patient] for patient in patients], kind="stable")[:most])
        drawn: dict[str, Any] = {}
        for field in fields(self):
            values = getattr(self, field.name)
            drawn[field.name] = values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
        return Slices(**drawn)


@dataclass(frozen=True)
class DataSplits:
    """The three splits of a data folder, and what is needed to write slices like its own."""

    train: Slices
    validate: Slices
    test: Slices
    slice_size: tuple[int, int]
    affine: np.ndarray  # (4, 4): the training slices' most common voxel grid, after resampling, crop or pad
    scale: float  # median of the training volumes' scales
    low: float  # median of the training volumes' lows
    files: dict[str, str]  # of all splits: each slice's name and the checksum of its uncompressed file
    fingerprint: str  # sha256 of the slice size, the splits and `files`, wherever the folder is stored
    notices: list[str]  # lines to show the user


def load_dataset(
    data: str,
    slice_size: Sequence[int] | None = None,
    multiple: tuple[int, int] = (1, 1),
    seed: int = 0,
    workers: int | None = None,
    reading: Reading = AS_NAMED,
    recheck: bool = False,
) -> DataSplits:
    """Load a folder of NIfTI slices and volumes, from the cache where an earlier run has decoded it.

    Label maps are recognised by the names of files and folders, and left out.

    Args:
        data: A folder, or "phantom" for the embedded data set, which is drawn at `slice_size` (256x128 by default) and
            kept in the cache; a folder of that name is "./phantom". The splits, patients or slices may lie deeper, if
            each folder on the way to them contains nothing but the next.
        slice_size: (H, W) in pixels, a multiple of `multiple`; by default the most common size of the training files,
            rounded to a multiple.
        multiple: (H, W) in pixels: the network accepts multiples of it.
        seed: Of the random splits, which are drawn where no folders define them.
        workers: Threads that read files, or processes, as `decode_volumes` takes them. For the phantom, also processes
            that draw it.
        reading: How files become slices. With a table, `data` is where its paths may start; "phantom" stands for the
            table's folder.
        recheck: List the folder and look at every file, even where the cache knows them and no folder has changed.

    Returns:
        The three splits, their intensity scaled one volume at a time, and notices for the user.

    Raises:
        DataError: If the folder, a file or the slice size cannot be used, all slices of a split are constant, or the
            cache cannot be written.
    """
    if not data.strip():  # as a path it would be the current folder
        raise DataError("no data folder: its path is empty")
    size = None
    if slice_size:
        height, width = slice_size
        size = (height, width)
        check_slice_size(size, multiple)
    if reading.table and data == "phantom":
        data = str(reading.table.parent)
    if data != "phantom":
        return load_folder(Path(data), size, multiple, seed, workers, reading, recheck)
    height, width = size or (256, 128)
    # A hash of the code that draws it names the folder, so that a changed phantom is drawn again.
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("phantom.py", "tissues.py"))
    version = hashlib.sha256(code).hexdigest()[:16]
    folder = cache_folder() / f"phantom-{height}x{width}-{version}"
    if not folder.is_dir():
        try:
            with new_cache_entry(folder) as new:
                phantom.write_phantom(new, size=(height, width), workers=workers)
        except ValueError as error:
            raise DataError(f"cannot draw a phantom of {height}x{width}: {error}") from None
    try:
        unnamed = reading._replace(axis=None, pattern=None)
        return load_folder(folder, size, multiple, seed, workers, unnamed, recheck)
    except DataError as error:
        raise DataError(f"{error} (the phantom is kept in {folder}: delete that folder to draw it again)") from error


def read_slices(
    paths: Sequence[Path], slice_size: tuple[int, int], reading: Reading = AS_NAMED
) -> tuple[Slices, list[np.ndarray], list[str]]:
    """Read slices into memory, scaled one volume at a time like training data.

    Args:
        paths: Files and folders; folders are searched for slices at any depth.
        slice_size: (H, W) in pixels, reached by crop or pad.
        reading: How files become slices. A table is not used; a pattern only for names that it matches.

    Returns:
        The slices in the order of `paths`, the affine (4, 4) of each after resampling, crop or pad, and notices for the
        user.

    Raises:
        DataError: If a path or file cannot be used, or if there are no slices.
    """
    found: list[tuple[str, str]] = []  # path, name
    places: dict[str, int] = {}  # index in `paths` by path
    label_maps: list[str] = []
    other_kinds: list[str] = []
    for place, path in enumerate(map(Path, paths)):
        if os.path.isdir(path):
            below, labels, others = find_slices(path)
            own = [(at, (path / name).as_posix()) for at, name in below]
            label_maps += [(path / name).as_posix() for name in labels]
            other_kinds += [(path / name).as_posix() for name in others]
        elif os.path.exists(path) and (not is_slice(name := with_forward_slashes(path.name)) or is_label_map(name)):
            raise DataError(
                f"{path} is no slice: its ending is of no container that is read, or it has the name of a label map"
            )
        else:
            own = [(str(path), path.as_posix())]
        found += own
        for at, _ in own:
            places.setdefault(at, place)
    if not found:
        raise no_slices_error(", ".join(map(str, paths)), label_maps)
    expression = compile_pattern(reading.pattern) if reading.pattern else None
    described = describe_files(
        found, lambda name: (expression and identify_by_pattern(expression, name)) or identify(name)
    )
    files = assign_volumes(find_volumes(described, reading, THREADS))
    files.sort(key=lambda file: (places[file.path], *sort_key(file)))
    pixels = np.zeros((len(files), *slice_size), np.uint8)
    decoded = decode_files(files, slice_size, pixels.__setitem__, None, reading)
    scales, lows = (np.array([getattr(one, name) for one in decoded], np.float32) for name in ("scale", "low"))
    names, cases = [file.name for file in files], [file.case for file in files]
    slices = Slices(pixels, names, cases, positions_of(files), scales, lows)
    notices = other_kind_notices(other_kinds) + label_map_notices(label_maps)
    notices += pixel_notices(files, decoded, slice_size, reading)
    return slices, [one.affine for one in decoded], notices


def batch_indices(count: int, batch_size: int, seed: int, update: int) -> np.ndarray:
    """Return the slices of one update.

    Epochs, each a permutation drawn from the seed and its number, are concatenated and cut into batches. Every slice
    is seen once per epoch, and resuming needs no state.

    Args:
        count: Number of slices.
        batch_size: Slices per update.
        seed: Of the permutations.
        update: Number of the update, from 0.

    Returns:
        (batch_size,) int64 in [0, count).
    """
    start, stop = update * batch_size, (update + 1) * batch_size
    parts = []
    for epoch in range(start // count, (stop - 1) // count + 1):
        first = epoch * count
        parts.append(epoch_permutation(count, seed, epoch)[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


@lru_cache(maxsize=2)  # an update may take the end of one epoch and the beginning of the next
def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `count` slices in one epoch, read-only because it is cached."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order


def batch_rows(count: int, size: int) -> Iterator[range]:
    """Yield the numbers of slices 0 to `count` in order, at most `size` at a time."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels (N, H, W) uint8 to slices (N, 1, H, W) float32 in [-1, 1], on the same device."""
    return pixels.to(torch.float32).div_(127.5).sub_(1).unsqueeze(1)


def denormalize(
    slices: np.ndarray | torch.Tensor, scale: float | np.ndarray, low: float | np.ndarray = 0.0
) -> np.ndarray:
    """Map slices in [-1, 1] back to the data's units, [low, scale] float32; both broadcast against `slices`."""
    low = np.asarray(low, np.float32)
    return (np.asarray(slices, np.float32) + 1) * np.float32(0.5) * (np.asarray(scale, np.float32) - low) + low


def describe_changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Describe how the `files` of one DataSplits differ from those of an earlier one, which are empty if unknown.

    Returns:
        One item per kind of change: "2 added (a.nii, b.nii), 5 altered (d.nii, e.nii, f.nii and 2 more)".
    """
    if not before or before == now:
        return "files or splits differ"
    changes = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "altered": {name for name in before.keys() & now.keys() if before[name] != now[name]},
    }
    listed = (f"{len(names)} {how} ({abbreviate(sorted(names), 3)})" for how, names in changes.items() if names)
    return printable(", ".join(listed))


# ---------------------------------------------------------------- folders


def load_folder(
    folder: Path,
    slice_size: tuple[int, int] | None,
    multiple: tuple[int, int],
    seed: int,
    workers: int | None,
    reading: Reading,
    recheck: bool,
) -> DataSplits:
    """Load a folder as `load_dataset` does."""
    table = reading.table and Path(os.path.abspath(reading.table))  # not resolved: its paths start beside a link
    asked = (CACHE_FORMAT, PERCENTILE, os.path.realpath(folder), multiple, seed, reading._replace(table=table))
    # The given slice size may be the most common one, for which an earlier run without a size made the listing.
    keys = [ascii((*asked, size)) for size in dict.fromkeys((None, slice_size))]
    found = None if recheck else reopen_listing(keys, slice_size)
    notices = listing_notices(found[0]) if found else []
    if not found:
        started = time.time()
        found = list_folder(folder, slice_size, multiple, seed, workers, reading)
        write_listing(keys[-1], found[0], started)
    listing, pixels, index = found
    scales, lows = np.array(index.scales, np.float32), np.array(index.lows, np.float32)
    parts = [slice(*ends) for ends in pairwise(np.cumsum([0, *listing.counts]))]
    train, validate, test = (
        Slices(
            pixels[part], listing.names[part], listing.cases[part], listing.positions[part], scales[part], lows[part]
        )
        for part in parts
    )
    return DataSplits(
        train,
        validate,
        test,
        slice_size=index.slice_size,
        affine=np.array(index.affine),
        scale=index.scale,
        low=index.low,
        files=dict(zip(listing.names, index.checksums)),
        fingerprint=listing.fingerprint,
        notices=[printable(notice) for notice in notices + listing.notices + index.notices],
    )


def reopen_listing(
    keys: list[str], slice_size: tuple[int, int] | None
) -> tuple[Listing, np.ndarray, CacheIndex] | None:
    """Return an earlier listing, and its entry's pixels and index; None if there are none, or the folder changed."""
    for key in keys:
        listing = read_listing(key)
        opened = listing and open_cache_entry(cache_folder() / listing.entry, len(listing.names))
        if listing and opened and slice_size in (None, opened[1].slice_size):
            return listing, *opened
    return None


def list_folder(
    folder: Path,
    slice_size: tuple[int, int] | None,
    multiple: tuple[int, int],
    seed: int,
    workers: int | None,
    reading: Reading,
) -> tuple[Listing, np.ndarray, CacheIndex]:
    """Find the slices of a folder, and return them with their pixels and index, from their cache entry or decoded."""
    folder, files, notices, times = find_data(folder, seed, workers or THREADS, reading)
    # Where names alone do not say them.
    given = [(file.case, file.week, file.number) for file in files] if reading.pattern or reading.table else []
    entry, pixels, index = decode_or_reopen(folder, files, slice_size, multiple, workers, given, reading)
    names, counts = [file.name for file in files], Counter(file.split for file in files)
    content = json.dumps(
        [index.slice_size, [file.split for file in files], dict(zip(names, index.checksums))] + [given] * bool(given)
    )
    one_per_path = list({file.path: (absolute(file.path), file.size, file.mtime_ns) for file in files}.values())
    checked = thin_out(one_per_path)
    if reading.table:
        checked.append((absolute(reading.table), *describe_stats([os.stat(reading.table)])))
    listing = Listing(
        names=names,
        cases=[file.case for file in files],
        positions=positions_of(files),
        counts=[counts[split] for split in SPLITS],
        notices=notices,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        entry=entry.name,
        folders={absolute(path): mtime_ns for path, mtime_ns in times.items()},
        file_count=len(one_per_path),
        checked=checked,
    )
    return listing, pixels, index


def absolute(path: str | Path) -> str:
    """Return an absolute path; unlike os.path.abspath, with the slash at the end that marks a DICOM series."""
    return os.path.join(os.getcwd(), path)


# ---------------------------------------------------------------- cache


class CacheIndex(NamedTuple):
    """The contents of a cache entry besides the pixels."""

    slice_size: tuple[int, int]
    scales: list[float]  # of each slice
    lows: list[float]  # of each slice
    checksums: list[str]  # of each slice
    affine: list[list[float]]
    scale: float
    low: float
    notices: list[str]


def decode_or_reopen(
    folder: Path,
    files: list[SliceFile],
    slice_size: tuple[int, int] | None,
    multiple: tuple[int, int],
    workers: int | None,
    given: list[tuple[str | None, int | None, int | None]],
    reading: Reading,
) -> tuple[Path, np.ndarray, CacheIndex]:
    """Return the cache entry of `files`, its pixels and its index; it is filled first where there is none.

    `given` are their cases, weeks and slice numbers, where names alone do not say them.
    """
    described = [
        (file.split, file.name, file.size, file.mtime_ns) + (() if file.axis is None else (file.axis,))
        for file in files
    ]
    made = (reading.pixel_size, reading.crop, reading.intensity, reading.window)
    choices = (CACHE_FORMAT, PERCENTILE, os.path.realpath(folder), multiple, given, made)
    # The given slice size may be the most common one, for which an earlier run without a size made an entry.
    keys = [ascii((*choices, size, described)).encode() for size in dict.fromkeys((None, slice_size))]
    entries = [cache_folder() / hashlib.sha256(key).hexdigest()[:32] for key in keys]
    for entry in entries:
        opened = open_cache_entry(entry, len(files))
        if opened and slice_size in (None, opened[1].slice_size):
            return entry, *opened
    size = slice_size or most_common_size([file for file in files if file.split == "train"], multiple)
    return entries[-1], *fill_cache_entry(entries[-1], files, size, workers, reading)


def most_common_size(files: list[SliceFile], multiple: tuple[int, int]) -> tuple[int, int]:
    """Return the most common size (H, W), rounded to a multiple of `multiple`."""
    sizes = (file.resampled or file.shape for file in files)
    counts = Counter(size for size in sizes if size)  # decoding reports the bad files
    common = max(counts, key=lambda size: (counts[size], size), default=multiple)
    height, width = (max((side + step // 2) // step, 1) * step for side, step in zip(common, multiple))
    return height, width


def open_cache_entry(entry: Path, count: int) -> tuple[np.ndarray, CacheIndex] | None:
    """Open the entry of `count` slices, or return None where it is missing, damaged or of other data."""
    fields = read_index(entry / "index.json", entry.name, (1 << 20) + INDEX_BYTES * count)
    if not fields:
        return None
    try:
        index = CacheIndex(**fields)
        height, width = index.slice_size
        index = index._replace(slice_size=(height, width))  # JSON has no tuples
        shapes = [np.shape(part) for part in (index.scales, index.lows, index.checksums, index.affine)]
        if shapes != [(count,), (count,), (count,), (4, 4)]:
            return None
        return map_pixels(entry, (count, *index.slice_size)), index
    except (OSError, ValueError, TypeError):
        return None  # decoding again repairs it


def fill_cache_entry(
    entry: Path, files: list[SliceFile], size: tuple[int, int], workers: int | None, reading: Reading
) -> tuple[np.ndarray, CacheIndex]:
    """Decode `files` into a cache entry, in place of what is there."""
    with new_cache_entry(entry, resumable=True) as new:
        with PixelWriter(new, math.prod(size)) as writer:
            decoded = decode_files(files, size, writer.store, workers, reading, writer)
            index = make_index(files, decoded, size, workers, reading)
            writer.flush()  # before the rename, so that a power cut leaves no cache of empty pages
        write_index(new / "index.json", entry.name, index._asdict())
        pixels = map_pixels(new, (len(files), *size))
        rmtree(new.with_name("old"), ignore_errors=True)  # of a process that was killed here
        with suppress(FileNotFoundError):
            entry.rename(new.with_name("old"))  # damaged, or another process's, equal to the new one
    return pixels, index


def make_index(
    files: list[SliceFile], decoded: list[Decoded], size: tuple[int, int], workers: int | None, reading: Reading
) -> CacheIndex:
    """Summarise decoded slices, or raise DataError if all slices of a split are constant."""
    refuse_blank_splits(files, decoded)
    train = [one for file, one in zip(files, decoded) if file.split == "train"]
    limits = {file.volume: (one.low, one.scale) for file, one in zip(files, decoded) if file.split == "train"}
    low, scale = np.median(list(limits.values()), axis=0).tolist()
    grids = [one.affine[:3, :3].round(4).tobytes() for one in train]
    common = train[grids.index(Counter(grids).most_common(1)[0][0])]
    one_per_grid = {one.affine[:3, :3].round(4).tobytes(): one for one in decoded}.values()
    notices = duplicate_notices(files, decoded, workers) + pixel_notices(files, decoded, size, reading)
    notices += spacing_notices(decoded, common) + orientation_notices(one_per_grid, common)
    return CacheIndex(
        slice_size=size,
        scales=[one.scale for one in decoded],
        lows=[one.low for one in decoded],
        checksums=[one.checksum for one in decoded],
        affine=common.affine.tolist(),
        scale=scale,
        low=low,
        notices=notices,
    )


# ---------------------------------------------------------------- notices


def refuse_blank_splits(files: list[SliceFile], decoded: list[Decoded]) -> None:
    """Raise DataError where all slices of a split are constant: they can neither train nor evaluate a network."""
    for split in SPLITS:
        rows = [row for row, file in enumerate(files) if file.split == split]
        if rows and all(decoded[row].constant for row in rows):
            listed = abbreviate([files[row].name for row in rows], 3)
            needed = "every split needs at least one slice that is not"
            raise DataError(f"all {len(rows)} {SPLIT_TITLES[split]} slices are constant ({listed}): {needed}")


def duplicate_notices(files: list[SliceFile], decoded: list[Decoded], workers: int | None) -> list[str]:
    """Report slices with identical pixels, in two splits or in one, whatever their names."""
    counts = Counter(one.quick_digest for one in decoded)
    alike: dict[str, list[SliceFile]] = {}  # by path
    for file, properties in zip(files, decoded):
        if properties.quick_digest and counts[properties.quick_digest] > 1:
            alike.setdefault(file.path, []).append(file)
    # Digests of all slices would cost the first pass 5 to 9 %.
    parts = map_threads(pixel_digests, list(alike.values()), workers or THREADS)
    digests = {name: digest for part in parts for name, digest in part.items()}
    found: dict[str, dict[str | None, list[str]]] = {}  # digest, split, names
    for file in files:
        if file.name in digests:
            found.setdefault(digests[file.name], {}).setdefault(file.split, []).append(file.name)
    notices = []
    for one, other in combinations(SPLITS, 2):
        pairs = [f"{names[one][0]} = {names[other][0]}" for names in found.values() if one in names and other in names]
        if pairs:
            shared = f"{one} and {other} share {counted(len(pairs), 'identical slice')} ({abbreviate(pairs, 2)})"
            notices.append(f"warning: data leak between splits: {shared}")
    for split in SPLITS:
        pairs = [f"{name} = {names[split][0]}" for names in found.values() for name in names.get(split, ())[1:]]
        if pairs:
            notices.append(f"{counted(len(pairs), 'duplicate slice')} in {split} ({abbreviate(pairs, 2)})")
    return notices


def spacing_notices(decoded: list[Decoded], common: Decoded) -> list[str]:
    """Report pixel sizes that differ; samples are written with the pixel size of `common`."""
    sizes = np.linalg.norm([one.affine[:3, :2] for one in decoded], axis=1)
    if (sizes.max(axis=0) <= SAME_SPACING * sizes.min(axis=0)).all():
        return []
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    own = np.linalg.norm(common.affine[:3, :2], axis=0)
    smallest, largest, usual = (f"{height:.3g}x{width:.3g}" for height, width in (*sizes[order[[0, -1]]], own))
    effect = f"--pixel-size resamples them; without it, samples are written with the most common size, {usual} mm"
    return [f"warning: pixel sizes differ, from {smallest} to {largest} mm: {effect}"]


def orientation_notices(slices: Iterable[Decoded], common: Decoded) -> list[str]:
    """Report slices whose axes point in other anatomical directions than those of `common`, which is one of them."""
    orientations = {"".join(map(str, nib.aff2axcodes(one.affine)[:2])) for one in slices}
    if len(orientations) == 1:
        return []
    listed, usual = ", ".join(sorted(orientations)), "".join(map(str, nib.aff2axcodes(common.affine)[:2]))
    treated = f"all are treated as {usual}, the most common in training"
    return [f"warning: slices have different orientations ({listed}): {treated}"]


def pixel_notices(files: list[SliceFile], decoded: list[Decoded], size: tuple[int, int], reading: Reading) -> list[str]:
    """Report slices that were cropped or padded, and unusual values."""
    notices = []
    other = Counter(one.shape for one in decoded if one.shape != size)
    if other:
        sizes = abbreviate([f"{height}x{width}" for height, width in sorted(other)], 10)
        slices = counted(other.total(), "slice")
        how = "cropped or padded about the body" if reading.crop == "body" else "cropped or padded about the centre"
        notices.append(f"{slices} of {sizes} {how} to {size[0]}x{size[1]}")
    if constant := sum(one.constant for one in decoded):
        notices.append(f"{counted(constant, 'constant slice')} kept")
    if negative := sum(one.negative for one in decoded):
        slices = counted(negative, "slice")
        notices.append(f"warning: {slices} with values far below 0, which become black: air should be 0")
    if dark := sum(one.dark for one in decoded):
        reason = "a few far brighter pixels set the intensity scale of the volume"
        if reading.window:
            reason = "few values of their volumes lie in the --window"
        notices.append(f"warning: {counted(dark, 'nearly black slice')}: {reason}")
    if few := [file.name for file, one in zip(files, decoded) if one.few_values]:
        slices = f"{counted(len(few), 'slice')} with fewer than {MIN_VALUES} distinct values, all integers"
        notices.append(f"warning: {slices}, as in label maps ({abbreviate(few, 2)})")
    return notices


if __name__ == "__main__":
    from inspection import main  # here, because it draws figures, which nothing above does

    run_command(main)
