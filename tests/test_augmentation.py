"""augmentation.py: left-right flips, and small changes of position, size and contrast."""

import torch
import torch.nn.functional as F

from augmentation import augment, flip
from dataset import load_dataset


def test_the_chosen_slices_are_flipped():
    slices, chosen = torch.randn(5, 1, 4, 2), torch.tensor([True, False, False, True, False])
    for axis in (2, 3):
        flipped = flip(slices, axis, chosen)
        assert torch.equal(flipped[chosen], slices[chosen].flip(axis))
        assert torch.equal(flipped[~chosen], slices[~chosen])


def test_augmentation_changes_each_slice_a_little(slices_folder):
    torch.manual_seed(0)
    slices = load_dataset(str(slices_folder)).train.batch(range(12))
    augmented = augment(slices, torch.randn(12, 6))
    assert augmented.shape == slices.shape
    assert augmented.min() >= -1
    assert augmented.max() <= 1
    change = (augmented - slices).square().mean((1, 2, 3))
    other = (slices.roll(4, 0) - slices).square().mean((1, 2, 3))  # another patient's
    assert (change > 0).all()
    assert change.mean() < other.mean()
    assert len(change.unique()) == 12
    torch.testing.assert_close(augment(slices, torch.zeros(12, 6)), slices)


def test_augmentation_pads_by_reflection():
    """Slices whose edge lies within the body get no black border."""
    torch.manual_seed(0)
    parameters = 2 * torch.randn(50, 6)
    parameters[:, 5] = 0  # contrast stays
    slices = torch.full((50, 1, 32, 16), -0.5)
    torch.testing.assert_close(augment(slices, parameters), slices)
    columns = torch.linspace(-1, 1, 20).expand(1, 1, 8, 20)
    moved = augment(columns, torch.tensor([[0.0, 0, 0, 10, 0, 0]]))  # by 0.15 of the width, 3 columns
    expected = torch.cat([columns[..., 3:], columns[..., 17:].flip(3)], 3)  # a mirror image
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


def test_augmentation_does_not_blur():
    """Samples are as sharp as what the prior sees. Linear interpolation loses a quarter of this texture's edges."""
    torch.manual_seed(0)
    parameters = torch.randn(50, 6)
    parameters[:, [1, 2, 5]] = 0  # size and contrast stay
    slices = F.avg_pool2d(torch.rand(50, 1, 66, 34), 3, 1)

    def edges(slices):
        return (slices[..., 12:52, 13:20] - slices[..., 12:52, 12:19]).abs().mean()

    assert 0.85 < edges(augment(slices, parameters)) / edges(slices) < 1


def test_augmentation_strength_scales_displacements():
    """A bright dot off the centre: its displacement by rotation, shift and scaling is proportional to the strength."""
    slices = torch.full((400, 1, 32, 64), -1.0)
    slices[:, :, 16, 56] = 1

    def places(strength):
        torch.manual_seed(0)
        light = (augment(slices, strength * torch.randn(400, 6))[:, 0] + 1).double()
        light = light / light.sum((1, 2), keepdim=True)
        rows = (light.sum(2) * torch.arange(32)).sum(1)
        columns = (light.sum(1) * torch.arange(64)).sum(1)
        return rows, columns

    # A turn of 0.06 rad at 24 pixels is 1.4 rows, a shift 0.5 of 32 rows: 1.5 in all. A stretch of 5 % is 1.2 columns,
    # a shift 1 of 64: 1.6. Standard deviations of 400 draws lie within 15 % (four times their error of 3.5 %).
    rows, columns = places(1.0)
    assert abs(rows.std() / 1.52 - 1) < 0.15
    assert abs(columns.std() / 1.55 - 1) < 0.15
    weak_rows, weak_columns = places(0.25)
    assert abs(weak_rows.std() / rows.std() - 0.25) < 0.05
    assert abs(weak_columns.std() / columns.std() - 0.25) < 0.05
