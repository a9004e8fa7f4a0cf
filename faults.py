"""Planted faults: real slices turned into what a bad model could draw, to learn what an evaluation sees.

Slices are (N, 1, H, W) in [-1, 1]. Pixels from outside a slice are reflected at its edge, as in training. Everything
random uses a seed.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anatomy import (
    blend,
    blob_fields,
    cut_fields,
    quilt_fields,
    randomise_phases,
    repeat_side,
    shuffle_patches,
)
from augmentation import augment
from copying import gaussian_blur
from geometry import inside_body


class Originals(NamedTuple):
    """Slices that faults are made of."""

    slices: Tensor  # (N, 1, H, W)
    positions: np.ndarray  # (N,) in [0, 1], NaN for unknown
    cases: Sequence[Hashable]  # N patients
    side_axis: int = 2  # the axis, 2 or 3, from left to right
    seed: int = 0


Fault = Callable[[Originals], Tensor]  # returns N slices, on the device of the originals


# ---------------------------------------------------------------- texture and intensity


def add_noise(slices: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of a standard deviation, in the units of slices."""
    noise = torch.randn(slices.shape, generator=torch.Generator().manual_seed(seed))
    return (slices + sigma * noise.to(slices.device)).clamp(-1, 1)


def add_chequerboard(slices: Tensor, amplitude: float) -> Tensor:
    """Add and subtract an amplitude, in the units of slices, at neighbouring pixels in turn."""
    rows, columns = (torch.arange(side, device=slices.device) for side in slices.shape[2:])
    sign = 1 - 2 * ((rows[:, None] + columns) % 2)
    return (slices + amplitude * sign).clamp(-1, 1)


def brighten(slices: Tensor, factor: float) -> Tensor:
    """Multiply brightness, in [0, 1]; what exceeds 1 is cut."""
    return ((slices + 1) * factor - 1).clamp(-1, 1)


def change_gamma(slices: Tensor, gamma: float) -> Tensor:
    """Raise brightness, in [0, 1], to a power."""
    return 2 * ((slices + 1) / 2).clamp(0, 1) ** gamma - 1


# ---------------------------------------------------------------- shape


