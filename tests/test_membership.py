"""membership.py: pairs of patients, attacks on tiny networks, and how their success is measured."""

import copy

import numpy as np
import pytest
import torch

import membership
from augmentation import augment
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import Refiner, RefinerConfig

# ---------------------------------------------------------------- members and non-members


def test_pairs_have_equally_many_patients_and_slices_at_similar_positions():
    cases = np.repeat([f"a{n}" for n in range(30)], 20).tolist()
    held_out_cases = np.repeat([f"b{n}" for n in range(7)], 20).tolist()
    positions = np.tile(np.linspace(0, 1, 20), 30)
    held_out_positions = np.tile(np.linspace(0, 1, 20), 7)
    members, non_members = membership.pair_patients(cases, positions, held_out_cases, held_out_positions)
    assert members.shape == non_members.shape == (7, 100 // 7)
    for rows, of in ((members, cases), (non_members, held_out_cases)):
        patients = [{of[index] for index in row} for row in rows]
        assert all(len(patient) == 1 for patient in patients)
        assert len(set.union(*patients)) == 7
        assert len(np.unique(rows)) == rows.size
    np.testing.assert_allclose(positions[members], held_out_positions[non_members])


def test_slices_without_case_or_position_are_paired_too():
    unknown = np.full(5, np.nan)
    pairs = membership.pair_patients([None] * 5, unknown, [None] * 4, unknown[:4])
    assert pairs.members.shape == pairs.non_members.shape == (4, 1)
    assert len(np.unique(pairs.members)) == 4


def test_unknown_positions_are_paired_by_their_place_in_the_volume():
    """The first slices of one patient beside all heights of another would differ by anatomy alone."""
    cases = np.repeat([f"a{n}" for n in range(10)], 20).tolist()
    unknown = np.full(200, np.nan)
    members, non_members = membership.pair_patients(cases, unknown, cases, unknown)
    assert np.array_equal(members % 20, non_members % 20)
    assert members.shape == (10, 10) and (members[:, -1] % 20 == 19).all()


def test_a_patient_with_few_slices_does_not_limit_all_others():
    cases = np.repeat([f"a{n}" for n in range(10)], 20).tolist()
    positions = np.tile(np.linspace(0, 1, 20), 10)
    short, more = [*cases, "short"], np.append(positions, 0.5)
    for training, held_out in (((cases, positions), (short, more)), ((short, more), (cases, positions))):
        members, non_members = membership.pair_patients(*training, *held_out)
        assert members.shape == non_members.shape == (10, 10)
        assert members.max() < 200 and non_members.max() < 200


# ---------------------------------------------------------------- attacks


@pytest.fixture
def networks():
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(4, channels=8, residual_blocks=1, hidden_channels=8, codebook_size=16, embedding_dim=4))
    prior = GatedPixelCNN(PriorConfig(grid=(8, 4), codebook_size=16, channels=8, dilation_cycles=1, head_channels=16))
    refiner = Refiner(RefinerConfig(4, codebook_size=16, channels=4, levels=2))
    return vqvae.eval(), prior.eval(), copy.deepcopy(prior).eval(), refiner.eval()


def test_code_nll_has_the_priors_own_mean(networks):
    _, prior, _, _ = networks
    codes, positions = torch.randint(16, (11, 8, 4)), torch.rand(11)
    nll = membership.code_nll(prior, codes, positions)
    assert nll.shape == (11, 32)
    assert nll.mean().item() == pytest.approx(prior.nll(codes, positions).item(), rel=1e-5)


def test_scores_are_higher_for_slices_that_were_learned(networks):
    """The prior is trained on half of the slices: every attack on it finds them, those on other networks do not."""
    vqvae, prior, *_ = networks
    slices, positions = torch.rand(24, 1, 32, 16) * 2 - 1, torch.rand(24)
    codes = vqvae.encode(slices)
    optimiser = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        prior.nll(codes[:12], positions[:12]).backward()
        optimiser.step()
    scores = membership.attack_scores(slices, positions, *networks, augment, codes)
    areas = {name: membership.attack_metrics(own[:12, None], own[12:, None])["auc"] for name, own in scores.items()}
    assert min(areas[name] for name in ("likelihood", "calibrated", "guide", "min_k", "neighbourhood")) > 0.95
    assert max(abs(areas[name] - 0.5) for name in ("reconstruction", "refiner")) < 0.35
    again = membership.attack_scores(slices, positions, *networks, augment, codes)
    assert all(torch.equal(scores[name], again[name]) for name in scores)


def test_calibration_adds_how_rare_the_codes_are_in_samples(networks):
    slices, positions = torch.rand(5, 1, 32, 16) * 2 - 1, torch.rand(5)
    sampled = torch.tensor([[0, 0, 3], [5, 0, 3]])
    scores = membership.attack_scores(slices, positions, *networks, augment, sampled)
    frequencies = torch.ones(16)  # once more than they occur: a code that no sample has is not impossible
    frequencies[[0, 3, 5]] = torch.tensor([4.0, 3.0, 2.0])
    rarity = [-(frequencies / 22).log()[codes].mean() for codes in networks[0].encode(slices)]
    torch.testing.assert_close(scores["calibrated"] - scores["likelihood"], torch.stack(rarity))


