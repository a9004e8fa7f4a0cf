"""The classifier two-sample test: its features, its parts against brute force, false alarms and planted faults."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import c2st
from metrics import round_to_grey_levels


def patients(count, slices, seed, size=(32, 24)):
    """Slices (count * slices, 1, H, W) with grain; those of a patient share an offset and half of their structure."""
    random = torch.Generator().manual_seed(seed)

    def smooth(number):
        coarse = torch.randn(number, 1, 6, 5, generator=random)
        return F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)

    offset = 0.1 * torch.randn(count, 1, 1, 1, generator=random)
    shared = (0.2 * smooth(count) + offset).repeat_interleave(slices, 0)
    grain = 0.03 * torch.randn(count * slices, 1, *size, generator=random)
    return round_to_grey_levels(shared + 0.2 * smooth(count * slices) + grain)


def cases_of(count, slices, name):
    return [f"{name} {number}" for number in range(count) for _ in range(slices)]


def compare(slices, seed=100):
    """Test slices, each of a patient of its own, against ten patients of ten slices."""
    reference, examples = patients(10, 10, seed + 1), patients(40, 2, seed + 2)
    return c2st.c2st(
        slices, range(len(slices)), reference, cases_of(10, 10, "held-out"), examples, cases_of(40, 2, "training")
    )


# ---------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def null():
    """Results for 30 sets of patients of one kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c2st, "PERMUTATIONS", 199)
        return [compare(patients(60, 1, 10 * draw), 10 * draw) for draw in range(30)]


def test_patients_of_one_kind_are_rarely_told_apart(null):
    """Six or more of 30 up to 0.05, or three or more up to 0.01, have a probability of at most 0.4 % each."""
    p_values = np.array([result.p_value for result in null])
    assert (p_values <= 0.05).sum() < 6
    assert (p_values <= 0.01).sum() < 3
    assert p_values.mean() > 0.4
    assert np.mean([result.accuracy for result in null]) == pytest.approx(0.5, abs=0.03)


def test_most_intervals_contain_chance_level_for_patients_of_one_kind(null):
    assert sum(low <= 0.5 <= high for low, high in (result.interval for result in null)) >= 22
    assert np.mean([high - low for low, high in (result.interval for result in null)]) < 0.3


CHEQUERBOARD = (torch.arange(32)[:, None] + torch.arange(24)) % 2 * 2.0 - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda slices: slices + 0.02 * torch.randn(slices.shape, generator=torch.Generator().manual_seed(9)),
        lambda slices: slices + 0.02 * CHEQUERBOARD,
        lambda slices: 1.03 * (slices + 1) - 1,
        lambda slices: F.avg_pool2d(slices, 3, stride=1, padding=1),
        lambda slices: torch.cat([slices[:, :, :16], slices.roll(1, 0)[:, :, 16:]], 2),
    ],
    ids=["noise", "chequerboard", "brightness", "blur", "halves of two"],
)
def test_planted_faults_are_seen(change):
    result = compare(round_to_grey_levels(change(patients(60, 1, 5))))
    assert result.p_value < 0.01
    assert result.accuracy > 0.7
    assert result.interval[0] > 0.5


def test_samples_of_one_patient_are_seen():
    """Samples without the differences between patients."""
    slices = patients(1, 60, 6)
    assert compare(slices).p_value < 0.01


def test_equal_calls_give_equal_results_and_leave_the_random_state():
    slices, state = patients(20, 1, 7), torch.get_rng_state()
    assert compare(slices) == compare(slices)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_tested_patient_is_learned_from(monkeypatch):
    """Features are the number of the patient; slices of patients 0 to 5 are also among the examples."""
    learned, tested = [], []

    class Classifier:
        def __init__(self, first, second):
            learned.append(({*first[:, 0]}, {*second[:, 0]}))

        def __call__(self, features):
            tested.append({*features[:, 0]})
            return np.where(features[:, 0] < 10, 1.0, -1.0)

    monkeypatch.setattr(c2st, "RidgeClassifier", Classifier)
    monkeypatch.setattr(c2st, "slice_features", lambda slices: slices[:, 0, 0].double().numpy())
    cases, reference_cases, example_cases = ([*own] * 3 for own in (range(6), range(10, 14), range(9)))
    sets = [torch.tensor(own).float()[:, None, None, None] for own in (cases, reference_cases, example_cases)]
    result = c2st.c2st(sets[0], cases, sets[1], reference_cases, sets[2], example_cases)
    assert result.accuracy == 1
    assert result.interval == (1, 1)
    assert tested[0] | tested[2] == {*range(6)}
    assert tested[1] == tested[3] == {*range(10, 14)}
    for (first, second), own in zip(learned, tested[::2]):
        assert first == {*range(6)} - own
        assert second == {*range(9)} - own


