"""Slices in: finds the splits of a folder of 2D NIfTI files, checks every file, scales intensity a volume at a
time, keeps the result in an on-disk cache and hands out batches."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from stat import S_ISREG
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

import phantom

CACHE_FORMAT = 1  # raise it when the same files would give other pixels or another index
PERCENTILE = 99.5  # of a volume's pixels: the value that maps to +1; the few brighter ones are vessels
MAX_SIDE = 4096  # pixels; in-plane MR matrices end near 1024, so a longer side is a broken header
MAX_OFFSET = 1 << 24  # bytes before the pixels; header extensions are kilobytes
DEFLATE_RATIO = 1032  # no deflate stream expands by more
HEADER_BYTES = 540  # the longer of the NIfTI-1 (348) and NIfTI-2 headers
PEEK_BYTES = 4096  # of a file, enough to unzip its header

SPLITS = ("train", "validate", "test")
SPLIT_OF = {"train": "train", "validate": "validate", "validation": "validate", "val": "validate", "test": "test"}
SLICE_NAME = re.compile(r"(case_[0-9]+)(?:_week_([0-9]+))?(?:_slice_([0-9]+))?", re.IGNORECASE)


class DataError(Exception):
    """Data that cannot be used; the message says which and why, and is meant for the user."""


@dataclass(frozen=True)
class Slices:
    """The slices of one split."""

    pixels: np.ndarray  # (N, H, W) uint8, memory-mapped or in memory: 0 is -1, 255 is +1
    names: list[str]  # N paths relative to the data folder, with forward slashes
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
    fingerprint: str  # sha256 of splits, names and pixels, wherever the folder lies
    notices: list[str]  # lines to show the user


class _File(NamedTuple):
    path: str
    name: str  # relative to the data folder, with forward slashes
    size: int
    mtime_ns: int
    case: str | None
    volume: tuple[str, ...]  # what is scaled together
    number: int | None  # of the slice in its volume


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
    crc: int  # of the slice's uint8 pixels


def load_dataset(
    data: str,
    slice_size: tuple[int, int] | None = None,
    multiple: tuple[int, int] = (1, 1),
    seed: int = 0,
    workers: int | None = None,
) -> Dataset:
    """Loads a folder of 2D NIfTI slices, from the cache where the folder was decoded before.

    `data` is "phantom" (drawn at `slice_size`, 256x128 without one, and kept in the cache; a folder of that name
    is "./phantom") or a folder. `slice_size` (H, W) has to be a multiple of `multiple`; without it, the training
    files' most common size is rounded to one. `seed` decides the splits where folders do not.
    Raises DataError for a folder, file or slice size that cannot be used."""
    if slice_size:
        _check_slice_size(slice_size, multiple)
    if data != "phantom":
        return _load_folder(Path(data), slice_size, multiple, seed, workers)
    size = slice_size or (256, 128)
    # The phantom's source names its folder, so that a changed phantom is written anew.
    version = hashlib.sha256(Path(phantom.__file__).read_bytes()).hexdigest()[:16]
    folder = _cache_folder() / f"phantom-{size[0]}x{size[1]}-{version}"
    with ExitStack() as stack:
        if not folder.is_dir():
            try:
                temporary = stack.enter_context(_temporary_in(folder.parent))
            except OSError:  # no cache: the slices end up in memory, and the files are needed only until then
                temporary = stack.enter_context(tempfile.TemporaryDirectory())
                folder = Path(temporary, "phantom")
            new = Path(temporary, "new")
            try:
                new.mkdir()
                phantom.write_phantom(new, size=tuple(size), workers=workers)
                _publish(new, folder)
            except OSError as problem:
                raise DataError(f"the phantom cannot be written: {problem}") from problem
            except ValueError as problem:
                raise DataError(f"no phantom of {size[0]}x{size[1]}: {problem}") from None
        return _load_folder(folder, slice_size, multiple, seed, workers)


def read_slices(paths: Sequence[Path], slice_size: tuple[int, int]) -> tuple[Slices, list[np.ndarray]]:
    """Reads files, and the files below folders, into memory, scaled a volume at a time like training data.

    Gives the slices, in the order of `paths`, and each slice's (4, 4) affine after crop or pad to `slice_size`.
    Raises DataError for a path or file that cannot be used, or when there is none."""
    files: list[_File] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [file._replace(name=(path / file.name).as_posix()) for file in _list_files(path)]
        elif path.exists() and not _is_slice(path.name):
            raise DataError(f"{path} is not a .nii or .nii.gz slice (label maps, seg_*, are not read)")
        else:
            files += _describe([(str(path), path.as_posix())])
    if not files:
        raise DataError(f"no .nii or .nii.gz slices in {', '.join(map(str, paths))}")
    pixels = np.zeros((len(files), *slice_size), np.uint8)
    decoded = _decode(files, pixels, None)
    scales = np.array([one.scale for one in decoded], np.float32)
    slices = Slices(pixels, [file.name for file in files], _positions(files), scales)
    return slices, [one.affine for one in decoded]


def batch_indices(count: int, batch_size: int, seed: int, update: int) -> np.ndarray:
    """Gives the slices of one update (from 0) as (batch_size,) int64 in [0, count).

    Epochs, each a permutation drawn from the seed and its number, are laid end to end and cut into batches: every
    slice is seen once an epoch, and resuming needs no state."""
    start = update * batch_size
    first, last = start // count, (start + batch_size - 1) // count
    epochs = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[start - first * count :][:batch_size]


def intensities(pixels: torch.Tensor) -> torch.Tensor:
    """Slices (N, 1, H, W) float32 in [-1, 1] of pixels (N, H, W) uint8, on their device."""
    return pixels.to(torch.float32).div_(127.5).sub_(1).unsqueeze(1)


def unscale(slices: np.ndarray | torch.Tensor, scale: float | np.ndarray) -> np.ndarray:
    """Maps [-1, 1] back to the data's own range, [0, scale] float32; `scale` broadcasts against `slices`."""
    return (np.asarray(slices, np.float32) + 1) * np.float32(0.5) * np.asarray(scale, np.float32)


