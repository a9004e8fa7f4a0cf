"""Planted faults and copies against what their names say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import faults
from copying import gaussian_blur

SIZE = (64, 32)
PATIENTS, HEIGHTS = 4, 6


@pytest.fixture(scope="module")
def originals():
    """Smooth random slices; a patient's have one height each."""
    noise = torch.randn(PATIENTS * HEIGHTS, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    slices = (2 * gaussian_blur(noise, 1.5)).clamp(-1, 1)
    cases = [f"case_{patient}" for patient in range(PATIENTS) for _ in range(HEIGHTS)]
    return faults.Originals(slices, np.tile(np.linspace(0, 1, HEIGHTS), PATIENTS), cases, seed=3)


@pytest.mark.parametrize("name", faults.ANATOMY_FAULTS)
def test_faults_of_anatomy_change_every_slice_and_repeat(originals, name):
    fault = faults.ANATOMY_FAULTS[name]
    planted = fault(originals)
    assert planted.shape == originals.slices.shape and planted.min() >= -1 and planted.max() <= 1
    assert ((planted - originals.slices).abs().amax((1, 2, 3)) > 0.05).all()
    assert torch.equal(planted, fault(originals))


@pytest.mark.parametrize("name", faults.COPIES)
def test_copies_keep_size_and_range_and_resemble_their_source(originals, name):
    others = originals.slices.roll(HEIGHTS, 0)
    copied = faults.COPIES[name](originals, others)
    assert copied.shape == originals.slices.shape
    assert copied.min() >= -1 - 1e-6 and copied.max() <= 1 + 1e-6
    assert (copied - originals.slices).abs().max() > 0.01 or name == "exact"


def test_faults_of_texture_have_their_strength(originals):
    slices = 0.9 * originals.slices
    texture = faults.TEXTURE_FAULTS.items()
    deviations = {name: fault(originals._replace(slices=slices)) - slices for name, fault in texture}
    for name in ("noise 0.01", "noise 0.02", "noise 0.05"):
        assert deviations[name].std() == pytest.approx(float(name.split()[1]), rel=0.05)
    board = deviations["chequerboard 0.02"]
    torch.testing.assert_close(board.abs(), torch.full_like(board, 0.02), atol=1e-6, rtol=0)
    assert (board[..., 1:] * board[..., :-1] < 0).all() and (board[..., 1:, :] * board[..., :-1, :] < 0).all()
    torch.testing.assert_close(deviations["brighter by 5 %"], 0.05 * (slices + 1), atol=1e-5, rtol=0)


def test_faults_of_variety_repeat_slices(originals):
    twice, upper = (fault(originals) for fault in faults.VARIETY_FAULTS.values())
    half = PATIENTS * HEIGHTS // 2
    assert torch.equal(twice[:half], originals.slices[:half]) and torch.equal(twice[half:], twice[:half])
    numbers = [next(i for i, own in enumerate(originals.slices) if torch.equal(own, drawn)) for drawn in upper]
    assert set(numbers) == set(np.flatnonzero(originals.positions > 0.5))


def test_halves_are_of_two_patients_of_one_height(originals):
    planted, slices = faults.halves(originals), originals.slices
    middle = SIZE[0] // 2
    assert torch.equal(planted[:, :, :middle], slices[:, :, :middle])
    for index, own in enumerate(planted):
        (source,) = [i for i, other in enumerate(slices) if torch.equal(own[:, middle:], other[:, middle:])]
        assert originals.cases[source] != originals.cases[index]
        assert originals.positions[source] == originals.positions[index]


def test_sides_lie_along_the_given_axis(originals):
    turned = originals._replace(slices=originals.slices.transpose(2, 3), side_axis=3)
    for fault in (faults.upside_down, faults.one_side, faults.halves):
        assert torch.equal(fault(turned), fault(originals).transpose(2, 3))


# ---------------------------------------------------------------- alterations


def test_move_shifts_turns_and_stretches_about_the_centre(originals):
    slices = originals.slices[:1]
    inner = (..., slice(8, -8), slice(8, -8))
    torch.testing.assert_close(
        faults.move(slices, (3, -2))[inner], slices.roll((3, -2), (2, 3))[inner], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(faults.move(slices, degrees=180), slices.flip(2, 3), atol=1e-4, rtol=0)
    y = torch.linspace(-1, 1, SIZE[0]).view(1, 1, -1, 1).expand(1, 1, *SIZE)
    torch.testing.assert_close(
        faults.move(y, stretch=(1.25, 1))[..., 8:-8, :], y[..., 8:-8, :] / 1.25, atol=1e-2, rtol=0
    )


def test_parts_come_from_the_slices_named():
    slices, others = torch.zeros(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    assert faults.join_halves(slices, others, 2)[0, 0, :, 0].tolist() == [0] * 32 + [1] * 32
    assert faults.join_halves(slices, others, 3)[0, 0, 0].tolist() == [0] * 16 + [1] * 16
    disc = faults.paste_disc(slices, others, 10)
    assert (SIZE[0] * SIZE[1] - disc.sum()).item() == pytest.approx(torch.pi * 100, rel=0.02)


def test_intensity_and_shape_change_by_the_amount_given(originals):
    slices = originals.slices[:1]
    torch.testing.assert_close(faults.change_gamma(slices, 1), slices)
    assert faults.brighten(torch.zeros(1, 1, 4, 4), 0.5).unique().item() == -0.5
    assert torch.equal(faults.bend(slices, 1, seed=2), faults.bend(slices, 1, seed=2))
    assert not torch.allclose(faults.bend(slices, 1, seed=2), faults.bend(slices, 1, seed=3), atol=0.01)
    torch.testing.assert_close(faults.bend(slices, 0), slices, atol=1e-5, rtol=0)


def test_augmentation_0_changes_nothing(originals):
    torch.testing.assert_close(faults.vary(originals.slices, 0), originals.slices, atol=1e-4, rtol=0)
    assert F.mse_loss(faults.vary(originals.slices, 1), originals.slices) > 0.001