def test_a_single_patient_is_split_and_gives_no_p_value():
    slices = patients(1, 12, 8)
    result = c2st.c2st(slices, [None] * 12, slices - 0.5, ["a"] * 12, slices - 0.5, [None] * 12)
    assert result.accuracy == 1
    assert result.p_value == 1


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("size", [(16, 16), (33, 17), (64, 48)])
def test_features_do_not_depend_on_the_other_slices(size):
    slices = patients(70, 1, 0, size)  # more than a batch
    features = c2st.slice_features(slices)
    assert features.shape == (70, 802)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(c2st.slice_features(slices[65:67]), features[65:67], atol=1e-5)


def test_grey_level_features_count_pixels():
    slices = torch.full((1, 1, 16, 16), -1.0)
    slices[0, 0, :4] = 100 / 127.5 - 1
    slices[0, 0, 4] = 1
    features = c2st.grey_level_features(slices)[0]
    roots = {0: math.sqrt(11 / 16), 100: math.sqrt(4 / 16), 255: math.sqrt(1 / 16)}
    assert features[:8].tolist() == pytest.approx([roots[0], 0, 0, 0, 0, 0, 0, roots[255]])
    assert features[8:24].nonzero().flatten().tolist() == [0, 100 // 16, 15]
    gaps = features[24:]  # of levels 1 to 254
    assert gaps[[98, 99, 100]].tolist() == pytest.approx([-roots[100] / 2, roots[100], -roots[100] / 2])
    assert gaps[0] == pytest.approx(-roots[0] / 2)
    assert gaps[253] == pytest.approx(-roots[255] / 2)


def test_contrast_features_show_the_standard_deviation_of_noise():
    noise = 0.1 * torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    features = c2st.contrast_features(torch.cat([noise, 2 * noise, torch.zeros_like(noise)]))
    assert (features.diff(dim=1) >= 0).all()
    assert features[0, 6].exp() == pytest.approx(0.1, abs=0.01)
    assert features[1, 6].exp() == pytest.approx(0.2, abs=0.02)
    assert features[2].tolist() == pytest.approx([math.log(0.002)] * 12)


def test_spectrum_features_hold_a_wave_in_its_cell():
    """A wave of f periods per pixel belongs to cell 16 f of eight, a mirrored one to the same."""
    y, x = torch.arange(64.0)[:, None], torch.arange(32.0)
    wave = torch.cos(2 * math.pi * (0.22 * y + 0.4 * x))[None, None]
    features = c2st.spectrum_features(torch.cat([wave, wave.flip(2), wave.flip(3)]))
    assert features.argmax(1).tolist() == [3 * 8 + 6] * 3
    torch.testing.assert_close(features[1], features[0])
    torch.testing.assert_close(features[2], features[0], atol=1e-3, rtol=1e-3)
    chequered = c2st.spectrum_features(CHEQUERBOARD[None, None])[0]
    assert chequered.argmax() == 63
    assert chequered[:63].max() == pytest.approx(math.log(1e-6), abs=1e-3)


def test_edge_features_hold_an_edge_in_its_cells():
    slices = torch.zeros(1, 1, 64, 32)
    slices[:, :, :, 18:] = 0.5  # between the columns 17 and 18 of 32, in the fifth of eight cells
    down, across = c2st.edge_features(slices)[0].exp().sub(0.003).unflatten(0, (3, 2, 8, 8)).unbind(1)
    assert down.abs().max() < 1e-6
    assert (across[:, :, 4] > 0.05).all()
    assert across[0, :, [0, 1, 2, 3, 5, 6, 7]].abs().max() < 1e-6
    torch.testing.assert_close(across, across[:, :1].expand_as(across))


def test_layout_features_are_means_of_cells():
    slices = patients(2, 1, 0, (64, 32))
    cells = slices.view(2, 8, 8, 8, 4).mean((2, 4))
    torch.testing.assert_close(c2st.layout_features(slices), cells.flatten(1))


# ---------------------------------------------------------------- parts


def test_ridge_classifier_equals_weighted_least_squares():
    """With a penalty p, p is added to the squared error as rows of sqrt(p) times the unit matrix."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, (20, 5)), rng.normal(0, 1, (30, 5))
    first[0, 0] = 1e6  # is clamped
    standardised = ((np.concatenate([first, second]) - second.mean(0)) / second.std(0)).clip(-3, 3)
    roots = np.sqrt(np.repeat([1 / 40, 1 / 60], [20, 30]))
    rows = np.concatenate([standardised, np.ones((50, 1))], 1) * roots[:, None]
    penalty = math.sqrt(c2st.RIDGE) * np.eye(6)[:5]  # not of the constant
    labels = np.repeat([1.0, -1.0], [20, 30])
    solution = np.linalg.lstsq(np.concatenate([rows, penalty]), np.concatenate([labels * roots, np.zeros(5)]))[0]
    classifier = c2st.RidgeClassifier(first, second)
    np.testing.assert_allclose(classifier.weights, solution[:5], atol=1e-9)
    scores = np.concatenate([classifier(first), classifier(second)])
    np.testing.assert_allclose(scores, standardised @ solution[:5] + solution[5], atol=1e-9)


def test_welch_t_equals_its_formula():
    units = np.array([[1.0, 2, 6, 4, 8, 9, 11], [11.0, 9, 8, 4, 6, 2, 1]])
    a, b = units[0, :3], units[0, 3:]
    expected = (3 - 8) / math.sqrt(((a - 3) ** 2).sum() / 2 / 3 + ((b - 8) ** 2).sum() / 3 / 4)
    found = c2st.welch_t(units, 3)
    assert found[0] == pytest.approx(expected, rel=1e-9)
    assert found[1] > 0


def test_permutation_test_of_separate_sets_counts_the_ways_to_choose_them():
    """One of the ten ways to choose three of five patients gives the observed t or a larger one."""
    scores, cases = np.array([5.0, 7, 5.5, 6.2, 6.2]), ["a", "a", "b", "c", "c"]
    reference, reference_cases = np.array([0.0, 1, 2, 1.5]), ["d", "d", "e", "e"]
    found = c2st.permutation_test(scores, cases, reference, reference_cases)
    assert found == pytest.approx(0.1, abs=0.03)
    assert c2st.permutation_test(reference, reference_cases, scores, cases) > 0.9
    assert c2st.permutation_test(scores, cases, reference, ["d"] * 4) == 1


def test_permutation_test_takes_patients_as_units(monkeypatch):
    """Samples against eight patients of ten similar slices: 300 draws of one distribution. More than 8.5 % below 0.05
    have a probability of 0.3 %, if 5 % are expected; with slices as units there are far more."""
    monkeypatch.setattr(c2st, "PERMUTATIONS", 99)
    rng = np.random.default_rng(0)
    cases = cases_of(8, 10, "patient")
    by_patient, by_slice = [], []
    for _ in range(300):
        samples = rng.normal(size=40)
        reference = 0.8 * rng.normal(size=8).repeat(10) + 0.6 * rng.normal(size=80)
        by_patient.append(c2st.permutation_test(samples, range(40), reference, cases))
        by_slice.append(c2st.permutation_test(samples, range(40), reference, range(80)))
    assert np.mean(np.array(by_patient) <= 0.05) < 0.085
    assert np.mean(np.array(by_slice) <= 0.05) > 0.12
    assert np.mean(by_patient) == pytest.approx(0.5, abs=0.07)


def test_bootstrap_interval_of_independent_slices_and_of_patients():
    """For independent slices it is the normal approximation's; slices of a patient that are all equal count as one."""
    values = np.arange(200) % 4 < 3
    other = np.ones(50)
    margin = 1.96 * math.sqrt(0.75 * 0.25 / 200) / 2
    low, high = c2st.bootstrap_interval([(values, range(200)), (other, range(50))])
    assert (low, high) == pytest.approx((0.875 - margin, 0.875 + margin), abs=0.004)
    repeated = c2st.bootstrap_interval([(values.repeat(3), np.arange(200).repeat(3).tolist()), (other, range(50))])
    assert repeated == pytest.approx((low, high), abs=1e-9)


def test_sums_by_case_equal_a_loop():
    values, cases = np.array([1.0, 2, 3, 4, 5]), ["b", None, "b", "a", None]
    totals, counts = c2st.sums_by_case(values, cases)
    assert totals.tolist() == [4, 7, 4]
    assert counts.tolist() == [2, 2, 1]