def test_the_attack_by_the_guide_cancels_what_both_priors_find_difficult(networks):
    """The guide is the prior here, so that its quotient says nothing, whatever a slice costs."""
    slices, positions = torch.rand(5, 1, 32, 16) * 2 - 1, torch.rand(5)
    scores = membership.attack_scores(slices, positions, *networks, augment, networks[0].encode(slices))
    torch.testing.assert_close(scores["guide"], torch.ones(5))
    assert len(scores["likelihood"].unique()) == 5
    vqvae, prior, _, refiner = networks
    without = membership.attack_scores(
        slices, positions, vqvae, prior, None, refiner, augment, networks[0].encode(slices)
    )
    assert without.keys() == scores.keys() - {"guide"}
    assert all(torch.equal(own, scores[name]) for name, own in without.items())


def test_refiner_losses_do_not_depend_on_the_other_slices(networks):
    vqvae, _, _, refiner = networks
    slices = torch.rand(3, 1, 32, 16) * 2 - 1
    codes = vqvae.encode(slices)
    losses = membership.refiner_losses(slices, codes, vqvae, refiner, seed=3)
    alone = membership.refiner_losses(slices[1:2], codes[1:2], vqvae, refiner, seed=3)
    torch.testing.assert_close(losses[1:2], alone)


# ---------------------------------------------------------------- success of an attack


def test_auc_and_rates_equal_brute_force():
    random = np.random.default_rng(0)
    members, non_members = random.normal(0.7, 1, (6, 5)).round(1), random.normal(0, 1, (8, 5)).round(1)
    metrics = membership.attack_metrics(torch.from_numpy(members), torch.from_numpy(non_members))
    wins = [(m > n) + (m == n) / 2 for m in members.ravel() for n in non_members.ravel()]
    assert metrics["auc"] == pytest.approx(np.mean(wins))
    wins = [(m > n) + (m == n) / 2 for m in members.mean(1) for n in non_members.mean(1)]
    assert metrics["auc_by_patient"] == pytest.approx(np.mean(wins))
    assert metrics["tpr_at_1_percent_fpr"] == (members > non_members.max()).mean()  # 40 non-members: none is accused
    for rate in (0.05, 0.25, 0.5):
        found = membership.true_positive_rate(torch.from_numpy(members), torch.from_numpy(non_members), rate)
        thresholds = [t for t in non_members.ravel() if (non_members > t).mean() <= rate]
        assert found == (members > min(thresholds)).mean()


def test_the_interval_widens_with_dependent_slices():
    """Slices that repeat their patient's score carry no more information than one per patient."""
    random = torch.Generator().manual_seed(0)
    independent = torch.randn(2, 10, 20, generator=random)
    dependent = torch.randn(2, 10, 1, generator=random).expand(2, 10, 20)
    widths = []
    for members, non_members in (independent, dependent):
        low, high = membership.attack_metrics(members, non_members)["auc_interval"]
        assert low < high
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]


def test_the_interval_covers_one_half_for_equal_distributions():
    """In 40 draws of 10 against 10 patients a 95 % interval misses 1/2 more than 8 times with probability 5e-4."""
    random = torch.Generator().manual_seed(1)
    missed = 0
    for _ in range(40):
        members, non_members = torch.randn(2, 10, 1, generator=random) + 0.3 * torch.randn(2, 10, 5, generator=random)
        low, high = membership.attack_metrics(members, non_members)["auc_interval"]
        missed += not low <= 0.5 <= high
    assert missed <= 8


def test_few_patients_have_no_interval():
    """Resampled, one patient of each kind is always the same one."""
    for members, non_members in ((1, 10), (10, 3)):
        metrics = membership.attack_metrics(torch.ones(members, 4), torch.zeros(non_members, 4))
        assert metrics["auc"] == metrics["auc_by_patient"] == 1
        assert metrics["auc_interval"] == metrics["auc_by_patient_interval"] == (0, 1)


@pytest.mark.parametrize("count", [4, 20, 100, 250])
def test_the_chance_rate_is_what_no_leak_gives(count):
    random = torch.Generator().manual_seed(count)
    rates = [
        membership.true_positive_rate(*torch.randn(2, count, generator=random), membership.FALSE_POSITIVE_RATE)
        for _ in range(2000)
    ]
    assert np.mean(rates) == pytest.approx(membership.chance_rate(count), abs=4 * np.std(rates) / 2000**0.5)


def test_roc_curve_encloses_the_area():
    random = torch.Generator().manual_seed(0)
    members, non_members = torch.randn(5, 8, generator=random) + 1, torch.randn(6, 8, generator=random)
    false, true = membership.roc_curve(members, non_members)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    area = np.trapezoid(true, false)
    assert area == pytest.approx(membership.win_rates(members, non_members).mean().item(), abs=1e-9)


def test_win_rates_count_ties_half():
    assert membership.win_rates(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(3.5 / 4)
