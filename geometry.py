"""The geometry of slices: resampling to square pixels, where the body is, slice size, and cropping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nifti import MAX_SIDE, DataError, RawImage

SAME_STEP = 1e-4  # pixel sizes that differ by a smaller share are the same: 0.03 pixels over 300
BODY_LEVEL = 0.1  # from air, 0, to bright tissue, 1: the body is brighter


# ---------------------------------------------------------------- resampling


def resampled_size(size: Sequence[int], affine: np.ndarray, pixel_size: float) -> tuple[int, int]:
    """Return the size of a slice (H, W) after `resample`: that of the same area, rounded to whole pixels, perhaps 0."""
    height, width = np.linalg.norm(affine[:3, :2], axis=0) * size  # mm
    return round(height / pixel_size), round(width / pixel_size)


def resample(given: RawImage, pixel_size: float) -> RawImage:
    """Resample a slice to square pixels, about its centre.

    The new pixels are weighted means of the old ones: cubic interpolation, whose kernel widens where the slice shrinks,
    so that fine detail is averaged instead of aliased.

    Args:
        given: The slice (H, W).
        pixel_size: In mm, with which neither side of `resampled_size` is 0.

    Returns:
        The slice of size `resampled_size`. Its affine (4, 4) maps the centre of each new pixel to its physical point.
    """
    size = resampled_size(given.image.shape, given.affine, pixel_size)
    step = pixel_size / np.linalg.norm(given.affine[:3, :2], axis=0)  # new pixels in units of old ones
    if np.allclose(step, 1, rtol=SAME_STEP):
        return given
    start = (given.image.shape - size * step) / 2  # the corner of the first new pixel, from that of the first old one
    border = max(0, math.ceil(-start.min()))  # rounding may add half of a new pixel: edge pixels are repeated
    low, high = border + start, border + start + size * step
    picture = Image.fromarray(np.pad(given.image, border, mode="edge"))  # whose x runs along the columns
    made = picture.resize(size[::-1], Image.Resampling.BICUBIC, (low[1], low[0], high[1], high[0]))
    to_old = np.diag([*step, 1, 1])
    to_old[:2, 3] = start + step / 2 - 0.5
    return given._replace(image=np.asarray(made), affine=given.affine @ to_old)


# ---------------------------------------------------------------- body


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Convolve pictures (N, C, H, W) with a Gaussian of `sigma` pixels; edge pixels are repeated."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1.0, device=pictures.device)
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    line = (line / line.sum()).expand(pictures.shape[1], 1, 1, -1)
    padded = F.pad(pictures, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, line, groups=len(line))
    return F.conv2d(rows, line.transpose(2, 3), groups=len(line))


def smooth(mask: Tensor) -> Tensor:
    """Return a mask (N, 1, H, W) bool without the noise: where most of the neighbourhood belongs to it."""
    return blur(mask.float(), 4) > 0.6


def inside_body(slices: Tensor) -> Tensor:
    """Return a mask (N, 1, H, W) bool of the body in slices in [-1, 1], in which air is -1."""
    return smooth(slices > 2 * BODY_LEVEL - 1)


def body_masks(images: Sequence[np.ndarray], air: float, bright: float) -> list[np.ndarray]:
    """Return masks (H, W) bool of the body in images (H, W), given the values of air and of bright tissue."""
    level = air + BODY_LEVEL * (bright - air)
    return [smooth(torch.from_numpy(image > level)[None, None])[0, 0].numpy() for image in images]


def body_middle(masks: Sequence[np.ndarray], affines: Sequence[np.ndarray]) -> np.ndarray:
    """Return where the middle of the body lies in a volume: one point for all slices, which so stay above each other.

    Args:
        masks: (H, W) of each slice, as `body_masks` returns them.
        affines: (4, 4) of each slice.

    Returns:
        (2,) mm along rows and columns, from the centre of a slice to that of the bounding box; 0 if there is no body.
    """
    ends = []
    for mask, affine in zip(masks, affines):
        inside = np.argwhere(mask)
        if len(inside):
            box = np.stack([inside.min(0), inside.max(0) + 1])
            ends.append((box - np.array(mask.shape) / 2) * np.linalg.norm(affine[:3, :2], axis=0))
    if not ends:
        return np.zeros(2)
    return (np.min(ends, (0, 1)) + np.max(ends, (0, 1))) / 2


# ---------------------------------------------------------------- slice size


def check_slice_size(size: tuple[int, int], multiple: tuple[int, int]) -> None:
    """Raise DataError for a size that is out of range or not a multiple of `multiple`."""
    if not all(0 < side <= MAX_SIDE for side in size):
        raise DataError(f"slice size {size[0]}x{size[1]}: each side must be 1 to {MAX_SIDE} pixels")
    below = tuple(max(side // step, 1) * step for side, step in zip(size, multiple))
    above = tuple(-(-side // step) * step for side, step in zip(size, multiple))
    if below != size:
        nearest = " and ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
        raise DataError(f"slice size {size[0]}x{size[1]} does not fit the network: the nearest that do are {nearest}")


def crop_or_pad(
    grey: np.ndarray, size: tuple[int, int], fill: int = 0, shift: Sequence[float] = (0, 0)
) -> tuple[np.ndarray, list[int]]:
    """Crop or pad an image (H, W).

    Args:
        grey: The image.
        size: (H, W) of the result.
        fill: Value of the pixels around the image.
        shift: From the centre of the image to that of the result, in pixels; it lies inside the image.

    Returns:
        The pixels of the new size, and where in the image their first one lies, below 0 where the image is padded.
    """
    corner = [math.ceil((have - want - 1) / 2 + by) for have, want, by in zip(grey.shape, size, shift)]
    source = tuple(slice(max(start, 0), start + want) for start, want in zip(corner, size))
    target = tuple(slice(max(-start, 0), have - start) for start, have in zip(corner, grey.shape))
    pixels = np.full(size, fill, np.uint8)
    pixels[target] = grey[source]
    return pixels, corner
