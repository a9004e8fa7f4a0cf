"""Decode the slices of a data folder: read them, scale their intensity one volume at a time, resample and crop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cache import PixelWriter
from containers import read_image
from files import Reading, SliceFile, file_name, refuse_files
from geometry import body_masks, body_middle, crop_or_pad, resample
from intensity import Limits, air_value, bright_values, to_grey, volume_limits
from nifti import DataError, RawImage
from volumes import cut_volume
from workers import as_computed, process_pool, usable_cores

FAR_BELOW = -0.1  # relative to the percentile: interpolation undershoots 0 by less, normalised slices by more
BLACK = 12  # grey levels of 255: all tissue is brighter
MIN_BRIGHT = 0.02  # of a volume's pixels above that level: a body fills far more
MIN_VALUES = 12  # distinct values of a slice of integers; HipMRI's label maps have 6
SAMPLED = 300  # pixels of a slice that quick checks look at

MAX_VOLUME = 1 << 28  # pixels that are scaled together, 1 GiB as float32; HipMRI's volumes have 5 million
LARGE_VOLUME = 1 << 24  # pixels: larger volumes of one file are decoded one at a time, so that memory does not add up
THREADS = 6  # that read files: more would wait for each other, and each holds its largest slice in memory
PROCESS_SLICES = 50_000  # processes take two seconds to start, in which threads decode a few thousand slices


class Decoded(NamedTuple):
    """The properties of a decoded slice, besides its pixels."""

    scale: float
    low: float
    affine: np.ndarray
    shape: tuple[int, int]  # after resampling, before crop or pad
    constant: bool
    negative: bool  # further below 0 than interpolation undershoots
    few_values: bool  # all integers, as in a label map
    dark: bool  # in a volume that is nearly black at its scale
    quick_digest: str  # equal for equal slices, seldom for others; "" for a constant slice
    checksum: str  # of the uncompressed file


def plain(one: Decoded) -> list[Any]:
    """Return the properties of a slice as JSON can hold them."""
    return list(one._replace(affine=one.affine.tolist()))


def restore(values: list[Any]) -> Decoded:
    """Return the properties of a slice that `plain` has converted."""
    one = Decoded(*values)
    height, width = one.shape
    return one._replace(affine=np.array(one.affine), shape=(height, width))


class Volume(NamedTuple):
    """The slices of one volume that were decoded together, by row."""

    decoded: dict[int, Decoded]
    pixels: dict[int, np.ndarray]  # (H, W) uint8
    bad: dict[int, str]  # reasons; if there are any, nothing else


def decode_files(
    files: list[SliceFile],
    size: tuple[int, int],
    store: Callable[[int, np.ndarray], None],
    workers: int | None,
    reading: Reading,
    writer: PixelWriter | None = None,
) -> list[Decoded]:
    """Read, scale and store `files`.

    Args:
        files: The slices; those of one volume are read and scaled together.
        size: (H, W) in pixels, reached by crop or pad.
        store: Called with a slice's index in `files` and its pixels (H, W) uint8.
        workers: Threads or processes, as `decode_volumes` takes them.
        reading: How slices are resampled, cropped and scaled.
        writer: Records what was decoded, and knows what an earlier process has decoded of these files.

    Raises:
        DataError: If any file cannot be used. The message lists the first ten with their reasons.
    """
    decoded = {row: restore(values) for row, values in writer.recorded.items()} if writer else {}
    volumes: dict[tuple[str, ...], dict[int, SliceFile]] = {}
    for row, file in enumerate(files):
        if row not in decoded:
            volumes.setdefault(file.volume, {})[row] = file
    bad: dict[int, str] = {}
    affines: dict[bytes, np.ndarray] = {}  # one object for all equal ones: a million would fill memory
    with tqdm(total=len(files), initial=len(decoded), desc="reading slices", unit="slice", disable=None) as bar:
        for volume in decode_volumes(list(volumes.values()), size, workers, reading):
            for row, pixels in volume.pixels.items():
                store(row, pixels)
            if writer and volume.decoded:
                writer.record({row: plain(one) for row, one in volume.decoded.items()})
            for row, one in volume.decoded.items():
                decoded[row] = one._replace(affine=affines.setdefault(one.affine.tobytes(), one.affine))
            bad |= volume.bad
            bar.update(len(volume.decoded) + len(volume.bad))
    reasons = {file_name(files[row]): reason for row, reason in bad.items()}
    refuse_files(list(reasons.items()), len({file.path for file in files}))
    return [decoded[row] for row in range(len(files))]


def decode_volumes(
    volumes: list[dict[int, SliceFile]], size: tuple[int, int], workers: int | None, reading: Reading
) -> Iterator[Volume]:
    """Yield volumes as they are decoded: large ones one at a time, so that their memory does not add up, then others.

    Args:
        volumes: Their slices by row.
        size: As in `decode_files`.
        workers: Threads, None for THREADS; processes, None for one per core, where there are so many slices that what
            Python runs in one thread at a time would keep cores waiting.
        reading: As in `decode_files`.

    Raises:
        DataError: A process was killed.
    """
    others = []
    for volume in volumes:
        if is_large(volume):
            yield decode_volume(volume, size, reading)
        else:
            others.append(volume)
    if sum(map(len, others)) < PROCESS_SLICES or workers == 1:
        workers = workers or THREADS
        pool: AbstractContextManager[Executor] = ThreadPoolExecutor(workers)
    else:
        workers = workers or usable_cores()
        pool = process_pool(workers)
    decode = partial(decode_volume, size=size, reading=reading)
    try:
        with pool as executor:
            yield from as_computed(executor, decode, others, most=4 * workers)
    except BrokenExecutor as error:
        raise DataError("a process that decoded slices was killed: is there enough memory?") from error


def decode_volume(volume: dict[int, SliceFile], size: tuple[int, int], reading: Reading) -> Volume:
    """Read the slices of one volume, and scale them together."""
    slices, bad = read_volume(volume)
    return Volume({}, {}, bad) if bad else scale_volume(slices, size, reading)


def is_large(volume: dict[int, SliceFile]) -> bool:
    """Return whether the slices are those of one large file."""
    one = next(iter(volume.values()))
    return one.axis is not None and one.shape is not None and len(volume) * math.prod(one.shape) > LARGE_VOLUME


def read_volume(volume: dict[int, SliceFile]) -> tuple[dict[int, RawImage], dict[int, str]]:
    """Read the slices of one volume: its only file once, or one file for each slice.

    Returns:
        The slices that can be used, and the reasons why others cannot, by row.
    """
    slices: dict[int, RawImage] = {}
    bad: dict[int, str] = {}
    held = 0  # pixels
    first, one = next(iter(volume.items()))
    if one.axis is not None:
        try:
            images = read_file(one)
        except DataError as error:
            return {}, {first: str(error)}
        return {row: images[file.number or 0] for row, file in volume.items()}, {}
    for row, file in volume.items():
        try:
            (slices[row],) = read_file(file)
            held += slices[row].image.size
        except DataError as error:
            bad[row] = str(error)  # the error itself would keep what was read in memory
        if held > MAX_VOLUME:
            bad[row] = f"its volume has more than {MAX_VOLUME} pixels up to this slice"
            break
    return slices, bad


def scale_volume(slices: dict[int, RawImage], size: tuple[int, int], reading: Reading) -> Volume:
    """Scale the slices of one volume together, by their voxels as stored, resample and crop them."""
    ranges = [(one.image.min(), one.image.max()) for one in slices.values()]
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    by_percentile = reading.intensity == "percentile"
    if by_percentile and lowest < highest <= 0:
        reason = "its volume has no values above 0, where tissue should be: try --intensity zscore, or window for CT"
        return Volume({}, {}, dict.fromkeys(slices, reason))
    limits, fill, middle = plan_volume(list(slices.values()), reading)
    decoded: dict[int, Decoded] = {}
    pixels: dict[int, np.ndarray] = {}
    visible = 0
    for (row, given), (low, high) in zip(slices.items(), ranges):
        image, affine, checksum = resample(given, reading.pixel_size) if reading.pixel_size else given
        grey = to_grey(image, limits)
        visible += int(np.count_nonzero(grey > BLACK))
        pixels[row], corner = crop_or_pad(grey, size, fill, middle / np.linalg.norm(affine[:3, :2], axis=0))
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :2] @ corner
        decoded[row] = Decoded(
            scale=float(limits.high),
            low=float(limits.low),
            affine=moved,
            shape=image.shape,
            constant=bool(low == high),
            negative=bool(by_percentile and low < FAR_BELOW * limits.high),
            few_values=bool(low != high) and has_few_values(given.image),
            dark=False,
            quick_digest=digest_values(given.image.shape, sample_pixels(given.image)) if low != high else "",
            checksum=checksum,
        )
    held = sum(math.prod(one.shape) for one in decoded.values())
    if lowest != highest and visible < MIN_BRIGHT * held:
        decoded = {row: one._replace(dark=True) for row, one in decoded.items()}
    return Volume(decoded, pixels, {})


def plan_volume(slices: Sequence[RawImage], reading: Reading) -> tuple[Limits, int, np.ndarray]:
    """Return how a volume is scaled, padded and cropped.

    Returns:
        The limits of its values, the grey level of air, and the middle of the crop, (2,) mm from the slices' centre.
    """
    images, affines = [one.image for one in slices], [one.affine for one in slices]
    bright, on_body, by_percentile = bright_values(images), reading.crop == "body", reading.intensity == "percentile"
    if by_percentile and not on_body:  # the default, which needs neither air nor body
        return volume_limits(images, [], bright, reading), 0, np.zeros(2)
    air = air_value(images)
    masks = body_masks(images, air, bright[0]) if on_body or reading.intensity == "zscore" else []
    limits = volume_limits(images, masks, bright, reading)
    fill = 0 if by_percentile else int(to_grey(np.array([air], np.float32), limits)[0])
    return limits, fill, body_middle(masks, affines) if on_body else np.zeros(2)


def read_file(file: SliceFile) -> list[RawImage]:
    """Read one file as it was when it was found: its slice, or all slices of a volume."""
    image = read_image(file.path, file.size, file.mtime_ns)
    if (image.image.ndim == 3) != (file.axis is not None):
        raise DataError("changed while it was being read: try again once it is complete")
    return [image] if file.axis is None else cut_volume(image, file.axis)


def has_few_values(image: np.ndarray) -> bool:
    """Recognise label maps and the like: a few distinct values, all integers."""
    # The sample alone rules out most slices, at almost no cost.
    return all(
        np.array_equal(values, np.rint(values)) and len(np.unique(values)) < MIN_VALUES
        for values in (sample_pixels(image), image)
    )


def sample_pixels(image: np.ndarray) -> np.ndarray:
    """Return some hundred pixels, without a copy."""
    return image.ravel(order="F")[:: max(1, image.size // SAMPLED)]


def pixel_digests(files: list[SliceFile]) -> dict[str, str]:
    """Return a digest of shape and values, whatever the data type and the header, of slices of one file, by name."""
    try:
        images = [one.image for one in read_file(files[0])]
    except DataError as error:
        raise DataError(f"{file_name(files[0])}: {error}") from error
    chosen = {file.name: images[0 if file.axis is None else file.number or 0] for file in files}
    return {name: digest_values(image.shape, image.ravel(order="F")) for name, image in chosen.items()}


def digest_values(shape: tuple[int, ...], values: np.ndarray) -> str:
    """Return a digest of a shape and values."""
    hashed = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    hashed.update((values + 0).data)  # the sum turns -0 into 0
    return hashed.hexdigest()
