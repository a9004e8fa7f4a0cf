"""Slices in: finds the splits of a folder of 2D NIfTI files, checks every file, scales intensity a volume at a
time, keeps the result in an on-disk cache and hands out batches."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from stat import S_ISREG
from threading import Lock
from typing import BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # not on Windows: there what killed first passes leave in the cache stays
    fcntl = None

import nibabel
import numpy as np
import torch
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

import phantom

CACHE_FORMAT = 4  # raise it when the same files would give other pixels or another index
PERCENTILE = 99.5  # of a volume's pixels: the value that maps to +1; the few brighter ones are vessels
BELOW = -0.1  # of that value: interpolation does not reach as far below 0, normalised slices do
BLACK = 12  # grey levels of 255: no tissue is darker
FEWEST_LIGHT = 0.02  # of a volume's pixels above that: a body fills far more
FEWEST_VALUES = 12  # of a slice in whole numbers; HipMRI's label maps have 6
SAMPLED = 300  # pixels of a slice that are looked at first for that
SAME_SPACING = 1.02  # pixel sizes that differ by a smaller factor are rounded otherwise

# What a file may claim. Anyone may have written it: a limit keeps memory, time or later arithmetic in bounds.
MAX_SIDE = 2048  # pixels; in-plane MR matrices end near 1024, so a longer side is a broken header
MAX_OFFSET = 1 << 24  # bytes before the pixels; header extensions are kilobytes
MAX_DISTANCE = 1e9  # of an affine: a kilometre in micrometres; squares of it still fit float32
MIN_DISTANCE = 1e-6  # of an affine: a nanometre in millimetres
MAX_VOLUME = 1 << 28  # pixels that are scaled together, 1 GiB as float32; HipMRI's volumes have 5 million
MAX_FILES = 1_000_000  # slices of a folder: HipMRI has 12,660; records of a million take a gigabyte
MAX_FOLDERS = 100_000  # below the data folder: where there are more, a link leads out of it, to / perhaps
MAX_MEMBERS = 1024  # gzip members of a file; block-wise writers (bgzip) put 64 KiB into each
DEFLATE_RATIO = 1032  # no deflate stream expands by more
HEADER_BYTES = 540  # the longer of the NIfTI-1 (348) and NIfTI-2 headers
PEEK_BYTES = 4096  # of a file, nearly always enough to unzip its header
READ_BYTES = 1 << 18  # of a zipped file at a time, more than most slices have
LARGE_BYTES = 1 << 23  # of a slice: larger ones are read one after the other, so that threads do not add up
THREADS = 6  # that read files: more would wait for each other, and each keeps the memory of its largest slice
INDEX_BYTES = 64  # of the cache's index: more than a slice takes

SPLITS = ("train", "validate", "test")
SPLIT_TITLES = {"train": "training", "validate": "validation", "test": "test"}
SPLIT_WORDS = {
    "train": ("train", "training", "tr", "imagestr"),
    "validate": ("validate", "validation", "valid", "val", "dev", "imagesval"),
    "test": ("test", "testing", "ts", "imagests"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
BESIDE_SPLIT = re.compile("keras|slices?|images?|imgs?|data|(data)?set|splits?|2d|mri?|t2w?|nii|nifti|hip(mri)?")
LABEL_WORD = re.compile(
    "labels?|labelmaps?|labels(tr|ts|val)|masks?|(d|prob)?segs?|segmentations?|annotations?|contours?|delineations?"
    "|gt|groundtruth"
)
IMAGE_WORDS = {"mr", "mrs", "image", "images", "img"}  # HipMRI keeps its volumes in semantic_MRs_anon

# Words start where no letter is before them, or a capital follows a small letter; digits are set off or not.
_START, _SPACE, _OTHERS = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))", r"[-_ .]*", "(?i:week|session|ses|visit|slice)"
CASE = re.compile(  # 004, A004 and 004b, up to the next word
    rf"{_START}((?i:case|patient|subject|sub))(?:{_SPACE}(?=[0-9])|[-_ .]+(?!{_OTHERS}))"
    rf"([A-Za-z]*[0-9][0-9A-Za-z]*?)(?={_OTHERS}{_SPACE}[0-9]|[^0-9A-Za-z]|\Z)"
)
WEEK = re.compile(rf"{_START}(?i:week|session|ses|visit){_SPACE}([0-9]+)")
DIGITS = re.compile("[0-9]+")
NUMBER = re.compile(rf"{_START}(?i:slice){_SPACE}([0-9]+)")


class DataError(Exception):
    """Data that cannot be used; the message says which and why, on one line that is safe to print, for the user."""

    def __init__(self, message: str):
        super().__init__(_printable(message))


@dataclass(frozen=True)
class Slices:
    """The slices of one split."""

    pixels: np.ndarray  # (N, H, W) uint8, memory-mapped or in memory: 0 is -1, 255 is +1
    names: list[str]  # N paths below the folder of the splits, or of the slices, with forward slashes
    cases: list[str | None]  # N patients, as case_004; None where the name gives none
    positions: np.ndarray  # (N,) float32: rank of the slice in its volume, 0 to 1; NaN where the name gives none
    scales: np.ndarray  # (N,) float32: the data's value that maps to +1

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Gives the slices at `indices` as (n, 1, H, W) float32 in [-1, 1]."""
        return intensities(torch.from_numpy(self.pixels[np.asarray(indices, dtype=np.int64)]))

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Gives all slices in order, at most `size` at a time, as `batch` does."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))


@dataclass(frozen=True)
class Dataset:
    """The three splits of a data folder, and what is needed to write slices back like its own."""

    train: Slices
    validate: Slices
    test: Slices
    slice_size: tuple[int, int]
    affine: np.ndarray  # (4, 4): the training slices' most common voxel grid, after crop or pad
    scale: float  # median of the training volumes' scales
    files: dict[str, str]  # of all splits: the slice's name to a checksum of its file's unzipped content
    fingerprint: str  # sha256 of the slice size, splits and `files`, wherever the folder lies
    notices: list[str]  # lines to show the user


class _File(NamedTuple):
    path: str
    name: str  # below the folder of the splits, or of the slices, with forward slashes
    size: int
    mtime_ns: int
    case: str | None
    week: int | None
    number: int | None  # of the slice in its volume
    volume: tuple[str, ...] = ()  # what is scaled together


