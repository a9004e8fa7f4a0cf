"""Anatomical coherence of single slices: does a slice show one body, or pieces of several?

Slices are (N, 1, H, W) in [-1, 1]. Two small networks learn from training slices alone, without examples of samples:

- a judge tells slices from collages of them (outlier exposure, Hendrycks et al. 2019, arXiv:1812.04606; cut and paste,
  Li et al. 2021, arXiv:2104.04015);
- a matcher tells which left half belongs to which right half, which front to which back and so on, among slices of like
  height (a pairwise sigmoid loss, Zhai et al. 2023, arXiv:2303.15343).

All slices that a network compares are blurred and made noisy alike, so that grain and sharpness count for little.

No network judges patients that it has learned from: each of two pairs of networks learns from one half of the patients,
and the slices of the other half are its reference. A score is a rank among these.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geometry import blur, inside_body
from metrics import evenly_spread, number_groups, to_grey_levels, two_fold_split
from utils import autocast, channels_last

WORKING_PIXELS = 3200  # per slice, such as 80x40; larger slices are reduced
MAX_TRAINING = 3000  # slices kept in memory, as uint8
CHANNELS = (24, 48, 96)
JUDGE_UPDATES, JUDGE_RATE = 240, 3e-3
HALF_BATCH = 32  # slices, and as many collages, per update
DONORS = 6  # slices that a collage is made of, at most
MATCHER_UPDATES, MATCHER_RATE = 540, 2e-3
MATCHER_BATCH = 64
WINDOW = 0.15  # share of the slices, sorted by height, that a batch of the matcher is drawn from
EMBEDDING = 64  # length of a part's embedding
WEIGHTS = (2.0, 1.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)  # of the judge and of each of MATCHES
TOO_ALIKE = 4.0  # ranks of matches above 1 - 1 / (TOO_ALIKE + 1) count as low ones
MIN_TRAINING = 8
TAIL = 0.02  # share of the reference that counts as its low tail
DRAWS = 4000  # of the test
BATCH_SIZE = 128  # slices per forward pass

Rng = np.random.Generator


# ---------------------------------------------------------------- pictures


def working_size(size: Sequence[int]) -> tuple[int, int]:
    """Return the size (h, w), of about WORKING_PIXELS, at which slices of size (H, W) are judged."""
    factor = max(1.0, math.sqrt(math.prod(size) / WORKING_PIXELS))
    return round(size[0] / factor), round(size[1] / factor)


def reduce(slices: Tensor) -> Tensor:
    """Return slices at `working_size`, as grey levels: (N, 1, h, w) uint8."""
    size = working_size(slices.shape[2:])
    if size != tuple(slices.shape[2:]):
        slices = F.interpolate(slices, size=size, mode="bilinear", antialias=True, align_corners=False)
    return to_grey_levels(slices)


def blend(donors: Tensor, fields: Tensor, softness: float = 0.0) -> Tensor:
    """Compose slices: at each pixel the donor whose field is largest.

    Args:
        donors: (N, K, H, W).
        fields: (N, K, H, W), any values.
        softness: Sigma in pixels by which the seams are feathered.

    Returns:
        (N, 1, H, W).
    """
    shares = (fields == fields.amax(1, keepdim=True)).float()
    if softness > 0:
        shares = blur(shares, softness)
    return (shares * donors).sum(1, keepdim=True) / shares.sum(1, keepdim=True)


# ---------------------------------------------------------------- collages


def quilt_fields(shape: Sequence[int], side: int, random: torch.Generator) -> Tensor:
    """Return fields (N, K, H, W) of square patches of a side in pixels, with a random origin."""
    count, donors, height, width = shape
    cells = torch.rand(count, donors, height // side + 2, width // side + 2, generator=random)
    y, x = torch.randint(side, (2,), generator=random).tolist()
    fields = cells.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return fields[:, :, y : y + height, x : x + width]


def blob_fields(shape: Sequence[int], cells: Sequence[int], random: torch.Generator) -> Tensor:
    """Return smooth random fields (N, K, H, W) that vary over (rows, columns) of cells."""
    noise = torch.randn(*shape[:2], *cells, generator=random)
    return F.interpolate(noise, size=tuple(shape[2:]), mode="bicubic", align_corners=False)


def cut_fields(shape: Sequence[int], axis: int, offset: Tensor, slope: Tensor) -> Tensor:
    """Return fields (N, 2, H, W) on both sides of a straight cut across an axis.

    Args:
        shape: (N, K, H, W).
        axis: 2 or 3, the axis that the cut divides.
        offset: Of the cut from the middle, (N,), in [-1, 1] of half a side.
        slope: Of the cut, (N,), in half sides per half side; 0 is straight across.
    """
    y, x = (((torch.arange(side) + 0.5) * 2 / side) - 1 for side in shape[2:])
    y, x = y[:, None].expand(*shape[2:]), x.expand(*shape[2:])
    along, across = (y, x) if axis == 2 else (x, y)
    distance = along - offset[:, None, None] - slope[:, None, None] * across
    return torch.stack([-distance, distance], 1)


def insert_fields(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Return fields (N, 2, H, W) of one ellipse or rectangle inside the slice."""
    centre = torch.rand(len(range(shape[0])), 2, 1, 1, generator=random) * 1.2 - 0.6
    radius = torch.rand(shape[0], 2, 1, 1, generator=random) * 0.35 + 0.15
    y, x = (((torch.arange(side) + 0.5) * 2 / side) - 1 for side in shape[2:])
    dy, dx = (y[:, None] - centre[:, 0]) / radius[:, 0], (x - centre[:, 1]) / radius[:, 1]
    power = 2.0 if torch.rand((), generator=random) < 0.5 else 8.0
    distance = dy.abs() ** power + dx.abs() ** power - 1
    return torch.stack([distance, -distance], 1)


