"""Draw the embedded data set: a procedural male pelvis, T2-weighted, in the layout of HipMRI's processed 2D slices.

HipMRI may not be redistributed, so a first run and the tests use these slices. Nothing in them comes from a scan. A
small random vector per patient determines the anatomy, which is made of implicit shapes. Each tissue has the signal
and the texture of tissues.py. Coil shading and Rician noise are added.

    python phantom.py OUT                                         120 + 10 + 10 patients, 20 slices each
    python phantom.py OUT --cases 8 2 2 --slices 10 --size 64 32  a small set

Coordinates are in mm, for a patient of reference size: x along the rows (left-right, 0 at the mid-line), y along the
columns (0 at the centre of the image, negative in front), z towards the head (0 at the centre of the prostate). The
image always covers 410 x 205 mm. Slices are 3 mm apart and centred 3 mm above the centre of the prostate. About 90 mm
of height, 30 slices, are modelled: a taller stack repeats the outermost anatomy.

This module imports no other module of the project but tissues.py and workers.py.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from tissues import SIGNAL, STRANDED_ALONG, TISSUES
from workers import process_pool, usable_cores

LABELS = ("background", "body", "bone", "bladder", "rectum", "prostate")
BACKGROUND, BODY, BONE, BLADDER, RECTUM, PROSTATE = range(6)
SPLITS = ("train", "validate", "test")
FIELD_OF_VIEW = (410.0, 205.0)  # mm, rows and columns
SLICE_STEP = 3.0  # mm
STACK_CENTRE = 3.0  # mm above the centre of the prostate
BOX = ((-100.0, 100.0), (-205.0, 205.0), (-102.5, 102.5))  # mm, z x y: where textures are defined

Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # limits along three axes, mm
Window = tuple[slice, slice, slice]  # indices of a part of the volume: slices, rows, columns
Layers = Sequence[tuple[float, str]]  # (grow, tissue): a shape grown by so many mm is filled with that tissue

# ---------------------------------------------------------------- noise


def smooth_noise(
    rng: np.random.Generator, places: Sequence[np.ndarray], spacing: Sequence[float], box: Box = BOX
) -> np.ndarray:
    """Draw correlated noise of mean 0 and variance about 1: a random grid, upsampled by a cubic B-spline.

    The grid spans the box, so that the noise at a place does not depend on which other places are sampled.

    Args:
        rng: Draws the grid.
        places: Increasing coordinates along each of three axes, in mm, inside `box`.
        spacing: Grid step along each axis, in mm.
        box: Limits of the grid along each axis, in mm.

    Returns:
        (S, H, W) float32, one value per combination of places.
    """
    grid = rng.standard_normal([int((b - a) / d) + 4 for (a, b), d in zip(box, spacing)], dtype=np.float32)
    steps = [(place - a) / d for place, (a, _), d in zip(places, box, spacing)]
    grid = grid[int(steps[0][0]) : int(steps[0][-1]) + 4]
    steps[0] = steps[0] - int(steps[0][0])
    first, taps = spline_taps(steps[2])
    grid = sum(grid[:, :, first + k] * taps[k] for k in range(4))
    first, taps = spline_taps(steps[1])
    grid = sum(grid[:, first + k] * taps[k][:, None] for k in range(4))
    first, taps = spline_taps(steps[0])
    out = np.empty((len(first), *grid.shape[1:]), np.float32)
    # Slice by slice, since a slice stays in the processor's cache and a volume does not.
    for n, i in enumerate(first):
        np.multiply(grid[i], taps[0, n], out=out[n])
        for k in (1, 2, 3):
            out[n] += grid[i + k] * taps[k, n]
    return out


def exp(x: np.ndarray) -> np.ndarray:
    """Return the exponential of x, float32, computed in float64: the last bit of NumPy's depends on the processor."""
    return np.exp(x, dtype=np.float64).astype(np.float32)