class _Header(NamedTuple):
    shape: tuple[int, int]
    dtype: np.dtype
    offset: int
    slope: float | None
    inter: float | None
    affine: np.ndarray

    @property
    def end(self) -> int:
        return self.offset + self.shape[0] * self.shape[1] * self.dtype.itemsize


class _Decoded(NamedTuple):
    scale: float
    affine: np.ndarray
    shape: tuple[int, int]  # in the file, before crop or pad
    constant: bool
    negative: bool  # below 0 by more than interpolation makes of an edge
    few_values: bool  # all whole numbers, as in a label map
    dark: bool  # of a volume that is nearly black at its scale
    glance: str  # the same for equal slices, and seldom for others; "" where the slice is constant
    checksum: str  # of the file's content


class _Index(NamedTuple):
    """What the cache keeps beside the pixels."""

    slice_size: tuple[int, int]
    scales: list[float]  # of each slice
    checksums: list[str]
    affine: list[list[float]]
    scale: float
    notices: list[str]


def load_dataset(
    data: str,
    slice_size: Sequence[int] | None = None,
    multiple: tuple[int, int] = (1, 1),
    seed: int = 0,
    workers: int | None = None,
) -> Dataset:
    """Loads a folder of 2D NIfTI slices, from the cache where the folder was decoded before.

    `data` is "phantom" (drawn at `slice_size`, 256x128 without one, and kept in the cache; a folder of that name
    is "./phantom") or a folder; lone folders in it are gone through, down to the splits, to patients or to slices.
    Files and folders whose names say label map are left out. `slice_size` (H, W) has to be a multiple of `multiple`;
    without it, the training files' most common size is rounded to one. `seed` decides the splits where folders do not.
    Raises DataError for a folder, file or slice size that cannot be used, for a split in which every slice holds one
    value only, and for a cache that cannot be written."""
    if not data.strip():  # as a path it would be the current folder
        raise DataError("no folder of slices: its path is empty")
    if slice_size:
        slice_size = tuple(slice_size)
        _check_slice_size(slice_size, multiple)
    if data != "phantom":
        return _load_folder(Path(data), slice_size, multiple, seed, workers)
    size = slice_size or (256, 128)
    # The phantom's source names its folder, so that a changed phantom is written anew.
    version = hashlib.sha256(Path(phantom.__file__).read_bytes()).hexdigest()[:16]
    folder = _cache_folder() / f"phantom-{size[0]}x{size[1]}-{version}"
    if not folder.is_dir():
        try:
            with _new_entry(folder) as new:
                phantom.write_phantom(new, size=size, workers=workers)
        except ValueError as problem:
            raise DataError(f"no phantom of {size[0]}x{size[1]}: {problem}") from None
    try:
        return _load_folder(folder, slice_size, multiple, seed, workers)
    except DataError as problem:
        raise DataError(f"{problem} (the phantom is kept in {folder}: delete it to have it drawn anew)") from problem


def read_slices(paths: Sequence[Path], slice_size: tuple[int, int]) -> tuple[Slices, list[np.ndarray], list[str]]:
    """Reads files, and the files below folders, into memory, scaled a volume at a time like training data.

    Gives the slices, in the order of `paths`, each slice's (4, 4) affine after crop or pad to `slice_size`, and what
    is to be said about them.
    Raises DataError for a path or file that cannot be used, or when there is none."""
    found: list[tuple[int, str, str]] = []  # the place in `paths` comes first
    labels: list[str] = []
    for place, path in enumerate(map(Path, paths)):
        if os.path.isdir(path):
            below, left_out = _find_slices(path)
            found += [(place, at, (path / name).as_posix()) for at, name in below]
            labels += [(path / name).as_posix() for name in left_out]
        elif os.path.exists(path) and (not _is_slice(name := _clean(path.name)) or _is_label_map(name)):
            raise DataError(f"{path} is not a .nii or .nii.gz slice (files whose names say label map are not read)")
        else:
            found.append((place, str(path), path.as_posix()))
    if not found:
        raise _nothing_found(", ".join(map(str, paths)), labels)
    files = _put_into_volumes(_describe([(at, name) for _, at, name in found]))
    rows = sorted(range(len(files)), key=lambda row: (found[row][0], *_order(files[row])))
    files = [files[row] for row in rows]
    pixels = np.zeros((len(files), *slice_size), np.uint8)
    decoded = _decode(files, slice_size, pixels.__setitem__, None)
    scales = np.array([one.scale for one in decoded], np.float32)
    slices = Slices(pixels, [file.name for file in files], [file.case for file in files], _positions(files), scales)
    return slices, [one.affine for one in decoded], _label_notices(labels) + _notices(files, decoded, slice_size)


def batch_indices(count: int, batch_size: int, seed: int, update: int) -> np.ndarray:
    """Gives the slices of one update (from 0) as (batch_size,) int64 in [0, count).

    Epochs, each a permutation drawn from the seed and its number, are laid end to end and cut into batches: every
    slice is seen once an epoch, and resuming needs no state."""
    start = update * batch_size
    first, last = start // count, (start + batch_size - 1) // count
    epochs = [_permutation(count, seed, epoch) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[start - first * count :][:batch_size]


@lru_cache(maxsize=2)  # an update may take the end of one epoch and the beginning of the next
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order


def intensities(pixels: torch.Tensor) -> torch.Tensor:
    """Slices (N, 1, H, W) float32 in [-1, 1] of pixels (N, H, W) uint8, on their device."""
    return pixels.to(torch.float32).div_(127.5).sub_(1).unsqueeze(1)


def unscale(slices: np.ndarray | torch.Tensor, scale: float | np.ndarray) -> np.ndarray:
    """Maps [-1, 1] back to the data's own range, [0, scale] float32; `scale` broadcasts against `slices`."""
    return (np.asarray(slices, np.float32) + 1) * np.float32(0.5) * np.asarray(scale, np.float32)


def changed_files(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Says how the `files` of one Dataset differ from those of an earlier one, or gives [] where they do not.

    One item each, for as many as apply: "2 added (a.nii, b.nii)", "1 removed (c.nii)", "5 altered (d.nii, e.nii,
    f.nii and 2 more)"."""
    changes = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "altered": {name for name in before.keys() & now.keys() if before[name] != now[name]},
    }
    named = {how: _list_first(sorted(names), 3) for how, names in changes.items()}
    return [_printable(f"{len(names)} {how} ({named[how]})") for how, names in changes.items() if names]


# Splits


