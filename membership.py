"""Membership inference: can someone with the weights, or with samples alone, tell who was in the training data?

Every attack gives each slice a score that is higher for slices of the training data. The scores of training slices
(members) are compared with those of held-out slices (non-members) at the same positions, as many patients and slices of
each. If weights or samples give nobody away, the scores of both are distributed alike.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import code_counts, evenly_spread
from modules import VQVAE, GatedPixelCNN
from refiner import Refiner

MAX_SLICES = 100  # members, and as many non-members
MIN_K = 0.1  # share of a slice's codes, the least likely ones
NEIGHBOURS, NEIGHBOUR_STRENGTH = 4, 0.25  # augmented copies per slice; strength of their augmentation
REFINER_DRAWS = 2  # noises and times per slice
BATCH_SIZE = 8  # slices per forward pass
RESAMPLES = 2000  # of the bootstrap
MIN_PATIENTS = 4  # for an interval: those of fewer exclude 0.5 far too often
FALSE_POSITIVE_RATE = 0.01


# ---------------------------------------------------------------- members and non-members


class Pairs(NamedTuple):
    """Slices that an attack is tried on: patients in rows, paired, with equally many slices at similar positions."""

    members: np.ndarray  # (patients, slices) int, indices of training slices
    non_members: np.ndarray  # (patients, slices) int, indices of held-out slices


def pair_patients(
    cases: Sequence[Hashable],
    positions: np.ndarray,
    held_out_cases: Sequence[Hashable],
    held_out_positions: np.ndarray,
    seed: int = 0,
) -> Pairs:
    """Pair each held-out patient with a random training patient, and their slices by position.

    Args:
        cases: Patients of the training slices (N); None stands for a patient of its own.
        positions: Of the training slices, (N,) in [0, 1], NaN for unknown.
        held_out_cases: Patients of the held-out slices (M).
        held_out_positions: (M,).
        seed: Of the pairs.

    Returns:
        At most MAX_SLICES slices of each kind. Patients with so few that they would limit all others are left out.
    """
    random = np.random.default_rng(seed)
    training, held_out = slices_of_patients(cases), slices_of_patients(held_out_cases)
    patients = min(len(training), len(held_out), MAX_SLICES)
    usual = min(int(np.quantile([len(own) for own in of], 0.25)) for of in (training, held_out))
    count = min(MAX_SLICES // patients, usual)
    training, held_out = ([own for own in of if len(own) >= count] for of in (training, held_out))
    patients = min(len(training), len(held_out), patients)
    chosen = [held_out[i] for i in np.sort(random.permutation(len(held_out))[:patients])]
    partners = [training[i] for i in random.permutation(len(training))[:patients]]
    members, non_members = [], []
    for own, partner in zip(chosen, partners):
        kept = own[evenly_spread(count, len(own))]
        non_members.append(kept)
        members.append(nearest_positions(held_out_positions[kept], positions, partner))
    return Pairs(np.array(members), np.array(non_members))


def slices_of_patients(cases: Sequence[Hashable]) -> list[np.ndarray]:
    """Return the indices of each patient's slices."""
    found: dict[Hashable, list[int]] = {}
    for index, case in enumerate(cases):
        found.setdefault(("unknown", index) if case is None else case, []).append(index)
    return [np.array(indices) for indices in found.values()]


