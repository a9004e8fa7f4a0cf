"""Classifier two-sample test: can samples be told from real slices?

Lopez-Paz and Oquab 2017, arXiv:1610.06545, section 3. A linear classifier on fixed features of single slices learns
from one fold of the samples and from further real slices, and is tested on samples and patients that it has not seen.
From so few patients a small CNN learns less. Everything random uses fixed seeds: the same slices give the same values.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import BATCH_SIZE, number_groups, to_grey_levels, two_fold_split

RIDGE = 2.0  # penalty of the classifier's weights, for standardised features
MAX_DEVIATION = 3.0  # standard deviations to which features are clamped, so that no few slices dominate
PERMUTATIONS = 1999
DRAWS = 2000  # of the bootstrap of patients


class TwoSampleTest(NamedTuple):
    """Result of a classifier two-sample test."""

    accuracy: float  # of unseen slices, the mean of both sets' shares, in [0, 1]: 0.5 is chance level, 1 is separable
    interval: tuple[float, float]  # 95 % interval of the accuracy, by a bootstrap of patients
    p_value: float  # in (0, 1], of so large a difference between patients of one kind


def c2st(
    slices: Tensor,
    cases: Sequence[Hashable],
    reference: Tensor,
    reference_cases: Sequence[Hashable],
    examples: Tensor,
    example_cases: Sequence[Hashable],
) -> TwoSampleTest:
    """Test whether slices can be told from those of a reference.

    Each of two classifiers learns to tell one fold of the slices (`two_fold_split`) from the examples, and is tested on
    the other fold and on the whole reference. Their p-values depend on each other, because what sets one fold apart by
    chance is learned by one classifier and tested by the other. The result is therefore twice the smaller one
    (Bonferroni); a test of both folds' scores together called 8 % of equal sets different at a level of 5 %.

    Args:
        slices: (N, 1, H, W) in [-1, 1], such as samples; sides of at least 16 pixels.
        cases: Their patients (N); each sample is a patient of its own.
        reference: (M, 1, H, W), such as held-out slices.
        reference_cases: Their patients (M).
        examples: (L, 1, H, W), slices like the reference's of other patients, such as training slices.
        example_cases: Their patients (L). Those whose slices are tested are left out, unless no others are there.

    Returns:
        The accuracy, its interval and a p-value of at least 2 / (PERMUTATIONS + 1). The p-value is 1 if the reference
        has one patient only: nothing follows about others. For few patients, and because it does not include the
        variation between classifiers, the interval is rather too narrow.
    """
    features, reference_features, example_features = map(slice_features, (slices, reference, examples))
    folds = two_fold_split(cases)
    correct, reference_correct, p_values = np.empty(len(slices)), np.zeros(len(reference)), []
    for fold in (False, True):
        tested = np.flatnonzero(folds != fold)
        tested_cases = [cases[index] for index in tested.tolist()]
        known = set(tested_cases)
        others = np.array([case not in known for case in example_cases])
        classifier = RidgeClassifier(features[folds == fold], example_features[others | ~others.any()])
        scores, reference_scores = classifier(features[tested]), classifier(reference_features)
        correct[tested] = scores > 0
        reference_correct += (reference_scores < 0) / 2
        p_values.append(permutation_test(scores, tested_cases, reference_scores, reference_cases))
    return TwoSampleTest(
        float(correct.mean() + reference_correct.mean()) / 2,
        bootstrap_interval([(correct, cases), (reference_correct, reference_cases)]),
        min(1.0, 2 * min(p_values)),
    )


# ---------------------------------------------------------------- features


@torch.no_grad()
def slice_features(slices: Tensor) -> np.ndarray:
    """Return features (N, 802) float64 of slices (N, 1, H, W) in [-1, 1].

    Grey levels, local contrast and power spectrum are those of the full resolution, which alone shows noise and
    chequerboards.
    """
    parts = (grey_level_features, contrast_features, spectrum_features, edge_features, layout_features)
    rows = [torch.cat([part(batch) for part in parts], 1) for batch in slices.split(BATCH_SIZE)]
    return torch.cat(rows).double().cpu().numpy()


def grey_level_features(slices: Tensor) -> Tensor:
    """Return square roots of the shares of pixels at grey levels, (N, 278).

    Of the four darkest and the four brightest of the 256 levels, which show offsets and clipping; of 16 equal ranges;
    and of each level, less the mean of its neighbours' roots, which shows gaps. The variance of a root hardly depends
    on its mean (Bartlett 1936, Suppl. J. R. Stat. Soc. 3:68).
    """
    levels = to_grey_levels(slices).flatten(1).long()
    rows = torch.arange(len(levels), device=levels.device)[:, None]
    counts = torch.bincount((levels + 256 * rows).flatten(), minlength=256 * len(levels)).view(-1, 256)
    shares = counts / levels.shape[1]
    roots = shares.sqrt()
    gaps = roots[:, 1:-1] - (roots[:, :-2] + roots[:, 2:]) / 2
    return torch.cat([roots[:, :4], roots[:, -4:], shares.unflatten(1, (16, 16)).sum(2).sqrt(), gaps], 1)


def contrast_features(slices: Tensor) -> Tensor:
    """Return the logarithms of twelve quantiles of the finest contrast in blocks of 4x4 pixels, (N, 12).

    The contrast is that of a pixel's diagonals, whose root mean square is the standard deviation of white noise. The
    lowest quantiles, of the smoothest blocks, show noise best.
    """
    kernel = slices.new_tensor([[0.5, -0.5], [-0.5, 0.5]])[None, None]
    blocks = F.avg_pool2d(F.conv2d(slices, kernel).square(), 4).flatten(1).sqrt().sort(1).values
    chosen = torch.linspace(0, 0.98 * blocks.shape[1], 12, device=slices.device).long()
    return (blocks[:, chosen] + 0.002).log()  # 0.002: a quarter of a grey level


def spectrum_features(slices: Tensor) -> Tensor:
    """Return the logarithm of the power per pixel in 8x8 cells of frequencies, signs ignored: (N, 64)."""
    power = torch.fft.rfft2(slices - slices.mean((2, 3), keepdim=True)).abs().square()
    power = (power + power.flip(2).roll(1, 2))[:, :, : slices.shape[2] // 2 + 1]
    return (F.adaptive_avg_pool2d(power, 8).flatten(1) / slices[0].numel() + 1e-6).log()


def edge_features(slices: Tensor) -> Tensor:
    """Return the logarithm of the mean difference between neighbouring pixels in 8x8 cells, (N, 384).

    Along both axes, at full, half and a quarter of the resolution; they show seams and where edges are missing.
    """
    reduced = [F.avg_pool2d(slices, side) for side in (1, 2, 4)]
    differences = [level.diff(dim=axis).abs() for level in reduced for axis in (2, 3)]
    return (torch.cat([F.adaptive_avg_pool2d(own, 8).flatten(1) for own in differences], 1) + 0.003).log()


def layout_features(slices: Tensor) -> Tensor:
    """Return slices reduced to 8x8 pixels, (N, 64)."""
    return F.adaptive_avg_pool2d(slices, 8).flatten(1)


# ---------------------------------------------------------------- classifier


class RidgeClassifier:
    """Ridge regression of the labels 1 and -1 (Hoerl and Kennard 1970, Technometrics 12:55, eq. 2.1).

    Both sets have the same weight. Features are standardised over the second set.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray):
        """Learn to tell features (n, D), with scores above 0, from features (m, D), with scores below."""
        self.mean, self.std = second.mean(0), second.std(0).clip(1e-3)
        own, other = self.standardise(first), self.standardise(second)
        self.centre = (own.mean(0) + other.mean(0)) / 2
        own, other = own - self.centre, other - self.centre
        covariance = (own.T @ own / len(own) + other.T @ other / len(other)) / 2
        labels = (own.mean(0) - other.mean(0)) / 2
        self.weights = np.linalg.solve(covariance + RIDGE * np.eye(len(labels)), labels)

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """Return features in standard deviations of the second set, clamped to MAX_DEVIATION."""
        return ((features - self.mean) / self.std).clip(-MAX_DEVIATION, MAX_DEVIATION)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return scores (n,) of features (n, D)."""
        return (self.standardise(features) - self.centre) @ self.weights


# ---------------------------------------------------------------- patients as units


def sums_by_case(values: np.ndarray, cases: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of values (N,) of each of C patients, (C,), and their numbers of slices, (C,)."""
    case_of = number_groups(cases)
    return np.bincount(case_of, values), np.bincount(case_of)


