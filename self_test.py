"""Self-test of the evaluation: plants faults in real slices, and shows which figure sees which.

The held-out slices of both splits are divided in halves by patient. One half, altered, plays the samples; the other is
what they are compared with. Copies are made of training slices. No network of the run is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anatomy import Tail
from c2st import c2st
from comparison import SliceSet, compare, distribution_metrics, find_set_copies, judge_anatomy
from copying import data_copying_statistic, memorisation_rate
from dataset import Slices
from faults import ANATOMY_FAULTS, COPIES, TEXTURE_FAULTS, VARIETY_FAULTS, Fault, Originals
from membership import win_rates
from metrics import RandomFeatures, evenly_spread, round_to_grey_levels, two_fold_split

MAX_SLICES = 200  # that play the samples, and as many that they are compared with
COPIED_SLICES = 40  # training slices that copies are made of
DIVISIONS = 4  # of unaltered slices, random ones, from which the spread of a figure is taken
TENTHS = ("halves of two", "upside down", "pure noise")  # faults that are tried in a tenth of the slices too
SHARES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of faulty slices
DRAWS, CALLED_DRAWS = 10, 9
SIGNIFICANT = 0.01
P_VALUES = ("c2st_p_value", "tail_p_value")
SPREADS = (
    "coverage_by_patient",
    "density_by_patient",
    "random_feature_frechet",
    "sliced_wasserstein",
    "ms_ssim_diversity",
    "duplicates",
)


class HeldOut(NamedTuple):
    """Slices of both held-out splits."""

    slices: Tensor  # (N, 1, H, W)
    positions: np.ndarray  # (N,)
    cases: list[Any]  # N patients; an unknown one is a patient of its own

    def select(self, chosen: np.ndarray) -> "HeldOut":
        """Return slices by their indices (n,), at most MAX_SLICES, evenly spread."""
        kept = chosen[evenly_spread(min(len(chosen), MAX_SLICES), len(chosen))]
        return HeldOut(self.slices[torch.from_numpy(kept)], self.positions[kept], [self.cases[i] for i in kept])

    def set(self) -> SliceSet:
        """Return the slices and their patients."""
        return SliceSet(self.slices, self.cases)


def self_test(train: Slices, splits: Sequence[Slices], flip_axis: int | None, device: torch.device) -> dict[str, Any]:
    """Plant faults and return what each figure makes of them.

    Args:
        train: The training slices.
        splits: The held-out slices.
        flip_axis: As in `copying.find_copies`.
        device: That computes.

    Returns:
        settings: Numbers of slices and patients, and the rate at which new patients' slices may be called copies.
        faults: By name, the figures of slices that all have the fault, or a tenth of them; `seen`, the figures that
            see it; and `smallest_share` of faulty slices that the test of anatomy calls in nine of ten draws, None if
            it does not call all of them.
        copies: By name, the shares of copies that are called copies (`copied`) and whose source is named (`named`),
            the memorisation rate and C_T.
    """
    held_out = gather(splits, device)
    second = two_fold_split(held_out.cases)
    played, reference = (held_out.select(np.flatnonzero(half)) for half in (~second, second))
    planted = plant(Originals(played.slices, played.positions, played.cases, flip_axis or 2))
    faults = judge_faults(train, held_out, played, reference, planted, flip_axis)
    copies, rate = judge_copies(train, held_out, flip_axis)
    settings = {
        "slices": len(played.cases),
        "cases": len(set(played.cases)),
        "reference_slices": len(reference.cases),
        "reference_cases": len(set(reference.cases)),
        "copied_slices": min(COPIED_SLICES, len(train)),
        "copied_expected": rate,
    }
    return {"settings": settings, "faults": faults, "copies": copies}


def gather(splits: Sequence[Slices], device: torch.device) -> HeldOut:
    """Return the slices of all splits."""
    slices = torch.cat([own.batch(np.arange(len(own))).to(device) for own in splits])
    cases = [case for own in splits for case in own.cases]
    known = [("unknown", i) if case is None else case for i, case in enumerate(cases)]
    return HeldOut(slices, np.concatenate([own.positions for own in splits]), known)


def plant(originals: Originals) -> dict[str, Tensor]:
    """Return the slices with each fault in all of them, and with some in a tenth; rounded like real slices."""
    faults: dict[str, Fault] = {**TEXTURE_FAULTS, **VARIETY_FAULTS, **ANATOMY_FAULTS}
    planted = {"none": originals.slices} | {name: fault(originals) for name, fault in faults.items()}
    for name in TENTHS:
        some = originals.slices.clone()
        some[::10] = planted[name][::10]
        planted[f"a tenth: {name}"] = some
    return {name: round_to_grey_levels(slices) for name, slices in planted.items()}


# ---------------------------------------------------------------- faults


def judge_faults(
    train: Slices,
    held_out: HeldOut,
    played: HeldOut,
    reference: HeldOut,
    planted: Mapping[str, Tensor],
    flip_axis: int | None,
) -> dict[str, dict[str, Any]]:
    """Return the figures of slices with planted faults, by fault; see `self_test`."""
    some = np.sort(np.random.default_rng(0).permutation(len(train))[:MAX_SLICES])
    training = SliceSet(train.batch(some).to(played.slices.device), [train.cases[i] for i in some])
    features = RandomFeatures(training.slices)
    sets = {name: SliceSet(slices, played.cases) for name, slices in planted.items()}
    anatomy = judge_anatomy(sets, train, flip_axis)
    spreads = natural_spreads(features, held_out)
    found: dict[str, dict[str, Any]] = {}
    for name, own in sets.items():
        tail = anatomy.tails[name]
        test = c2st(*own, *reference.set(), *training)
        figures = compare(features, own, reference.set(), test) | {
            "coherence_auc": win_rates(anatomy.scores["none"][None], anatomy.scores[name][None]).item(),
            "tail_share": tail.share,
            "tail_p_value": tail.p_value(tail.share),
        }
        unaltered = found.get("none", figures)
        figures["seen"] = [key for key in P_VALUES if figures[key] < SIGNIFICANT]
        figures["seen"] += [key for key in SPREADS if abs(figures[key] - unaltered[key]) > spreads[key]]
        if name in ANATOMY_FAULTS:
            figures["smallest_share"] = smallest_share(tail, anatomy.tails["none"])
        found[name] = figures
    return found


def natural_spreads(features: RandomFeatures, held_out: HeldOut) -> dict[str, float]:
    """Return how far apart each figure of unaltered slices lies over random divisions of the patients in halves."""
    patients = list(dict.fromkeys(held_out.cases))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DIVISIONS):
        first = {patients[i] for i in rng.permutation(len(patients))[: (len(patients) + 1) // 2]}
        own = np.array([case in first for case in held_out.cases])
        halves = [held_out.select(np.flatnonzero(half)).set() for half in (own, ~own) if half.any()]
        found.append(distribution_metrics(features, halves[0], halves[-1]))
    return {key: max(own[key] for own in found) - min(own[key] for own in found) for key in SPREADS}


def smallest_share(faulty: Tail, unaltered: Tail) -> float | None:
    """Return the smallest of SHARES of faulty slices that is called in CALLED_DRAWS of DRAWS; None if there is none."""
    rng, count = np.random.default_rng(0), len(faulty.low)
    for share in SHARES:
        called = 0
        for _ in range(DRAWS):
            chosen = rng.permutation(count) < round(share * count)
            called += unaltered.p_value(np.where(chosen, faulty.low, unaltered.low).mean()) < SIGNIFICANT
        if called >= CALLED_DRAWS:
            return share
    return None


# ---------------------------------------------------------------- copies


def judge_copies(
    train: Slices, held_out: HeldOut, flip_axis: int | None
) -> tuple[dict[str, dict[str, float | None]], float]:
    """Return what the search for copies makes of altered training slices, by alteration, and the rate it allows.

    See `self_test`. The kind "none" are held-out slices, which copy nobody.
    """
    device = held_out.slices.device
    sources = np.unique(evenly_spread(COPIED_SLICES, len(train)))
    own = Originals(train.batch(sources).to(device), train.positions[sources], sources.tolist(), flip_axis or 2)
    others = held_out.slices[nearest_height(held_out.positions, own.positions)]
    sets = {"none": held_out.select(np.arange(len(held_out.cases))).set()}
    for name, copy in COPIES.items():
        if name != "mirrored" or flip_axis is not None:
            sets[name] = SliceSet(round_to_grey_levels(copy(own, others)), own.cases)
    found = find_set_copies(sets, train, flip_axis)
    indices = torch.from_numpy(sources).to(device)
    figures: dict[str, dict[str, float | None]] = {
        name: {
            "copied": copies.share,
            "named": None if name == "none" else (copies.indices == indices).double().mean().item(),
            "memorisation_rate": memorisation_rate(copies.distances, found["none"].distances),
            "c_t": data_copying_statistic(copies, found["none"]),
        }
        for name, copies in found.items()
    }
    return figures, found["none"].rate


def nearest_height(positions: np.ndarray, wanted: np.ndarray) -> Tensor:
    """Return for each wanted position (n,) the index of the nearest of positions (N,), or any if it is unknown."""
    distances = np.abs(positions - wanted[:, None])
    nearest = np.nan_to_num(distances, nan=np.inf).argmin(1)
    any_slice = evenly_spread(len(wanted), len(positions))
    return torch.from_numpy(np.where(np.isfinite(distances).any(1), nearest, any_slice))
