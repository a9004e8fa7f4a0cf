"""geometry.py: resampling, the middle of the body, and cropping keep every feature at its physical point."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from geometry import blur, body_masks, body_middle, crop_or_pad, resample, resampled_size
from nifti import RawImage

TURN = np.array([[0.940, -0.342, 0], [0.337, 0.925, -0.174], [0.059, 0.163, 0.985]])


def grid(rows, columns):
    """The affine of oblique slices with pixels of rows x columns mm."""
    return nib.affines.from_matvec(TURN @ np.diag([-rows, columns, 3]), [11, -20, 30])


def dots(shape, affine, points):
    """A slice with a Gaussian of 4 mm at each physical point, sampled exactly at the centres of pixels."""
    places = apply_affine(affine, np.stack([*np.indices(shape), np.zeros(shape)], -1))
    distances = np.linalg.norm(places[..., None, :] - points, axis=-1)
    return RawImage(np.exp(-(distances**2) / 32).sum(-1).astype(np.float32), affine, "00000001")


def centre_of(image, affine):
    """The physical point at the centre of the brightness."""
    places = apply_affine(affine, np.stack([*np.indices(image.shape), np.zeros(image.shape)], -1))
    return (places * image[..., None]).sum((0, 1)) / image.sum()


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("pixel_size", [0.4, 0.7, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("spacing", [(0.8, 0.9), (0.45, 1.2), (1.5, 1.5)])
def test_a_feature_keeps_its_physical_point(spacing, pixel_size):
    """Within a hundredth of a millimetre, also far from the centre."""
    affine, shape = grid(*spacing), (131, 90)
    for share in ((0.5, 0.5), (0.3, 0.7), (0.7, 0.35)):
        point = apply_affine(affine, [share[0] * shape[0], share[1] * shape[1], 0])
        given = dots(shape, affine, point[None])
        made = resample(given, pixel_size)
        np.testing.assert_allclose(centre_of(made.image, made.affine), centre_of(*given[:2]), atol=0.01)
        np.testing.assert_allclose(centre_of(made.image, made.affine), point, atol=0.02)


@pytest.mark.parametrize("pixel_size", [0.5, 1.1, 2.0])
def test_pixels_are_square_and_the_slice_stays_in_its_plane_and_about_its_centre(pixel_size):
    affine, shape = grid(0.8, 0.9), (64, 47)
    made = resample(dots(shape, affine, np.zeros((1, 3))), pixel_size)
    np.testing.assert_allclose(nib.affines.voxel_sizes(made.affine), [pixel_size, pixel_size, 3], rtol=1e-3)
    np.testing.assert_allclose(made.affine[:, 2], affine[:, 2])
    extents = np.array(made.image.shape) * pixel_size
    np.testing.assert_allclose(extents, np.array(shape) * nib.affines.voxel_sizes(affine)[:2], atol=pixel_size / 2)
    centres = [
        apply_affine(a, [(h - 1) / 2, (w - 1) / 2, 0])
        for a, (h, w) in ((affine, shape), (made.affine, made.image.shape))
    ]
    np.testing.assert_allclose(*centres, atol=1e-9)
    assert made.image.shape == resampled_size(shape, affine, pixel_size)
    assert made.image.dtype == np.float32 and made.checksum == "00000001"


def test_values_of_a_smooth_slice_are_those_of_the_finer_grid():
    """The new pixels have the values that the scene has at their physical points."""
    points = apply_affine(grid(0.8, 0.9), [[40, 50, 0], [70, 30, 0], [60, 62, 0]])
    for pixel_size in (0.5, 1.0, 1.2):
        made = resample(dots((120, 100), grid(0.8, 0.9), points), pixel_size)
        expected = dots(made.image.shape, made.affine, points)
        np.testing.assert_allclose(made.image, expected.image, atol=0.02)


def test_detail_finer_than_a_pixel_is_averaged_and_not_aliased():
    stripes = np.tile(np.float32([[0], [1]]), (64, 96))  # every other row
    made = resample(RawImage(stripes, np.eye(4), ""), 3)
    np.testing.assert_allclose(made.image[2:-2], 0.5, atol=0.03)
    aliased = stripes[1::3, 1::3]
    assert np.ptp(aliased) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3)])
@pytest.mark.parametrize("pixel_size", [0.3, 0.9, 1.9])
def test_constant_slices_stay_constant_whatever_their_size(shape, pixel_size):
    made = resample(RawImage(np.full(shape, 7, np.float32), np.eye(4), ""), pixel_size)
    np.testing.assert_allclose(made.image, 7, rtol=1e-5)
    assert made.image.shape == tuple(round(side / pixel_size) for side in shape)


def test_pixels_of_the_size_asked_for_stay_as_they_are():
    given = dots((20, 30), np.diag([0.8, 0.80004, 3, 1]), np.zeros((1, 3)))
    assert resample(given, 0.8) is given


# ---------------------------------------------------------------- body


def test_blur_is_gaussian():
    picture = torch.zeros(1, 1, 41, 41)
    picture[0, 0, 20, 20] = 1
    blurred = blur(picture, 2.0)[0, 0]
    offsets = torch.arange(-20, 21.0)
    assert blurred.sum() == pytest.approx(1)
    assert (blurred.sum(0) * offsets**2).sum() == pytest.approx(4, rel=0.05)
    torch.testing.assert_close(blurred, blurred.T)


def body(shape, rows, columns, air=0.0, seed=0):
    """Noise about air, with single bright pixels, and a body of value 100 in the given rows and columns."""
    rng = np.random.default_rng(seed)
    image = air + np.abs(rng.normal(0, 3, shape))
    image[rng.random(shape) < 0.01] = 200
    image[slice(*rows), slice(*columns)] = 100
    return image.astype(np.float32)


@pytest.mark.parametrize("air", [0, -1000])
def test_the_body_is_found_among_noise(air):
    image = body((90, 80), (20, 70), (30, 60), air)
    image.flags.writeable = False  # as read from a file
    (mask,) = body_masks([image], air, 120)
    expected = np.zeros((90, 80), bool)
    expected[20:70, 30:60] = True
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    np.testing.assert_allclose([rows.min(), rows.max(), columns.min(), columns.max()], [20, 69, 30, 59], atol=2)
    assert (mask == expected).mean() > 0.97


def test_the_middle_is_that_of_all_slices_in_millimetres():
    images = [
        body((90, 80), (20, 60), (30, 60)),
        body((90, 80), (40, 80), (20, 50), seed=1),
        np.zeros((90, 80), np.float32),
    ]
    affine = np.diag([0.5, 2, 3, 1])
    middle = body_middle(body_masks(images, 0, 100), [affine] * 3)
    np.testing.assert_allclose(middle, [(50 - 45) * 0.5, (40 - 40) * 2], atol=1)


def test_without_a_body_the_middle_is_that_of_the_slice():
    assert body_middle(body_masks([np.zeros((9, 8), np.float32)], 0, 1), [np.eye(4)]).tolist() == [0, 0]


# ---------------------------------------------------------------- crop


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (12, 3), (20, 20)])
@pytest.mark.parametrize("shift", [(0, 0), (3.4, -2.6), (-4.9, 4.4)])
def test_pixels_move_by_the_corner_and_the_rest_is_filled(size, shift):
    grey = np.arange(1, 100, dtype=np.uint8).reshape(11, 9)
    pixels, corner = crop_or_pad(grey, size, 200, shift)
    assert pixels.shape == size
    for row, column in np.ndindex(*size):
        at = (row + corner[0], column + corner[1])
        inside = all(0 <= place < side for place, side in zip(at, grey.shape))
        assert pixels[row, column] == (grey[at] if inside else 200)
    for have, want, by, start in zip(grey.shape, size, shift, corner):
        assert abs((start + want / 2) - (have / 2 + by)) <= 0.5
