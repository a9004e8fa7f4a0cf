"""Cut volumes into slices: which axis they are stacked along, and one orientation for all patients.

Every volume is first turned to the orientation that is closest to x left, y to the back, z up (LPS+), by exchanging
and reversing axes, without interpolation. Slices of patients whose scanners stored them in other orders then lie alike,
and as figures show them: the patient's left at the right, the front or the head on top.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from nifti import RawImage

SAME_SPACING = 1.02  # voxel sizes that differ by a smaller factor differ by rounding
# By the axis that slices are stacked along: of sagittal and coronal slices, the second axis has to point downwards.
ORIENTATIONS = ("LPI", "LPI", "LPS")


class Stack(NamedTuple):
    """How a volume is cut."""

    axis: int  # of the turned volume, along which slices are stacked: 0 sagittal, 1 coronal, 2 axial
    slices: int
    size: tuple[int, int]  # (H, W) of a slice


def plan_stack(shape: tuple[int, ...], affine: np.ndarray, axis: int | None) -> Stack:
    """Return how a volume is cut.

    Args:
        shape: Of the volume as stored, (A, B, C).
        affine: Of the volume as stored, (4, 4).
        axis: Of the turned volume; None for the one with the largest voxels, which is the last one in case of a tie.
    """
    order = np.argsort(turn_of(affine, 2)[:, 0])  # the stored axis that becomes each axis
    if axis is None:
        spacing = nib.affines.voxel_sizes(affine)[order]
        axis = 2 if SAME_SPACING * spacing[2] >= spacing.max() else int(np.argmax(spacing))
    sides = [shape[stored] for stored in order]
    slices = sides.pop(axis)
    return Stack(axis, slices, (sides[0], sides[1]))


def cut_volume(volume: RawImage, axis: int) -> list[RawImage]:
    """Cut a volume (A, B, C) into slices.

    Args:
        volume: As stored.
        axis: Of the turned volume, along which slices are stacked.

    Returns:
        The slices (H, W), from right to left, from front to back or from the feet up. Their affines map (row, column,
        0) to the physical point of the same voxel. Their checksums depend on the file and on their own pixels.
    """
    turn = turn_of(volume.affine, axis)
    pixels = np.ascontiguousarray(np.moveaxis(apply_orientation(volume.image, turn), axis, 0))
    lowest = affine_of_slices(volume.image.shape, volume.affine, axis)
    start, slices = int(volume.checksum, 16), []
    for index, image in enumerate(pixels):
        affine = lowest.copy()
        affine[:3, 3] += index * lowest[:3, 2]
        slices.append(RawImage(image, affine, f"{zlib.crc32(image.data, start):08x}"))
    return slices


def affine_of_slices(shape: tuple[int, ...], affine: np.ndarray, axis: int) -> np.ndarray:
    """Return the affine (4, 4) of the first slice of a volume, given its shape and affine as stored."""
    turned = affine @ inv_ornt_aff(turn_of(affine, axis), shape)
    return turned[:, [*(other for other in range(3) if other != axis), axis, 3]]


def turn_of(affine: np.ndarray, axis: int) -> np.ndarray:
    """Return nibabel's orientation transform (3, 2) of a volume that is cut along an axis."""
    return ornt_transform(io_orientation(affine), axcodes2ornt(ORIENTATIONS[axis]))