def repeat_side(slices: Tensor, axis: int, mirrored: bool) -> Tensor:
    """Replace the second half of slices along an axis by the first one, mirrored or not; a middle line is kept."""
    half = slices.shape[axis] // 2
    first = slices.narrow(axis, 0, half)
    middle = slices.narrow(axis, half, slices.shape[axis] - 2 * half)
    return torch.cat([first, middle, first.flip(axis) if mirrored else first], axis)


def shuffle_patches(slices: Tensor, side: int, random: torch.Generator) -> Tensor:
    """Return slices (N, 1, H, W) with square patches in random order; a rest at the far edges stays."""
    count, _, height, width = slices.shape
    rows, columns = height // side, width // side
    patches = slices[:, 0, : rows * side, : columns * side].reshape(count, rows, side, columns, side).movedim(3, 2)
    order = torch.rand(count, rows * columns, generator=random).argsort(1)
    patches = patches.reshape(count, -1, side, side)[torch.arange(count)[:, None], order]
    result = slices.clone()
    shuffled = patches.reshape(count, rows, columns, side, side).movedim(2, 3).reshape(count, rows * side, -1)
    result[:, 0, : rows * side, : columns * side] = shuffled
    return result


def randomise_phases(slices: Tensor, random: torch.Generator) -> Tensor:
    """Return pictures with the spectrum, mean and contrast of the slices, but without their structure."""
    spectrum = torch.fft.rfft2(slices)
    phases = torch.rand(spectrum.shape, generator=random) * 2 * math.pi
    texture = torch.fft.irfft2(torch.polar(spectrum.abs(), phases), s=slices.shape[2:])
    std, mean = torch.std_mean(texture, (2, 3), keepdim=True)
    own_std, own_mean = torch.std_mean(slices, (2, 3), keepdim=True)
    return ((texture - mean) / std.clamp(min=1e-6) * own_std + own_mean).clamp(-1, 1)


# ---------------------------------------------------------------- training data


class Pool(NamedTuple):
    """Training slices in memory."""

    slices: Tensor  # (N, 1, h, w) uint8, at `working_size`
    heights: np.ndarray  # (N,): rank of the position, in [0, 1)
    patients: np.ndarray  # (N,) int64

    def select(self, chosen: np.ndarray) -> "Pool":
        """Return the slices where `chosen` (N,) is true."""
        return Pool(self.slices[torch.from_numpy(chosen)], self.heights[chosen], self.patients[chosen])

    def load(self, indices: np.ndarray) -> Tensor:
        """Return slices (n, 1, h, w) in [-1, 1]."""
        return self.slices[torch.from_numpy(indices)].float() / 127.5 - 1


def gather_pool(training: Iterable[Tensor], positions: np.ndarray, patients: np.ndarray) -> Pool:
    """Read slices once, and keep at most MAX_TRAINING of them, evenly spread.

    Args:
        training: Batches (n, 1, H, W) in [-1, 1] of N slices in all.
        positions: (N,), NaN for unknown.
        patients: (N,) int64.
    """
    kept = np.unique(evenly_spread(min(len(patients), MAX_TRAINING), len(patients)))
    parts, start = [], 0
    for batch in training:
        own = kept[(kept >= start) & (kept < start + len(batch))] - start
        parts.append(reduce(batch[torch.from_numpy(own).to(batch.device)]).cpu())
        start += len(batch)
    order = np.where(np.isfinite(positions), positions, 0.5)[kept].argsort(kind="stable")
    heights = np.empty(len(kept))
    heights[order] = np.arange(len(kept)) / len(kept)
    return Pool(torch.cat(parts), heights, patients[kept])


