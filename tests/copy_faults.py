"""Altered copies of slices, to test the search for copies: slices in, altered slices out.

Slices are (N, 1, H, W) in [-1, 1]. Pixels from outside a slice are reflected at its edge, as in training. Everything
random uses a seed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import AUGMENTATIONS, augment


def vary(slices: Tensor, strength: float, seed: int = 0) -> Tensor:
    """Alter slices as training does, at a strength of augmentation (`--augmentation`)."""
    random = torch.Generator().manual_seed(seed)
    return augment(slices, strength * torch.randn(len(slices), AUGMENTATIONS, generator=random))


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


def change_gamma(slices: Tensor, gamma: float) -> Tensor:
    """Raise brightness, in [0, 1], to a power."""
    return 2 * ((slices + 1) / 2).clamp(0, 1) ** gamma - 1


def brighten(slices: Tensor, factor: float) -> Tensor:
    """Multiply brightness, in [0, 1]; what exceeds 1 is cut."""
    return ((slices + 1) * factor - 1).clamp(-1, 1)


def add_noise(slices: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise of a standard deviation, in the units of slices."""
    noise = torch.randn(slices.shape, generator=torch.Generator().manual_seed(seed))
    return (slices + sigma * noise.to(slices.device)).clamp(-1, 1)


def blur(slices: Tensor, sigma: float) -> Tensor:
    """Convolve slices with a Gaussian of a standard deviation in pixels."""
    reach = max(1, math.ceil(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=slices.device) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    slices = F.conv2d(F.pad(slices, (0, 0, reach, reach), mode="reflect"), line.view(1, 1, -1, 1))
    return F.conv2d(F.pad(slices, (reach, reach, 0, 0), mode="reflect"), line.view(1, 1, 1, -1))


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