def nearest_positions(wanted: np.ndarray, positions: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return for each wanted position the candidate nearest to it, each candidate once.

    Where a position is unknown, candidates are evenly spread over their order, which is that of names.
    """
    if not np.isfinite([*wanted, *positions[candidates]]).all():
        return candidates[evenly_spread(len(wanted), len(candidates))]
    left, chosen = list(candidates), []
    for position in wanted:
        distances = np.abs(positions[left] - position)
        chosen.append(left.pop(int(distances.argmin())))
    return np.array(chosen)


# ---------------------------------------------------------------- attacks


def code_nll(prior: GatedPixelCNN, codes: Tensor, positions: Tensor) -> Tensor:
    """Return the negative log-likelihood of each code (N, h * w), in nats, of codes (N, h, w) at positions (N,)."""
    batches = zip(codes.split(BATCH_SIZE), positions.split(BATCH_SIZE))
    return torch.cat([prior.code_nll(*batch).flatten(1) for batch in batches])


@torch.no_grad()
def attack_scores(
    slices: Tensor,
    positions: Tensor,
    vqvae: VQVAE,
    prior: GatedPixelCNN,
    guide: GatedPixelCNN | None,
    refiner: Refiner,
    augment: Callable[[Tensor, Tensor], Tensor],
    sampled_codes: Tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score slices by what the networks say of them; higher for members.

    likelihood       Of the codes under the prior (Yeom et al. 2018, arXiv:1709.01604): minus the mean nats per code.
    calibrated       The same, compared with the frequencies of codes, which tell how difficult a slice is (difficulty
                     calibration, Watson et al. 2022, arXiv:2111.08440): nats per code under these minus the prior's.
    guide            Nats per code under the guide, the prior early in its training, divided by the prior's: what it has
                     learned of the slice since (loss trajectories, Liu et al. 2022, arXiv:2208.14933).
    min_k            Minus the mean nats of the least likely MIN_K of the codes (Min-K % Prob, Shi et al. 2024,
                     arXiv:2310.16789).
    neighbourhood    Nats per code of NEIGHBOURS slightly augmented copies of the slice, divided by those of the slice
                     itself (Mattern et al. 2023, arXiv:2305.18462). The copies are as difficult as the slice, but were
                     not trained on.
    reconstruction   Minus the squared error of the VQ-VAE.
    refiner          Minus the flow-matching loss, for fixed noises and times.

    Args:
        slices: (N, 1, H, W) in [-1, 1].
        positions: (N,) in [0, 1], NaN for unknown.
        vqvae: In evaluation mode, as the other networks.
        prior: The prior.
        guide: Its guide; None leaves its attack out.
        refiner: The refiner.
        augment: Maps slices and parameters (N, 6) to augmented slices, as training does.
        sampled_codes: Codes of samples, of any shape, for the frequencies: who has the weights can draw them.
        seed: Of copies and noises.

    Returns:
        Scores (N,) by the name of the attack.
    """
    random = torch.Generator().manual_seed(seed)
    codes = encode(vqvae, slices)
    nll = code_nll(prior, codes, positions)
    nats = nll.mean(1)
    frequencies = code_counts(sampled_codes, prior.config.codebook_size).to(slices.device) + 1
    rarity = -(frequencies / frequencies.sum()).log()
    neighbours = torch.zeros_like(nats)
    for _ in range(NEIGHBOURS):
        parameters = NEIGHBOUR_STRENGTH * torch.randn(len(slices), 6, generator=random).to(slices.device)
        neighbours += code_nll(prior, encode(vqvae, augment(slices, parameters)), positions).mean(1) / NEIGHBOURS
    guided = {"guide": code_nll(guide, codes, positions).mean(1) / nats} if guide else {}
    return {
        "likelihood": -nats,
        "calibrated": rarity[codes].flatten(1).mean(1) - nats,
        **guided,
        "min_k": -nll.topk(max(1, int(MIN_K * nll.shape[1])), 1).values.mean(1),
        "neighbourhood": neighbours / nats,
        "reconstruction": torch.cat(
            [
                -(vqvae.decode(own) - batch).square().mean((1, 2, 3))
                for own, batch in zip(codes.split(BATCH_SIZE), slices.split(BATCH_SIZE))
            ]
        ),
        "refiner": -refiner_losses(slices, codes, vqvae, refiner, seed),
    }


def encode(vqvae: VQVAE, slices: Tensor) -> Tensor:
    """Return the codes (N, h, w) of slices, in batches."""
    return torch.cat([vqvae.encode(batch) for batch in slices.split(BATCH_SIZE)])


def refiner_losses(slices: Tensor, codes: Tensor, vqvae: VQVAE, refiner: Refiner, seed: int) -> Tensor:
    """Return the refiner's loss of each slice (N,), a mean over REFINER_DRAWS noises and times, the same for all."""
    losses = slices.new_zeros(len(slices))
    for draw in range(REFINER_DRAWS):
        for i, (own, code) in enumerate(zip(slices.split(1), codes.split(1))):
            torch.manual_seed(seed + draw)
            losses[i] += refiner.loss(own, code, vqvae) / REFINER_DRAWS
    return losses


# ---------------------------------------------------------------- success of an attack


def attack_metrics(members: Tensor, non_members: Tensor) -> dict[str, float | tuple[float, float]]:
    """Measure how well scores separate members from non-members.

    Args:
        members: Scores (patients, slices), higher for members.
        non_members: Scores (patients, slices).

    Returns:
        auc: The area under the ROC curve: the probability that a member scores above a non-member; 0.5 without leak.
        auc_interval: Its 95 % interval, by a bootstrap of patients, since slices of one patient are not independent.
        auc_by_patient, auc_by_patient_interval: The same of patients' mean scores.
        tpr_at_1_percent_fpr: Share of members found if at most that share of non-members is accused (Carlini et al.
            2022, arXiv:2112.03570): one of 100, none of fewer. `chance_rate` without leak.
    """
    by_slice = win_rates(members, non_members)
    by_patient = win_rates(members.mean(1, keepdim=True), non_members.mean(1, keepdim=True))
    metrics: dict[str, float | tuple[float, float]] = {
        "auc": by_slice.mean().item(),
        "auc_interval": bootstrap_interval(by_slice),
        "auc_by_patient": by_patient.mean().item(),
        "auc_by_patient_interval": bootstrap_interval(by_patient),
    }
    metrics["tpr_at_1_percent_fpr"] = true_positive_rate(members, non_members, FALSE_POSITIVE_RATE)
    return metrics


def win_rates(members: Tensor, non_members: Tensor) -> Tensor:
    """Return, for each pair of patients, the share of pairs of slices in which the member scores higher; ties half.

    Args:
        members: Scores (P, n).
        non_members: Scores (Q, m).

    Returns:
        (P, Q) float64. With equally many slices per patient, the mean is the area under the ROC curve.
    """
    difference = members[:, None, :, None].double() - non_members[None, :, None, :].double()
    return (difference > 0).double().mean((2, 3)) + (difference == 0).double().mean((2, 3)) / 2


def bootstrap_interval(rates: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of the mean of win rates (P, Q), over resampled patients of both kinds.

    (0, 1) if there are fewer than MIN_PATIENTS of a kind, which resampling would make look alike.
    """
    if min(rates.shape) < MIN_PATIENTS:
        return 0.0, 1.0
    random = torch.Generator().manual_seed(0)
    rows, columns = (
        F.one_hot(torch.randint(size, (RESAMPLES, size), generator=random), size).double().mean(1)
        for size in rates.shape
    )  # the weight of each patient in each resample
    means = (rows @ rates.cpu() * columns).sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def true_positive_rate(members: Tensor, non_members: Tensor, rate: float) -> float:
    """Return the share of members above a threshold that at most a share `rate` of the non-members exceeds."""
    accused = math.floor(rate * non_members.numel())
    threshold = non_members.flatten().sort(descending=True).values[accused]
    return (members > threshold).double().mean().item()


def chance_rate(count: int, rate: float = FALSE_POSITIVE_RATE) -> float:
    """Return the expected `true_positive_rate` without any leak, for `count` non-members: 0.02 for 100 at 0.01."""
    return (math.floor(rate * count) + 1) / (count + 1)


def roc_curve(members: Tensor, non_members: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates (n,) at each threshold, from (0, 0) to (1, 1)."""
    thresholds = torch.cat([members.flatten(), non_members.flatten()]).unique().flip(0)
    false, true = (
        np.append(0.0, (scores.flatten()[:, None] >= thresholds).double().mean(0).cpu().numpy())
        for scores in (non_members, members)
    )
    return false, true
