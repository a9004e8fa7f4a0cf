"""What is measured of reconstructions, codes and samples.

Slices are (N, 1, H, W) in [-1, 1], codes any shape of integers in [0, K). What is drawn at random is drawn from fixed
seeds: the same slices give the same figures, and the figures of two runs can be compared.

Most figures of samples mean little alone, because they depend on how many slices there are and on how much patients
differ: read each beside its floor, the same figure for as many real slices.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

# The scale of slices, not what one batch happens to span: else a figure depends on its batch.
DATA_RANGE = (-1.0, 1.0)
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM, from full resolution to a sixteenth
SMALLEST_SIDE = 16  # pixels, of slices whose samples are measured: the Laplacian pyramid's last level
BATCH = 64  # slices computed at a time
PATCH, PATCHES = 7, 16384  # pixels a side, patches a level
PAIRS = 500  # of slices compared for diversity
CLASSIFIER_UPDATES = 300
STARTS = 3  # of the classifier: from one to another its accuracy changes by up to 0.17
SHIFT = 4  # pixels a copy may be moved by: a code of the default VQ-VAE
CANDIDATES = 8  # training slices compared at full resolution


# ---------------------------------------------------------------- reconstructions


def reconstruction_metrics() -> MetricCollection:
    """SSIM and PSNR of reconstructions against slices: `.update(reconstructions, slices)`, then `.compute()`.

    SSIM: mean over slices, Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004,
    IEEE Trans. Image Process. 13:600, section III.B), at most 1. PSNR in dB, of the squared error over all
    slices. Both clip to [-1, 1] first.
    """
    return MetricCollection(
        {
            "ssim": StructuralSimilarityIndexMeasure(data_range=DATA_RANGE),
            "psnr": PeakSignalNoiseRatio(data_range=DATA_RANGE),
        }
    )


def all_reconstruction_metrics(slice_size: tuple[int, int]) -> MetricCollection:
    """Those of `reconstruction_metrics`, and for slices of 11 pixels a side or more MS-SSIM and MSE.

    MS-SSIM: mean over slices, in [0, 1] (Wang et al. 2003, Proc. 37th Asilomar Conf. 1398), over as many scales
    as fit (`scale_weights`). MSE in the slices' units, [-1, 1]: PSNR = 10 lg(4 / MSE).
    """
    ms_ssim = MultiScaleStructuralSimilarityIndexMeasure(data_range=DATA_RANGE, betas=scale_weights(slice_size))
    single = reconstruction_metrics()
    return MetricCollection(
        {"ssim": single["ssim"], "ms_ssim": ms_ssim, "psnr": single["psnr"], "mse": MeanSquaredError()}
    )


def scale_weights(slice_size: tuple[int, int]) -> tuple[float, ...]:
    """The weights of MS-SSIM's scales, which add up to 1.

    The paper's five scales, each half the one before, need sides of 176 pixels. Smaller slices take the first of
    them, as many as the 11x11 window fits into; their weights are divided by their sum. 256x128 has four scales,
    128x64 three. With one scale MS-SSIM is SSIM.
    """
    side = min(slice_size)
    # torchmetrics asks for (scales - 1)^2 where halving means 2^(scales - 1); at four scales that is more.
    fitting = sum(side // max(2**scale, scale**2) > 10 for scale in range(len(SCALE_WEIGHTS)))
    total = sum(SCALE_WEIGHTS[:fitting])
    return tuple(weight / total for weight in SCALE_WEIGHTS[:fitting])


def to_levels(slices: Tensor) -> Tensor:
    """Slices as uint8, of the 256 levels that real slices have: 0 is -1, 255 is +1."""
    return ((slices.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def quantise(slices: Tensor) -> Tensor:
    """Slices rounded to 256 levels, so that no test can tell samples from real slices by their decimals."""
    return to_levels(slices) / 127.5 - 1


def jpeg2000_bits(slices: Tensor, psnr: float) -> float:
    """Bits a slice that JPEG 2000 (irreversible wavelet, Pillow's OpenJPEG) needs for that PSNR, in dB over all slices.

    All slices are coded for the same quality, which is bisected until their PSNR is met within 0.05 dB. Counted is
    the coded data alone, without headers: what they say is the same for every slice.
    """
    pictures = to_levels(slices)[:, 0].cpu().numpy()
    low, high = max(psnr - 6, 0.1), psnr + 6
    while high - low > 0.05:
        middle = (low + high) / 2
        reached = code_jpeg2000(pictures, middle)[1]
        low, high = (middle, high) if reached < psnr else (low, middle)
    return code_jpeg2000(pictures, high)[0]


def code_jpeg2000(pictures: np.ndarray, quality: float) -> tuple[float, float]:
    """Mean bits of pictures (N, H, W) uint8 coded for a quality in dB, and the PSNR reached over all of them, in dB."""
    bits, errors = 0, 0.0
    for picture in pictures:
        stream = io.BytesIO()
        how = {"irreversible": True, "quality_mode": "dB", "quality_layers": [quality], "no_jp2": True}
        Image.fromarray(picture).save(stream, format="JPEG2000", **how)
        code = stream.getvalue()
        bits += 8 * (len(code) - code.index(b"\xff\x93") - 4)  # between the start of data and the end of codestream
        errors += np.square(np.asarray(Image.open(stream), np.float64) - picture).mean()
    return bits / len(pictures), 10 * math.log10(255**2 / max(errors / len(pictures), 1e-9))


# ---------------------------------------------------------------- codes


def code_counts(codes: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs: (size,) int64."""
    return torch.bincount(codes.flatten(), minlength=size)


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Share of codes used at least once, in [0, 1], and perplexity exp(entropy), in [1, K], of counts (K,).

    Raises ValueError where nothing was counted.
    """
    if counts.sum() == 0:
        raise ValueError("no codes were counted")
    counts = counts.cpu().double()
    p = counts / counts.sum()
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def bits_per_pixel(grid: tuple[int, int], codes: int, slice_size: tuple[int, int]) -> float:
    """Bits of a code grid, stored as plain numbers in [0, codes), for each pixel of its slice: 9/16 for 512 and 4x4."""
    return math.prod(grid) * math.log2(codes) / math.prod(slice_size)


# ---------------------------------------------------------------- samples: patches


def sliced_wasserstein(slices: Tensor, reference: Tensor) -> dict[str, float]:
    """Sliced Wasserstein distance between the patches of two sets of slices, for each level of a Laplacian pyramid.

    Keys are the levels' sizes: the first, of full resolution, compares fine texture, the last broad structure. 0 for
    equal sets, no upper end; the unit is the standard deviation of the reference's patches. Karras et al. 2018,
    arXiv:1710.10196, section 5: 7x7 patches, 512 random projections, of each the mean distance between the sorted
    values; the last level has 16 pixels or a few more. Here 16384 patches are drawn of a level whatever the number of
    slices, and both sets are scaled by the reference's mean and standard deviation: scaled by its own, as in the
    paper, a set of too smooth slices would look like the reference.
    """
    directions = F.normalize(torch.randn(PATCH**2, 512, generator=torch.Generator().manual_seed(0)), dim=0)
    distances = {}
    for levels in zip(laplacian_pyramid(slices), laplacian_pyramid(reference)):
        patches = [draw_patches(level) for level in levels]
        std, mean = torch.std_mean(patches[1])
        apart = []
        for some in directions.to(slices.device).split(64, 1):
            projections = [((of - mean) / std @ some).sort(0).values for of in patches]
            apart.append((projections[0] - projections[1]).abs().mean())
        distances["x".join(map(str, levels[0].shape[2:]))] = torch.stack(apart).mean().item()
    return distances


def laplacian_pyramid(slices: Tensor) -> list[Tensor]:
    """Slices as details of each level and a last one of broad structure; enlarged and added they are the slices.

    Burt and Adelson 1983, IEEE Trans. Commun. 31:532; halved while both sides keep 16 pixels.
    """
    line = slices.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line)[None, None]
    levels = []
    while min(slices.shape[2:]) >= 32:
        smaller = F.conv2d(F.pad(slices, (2, 2, 2, 2), mode="reflect"), kernel, stride=2)
        levels.append(slices - enlarge(smaller, slices.shape, kernel))
        slices = smaller
    return [*levels, slices]


def enlarge(slices: Tensor, shape: torch.Size, kernel: Tensor) -> Tensor:
    """Slices of every second pixel to slices of that shape: zeros between, then four times the kernel."""
    spread = slices.new_zeros(shape)
    spread[:, :, ::2, ::2] = slices
    return F.conv2d(F.pad(spread, (2, 2, 2, 2), mode="reflect"), 4 * kernel)


def draw_patches(slices: Tensor) -> Tensor:
    """Patches (PATCHES, PATCH * PATCH) of slices and places drawn at random."""
    random = torch.Generator().manual_seed(1)
    ends = (len(slices), *(side - PATCH + 1 for side in slices.shape[2:]))
    n, y, x = (torch.randint(end, (PATCHES, 1, 1), generator=random).to(slices.device) for end in ends)
    within = torch.arange(PATCH, device=slices.device)
    return slices[n, 0, y + within[:, None], x + within].flatten(1)


# ---------------------------------------------------------------- samples: features


class RandomFeatures:
    """Slices to 64 features (N, 64): what four convolutions of stride 2 with random weights make of them.

    The weights are drawn once for all from a fixed seed (He et al. 2015, arXiv:1502.01852); features are mean and
    standard deviation over the slice of each of the last layer's 32 channels, in units that give each feature mean 0
    and standard deviation 1 over `training`, real training slices. Features of 64 dimensions from a random network
    rank sets of images that are no photographs more sensibly than those of a network trained on photographs: Naeem et
    al. 2020, arXiv:2002.09797.
    """

    CHANNELS = (1, 16, 32, 64, 32)

    def __init__(self, training: Tensor):
        random = torch.Generator().manual_seed(0)
        self.weights = [
            (torch.randn(after, before, 3, 3, generator=random) * math.sqrt(2 / (9 * before))).to(training.device)
            for before, after in zip(self.CHANNELS, self.CHANNELS[1:])
        ]
        self.mean, self.std = 0.0, 1.0
        features = self(training)
        self.std, self.mean = features.std(0).clamp(min=1e-6), features.mean(0)

    def __call__(self, slices: Tensor) -> Tensor:
        features = torch.cat([self.raw(batch) for batch in slices.split(BATCH)])
        return (features - self.mean) / self.std

    def raw(self, x: Tensor) -> Tensor:
        *hidden, last = self.weights
        for weight in hidden:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
        x = F.conv2d(x, last, stride=2, padding=1)  # no activation: a channel must not be dead
        return torch.cat([x.mean((2, 3)), x.flatten(2).std(2, correction=0)], 1)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features (N, D) and (M, D): 0 for equal ones.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, arXiv:1706.08500, eq. 6, there of another
    network's features: figures can be compared only with others of this function, of as many slices.
    """
    features, reference = features.double(), reference.double()
    c1, c2 = features.T.cov(), reference.T.cov()
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2).
    trace = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    means = (features.mean(0) - reference.mean(0)).square().sum()
    return (means + c1.trace() + c2.trace() - 2 * trace).clamp(min=0).item()