# Splits


def _load_folder(
    folder: Path, slice_size: tuple[int, int] | None, multiple: tuple[int, int], seed: int, workers: int | None
) -> Dataset:
    if not folder.exists():
        raise DataError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file: give the folder that holds the slices")
    if (folder / "keras_slices_data").is_dir():
        folder = folder / "keras_slices_data"
    found = _list_files(folder)
    if not found:
        raise DataError(f"no .nii or .nii.gz slices in {folder} (label maps, seg_*, are not read)")
    splits, notices = _find_splits(found, folder, seed)
    files = [file for split in SPLITS for file in splits[split]]
    owners = [split for split in SPLITS for _ in splits[split]]
    described = [(owner, *file[1:4]) for owner, file in zip(owners, files)]
    choices = (CACHE_FORMAT, PERCENTILE, os.path.realpath(folder), slice_size, multiple)
    key = hashlib.sha256(ascii((choices, described)).encode()).hexdigest()[:32]
    cached = _cache_folder() / key
    opened = _open_cache(cached, len(files))
    if opened is None:
        size = tuple(slice_size or _common_size(splits["train"], multiple, workers))
        opened = _fill_cache(cached, files, owners, size, workers)
    pixels, index = opened
    positions, scales = _positions(files), np.array(index["scales"], np.float32)
    ends = np.cumsum([0] + [len(splits[split]) for split in SPLITS])
    parts = [slice(*ends[number : number + 2]) for number in range(3)]
    return Dataset(
        *(Slices(pixels[p], [file.name for file in files[p]], positions[p], scales[p]) for p in parts),
        slice_size=tuple(pixels.shape[1:]),
        affine=np.array(index["affine"]),
        scale=index["scale"],
        fingerprint=index["fingerprint"],
        notices=notices + index["notices"],
    )


def _find_splits(files: list[_File], folder: Path, seed: int) -> tuple[dict[str, list[_File]], list[str]]:
    """Sorts files into train, validate and test, by folder or else by case, and says how."""
    splits: dict[str, list[_File]] = {split: [] for split in SPLITS}
    outside: list[_File] = []
    for file in files:
        top = file.name.partition("/")[0].lower().removeprefix("keras_slices_")  # a file's own name is no key below
        splits.get(SPLIT_OF.get(top, ""), outside).append(file)
    if len(outside) == len(files):
        return _split_by_case(files, SPLITS, seed)
    notices = [f"{len(outside)} files outside the split folders of {folder} are not read"] if outside else []
    if not splits["train"]:
        raise DataError(f"no training slices in {folder}: put them into keras_slices_train or train")
    if not splits["validate"]:
        carved, more = _split_by_case(splits["train"], SPLITS[:2], seed)
        splits.update(train=carved["train"], validate=carved["validate"])
        notices += ["no validation slices: training slices take their place", *more]
    for one, other in combinations(SPLITS, 2):
        shared = {file.case for file in splits[one]} & {file.case for file in splits[other]} - {None}
        if shared:
            notices.append(f"warning: {', '.join(sorted(shared))} in both {one} and {other}: a patient leaks")
    return splits, notices


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
    """Tells slices by name from label maps, from hidden files (macOS leaves ._*.nii) and from all else."""
    return name.lower().endswith((".nii", ".nii.gz")) and not name.lower().startswith(("seg_", "."))


