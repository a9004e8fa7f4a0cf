"""The intensity of a volume: which values become -1 and +1, and the grey levels between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from files import Reading

PERCENTILE = 99.5  # of a volume's pixels: the value that maps to +1; the few brighter ones are vessels
STANDARD_DEVIATIONS = 3  # of the body's values, on both sides of their mean, with --intensity zscore
FLOAT32 = np.finfo(np.float32)


class Limits(NamedTuple):
    """The values of a volume, in the data's units, between which its pixels are scaled linearly and clipped."""

    low: np.float32  # becomes -1
    high: np.float32  # becomes +1


def bright_values(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the percentile of a volume's pixels, and their maximum."""
    values = np.concatenate([image.ravel(order="K") for image in images])
    rank = PERCENTILE / 100 * (values.size - 1)
    below = int(rank)
    values.partition(below)  # np.percentile returns the same and takes six times as long
    low, high = float(values[below]), float(values[below + 1 :].min(initial=values.max()))
    return low + (rank - below) * (high - low), float(values[below:].max())


def air_value(images: Sequence[np.ndarray]) -> float:
    """Return the value of air in a volume: not its lowest one, which may be an artefact, but one of few below it."""
    return float(np.percentile(np.concatenate([image[::4, ::4].ravel() for image in images]), 100 - PERCENTILE))


def percentile_limits(bright: tuple[float, float]) -> Limits:
    """Return 0 and the percentile of a volume, or for a nearly empty volume its maximum, or else 1."""
    high = next((value for value in bright if value >= FLOAT32.tiny), 1.0)
    return Limits(np.float32(0), np.float32(high))


def z_score_limits(images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Limits | None:
    """Return the mean of a volume's body minus and plus STANDARD_DEVIATIONS standard deviations.

    Args:
        images: The slices (H, W).
        masks: (H, W) bool, the body in each.

    Returns:
        None for a volume without a body, or with one of a single value.
    """
    body = np.concatenate([image[mask] for image, mask in zip(images, masks)])
    if not len(body):
        return None
    mean, spread = body.mean(dtype=np.float64), STANDARD_DEVIATIONS * body.std(dtype=np.float64)
    largest = FLOAT32.max / 2  # so that the difference is a float32, too
    limits = Limits(*np.clip((mean - spread, mean + spread), -largest, largest).astype(np.float32))
    return limits if limits.high - limits.low >= FLOAT32.tiny else None


def volume_limits(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], bright: tuple[float, float], reading: Reading
) -> Limits:
    """Return the values of a volume that become -1 and +1.

    Args:
        images: The slices (H, W).
        masks: (H, W) bool, the body in each; only read with --intensity zscore.
        bright: As `bright_values` returns them.
        reading: Says how. Where a z-score is undefined, the limits are those of the percentile.
    """
    if reading.window:
        return Limits(*map(np.float32, reading.window))
    z_score = z_score_limits(images, masks) if reading.intensity == "zscore" else None
    return z_score or percentile_limits(bright)


def to_grey(image: np.ndarray, limits: Limits) -> np.ndarray:
    """Convert an image to 256 grey levels, as many as a display shows: uint8, `low` to `high` becomes 0 to 255."""
    grey = np.clip(image, *limits)
    grey -= limits.low
    grey /= limits.high - limits.low
    grey *= 255
    return np.rint(grey, out=grey).astype(np.uint8)
