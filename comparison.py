"""What is measured of a set of slices: beside another set, beside the training slices, and of each slice alone."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anatomy import Coherence, coherence
from c2st import TwoSampleTest
from copying import Copies, data_copying_statistic, duplicate_rate, find_copies, memorisation_rate
from dataset import Slices
from metrics import (
    RandomFeatures,
    density_and_coverage,
    ms_ssim_diversity,
    random_feature_frechet,
    sliced_wasserstein,
)

BATCH_SIZE = 64  # training slices loaded at a time
MAX_LISTED = 100  # samples in evaluation.json


class SliceSet(NamedTuple):
    """Slices that are evaluated together."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1], rounded to 256 grey levels
    cases: Sequence[Hashable]  # N patients; each sample is a case of its own

    def where(self, chosen: np.ndarray) -> "SliceSet":
        """Return the slices where `chosen` (N,) is true."""
        return SliceSet(
            self.slices[torch.from_numpy(chosen).to(self.slices.device)],
            [case for case, kept in zip(self.cases, chosen) if kept],
        )


def compare(features: RandomFeatures, samples: SliceSet, reference: SliceSet, test: TwoSampleTest) -> dict[str, Any]:
    """Return the metrics of samples against a reference: those of their two-sample test, `distribution_metrics`."""
    return {
        "c2st_accuracy": test.accuracy,
        "c2st_interval": test.interval,
        "c2st_p_value": test.p_value,
        **distribution_metrics(features, samples, reference),
    }


def distribution_metrics(features: RandomFeatures, samples: SliceSet, reference: SliceSet) -> dict[str, Any]:
    """Return coverage, density, distances and diversity of samples against a reference."""
    sample_features, reference_features = features(samples.slices), features(reference.slices)
    density, coverage = density_and_coverage(sample_features, reference_features)
    density_by_patient, coverage_by_patient = density_and_coverage(sample_features, reference_features, reference.cases)
    levels = sliced_wasserstein(samples.slices, reference.slices)
    return {
        "coverage": coverage,
        "coverage_by_patient": coverage_by_patient,
        "density": density,
        "density_by_patient": density_by_patient,
        "random_feature_frechet": random_feature_frechet(sample_features, reference_features),
        "sliced_wasserstein": sum(levels.values()) / len(levels),
        "sliced_wasserstein_levels": levels,
        "ms_ssim_diversity": ms_ssim_diversity(samples.slices),
        "duplicates": duplicate_rate(*samples, *reference),
    }


def copying_metrics(samples: Copies, reference: Copies) -> dict[str, float]:
    """Return the metrics of copying, from the nearest training slices of samples and of a reference."""
    return {
        "min_distance": samples.distances.min().item(),
        "median_distance": samples.distances.median().item(),
        "memorisation_rate": memorisation_rate(samples.distances, reference.distances),
        "c_t": data_copying_statistic(samples, reference),
    }


def find_set_copies(sets: Mapping[str, SliceSet], train: Slices, flip_axis: int | None) -> dict[str, Copies]:
    """Search the training slices for what each set may have copied, in one pass over them."""
    slices = torch.cat([own.slices for own in sets.values()])
    found = find_copies(slices, train.batch, len(train), train.cases, flip_axis)
    rows = torch.arange(len(slices)).split([len(own.slices) for own in sets.values()])
    return {name: found.take(own) for name, own in zip(sets, rows)}


def judge_anatomy(sets: Mapping[str, SliceSet], train: Slices, flip_axis: int | None) -> Coherence:
    """Score the anatomical coherence of the slices of each set."""
    return coherence(
        train.batches(BATCH_SIZE),
        train.positions,
        train.cases,
        {name: own.slices for name, own in sets.items()},
        flip_axis,
        {name: own.cases for name, own in sets.items()},
    )


def slice_metrics(copies: Mapping[str, Copies], anatomy: Coherence) -> dict[str, dict[str, float]]:
    """Return the share of each set that is called a copy, and its share of incoherent anatomy with a p-value.

    The share of copies is NaN where fewer than two training patients are known: then no threshold can be set.
    """
    return {
        name: {
            "copied": own.share,
            "copied_expected": own.rate,
            "tail_share": anatomy.tails[name].share,
            "tail_p_value": anatomy.tails[name].p_value(anatomy.tails[name].share),
        }
        for name, own in copies.items()
    }


def incoherent_by_height(incoherent: np.ndarray, positions: np.ndarray) -> dict[str, float]:
    """Return the share of incoherent anatomy in each third of the heights, NaN for a third without slices.

    Args:
        incoherent: (N,), of each slice, in [0, 1].
        positions: (N,) in [0, 1], NaN for unknown.
    """
    thirds = np.minimum(3 * positions, 2) // 1
    return {
        name: float(incoherent[thirds == third].mean()) if (thirds == third).any() else math.nan
        for third, name in enumerate(("low", "middle", "high"))
    }


def describe_copies(copies: Copies, train: Slices) -> list[dict[str, Any]]:
    """Name the samples that are called copies, the most similar first, and their training slices; at most 100."""
    order = copies.scores.argsort(descending=True)
    return [
        {"sample": i, "training_slice": train.names[int(copies.indices[i])], "score": copies.scores[i].item()}
        for i in order[copies.copied[order]][:MAX_LISTED].tolist()
    ]