def _load_folder(
    folder: Path, slice_size: tuple[int, int] | None, multiple: tuple[int, int], seed: int, workers: int | None
) -> Dataset:
    if not os.path.exists(folder):
        raise DataError(f"no such folder: {folder}")
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is a file: give the folder that holds the slices")
    if os.path.isdir(folder / "keras_slices_data"):
        folder = folder / "keras_slices_data"
    found, labels = _find_slices(folder)
    if not found:
        raise _nothing_found(str(folder), labels)
    below = _splits_folder([name for _, name in found])
    named = [(path, name.removeprefix(below)) for path, name in found if name.startswith(below)]
    labels = [name.removeprefix(below) for name in labels if name.startswith(below)]
    folder = folder / below
    splits, notices = _find_splits(sorted(_put_into_volumes(_describe(named)), key=_order), folder, seed)
    files = [file for split in SPLITS for file in splits[split]]
    notices += _label_notices(labels) + _name_notices(files)
    owners = [split for split in SPLITS for _ in splits[split]]
    described = [(owner, *file[1:4]) for owner, file in zip(owners, files)]
    choices = (CACHE_FORMAT, PERCENTILE, os.path.realpath(folder), multiple)
    # The slice size asked for may be the most common one, which an earlier first pass brought the slices to.
    keys = [ascii((*choices, size, described)).encode() for size in dict.fromkeys((None, slice_size))]
    entries = [_cache_folder() / hashlib.sha256(key).hexdigest()[:32] for key in keys]
    kept = (_open_cache(entry, len(files)) for entry in entries)
    opened = next((one for one in kept if one and slice_size in (None, one[1].slice_size)), None)
    if opened is None:
        size = slice_size or _common_size(splits["train"], multiple, workers)
        opened = _fill_cache(entries[-1], files, owners, size, workers)
    pixels, index = opened
    names, cases = [file.name for file in files], [file.case for file in files]
    positions, scales = _positions(files), np.array(index.scales, np.float32)
    checksums = dict(zip(names, index.checksums))
    content = json.dumps([index.slice_size, owners, checksums])
    ends = np.cumsum([0] + [len(splits[split]) for split in SPLITS])
    parts = [slice(*ends[number : number + 2]) for number in range(3)]
    return Dataset(
        *(Slices(pixels[p], names[p], cases[p], positions[p], scales[p]) for p in parts),
        slice_size=index.slice_size,
        affine=np.array(index.affine),
        scale=index.scale,
        files=checksums,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        notices=[_printable(notice) for notice in notices + index.notices],
    )


def _find_splits(files: list[_File], folder: Path, seed: int) -> tuple[dict[str, list[_File]], list[str]]:
    """Sorts files into train, validate and test, by folder or else by case, and says how."""
    splits: dict[str, list[_File]] = {split: [] for split in SPLITS}
    outside: list[_File] = []
    for file in files:
        splits.get(_top_split(file.name), outside).append(file)
    if len(outside) == len(files):
        drawn, notices = _split_by_case(files, SPLITS, seed)
        return drawn, _unused_split_notices(files) + notices
    notices = _unused_split_notices([file for split in SPLITS for file in splits[split]])
    if outside:
        notices.append(f"{len(outside)} files outside the split folders of {folder} are not read")
    if not splits["train"]:
        raise DataError(f"no training slices in {folder}: put them into keras_slices_train or train")
    if not splits["validate"]:
        carved, more = _split_by_case(splits["train"], SPLITS[:2], seed)
        splits.update(train=carved["train"], validate=carved["validate"])
        notices += ["no validation slices: training slices take their place", *more]
    for one, other in combinations(SPLITS, 2):
        shared = {file.case for file in splits[one]} & {file.case for file in splits[other]} - {None}
        if shared:
            notices.append(f"warning: {_list_first(sorted(shared), 10)} in both {one} and {other}: a patient leaks")
    return splits, notices


def _splits_folder(names: list[str]) -> str:
    """Gives the path to the folder that holds the splits, or else several folders or files: "", or it ends in a slash.

    Lone folders on the way are gone through, but for one that is a split or a patient; so is keras_slices_data."""
    below = ""
    while True:
        inside = [name.removeprefix(below).partition("/") for name in names if name.startswith(below)]
        folders = {top for top, slash, _ in inside if slash}
        lone = next(iter(folders)) if len(folders) == 1 and all(slash for _, slash, _ in inside) else None
        if "keras_slices_data" in folders:
            below += "keras_slices_data/"
        elif lone and not _split_of(lone) and not _parse(lone)[0]:
            below += f"{lone}/"
        else:
            return below


def _top_split(name: str) -> str | None:
    """Tells the split of a slice from the first folder of its name."""
    top, slash, _ = name.partition("/")
    return _split_of(top) if slash else None


@lru_cache(maxsize=4096)
def _split_of(folder: str) -> str | None:
    """Tells the split that a folder's name says, of all its words exactly one."""
    words = _words(folder)
    said = [SPLIT_OF[word] for word in words if word in SPLIT_OF]
    others = (word for word in words if word not in SPLIT_OF)
    return said[0] if len(said) == 1 and all(map(BESIDE_SPLIT.fullmatch, others)) else None


def _unused_split_notices(files: list[_File]) -> list[str]:
    """Says which folders are named like splits but lie too deep to be used as such."""
    unused = set()
    for file in files:
        folders = file.name.split("/")[:-1]
        used = _top_split(file.name)
        unused |= {
            "/".join(folders[: depth + 1])
            for depth, folder in enumerate(folders)
            if _split_of(folder) not in (None, used)
        }
    if not unused:
        return []
    listed = _list_first(sorted(unused), 4)
    where = "point --data at the folder that holds the splits"
    return [f"warning: folders named like splits are not used as splits ({listed}): {where}"]


def _label_notices(labels: list[str]) -> list[str]:
    return [f"{len(labels)} label maps are left out ({_list_first(sorted(labels), 1)})"] if labels else []


def _nothing_found(where: str, labels: list[str]) -> DataError:
    reason = ""
    if labels:
        listed = _list_first(sorted(labels), 1)
        reason = f": {len(labels)} files are left out because their names say label map ({listed})"
        reason += "; names above the folder that is given do not count"
    return DataError(f"no .nii or .nii.gz slices in {where}{reason}")