def spline_taps(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first grid point (N,) and the weights (4, N) of a cubic B-spline at places given in grid steps (N,).

    The spline averages, which lowers the variance of noise. The weights are scaled to restore it.
    """
    first = step.astype(int)
    t = (step - first).astype(np.float32)
    cubes = [s * s * s for s in (1 - t, t)]  # a power's last bit depends on the processor
    taps = np.stack([cubes[0], 3 * cubes[1] - 6 * t * t + 4, 3 * t * (1 + t - t * t) + 1, cubes[1]]) / 6
    return first, taps / np.float32(np.sqrt(151 / 315))  # the mean of the sum of squared weights


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid, rotated in the slice and sheared along z."""

    centre: tuple[float, float, float]  # x, y, z in mm
    radii: tuple[float, float, float]  # mm
    angle: float = 0.0  # degrees, in the slice
    lean: tuple[float, float] = (0.0, 0.0)  # shift of the centre in x and y per mm of z

    def box(self) -> tuple[float, ...]:
        """Return the limits of the shape in mm: x, x, y, y, z, z."""
        (x, y, z), (a, b, c) = self.centre, self.radii
        s, k = abs(np.sin(np.radians(self.angle))), abs(np.cos(np.radians(self.angle)))
        dx = a * k + b * s + abs(self.lean[0]) * c
        dy = a * s + b * k + abs(self.lean[1]) * c
        return x - dx, x + dx, y - dy, y + dy, z - c, z + c

    def distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return the signed distance in mm, negative inside, exact to first order at the surface."""
        # float32 throughout: a float64 scalar would turn the arrays into float64, at half the speed.
        cx, cy, cz, a, b, c, lean_x, lean_y = np.array((*self.centre, *self.radii, *self.lean), np.float32)
        s, k = np.float32(np.sin(np.radians(self.angle))), np.float32(np.cos(np.radians(self.angle)))
        w = z - cz
        x, y = x - (cx + lean_x * w), y - (cy + lean_y * w)
        u, v, w = (k * x + s * y) / a, (k * y - s * x) / b, w / c
        uu, vv, ww = u * u, v * v, w * w
        q = uu + vv + ww + np.float32(1e-6)
        return (q - np.sqrt(q)) / np.sqrt(uu / a**2 + vv / b**2 + ww / c**2 + np.float32(1e-9))


@dataclass(frozen=True)
class Band:
    """A chain of segments in the slice, with points and radii that are interpolated between heights."""

    heights: tuple[float, ...]  # (K,) z in mm
    points: np.ndarray  # (K, N, 3): x, y and radius in mm; a negative radius ends the band between two heights

    def box(self) -> tuple[float, ...]:
        """Return the limits of the shape in mm: x, x, y, y, z, z."""
        x, y, r = np.moveaxis(self.points, -1, 0)
        low = self.heights[0] if (r[0] <= 0).all() else -1e3
        high = self.heights[-1] if (r[-1] <= 0).all() else 1e3
        return (x - r).min(), (x + r).max(), (y - r).min(), (y + r).max(), low, high

    def distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return the signed distance in the slice in mm, negative inside."""
        columns = self.points.reshape(len(self.heights), -1).T
        tracks = [np.interp(z, self.heights, column).astype(np.float32) for column in columns]
        nodes = [tracks[n : n + 3] for n in range(0, len(tracks), 3)]
        out: np.ndarray = np.array(np.inf, np.float32)
        for (ax, ay, ar), (bx, by, br) in zip(nodes, nodes[1:] or nodes):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey + np.float32(1e-3)), 0, 1)
            px, py = px - t * ex, py - t * ey
            d = np.sqrt(px * px + py * py) - (ar + t * (br - ar))  # faster than hypot
            out = np.minimum(out, d)
        return out


Shape = Ellipsoid | Band


def chain(heights: tuple[float, ...], *rows: Sequence[float]) -> Band:
    """Make a Band from one row per height, each of (x, y, radius) triples in mm."""
    return Band(heights, np.array(rows, float).reshape(len(heights), -1, 3))


def band(side: int, rng: np.random.Generator, heights: tuple[float, ...], *rows: Sequence[float]) -> Band:
    """Make a chain on one side of the body (1 or -1), moved and sized at random."""
    points = chain(heights, *rows).points
    points[..., :2] += rng.normal(0, 1, 2)
    points[..., 2] *= 1 + rng.normal(0, 0.05)
    points[..., 0] *= side
    return Band(heights, points)


def blob(
    side: int,
    rng: np.random.Generator,
    centre: tuple[float, float, float],
    radii: tuple[float, float, float],
    angle: float = 0.0,
    lean: tuple[float, float] = (0.0, 0.0),
) -> Ellipsoid:
    """Make an Ellipsoid on one side of the body (1 or -1), moved and sized at random."""
    x, y, z = np.array(centre) + rng.normal(0, 1, 3)
    radii = tuple(np.array(radii) * (1 + rng.normal(0, 0.04, 3)))
    return Ellipsoid((side * x, y, z), radii, side * angle, (side * lean[0], lean[1]))


