"""Metrics of reconstructions, codes and samples: tensors in, numbers out.

Slices are (N, 1, H, W) in [-1, 1]; codes are integers in [0, K), of any shape. Everything random uses fixed seeds: the
same slices give the same values, and two runs can be compared.

Most metrics of samples depend on the number of slices and on how much the patients differ. Compare each with its
baseline, the same metric of as many real slices.
"""

import io
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

DATA_RANGE = (-1.0, 1.0)  # fixed: by default torchmetrics uses the range of each batch
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from full resolution to a sixteenth
MIN_SIDE = 16  # pixels of the coarsest level of the Laplacian pyramid; smaller slices cannot be evaluated
BATCH_SIZE = 64  # slices per forward pass
RESOLUTIONS = (3, 4, 5, 6)  # of JPEG 2000 that are tried: Pillow's default of 6 can need 5 % more bits than 4
TRIED_SLICES = 20  # on which they are compared
PATCH_SIZE, PATCHES = 7, 16384  # side in pixels; patches per level
PAIRS = 500  # pairs of slices compared for diversity


# ---------------------------------------------------------------- reconstructions


def reconstruction_metrics() -> MetricCollection:
    """Return SSIM and PSNR of reconstructions: `.update(reconstructions, slices)`, then `.compute()`.

    SSIM is the mean over slices, at most 1, with a Gaussian window of 11x11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03
    (Wang et al. 2004, IEEE Trans. Image Process. 13:600, section III.B). PSNR is in dB, from the squared error over all
    slices. Both clip to [-1, 1] first.
    """
    return MetricCollection(
        {
            "ssim": StructuralSimilarityIndexMeasure(sigma=1.5, data_range=DATA_RANGE, k1=0.01, k2=0.03),
            "psnr": PeakSignalNoiseRatio(data_range=DATA_RANGE),
        }
    )


def all_reconstruction_metrics(slice_size: Sequence[int]) -> MetricCollection:
    """Return all metrics of reconstructions, used like `reconstruction_metrics`.

    Those of `reconstruction_metrics`, and

    ssim_unit_range  SSIM in another convention, see `UnitRangeSSIM`.
    ms_ssim          The mean over slices, in [0, 1] (Wang et al. 2003, Proc. 37th Asilomar Conf. 1398), with the scales
                     of `ms_ssim_weights`.
    psnr_per_slice   The mean of the slices' PSNR, in dB; `psnr` is that of the squared error over all slices.
    mse              In the units of slices: PSNR = 10 lg(4 / MSE).

    Args:
        slice_size: (H, W) in pixels, each at least 11.
    """
    ms_ssim = MultiScaleStructuralSimilarityIndexMeasure(data_range=DATA_RANGE, betas=ms_ssim_weights(slice_size))
    basic = reconstruction_metrics()
    return MetricCollection(
        {
            "ssim": basic["ssim"],
            "ssim_unit_range": UnitRangeSSIM(),
            "ms_ssim": ms_ssim,
            "psnr": basic["psnr"],
            "psnr_per_slice": MeanPSNR(),
            "mse": MeanSquaredError(),
        }
    )


class MeanOverSlices(Metric):
    """The mean over slices of what `per_slice` returns, clipped to [-1, 1] first."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, slices: Tensor, reference: Tensor) -> None:
        """Add slices and references, (N, 1, H, W) in [-1, 1]."""
        self.total += self.per_slice(slices.double().clamp(-1, 1), reference.double().clamp(-1, 1)).sum()
        self.count += len(slices)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count

    def per_slice(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the metric of each pair of slices, (N,)."""
        raise NotImplementedError


class MeanPSNR(MeanOverSlices):
    """Mean of the slices' PSNR, in dB."""

    def per_slice(self, x: Tensor, y: Tensor) -> Tensor:
        return 10 * (4 / (x - y).square().mean((1, 2, 3)).clamp(min=1e-12)).log10()