def _name_notices(files: list[_File]) -> list[str]:
    """Says what is not known of slices because their names do not give it."""
    unnamed = sum(file.case is None for file in files)
    unnumbered = sum(file.case is not None and file.number is None for file in files)
    like = "(as in case_004_week_0_slice_12.nii.gz)"
    numbers: set[tuple] = set()
    again = []
    for file in files:
        if file.number is not None and (file.volume, file.number) in numbers:
            again.append(file.name)
        numbers.add((file.volume, file.number))
    notices = []
    if again:
        said = f"{len(again)} slices have the number of another one of their case, week and folder"
        notices.append(f"warning: {said} ({_list_first(again, 2)}): they are scaled together")
    if unnamed:
        of_them = "each of these slices is scaled alone, and neither its patient nor its height is known"
        notices.append(f"{unnamed} names give no case {like}: {of_them}")
    if unnumbered:
        notices.append(f"{unnumbered} names give no slice number {like}: the height of these slices is not known")
    return notices


def _split_by_case(files: list[_File], parts: Sequence[str], seed: int) -> tuple[dict[str, list[_File]], list[str]]:
    """Draws whole cases, about 5 % a split, for validate and test; single files where names give no case."""
    notices = []
    groups = [file.case or file.name for file in files]
    unnamed = sum(file.case is None for file in files)
    if unnamed:
        notices.append(f"warning: {unnamed} names give no case: a patient may be in several splits")
    elif len(set(groups)) == 1:
        notices.append(f"warning: all slices are of {groups[0]}: one patient is in every split")
        groups = [file.name for file in files]
    names = sorted(set(groups))
    if len(names) < 2:
        try:
            _read_image(files[0])
        except DataError as problem:
            _refuse([(files[0].name, str(problem))], 1)
        raise DataError(f"only one slice, {files[0].name}: training and validation need at least one each")
    order = np.random.default_rng(seed).permutation(len(names))
    take = max(1, round(0.05 * len(names)))
    chosen = {}
    for number, part in enumerate(parts[1:]):
        if len(names) >= number + 2:
            chosen.update((names[i], part) for i in order[number * take : (number + 1) * take])
    splits: dict[str, list[_File]] = {split: [] for split in SPLITS}
    for file, group in zip(files, groups):
        splits[chosen.get(group, "train")].append(file)
    counts = ", ".join(f"{len(splits[part])} {part}" for part in parts)
    how = "file" if notices else "case"
    return splits, [*notices, f"split by {how} with seed {seed}: {counts} slices"]


# Finding files


def _is_slice(name: str) -> bool:
    """Tells slices by a clean name from all else, and from hidden files (macOS leaves ._*.nii)."""
    return name.lower().endswith((".nii", ".nii.gz")) and "/." not in f"/{name}"


