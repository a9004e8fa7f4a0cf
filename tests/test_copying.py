"""The search for copies on drawn patients: smooth random fields that share a part, as anatomy does."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import copying
import faults
from copying import Copies, align, calibrate, find_copies

CASES, SLICES, SIZE = 12, 3, (64, 32)
COPIED = 5  # a training slice of each patient from the second on is altered


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def field(count, seed):
    """Smooth random slices (count, 1, H, W) of standard deviation 1."""
    noise = torch.randn(count, 1, *SIZE, generator=torch.Generator().manual_seed(seed))
    smooth = copying.gaussian_blur(noise, 1.5)
    return smooth / smooth.std()


def draw_patients(count, seed):
    """Slices (count * SLICES, 1, H, W) in [-1, 1]: half of the variance is common to all, a third to a patient."""
    patients = field(count, seed).repeat_interleave(SLICES, 0)
    return (0.5 * (0.5**0.5 * field(1, 0) + 0.58 * patients + 0.4 * field(count * SLICES, seed + 1))).clamp(-1, 1)


class Searched(NamedTuple):
    """The samples, by the kind of alteration, and what was found."""

    training: torch.Tensor
    sources: torch.Tensor
    samples: dict
    copies: dict


@pytest.fixture(scope="module")
def searched():
    """Alter COPIED training slices in many ways, add slices of new patients, and search for all at once."""
    training = draw_patients(CASES, 1)
    sources = torch.arange(1, 1 + COPIED) * SLICES
    own, others = training[sources], training[sources + 5 * SLICES + 1]
    samples = {
        "exact": own,
        "mirrored": own.flip(2),
        "shifted": faults.move(own, (4, -3)),
        "turned": faults.move(own, degrees=8),
        "turned back": faults.move(own, degrees=-8),
        "stretched": faults.move(own, stretch=(1.08, 0.93)),
        "varied": faults.vary(own, 1),
        "mirrored and varied": faults.vary(own.flip(2), 1, seed=1),
        "gamma": faults.change_gamma(own, 0.6),
        "darker": faults.brighten(own, 0.6),
        "noisy": faults.add_noise(own, 0.1),
        "blurred": copying.gaussian_blur(own, 1),
        "bent": faults.bend(own, 0.7),
        "first half of H": faults.join_halves(own, others, 2),
        "first half of W": faults.join_halves(own, others, 3),
        "new": draw_patients(COPIED, 100)[::SLICES],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CANDIDATES", 6)
        patch.setattr(copying, "FINALISTS", 2)
        patch.setattr(copying, "CALIBRATION_SLICES", 2 * CASES)
        cases = [f"case_{i // SLICES}" for i in range(len(training))]
        found = find_copies(torch.cat(list(samples.values())), lambda i: training[list(i)], len(training), cases, 2)
    copies = {kind: found.take(rows) for kind, rows in zip(samples, torch.arange(len(found.scores)).split(COPIED))}
    return Searched(training, sources, samples, copies)


def correlation(a, b):
    a, b = (of.flatten(1) - of.flatten(1).mean(1, keepdim=True) for of in (a, b))
    return F.cosine_similarity(a, b)


WHOLE = ("exact", "mirrored", "shifted", "turned", "turned back", "stretched", "varied", "mirrored and varied", "gamma")
WHOLE += ("darker", "noisy", "blurred", "bent")
HALVES = ("first half of H", "first half of W")


@pytest.mark.parametrize("kind", WHOLE + HALVES)
def test_altered_copies_are_seen_and_their_sources_named(searched, kind):
    assert searched.copies[kind].copied.all()
    if kind in HALVES:  # the other half is a copy too
        assert all(i - j in (0, 5 * SLICES + 1) for i, j in zip(searched.copies[kind].indices, searched.sources))
    else:
        assert (searched.copies[kind].indices == searched.sources).all()


def test_slices_of_new_patients_are_no_copies(searched):
    """With 12 patients, one slice in 13 may be called a copy; these five are drawn with fixed seeds."""
    assert searched.copies["new"].rate == pytest.approx(1 / (CASES + 1))
    assert not searched.copies["new"].copied.any()


def test_an_exact_copy_scores_highest(searched):
    exact = searched.copies["exact"].scores
    assert all((of.scores <= exact + 1e-4).all() for of in searched.copies.values())


@pytest.mark.parametrize("kind", ["exact", "mirrored", "shifted", "turned", "stretched", "mirrored and varied"])
def test_the_training_slice_is_laid_over_the_sample(searched, kind):
    found = searched.copies[kind]
    aligned = align(searched.training[found.indices], found.transforms)
    inner = (slice(None), slice(None), slice(8, -8), slice(6, -6))
    assert (correlation(aligned[inner], searched.samples[kind][inner]) > 0.95).all()


def test_exact_and_mirrored_copies_have_distance_0_and_altered_ones_are_near(searched):
    assert not searched.copies["exact"].distances.any()
    assert not searched.copies["mirrored"].distances.any()
    new = searched.copies["new"].distances
    for kind in ("shifted", "turned", "turned back", "stretched", "noisy", "blurred"):
        assert 0 < searched.copies[kind].distances.max() < 0.6 * new.min()


def test_a_slice_has_the_same_distance_from_samples_as_from_training_slices(searched):
    samples = torch.cat([searched.samples["turned"], searched.samples["new"]])
    found = torch.cat([searched.copies["turned"].distances, searched.copies["new"].distances])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "CANDIDATES", 6)
        distances = copying.nearest_distances(samples, searched.training, 2)
    assert (distances[:COPIED] - found[:COPIED]).abs().max() < 0.01
    assert distances[:COPIED].max() < 0.6 * distances[COPIED:].min()


def test_the_box_shows_the_half_that_was_copied(searched):
    found = searched.copies["first half of H"]
    first = found.indices == searched.sources
    top, bottom, left, right = found.boxes.unbind(1)
    assert (bottom[first] <= 0.65).all() and (top[~first] >= 0.35).all()
    assert ((top < bottom) & (left < right)).all()


def test_boxes_of_mirrored_samples_are_mirrored_back():
    half = int((copying.window_bounds(torch.device("cpu")) == torch.tensor([0, 0.5, 0, 1])).all(1).nonzero())
    transforms = torch.stack([torch.eye(2, 3), torch.tensor([[1.0, 0, 0], [0, -1, 0]])])  # the second flips axis 2
    boxes = copying.matched_boxes(torch.tensor([half, half]), transforms)
    assert boxes.tolist() == [[0, 0.5, 0, 1], [0.5, 1, 0, 1]]


def test_each_training_slice_is_loaded_once_and_in_batches(monkeypatch):
    monkeypatch.setattr(copying, "CANDIDATES", 2)
    monkeypatch.setattr(copying, "BATCH_SIZE", 4)
    training, loaded = draw_patients(3, 1), []

    def load(indices):
        loaded.append(list(indices))
        return training[loaded[-1]]

    find_copies(training[:1], load, len(training), [i // SLICES for i in range(len(training))])
    assert loaded == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_mirrored_copies_are_searched_only_along_the_given_axis(monkeypatch):
    monkeypatch.setattr(copying, "CANDIDATES", 4)
    training = draw_patients(6, 1)
    cases = [i // SLICES for i in range(len(training))]
    scores = [
        find_copies(training[:1].flip(3), lambda i: training[list(i)], len(training), cases, axis).scores
        for axis in (3, 2, None)
    ]
    assert scores[0] > max(scores[1:]) + 5


def test_patients_are_not_compared_with_their_own_slices():
    """The training slices are all equal within a patient: compared with themselves they would be exact copies."""
    training = copying.build_pyramid(draw_patients(4, 1)[::SLICES].repeat_interleave(2, 0))
    labels = torch.arange(4).repeat_interleave(2)
    matches = copying.match(copying.select(training, torch.tensor([0, 2])), labels[[0, 2]], training, labels, 2)
    assert (labels[matches.indices] != labels[[0, 2], None]).all()
    assert matches.similarities.max() < copying.MAX_SIMILARITY


@pytest.mark.parametrize("cases", [[None] * SLICES, ["case"] * SLICES, ["case", None, None]])
def test_fewer_than_two_known_patients_give_no_threshold(cases):
    training = draw_patients(1, 1)
    found = find_copies(training, lambda i: training[list(i)], len(training), cases)
    assert found.threshold == torch.inf and math.isnan(found.rate) and not found.copied.any()
    assert found.indices.tolist() == [0, 1, 2]
    assert found.distances.tolist() == [0, 0, 0]


def test_slices_of_unknown_patients_are_searched_but_do_not_calibrate():
    training = draw_patients(4, 1)
    cases = [None if i // SLICES == 1 else i // SLICES for i in range(len(training))]
    found = find_copies(training[SLICES : 2 * SLICES], lambda i: training[list(i)], len(training), cases)
    assert found.indices.tolist() == [3, 4, 5] and found.copied.all()
    assert found.rate == pytest.approx(1 / 4)  # of three patients
    labels = torch.tensor([0, copying.UNKNOWN, 1, copying.UNKNOWN, 0])
    assert sorted(copying.choose_calibrators(labels).tolist()) == [0, 2, 4]


def test_slices_without_structure_resemble_nothing():
    training = draw_patients(3, 1)
    cases = [i // SLICES for i in range(len(training))]
    found = find_copies(-torch.ones(2, 1, *SIZE), lambda i: training[list(i)], len(training), cases, 2)
    assert found.scores.isfinite().all() and not found.copied.any()


# ---------------------------------------------------------------- parts


def test_the_threshold_leaves_the_rate_by_hand():
    # 99 patients of one slice: each weighs 1/100, the new patient too. At 5 %, four may exceed the threshold.
    scores = torch.arange(99.0)
    assert calibrate(scores, torch.arange(99), 0.05) == (94.0, 0.05)
    # Three patients: no less than 1/4 can be promised, at the highest score.
    assert calibrate(torch.tensor([1.0, 5, 2, 3]), torch.tensor([0, 0, 1, 2]), 0.01) == (5.0, 0.25)
    # Two slices of one patient weigh 1/8 each: at 3/8 the highest may be exceeded.
    assert calibrate(torch.tensor([1.0, 5, 2, 3]), torch.tensor([0, 0, 1, 2]), 0.375) == (3.0, 0.375)


def test_new_patients_exceed_the_threshold_at_most_at_the_rate():
    """Scores that depend on the patient: 400 draws of 20 patients, 10 new slices each; 4 standard errors allowed."""
    random = torch.Generator().manual_seed(0)
    exceeded = []
    for _ in range(400):
        scores = torch.randn(21, 1, generator=random) + 0.5 * torch.randn(21, 10, generator=random)
        threshold, rate = calibrate(scores[:20].flatten(), torch.arange(20).repeat_interleave(10), 0.1)
        exceeded.append((scores[20] > threshold).float().mean())
    shares = torch.stack(exceeded)
    assert rate == 0.1
    assert 0.03 < shares.mean() < 0.1 + 4 * shares.std() / 20


def test_block_means_are_those_of_pooling():
    images = torch.rand(2, 3, 21, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(copying.block_means(images, 3), F.avg_pool2d(images, copying.BLOCK, 3))


def test_pixels_of_mirrored_slices_are_exactly_mirrored():
    """96x48 pixels are averaged from windows that are unequal and overlap."""
    slices = torch.rand(3, 1, 250, 130, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = copying.build_pyramid(slices).pixels
    for axis in (2, 3):
        assert torch.equal(copying.build_pyramid(slices.flip(axis)).pixels, pixels.flip(axis))


def test_pair_distances_by_hand():
    """Two queries and two training slices; the transform moves what comes from the right half into the left one."""
    left = torch.tensor([1.0, -1.0]).repeat_interleave(4).expand(1, 1, 8, 8)
    slices = copying.Pyramid(torch.cat([left, -left, 0.5 * left]).half(), torch.zeros(3, 1, 1, 1))
    views, indices = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 2], [0, 2]])
    pairs = copying.Pairs(views, indices, torch.tensor([[True, True], [True, False]]))
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(2, 2, -1, -1)
    found = copying.pair_distances(slices, slices, pairs, mirror)
    assert found.tolist() == [[0, 0.5], [0, torch.inf]]
    unmoved = torch.eye(2, 3).expand(2, 2, -1, -1)
    assert copying.pair_distances(slices, slices, pairs, unmoved).tolist() == [[0, 0.5], [2, torch.inf]]


def test_a_window_holds_the_blocks_inside_it():
    # Four rows and three columns of blocks that are a quarter and a half of the sides; a third of one may stand out.
    members = copying.window_members((4, 3), (0.25, 0.5), torch.device("cpu")).unflatten(1, (4, 3))
    bounds = copying.window_bounds(torch.device("cpu")).tolist()
    assert members[0].all()
    upper_left = members[bounds.index([0, 0.5, 0, 0.5])]
    assert upper_left.nonzero().tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("size", [(96, 48), (48, 96), (64, 64), (40, 20), (256, 40)])
def test_registration_recovers_an_affine_map(size):
    random = torch.Generator().manual_seed(3)
    moving = copying.gaussian_blur(torch.randn(2, 1, *size, generator=random), 2)
    angle, height, width = torch.tensor(0.08), *size
    true = torch.stack(
        [
            torch.stack([1.05 * angle.cos(), -angle.sin() * height / width, torch.tensor(0.04)]),
            torch.stack([angle.sin() * width / height, 0.97 * angle.cos(), torch.tensor(-0.03)]),
        ]
    ).expand(2, -1, -1)
    slices = [copying.build_pyramid(of) for of in (align(moving, true), moving)]
    found = torch.eye(2, 3).expand(2, -1, -1)
    for level in (copying.COARSE, copying.FINE):
        found = copying.register(*map(level.details, slices), found, level)
    places = F.affine_grid(found, [2, 1, 9, 9], align_corners=False) - F.affine_grid(
        true, [2, 1, 9, 9], align_corners=False
    )
    pixels = places * torch.tensor([width, height]) / 2
    assert pixels.norm(dim=-1).mean() < 1


# ---------------------------------------------------------------- distances of whole sets


def test_cells_group_similar_slices():
    """With slices of three brightnesses, no cell mixes two of them."""
    levels = torch.tensor([-0.8, 0.0, 0.8]).repeat_interleave(30)[:, None]
    points = levels + 0.01 * torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    cells = copying.nearest_centroid(points, copying.k_means(points, copying.CELLS))
    kinds = [{*cells[start : start + 30].tolist()} for start in (0, 30, 60)]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_samples_fall_into_the_cells_of_similar_training_slices(monkeypatch):
    monkeypatch.setattr(copying, "CANDIDATES", 1)
    monkeypatch.setattr(copying, "CELLS", 3)
    training = torch.cat([0.1 * draw_patients(3, 1) + level for level in (-0.8, 0, 0.8)])
    cases = [i // SLICES for i in range(len(training))]
    cells = find_copies(training[::SLICES], lambda i: training[list(i)], len(training), cases).cells.unflatten(
        0, (3, 3)
    )
    assert (cells == cells[:, :1]).all() and len(cells.unique()) > 1


def test_memorisation_rate_counts_samples_closer_than_every_held_out_slice():
    assert copying.memorisation_rate(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.3])) == 0.5
    assert copying.memorisation_rate(torch.tensor([0.3]), torch.tensor([0.3])) == 0


def neighbours(distances, cells=None):
    """Copies with these distances, in one cell by default."""
    distances = torch.as_tensor(distances, dtype=torch.float32)
    zeros = torch.zeros(len(distances))
    cells = (zeros if cells is None else torch.as_tensor(cells)).long()
    return Copies(zeros, cells, zeros > 0, 0.0, 0.0, zeros, zeros, distances, cells)


def test_mann_whitney_z_equals_brute_force():
    first, second = np.round(np.random.default_rng(0).random(30), 1), np.round(np.random.default_rng(1).random(20), 1)
    u = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in first for b in second)
    expected = (u - 300) / math.sqrt(30 * 20 * 51 / 12)
    assert copying.mann_whitney_z(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-9)


def test_data_copying_statistic_is_negative_for_copies_and_about_0_for_independent_draws():
    """For independent draws it is about standard normal; 4 is exceeded with a probability of 6e-5."""
    held_out = torch.rand(100) + 0.5
    lowest = -math.sqrt(3 * 100 * 80 / 181)  # U = 0

    def c_t(distances):
        return copying.data_copying_statistic(neighbours(distances), neighbours(held_out))

    assert c_t(0.1 * torch.rand(80)) == pytest.approx(lowest, rel=1e-6)
    assert c_t(2 + torch.rand(80)) == pytest.approx(-lowest, rel=1e-6)
    assert abs(c_t(torch.rand(80) + 0.5)) < 4
    assert c_t(held_out) == 0


def test_data_copying_statistic_finds_copies_within_a_cell():
    """Without cells, samples far from all training slices would hide the copies of another kind (Meehan et al.)."""
    cells, held_cells = [0] * 40 + [1] * 60, [0] * 50 + [1] * 30 + [2] * 10
    samples = neighbours(torch.cat([0.1 * torch.rand(40), 2 + torch.rand(60)]), cells)
    held_out = neighbours(torch.cat([0.5 + torch.rand(50), 1.5 + torch.rand(30), torch.zeros(10)]), held_cells)
    z = [
        copying.mann_whitney_z(samples.distances[a:b], held_out.distances[c:d])
        for a, b, c, d in ((0, 40, 0, 50), (40, 100, 50, 80))
    ]
    assert z[0] < -8 < 0 < z[1]
    assert copying.data_copying_statistic(samples, held_out) == pytest.approx((50 * z[0] + 30 * z[1]) / 80, rel=1e-9)
    few = neighbours(samples.distances[30:50], cells[30:50])  # ten per cell: too few
    together = copying.mann_whitney_z(few.distances, held_out.distances)
    assert copying.data_copying_statistic(few, held_out) == pytest.approx(together, rel=1e-9)


def test_duplicates_are_more_alike_than_any_two_patients():
    reference, slices = draw_patients(20, 1), draw_patients(8, 51)
    cases = [i // SLICES for i in range(len(reference))]
    assert copying.duplicate_rate(slices, [i // SLICES for i in range(len(slices))], reference, cases) == 0
    first = slices[::SLICES]  # of eight patients
    pairs = torch.cat([first, faults.add_noise(first, 0.02)])
    assert copying.duplicate_rate(pairs, range(16), reference, cases) == 1
    assert copying.duplicate_rate(pairs, [*range(8)] * 2, reference, cases) == 0  # not compared
    assert copying.duplicate_rate(pairs[:10], range(10), reference, cases) == pytest.approx(0.4)
    assert math.isnan(copying.duplicate_rate(slices, range(24), reference, ["a"] * len(reference)))