class Collages:
    """Draws collages of the slices of a pool."""

    REACH = 0.04  # difference in rank of height at which slices are of like height

    def __init__(self, pool: Pool, flip_axis: int | None, seed: int):
        """Prepare to draw. `flip_axis` is the axis, 2 or 3, from left to right; None if there is none."""
        self.pool, self.side_axis = pool, flip_axis or 2
        self.by_height = pool.heights.argsort(kind="stable")
        self.rank = self.by_height.argsort()
        self.rng, self.random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        kinds = [
            (self.quilt, 6),
            (self.sides, 3),
            (self.front_and_back, 3),
            (self.blobs, 6),
            (self.insert, 3),
            (self.repeated, 3),
            (self.upside_down, 2),
            (self.without_organs, 2),
        ]
        self.kinds = [kind for kind, _ in kinds]
        weights = np.array([weight for _, weight in kinds], float)
        self.shares = weights / weights.sum()

    def draw(self, count: int) -> Tensor:
        """Return collages (count, 1, h, w), those of a kind together."""
        counts = self.rng.multinomial(count, self.shares)
        return torch.cat([kind(int(number)) for kind, number in zip(self.kinds, counts) if number])

    def donors(self, count: int, number: int) -> Tensor:
        """Return slices of like height (count, number, h, w), mostly of different patients."""
        own = self.rng.integers(len(self.rank), size=count)
        reach = max(4, round(self.REACH * len(self.rank)))
        places = self.rank[own][:, None] + self.rng.integers(-reach, reach + 1, (count, 4 * number))
        candidates = self.by_height[places.clip(0, len(self.rank) - 1)]
        # Slices of other patients first; the first column is kept for the slice itself.
        same = self.pool.patients[candidates] == self.pool.patients[own][:, None]
        candidates = np.take_along_axis(candidates, same.argsort(1, kind="stable"), 1)
        candidates[:, 0] = own
        return self.pool.load(candidates[:, :number].reshape(-1)).unflatten(0, (count, number))[:, :, 0]

    def single(self, count: int) -> Tensor:
        """Return slices (count, 1, h, w)."""
        return self.pool.load(self.rng.integers(len(self.rank), size=count))

    def softness(self) -> float:
        """Return a sigma for seams in pixels, often 0."""
        return float(self.rng.choice([0, 0, 0.7, 1.5, 3.0]))

    def matched(self, donors: Tensor) -> Tensor:
        """Return donors, at times with the mean and contrast of the first."""
        if self.rng.random() < 0.6:
            return donors
        std, mean = torch.std_mean(donors, (2, 3), keepdim=True)
        return ((donors - mean) / std.clamp(min=0.01) * std[:, :1] + mean[:, :1]).clamp(-1, 1)

    def quilt(self, count: int) -> Tensor:
        """Join square patches of several slices of like height."""
        donors = self.matched(self.donors(count, int(self.rng.integers(2, DONORS + 1))))
        side = int(self.rng.choice([4, 6, 8, 12, 16, 24, 32, 40]))
        return blend(donors, quilt_fields(donors.shape, side, self.random), self.softness())

    def cut(self, count: int, axis: int, spread: float) -> Tensor:
        """Join two slices along a line across an axis, often in the middle; at times of any two heights."""
        donors = self.matched(self.donors(count, 2))
        if self.rng.random() < 0.25:
            donors[:, 1:] = self.single(count)
        central = torch.rand(count, generator=self.random) < 0.5
        offset, slope = torch.randn(2, count, generator=self.random) * spread
        fields = cut_fields(donors.shape, axis, offset.where(~central, 0), slope.where(~central, 0))
        return blend(donors, fields, self.softness())

    def sides(self, count: int) -> Tensor:
        """Join the left of one slice with the right of another."""
        return self.cut(count, self.side_axis, 0.15)

    def front_and_back(self, count: int) -> Tensor:
        """Join the front of one slice with the back of another."""
        return self.cut(count, 5 - self.side_axis, 0.25)

    def blobs(self, count: int) -> Tensor:
        """Join smooth areas of several slices of like height."""
        donors = self.matched(self.donors(count, int(self.rng.integers(2, 5))))
        cells = self.rng.integers(2, 7, 2).tolist()
        return blend(donors, blob_fields(donors.shape, cells, self.random), self.softness())

    def insert(self, count: int) -> Tensor:
        """Put a region of one slice into another of like height."""
        donors = self.matched(self.donors(count, 2))
        return blend(donors, insert_fields(donors.shape, self.random), self.softness())

    def repeated(self, count: int) -> Tensor:
        """Copy one side to the other."""
        return repeat_side(self.single(count), self.side_axis, bool(self.rng.random() < 0.7))

    def upside_down(self, count: int) -> Tensor:
        """Exchange front and back."""
        return self.single(count).flip(5 - self.side_axis)

    def without_organs(self, count: int) -> Tensor:
        """Replace a slice, or what is inside its body, by its texture."""
        slices = self.single(count)
        choice = self.rng.integers(3)
        if choice == 0:
            return randomise_phases(slices, self.random)
        texture = shuffle_patches(slices, int(self.rng.choice([4, 8, 16])), self.random)
        return texture if choice == 1 else torch.where(inside_body(slices), texture, slices)