def _clean(name: str) -> str:
    """Makes slashes of backslashes: zip files made on Windows leave them in the names that they unpack to."""
    if "\\" not in name:
        return name
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _find_slices(root: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Finds the slices anywhere below `root`: the path of each, and its name; and the names of label maps.

    Names are relative to `root`, with forward slashes. Raises DataError where two slices get one name."""
    start = len(os.path.join(root, ""))
    found: dict[str, str] = {}
    labels = []
    for entry in _walk(root):
        name = _clean(entry.path[start:])
        if not _is_slice(name):
            continue
        if _is_label_map(name):
            labels.append(name)
        elif name in found:
            both = f"{found[name]} and {entry.path}"
            raise DataError(f"{both} have one name where a backslash is a slash: remove one of them")
        else:
            found[name] = entry.path
        if len(found) + len(labels) > MAX_FILES:
            raise DataError(f"more than {MAX_FILES} slices are below {root}, label maps counted")
    return [(path, name) for name, path in found.items()], labels


def _walk(root: Path) -> Iterator[os.DirEntry]:
    """Gives what is no folder, anywhere below `root` but in hidden folders."""
    folders, seen = [str(root)], set()
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:  # a link to a folder above would go round for ever
            continue
        seen.add(os.path.realpath(folder))
        if len(seen) > MAX_FOLDERS:
            raise DataError(f"more than {MAX_FOLDERS} folders are below {root}")
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        yield entry
                    elif not entry.name.startswith("."):
                        folders.append(entry.path)
        except OSError as problem:
            raise DataError(f"cannot read folder {folder}: {problem.strerror}") from problem


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _describe(found: list[tuple[str, str]]) -> list[_File]:
    """Makes a record of each (path, name). Raises DataError listing those that are not regular files."""
    files, bad = [], []
    for path, name in found:
        try:
            stat = os.stat(path)
        except OSError as problem:
            bad.append((name, problem.strerror))
            continue
        if not S_ISREG(stat.st_mode):  # opening a pipe would wait for ever, and a device may never end
            bad.append((name, "not a regular file"))
        elif not stat.st_size:
            bad.append((name, "empty"))
        files.append(_File(path, name, stat.st_size, stat.st_mtime_ns, *_identify(name)))
    _refuse(bad, len(found))
    return files


def _put_into_volumes(files: list[_File]) -> list[_File]:
    """Sets the volume of each file: the slices of one case and week of a split, in whatever folders.

    But where these hold a slice number twice, or slices without a number in several folders, the folders are different
    series, and each is a volume. A slice without a case is one alone."""
    groups: dict[tuple, list[tuple[int, str]]] = {}
    for row, file in enumerate(files):
        folder, _, base = file.name.rpartition("/")
        series = _series_folder(folder, base)
        groups.setdefault((_splits_above(folder), file.case, file.week), []).append((row, series))
    volumes: list[tuple[str, ...]] = [()] * len(files)
    for (_, case, week), group in groups.items():
        numbers = [files[row].number for row, _ in group if files[row].number is not None]
        loose = {series for row, series in group if files[row].number is None}
        together = len(set(numbers)) == len(numbers) and len(loose) < 2
        first = min(series for _, series in group)
        for row, series in group:
            alone = (series, files[row].name.rpartition("/")[2], files[row].name)
            shared = (first if together else series, case, "" if week is None else f"{week:03}")
            volumes[row] = shared if case else alone
    return [file._replace(volume=volume) for file, volume in zip(files, volumes)]


@lru_cache(maxsize=4096)
def _splits_above(folder: str) -> tuple[str, ...]:
    return tuple(filter(None, map(_split_of, folder.split("/"))))


def _series_folder(folder: str, base: str) -> str:
    """Gives a slice's folder, but for parts that hold it alone: Windows unpacks x.nii.gz to x.nii/x.nii."""
    series = _without_slices(folder)
    stem = _stem(base)
    return "/".join(part for part in series.split("/") if _stem(part) != stem) if stem in series.lower() else series


@lru_cache(maxsize=4096)
def _without_slices(folder: str) -> str:
    """Leaves out the parts of a path that say a slice number."""
    return "/".join(part for part in folder.split("/") if _parse(part)[2] is None)


def _stem(name: str) -> str:
    return name.lower().removesuffix(".gz").removesuffix(".nii")


def _order(file: _File) -> tuple:
    """What files are sorted by: folder, case, week, slice number and name."""
    return file.volume, file.number or 0, file.name


def _refuse(bad: list[tuple[str, str]], count: int) -> None:
    """Raises DataError listing the first ten bad files of `count`, if there are any."""
    if bad:
        listed = _list_first([f"{name}: {reason}" for name, reason in sorted(bad)], 10, "; ")
        raise DataError(f"{len(bad)} of {count} files cannot be used: {listed}")


def _list_first(items: list[str], most: int, between: str = ", ") -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + rest


def _printable(text: str) -> str:
    """Escapes what would break a line or steer a terminal: file names may hold any character but / and NUL."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# Names


def _words(name: str) -> list[str]:
    """Splits a name at what is no letter or digit, and where a capital starts a word; gives small letters."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


def _is_label_map(name: str) -> bool:
    """Tells label maps by the names of a file and of the folders that it lies in."""
    folder, _, base = name.rpartition("/")
    return _holds_label_maps(folder) or _names_label_map(DIGITS.sub("0", base))


@lru_cache(maxsize=4096)  # folders come again with each of their files
def _holds_label_maps(folder: str) -> bool:
    said = [_words(part) for part in folder.split("/")]
    return any(_says_label(words) or "semantic" in words and IMAGE_WORDS.isdisjoint(words) for words in said)


@lru_cache(maxsize=4096)  # files differ in their numbers, which are all 0 here
def _names_label_map(base: str) -> bool:
    words = _words(base)
    return _says_label(words) or "semantic" in words


def _says_label(words: list[str]) -> bool:
    bare = {word.strip("0123456789") for word in words}  # as in mask1
    return any(map(LABEL_WORD.fullmatch, bare)) or {"ground", "truth"} <= bare


def _identify(name: str) -> tuple[str | None, int | None, int | None]:
    """Gives case, week and slice number: what a file's name does not say, its folders may, the deepest first.

    Without a case there is no number, since slices of several patients would have the same."""
    folder, _, base = name.rpartition("/")
    case, week, number = (own if own is not None else above for own, above in zip(_parse(base), _parse_all(folder)))
    return case, week, number if case else None


@lru_cache(maxsize=4096)
def _parse_all(folder: str) -> tuple[str | None, int | None, int | None]:
    """Gives case, week and slice number of the deepest folder that says each."""
    said = [_parse(part) for part in reversed(folder.split("/"))]
    return tuple(next((one for one in of if one is not None), None) for of in zip(*said))


def _parse(part: str) -> tuple[str | None, int | None, int | None]:
    """Gives case, week and slice number of a file's or folder's name; numbers are compared, not their digits."""
    case, week, number = CASE.search(part), WEEK.search(part), NUMBER.search(part)
    if case:
        case = f"{case[1].lower()}_{DIGITS.sub(_pad, case[2].lower())}"
    return case, week and int(week[1]), number and int(number[1])


def _pad(digits: re.Match[str]) -> str:
    return f"{int(digits[0]):03}"


def _positions(files: list[_File]) -> np.ndarray:
    numbers: dict[tuple[str, ...], set[int]] = {}
    for file in files:
        if file.number is not None:
            numbers.setdefault(file.volume, set()).add(file.number)
    places = {
        (volume, number): rank / (len(found) - 1) if len(found) > 1 else 0.5
        for volume, found in numbers.items()
        for rank, number in enumerate(sorted(found))
    }
    return np.array([places.get((file.volume, file.number), np.nan) for file in files], np.float32)


# Cache


def _cache_folder() -> Path:
    if os.environ.get("PROSTATEVQ_CACHE"):
        return Path(os.environ["PROSTATEVQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prostatevq")


@contextmanager
def _new_entry(entry: Path) -> Iterator[Path]:
    """Gives a new folder on the cache's disk and, once it is filled, renames it to `entry`: all of it or nothing.

    When another process was first, theirs stays. Raises DataError where the cache cannot be written."""
    cache = entry.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (
            _lock(cache),
            tempfile.TemporaryDirectory(prefix=".partial-", dir=cache, ignore_cleanup_errors=True) as partial,
        ):
            new = Path(partial, "new")
            new.mkdir()
            yield new
            try:
                new.rename(entry)
            except OSError as problem:
                # Not by a look at the entry: a third process may have moved it away by now, to put its own there.
                if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except OSError as problem:
        reason = problem.strerror or problem
        choice = "make room there, or name another folder with $PROSTATEVQ_CACHE"
        raise DataError(f"the cache folder {cache} cannot be written ({reason}): {choice}") from problem


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Marks the cache as being written to, after removing what killed processes left there.

    The kernel drops a process's lock when it ends, however it ends. All hold it shared while they write, so that who
    gets it alone knows that no folder is another's work."""
    with ExitStack() as stack:
        if fcntl:
            # One for each user, since another's could not be opened in a cache that several share.
            lock = stack.enter_context(open(cache / f".lock-{os.getuid()}", "ab"))
            with suppress(OSError):  # others are at work, or the disk has no locks: what is dead cannot be told
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in cache.glob(".partial-*"):
                    if left.lstat().st_uid == os.getuid():
                        rmtree(left, ignore_errors=True)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _open_cache(folder: Path, count: int) -> tuple[np.ndarray, _Index] | None:
    """Opens the pixels and index of `count` slices, or gives None where they are missing, damaged or another's."""
    try:
        with _open(folder / "index.json") as file:
            checksum, _, body = file.read((1 << 20) + INDEX_BYTES * count).partition(b"\n")
        if checksum != _index_checksum(folder.name, body):
            return None
        index = _Index(**json.loads(body))
        index = index._replace(slice_size=tuple(index.slice_size))
        if [np.shape(part) for part in (index.scales, index.checksums, index.affine)] != [(count,), (count,), (4, 4)]:
            return None
        return _map_pixels(folder, (count, *index.slice_size)), index
    except (OSError, ValueError, TypeError):
        return None  # decoding again makes it whole


def _index_checksum(key: str, body: bytes) -> bytes:
    """Tells a damaged index, and with the key in it, one that belongs to other data."""
    return hashlib.sha256(key.encode() + body).hexdigest().encode()


def _map_pixels(folder: Path, shape: tuple[int, int, int]) -> np.ndarray:
    with _open(folder / "pixels.uint8") as file:
        if os.fstat(file.fileno()).st_size != math.prod(shape):
            raise ValueError("cut or not of these slices")
        return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))