def density_and_coverage(
    features: Tensor, reference: Tensor, cases: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Density and coverage of features (N, D) in a reference (M, D), Naeem et al. 2020, arXiv:2002.09797,
    section 3.

    About each reference slice lies a ball that reaches to its 5th nearest neighbour in the reference. Coverage, in
    [0, 1]: the share of balls that hold one of the features, low where kinds of slices are missing. Density, from 0
    to above 1: how many balls a feature lies in, divided by 5, low where slices are unlike real ones; smooth slices
    crowd in the middle and may have more than 1.

    `cases` (M) are the reference's patients. Neighbours of a slice are then those of other cases: the next slice and
    the next week of one patient are nearer than any other patient, so that balls between them would hold no slice of
    anyone else, real or not. The paper's definition, for independent slices, is used without them or with one case.
    """
    apart = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist")
    names = {name: number for number, name in enumerate(dict.fromkeys(cases or ()))}
    of = torch.tensor([names[case] for case in cases] if len(names) > 1 else range(len(reference)), device=apart.device)
    same = of[:, None] == of
    neighbours = min(5, int((~same).sum(1).min()))
    radii = apart.masked_fill(same, torch.inf).kthvalue(neighbours, 1).values
    inside = torch.cdist(reference, features, compute_mode="donot_use_mm_for_euclid_dist") < radii[:, None]
    return inside.sum().item() / (neighbours * len(features)), inside.any(1).double().mean().item()


def ms_ssim_diversity(slices: Tensor) -> float:
    """1 - the mean MS-SSIM of 500 pairs of different slices, in [0, 1]: 0 where all are the same.

    Odena et al. 2017, arXiv:1610.09585, who give the mean itself. Scales as in `scale_weights`.
    """
    random = torch.Generator().manual_seed(0)
    first = torch.randint(len(slices), (PAIRS,), generator=random)
    second = (first + torch.randint(1, len(slices), (PAIRS,), generator=random)) % len(slices)
    how = {"data_range": DATA_RANGE, "betas": scale_weights(slices.shape[2:]), "reduction": "sum"}
    pairs = zip(first.to(slices.device).split(BATCH), second.to(slices.device).split(BATCH))
    total = sum(multiscale_structural_similarity_index_measure(slices[a], slices[b], **how) for a, b in pairs)
    return 1 - total.item() / PAIRS


# ---------------------------------------------------------------- samples: two-sample test


def two_sample_test(
    slices: Tensor, cases: Sequence[Hashable], reference: Tensor, reference_cases: Sequence[Hashable]
) -> tuple[float, int]:
    """How many slices a network tells right, and of how many: half where both sets are alike, all where none is.

    Classifier two-sample test, Lopez-Paz and Oquab 2017, arXiv:1610.06545, section 3. Each set is halved by case
    (`halves`), so that no patient can be recognised. A small network learns to tell one half of both sets apart and is
    tested on the other half, as many slices of each set; then the halves change places. What is told right is the
    mean of STARTS networks, which differ in their first weights and the order of slices; how far they are apart is not
    in the interval of `wilson_interval`.
    """
    own, other = (torch.from_numpy(halves(of)).to(slices.device) for of in (cases, reference_cases))
    right = trials = 0
    for half in (False, True):
        random = torch.Generator().manual_seed(2)
        tested = [slices[own != half], reference[other != half]]
        count = min(map(len, tested))
        drawn = [those[torch.randperm(len(those), generator=random)[:count].to(slices.device)] for those in tested]
        for start in range(STARTS):
            network = train_classifier(slices[own == half], reference[other == half], start)
            for number, those in enumerate(drawn):
                with torch.no_grad():
                    taken = torch.cat([network(batch) for batch in those.split(BATCH)]) > 0
                right += (taken == (number == 1)).sum().item()
        trials += 2 * count
    return right / STARTS, trials


def halves(groups: Sequence[Hashable]) -> np.ndarray:
    """Which half (N,) bool each of N slices is in: whole groups, the largest first, always to the smaller half.

    With one group alone its quarters, in order, take turns: neighbouring slices then stay together but for three
    places. Slices are expected in the order of the volume.
    """
    sizes = Counter(groups)
    if len(sizes) == 1:
        return np.arange(len(groups)) * 4 // len(groups) % 2 == 1
    half_of, filled = {}, [0, 0]
    for group, size in sizes.most_common():
        half_of[group] = filled[1] < filled[0]
        filled[half_of[group]] += size
    return np.array([half_of[group] for group in groups])


def train_classifier(first: Tensor, second: Tensor, seed: int, batch_size: int = 32) -> nn.Module:
    """A small convolutional network that gives slices (N, 1, H, W) of the second set logits (N, 1) above 0."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = classifier(min(first.shape[2:])).to(first.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters())
    wanted = torch.arange(2, device=first.device).repeat_interleave(batch_size // 2)[:, None].float()
    for update in range(CLASSIFIER_UPDATES):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (update + 1) / 20, 1 - update / CLASSIFIER_UPDATES)
        batch = [
            of[torch.randint(len(of), (batch_size // 2,), generator=random).to(of.device)] for of in (first, second)
        ]
        moved = torch.randint(-4, 5, (2,), generator=random).tolist()
        logits = network(torch.cat(batch).roll(moved, (2, 3)).contiguous(memory_format=torch.channels_last))
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits, wanted).backward()
        optimiser.step()
    return network.eval()


def classifier(side: int) -> nn.Sequential:
    """Convolutions of stride 2 until the smaller side, of `side` pixels, has 4; then a mean over the slice."""
    widths = (1, 16, 32, 64, 64, 64)[: max(2, math.ceil(math.log2(side / 4)) + 1)]
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))


def wilson_interval(right: float, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22:209), for independent trials.

    Slices of one patient are less than independent: for few patients it is too narrow.
    """
    z = 1.959964
    share, denominator = right / trials, 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return middle - half, middle + half


# ---------------------------------------------------------------- samples: copying


class Nearest(NamedTuple):
    """What was found nearest to each of N slices."""

    distances: Tensor  # (N,): root of the mean squared difference from the nearest training slice, in [0, 2]
    indices: Tensor  # (N,) int64: which training slice that is
    cells: Tensor  # (N,) int64: which cell of similar training slices the slice is in


def nearest(
    slices: Tensor, training: Callable[[Sequence[int]], Tensor], count: int, mirrored: int | None = None
) -> Nearest:
    """The training slice nearest to each slice (N, 1, H, W), which may be moved by SHIFT pixels each way and mirrored.

    `training(indices)` gives training slices (n, 1, H, W), `count` is their number; `mirrored` is the axis, 2 or 3,
    along which training mirrored them. The SHIFT outer pixels of training slices are left out, so that every shift
    compares as many pixels.

    All training slices are searched for all shifts, but with pixels averaged to about 512 a slice; then the nearest
    CANDIDATES of them are compared at full resolution, and the distance of the best is exact. A copy is always found,
    because its averages are equal too. Otherwise another training slice may be nearer still, if it is nearer in fine
    detail and farther in the averages: the same chance for all slices that are searched for in this way.
    """
    batches = (range(start, min(start + BATCH, count)) for start in range(0, count, BATCH))
    averages = torch.cat([averaged(centre(training(batch).to(slices.device))) for batch in batches])
    apart = torch.full((len(slices), count), torch.inf, device=slices.device)
    for view in views(slices, mirrored):
        torch.minimum(apart, squared_distances(averaged(view), averages), out=apart)
    candidates = apart.topk(min(CANDIDATES, count), largest=False).indices
    distances, indices = [], []
    for one, those in zip(slices.split(1), candidates):
        view, other, index = closest_views(one, training(those.tolist()).to(slices.device), mirrored)
        distances.append((view - other).square().mean().sqrt())
        indices.append(those[index])
    centres = k_means(averages, min(5, count))
    return Nearest(torch.stack(distances), torch.stack(indices), nearest_centre(averaged(centre(slices)), centres))


def centre(slices: Tensor) -> Tensor:
    """Slices without the SHIFT outer pixels at each side."""
    return slices[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]


def views(slices: Tensor, mirrored: int | None) -> Iterator[Tensor]:
    """Slices, then mirrored slices, moved by each shift and cut to the size of `centre`; the unmoved come first."""
    shifts = sorted(product(range(-SHIFT, SHIFT + 1), repeat=2), key=lambda shift: abs(shift[0]) + abs(shift[1]))
    height, width = (side - 2 * SHIFT for side in slices.shape[2:])
    for of in (slices,) if mirrored is None else (slices, slices.flip(mirrored)):
        for y, x in shifts:
            yield of[:, :, SHIFT + y : SHIFT + y + height, SHIFT + x : SHIFT + x + width]


def averaged(slices: Tensor) -> Tensor:
    """Slices as about 512 numbers (N, D): means of squares of pixels."""
    side = max(1, round(math.sqrt(math.prod(slices.shape[2:]) / 512)))
    return F.avg_pool2d(slices, side).flatten(1)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M) of vectors (N, D) and (M, D) by a matrix product, exact but for rounding."""
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def closest_views(one: Tensor, training: Tensor, mirrored: int | None) -> tuple[Tensor, Tensor, int]:
    """The view of a slice (1, 1, H, W) and the `centre` of one of n training slices that are nearest, and which one."""
    every, centres = torch.cat(list(views(one, mirrored))), centre(training)
    view, index = divmod(squared_distances(every.flatten(1), centres.flatten(1)).argmin().item(), len(training))
    return every[view], centres[index], index


def k_means(points: Tensor, count: int) -> Tensor:
    """Centres (count, D) of cells of points (N, D), after 20 rounds from points drawn at random."""
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    centres = points[drawn.to(points.device)]
    for _ in range(20):
        of = nearest_centre(points, centres)
        # An empty cell keeps its centre.
        centres = torch.stack([points[of == k].mean(0) if (of == k).any() else old for k, old in enumerate(centres)])
    return centres


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre (N,) int64 of each of N points."""
    return torch.cdist(points, centres).argmin(1)


def share_nearer(distances: Tensor, reference: Tensor) -> float:
    """The share of samples, in [0, 1], nearer to a training slice than any of M held-out slices is.

    `distances` are those of samples from their nearest training slices, `reference` those of held-out slices. Where
    samples copy no more than slices of other patients do, 1 / (M + 1) of them is to be expected.
    """
    return (distances < reference.min()).double().mean().item()


def copying_statistic(samples: Nearest, reference: Nearest) -> float:
    """How much farther from training slices samples are than held-out slices: far below 0 where they are copies.

    The statistic C_T of Meehan et al. 2020, arXiv:2004.05675: in each of five cells of similar slices, the
    standardised rank sum Z_U of distances, then their mean, weighted by the held-out slices in each cell. About 0 where
    both are as far, with a standard deviation of at most 1; far above 0 where samples are unlike any training slice.
    Cells with fewer than 20 of either are left out; where none is left all slices are one cell.

    Held-out slices are other patients', as copying is confounded with patients otherwise: the next slice of the same
    patient is near without being a copy. Slices of one patient are less than independent, so with few patients
    statistics of several units come about by chance; the floor shows how large.
    """
    members = [(samples.cells == cell, reference.cells == cell) for cell in range(int(reference.cells.max()) + 1)]
    members = [pair for pair in members if min(pair[0].sum(), pair[1].sum()) >= 20] or [(slice(None), slice(None))]
    pairs = [(samples.distances[own], reference.distances[other]) for own, other in members]
    return sum(len(b) * rank_statistic(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def rank_statistic(first: Tensor, second: Tensor) -> float:
    """Z_U: in how many pairs of the first (n,) and the second (m,) the first is larger, standardised; ties count half.

    Mann and Whitney 1947, Ann. Math. Stat. 18:50.
    """
    n, m = len(first), len(second)
    above = first[:, None] - second
    u = (above > 0).sum().item() + (above == 0).sum().item() / 2
    return (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