def _list_files(root: Path) -> list[_File]:
    """Finds the slices anywhere below `root`, ordered by folder, case, week, slice number and name."""
    start = len(os.path.join(root, ""))
    found, folders, seen = [], [str(root)], set()
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:  # a link to a folder above would go round for ever
            continue
        seen.add(os.path.realpath(folder))
        try:
            entries = list(os.scandir(folder))
        except OSError as problem:
            raise DataError(f"cannot read folder {folder}: {problem.strerror}") from problem
        for entry in entries:
            if entry.is_dir() and not entry.name.lower().startswith(("keras_slices_seg", ".")):
                folders.append(entry.path)
            elif not entry.is_dir() and _is_slice(entry.name):
                found.append((entry.path, entry.path[start:].replace(os.sep, "/")))
    return sorted(_describe(found), key=lambda file: (file.volume, file.number or 0, file.name))


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
        folder, base = os.path.split(path)
        match = SLICE_NAME.match(base)
        case, week, number = match.groups() if match else (None, None, None)
        volume = (folder, case, week or "") if case else (folder, base)
        number = int(number) if number else None
        files.append(_File(path, name, stat.st_size, stat.st_mtime_ns, case, volume, number))
    _refuse(bad, len(found))
    return files


def _refuse(bad: list[tuple[str, str]], count: int) -> None:
    """Raises DataError listing the first ten bad files of `count`, if there are any."""
    if bad:
        listed = [f"{name}: {reason}" for name, reason in sorted(bad)[:10]]
        rest = [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise DataError(f"{len(bad)} of {count} files cannot be used: " + "; ".join(listed + rest))


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


def _temporary_in(cache: Path) -> tempfile.TemporaryDirectory:
    """Makes a folder on the cache's own disk, from where a finished one can be renamed into the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".partial-", dir=cache, ignore_cleanup_errors=True)


def _publish(finished: Path, folder: Path) -> None:
    """Renames a finished folder to its place; when another process was first, theirs stays."""
    try:
        finished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _open_cache(folder: Path, count: int) -> tuple[np.ndarray, dict] | None:
    """Opens the pixels and index of `count` slices, or gives None where they are missing or damaged."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        pixels = np.lib.format.open_memmap(folder / "pixels.npy", "r")
        whole = pixels.offset + pixels.nbytes == (folder / "pixels.npy").stat().st_size
        if whole and pixels.shape == (count, *index["slice_size"]) and len(index["scales"]) == count:
            return np.asarray(pixels), index
    except (OSError, ValueError, KeyError, TypeError):
        pass  # decoding again makes it whole
    return None


def _fill_cache(
    cached: Path, files: list[_File], owners: list[str], size: tuple[int, int], workers: int | None
) -> tuple[np.ndarray, dict]:
    """Decodes `files` into the cache folder `cached`, or into memory where that cannot be written."""
    try:
        with _temporary_in(cached.parent) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            pixels = _map_pixels(new / "pixels.npy", (len(files), *size))
            index = _make_index(files, owners, _decode(files, pixels, workers), size)
            pixels.flush()  # before the rename, so that a power cut leaves no cache of empty pages
            (new / "index.json").write_text(json.dumps(index))
            if _open_cache(cached, len(files)) is None:
                rmtree(cached, ignore_errors=True)
            _publish(new, cached)
            return _open_cache(cached, len(files)) or (np.asarray(pixels), index)
    except OSError as problem:
        pixels = np.zeros((len(files), *size), np.uint8)
        index = _make_index(files, owners, _decode(files, pixels, workers), size)
        reason = problem.strerror or problem
        index["notices"].append(f"cache {cached.parent} cannot be written ({reason}): slices kept in memory")
        return pixels, index


def _map_pixels(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, but would kill the process at a later write
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, pixels.offset + pixels.nbytes)
    return pixels


def _make_index(files: list[_File], owners: list[str], decoded: list[_Decoded], size: tuple[int, int]) -> dict:
    train = decoded[: owners.count("train")]
    volumes = {file.volume: one.scale for file, one in zip(files, train)}
    grids = [one.affine[:3, :3].round(4).tobytes() for one in train]
    common = grids.index(Counter(grids).most_common(1)[0][0])
    lines = [f"{owner} {file.name} {one.crc:08x}\n" for owner, file, one in zip(owners, files, decoded)]
    content = f"{size}\n{''.join(lines)}".encode(errors="surrogateescape")
    notices = []
    other = Counter(one.shape for one in decoded if one.shape != size)
    if other:
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(other))
        fitted = f"{size[0]}x{size[1]} by centre crop or zero pad"
        notices.append(f"{sum(other.values())} slices of {sizes} brought to {fitted}")
    constant = sum(one.constant for one in decoded)
    if constant:
        notices.append(f"{constant} slices hold one value only (kept)")
    return {
        "slice_size": size,
        "scales": [one.scale for one in decoded],
        "affine": train[common].affine.tolist(),
        "scale": float(np.median(list(volumes.values()))),
        "fingerprint": hashlib.sha256(content).hexdigest(),
        "notices": notices,
    }