class UnitRangeSSIM(MeanOverSlices):
    """Mean SSIM in the convention of most published HipMRI figures: values in [0, 1], scikit-image's default.

    Uniform window of 7x7 pixels with the sample covariance, K1 = 0.01, K2 = 0.03, without the 3 outer pixels at each
    side (`skimage.metrics.structural_similarity` with data_range 1). SSIM is not invariant to an offset: the same
    pictures have a higher SSIM with values in [0, 1] than in [-1, 1].
    """

    def per_slice(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (x + 1) / 2, (y + 1) / 2
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = (
            F.avg_pool2d(part, 7, stride=1) for part in (x, y, x * x, y * y, x * y)
        )
        sample = 49 / 48  # from the mean over the window to the sample covariance
        var_x, var_y = sample * (mean_xx - mean_x**2), sample * (mean_yy - mean_y**2)
        covariance = sample * (mean_xy - mean_x * mean_y)
        c1, c2 = 0.01**2, 0.03**2
        ssim = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        return (ssim / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def ms_ssim_weights(slice_size: Sequence[int]) -> tuple[float, ...]:
    """Return the weights of MS-SSIM's scales, which sum to 1.

    The five scales of the paper, each half the one before, need sides of 176 pixels. Smaller slices use the first of
    them, as many as the 11x11 window fits into, with rescaled weights: four for 256x128, three for 128x64. With one
    scale MS-SSIM equals SSIM.
    """
    side = min(slice_size)
    # torchmetrics requires side / (scales - 1)^2 > 10 where halving needs 2^(scales - 1): stricter at four scales.
    scales = sum(side // max(2**scale, scale**2) > 10 for scale in range(len(MS_SSIM_WEIGHTS)))
    total = sum(MS_SSIM_WEIGHTS[:scales])
    return tuple(weight / total for weight in MS_SSIM_WEIGHTS[:scales])


def to_grey_levels(slices: Tensor) -> Tensor:
    """Return slices as uint8, the 256 grey levels of real slices: 0 is -1, 255 is +1."""
    return ((slices.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def round_to_grey_levels(slices: Tensor) -> Tensor:
    """Round slices to the 256 grey levels of real ones, so that no metric can separate them by their decimals."""
    return to_grey_levels(slices) / 127.5 - 1


def jpeg2000_bits_per_slice(slices: Tensor, psnr: float) -> float:
    """Return the mean bits per slice that JPEG 2000 needs to reach a PSNR.

    Uses the irreversible wavelet of OpenJPEG (Pillow), the number of resolutions that needs fewest bits, and one
    quality for all slices, found to 0.02 dB. Headers, which are the same for every slice, are not counted.

    Args:
        slices: (N, 1, H, W) in [-1, 1].
        psnr: In dB, over all slices.
    """
    images = to_grey_levels(slices)[:, 0].cpu().numpy()
    some = images[:: math.ceil(len(images) / TRIED_SLICES)]
    best = min(RESOLUTIONS, key=lambda resolutions: bits_at_psnr(some, psnr, resolutions))
    return bits_at_psnr(images, psnr, best)


def bits_at_psnr(images: np.ndarray, psnr: float, resolutions: int) -> float:
    """Return the mean bits that JPEG 2000 needs for images (N, H, W) uint8 to reach a PSNR in dB."""
    quality = psnr
    for _ in range(10):
        bits, reached = encode_jpeg2000(images, quality, resolutions)
        if abs(reached - psnr) < 0.02:
            break
        quality = max(0.1, quality + psnr - reached)  # both are in dB, and nearly parallel
    return bits


def encode_jpeg2000(images: np.ndarray, quality: float, resolutions: int) -> tuple[float, float]:
    """Encode images (N, H, W) uint8 at a quality in dB; return the mean bits per image and the PSNR over all, in dB."""
    bits, errors = 0, 0.0
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(
            stream,
            format="JPEG2000",
            irreversible=True,
            quality_mode="dB",
            quality_layers=[quality],
            num_resolutions=resolutions,
            no_jp2=True,
        )
        encoded = stream.getvalue()
        bits += 8 * (len(encoded) - encoded.index(b"\xff\x93") - 4)  # from start of data (SOD) to end of codestream
        errors += np.square(np.asarray(Image.open(stream), np.float64) - image).mean()
    return bits / len(images), 10 * math.log10(255**2 / max(errors / len(images), 1e-9))


# ---------------------------------------------------------------- codes


def code_counts(codes: Tensor, size: int) -> Tensor:
    """Return how often each of `size` codes occurs: (size,) int64."""
    return torch.bincount(codes.flatten(), minlength=size)


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Return the share of codes used and the perplexity of the codes.

    Args:
        counts: Occurrences of each code, (K,).

    Returns:
        The share of codes used at least once, in [0, 1], and exp(entropy), in [1, K].

    Raises:
        ValueError: All counts are 0.
    """
    if counts.sum() == 0:
        raise ValueError("no codes were counted")
    counts = counts.cpu().double()
    p = counts / counts.sum()
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def bits_per_pixel(grid: Sequence[int], codebook_size: int, slice_size: Sequence[int]) -> float:
    """Return the bits of a code grid (h, w), stored as plain indices, per pixel of its slice (H, W)."""
    return math.prod(grid) * math.log2(codebook_size) / math.prod(slice_size)


# ---------------------------------------------------------------- samples: patches


def sliced_wasserstein(slices: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the sliced Wasserstein distance between the patches of two sets of slices, for each pyramid level.

    Karras et al. 2018, arXiv:1710.10196, section 5: 7x7 patches of a Laplacian pyramid, 512 random projections, the
    mean distance between the sorted projections. Departs from it in two ways. Each level has 16384 patches, for any
    number of slices. Both sets are standardised by the statistics of the reference: by its own, a set of over-smooth
    slices would look like the reference.

    Args:
        slices: (N, 1, H, W).
        reference: (M, 1, H, W).

    Returns:
        Distances by the level's size, from full resolution ("256x128", fine texture) to 16 pixels or a few more (broad
        structure): 0 for equal sets, in standard deviations of the reference's patches.
    """
    directions = F.normalize(torch.randn(PATCH_SIZE**2, 512, generator=torch.Generator().manual_seed(0)), dim=0)
    distances = {}
    for levels in zip(laplacian_pyramid(slices), laplacian_pyramid(reference)):
        patches = [sample_patches(level) for level in levels]
        std, mean = torch.std_mean(patches[1])
        chunk_means = []
        for chunk in directions.to(slices.device).split(64, 1):
            projections = [((own - mean) / std @ chunk).sort(0).values for own in patches]
            chunk_means.append((projections[0] - projections[1]).abs().mean())
        distances["x".join(map(str, levels[0].shape[2:]))] = torch.stack(chunk_means).mean().item()
    return distances


def laplacian_pyramid(slices: Tensor) -> list[Tensor]:
    """Decompose slices into band-pass levels and a low-pass one; upsampled and added they are the slices again.

    Burt and Adelson 1983, IEEE Trans. Commun. 31:532. Halves while both sides keep MIN_SIDE pixels.
    """
    line = slices.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(line, line)[None, None]
    levels = []
    while min(slices.shape[2:]) >= 2 * MIN_SIDE:
        smaller = F.conv2d(F.pad(slices, (2, 2, 2, 2), mode="reflect"), kernel, stride=2)
        levels.append(slices - upsample(smaller, slices.shape, kernel))
        slices = smaller
    return [*levels, slices]


def upsample(slices: Tensor, shape: torch.Size, kernel: Tensor) -> Tensor:
    """Upsample slices to twice the resolution, of that shape: insert zeros, then filter with four times the kernel."""
    zero_filled = slices.new_zeros(shape)
    zero_filled[:, :, ::2, ::2] = slices
    return F.conv2d(F.pad(zero_filled, (2, 2, 2, 2), mode="reflect"), 4 * kernel)


def sample_patches(slices: Tensor) -> Tensor:
    """Return patches (PATCHES, PATCH_SIZE^2) at random positions of random slices (N, 1, H, W)."""
    random = torch.Generator().manual_seed(1)
    ends = (len(slices), *(side - PATCH_SIZE + 1 for side in slices.shape[2:]))
    n, y, x = (torch.randint(end, (PATCHES, 1, 1), generator=random).to(slices.device) for end in ends)
    offsets = torch.arange(PATCH_SIZE, device=slices.device)
    return slices[n, 0, y + offsets[:, None], x + offsets].flatten(1)


# ---------------------------------------------------------------- samples: random features


class RandomFeatures:
    """Map slices (N, 1, H, W) to 64 features (N, 64) of a fixed random network.

    Four convolutions of stride 2 with random weights (He et al. 2015, arXiv:1502.01852). Features are the mean and the
    standard deviation over the slice of each of the 32 output channels, standardised over training slices. For images
    that are no photographs, 64 random features rank sets of images better than features of a network trained on
    photographs (Naeem et al. 2020, arXiv:2002.09797).
    """

    CHANNELS = (1, 16, 32, 64, 32)

    def __init__(self, training: Tensor):
        """Draw the weights, and standardise over `training` (N, 1, H, W), real training slices."""
        random = torch.Generator().manual_seed(0)
        self.weights = [
            (torch.randn(outputs, inputs, 3, 3, generator=random) * math.sqrt(2 / (9 * inputs))).to(training.device)
            for inputs, outputs in zip(self.CHANNELS, self.CHANNELS[1:])
        ]
        features = self.extract(training)
        self.std, self.mean = features.std(0).clamp(min=1e-6), features.mean(0)

    def __call__(self, slices: Tensor) -> Tensor:
        return (self.extract(slices) - self.mean) / self.std

    def extract(self, slices: Tensor) -> Tensor:
        """Return features (N, 64) before standardisation."""
        return torch.cat([self.extract_batch(batch) for batch in slices.split(BATCH_SIZE)])

    def extract_batch(self, x: Tensor) -> Tensor:
        """Run the network on one batch (n, 1, H, W)."""
        *hidden, last = self.weights
        for weight in hidden:
            x = F.leaky_relu(F.conv2d(x, weight, stride=2, padding=1), 0.2)
        x = F.conv2d(x, last, stride=2, padding=1)  # no activation: no channel can be dead
        return torch.cat([x.mean((2, 3)), x.flatten(2).std(2, correction=0)], 1)


def random_feature_frechet(features: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of random features; 0 for equal moments.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, arXiv:1706.08500, eq. 6. This is not FID, whose
    features come from an Inception network. Values are comparable only for the same features and numbers of slices.

    Args:
        features: (N, D), of `RandomFeatures`.
        reference: (M, D).
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
    """Return density and coverage (Naeem et al. 2020, arXiv:2002.09797, section 3), with k = 5.

    The neighbourhood of a reference slice is a ball that reaches to its k-th nearest neighbour in the reference.
    Departs from the paper, which assumes independent slices, where cases are given: neighbours are then slices of other
    patients. The adjacent slice and the next week of the same patient are so close that balls between them would
    contain no slice of anyone else, real or not.

    Args:
        features: Of the samples, (N, D).
        reference: Features of real slices, (M, D).
        cases: The patients of the reference (M); None, or one patient only, for the paper's definition.

    Returns:
        Density, the mean number of balls that a sample lies in, divided by k, from 0 to above 1. It is low where
        samples are unlike real slices; smooth slices crowd in the middle and can exceed 1. Coverage, the share of balls
        that contain a sample, in [0, 1]. It is low where kinds of slices are missing.
    """
    distances = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist")
    if cases is None or len(set(cases)) < 2:
        cases = range(len(reference))
    patients = torch.from_numpy(number_groups(cases)).to(distances.device)
    same_patient = patients[:, None] == patients
    k = min(5, int((~same_patient).sum(1).min()))
    radii = distances.masked_fill(same_patient, torch.inf).kthvalue(k, 1).values
    inside = torch.cdist(reference, features, compute_mode="donot_use_mm_for_euclid_dist") < radii[:, None]
    return inside.sum().item() / (k * len(features)), inside.any(1).double().mean().item()


def ms_ssim_diversity(slices: Tensor) -> float:
    """Return 1 minus the mean MS-SSIM of 500 pairs of different slices, in [0, 1]; 0 if all are equal.

    Odena et al. 2017, arXiv:1610.09585, who report the mean itself. Scales as in `ms_ssim_weights`.
    """
    random = torch.Generator().manual_seed(0)
    first = torch.randint(len(slices), (PAIRS,), generator=random)
    second = (first + torch.randint(1, len(slices), (PAIRS,), generator=random)) % len(slices)
    weights, total = ms_ssim_weights(slices.shape[2:]), slices.new_zeros(())
    for a, b in zip(first.to(slices.device).split(BATCH_SIZE), second.to(slices.device).split(BATCH_SIZE)):
        total += multiscale_structural_similarity_index_measure(
            slices[a], slices[b], data_range=DATA_RANGE, betas=weights, reduction="sum"
        )
    return 1 - total.item() / PAIRS


# ---------------------------------------------------------------- patients


def number_groups(groups: Sequence[Hashable]) -> np.ndarray:
    """Number groups, such as patients, from 0 in the order in which they first occur; return (N,) int64."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def evenly_spread(count: int, size: int) -> np.ndarray:
    """Return `count` indices evenly spread over [0, size), its ends included if there are two or more."""
    return np.linspace(0, size - 1, count).round().astype(int)


def two_fold_split(groups: Sequence[Hashable]) -> np.ndarray:
    """Split N slices into two folds (N,) bool by group: the largest group first, each to the smaller fold.

    A single group is cut into quarters, in order, which alternate between the folds. Slices in the order of the volume
    then have their neighbours in the same fold, except in three places. Fewer than four alternate.
    """
    sizes = Counter(groups)
    if len(sizes) == 1:
        return np.arange(len(groups)) * 4 // max(4, len(groups)) % 2 == 1
    fold_of, fold_sizes = {}, [0, 0]
    for group, size in sizes.most_common():
        fold_of[group] = fold_sizes[1] < fold_sizes[0]
        fold_sizes[fold_of[group]] += size
    return np.array([fold_of[group] for group in groups])