def permutation_test(
    scores: np.ndarray, cases: Sequence[Hashable], reference: np.ndarray, reference_cases: Sequence[Hashable]
) -> float:
    """Test whether the mean scores of patients are higher than those of a reference's patients.

    Permutes patients between both sets; the statistic is Welch's t. The mean of a patient's slices varies less than a
    sample, and permutation of a studentised statistic is valid for unequal variances too, in the limit of many patients
    (Chung and Romano 2013, Ann. Stat. 41:484).

    Args:
        scores: (N,).
        cases: Their patients (N).
        reference: (M,).
        reference_cases: Their patients (M).

    Returns:
        The p-value, at least 1 / (PERMUTATIONS + 1); 1 if a set has one patient only.
    """
    sets = [total / count for total, count in (sums_by_case(scores, cases), sums_by_case(reference, reference_cases))]
    if min(map(len, sets)) < 2:
        return 1.0
    units = np.concatenate(sets)
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(np.arange(len(units)), (PERMUTATIONS, 1)), axis=1)
    permuted = welch_t(units[orders], len(sets[0]))
    return float((1 + (permuted >= welch_t(units[None], len(sets[0]))).sum()) / (PERMUTATIONS + 1))


def welch_t(units: np.ndarray, count: int) -> np.ndarray:
    """Return t (P,) of the first `count` of the units (P, C) against the others (Welch 1947, Biometrika 34:28)."""
    first, second = units[:, :count], units[:, count:]
    variance = first.var(1, ddof=1) / count + second.var(1, ddof=1) / (units.shape[1] - count)
    return (first.mean(1) - second.mean(1)) / np.sqrt(variance + 1e-12)


def bootstrap_interval(sets: Sequence[tuple[np.ndarray, Sequence[Hashable]]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of the sets' means, by a bootstrap of the patients of each set.

    Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3: quantiles of resampled values.

    Args:
        sets: Values (N,) and their patients (N).
    """
    rng = np.random.default_rng(0)
    means = []
    for values, cases in sets:
        totals, counts = sums_by_case(values, cases)
        weights = rng.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=DRAWS)
        means.append(weights @ totals / (weights @ counts))
    low, high = np.quantile(np.mean(means, 0), (0.025, 0.975))
    return float(low), float(high)
