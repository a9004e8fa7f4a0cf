"""Changes of training slices: left-right flips, and the augmentation that the prior is conditioned on."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Standard deviations of the augmentation at strength 1: radians; logarithm; in the coordinates of grid_sample, in which
# a side is 2 long; logarithm.
ROTATION, LOG_SCALE, SHIFT, LOG_GAMMA = 0.06, 0.05, 0.03, 0.15


def flip(slices: Tensor, axis: int, chosen: Tensor) -> Tensor:
    """Flip the `chosen` (N,) bool of slices (N, 1, H, W) along an axis: a pelvis is symmetric."""
    return torch.where(chosen[:, None, None, None], slices.flip(axis), slices)


def augment(slices: Tensor, parameters: Tensor) -> Tensor:
    """Rotate, scale and shift slices and change their contrast a little, as patients differ.

    Pixels from outside the slice are reflected at its edge: the body reaches the edge, and samples should not reproduce
    black borders.

    Args:
        slices: (N, 1, H, W) in [-1, 1].
        parameters: (N, 6): rotation, scale and shift along both axes, gamma. 1 stands for 3.4 degrees, 5 %, 1.5 % of a
            side, and 15 % of gamma, the exponent of brightness in [0, 1].
    """
    height, width = slices.shape[2:]
    angle = ROTATION * parameters[:, 0]
    scale = (LOG_SCALE * parameters[:, 1:3]).exp()
    shift = SHIFT * parameters[:, 3:5]
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale[:, 0], -sin * scale[:, 0] * height / width, shift[:, 0]], 1)
    row_y = torch.stack([sin * scale[:, 1] * width / height, cos * scale[:, 1], shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(slices.shape), align_corners=False)
    # Bicubic: linear interpolation would blur, and samples with it.
    moved = F.grid_sample((slices + 1) / 2, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    gamma = (LOG_GAMMA * parameters[:, 5]).exp()[:, None, None, None]
    return 2 * moved.clamp(0, 1) ** gamma - 1