def smooth_minimum(a: np.ndarray, b: np.ndarray, blend: np.float32) -> np.ndarray:
    """Return the minimum of two distances, rounded where they differ by less than `blend` (Quilez's quadratic form)."""
    h = np.maximum(blend - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / (4 * blend)


# ---------------------------------------------------------------- canvas


class Canvas:
    """The volume being drawn: coordinates in mm of the reference patient, signal, labels and textures."""

    def __init__(
        self,
        rng: np.random.Generator,
        slices: int,
        size: tuple[int, int],
        scale: float,
        turn: float,
        shift: tuple[float, float],
    ) -> None:
        """Prepare an empty volume.

        Args:
            rng: Draws textures and the deformation of coordinates.
            slices: Number of slices.
            size: (H, W) in pixels.
            scale: Size of the patient relative to the reference patient.
            turn: Rotation of the patient in the slice, in radians.
            shift: Displacement of the patient in the slice, in mm.
        """
        voxel = np.array(FIELD_OF_VIEW) / size
        row, column = (((np.arange(n) - (n - 1) / 2) * d).astype(np.float32) for n, d in zip(size, voxel))
        height = (np.arange(slices) - (slices - 1) / 2) * SLICE_STEP + STACK_CENTRE
        self.axes = np.clip(height, *BOX[0]).astype(np.float32), row, column
        self.voxel = voxel.max()
        self.frame = scale, turn, shift
        noise = functools.partial(smooth_noise, rng, self.axes)
        self.mottle = noise((15, 18, 18))
        self.wave = noise((9, 8, 8))
        self.grain = noise((6, 3.6, 3.6))
        # The coordinates are deformed, so that no outline is a plain ellipse.
        bend = [np.float32(2.2) * noise((40, 45, 45)) for _ in range(2)]
        x, y = row[None, :, None] - np.float32(shift[0]), column - np.float32(shift[1])
        c, s = np.float32(np.cos(turn) / scale), np.float32(np.sin(turn) / scale)
        self.x = c * x + s * y + bend[0]
        self.y = c * y - s * x + bend[1]
        self.z = self.axes[0][:, None, None]
        # Strands are thin sheets where one noise crosses zero, interrupted where another is low.
        gap = np.clip(np.float32(0.4) + self.mottle, 0, 1)
        self.strands = gap * np.clip(np.float32(1.2) - np.abs(self.wave) * np.float32(3.8), 0, 1)
        self.fibres = gap * np.clip(np.float32(1.4) - np.abs(self.fibre_noise(rng)) * np.float32(2.2), 0, 1)
        self.signal = np.zeros(self.x.shape, np.float32)
        self.depth = np.zeros_like(self.signal)  # signed distance to the skin, negative inside the body
        self.labels = np.zeros(self.x.shape, np.uint8)

    def fibre_noise(self, rng: np.random.Generator) -> np.ndarray:
        """Draw noise that is stretched along muscle fibres, which run outwards and backwards on either side."""
        box = BOX[0], (-64.0, 228.0), (-207.0, 84.0)  # of the rotated coordinates
        x, y = np.abs(self.axes[1])[:, None], self.axes[2]
        steps = 2 * self.voxel, self.voxel
        along, across = (np.arange(a, b, d) for (a, b), d in zip(box[1:], steps))
        field = smooth_noise(rng, (self.axes[0], along, across), (12, 16, 5.5), box)
        u, v = (0.8 * x + 0.6 * y - along[0]) / steps[0], (0.8 * y - 0.6 * x - across[0]) / steps[1]
        # Along the fibres the nearest place will do. Across them it is interpolated.
        first = v.astype(int).clip(0, len(across) - 2)
        at = np.rint(u).astype(int).clip(0, len(along) - 1) * len(across) + first
        field = field.reshape(len(field), -1)
        near = field.take(at, axis=1)
        return near + (v - first).astype(np.float32) * (field.take(at + 1, axis=1) - near)

    def window(self, shapes: Sequence[Shape], margin: float) -> Window | None:
        """Return the indices of a box around the shapes, with a margin in mm, or None where they miss the volume."""
        boxes = np.array([shape.box() for shape in shapes])
        low, high = boxes[:, ::2].min(0) - margin, boxes[:, 1::2].max(0) + margin
        scale, turn, shift = self.frame
        middle, half = (low + high)[:2] / 2 * scale, (high - low)[:2] / 2 * scale
        c, s = np.cos(turn), np.sin(turn)
        middle = np.array([c * middle[0] - s * middle[1], s * middle[0] + c * middle[1]]) + shift
        half = np.array([half[0] + abs(s) * half[1], half[1] + abs(s) * half[0]])
        ends = [(low[2], high[2]), *zip(middle - half, middle + half)]
        limits = [np.searchsorted(axis, end) for axis, end in zip(self.axes, ends)]
        if any(first >= last for first, last in limits):
            return None
        slices, rows, columns = (slice(first, last) for first, last in limits)
        return slices, rows, columns

    def paint(
        self,
        shapes: Sequence[Shape],
        layers: Layers,
        label: int | None = None,
        rough: float = 0.6,
        blend: float = 4.0,
        depth: float = 0.0,
    ) -> None:
        """Paint a union of shapes over the volume, from its outermost layer inwards.

        Args:
            shapes: Parts of the union.
            layers: From the outermost inwards.
            label: Written where the first layer covers half of a voxel; None leaves labels unchanged.
            rough: Irregularity of the outline, in mm.
            blend: Distance over which parts merge, in mm.
            depth: Distance that the union keeps below the skin, in mm.
        """
        window = self.window(shapes, 7 + layers[0][0])  # 7 mm is three standard deviations of the deformation
        if window is None:
            return
        x, y, z = self.x[window], self.y[window], self.z[window[0]]
        distance = shapes[0].distance(x, y, z)
        for shape in shapes[1:]:
            distance = smooth_minimum(distance, shape.distance(x, y, z), np.float32(blend))
        distance = distance + np.float32(rough) * self.wave[window]
        if depth:
            distance = np.maximum(distance, self.depth[window] + np.float32(depth))
        self.fill(window, distance, layers, label)

    def fill(self, window: Window, distance: np.ndarray, layers: Layers, label: int | None = None) -> None:
        """Paint layers as `paint` does, given a signed distance in mm over the window."""
        signal = self.signal[window]
        if label is not None:
            self.labels[window][distance < layers[0][0]] = label
        for n, (grow, name) in enumerate(layers):
            if n == 1:  # inner edges do not copy the outer one: walls and cortex vary in thickness
                distance = distance + np.float32(0.5) * self.grain[window]
            # The coverage of a voxel by a straight edge at this distance, blurred by a point spread of 1.2 voxels.
            cover = np.clip(np.float32(0.5) + (grow - distance) / np.float32(1.2 * self.voxel), 0, 1)
            signal += cover * (self.texture(window, name) - signal)

    def texture(self, window: Window, name: str) -> np.ndarray | np.float32:
        """Return the signal of a tissue with its texture over a window, one number where it has no texture."""
        tissue = TISSUES[name]
        value: np.ndarray | np.float32 = np.float32(SIGNAL[name])
        if tissue.mottle or tissue.grain:
            mottle, grain = np.float32(value * tissue.mottle), np.float32(value * tissue.grain)
            value = np.maximum(value + mottle * self.mottle[window] + grain * self.grain[window], 0)
        if tissue.strands:
            strands = self.fibres if name in STRANDED_ALONG else self.strands
            value = value + np.float32(tissue.strands) * strands[window]
        return value


# ---------------------------------------------------------------- anatomy

# Heights in mm at which bands are tabulated: apex and centre of the prostate, and centre of the femoral heads.
LEVELS = (-25.0, 2.0, 28.0)


@dataclass(frozen=True)
class Patient:
    """The random parameters of a patient."""

    scale: float  # relative to the reference patient
    turn: float  # rotation in the slice, radians
    shift: tuple[float, float]  # displacement in the slice, mm
    fat_side: float  # thickness of the subcutaneous fat, mm
    fat_front: float
    fat_back: float
    prostate: float  # radius of the prostate, relative to the reference patient
    zone: float  # radius of the transition zone, relative to the prostate's
    lift: float  # height of the bladder neck above its usual place, mm


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient's random vector."""
    growth = rng.beta(1.6, 2.2)  # benign enlargement, 0 to 1
    fatness = rng.beta(2, 2)
    return Patient(
        scale=rng.uniform(0.95, 1.03),
        turn=np.radians(rng.normal(0, 1.0)),
        shift=(rng.normal(0, 3), rng.normal(0, 1.5)),
        fat_side=14 + 18 * fatness + rng.normal(0, 2),
        fat_front=6 + 15 * fatness + rng.normal(0, 1.5),
        fat_back=7 + 8 * fatness,
        prostate=0.92 + 0.34 * growth + rng.normal(0, 0.02),
        zone=0.62 + 0.2 * growth + rng.normal(0, 0.02),
        lift=6 * growth,
    )


def paint_body(canvas: Canvas, patient: Patient) -> None:
    """Paint the body: skin and subcutaneous fat, on which the organs are painted."""
    front, back = -76 - patient.fat_front, 82 + patient.fat_back
    middle, depth = (front + back) / 2, (back - front) / 2
    for n, height in enumerate(np.clip(canvas.axes[0], -40, 50)):
        window = (slice(n, n + 1), slice(None), slice(None))
        x, y = canvas.x[window], canvas.y[window]
        half = np.float32(160 + patient.fat_side - 0.0012 * (height - 2) ** 2)
        belly = np.float32(2.5 + height / 12) * exp(np.float32(-1 / 55**2) * x * x)
        u, v = (x / half) ** 2, ((y + belly - np.float32(middle)) / np.float32(depth)) ** 2
        # Between an ellipse and a rounded box: the back is flat on the table, the hips are round.
        r = np.float32(0.6) * np.sqrt(u + v) + np.float32(0.4) * np.sqrt(np.sqrt(u * u + v * v))
        distance = (1 - 1 / (r + np.float32(1e-3))) * np.sqrt(x * x + y * y)
        canvas.depth[window] = distance
        canvas.fill(window, distance, ((0, "skin"), (-2.2, "fat")), BODY)


def paint_cleft(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paint the cleft between the buttocks."""
    x = rng.normal(0, 2)
    rows = [(x, 110, 5.5, x, 80, 1.2, x * 0.7, depth, 0.3) for depth in (56, 70, 84)]
    canvas.paint([chain(LEVELS, *rows)], ((2.0, "skin"), (0.0, "air")), rough=0.4)


# Muscles and vessels of one side, in painting order: at each of LEVELS, a band's points (x, y, radius) in mm.
MUSCLES: dict[str, Sequence[Sequence[float]]] = {
    "thigh and hip": (  # behind the single muscles
        (70, -34, 20, 118, -30, 26, 120, 10, 26, 88, 36, 16),
        (62, -40, 14, 116, -36, 26, 122, 14, 24, 88, 40, 15),
        (68, -44, 14, 112, -36, 24, 116, 16, 24, 84, 42, 15),
    ),
    "gluteus maximus": (
        (150, 20, 9, 128, 50, 16, 94, 62, 18, 50, 64, 12),
        (148, 20, 10, 126, 49, 17, 90, 62, 19, 34, 66, 11),
        (142, 24, 10, 118, 50, 17, 80, 62, 20, 24, 66, 10),
    ),
    "vastus lateralis, higher up gluteus medius": (
        (150, -20, 11, 151, 2, 12),
        (152, -14, 9, 150, 6, 8),
        (145, -26, 11, 142, 16, 13),
    ),
    "tensor fasciae latae": ((148, -42, 9, 138, -58, 9), (148, -40, 8, 138, -58, 8), (148, -36, 7, 134, -58, 8)),
    "vastus intermedius, higher up gluteus minimus": (
        (132, -26, 14, 118, -18, 12),
        (128, -38, 11, 120, -28, 9),
        (122, -34, 13, 122, 8, 11),
    ),
    "rectus femoris": ((120, -54, 14, 110, -52, 10), (118, -54, 13, 112, -52, 10), (112, -54, 11, 106, -50, 9)),
    "sartorius": ((90, -74, 8, 102, -70, 7), (98, -74, 8, 110, -70, 7), (110, -70, 8, 122, -64, 7)),
    "iliopsoas": ((94, -40, 14, 82, -30, 11), (90, -50, 16, 78, -44, 13), (86, -54, 16, 74, -51, 13)),
    "pectineus": ((60, -58, 13, 74, -46, 11), (46, -61, 9, 66, -50, 10), (40, -62, -4, 56, -56, -4)),
    "adductors": ((28, -62, 11, 50, -48, 14), (22, -62, 7, 36, -58, 6), (16, -64, -3, 24, -64, -3)),
    "obturator externus": (
        (42, -34, 11, 64, -16, 15, 94, 2, 12),
        (58, -18, 8, 80, 6, 9, 104, 16, 7),
        (60, -4, -5, 84, 8, -5, 100, 16, -5),
    ),
    "quadratus femoris, higher up piriformis": (
        (76, 30, 9, 106, 26, 11),
        (84, 36, 8, 114, 28, 8),
        (66, 42, 8, 106, 34, 8),
    ),
    "rectus abdominis": ((6, -66, -2, 16, -66, -2), (8, -67, 5, 20, -68, 4), (10, -69, 6, 34, -68, 6)),
    "obturator internus": (
        (27, -18, 4, 37, 4, 8.5, 44, 20, 8, 52, 32, 4),
        (33, -32, 6, 40, -8, 11, 48, 16, 11, 60, 36, 6),
        (42, -34, 7, 46, -8, 10, 52, 18, 11, 72, 38, 6),
    ),
}
VESSELS = (
    ("artery", (63, -62, 4.4), (59, -66, 4.4), (57, -64, 4.4)),  # femoral
    ("vein", (52, -59, 5.2), (48, -63, 5.2), (46, -61, 5.2)),
    ("artery", (72, -66, 2.0), (68, -70, 2.0), (66, -68, 2.0)),  # deep femoral
    ("vein", (54, -72, 2.8), (50, -76, 2.8), (48, -74, 2.8)),  # great saphenous
)


def paint_muscles(canvas: Canvas, rng: np.random.Generator, side: int) -> None:
    """Paint muscles, hamstring tendons, sciatic nerve, vessels and spermatic cord of one side (1 or -1)."""
    make = functools.partial(band, side, rng, LEVELS)
    for name, rows in MUSCLES.items():
        tissue = "gluteus" if name == "gluteus maximus" else "muscle"
        canvas.paint([make(*rows)], ((1.3, "fascia"), (0, tissue)), rough=1.2, depth=8.0)
    hamstrings = make((72, 46, 7, 78, 40, 5), (70, 43, 4, 76, 41, 3), (60, 34, 2, 56, 44, 1.5))
    canvas.paint([hamstrings], ((0, "tendon"),))
    sciatic = blob(side, rng, (96, 47, 0), (8, 4, 80), -20)
    canvas.paint([sciatic], ((1.2, "fascia"), (0, "nerve")), rough=1.0)
    for blood, *rows in VESSELS:
        canvas.paint([make(*rows)], ((1.8, "fat"), (0.3, "tendon"), (0, blood)), rough=0.9, depth=6.0)
    canvas.paint([make((16, -76, 7), (22, -78, 6.5), (34, -80, 5))], ((0, "cord"),), rough=1.5, depth=6.0)


def paint_bones(canvas: Canvas, rng: np.random.Generator, side: int) -> None:
    """Paint the hip bone, femur and hip joint of one side (1 or -1)."""
    make, oval = functools.partial(band, side, rng, LEVELS), functools.partial(blob, side, rng)
    low = (9, -38, 6, 28, -16, 6.5, 50, 18, 8)
    pubis = make(low, (10, -48, 11, 34, -46, 8, 58, -34, 10), (26, -50, -6, 44, -48, 4, 64, -38, 10))
    ischium = make((54, 32, 13, 57, 40, 13), (66, 14, 11, 66, 27, 14), (66, 0, 8, 72, 22, 13))
    socket = [
        oval((61, -8, 24), (7, 27, 30), -4),  # inner wall
        oval((72, -34, 20), (15, 9, 20), 25),  # front
        oval((86, 17, 20), (15, 8, 20), -15),  # back
        oval((88, -8, 58), (34, 24, 14)),  # roof
    ]
    neck = oval((112, 0, 2), (30, 11, 15), 18, (-1.0, 0.2))
    trochanter = oval((141, 7, -2), (15, 17, 24))
    shaft = make((124, 5, 16, 130, 6, 16), (134, 6, 8, 142, 6, 8), (140, 8, -8, 144, 8, -8))
    centre = np.array((86.0, -11, 20)) + rng.normal(0, 1.2, 3)
    radius = 24 * (1 + rng.normal(0, 0.03))
    head = [Ellipsoid((side * centre[0], *centre[1:]), (radius, radius * 0.98, radius))]
    hip: list[Shape] = [pubis, ischium, *socket]
    canvas.paint(hip, ((0.6, "fascia"), (0, "cortex"), (-1.5, "marrow")), BONE, rough=1.3)
    canvas.paint([neck, trochanter, shaft], ((0, "cortex"), (-2.0, "marrow")), BONE, rough=1.0)
    # The joint comes first, without a label, then the head.
    canvas.paint(head, ((3.2, "cartilage"), (1.0, "cortex"), (-0.4, "head")), rough=0.35)
    canvas.paint(head, ((0.0, "cortex"), (-0.4, "head")), BONE, rough=0.35)


def paint_symphysis(canvas: Canvas) -> None:
    """Paint the disc between the pubic bones."""
    disc = [Ellipsoid((0, -47, -4), (6, 13, 23), 0, (0, -0.35))]
    canvas.paint(disc, ((0.0, "disc"),), rough=0.8)


def paint_sacrum(canvas: Canvas) -> None:
    """Paint coccyx and sacrum."""
    rows = [(-4, 62, -8, 4, 62, -8), (-6, 66, 0, 6, 66, 0), (-16, 72, 6, 16, 72, 6)]
    canvas.paint([chain(LEVELS, *rows)], ((0, "cortex"), (-1.5, "marrow")), BONE)


def paint_pelvic_fat(canvas: Canvas) -> None:
    """Paint the fat that fills the pelvis around its organs."""
    pelvis = [Ellipsoid((0, -2, 22), (33, 36, 42)), Ellipsoid((0, 44, 16), (22, 20, 40))]
    canvas.paint(pelvis, ((0, "pelvic_fat"),), rough=2.0, blend=10)


def paint_floor(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint levator ani, the muscles of the perineum and the root of the penis."""
    k = patient.prostate
    body = [Ellipsoid((0, 14, -30), (15, 24, 17), 0, (0, 0.2))]
    canvas.paint(body, ((0, "perineum"),), rough=2.0)
    diaphragm = [
        Ellipsoid((0, -4, -34), (26, 22, 14), 0, (0, 0.3)),
        Ellipsoid((0, 34, -34), (19, 18, 14), 0, (0, 0.4)),
    ]
    canvas.paint(diaphragm, ((1.2, "fascia"), (0, "levator")), rough=2.0, blend=10)
    canvas.paint([Ellipsoid((0, -2, -38), (10, 11, 16))], ((1.2, "levator"), (0, "penis")), rough=1.0)
    low = (12 * k, -10, 4, 16 * k, 8, 4, 13, 34, 4, 3, 50, 4)
    middle = (21 * k, -16, 2.4, 27 * k, 4, 2.2, 25 * k, 26, 2.2, 9, 54, 2.2)
    high = (44, 8, 1.5, 42, 24, 1.8, 32, 46, 2.0, 14, 62, 2.0)
    for side in (-1, 1):
        rows = (16, -14, 6, 34, 12, 6), (20, -16, 5, 32, 4, 4), (20, -18, -5, 32, 2, -5)
        canvas.paint([band(side, rng, (-40.0, -25.0, -14.0), *rows)], ((1.8, "levator"), (0, "penis")))
        canvas.paint([band(side, rng, LEVELS, low, middle, high)], ((0, "levator"),), rough=0.9)


def paint_vessels(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint the dorsal venous complex, and small vessels that run up around prostate, bladder and rectum."""
    k = patient.prostate
    dorsal = Ellipsoid((0, -15 * k - 4, 2), (17 * k, 8, 17 * k), 0, (0, -0.1))
    canvas.paint([dorsal], ((2.0, "plexus"),), rough=2.2)
    for _ in range(38):
        side = rng.choice((-1, 1))
        angle = rng.uniform(-1.5, 1.2)
        reach = rng.uniform(1.08, 1.45) * k
        centre = (side * 25 * reach * np.cos(angle), 3 + 19 * reach * np.sin(angle), rng.uniform(-12, 40))
        radius = rng.uniform(0.9, 2.2)
        radii = (radius, radius * rng.uniform(0.8, 1.6), rng.uniform(8, 22))
        tube = Ellipsoid(centre, radii, rng.uniform(0, 180), tuple(rng.normal(0, 0.35, 2)))
        canvas.paint([tube], ((0, rng.choice(("artery", "vein", "vein", "tendon"))),), rough=0.4)


def paint_vesicles(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint the seminal vesicles."""
    for side in (-1, 1):
        centre = (side * 15, 12 + rng.normal(0, 1), 15 * patient.prostate + 7)
        shape = Ellipsoid(centre, (17, 6, 10), side * rng.normal(-14, 5), (side * 0.4, 0.1))
        canvas.paint([shape], ((0.8, "stroma"), (0, "vesicle")), rough=1.6)


def paint_prostate(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint the prostate: peripheral zone, transition zone with nodules, stroma and urethra."""
    k = patient.prostate
    whole = Ellipsoid((0, 2, 0), (25 * k, 17 * k, 21 * k), rng.normal(0, 3), (0, -0.18))
    flat = Ellipsoid((0, 4, -2), (21 * k, 16 * k, 20 * k), 0, (0, -0.18))
    canvas.paint([whole, flat], ((2.6, "plexus"),), rough=2.2)
    canvas.paint([whole, flat], ((0.8, "stroma"), (0, "peripheral")), PROSTATE, rough=1.0)
    a, b, c = 25 * k * patient.zone * 1.12, 17 * k * patient.zone * 1.18, 21 * k * patient.zone * 1.1
    front = 2 - 17 * k + b + 0.5
    halves = [Ellipsoid((s * a * 0.36, front, 3), (a * 0.68, b, c), s * 12.0, (0, -0.18)) for s in (-1, 1)]
    canvas.paint(halves, ((0.9, "stroma"), (0, "transition")), rough=1.2, blend=3)
    for _ in range(rng.integers(6, 13)):
        at = rng.uniform(-0.62, 0.62, 3) * (a, b, c) + (0, front, 3)
        radius = rng.uniform(2.0, 5.5)
        name = "nodule_bright" if rng.random() < 0.55 else "nodule_dark"
        shape = Ellipsoid(tuple(at), tuple(radius * rng.uniform(0.8, 1.3, 3)), rng.uniform(0, 180))
        canvas.paint([shape], ((0.7, "stroma"), (0, name)), rough=0.9)
    stroma = Ellipsoid((0, 2 - 15.5 * k, 0), (13 * k, 4.0 * k, 18 * k), 0, (0, -0.18))
    canvas.paint([stroma], ((0, "stroma"),), rough=1.2)
    canvas.paint([Ellipsoid((0, 4, -8), (3, 3, 12))], ((1.5, "stroma"), (0, "urethra")), rough=0.6)


def paint_bladder(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint the bladder, filled at random."""
    volume = rng.beta(2, 2)  # 0 emptied, 1 full
    a, b, c = 26 + 18 * volume, 16 + 14 * volume, 18 + 16 * volume
    floor = 15 * patient.prostate + patient.lift
    dome = Ellipsoid((rng.normal(0, 2), -30 + 5 * volume, floor + c), (a, b, c), rng.normal(0, 3), (0, 0.1))
    shoulders = [Ellipsoid((s * a * 0.5, -28, floor + 0.8 * c), (a * 0.6, b * 0.8, c * 0.8)) for s in (-1, 1)]
    wall = 5.0 - 2.4 * volume
    canvas.paint([dome, *shoulders], ((0, "bladder_wall"), (-wall, "urine")), BLADDER, rough=1.2, blend=10)


def paint_rectum(canvas: Canvas, rng: np.random.Generator, patient: Patient) -> None:
    """Paint rectum and anal canal, filled with stool and gas at random."""
    volume, gas = rng.beta(1.3, 2.0), rng.uniform(0, 1)
    r = 10 + 9 * volume
    top = 3 + 17 * patient.prostate + r
    wander = rng.normal(0, 1.5, 3)

    def tube(rise: float, radius: float, canal: float) -> list[Band]:
        """Make the rectum, in front of its usual place by `rise` mm, and the anal canal below it."""
        x, y = radius * 0.3, top - rise
        rows = [
            [-2, 38, canal, 2, 40, canal],
            [-2 - x, y, radius, 2 + x, y, radius],
            [-5, y + 3, radius, 6, y + 5, radius],
        ]
        moved = np.array(rows) + wander[:, None] * (1, 0, 0, 1, 0, 0)
        return [chain(LEVELS, *moved)]

    canvas.paint(tube(0, r, 10), ((0, "rectal_wall"), (-2.6, "mucosa")), RECTUM, rough=1.4)
    canvas.paint(tube(0, r - 4, 1.5), ((0, "stool"),), rough=1.6)
    # Gas rises to the front of a man who lies on his back.
    canvas.paint(tube((1 - gas) * 0.9 * r, r - 6 + 2 * gas, 0.3), ((0, "gas"),))


# ---------------------------------------------------------------- volumes


def draw_volume(
    seed: int,
    case: int,
    week: int = 0,
    slices: int = 20,
    size: tuple[int, int] = (256, 128),
    exposure: int | None = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one volume and its label map.

    Anatomy depends on (seed, case); the filling of bladder and rectum, coil shading, brightness and noise depend on
    (seed, case, week). The anatomy does not depend on `slices` and `size`, which only choose where it is sampled.

    Args:
        seed: Of the whole data set, 0 or more.
        case: Number of the patient.
        week: Number of the visit.
        slices: Number of slices, 3 mm apart.
        size: (H, W) in pixels, at least (16, 8).
        exposure: Number of a repeated scan, which differs in its noise only; None for no noise.

    Returns:
        Images (slices, H, W) float32, integers >= 0, and labels (slices, H, W) uint8, indices of LABELS. Rows run from
        the patient's right to his left, columns from front to back, slices upwards.

    Raises:
        ValueError: If a number is out of range.
    """
    check_numbers(slices, size, (seed, case, week, exposure or 0))
    patient_rng, week_rng = generator(1, seed, case), generator(2, seed, case, week)
    patient = draw_patient(patient_rng)
    canvas = Canvas(patient_rng, slices, size, patient.scale, patient.turn, patient.shift)
    paint_body(canvas, patient)
    paint_cleft(canvas, patient_rng)
    paint_symphysis(canvas)
    for side in (-1, 1):
        paint_muscles(canvas, patient_rng, side)
        paint_bones(canvas, patient_rng, side)
    paint_sacrum(canvas)
    paint_pelvic_fat(canvas)
    paint_floor(canvas, patient_rng, patient)
    paint_rectum(canvas, week_rng, patient)
    paint_vesicles(canvas, patient_rng, patient)
    paint_vessels(canvas, patient_rng, patient)
    paint_bladder(canvas, week_rng, patient)
    paint_prostate(canvas, patient_rng, patient)
    return expose(canvas, generator(3, seed, case, week), exposure), canvas.labels


def generator(stream: int, *key: int) -> np.random.Generator:
    """Make the random generator of a key.

    The stream keeps keys of different lengths apart: (seed, case) and (seed, case, 0) alone would seed the same
    generator. SFC64 draws normal numbers in half the time of NumPy's default.
    """
    return np.random.Generator(np.random.SFC64((stream, *key)))


def check_numbers(
    slices: int, size: tuple[int, int], others: Sequence[int], weeks: int = 1, workers: int | None = None
) -> None:
    """Raise ValueError, with a message for the user, for numbers out of range; `others` must not be negative."""
    for name, number in (("slices", slices), ("weeks", weeks), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be 1 or more, not {number}")
    if size[0] < 16 or size[1] < 8:
        raise ValueError(f"size must be at least 16 rows by 8 columns, not {size[0]} by {size[1]}")
    if min(others) < 0:
        raise ValueError(f"seed, cases, weeks and exposure must not be negative, not {min(others)}")


def expose(canvas: Canvas, rng: np.random.Generator, exposure: int | None) -> np.ndarray:
    """Return the signal as a scanner stores it: with coil shading, Rician noise and an arbitrary scale, as integers.

    Rician noise is the magnitude of a complex signal with normal noise in both parts (Gudbjartsson and Patz 1995, Magn
    Reson Med 34:910). Its sigma is 0.8 to 1.6 % of the 99.5th percentile.
    """
    coil = exp(np.float32(0.1) * smooth_noise(rng, canvas.axes, (90, 110, 90)))
    coil *= np.float32(0.85) + np.float32(2e-5) * canvas.axes[2] ** 2
    image = canvas.signal * coil
    bright = np.percentile(image[::2, ::2, ::2], 99.5)
    gain = np.float32(rng.uniform(400, 1200) / bright)
    sigma = np.float32(rng.uniform(0.008, 0.016) * bright)
    if exposure is None:
        return np.rint(gain * image)
    rng = rng.spawn(exposure)[-1] if exposure else rng
    for plane in image:
        real, imaginary = rng.standard_normal((2, *plane.shape), dtype=np.float32) * sigma
        real += plane
        plane[:] = np.rint(gain * np.sqrt(real * real + imaginary * imaginary))
    return image


# ---------------------------------------------------------------- files


def affine(size: tuple[int, int], index: int) -> np.ndarray:
    """Return the affine (4, 4) of slice `index`, from voxel indices to mm: x right, y to the front, z up (RAS+).

    Rows run to the left and columns to the back, so both steps are negative. The centre of the image is x = y = 0,
    slice 0 is z = 0. A viewer that follows the affine shows front, back and sides correctly.
    """
    step = -np.array(FIELD_OF_VIEW) / size
    matrix = np.diag((*step, SLICE_STEP, 1.0))
    matrix[:2, 3] = -step * (np.array(size) - 1) / 2
    matrix[2, 3] = SLICE_STEP * index
    return matrix


def header_of(pictures: np.ndarray) -> nib.Nifti1Header:
    """Return the NIfTI header, in mm, of slice 0 of a stack (slices, H, W)."""
    header = nib.Nifti1Image(pictures[0], affine(pictures.shape[1:], 0)).header
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352  # 348 bytes of header, and 4 which say that no extension follows
    return header


def write_slice(path: Path, header: nib.Nifti1Header, picture: np.ndarray, index: int) -> None:
    """Write one slice of a stack as gzipped 2D NIfTI, without a time stamp: equal slices give equal files."""
    header["srow_z"][3] = header["qoffset_z"] = affine(picture.shape, index)[2, 3]
    # Level 1, and runs only: noise has no longer repeats, and searching for them would take as long as drawing.
    gzip = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 9, zlib.Z_RLE)
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + picture.tobytes("F")) + gzip.flush())


def write_volume(folder: Path, seed: int, slices: int, size: tuple[int, int], key: tuple[str, int, int]) -> None:
    """Draw and write the slices and label maps of one key (split, case, week)."""
    split, case, week = key
    images, labels = draw_volume(seed, case, week, slices, size)
    for kind, prefix, pictures in (("", "case", images), ("seg_", "seg", labels)):
        header = header_of(pictures)
        for index, picture in enumerate(pictures):
            name = f"{prefix}_{case:03d}_week_{week}_slice_{index}.nii.gz"
            write_slice(folder / f"keras_slices_{kind}{split}" / name, header, picture, index)


def write_phantom(
    folder: Path,
    cases: tuple[int, int, int] = (120, 10, 10),
    weeks: int = 1,
    slices: int = 20,
    size: tuple[int, int] = (256, 128),
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Write a data set in HipMRI's layout: slices and label maps of three splits, in six folders.

    The files do not depend on `workers`. A progress bar is shown where stderr is a terminal.

    Args:
        folder: Where to write; made if missing.
        cases: Number of patients for training, validation and test, numbered from 1 in that order.
        weeks: Volumes per patient.
        slices: Slices per volume, 3 mm apart.
        size: (H, W) in pixels, at least (16, 8).
        seed: Of the whole data set, 0 or more.
        workers: Processes; None for one per core, at most 8.

    Raises:
        ValueError: If a number is out of range.
        OSError: If the folder cannot be written.
    """
    check_numbers(slices, size, (seed, *cases), weeks, workers)
    folder = Path(folder)
    for split in SPLITS:
        (folder / f"keras_slices_{split}").mkdir(parents=True, exist_ok=True)
        (folder / f"keras_slices_seg_{split}").mkdir(exist_ok=True)
    split_of_case = [split for split, count in zip(SPLITS, cases) for _ in range(count)]
    keys = [(split, case, week) for case, split in enumerate(split_of_case, 1) for week in range(weeks)]
    write = functools.partial(write_volume, folder, seed, slices, size)
    bar = functools.partial(tqdm, total=len(keys), desc="phantom", unit="volume", disable=None)
    workers = min(workers or usable_cores(), len(keys))
    if workers <= 1:
        for key in bar(keys):
            write(key)
        return
    with process_pool(workers) as pool:
        for _ in bar(pool.map(write, keys)):
            pass


# ---------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after one line on stderr for a user's mistake."""
    parser = argparse.ArgumentParser(
        description="Write a procedural male pelvis, T2-weighted, as NIfTI slices in the HipMRI layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    splits, axes = ("TRAIN", "VALIDATE", "TEST"), ("ROWS", "COLUMNS")
    add("out", metavar="OUT", help="folder to write to; must be new or empty")
    add("--cases", type=int, nargs=3, default=(120, 10, 10), metavar=splits, help="patients per split")
    add("--weeks", type=int, default=1, metavar="N", help="volumes per patient, a week apart")
    add("--slices", type=int, default=20, metavar="N", help="slices per volume, 3 mm apart")
    add("--size", type=int, nargs=2, default=(256, 128), metavar=axes, help="pixels, over 410 x 205 mm")
    add("--seed", type=int, default=0, metavar="N", help="0 or more; another number gives other patients")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes to draw with")
    options = parser.parse_args(arguments)
    try:
        if not options.out.strip():  # as a path it would be the current folder
            raise ValueError("OUT is empty; is a variable not set?")
        folder = Path(options.out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not an empty folder; give a new one")
        rest = {name: value for name, value in vars(options).items() if name != "out"}
        write_phantom(folder, **rest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