def vary(slices: Tensor, flip_axis: int | None, rng: Rng, random: torch.Generator) -> Tensor:
    """Vary side, pose, contrast, sharpness and grain of slices (N, 1, h, w), each of random ones."""
    slices, count = slices.clone(), len(slices)
    if flip_axis is not None:
        chosen = torch.randperm(count, generator=random)[: count // 2]
        slices[chosen] = slices[chosen].flip(flip_axis)
    # The other half stays in place: a repeated side is an exact mirror image only about the middle line.
    chosen = torch.randperm(count, generator=random)[: count // 2]
    slices[chosen] = move(slices[chosen], random)
    slices = change_contrast(slices, torch.randn(count, 1, 1, 1, generator=random))
    for chosen in torch.randperm(count, generator=random).chunk(4):
        slices[chosen] = change_texture(slices[chosen], (0, 0.5, 0.8, 1.2, -0.6), rng, random)
    return slices.clamp(-1, 1)


def vary_alike(slices: Tensor, flip_axis: int | None, rng: Rng, random: torch.Generator) -> Tensor:
    """Vary side, place, contrast, sharpness and grain of all slices (N, 1, h, w) alike."""
    if flip_axis is not None and rng.random() < 0.5:
        slices = slices.flip(flip_axis)
    slices = change_contrast(slices, torch.tensor(rng.standard_normal(), dtype=torch.float32))
    slices = slices.roll(rng.integers(-2, 3, 2).tolist(), (2, 3))
    return change_texture(slices, (0, 0, 0.5, 0.8), rng, random)


def move(slices: Tensor, random: torch.Generator) -> Tensor:
    """Turn, scale and shift slices (N, 1, h, w) by about 3.4 degrees, 5 % and 1.5 % of a side, each differently."""
    angle, scale_y, scale_x, shift_y, shift_x = torch.randn(5, len(slices), generator=random)
    height, width = slices.shape[2:]
    cos, sin = (0.06 * angle).cos(), (0.06 * angle).sin()
    scale_y, scale_x = (0.05 * scale_y).exp(), (0.05 * scale_x).exp()
    row_x = torch.stack([cos * scale_x, -sin * scale_x * height / width, 0.03 * shift_x], 1)
    row_y = torch.stack([sin * scale_y * width / height, cos * scale_y, 0.03 * shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, padding_mode="reflection", align_corners=False)


def change_contrast(slices: Tensor, amount: Tensor) -> Tensor:
    """Raise the brightness, in [0, 1], to a power; amount 1 stands for 15 % of the exponent."""
    return 2 * ((slices + 1) / 2).clamp(0, 1) ** (0.15 * amount).exp() - 1


def change_texture(slices: Tensor, sigmas: Sequence[float], rng: Rng, random: torch.Generator) -> Tensor:
    """Blur slices by one of the sigmas in pixels, or sharpen them if it is negative; add noise, fine or coarse."""
    sigma = float(rng.choice(sigmas))
    if sigma:
        smooth = blur(slices, abs(sigma))
        slices = smooth if sigma > 0 else 2 * slices - smooth
    amplitude, grain = float(rng.choice([0, 0.03, 0.08])), float(rng.choice([0, 0, 0.8]))
    if not amplitude:
        return slices
    noise = torch.randn(slices.shape, generator=random)
    if grain:
        noise = blur(noise, grain) * (2 * grain * math.sqrt(math.pi))  # of unit variance again
    return slices + amplitude * noise


# ---------------------------------------------------------------- networks


def layer(inputs: int, outputs: int, side: int, stride: int) -> nn.Sequential:
    """Return a convolution with normalisation and activation."""
    convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def body(inputs: int) -> nn.Sequential:
    """Return convolutions that map (N, inputs, h, w) to (N, CHANNELS[-1], h / 8, w / 8)."""
    channels = (inputs, *CHANNELS)
    return nn.Sequential(*(layer(a, b, 3 if i else 5, 2) for i, (a, b) in enumerate(zip(channels, CHANNELS))))


class Judge(nn.Module):
    """Map slices (N, 1, h, w) to logits (N,), positive for slices of one body.

    It sees a slice beside its mirror image, so that left and right of the same place meet in its first layer.
    """

    def __init__(self, flip_axis: int | None):
        super().__init__()
        self.flip_axis = flip_axis
        self.body = nn.Sequential(body(1 if flip_axis is None else 2), layer(CHANNELS[-1], CHANNELS[-1], 3, 1))
        self.head = nn.Linear(2 * CHANNELS[-1], 1)

    def forward(self, slices: Tensor) -> Tensor:
        views = slices if self.flip_axis is None else torch.cat([slices, slices.flip(self.flip_axis)], 1)
        features = self.body(views.contiguous(memory_format=torch.channels_last))
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))[:, 0]


# A slice is cut into eight blocks: 1 and 2 are its sides, o and i their outer and inner halves, f and b front and back.
BLOCKS = tuple(side + depth + end for side in "12" for depth in "oi" for end in "fb")


def blocks(letters: str) -> tuple[str, ...]:
    """Return the names of the blocks that have all of these letters."""
    return tuple(name for name in BLOCKS if set(letters) <= set(name))


OTHER_SIDE = str.maketrans("12", "21")
MATCHES = (  # parts of a slice that are matched
    (blocks("1"), blocks("2")),
    (blocks("f"), blocks("b")),
    (blocks("1f") + blocks("2b"), blocks("2f") + blocks("1b")),
    (blocks("1f"), blocks("2f")),
    (blocks("1b"), blocks("2b")),
    (blocks("1f"), blocks("1b")),
    (blocks("2f"), blocks("2b")),
    (blocks("o"), blocks("i")),
    (blocks("1o"), blocks("1i")),
    (blocks("2o"), blocks("2i")),
)


class Matcher(nn.Module):
    """Embed parts of slices (N, 1, h, w), so that parts of one slice are alike.

    Every block is seen alone. Those of the second side are mirrored, and embedded as those of the first are.
    """

    def __init__(self, size: Sequence[int], flip_axis: int | None):
        """Make a matcher for slices of size (h, w)."""
        super().__init__()
        self.flip_axis = flip_axis
        self.body = nn.Sequential(
            body(1), nn.Conv2d(CHANNELS[-1], CHANNELS[-1] // 3, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
        )
        grid = [math.ceil(side // parts / 2 ** len(CHANNELS)) for side, parts in zip(size, block_grid(flip_axis))]
        width = math.prod(grid) * (CHANNELS[-1] // 3)
        names = {self.head_of(index, part): len(part) for index, match in enumerate(MATCHES) for part in match}
        self.heads = nn.ModuleDict({name: nn.Linear(count * width, EMBEDDING) for name, count in names.items()})
        self.scale = nn.Parameter(torch.full((len(MATCHES),), math.log(8.0)))
        self.bias = nn.Parameter(torch.full((len(MATCHES),), -3.0))

    def head_of(self, index: int, part: Sequence[str]) -> str:
        """Return the name of the head of a part of a match: the same for both sides if they are mirror images."""
        if self.flip_axis is None:
            return f"{index}_{''.join(part)}"
        swapped = [{name.translate(OTHER_SIDE) for name in own} for own in MATCHES[index]]
        first = next((i for i, match in enumerate(MATCHES) if [set(own) for own in match] == swapped), index)
        return f"{min(first, index)}_{''.join(name[1:] for name in part)}"

    def forward(self, slices: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the embeddings, (N, EMBEDDING) of length 1, of both parts of each of MATCHES."""
        names, parts = zip(*cut_blocks(slices, self.flip_axis).items())
        features = self.body(torch.cat(parts).contiguous(memory_format=torch.channels_last)).chunk(len(parts))
        by_name = dict(zip(names, features))

        def embed(index: int, part: Sequence[str]) -> Tensor:
            head = self.heads[self.head_of(index, part)]
            return F.normalize(head(torch.cat([by_name[name] for name in part], 1)).float())

        return [(embed(index, first), embed(index, second)) for index, (first, second) in enumerate(MATCHES)]

    def logits(self, slices: Tensor) -> Tensor:
        """Return logits (N, len(MATCHES)), positive where the parts match."""
        cosines = torch.stack([(first * second).sum(1) for first, second in self(slices)], 1)
        return cosines * self.scale.exp() + self.bias


def block_grid(flip_axis: int | None) -> tuple[int, int]:
    """Return the rows and columns of blocks: four along the axis from side to side, which is 2 if there is none."""
    return (2, 4) if flip_axis == 3 else (4, 2)


def cut_blocks(slices: Tensor, flip_axis: int | None) -> dict[str, Tensor]:
    """Cut slices (N, 1, h, w) into BLOCKS of one size, (N, 1, h / 4, w / 2) if sides lie along axis 2.

    A rest is left out at the middle lines. Without a `flip_axis`, blocks of the second side are not mirrored, and the
    first half of a side is called its outer one.
    """
    rows, columns = block_grid(flip_axis)
    side_axis = flip_axis or 2
    side_count, end_count = (slices.shape[2] // rows, slices.shape[3] // columns)
    if side_axis == 3:
        side_count, end_count = end_count, side_count
    parts = {}
    for side in "12":
        own = slices if side == "1" else slices.flip(side_axis)
        for place, depth in enumerate("oi"):
            column = own.narrow(side_axis, place * side_count, side_count)
            for end, start in (("f", 0), ("b", slices.shape[5 - side_axis] - end_count)):
                parts[side + depth + end] = column.narrow(5 - side_axis, start, end_count)
    return parts


# ---------------------------------------------------------------- training


def set_rate(optimiser: torch.optim.Optimizer, highest: float, progress: float) -> None:
    """Set the learning rate: up during the first twentieth, then down to 0. Progress is in [0, 1]."""
    for group in optimiser.param_groups:
        group["lr"] = highest * min(1.0, 20 * progress + 0.1, 1 - progress)


def train_judge(pool: Pool, flip_axis: int | None, seed: int) -> Judge:
    """Train a judge to tell the slices of a pool from collages of them; return it in evaluation mode."""
    rng, random = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    collages = Collages(pool, flip_axis, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = channels_last(Judge(flip_axis), torch.device("cpu"))
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2, fused=True)
    labels = torch.cat([torch.ones(HALF_BATCH), torch.zeros(HALF_BATCH)])
    for update in range(JUDGE_UPDATES):
        set_rate(optimiser, JUDGE_RATE, update / JUDGE_UPDATES)
        batch = torch.cat([collages.single(HALF_BATCH), collages.draw(HALF_BATCH)])
        batch = vary(batch, flip_axis, rng, random)
        with autocast(torch.device("cpu")):
            logits = judge(batch)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimiser.step()
    return judge.eval()


def train_matcher(pool: Pool, flip_axis: int | None, seed: int) -> Matcher:
    """Train a matcher on the slices of a pool; return it in evaluation mode.

    Parts of two slices of one patient count neither as alike nor as different.
    """
    rng, random = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    by_height, total = pool.heights.argsort(kind="stable"), len(pool.heights)
    count = min(MATCHER_BATCH, total)
    window = max(count, round(WINDOW * total))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the weights and of dropout
        matcher = channels_last(Matcher(pool.slices.shape[2:], flip_axis), torch.device("cpu"))
        optimiser = torch.optim.AdamW(matcher.parameters(), weight_decay=5e-2, fused=True)
        for update in range(MATCHER_UPDATES):
            set_rate(optimiser, MATCHER_RATE, update / MATCHER_UPDATES)
            start = int((rng.integers(total) - window // 2).clip(0, total - window))
            indices = by_height[start + rng.permutation(window)[:count]]
            batch = vary_alike(pool.load(indices), flip_axis, rng, random)
            with autocast(torch.device("cpu")):
                pairs = matcher(batch)
            patients = torch.from_numpy(pool.patients[indices])
            loss = matching_loss(matcher, pairs, patients[:, None] != patients)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return matcher.eval()


def matching_loss(matcher: Matcher, pairs: Sequence[tuple[Tensor, Tensor]], different: Tensor) -> Tensor:
    """Return the sigmoid loss of all pairs of parts, with equal weight for parts of one slice and of two patients.

    Args:
        matcher: Has the scale and bias of the logits.
        pairs: Embeddings (n, EMBEDDING) of both parts, for each of MATCHES.
        different: Whether two slices are of different patients, (n, n) bool.
    """
    loss = torch.zeros(())
    for (first, second), scale, bias in zip(pairs, matcher.scale.exp(), matcher.bias):
        logits = first @ second.T * scale + bias
        loss = loss + F.softplus(-logits.diagonal()).mean()
        loss = loss + (F.softplus(logits) * different).sum() / different.sum().clamp(min=1)
    return loss


@torch.no_grad()
def evidence(judge: Judge, matcher: Matcher, slices: Tensor) -> Tensor:
    """Return logits (N, 1 + len(MATCHES)) of slices (N, 1, h, w) uint8, the judge's a mean over both mirror images."""
    rows = []
    for batch in slices.split(BATCH_SIZE):
        view = batch.float() / 127.5 - 1
        judged = judge(view) if judge.flip_axis is None else (judge(view) + judge(view.flip(judge.flip_axis))) / 2
        rows.append(torch.cat([judged[:, None], matcher.logits(view)], 1))
    return torch.cat(rows)


# ---------------------------------------------------------------- scores


class Reference(NamedTuple):
    """Networks that learned from one half of the patients, and the slices of the other half, which they never saw."""

    judge: Judge
    matcher: Matcher
    evidence: Tensor  # (M, E), sorted along the slices
    combined: Tensor  # (M,), sorted
    ranks: Tensor  # (M,): of its own slices
    patients: np.ndarray  # (M,) int64

    def rank(self, slices: Tensor) -> Tensor:
        """Return the ranks (N,) in (0, 1) of slices (N, 1, h, w) uint8 among those of unseen patients."""
        found = evidence(self.judge, self.matcher, slices)
        return ranks_among(self.combined, combine(self.evidence, found))


def make_reference(pool: Pool, learned: np.ndarray, flip_axis: int | None, seed: int) -> Reference:
    """Learn from the slices where `learned` (N,) is true; the others are the reference."""
    own, unseen = pool.select(learned), pool.select(~learned)
    if len(set(own.patients.tolist())) == 1:
        own = own._replace(patients=np.arange(len(own.patients)))  # slices of one patient are better than no others
    judge, matcher = train_judge(own, flip_axis, seed), train_matcher(own, flip_axis, seed)
    found = evidence(judge, matcher, unseen.slices)
    by_kind = found.sort(0).values
    combined = combine(by_kind, found)
    in_order = combined.sort().values
    return Reference(judge, matcher, by_kind, in_order, ranks_among(in_order, combined), unseen.patients)


def ranks_among(reference: Tensor, values: Tensor) -> Tensor:
    """Return the ranks (N,) in (0, 1) of values (N,) in a sorted reference (M,); equal values count half."""
    values = values.contiguous()
    below = torch.searchsorted(reference, values) + torch.searchsorted(reference, values, right=True)
    return (below.double() / 2 + 0.5) / (len(reference) + 1)


def combine(reference: Tensor, found: Tensor) -> Tensor:
    """Combine kinds of evidence (N, E) to one number (N,): a weighted sum of log ranks among the reference (M, E).

    After Fisher 1932, Statistical Methods for Research Workers, section 21.1: one very low rank outweighs many high
    ones. Parts that match better than nearly all real ones are suspicious too, as those of a repeated side do.
    """
    columns = zip(reference.T.contiguous(), found.T.contiguous())
    ranks = torch.stack([ranks_among(own, values) for own, values in columns], 1)
    ranks[:, 1:] = torch.minimum(ranks[:, 1:], (TOO_ALIKE * (1 - ranks[:, 1:])).clamp(max=1))
    return ranks.log() @ torch.tensor(WEIGHTS, dtype=ranks.dtype)


class Tail(NamedTuple):
    """Slices of a group that lie in the low tail, below the TAIL quantile of unseen patients."""

    low: np.ndarray  # (N,): share of the references in whose tail a slice lies, in [0, 1]
    null: np.ndarray  # (DRAWS,): mean of `low` in groups of unseen patients; TAIL on average

    @property
    def share(self) -> float:
        """Return the share of the slices that lie in the tail, in [0, 1]."""
        return float(self.low.mean())

    def p_value(self, share: float) -> float:
        """Return the p-value of a share of slices in the tail, at least 1 / (DRAWS + 1)."""
        return float((1 + (self.null >= share - 1e-12).sum()) / (len(self.null) + 1))


class Coherence(NamedTuple):
    """Coherence of groups of slices, by the name of the group."""

    scores: dict[str, Tensor]  # (N,) in (0, 1): rank among slices of unseen patients; 0.5 on average for such slices
    tails: dict[str, Tail]


def coherence(
    training: Iterable[Tensor],
    positions: np.ndarray,
    cases: Sequence[Hashable],
    groups: Mapping[str, Tensor],
    flip_axis: int | None,
    group_cases: Mapping[str, Sequence[Hashable]] | None = None,
    seed: int = 0,
) -> Coherence:
    """Score the anatomical coherence of single slices; see the module's docstring.

    A score is the mean of two ranks, one among each half of the training patients. Ranks are of single slices, so a low
    one is no proof: one real slice in twenty is below 0.05. Use the test for a set of slices. With few training
    patients, a single unusual one fills the reference's tail, and the test calls gross faults only. Computes on the
    CPU, for some 90 s of one core that hardly depend on the number of training slices.

    Args:
        training: Batches (n, 1, H, W) of the N training slices, in order; read once.
        positions: Their normalised heights (N,) in [0, 1], NaN for unknown.
        cases: Their patients (N), None for unknown.
        groups: Slices to score, (n, 1, H, W) each.
        flip_axis: The axis, 2 or 3, from left to right; None if no axis is (sagittal slices).
        group_cases: Patients of the slices of a group, (n,); a slice of a group without any is a case of its own.
        seed: Of networks, collages and test.

    Raises:
        ValueError: There are fewer than MIN_TRAINING training slices.
    """
    if len(cases) < MIN_TRAINING:
        raise ValueError(f"{len(cases)} training slices are too few: {MIN_TRAINING} are needed")
    pool = gather_pool(training, positions, number_groups(cases))
    half = two_fold_split(pool.patients.tolist())
    references = [make_reference(pool, learned, flip_axis, seed + i) for i, learned in enumerate((half, ~half))]
    scores, tails = {}, {}
    for name, slices in groups.items():
        ranks = torch.stack([own.rank(reduce(slices).cpu()) for own in references], 1)
        own_cases = range(len(slices)) if group_cases is None else group_cases.get(name, range(len(slices)))
        scores[name] = ranks.mean(1)
        tails[name] = tail_test(ranks, own_cases, references, seed)
    return Coherence(scores, tails)


def tail_test(ranks: Tensor, cases: Sequence[Hashable], references: Sequence[Reference], seed: int) -> Tail:
    """Find the slices in the low tail of unseen patients, and how many are there by chance.

    The null distribution is a bootstrap of patients. Each draw chooses the reference's patients anew, with replacement,
    which moves the quantiles; and for each case of the group a patient, and as many slices of that patient as the case
    has. A drawn slice has one rank for both references where a slice of the group has the mean of two: the test is
    rather too careful.

    Args:
        ranks: Of the N slices in each of K references, (N, K).
        cases: Their patients (N).
        references: K.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    thresholds = [np.quantile(own.ranks.numpy(), TAIL) for own in references]
    quantiles = [draw_quantiles(own, rng) for own in references]
    null = np.concatenate(
        [
            np.mean([(drawn < own[part, None]).mean(1) for own in quantiles], 0)
            for part, drawn in draw_ranks(references, cases, rng)
        ]
    )
    return Tail((ranks.numpy() < thresholds).mean(1), null)


def draw_quantiles(reference: Reference, rng: Rng) -> np.ndarray:
    """Return TAIL quantiles (DRAWS,) of the ranks of resampled patients."""
    patients = np.unique(reference.patients, return_inverse=True)[1]
    count = patients.max() + 1
    order = reference.ranks.numpy().argsort(kind="stable")
    ranks, quantiles = reference.ranks.numpy()[order], np.empty(DRAWS)
    for draw, weights in enumerate(rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)):
        cumulated = weights[patients[order]].cumsum()
        quantiles[draw] = ranks[np.searchsorted(cumulated, TAIL * cumulated[-1])]
    return quantiles


def draw_ranks(
    references: Sequence[Reference], cases: Sequence[Hashable], rng: Rng
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw slices of unseen patients DRAWS times: for each of N slices' cases, one patient at random.

    Yields:
        Numbers of draws (n,), and the ranks (n, N) of the slices drawn.
    """
    patients = np.concatenate([own.patients for own in references])
    ranks = np.concatenate([own.ranks.numpy() for own in references])[patients.argsort(kind="stable")]
    sizes = np.unique(patients, return_counts=True)[1]
    starts = sizes.cumsum() - sizes
    case_of = number_groups(cases)
    for part in np.array_split(np.arange(DRAWS), math.ceil(DRAWS * len(cases) / 2**20)):
        drawn = rng.integers(len(sizes), size=(len(part), case_of.max() + 1))[:, case_of]
        yield part, ranks[starts[drawn] + (rng.random(drawn.shape) * sizes[drawn]).astype(np.int64)]
