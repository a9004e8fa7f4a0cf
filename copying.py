"""Search for copies of training slices: moved, turned, stretched, mirrored, altered in intensity, or of a part only.

The search works on small slices, divided by their local contrast so that brightness and gamma do not matter.

1. Candidates: blocks of a sample are compared with the blocks near the same place of every training slice. Those
   training slices are candidates whose blocks agree best, in the whole slice or in a window of it (SPANS).
2. Registration: each candidate is laid over the sample by block matching. Blocks vote for an affine map, so that a part
   of a slice finds its map too; blocks that disagree have no say. The best few are registered more finely.
3. Score: the correlation of sample and candidate within each window, in standard deviations of the same correlation
   between different training patients. The highest window counts.

A sample is called a copy if its score exceeds a threshold, which slices of a new patient exceed at most at a stated
rate (`calibrate`). Blur makes patients more alike: compare samples with reconstructions of held-out slices too.

Two statistics compare whole sets by the distances to the nearest training slices: `memorisation_rate` and
`data_copying_statistic`.

Slices are (N, 1, H, W) in [-1, 1]. Everything is deterministic.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import number_groups, to_grey_levels

RATE = 0.01  # share of the slices of new patients that may be called copies
CALIBRATION_SLICES = 240  # training slices compared with the other patients', about
FINE_PIXELS, COARSE_PIXELS = 4608, 512  # of a downsampled slice: 96x48 and 32x16 for sides of 2:1
BLOCK = 8  # side of a block in those pixels
FINE_STRIDE, COARSE_STRIDE = 4, 2  # pixels between neighbouring blocks
SEARCH_STRIDE = (4, 3)  # pixels between the blocks of a sample, of 32x16 pixels, that search for candidates
SEARCH_REACH = 3  # pixels of 32x16 that a block may lie away from its place in the training slice
CANDIDATES, FINALISTS = 40, 4  # training slices registered with each sample, at 32x16 and then at 96x48
COARSE_REACHES, FINE_REACHES = (4, 2, 1), (2, 1)  # pixels that blocks are searched over, round by round
ELASTIC_REACH = 1  # pixels of 96x48 that blocks may deviate from the affine map
BACKGROUND = 256  # training slices that the blocks' agreement is compared with
FINE_SIGMAS, COARSE_SIGMAS = (0.8, 4.0), (0.6, 2.0)  # pixels: of the slight blur, and of the local mean and contrast
MIN_CORRELATION = 0.3  # of blocks that vote
POWER = 6  # of a vote: well above a random block's correlation, about 0.8 at best, copies count far more
SPANS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.35, 0.65))  # of windows along a side: each with each
SLOPE = 0.12  # by which displacements may differ per distance of blocks: turns and stretches
BATCH_SIZE, QUERY_BATCH, PAIR_BATCH = 64, 256, 20  # training slices; queries; pairs: temporaries stay in the cache
MAX_SIMILARITY = 0.99  # so that Fisher's transform stays finite
MIN_STD = 0.02  # of Fisher's z between patients
CELLS, MIN_CELL_SIZE = 5, 20  # of the data-copying test; slices of either set that a cell needs
VARIANCE_FLOOR = 0.02  # added to the variance of blocks; normalised slices have about 1
MIN_VARIANCE = 0.3  # of a window; the score of windows with less structure is reduced in proportion
SAMPLE, UNKNOWN = -1, -2  # labels of queries that are no training slices, and of training slices of unknown patients


class Copies(NamedTuple):
    """The most similar training slice of each of N samples."""

    scores: Tensor  # (N,): similarity, in standard deviations above the mean similarity of different patients
    indices: Tensor  # (N,) int64: of the training slice
    copied: Tensor  # (N,) bool: whether the score exceeds the threshold
    threshold: float  # infinite if fewer than two patients are known: nothing is called, and scores are Fisher's z
    rate: float  # expected share of a new patient's slices above the threshold, at most; NaN if it is infinite
    transforms: Tensor  # (N, 2, 3): theta of affine_grid; lays the training slice over the sample (`align`)
    boxes: Tensor  # (N, 4): the part of the sample that matched: top, bottom, left, right, in shares of the sides
    distances: Tensor  # (N,): root mean squared difference from the nearest training slice (`match`), in [0, 2]
    cells: Tensor  # (N,) int64: the cell of similar training slices that the sample falls into

    @property
    def share(self) -> float:
        """Return the share of the samples that are called copies; NaN without a threshold."""
        return self.copied.double().mean().item() if math.isfinite(self.threshold) else math.nan

    def take(self, rows: Tensor) -> "Copies":
        """Return those of some samples, by indices or a mask."""
        taken: dict[str, Any] = {name: of[rows] for name, of in self._asdict().items() if isinstance(of, Tensor)}
        return self._replace(**taken)


class Pyramid(NamedTuple):
    """Slices at two resolutions, in half precision: 10 kB a slice."""

    pixels: Tensor  # (N, 1, h, w) in [-1, 1], h * w about FINE_PIXELS
    coarse: Tensor  # (N, 1, h, w), h * w about COARSE_PIXELS, normalised


class Blocks(NamedTuple):
    """Where the S blocks of N slices match in another slice, and how well."""

    centres: Tensor  # (S, 2): x and y, in units of half of sqrt(h * w) pixels from the centre of the slice
    displacements: Tensor  # (N, S, 2): to the best match, in the same units
    covariances: Tensor  # (N, S): of a block and its match
    variances: Tensor  # (N, S): of the block
    matched_variances: Tensor  # (N, S): of its match
    shape: tuple[int, int]  # rows and columns of blocks
    share: tuple[float, float]  # height and width of a block in shares of the sides

    @property
    def correlations(self) -> Tensor:
        """Return the correlations (N, S) of blocks and matches, in [-1, 1]; near 0 without structure."""
        floored = (self.variances + VARIANCE_FLOOR) * (self.matched_variances + VARIANCE_FLOOR)
        return self.covariances / floored.sqrt()


class Pairs(NamedTuple):
    """Q queries with k training slices each, which they may resemble."""

    views: Tensor  # (Q, k) int64: q of query q, Q + q if mirrored
    indices: Tensor  # (Q, k) int64: of the training slice
    valid: Tensor  # (Q, k) bool: whether it is of another patient, as those of few patients may not suffice


class Registered(NamedTuple):
    """Training slices that are laid over queries."""

    transforms: Tensor  # (Q, k, 2, 3): theta of affine_grid
    similarities: Tensor  # (Q, k, W): within each window, in [-1, 1]


class Matches(NamedTuple):
    """The best candidate of N slices for each of the W windows, and their nearest training slice."""

    similarities: Tensor  # (N, W), in [-1, 1]
    indices: Tensor  # (N, W) int64: of the training slice
    transforms: Tensor  # (N, W, 2, 3): theta of affine_grid, flip included
    distances: Tensor  # (N,): of the nearest training slice, in [0, 2]


def find_copies(
    samples: Tensor,
    load_training: Callable[[Sequence[int]], Tensor],
    count: int,
    cases: Sequence[Hashable],
    flip_axis: int | None = None,
    rate: float = RATE,
) -> Copies:
    """Find the training slice that each sample resembles most, and decide whether the sample is a copy of it.

    Args:
        samples: (N, 1, H, W) in [-1, 1].
        load_training: Returns the training slices (n, 1, H, W) of n indices. Each slice is loaded once.
        count: Number of training slices.
        cases: Their patients (count), None for unknown. Slices of unknown patients are searched, but do not calibrate:
            nobody knows which of them are of one patient.
        flip_axis: The axis, 2 or 3, along which copies may be mirrored; None if they may not.
        rate: Share of the slices of a new patient that may be called copies. With K known patients it is at least
            1 / (K + 1).
    """
    batches = (range(start, min(start + BATCH_SIZE, count)) for start in range(0, count, BATCH_SIZE))
    training = join([build_pyramid(load_training(batch).to(samples.device)) for batch in batches])
    numbers = {case: number for number, case in enumerate(dict.fromkeys(case for case in cases if case is not None))}
    labels = torch.tensor([UNKNOWN if case is None else numbers[case] for case in cases], device=samples.device)
    calibrators = choose_calibrators(labels)
    queries = join([*map(build_pyramid, samples.split(BATCH_SIZE)), select(training, calibrators)])
    query_labels = torch.cat([labels.new_full((len(samples),), SAMPLE), labels[calibrators]])
    matches = match(queries, query_labels, training, labels, flip_axis)
    similarities = matches.similarities.split([len(samples), len(calibrators)])
    scores, others = (window_scores(own, similarities[1]) for own in similarities)
    threshold, rate = calibrate(others.amax(1), labels[calibrators], rate) if len(calibrators) else (math.inf, math.nan)
    best, window = scores.max(1)
    rows = torch.arange(len(samples), device=samples.device)
    transforms = matches.transforms[rows, window]
    centroids = k_means(flat_pixels(training), min(CELLS, count))
    return Copies(
        scores=best,
        indices=matches.indices[rows, window],
        copied=best > threshold,
        threshold=threshold,
        rate=rate,
        transforms=transforms,
        boxes=matched_boxes(window, transforms),
        distances=matches.distances[: len(samples)],
        cells=nearest_centroid(flat_pixels(queries)[: len(samples)], centroids),
    )


def nearest_distances(slices: Tensor, others: Tensor, flip_axis: int | None) -> Tensor:
    """Return the distances (N,) of slices (N, 1, H, W) to the nearest of others (M, 1, H, W), as in `Copies`."""
    queries, training = (join([*map(build_pyramid, of.split(BATCH_SIZE))]) for of in (slices, others))
    labels = [
        torch.full((len(of),), label, device=slices.device) for of, label in ((slices, SAMPLE), (others, UNKNOWN))
    ]
    return match(queries, labels[0], training, labels[1], flip_axis).distances


def align(training: Tensor, transforms: Tensor) -> Tensor:
    """Lay training slices (N, 1, H, W) over their samples, by the transforms (N, 2, 3) of `Copies`."""
    grid = F.affine_grid(transforms, list(training.shape), align_corners=False)
    return F.grid_sample(training, grid, padding_mode="reflection", align_corners=False)


# ---------------------------------------------------------------- downsampling and normalisation


def resize(slices: Tensor, pixels: int) -> Tensor:
    """Average slices (N, 1, H, W) to a size of about so many pixels with the same ratio of sides."""
    factor = math.sqrt(pixels / math.prod(slices.shape[2:]))
    return F.interpolate(slices, size=[round(factor * side) for side in slices.shape[2:]], mode="area")


def gaussian_blur(slices: Tensor, sigma: float) -> Tensor:
    """Convolve slices with a Gaussian of a standard deviation in pixels."""
    reach = math.ceil(2.5 * sigma)
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=slices.device) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    padded = F.pad(slices, (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(padded, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))


def normalise(slices: Tensor, blur: float, sigma: float) -> Tensor:
    """Subtract the local mean and divide by the local contrast, both within a Gaussian of a standard deviation.

    Half of the mean contrast of the slice is added to the local one, so that noise in dark areas is not amplified. A
    slight blur comes first.
    """
    slices = gaussian_blur(slices, blur)
    details = slices - gaussian_blur(slices, sigma)
    energy = details.square()
    return details / (gaussian_blur(energy, sigma) + energy.mean((2, 3), keepdim=True) / 4 + 1e-6).sqrt()


def build_pyramid(slices: Tensor) -> Pyramid:
    """Downsample slices (N, 1, H, W), and normalise the smaller ones.

    The 256 grey levels are averaged as integers, so that the pixels of mirrored slices are exactly mirrored.
    """
    levels = to_grey_levels(slices).float()
    pixels, coarse = (resize(levels, size) / 127.5 - 1 for size in (FINE_PIXELS, COARSE_PIXELS))
    return Pyramid(pixels.half(), normalise(coarse, *COARSE_SIGMAS).half())


def join(pyramids: Sequence[Pyramid]) -> Pyramid:
    """Concatenate pyramids."""
    return Pyramid(*map(torch.cat, zip(*pyramids)))


def flat_pixels(slices: Pyramid) -> Tensor:
    """Return about COARSE_PIXELS pixels of each slice: (N, D)."""
    return torch.cat([resize(batch.float(), COARSE_PIXELS).flatten(1) for batch in slices.pixels.split(BATCH_SIZE)])


def select(pyramid: Pyramid, indices: Tensor) -> Pyramid:
    """Return the slices at indices (n,)."""
    return Pyramid(*(of[indices] for of in pyramid))


# ---------------------------------------------------------------- windows


def window_bounds(device: torch.device) -> Tensor:
    """Return the windows (W, 4): top, bottom, left, right, in shares of the sides. The first is the whole slice."""
    return torch.tensor([(*rows, *columns) for rows in SPANS for columns in SPANS], device=device)


def window_members(shape: Sequence[int], block_share: Sequence[float], device: torch.device) -> Tensor:
    """Return which blocks lie in each window: (W, rows * columns), 0 or 1. A third of a block may stand out.

    Args:
        shape: Rows and columns of blocks, which are evenly spaced from edge to edge.
        block_share: Height and width of a block in shares of the sides.
        device: Of the result.
    """
    inside = []
    bounds = window_bounds(device)[..., None]
    for count, share, low, high in zip(shape, block_share, bounds[:, ::2].unbind(1), bounds[:, 1::2].unbind(1)):
        starts = torch.arange(count, device=device) / max(count - 1, 1) * (1 - share)
        inside.append((starts >= low - share / 3) & (starts + share <= high + share / 3))
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1).float()


def matched_boxes(windows: Tensor, transforms: Tensor) -> Tensor:
    """Return the boxes (N, 4) of windows (N,), which were found in the mirrored sample if the transform mirrors."""
    boxes = window_bounds(windows.device)[windows]
    mirrored_x, mirrored_y = transforms[:, 0, 0] < 0, transforms[:, 1, 1] < 0
    top, bottom, left, right = boxes.unbind(1)
    top, bottom = torch.where(mirrored_y, 1 - bottom, top), torch.where(mirrored_y, 1 - top, bottom)
    left, right = torch.where(mirrored_x, 1 - right, left), torch.where(mirrored_x, 1 - left, right)
    return torch.stack([top, bottom, left, right], 1)


# ---------------------------------------------------------------- candidates


def match(queries: Pyramid, query_labels: Tensor, training: Pyramid, labels: Tensor, flip_axis: int | None) -> Matches:
    """Find the training slices that queries resemble most, window by window, and the distance to the nearest one.

    The distance is the root mean squared difference of pixels, averaged to about FINE_PIXELS: the smallest of the
    finalists, each unmoved (mirrored if it was found by the mirrored query) and as registered. Exact and exactly
    mirrored copies have distance 0.

    Args:
        queries: Q slices.
        query_labels: Their patients (Q,), as numbers; slices of the same patient are not searched. SAMPLE for none.
        training: M training slices.
        labels: Their patients (M,), UNKNOWN for unknown.
        flip_axis: As in `find_copies`.
    """
    views, mirror = queries, torch.eye(3, device=labels.device)
    if flip_axis is not None:
        views = join([queries, Pyramid(*(of.flip(flip_axis) for of in queries))])
        mirror[3 - flip_axis, 3 - flip_axis] = -1
    pairs = find_candidates(views.coarse, query_labels, training.coarse, labels)
    rows = torch.arange(len(query_labels), device=labels.device)[:, None]
    unmoved = torch.eye(2, 3, device=labels.device).expand(*pairs.views.shape, -1, -1)
    coarse = register_pairs(views, training, pairs, unmoved, COARSE)
    scores = window_scores(coarse.similarities, coarse.similarities[query_labels >= 0].flatten(0, 1)).amax(2)
    finalists = scores.topk(min(FINALISTS, scores.shape[1])).indices
    pairs = Pairs(*(of[rows, finalists] for of in pairs))
    fine = register_pairs(views, training, pairs, coarse.transforms[rows, finalists], FINE)
    similarities, best = fine.similarities.max(1)
    transforms, mirrored = fine.transforms[rows, best], pairs.views[rows, best] >= len(rows)
    return Matches(
        similarities=similarities,
        indices=pairs.indices[rows, best],
        transforms=torch.where(mirrored[..., None, None], transforms @ mirror, transforms),
        distances=pair_distances(views, training, pairs, fine.transforms).amin(1),
    )


def find_candidates(views: Tensor, query_labels: Tensor, training: Tensor, labels: Tensor) -> Pairs:
    """Find the training slices whose blocks agree best with those of queries.

    Args:
        views: The coarse queries and, where searched, the mirrored ones: (Q, 1, h, w) or (2 * Q, 1, h, w).
        query_labels: As in `match`.
        training: Coarse training slices (M, 1, h, w).
        labels: As in `match`.
    """
    blocks, places = query_blocks(views)
    sides = len(views) // len(query_labels)
    background = block_agreement(blocks, places, training[:: max(1, len(training) // BACKGROUND)])
    # Of both views together: views without any likeness must not be preferred for being even.
    background = torch.cat(background.chunk(sides), 1)
    std, mean = (of.repeat(sides, 1, 1) for of in torch.std_mean(background, 1, keepdim=True, correction=0))
    own = query_labels.repeat(sides)[:, None]
    kept = min(CANDIDATES, len(training))
    best, indices = blocks.new_zeros(len(own), 0), labels.new_zeros(len(own), 0)
    for part in torch.arange(len(training), device=training.device).split(BATCH_SIZE):
        scores = ((block_agreement(blocks, places, training[part]) - mean) / (std + 1e-6)).amax(2)
        scores = scores.masked_fill(own == labels[part], -torch.inf)
        best, order = torch.cat([best, scores], 1).topk(min(kept, best.shape[1] + len(part)))
        indices = torch.cat([indices, part.expand(len(own), -1)], 1).gather(1, order)
    best, indices = (torch.cat(of.chunk(sides), 1) for of in (best, indices))
    best, order = best.topk(kept)
    rows = torch.arange(len(query_labels), device=labels.device)[:, None]
    return Pairs(rows + len(rows) * (order >= kept), indices.gather(1, order), best > -torch.inf)


def unit_blocks(slices: Tensor) -> Tensor:
    """Return all blocks of coarse slices (N, 1, h, w) as unit vectors of mean 0: (N, D, rows, columns)."""
    blocks = F.unfold(slices.float(), BLOCK)
    blocks = blocks - blocks.mean(1, keepdim=True)
    blocks = blocks / (blocks.square().sum(1, keepdim=True) + VARIANCE_FLOOR * BLOCK**2).sqrt()
    return blocks.unflatten(2, [side - BLOCK + 1 for side in slices.shape[2:]])


def query_blocks(queries: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Return the blocks (S, N, D) of queries that search, and their rows and columns."""
    blocks = unit_blocks(queries)
    places = [
        list(range((count - 1) % stride // 2, count, stride)) for count, stride in zip(blocks.shape[2:], SEARCH_STRIDE)
    ]
    return torch.stack([blocks[:, :, row, column] for row, column in product(*places)]), places


def block_agreement(blocks: Tensor, places: list[list[int]], training: Tensor) -> Tensor:
    """Return how well the blocks of Q queries agree with those of n training slices in each window: (Q, n, W).

    The agreement is the mean cube of the blocks' correlations with the best block near their place.
    """
    targets = unit_blocks(training).permute(2, 3, 1, 0)
    agreement = blocks.new_empty(blocks.shape[1], len(training), len(blocks))
    for place, (row, column) in enumerate(product(*places)):
        rows, columns = (slice(max(0, at - SEARCH_REACH), at + SEARCH_REACH + 1) for at in (row, column))
        near = targets[rows, columns].flatten(0, 1)
        for queries in (slice(start, start + QUERY_BATCH) for start in range(0, blocks.shape[1], QUERY_BATCH)):
            correlations = blocks[place, queries] @ near.transpose(0, 1).flatten(1)
            agreement[queries, :, place] = correlations.unflatten(1, (len(near), -1)).amax(1).clamp(min=0) ** 3
    shares = [BLOCK / side for side in training.shape[2:]]
    members = window_members([len(places[0]), len(places[1])], shares, blocks.device)
    return agreement @ (members / members.sum(1, keepdim=True).clamp(min=1)).T


# ---------------------------------------------------------------- registration


class Level(NamedTuple):
    """How slices are registered at one resolution."""

    details: Callable[[Pyramid], Tensor]  # returns normalised slices (N, 1, h, w)
    stride: int  # pixels between neighbouring blocks
    reaches: tuple[int, ...]  # pixels that blocks are searched over, in each round


COARSE = Level(lambda slices: slices.coarse.float(), COARSE_STRIDE, COARSE_REACHES)
FINE = Level(lambda slices: normalise(slices.pixels.float(), *FINE_SIGMAS), FINE_STRIDE, FINE_REACHES)


def register_pairs(views: Pyramid, training: Pyramid, pairs: Pairs, transforms: Tensor, level: Level) -> Registered:
    """Lay the training slices of pairs over the queries, from transforms (Q, k, 2, 3), and compare them."""
    parts = []
    for rows, indices, initial in split_pairs(pairs, transforms):
        fixed, moving = level.details(select(views, rows)), level.details(select(training, indices))
        found = register(fixed, moving, initial, level)
        blocks = match_blocks(fixed, align(moving, found), level.stride, ELASTIC_REACH)
        parts.append((found, window_similarities(blocks)))
    found, similarities = (torch.cat(own).unflatten(0, pairs.views.shape) for own in zip(*parts))
    return Registered(found, similarities.masked_fill(~pairs.valid[..., None], -MAX_SIMILARITY))


def split_pairs(pairs: Pairs, transforms: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the views (n,), training slices (n,) and transforms (n, 2, 3) of PAIR_BATCH pairs at a time."""
    return zip(*(of.flatten(0, 1).split(PAIR_BATCH) for of in (pairs.views, pairs.indices, transforms)))


def pair_distances(views: Pyramid, training: Pyramid, pairs: Pairs, transforms: Tensor) -> Tensor:
    """Return the root mean squared differences (Q, k) of pairs, unmoved or by transforms (Q, k, 2, 3) if nearer."""
    parts = []
    for rows, indices, theta in split_pairs(pairs, transforms):
        query, other = views.pixels[rows].float(), training.pixels[indices].float()
        squares = [(query - own).square().mean((1, 2, 3)) for own in (other, align(other, theta))]
        parts.append(torch.minimum(*squares).sqrt())
    return torch.cat(parts).unflatten(0, pairs.views.shape).masked_fill(~pairs.valid, torch.inf)


def register(fixed: Tensor, moving: Tensor, transforms: Tensor, level: Level) -> Tensor:
    """Lay slices over others by block matching (Ourselin et al. 2001, Image Vis. Comput. 19:25).

    Args:
        fixed: (N, 1, h, w), normalised.
        moving: The N slices that are laid over them.
        transforms: The first guess (N, 2, 3), theta of affine_grid.
        level: Of the slices.

    Returns:
        The transforms (N, 2, 3).
    """
    for reach in level.reaches:
        blocks = match_blocks(fixed, align(moving, transforms), level.stride, reach)
        transforms = fit_transform(blocks, transforms, fixed.shape)
    return transforms


def match_blocks(fixed: Tensor, moving: Tensor, stride: int, reach: int) -> Blocks:
    """Find where each block of slices (N, 1, h, w) correlates best with others, up to `reach` pixels away."""
    height, width = fixed.shape[2:]
    padded = F.pad(moving, (reach, reach, reach, reach), mode="reflect")
    moving_means, moving_squares = (
        shifted_views(block_means(of, 1), reach)[..., ::stride, ::stride] for of in (padded, padded.square())
    )
    moving_variances = moving_squares - moving_means.square()
    means = block_means(fixed, stride)
    variances = block_means(fixed.square(), stride) - means.square()
    covariances = block_means(fixed * shifted_views(padded, reach), stride) - means * moving_means
    floored = (variances + VARIANCE_FLOOR) * (moving_variances + VARIANCE_FLOOR)
    best = (covariances * floored.rsqrt()).argmax(1, keepdim=True)
    y, x = best[:, 0].flatten(1) // (2 * reach + 1) - reach, best[:, 0].flatten(1) % (2 * reach + 1) - reach
    pixel = 2 / math.sqrt(height * width)
    rows, columns = means.shape[2:]
    ends = torch.meshgrid(
        *(stride * torch.arange(count, device=fixed.device) + (BLOCK - 1) / 2 for count in (rows, columns)),
        indexing="ij",
    )
    centres = torch.stack([ends[1] - (width - 1) / 2, ends[0] - (height - 1) / 2], -1).flatten(0, 1)
    return Blocks(
        centres=pixel * centres,
        displacements=pixel * torch.stack([x, y], -1),
        covariances=covariances.gather(1, best).flatten(1),
        variances=variances.flatten(1),
        matched_variances=moving_variances.gather(1, best).flatten(1),
        shape=(rows, columns),
        share=(BLOCK / height, BLOCK / width),
    )


def shifted_views(padded: Tensor, reach: int) -> Tensor:
    """Return the crops of padded images (N, 1, h + 2 * reach, w + 2 * reach) at each shift: (N, shifts, h, w)."""
    height, width = (side - 2 * reach for side in padded.shape[2:])
    return padded.unfold(2, height, 1).unfold(3, width, 1)[:, 0].flatten(1, 2)


def block_means(images: Tensor, stride: int) -> Tensor:
    """Return the means of the blocks of images (N, C, h, w): (N, C, rows, columns), by matrix products."""
    rows, columns = (block_averages(side, stride, images.device) for side in images.shape[2:])
    return rows @ images @ columns.T


def block_averages(side: int, stride: int, device: torch.device) -> Tensor:
    """Return the matrix (count, side) that averages along a side within blocks."""
    starts = torch.arange(0, side - BLOCK + 1, stride, device=device)
    offsets = torch.arange(side, device=device) - starts[:, None]
    return ((offsets >= 0) & (offsets < BLOCK)).float() / BLOCK


def fit_transform(blocks: Blocks, transforms: Tensor, shape: torch.Size) -> Tensor:
    """Update transforms (N, 2, 3) by the affine map that most blocks agree on.

    Each block votes for its displacement; the largest group of blocks with displacements that one affine map could have
    made is kept, and the map is fitted by reweighted least squares.
    """
    pixel = 2 / math.sqrt(math.prod(shape[2:]))
    sides = transforms.new_tensor([shape[3], shape[2]]) * pixel / 2  # half sides of the slice, x and y
    to_units = sides[:, None] / torch.cat([sides, sides.new_ones(1)])
    current = transforms * to_units  # in the units of `centres`, which are the same along x and y
    x, y = ((own[:, :, None] - own[:, None]).square() for own in blocks.displacements.unbind(2))
    tolerance = pixel + SLOPE * torch.cdist(blocks.centres, blocks.centres)
    weights = (blocks.correlations - MIN_CORRELATION).clamp(min=0) ** POWER
    agree = (x + y < tolerance.square()).float()
    leader = ((agree @ weights[:, :, None])[:, :, 0] * (weights > 0)).argmax(1)
    weights = weights * agree[torch.arange(len(leader), device=leader.device), leader]
    weights = weights / (weights.sum(1, keepdim=True) + 1e-9)
    ones = torch.ones_like(blocks.centres[:, :1])
    inputs = torch.cat([blocks.centres, ones], 1)
    targets = torch.cat([blocks.centres + blocks.displacements, ones.expand(len(weights), -1, -1)], 2) @ current.mT
    prior = torch.diag(
        inputs.new_tensor([0.003, 0.003, 1e-5])
    )  # towards no turn and no stretch, where few blocks agree
    identity = torch.eye(3, 2, device=inputs.device)
    solution = identity.expand(len(weights), -1, -1)
    robust = weights
    for _ in range(3):
        weighted = inputs.mT * robust[:, None]
        solution = torch.linalg.solve(weighted @ inputs + prior, weighted @ targets + prior @ identity)
        robust = weights / (1 + ((inputs @ solution - targets).norm(dim=-1) / pixel).square())
    return solution.mT / to_units


# ---------------------------------------------------------------- scores and calibration


def window_similarities(blocks: Blocks) -> Tensor:
    """Return the correlation of two slices within each window (N, W), each block at its best displacement."""
    members = window_members(blocks.shape, blocks.share, blocks.centres.device)
    covariance, own, other = (
        of @ members.T / members.sum(1).clamp(min=1)
        for of in (blocks.covariances, blocks.variances, blocks.matched_variances)
    )
    structure = (torch.minimum(own, other) / MIN_VARIANCE).clamp(0, 1)
    return (structure * covariance / (own * other).clamp(min=1e-6).sqrt()).clamp(-MAX_SIMILARITY, MAX_SIMILARITY)


def window_scores(similarities: Tensor, others: Tensor) -> Tensor:
    """Standardise similarities (N, W), by Fisher's transform, with those of slices of different patients (M, W).

    Without others, Fisher's z is returned.
    """
    if len(others) == 0:
        return similarities.atanh()
    std, mean = torch.std_mean(others.atanh(), 0, correction=0)
    return (similarities.atanh() - mean) / std.clamp(min=MIN_STD)


def choose_calibrators(labels: Tensor) -> Tensor:
    """Return the indices of about CALIBRATION_SLICES training slices: as many of each patient, at random heights.

    Only known patients; none if there are fewer than two, who cannot be compared with each other.
    """
    random = torch.Generator().manual_seed(0)
    cases = int(labels.max()) + 1
    if cases < 2:
        return labels[:0]
    each = math.ceil(CALIBRATION_SLICES / cases)
    members = [(labels == case).nonzero()[:, 0] for case in range(cases)]
    chosen = [own[torch.randperm(len(own), generator=random)[:each].to(own.device)] for own in members]
    return torch.cat(chosen)


def calibrate(scores: Tensor, labels: Tensor, rate: float) -> tuple[float, float]:
    """Return a threshold that a slice of a new patient exceeds with at most a certain probability, and that rate.

    Slices of one patient are not independent, but patients are exchangeable. The threshold is the conformal one for
    hierarchical data (Lee, Barber and Willett 2023, arXiv:2306.06342): each of K patients has the weight 1 / (K + 1),
    divided among its slices, and the new patient has the rest.

    Args:
        scores: Of slices of K patients compared with the other patients (C,).
        labels: Their patients (C,), numbers from 0 to K - 1.
        rate: Raised to 1 / (K + 1) if lower; the threshold is then the highest score.
    """
    counts = torch.bincount(labels)
    cases = int((counts > 0).sum())
    order = scores.argsort(descending=True)
    exceeding = (1 / (cases + 1) / counts[labels[order]].double()).cumsum(0) + 1 / (cases + 1)
    allowed = int((exceeding <= rate + 1e-9).sum())
    return scores[order[min(allowed, len(order) - 1)]].item(), max(rate, 1 / (cases + 1))


# ---------------------------------------------------------------- distances of whole sets


def k_means(points: Tensor, count: int) -> Tensor:
    """Cluster points (N, D) with 20 iterations of k-means from random points; return centroids (count, D)."""
    initial = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    centroids = points[initial.to(points.device)]
    for _ in range(20):
        cells = nearest_centroid(points, centroids)
        members = [points[cells == cell] for cell in range(count)]
        # An empty cell keeps its centroid.
        centroids = torch.stack([own.mean(0) if len(own) else old for own, old in zip(members, centroids)])
    return centroids


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the index (N,) int64 of the nearest centroid of each point (N, D)."""
    return torch.cdist(points, centroids).argmin(1)


def memorisation_rate(distances: Tensor, reference: Tensor) -> float:
    """Return the share of samples, in [0, 1], closer to a training slice than every held-out slice.

    If samples copy no more than slices of other patients do, 1 / (M + 1) is expected, for independent slices.

    Args:
        distances: Of samples to their nearest training slices, (N,).
        reference: Of held-out slices to theirs, (M,).
    """
    return (distances < reference.min()).double().mean().item()


def data_copying_statistic(samples: Copies, reference: Copies) -> float:
    """Return the statistic C_T of the data-copying test (Meehan et al. 2020, arXiv:2004.05675).

    The standardised Mann-Whitney statistic Z_U of the distances in each of five cells of similar slices, averaged with
    the number of held-out slices in a cell as weight. It is about 0, with a standard deviation of at most 1, if samples
    are as far from the training slices as held-out slices are; far below 0 for copies; far above 0 for samples unlike
    any training slice. Cells with fewer than 20 slices of either set are left out; without any cell left, all slices
    form one.

    Held-out slices are of other patients: an adjacent slice of the same patient is near without being a copy. Slices of
    one patient are not independent, so with few patients a C_T of several units occurs by chance. The baseline shows
    how large.

    Args:
        samples: Of the samples; their distances and cells are used.
        reference: Of held-out slices, from the same search.
    """
    pairs = [
        (samples.distances[samples.cells == cell], reference.distances[reference.cells == cell])
        for cell in range(int(reference.cells.max()) + 1)
    ]
    pairs = [pair for pair in pairs if min(map(len, pair)) >= MIN_CELL_SIZE]
    pairs = pairs or [(samples.distances, reference.distances)]
    return sum(len(b) * mann_whitney_z(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def mann_whitney_z(first: Tensor, second: Tensor) -> float:
    """Return Z_U: the standardised number of pairs of (n,) and (m,) in which the first is larger; ties count half.

    Mann and Whitney 1947, Ann. Math. Stat. 18:50.
    """
    n, m = len(first), len(second)
    differences = first[:, None] - second
    u = (differences > 0).sum().item() + (differences == 0).sum().item() / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def duplicate_rate(
    slices: Tensor, cases: Sequence[Hashable], reference: Tensor, reference_cases: Sequence[Hashable]
) -> float:
    """Return the share of slices that resemble another one more than any two patients of a reference resemble another.

    By the correlation of normalised slices of about 32x16 pixels. 1 if each slice occurs twice; near 0 for slices of
    different patients, less so the fewer the reference has. NaN if the reference has one patient.

    Args:
        slices: (N, 1, H, W), such as samples.
        cases: Their patients (N), each sample one of its own; slices of one patient are not compared.
        reference: (M, 1, H, W), such as held-out slices.
        reference_cases: Their patients (M).
    """
    if len(set(reference_cases)) == 1:
        return math.nan
    most_alike = highest_correlations(reference, reference_cases).max()
    return (highest_correlations(slices, cases) > most_alike).double().mean().item()


def highest_correlations(slices: Tensor, cases: Sequence[Hashable]) -> Tensor:
    """Return the correlations (N,) of slices (N, 1, H, W) with the most similar one of another patient."""
    coarse = torch.cat([build_pyramid(batch).coarse for batch in slices.split(BATCH_SIZE)]).float()
    units = F.normalize(coarse.flatten(1) - coarse.mean((1, 2, 3))[:, None])
    labels = torch.from_numpy(number_groups(cases)).to(slices.device)
    return (units @ units.T).masked_fill(labels[:, None] == labels, -1).amax(1)