def vary(slices: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Alter slices as training does, at a strength of augmentation (`--augmentation`)."""
    parameters = strength * torch.randn(len(slices), 6, generator=torch.Generator().manual_seed(seed))
    return augment(slices, parameters.to(slices.device))


def move(
    slices: Tensor, shift: tuple[float, float] = (0, 0), degrees: float = 0, stretch: tuple[float, float] = (1, 1)
) -> Tensor:
    """Shift, turn and stretch slices about their centres.

    Args:
        slices: (N, 1, H, W).
        shift: In pixels, down and to the right.
        degrees: Clockwise.
        stretch: Factors along H and W.
    """
    height, width = slices.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # From the pixel of the result to that of the slice, in the units of affine_grid: half sides.
    row_x = [cos / stretch[1], sin * height / width / stretch[1], 0.0]
    row_y = [-sin * width / height / stretch[0], cos / stretch[0], 0.0]
    for row in (row_x, row_y):
        row[2] = -row[0] * 2 * shift[1] / width - row[1] * 2 * shift[0] / height
    matrix = torch.tensor([row_x, row_y], device=slices.device).expand(len(slices), -1, -1)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="reflection", align_corners=False)


def bend(slices: Tensor, pixels: float, seed: int = 0) -> Tensor:
    """Displace the pixels of slices smoothly: a random displacement every quarter of the width, interpolated.

    Args:
        slices: (N, 1, H, W).
        pixels: Standard deviation of the displacement along each axis at those places.
        seed: Of the displacements.
    """
    (count, _, height, width), places = slices.shape, (round(4 * slices.shape[2] / slices.shape[3]) + 1, 5)
    coarse = torch.randn(count, 2, *places, generator=torch.Generator().manual_seed(seed)).to(slices.device)
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    shifts = pixels * fine * 2 / fine.new_tensor([width, height]).view(1, 2, 1, 1)
    identity = torch.eye(2, 3, device=slices.device).expand(count, -1, -1)
    grid = F.affine_grid(identity, list(slices.shape), align_corners=False) + shifts.permute(0, 2, 3, 1)
    return F.grid_sample(slices, grid, padding_mode="reflection", align_corners=False)


def join_halves(slices: Tensor, others: Tensor, axis: int) -> Tensor:
    """Join the first half of each slice to the second half of another along an axis, 2 or 3."""
    half = slices.shape[axis] // 2
    return torch.cat([slices.narrow(axis, 0, half), others.narrow(axis, half, others.shape[axis] - half)], axis)


def paste_disc(slices: Tensor, others: Tensor, radius: float, edge: float = 1.0) -> Tensor:
    """Paste the central disc of each slice into another.

    Args:
        slices: (N, 1, H, W).
        others: (N, 1, H, W).
        radius: In pixels.
        edge: Width of the soft edge in pixels.
    """
    height, width = slices.shape[2:]
    y = torch.arange(height, device=slices.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=slices.device) - (width - 1) / 2
    inside = ((radius - (x**2 + y**2).sqrt()) / edge + 0.5).clamp(0, 1)
    return inside * slices + (1 - inside) * others


# ---------------------------------------------------------------- anatomy


def donors_of(originals: Originals, count: int, near: bool) -> np.ndarray:
    """Choose for each slice itself and slices of other patients, if there are any.

    Args:
        originals: N slices.
        count: Slices per collage, including its own.
        near: Whether the others are of like height: the nearest slice of each of the patients.

    Returns:
        Indices (N, count) int64; all of one row's others are of different patients while there are enough.
    """
    rng = np.random.default_rng(originals.seed)
    heights = np.where(np.isfinite(originals.positions), originals.positions, 0.5)
    numbers = np.unique([str(case) for case in originals.cases], return_inverse=True)[1]
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


def collage(originals: Originals, donors: np.ndarray, fields: Tensor, softness: float) -> Tensor:
    """Compose slices of the donors (N, K) with the largest field (N, K, H, W) at each pixel; see `anatomy.blend`."""
    device = originals.slices.device
    pictures = originals.slices.cpu()[torch.from_numpy(donors)][:, :, 0]
    return blend(pictures, fields, softness).to(device)


def quilt(originals: Originals, side: int = 16, softness: float = 0.0, count: int = 8) -> Tensor:
    """Stitch square patches of slices of like height of up to `count` patients; side and softness in pixels."""
    donors = donors_of(originals, count, True)
    shape = (*donors.shape, *originals.slices.shape[2:])
    return collage(
        originals, donors, quilt_fields(shape, side, torch.Generator().manual_seed(originals.seed)), softness
    )


def halves(originals: Originals, across: bool = False, softness: float = 0.0, near: bool = True) -> Tensor:
    """Join the sides (or, `across`, front and back) of two patients, of like height or (not `near`) of any."""
    donors = donors_of(originals, 2, near)
    axis = 5 - originals.side_axis if across else originals.side_axis
    middle = torch.zeros(len(donors))
    fields = cut_fields((*donors.shape, *originals.slices.shape[2:]), axis, middle, middle)
    return collage(originals, donors, fields, softness)


def blobs(originals: Originals, count: int = 3, softness: float = 1.5) -> Tensor:
    """Join smooth areas of slices of like height of several patients, feathered."""
    donors = donors_of(originals, count, True)
    random = torch.Generator().manual_seed(originals.seed)
    return collage(
        originals, donors, blob_fields((*donors.shape, *originals.slices.shape[2:]), (4, 3), random), softness
    )


def upside_down(originals: Originals) -> Tensor:
    """Exchange front and back."""
    return originals.slices.flip(5 - originals.side_axis)


def one_side(originals: Originals, mirrored: bool = True) -> Tensor:
    """Copy one half to the other side, mirrored or not."""
    return repeat_side(originals.slices, originals.side_axis, mirrored)


def shuffled(originals: Originals, side: int = 16) -> Tensor:
    """Shuffle patches over the whole slice."""
    own = originals.slices
    return shuffle_patches(own.cpu(), side, torch.Generator().manual_seed(originals.seed)).to(own.device)


def no_organs(originals: Originals, side: int = 8) -> Tensor:
    """Keep the outline, and fill the body with shuffled patches."""
    return torch.where(inside_body(originals.slices), shuffled(originals, side), originals.slices)


def random_phases(originals: Originals) -> Tensor:
    """Keep the spectrum alone."""
    own = originals.slices
    return randomise_phases(own.cpu(), torch.Generator().manual_seed(originals.seed)).to(own.device)


def pure_noise(originals: Originals) -> Tensor:
    """Replace slices by uniform noise."""
    own, random = originals.slices, torch.Generator().manual_seed(originals.seed)
    return (2 * torch.rand(own.shape, generator=random) - 1).to(own.device)


# ---------------------------------------------------------------- variety


def each_twice(originals: Originals) -> Tensor:
    """Draw the first half of the slices, each twice."""
    count = len(originals.slices)
    return originals.slices[torch.arange(count, device=originals.slices.device) % ((count + 1) // 2)]


def upper_half(originals: Originals) -> Tensor:
    """Draw the upper half of the heights only, each twice."""
    order = torch.from_numpy(np.argsort(originals.positions, kind="stable")).to(originals.slices.device)
    count = len(order)
    upper = order[torch.arange(count, device=order.device) // 2 + (count - (count + 1) // 2)]
    return originals.slices[upper]


# ---------------------------------------------------------------- lists


def of_slices(alter: Callable[..., Tensor], *arguments: object, **options: object) -> Fault:
    """Make a fault of a function of slices alone."""
    return lambda originals: alter(originals.slices, *arguments, **options)


TEXTURE_FAULTS: dict[str, Fault] = {
    "noise 0.01": of_slices(add_noise, 0.01),
    "noise 0.02": of_slices(add_noise, 0.02),
    "noise 0.05": of_slices(add_noise, 0.05),
    "chequerboard 0.01": of_slices(add_chequerboard, 0.01),
    "chequerboard 0.02": of_slices(add_chequerboard, 0.02),
    "brighter by 0.5 %": of_slices(brighten, 1.005),
    "brighter by 2 %": of_slices(brighten, 1.02),
    "brighter by 5 %": of_slices(brighten, 1.05),
    "blur 0.5 pixels": of_slices(gaussian_blur, 0.5),
}
VARIETY_FAULTS: dict[str, Fault] = {"each twice": each_twice, "upper half of heights": upper_half}
ANATOMY_FAULTS: dict[str, Fault] = {
    "quilt 8": partial(quilt, side=8),
    "quilt 16": partial(quilt, side=16),
    "quilt 32": partial(quilt, side=32),
    "quilt 16, feathered": partial(quilt, softness=2.0),
    "halves of two": halves,
    "halves of two, feathered": partial(halves, softness=2.0),
    "halves of two heights": partial(halves, near=False),
    "front and back of two": partial(halves, across=True),
    "areas of three": blobs,
    "upside down": upside_down,
    "one side mirrored": one_side,
    "one side repeated": partial(one_side, mirrored=False),
    "shuffled patches": shuffled,
    "no organs": no_organs,
    "random phases": random_phases,
    "pure noise": pure_noise,
}
Copy = Callable[[Originals, Tensor], Tensor]  # of training slices and N slices of other patients; returns N slices
COPIES: dict[str, Copy] = {
    "exact": lambda own, _: own.slices,
    "mirrored": lambda own, _: own.slices.flip(own.side_axis),
    "shifted by 8 pixels": lambda own, _: move(own.slices, (8, -8)),
    "turned by 8 degrees": lambda own, _: move(own.slices, degrees=8),
    "stretched by 8 %": lambda own, _: move(own.slices, stretch=(1.08, 1.08)),
    "gamma 0.6": lambda own, _: change_gamma(own.slices, 0.6),
    "brighter by 30 %": lambda own, _: brighten(own.slices, 1.3),
    "noise 0.1": lambda own, _: add_noise(own.slices, 0.1),
    "blur 1 pixel": lambda own, _: gaussian_blur(own.slices, 1),
    "bent by 1 % of the width": lambda own, _: bend(own.slices, own.slices.shape[3] / 100),
    "augmentation 1": lambda own, _: vary(own.slices, 1),
    "augmentation 2": lambda own, _: vary(own.slices, 2),
    "one side": lambda own, others: join_halves(own.slices, others, own.side_axis),
    "front": lambda own, others: join_halves(own.slices, others, 5 - own.side_axis),
    "disc of a third": lambda own, others: paste_disc(own.slices, others, min(own.slices.shape[2:]) / 3),
}
