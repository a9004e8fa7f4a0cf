"""Coherence on toy bodies, and its parts against values derived by hand."""

import numpy as np
import pytest
import torch

import anatomy
import faults
from anatomy import Collages, Matcher, Reference, blend, cut_blocks, gather_pool, tail_test

SIZE = (32, 16)
PATIENTS, HEIGHTS = 40, 6


def toy_slices(patients, seed):
    """Bodies of one width and brightness per patient, with two equal bones in front: patients differ, sides do not."""
    random = torch.Generator().manual_seed(seed)
    y, x = ((torch.arange(side) + 0.5) * 2 / side - 1 for side in SIZE)
    y, x = y[:, None], x[None]
    slices = []
    for wide, bright, bone in torch.rand(patients, 3, generator=random).tolist():
        for height in range(HEIGHTS):
            body = (y / (0.6 + 0.35 * wide)) ** 2 + (x / 0.85) ** 2 < 1
            bones = (y.abs() - 0.35) ** 2 + (x + 0.3) ** 2 < (0.1 + 0.02 * height + 0.12 * bone) ** 2
            slices.append(torch.where(body, torch.where(bones, 0.9, -0.6 + 0.8 * bright), -1.0))
    noise = 0.03 * torch.randn(len(slices), *SIZE, generator=random)
    cases = [f"case_{patient}" for patient in range(patients) for _ in range(HEIGHTS)]
    positions = np.tile(np.linspace(0, 1, HEIGHTS), patients)
    return (torch.stack(slices) + noise).clamp(-1, 1)[:, None], positions, cases


@pytest.fixture(scope="module")
def training():
    return toy_slices(PATIENTS, 0)


@pytest.fixture(scope="module")
def held_out():
    return toy_slices(10, 1)


def auc(good, bad):
    return ((good[:, None] > bad).double() + (good[:, None] == bad).double() / 2).mean().item()


# ---------------------------------------------------------------- pictures and collages


def test_blend_takes_each_pixel_from_the_donor_with_the_largest_field():
    donors, fields = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 8, 6)
    expected = np.take_along_axis(donors.numpy(), fields.argmax(1, keepdim=True).numpy(), 1)
    np.testing.assert_array_equal(blend(donors, fields), expected)


def test_feathered_seams_change_nothing_far_away():
    donors = torch.stack([torch.full((32, 8), -1.0), torch.full((32, 8), 1.0)])[None]
    joined = blend(donors, anatomy.cut_fields(donors.shape, 2, torch.zeros(1), torch.zeros(1)), 2.0)[0, 0, :, 3]
    assert joined[:8].tolist() == [-1] * 8 and joined[-8:].tolist() == [1] * 8
    assert -1 < joined[15] < 0 < joined[16] < 1
    assert (joined.diff() >= -1e-6).all()


def test_shuffled_patches_are_the_same_pixels(training):
    slices = training[0][:5]
    shuffled = anatomy.shuffle_patches(slices, 8, torch.Generator().manual_seed(0))
    assert not torch.equal(shuffled, slices)
    assert torch.equal(shuffled.flatten(1).sort().values, slices.flatten(1).sort().values)
    corners = {tuple(patch.flatten().tolist()) for patch in slices[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1)}
    assert tuple(shuffled[0, 0, 8:16, 8:16].flatten().tolist()) in corners


