"""intensity.py: the values that become black and white, for volumes with a known body."""

import numpy as np
import pytest

from files import Reading
from intensity import Limits, bright_values, to_grey, volume_limits, z_score_limits

ZSCORE = Reading(intensity="zscore")


def volume(seed=0, air=0.0):
    """Two slices of air with a body of mean 300 and standard deviation 40, and the masks of the body."""
    rng = np.random.default_rng(seed)
    masks = [np.zeros((60, 50), bool) for _ in range(2)]
    images = []
    for mask in masks:
        mask[10:50, 5:45] = True
        images.append(np.where(mask, rng.normal(300, 40, mask.shape), air).astype(np.float32))
    return images, masks


def limits_of(reading, images, masks):
    return volume_limits(images, masks, bright_values(images), reading)


def test_the_percentile_is_numpys():
    images, _ = volume()
    expected = np.percentile(np.stack(images), 99.5)
    assert limits_of(Reading(), images, []) == (0, pytest.approx(expected, rel=1e-6))


def test_a_z_score_of_3_becomes_white_and_of_minus_3_black():
    images, masks = volume()
    body = np.concatenate([image[mask] for image, mask in zip(images, masks)]).astype(float)
    low, high = limits_of(ZSCORE, images, masks)
    assert (low, high) == pytest.approx((body.mean() - 3 * body.std(), body.mean() + 3 * body.std()))
    grey = to_grey(np.float32([[body.mean() + z * body.std() for z in (-5, -3, 0, 1.5, 3, 9)]]), Limits(low, high))
    np.testing.assert_allclose(grey, [[0, 0, 127.5, 191.25, 255, 255]], atol=1)


@pytest.mark.parametrize(("slope", "inter"), [(1, 0), (37.5, 0), (0.001, 0), (2, -1024)])
def test_z_scores_do_not_depend_on_slope_and_intercept(slope, inter):
    images, masks = volume()
    changed = [(image * np.float32(slope) + np.float32(inter)).astype(np.float32) for image in images]
    expected, grey = (
        [to_grey(image, limits_of(ZSCORE, own, masks)).astype(int) for image in own] for own in (images, changed)
    )
    np.testing.assert_allclose(grey, expected, atol=1)


@pytest.mark.parametrize("value", [0, 5, -1000])
def test_without_a_body_of_several_values_the_percentile_counts(value):
    images = [np.full((30, 20), value, np.float32)]
    for masks in ([np.zeros((30, 20), bool)], [np.ones((30, 20), bool)]):
        assert z_score_limits(images, masks) is None
        assert limits_of(ZSCORE, images, masks) == limits_of(Reading(), images, masks)


def test_limits_of_extreme_values_are_finite():
    largest = np.finfo(np.float32).max
    images = [np.float32([[-largest, largest], [largest, -largest]])]
    low, high = limits_of(ZSCORE, images, [np.ones((2, 2), bool)])
    with np.errstate(over="raise"):
        assert np.isfinite([low, high, high - low]).all() and high > low
        assert to_grey(images[0], Limits(low, high)).tolist() == [[0, 255], [255, 0]]


def test_a_window_is_that_of_every_volume():
    reading = Reading(intensity="window", window=(-160, 240))
    limits = limits_of(reading, *volume())
    assert limits == (-160, 240) and limits.low.dtype == np.float32
    grey = to_grey(np.float32([[-1000, -160, 40, 240, 3000]]), limits)
    assert grey.tolist() == [[0, 0, 128, 255, 255]] and grey.dtype == np.uint8
