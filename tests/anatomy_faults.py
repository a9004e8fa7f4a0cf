"""Planted faults: real slices turned into slices of no patient, to test what measures see.

Each fault is a function of slices (N, 1, H, W) in [-1, 1], their positions (N,) in [0, 1] or NaN, their N cases and a
seed, and returns N slices. Left and right lie along axis 2 as in HipMRI's slices.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from anatomy import (
    blend,
    blob_fields,
    cut_fields,
    inside_body,
    quilt_fields,
    randomise_phases,
    repeat_side,
    shuffle_patches,
)

Fault = Callable[[Tensor, np.ndarray, Sequence[Hashable], int], Tensor]


def donors_of(positions: np.ndarray, cases: Sequence[Hashable], count: int, seed: int, near: bool) -> np.ndarray:
    """Choose for each slice itself and slices of other patients, if there are any.

    Args:
        positions: (N,).
        cases: N patients.
        count: Slices per collage, including its own.
        seed: Of the choice.
        near: Whether the others are of like height: the nearest slice of each of the patients.

    Returns:
        Indices (N, count) int64; all of one row's others are of different patients while there are enough.
    """
    rng = np.random.default_rng(seed)
    heights = np.where(np.isfinite(positions), positions, 0.5)
    numbers = np.unique([str(case) for case in cases], return_inverse=True)[1]
    patients = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    rows = []
    for index, height in enumerate(heights):
        others = [own for number, own in enumerate(patients) if number != numbers[index]] or patients
        chosen = rng.choice(len(others), count - 1, replace=len(others) < count - 1)
        members = [others[number] for number in chosen]
        picked = [
            own[np.abs(heights[own] - height).argmin()] if near else own[rng.integers(len(own))] for own in members
        ]
        rows.append([index, *picked])
    return np.array(rows)


def gather(slices: Tensor, indices: np.ndarray) -> Tensor:
    """Return the slices at indices (N, K) as channels: (N, K, H, W)."""
    return slices[torch.from_numpy(indices)][:, :, 0]


def quilt(
    slices: Tensor,
    positions: np.ndarray,
    cases: Sequence[Hashable],
    seed: int,
    side: int = 16,
    softness: float = 0.0,
    count: int = 8,
) -> Tensor:
    """Stitch square patches of slices of like height of up to `count` patients; side and softness in pixels."""
    donors = gather(slices, donors_of(positions, cases, count, seed, True))
    return blend(donors, quilt_fields(donors.shape, side, torch.Generator().manual_seed(seed)), softness)


def halves(
    slices: Tensor,
    positions: np.ndarray,
    cases: Sequence[Hashable],
    seed: int,
    axis: int = 2,
    softness: float = 0.0,
    near: bool = True,
) -> Tensor:
    """Join halves of two patients along an axis, of like height or (not `near`) of any."""
    donors = gather(slices, donors_of(positions, cases, 2, seed, near))
    middle = torch.zeros(len(slices))
    return blend(donors, cut_fields(donors.shape, axis, middle, middle), softness)


def blobs(
    slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int, count: int = 3, softness: float = 1.5
) -> Tensor:
    """Join smooth areas of slices of like height of several patients, feathered."""
    donors = gather(slices, donors_of(positions, cases, count, seed, True))
    return blend(donors, blob_fields(donors.shape, (4, 3), torch.Generator().manual_seed(seed)), softness)


def upside_down(slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int) -> Tensor:
    """Exchange front and back."""
    return slices.flip(3)


def one_side(
    slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int, mirrored: bool = True
) -> Tensor:
    """Copy one half to the other side, mirrored or not."""
    return repeat_side(slices, 2, mirrored)


def shuffled(slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int, side: int = 16) -> Tensor:
    """Shuffle patches over the whole slice."""
    return shuffle_patches(slices, side, torch.Generator().manual_seed(seed))


def no_organs(slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int, side: int = 8) -> Tensor:
    """Keep the outline, and fill the body with shuffled patches."""
    texture = shuffle_patches(slices, side, torch.Generator().manual_seed(seed))
    return torch.where(inside_body(slices), texture, slices)


def random_phases(slices: Tensor, positions: np.ndarray, cases: Sequence[Hashable], seed: int) -> Tensor:
    """Keep the spectrum alone."""
    return randomise_phases(slices, torch.Generator().manual_seed(seed))


FAULTS: dict[str, Fault] = {
    "quilt 8": partial(quilt, side=8),
    "quilt 16": partial(quilt, side=16),
    "quilt 32": partial(quilt, side=32),
    "quilt 16, feathered": partial(quilt, softness=2.0),
    "halves of two": halves,
    "halves of two, feathered": partial(halves, softness=2.0),
    "halves of two heights": partial(halves, near=False),
    "front and back of two": partial(halves, axis=3),
    "areas of three": blobs,
    "upside down": upside_down,
    "one side mirrored": one_side,
    "one side repeated": partial(one_side, mirrored=False),
    "shuffled patches": shuffled,
    "no organs": no_organs,
    "random phases": random_phases,
}