@pytest.mark.parametrize("side", [7, 8])
def test_repeated_sides_are_symmetric_about_the_middle(side):
    slices = torch.randn(2, 1, side, 5)
    mirrored = anatomy.repeat_side(slices, 2, True)
    assert torch.equal(mirrored, mirrored.flip(2))
    assert torch.equal(mirrored[:, :, : (side + 1) // 2], slices[:, :, : (side + 1) // 2])
    repeated = anatomy.repeat_side(slices, 2, False)
    assert torch.equal(repeated[:, :, -(side // 2) :], slices[:, :, : side // 2])


def test_pool_reads_once_keeps_every_few_and_ranks_heights(monkeypatch):
    monkeypatch.setattr(anatomy, "MAX_TRAINING", 5)
    slices = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 1, *SIZE) / 127.5 - 1
    positions = np.array([0.9, np.nan, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
    pool = gather_pool(iter(slices.split(4)), positions, np.arange(9))
    assert pool.slices[:, 0, 0, 0].tolist() == pool.patients.tolist() == [0, 2, 4, 6, 8]
    assert pool.heights.tolist() == [0.8, 0.0, 0.2, 0.4, 0.6]


def test_reduced_slices_keep_their_shape_and_mean():
    assert anatomy.working_size((256, 128)) == (80, 40)
    assert anatomy.working_size(SIZE) == SIZE
    ramp = torch.linspace(-1, 1, 256)[None, None, :, None].expand(1, 1, 256, 128)
    reduced = anatomy.reduce(ramp).float() / 127.5 - 1
    assert reduced.shape == (1, 1, 80, 40)
    torch.testing.assert_close(reduced[0, 0, 1:-1, 0], torch.linspace(-0.9875, 0.9875, 80)[1:-1], atol=0.012, rtol=0)


def test_donors_are_of_other_patients_and_like_height(training):
    slices, positions, cases = training
    patients = np.repeat(np.arange(PATIENTS), HEIGHTS)
    pool = gather_pool([torch.zeros_like(slices)], positions, patients)
    # Pixels tell patient and height: the grey level is the index of the slice.
    pool = pool._replace(slices=torch.arange(len(slices), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
    donors = ((Collages(pool, 2, 0).donors(50, 3)[:, :, 0, 0] + 1) * 127.5).round().long().numpy()
    assert (patients[donors[:, :1]] != patients[donors[:, 1:]]).all()
    assert np.abs(pool.heights[donors[:, :1]] - pool.heights[donors[:, 1:]]).max() < 0.06


@pytest.mark.parametrize("flip_axis", [2, 3, None])
def test_collages_and_variations_are_slices(training, flip_axis):
    slices, positions, _ = training
    pool = gather_pool([slices], positions, np.repeat(np.arange(PATIENTS), HEIGHTS))
    drawn = Collages(pool, flip_axis, 0).draw(64)
    assert drawn.shape == (64, 1, *SIZE)
    varied = anatomy.vary(drawn, flip_axis, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert varied.shape == drawn.shape and varied.min() >= -1 and varied.max() <= 1
    # Slices stay in their places: labels go by place.
    assert (varied - drawn).square().mean((1, 2, 3)).median() < 0.1


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("flip_axis", [2, 3])
def test_blocks_of_a_symmetric_slice_are_equal_on_both_sides(flip_axis):
    size = (18, 8) if flip_axis == 2 else (8, 18)
    slices = anatomy.repeat_side(torch.randn(2, 1, *size), flip_axis, True)
    parts = cut_blocks(slices, flip_axis)
    assert set(parts) == set(anatomy.BLOCKS)
    outer_front = slices[:, :, :4, :4]
    outer_back = slices[:, :, :4, 4:] if flip_axis == 2 else slices[:, :, 4:, :4]
    inner_front = slices[:, :, 4:8, :4] if flip_axis == 2 else slices[:, :, :4, 4:8]
    for name, expected in {"of": outer_front, "ob": outer_back, "if": inner_front}.items():
        assert torch.equal(parts["1" + name], expected) and torch.equal(parts["2" + name], expected)


def test_every_match_divides_blocks_without_overlap():
    for first, second in anatomy.MATCHES:
        assert len(first) == len(second) and not set(first) & set(second)
    assert len(anatomy.WEIGHTS) == 1 + len(anatomy.MATCHES)


def test_matcher_sees_each_part_alone():
    matcher = Matcher(SIZE, 2).eval()
    slices = torch.randn(3, 1, *SIZE)
    changed = slices.clone()
    changed[:, :, SIZE[0] // 2 :] = 0
    (first, second), *_ = matcher(slices)
    (first_again, second_changed), *_ = matcher(changed)
    torch.testing.assert_close(first, first_again)
    assert (second - second_changed).abs().max() > 0.01
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))


def test_matching_logits_do_not_depend_on_the_side():
    matcher = Matcher(SIZE, 2).eval()
    slices = torch.randn(3, 1, *SIZE)
    logits, flipped = matcher.logits(slices), matcher.logits(slices.flip(2))
    torch.testing.assert_close(logits[:, [0, 2, 3, 4]], flipped[:, [0, 2, 3, 4]])
    torch.testing.assert_close(logits[:, [5, 6, 8, 9]], flipped[:, [6, 5, 9, 8]])


# ---------------------------------------------------------------- scores and test


def test_matches_that_are_too_good_count_as_bad():
    reference = torch.linspace(0, 1, 101)[:, None].expand(101, len(anatomy.WEIGHTS))
    middle, low, high = (
        anatomy.combine(reference, torch.full((1, len(anatomy.WEIGHTS)), value)) for value in (0.5, 0.001, 1.5)
    )
    assert low < middle and high < middle
    judge_alone = torch.full((1, len(anatomy.WEIGHTS)), 0.5)
    judge_alone[0, 0] = 1.5
    assert anatomy.combine(reference, judge_alone) > middle


def references_of(patient_effect, patients=40, slices=10, seed=0):
    """Two references without networks; ranks vary with the patient by `patient_effect`, from 0 to 1."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        common = np.repeat(rng.standard_normal(patients), slices)
        values = torch.from_numpy(patient_effect * common + (1 - patient_effect) * rng.standard_normal(len(common)))
        ranks = anatomy.ranks_among(values.sort().values, values)
        made.append(Reference(None, None, values, values.sort().values, ranks, np.repeat(np.arange(patients), slices)))
    return [made[0], made[1]._replace(patients=made[1].patients + patients)]


def test_a_tenth_of_bad_slices_is_called_and_a_perfect_set_is_not(monkeypatch):
    monkeypatch.setattr(anatomy, "DRAWS", 1000)
    references = references_of(0.5)
    p_perfect, p_tenth = [], []
    for seed in range(40):
        ranks = torch.rand(200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        perfect = tail_test(ranks, range(200), references, seed)
        p_perfect.append(perfect.p_value(perfect.share))
        ranks[:20] = 0.01
        tenth = tail_test(ranks, range(200), references, seed)
        assert tenth.share >= 0.1 and (tenth.low[:20] == 1).all()
        p_tenth.append(tenth.p_value(tenth.share))
    # False alarms are binomial (40, 0.05) at most: more than 7 occur with probability 0.001.
    assert (np.array(p_perfect) < 0.05).sum() <= 7
    assert np.median(p_tenth) < 0.01


def test_slices_of_one_patient_count_as_one(monkeypatch):
    monkeypatch.setattr(anatomy, "TAIL", 0.05)
    references = references_of(0.95)
    ranks = torch.full((10, 2), 0.5, dtype=torch.float64)
    ranks[:5] = 0.01
    of_one, of_many = (tail_test(ranks, cases, references, 0) for cases in (["a"] * 10, range(10)))
    assert of_one.share == of_many.share == 0.5
    assert of_one.p_value(0.5) > 0.02  # such a patient is one of about twenty
    assert of_many.p_value(0.5) < 0.002


def test_no_network_judges_patients_it_learned_from(training, held_out, monkeypatch):
    learned = []

    def record(pool, *_):
        learned.append(set(pool.patients.tolist()))
        return anatomy.Judge(2).eval()

    def record_reference(pool, half, *arguments):
        made = make_reference(pool, half, *arguments)
        assert not learned[-1] & set(made.patients.tolist())
        return made

    make_reference = anatomy.make_reference
    monkeypatch.setattr(anatomy, "train_judge", record)
    monkeypatch.setattr(anatomy, "MATCHER_UPDATES", 1)
    monkeypatch.setattr(anatomy, "make_reference", record_reference)
    slices, positions, cases = training
    anatomy.coherence(slices.split(50), positions, cases, {"held out": held_out[0]}, 2)
    assert len(learned) == 2 and not learned[0] & learned[1] and learned[0] | learned[1] == set(range(PATIENTS))


def test_faults_score_below_slices_of_unseen_patients(training, held_out, monkeypatch):
    monkeypatch.setattr(anatomy, "JUDGE_UPDATES", 40)
    monkeypatch.setattr(anatomy, "MATCHER_UPDATES", 60)
    (slices, positions, cases), (real, heights, patients) = training, held_out
    originals = faults.Originals(real, heights, patients)
    groups = {
        "real": real,
        "upside down": faults.upside_down(originals),
        "halves": faults.halves(originals),
        "shuffled": faults.shuffled(originals, side=4),
    }
    found = anatomy.coherence(slices.split(50), positions, cases, groups, 2, {"real": patients})
    for name in groups:
        assert found.scores[name].shape == (60,) and found.scores[name].min() > 0 and found.scores[name].max() < 1
    assert 0.3 < found.scores["real"].mean() < 0.7
    assert auc(found.scores["real"], found.scores["upside down"]) > 0.9
    assert auc(found.scores["real"], found.scores["shuffled"]) > 0.9
    assert auc(found.scores["real"], found.scores["halves"]) > 0.75
    bad, good = found.tails["upside down"], found.tails["real"]
    assert bad.p_value(bad.share) < 0.01 < good.p_value(good.share)


@pytest.mark.parametrize("cases", [[None] * 16, ["a"] * 16, ["a"] * 8 + [None] * 8, list(range(16))])
def test_few_slices_unknown_patients_and_no_mirror_axis(cases, monkeypatch):
    monkeypatch.setattr(anatomy, "JUDGE_UPDATES", 1)
    monkeypatch.setattr(anatomy, "MATCHER_UPDATES", 1)
    slices = torch.rand(16, 1, 16, 16) * 2 - 1
    found = anatomy.coherence([slices], np.full(16, np.nan), cases, {"all": slices}, None)
    assert torch.isfinite(found.scores["all"]).all()
    again = anatomy.coherence(slices.split(7), np.full(16, np.nan), cases, {"all": slices}, None)
    assert torch.equal(again.scores["all"], found.scores["all"])
    with pytest.raises(ValueError, match="too few"):
        anatomy.coherence([slices[:7]], np.zeros(7), cases[:7], {"all": slices}, None)