# Slice size


def _check_slice_size(size: tuple[int, int], multiple: tuple[int, int]) -> None:
    if not all(0 < side <= MAX_SIDE for side in size):
        raise DataError(f"slice size {size[0]}x{size[1]}: each side has to be 1 to {MAX_SIDE} pixels")
    below = tuple(max(side // step, 1) * step for side, step in zip(size, multiple))
    above = tuple(-(-side // step) * step for side, step in zip(size, multiple))
    if below != tuple(size):
        nearest = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
        raise DataError(f"slice size {size[0]}x{size[1]} does not fit the network: the nearest that do are {nearest}")


def _common_size(files: list[_File], multiple: tuple[int, int], workers: int | None) -> tuple[int, int]:
    """Gives the most common size, from the headers alone, rounded to the network's multiple."""
    with ThreadPoolExecutor(workers) as pool:
        counts = Counter(pool.map(_peek_shape, files))
    del counts[None]  # bad files; decoding says what is wrong with them
    common = max(counts, key=lambda shape: (counts[shape], shape), default=multiple)
    return tuple(max((side + step // 2) // step, 1) * step for side, step in zip(common, multiple))


def _peek_shape(file: _File) -> tuple[int, int] | None:
    try:
        with open(file.path, "rb") as opened:
            return _read_header(opened.read(PEEK_BYTES)).shape
    except (OSError, DataError):
        return None


# Decoding


def _decode(files: list[_File], pixels: np.ndarray, workers: int | None) -> list[_Decoded]:
    """Fills `pixels` (N, H, W) from `files`, volumes in parallel: unzipping lets other threads run.

    Raises DataError listing every bad file."""
    volumes: dict[tuple[str, ...], list[int]] = {}
    for row, file in enumerate(files):
        volumes.setdefault(file.volume, []).append(row)
    decoded: dict[int, _Decoded | DataError] = {}
    bar = tqdm(total=len(files), desc="reading slices", unit="slice", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_decode_volume, files, rows, pixels) for rows in volumes.values()]
        try:
            for job in as_completed(jobs):
                decoded |= job.result()
                bar.update(len(job.result()))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest
            raise
    bad = [(files[row].name, str(one)) for row, one in decoded.items() if isinstance(one, DataError)]
    _refuse(bad, len(files))
    return [decoded[row] for row in range(len(files))]


def _decode_volume(files: list[_File], rows: list[int], pixels: np.ndarray) -> dict[int, _Decoded | DataError]:
    """Reads one volume and writes it, scaled to uint8 and cropped or padded, to its rows of `pixels`."""
    images, bad = {}, {}
    for row in rows:
        try:
            images[row] = _read_image(files[row].path)
        except DataError as problem:
            bad[row] = problem
    if bad:
        return bad
    scale = _volume_scale([image for image, _ in images.values()])
    size = pixels.shape[1:]
    decoded = {}
    for row, (image, affine) in images.items():
        # 256 grey levels, all that a display shows; 255 v / scale is (x + 1) * 127.5 for x in [-1, 1].
        grey = np.clip(image, 0, scale)
        grey /= scale
        grey *= 255
        grey = np.rint(grey, out=grey).astype(np.uint8)
        starts = [(have - want) // 2 for have, want in zip(image.shape, size)]  # below 0 where the slice is padded
        inside = tuple(slice(max(start, 0), max(start, 0) + want) for start, want in zip(starts, size))
        place = tuple(slice(max(-start, 0), max(-start, 0) + have) for start, have in zip(starts, image.shape))
        pixels[row][place] = grey[inside]
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :2] @ starts
        constant = bool(image.min() == image.max())
        decoded[row] = _Decoded(float(scale), moved, image.shape, constant, zlib.crc32(pixels[row]))
    return decoded


def _volume_scale(images: list[np.ndarray]) -> np.float32:
    """Gives the value that maps to +1: the percentile, or for a nearly empty volume its maximum, or else 1."""
    values = np.concatenate([image.ravel(order="K") for image in images])
    rank = PERCENTILE / 100 * (values.size - 1)
    below = int(rank)
    values.partition(below)  # np.percentile gives the same and takes six times as long
    low, high = float(values[below]), float(values[below + 1 :].min())
    for scale in (low + (rank - below) * (high - low), values[below:].max()):
        if scale >= np.finfo(np.float32).tiny:
            return np.float32(scale)
    return np.float32(1)


def _read_image(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file as (H, W) float32 in its own units, and its (4, 4) affine.

    Raises DataError with the reason why it cannot be used."""
    try:
        with open(path, "rb") as file:
            raw = file.read(PEEK_BYTES)
            header = _read_header(raw)
            size = os.fstat(file.fileno()).st_size
            if header.end > size * (DEFLATE_RATIO if _is_zipped(raw) else 1):
                raise DataError(f"cut short: its header needs {header.end} bytes, which {size} cannot hold")
            raw += file.read(min(size, 2 * header.end))  # zipped pixels are never twice their size
    except OSError as problem:
        raise DataError(f"cannot be read: {problem.strerror}") from problem
    data = _unzip(raw, header.end + 1)
    if len(data) < header.end:
        raise DataError(f"cut short: {len(data)} bytes where its header needs {header.end}")
    if len(data) > header.end:
        raise DataError(f"holds more than the {header.end} bytes that its header needs")
    image = np.frombuffer(data, header.dtype, offset=header.offset).reshape(header.shape, order="F")
    with np.errstate(all="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        if header.slope is not None:
            image = image * header.slope + header.inter
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise DataError("holds NaN or infinite voxels, or values beyond float32")
    return image, header.affine


def _is_zipped(raw: bytes) -> bool:
    return raw[:2] == b"\x1f\x8b"


def _unzip(raw: bytes, limit: int) -> bytes:
    """Gives at most `limit` bytes of a file's content, whatever it would expand to."""
    if not _is_zipped(raw):
        return raw[:limit]
    content = b""
    while raw and len(content) < limit:  # once per gzip member; some writers make several
        stream = zlib.decompressobj(wbits=31)
        try:
            content += stream.decompress(raw, limit - len(content))
        except zlib.error as problem:
            raise DataError(f"damaged: {problem}") from problem
        if not stream.eof and len(content) < limit:
            raise DataError(f"cut short: its zipped data ends after {len(content)} bytes")
        raw = stream.unused_data.lstrip(b"\0")  # padding is allowed
    return content


def _read_header(raw: bytes) -> _Header:
    """Reads the header from a file's first bytes. Raises DataError where it is none of a 2D slice."""
    block = _unzip(raw, HEADER_BYTES)
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
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    if len(sides) != 2:
        raise DataError(f"has shape {shape}: these have to be 2D slices")
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise DataError(f"has shape {shape}: each side has to be 1 to {MAX_SIDE} pixels")
    if dtype.kind not in "iuf":
        raise DataError(f"holds {header.get_value_label('datatype')} voxels: they have to be plain numbers")
    if not kind.single_vox_offset <= offset <= MAX_OFFSET:
        raise DataError(f"bad header: pixels at byte {offset}")
    if not np.isfinite(affine).all():
        raise DataError("bad header: its affine is not finite")
    return _Header((sides[0], sides[1]), dtype, offset, slope, inter, affine)