def _fill_cache(
    cached: Path, files: list[_File], owners: list[str], size: tuple[int, int], workers: int | None
) -> tuple[np.ndarray, _Index]:
    """Decodes `files` into the cache folder `cached`, in place of what is there."""
    with _new_entry(cached) as new:
        # Written, not mapped: at a write a full disk is an error, in mapped memory it would kill the process.
        with open(new / "pixels.uint8", "wb") as file:
            writing = Lock()

            def keep(row: int, pixels: np.ndarray) -> None:
                with writing:
                    file.seek(row * pixels.size)
                    file.write(pixels)

            index = _make_index(files, owners, _decode(files, size, keep, workers), size, workers)
            file.flush()
            os.fsync(file.fileno())  # before the rename, so that a power cut leaves no cache of empty pages
        body = json.dumps(index._asdict()).encode()
        (new / "index.json").write_bytes(_index_checksum(cached.name, body) + b"\n" + body)
        pixels = _map_pixels(new, (len(files), *size))
        with suppress(FileNotFoundError):
            cached.rename(new.with_name("old"))  # damaged, or another process's twin of the new one
    return pixels, index


def _make_index(
    files: list[_File], owners: list[str], decoded: list[_Decoded], size: tuple[int, int], workers: int | None
) -> _Index:
    _refuse_blank(files, owners, decoded)
    train = decoded[: owners.count("train")]
    volumes = {file.volume: one.scale for file, one in zip(files, train)}
    grids = [one.affine[:3, :3].round(4).tobytes() for one in train]
    common = grids.index(Counter(grids).most_common(1)[0][0])
    notices = _twin_notices(files, owners, decoded, workers) + _notices(files, decoded, size)
    notices += _spacing_notices(decoded, train[common])
    orientations = {nibabel.aff2axcodes(one.affine)[:2] for one in dict(zip(grids, train)).values()}
    if len(orientations) > 1:
        listed = ", ".join(sorted("".join(map(str, codes)) for codes in orientations))
        notices.append(f"warning: training slices lie differently in the body ({listed}): all are taken to lie as most")
    return _Index(
        slice_size=size,
        scales=[one.scale for one in decoded],
        checksums=[one.checksum for one in decoded],
        affine=train[common].affine.tolist(),
        scale=float(np.median(list(volumes.values()))),
        notices=notices,
    )


def _refuse_blank(files: list[_File], owners: list[str], decoded: list[_Decoded]) -> None:
    """Raises DataError where no slice of a split shows anything: nothing is learned from it or measured with it."""
    for split in SPLITS:
        rows = [row for row, owner in enumerate(owners) if owner == split]
        if rows and all(decoded[row].constant for row in rows):
            listed = _list_first([files[row].name for row in rows], 3)
            raise DataError(
                f"all {len(rows)} {SPLIT_TITLES[split]} slices hold one value only ({listed}): no split may be blank"
            )


def _twin_notices(files: list[_File], owners: list[str], decoded: list[_Decoded], workers: int | None) -> list[str]:
    """Says which slices are there twice, whatever their names: in two splits, or in one."""
    counts = Counter(one.glance for one in decoded)
    alike = [row for row, one in enumerate(decoded) if one.glance and counts[one.glance] > 1]
    with ThreadPoolExecutor(workers or THREADS) as pool:  # of all slices it would cost the first pass 5 to 9 %
        digests = list(pool.map(_digest, [files[row] for row in alike]))
    found: dict[str, dict[str, list[str]]] = {}
    for row, digest in zip(alike, digests):
        found.setdefault(digest, {}).setdefault(owners[row], []).append(files[row].name)
    notices = []
    for one, other in combinations(SPLITS, 2):
        pairs = [f"{names[one][0]} is {names[other][0]}" for names in found.values() if one in names and other in names]
        if pairs:
            shared = f"{len(pairs)} slices are in both {one} and {other}, whatever their names"
            notices.append(f"warning: {shared} ({_list_first(pairs, 2)}): the splits leak")
    for split in SPLITS:
        pairs = [f"{name} is {names[split][0]}" for names in found.values() for name in names.get(split, ())[1:]]
        if pairs:
            notices.append(f"{len(pairs)} slices of {split} are there twice ({_list_first(pairs, 2)})")
    return notices


def _spacing_notices(decoded: list[_Decoded], common: _Decoded) -> list[str]:
    """Says that pixel sizes differ, where they do; those of `common` are what samples get."""
    sizes = np.linalg.norm([one.affine[:3, :2] for one in decoded], axis=1)
    if (sizes.max(axis=0) <= SAME_SPACING * sizes.min(axis=0)).all():
        return []
    order = np.argsort(sizes.prod(axis=1), kind="stable")
    own = np.linalg.norm(common.affine[:3, :2], axis=0)
    smallest, largest, usual = (f"{height:.3g}x{width:.3g}" for height, width in (*sizes[order[[0, -1]]], own))
    kept = f"slices are not resampled, and samples are written with the most common, {usual} mm"
    return [f"warning: pixel sizes differ, from {smallest} to {largest} mm: {kept}"]


def _notices(files: list[_File], decoded: list[_Decoded], size: tuple[int, int]) -> list[str]:
    """Says what became of slices that were brought to `size`."""
    notices = []
    other = Counter(one.shape for one in decoded if one.shape != size)
    if other:
        sizes = _list_first([f"{height}x{width}" for height, width in sorted(other)], 10)
        fitted = f"{size[0]}x{size[1]} by centre crop or zero pad"
        notices.append(f"{sum(other.values())} slices of {sizes} brought to {fitted}")
    constant = sum(one.constant for one in decoded)
    if constant:
        notices.append(f"{constant} slices hold one value only (kept)")
    negative = sum(one.negative for one in decoded)
    if negative:
        notices.append(f"warning: {negative} slices have values far below 0, which become black: 0 has to be air's")
    dark = sum(one.dark for one in decoded)
    if dark:
        notices.append(f"warning: {dark} slices are nearly black: a few pixels of their volumes are far brighter")
    few = [file.name for file, one in zip(files, decoded) if one.few_values]
    if few:
        fewer = f"{len(few)} slices hold fewer than {FEWEST_VALUES} whole values each, as label maps do"
        notices.append(f"warning: {fewer} ({_list_first(few, 2)})")
    return notices


# Slice size


def _check_slice_size(size: tuple[int, int], multiple: tuple[int, int]) -> None:
    if not all(0 < side <= MAX_SIDE for side in size):
        raise DataError(f"slice size {size[0]}x{size[1]}: each side has to be 1 to {MAX_SIDE} pixels")
    below = tuple(max(side // step, 1) * step for side, step in zip(size, multiple))
    above = tuple(-(-side // step) * step for side, step in zip(size, multiple))
    if below != size:
        nearest = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
        raise DataError(f"slice size {size[0]}x{size[1]} does not fit the network: the nearest that do are {nearest}")


def _common_size(files: list[_File], multiple: tuple[int, int], workers: int | None) -> tuple[int, int]:
    """Gives the most common size, from the headers alone, rounded to the network's multiple."""
    with ThreadPoolExecutor(workers or THREADS) as pool:
        counts = Counter(pool.map(_peek_shape, files))
    del counts[None]  # bad files; decoding says what is wrong with them
    common = max(counts, key=lambda shape: (counts[shape], shape), default=multiple)
    return tuple(max((side + step // 2) // step, 1) * step for side, step in zip(common, multiple))


def _peek_shape(file: _File) -> tuple[int, int] | None:
    try:
        with _open(file.path) as opened:
            return _read_header(opened).shape
    except (OSError, DataError):
        return None


# Decoding


def _decode(
    files: list[_File], size: tuple[int, int], keep: Callable[[int, np.ndarray], None], workers: int | None
) -> list[_Decoded]:
    """Reads `files`, volumes in parallel (unzipping lets other threads run), and hands each slice's pixels, (H, W)
    uint8 of `size`, to `keep` with its place in `files`.

    Raises DataError listing every bad file."""
    volumes: dict[tuple[str, ...], list[int]] = {}
    for row, file in enumerate(files):
        volumes.setdefault(file.volume, []).append(row)
    decoded: dict[int, _Decoded | str] = {}
    bar = tqdm(total=len(files), desc="reading slices", unit="slice", disable=None)
    with bar, ThreadPoolExecutor(workers or THREADS) as pool:
        jobs = [pool.submit(_decode_volume, files, rows, size, keep) for rows in volumes.values()]
        try:
            for job in as_completed(jobs):
                decoded |= job.result()
                bar.update(len(job.result()))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest
            raise
    _refuse([(files[row].name, one) for row, one in decoded.items() if isinstance(one, str)], len(files))
    return [decoded[row] for row in range(len(files))]


def _decode_volume(
    files: list[_File], rows: list[int], size: tuple[int, int], keep: Callable[[int, np.ndarray], None]
) -> dict[int, _Decoded | str]:
    """Reads one volume and keeps its slices, scaled to uint8 and cropped or padded; or says which files are bad."""
    images, bad, held = {}, {}, 0
    for row in rows:
        try:
            images[row] = _read_image(files[row])
            held += images[row][0].size
        except DataError as problem:
            bad[row] = str(problem)  # the error itself would hold on to what was read
        if held > MAX_VOLUME:
            bad[row] = f"the slices of its case and week up to it have more than {MAX_VOLUME} pixels"
            break
    if bad:
        return bad
    scale = _volume_scale([image for image, _, _ in images.values()])
    decoded, lows, highs, light = {}, [], [], 0
    for row, (image, affine, checksum) in images.items():
        low, high = image.min(), image.max()
        lows.append(low)
        highs.append(high)
        # 256 grey levels, all that a display shows; 255 v / scale is (x + 1) * 127.5 for x in [-1, 1].
        grey = np.clip(image, 0, scale)
        grey /= scale
        grey *= 255
        grey = np.rint(grey, out=grey).astype(np.uint8)
        light += np.count_nonzero(grey > BLACK)
        starts = [(have - want) // 2 for have, want in zip(image.shape, size)]  # below 0 where the slice is padded
        inside = tuple(slice(max(start, 0), max(start, 0) + want) for start, want in zip(starts, size))
        place = tuple(slice(max(-start, 0), max(-start, 0) + have) for start, have in zip(starts, image.shape))
        pixels = np.zeros(size, np.uint8)
        pixels[place] = grey[inside]
        keep(row, pixels)
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :2] @ starts
        decoded[row] = _Decoded(
            scale=float(scale),
            affine=moved,
            shape=image.shape,
            constant=bool(low == high),
            negative=bool(low < BELOW * scale),
            few_values=bool(low != high) and _has_few_values(image),
            dark=False,
            glance=_glance(image) if low != high else "",
            checksum=checksum,
        )
    if min(lows) < max(highs) <= 0:
        return dict.fromkeys(rows, "its volume has no values above 0: intensities have to start at 0 (air)")
    if min(lows) != max(highs) and light < FEWEST_LIGHT * held:
        return {row: one._replace(dark=True) for row, one in decoded.items()}
    return decoded


def _has_few_values(image: np.ndarray) -> bool:
    """Tells label maps and the like: a few different values, all whole numbers."""
    # Most slices are told by the sample, in no time.
    return all(np.array_equal(of, np.rint(of)) and len(np.unique(of)) < FEWEST_VALUES for of in (_sample(image), image))


def _sample(image: np.ndarray) -> np.ndarray:
    """Gives some hundred pixels, without a copy."""
    return image.ravel(order="F")[:: max(1, image.size // SAMPLED)]


def _glance(image: np.ndarray) -> str:
    """Gives a digest of shape and sample."""
    return _digest_values(image.shape, _sample(image))


def _digest(file: _File) -> str:
    """Gives a digest of shape and values, whatever the file's type and header are."""
    try:
        image, _, _ = _read_image(file)
    except DataError as problem:
        raise DataError(f"{file.name}: {problem}") from problem
    return _digest_values(image.shape, image.ravel(order="F"))


def _digest_values(shape: tuple[int, int], values: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(values + 0)  # so that -0 is 0
    return digest.hexdigest()


def _volume_scale(images: list[np.ndarray]) -> np.float32:
    """Gives the value that maps to +1: the percentile, or for a nearly empty volume its maximum, or else 1."""
    values = np.concatenate([image.ravel(order="K") for image in images])
    rank = PERCENTILE / 100 * (values.size - 1)
    below = int(rank)
    values.partition(below)  # np.percentile gives the same and takes six times as long
    low, high = float(values[below]), float(values[below + 1 :].min(initial=values.max()))
    for scale in (low + (rank - below) * (high - low), values[below:].max()):
        if scale >= np.finfo(np.float32).tiny:
            return np.float32(scale)
    return np.float32(1)


_LARGE_SLICE = Lock()


def _read_image(file: _File) -> tuple[np.ndarray, np.ndarray, str]:
    """Reads one file: (H, W) float32 in its own units, its (4, 4) affine, and a checksum of its unzipped content.

    Raises DataError with the reason why it cannot be used."""
    try:
        with _open(file.path) as opened:
            header = _read_header(opened)
            with _LARGE_SLICE if header.end > LARGE_BYTES else nullcontext():
                data = _read_data(opened, file, header.end)
                return _to_image(data, header), header.affine, f"{zlib.crc32(data):08x}"
    except OSError as problem:
        raise DataError(f"cannot be read: {problem.strerror}") from problem


@contextmanager
def _open(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a regular file. Raises OSError for what may have taken its place: a pipe is not waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as opened:
        if not S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield opened


def _read_data(opened: BinaryIO, file: _File, size: int) -> bytes | bytearray:
    """Reads the content of `file`, which has to be of `size` bytes."""
    if size > file.size * DEFLATE_RATIO:
        raise DataError(f"cut short: its header needs {size} bytes, which {file.size} cannot hold")
    data = _read_content(opened, size + 1)
    stat = os.fstat(opened.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError("changed while it was read: start again when it is complete")
    if len(data) < size:
        raise DataError(f"cut short: {len(data)} bytes where its header needs {size}")
    if len(data) > size:
        raise DataError(f"holds more than the {size} bytes that its header needs")
    return data


def _read_content(opened: BinaryIO, limit: int) -> bytes | bytearray:
    """Reads at most `limit` bytes of a file's content from its beginning, whatever it would unzip to."""
    opened.seek(0)
    zipped = opened.read(2) == b"\x1f\x8b"
    opened.seek(0)
    if not zipped:
        return opened.read(limit)
    stream, members = zlib.decompressobj(wbits=31), 1
    content, raw = bytearray(), opened.read(PEEK_BYTES)
    while len(content) < limit and (raw := raw or opened.read(READ_BYTES)):
        # What is zipped is never twice as long, but for names and notes; empty members would go on for ever.
        if opened.tell() > 2 * (limit + READ_BYTES) or members > MAX_MEMBERS:
            raise DataError("damaged: its zipped data is far longer than its content")
        if stream.eof:  # some writers make several members
            raw = raw.lstrip(b"\0")  # padding is allowed
            if not raw:
                continue
            stream, members = zlib.decompressobj(wbits=31), members + 1
        try:
            content += stream.decompress(raw, min(limit - len(content), READ_BYTES))
        except zlib.error as problem:
            raise DataError(f"damaged: {problem}") from problem
        raw = stream.unused_data or stream.unconsumed_tail
    if len(content) < limit and not stream.eof:
        raise DataError(f"cut short: its zipped data ends after {len(content)} bytes")
    return content


def _to_image(data: bytes | bytearray, header: _Header) -> np.ndarray:
    image = np.frombuffer(data, header.dtype, offset=header.offset).reshape(header.shape, order="F")
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        if header.slope is not None:
            image = image * header.slope
            image += header.inter
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise DataError("holds NaN or infinite voxels, or values beyond float32")
    return image


def _read_header(opened: BinaryIO) -> _Header:
    """Reads a file's header. Raises DataError where it is none of a 2D slice."""
    block = bytes(_read_content(opened, HEADER_BYTES))
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        length = kind.template_dtype.itemsize
        for order, mark in (("little", "<"), ("big", ">")):
            if len(block) >= length and int.from_bytes(block[:4], order) == length:
                return _parse_header(kind, block[:length], mark)
    raise DataError("not a NIfTI file")


@lru_cache(maxsize=4096)  # slices often share a header, and each is read for the slice size and for its pixels
def _parse_header(kind: type[nibabel.Nifti1Header], block: bytes, mark: str) -> _Header:
    try:
        with np.errstate(all="ignore"):
            header = kind(block, endianness=mark, check=False)
            shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
            slope, inter = header.get_slope_inter()
            affine = header.get_best_affine()
    except KeyError as code:
        raise DataError(f"bad header: unknown data type {code}") from code
    except (HeaderDataError, ValueError, OverflowError) as problem:
        raise DataError(f"bad header: {problem}") from problem
    if header["magic"].item() != kind.single_magic:
        raise DataError("not a single-file NIfTI")
    axes = _slice_axes(shape)
    if not axes:
        raise DataError(f"has shape {shape}: these have to be 2D slices")
    sides = [shape[axis] for axis in axes]
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise DataError(f"has shape {shape}: each side has to be 1 to {MAX_SIDE} pixels")
    if dtype.kind not in "iuf":
        raise DataError(f"holds {header.get_value_label('datatype')} voxels: they have to be plain numbers")
    if not kind.single_vox_offset <= offset <= MAX_OFFSET:
        raise DataError(f"bad header: pixels at byte {offset}")
    affine = affine[:, [*axes, 3 - sum(axes), 3]]  # as many pixels on, as many millimetres on
    return _Header((sides[0], sides[1]), dtype, offset, slope, inter, _check_affine(affine))


def _slice_axes(shape: tuple[int, ...]) -> list[int]:
    """Gives the two of the three axes in space that a slice has, all but the one that is a voxel thick: the last of
    several. Gives [] for the shape of a line, a volume or a series."""
    if len(shape) < 2 or any(side != 1 for side in shape[3:]):
        return []
    if len(shape) == 2 or shape[2] == 1:
        return [0, 1]
    axes = [axis for axis in range(3) if shape[axis] != 1]
    return axes if len(axes) == 2 else []


def _check_affine(affine: np.ndarray) -> np.ndarray:
    """Gives the (4, 4) affine, its third axis completed where a 2D writer left that empty: a unit across the slice.

    Raises DataError where it gives pixels no place or no area."""
    if not np.abs(affine).max() <= MAX_DISTANCE:  # NaN is not
        raise DataError("bad header: its affine is not finite, or far away")
    across = np.cross(affine[:3, 0], affine[:3, 1])
    area = np.linalg.norm(across)
    if area < MIN_DISTANCE**2:
        raise DataError("bad header: its affine gives pixels no area")
    if np.linalg.norm(affine[:3, 2]) < MIN_DISTANCE:
        affine[:3, 2] = across / area
    return affine
