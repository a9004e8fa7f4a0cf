"""volumes.py: the axis of slices, their orientation and their affines, against nibabel."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from slice_files import picture

from nifti import RawImage
from volumes import cut_volume, plan_stack

SHAPE = (9, 7, 5)
# Voxels of 0.8 x 0.9 x 3 mm on axes turned by 20 and 10 degrees.
TURN = np.array([[0.940, -0.342, 0], [0.337, 0.925, -0.174], [0.059, 0.163, 0.985]])
OBLIQUE = nib.affines.from_matvec(TURN @ np.diag([-0.8, 0.9, 3]), [11, -20, 30])
ORDERS = ["".join(codes) for order in permutations(("LR", "AP", "IS")) for codes in product(*order)]


def stored(codes) -> RawImage:
    """The same volume, stored in another order of axes."""
    image = nib.Nifti1Image(picture(1, SHAPE), OBLIQUE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(OBLIQUE), nib.orientations.axcodes2ornt(codes))
    turned = image.as_reoriented(turn)
    return RawImage(np.asarray(turned.dataobj), turned.affine, "00000001")


def test_there_are_48_orders():
    assert len(set(ORDERS)) == 48


@pytest.mark.parametrize("codes", ORDERS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_the_same_in_whatever_order_the_volume_is_stored(codes, axis):
    expected, slices = cut_volume(stored("LPS"), axis), cut_volume(stored(codes), axis)
    assert len(slices) == len(expected) == SHAPE[axis]
    for one, other in zip(slices, expected):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
        assert one.image.flags.c_contiguous and one.checksum == other.checksum


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SAL"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_each_pixel_keeps_its_physical_point(codes, axis):
    """The voxel that is stored at the point of a pixel has its value."""
    volume = stored(codes)
    stack = plan_stack(volume.image.shape, volume.affine, axis)
    seen = set()
    for image, affine, _ in cut_volume(volume, stack.axis):
        assert image.shape == stack.size
        for row, column in np.ndindex(*image.shape):
            point = apply_affine(affine, (row, column, 0))
            voxel = apply_affine(np.linalg.inv(volume.affine), point)
            np.testing.assert_allclose(voxel, np.rint(voxel), atol=1e-4)
            index = tuple(np.rint(voxel).astype(int).tolist())
            assert image[row, column] == volume.image[index]
            seen.add(index)
    assert len(seen) == volume.image.size


@pytest.mark.parametrize(("axis", "codes"), [(0, "PIL"), (1, "LIP"), (2, "LPS")])
def test_slices_lie_as_figures_show_them(axis, codes):
    """Figures show the second axis downwards: the back in axial slices, the feet in the others."""
    for order in ("LPS", "RAS", "PIR"):
        volume = stored(order)
        for one in cut_volume(volume, axis):
            assert "".join(nib.aff2axcodes(one.affine)) == codes
    spacing = dict(zip("LPS", (0.8, 0.9, 3))) | {"I": 3}
    sizes = nib.affines.voxel_sizes(cut_volume(stored("PIR"), axis)[2].affine)
    np.testing.assert_allclose(sizes, [spacing[code] for code in codes], rtol=1e-2)


def test_slices_agree_with_the_closest_canonical_volume():
    volume = stored("PIR")
    canonical = nib.as_closest_canonical(nib.Nifti1Image(volume.image, volume.affine)).get_fdata()  # RAS
    for index, one in enumerate(cut_volume(volume, 2)):
        np.testing.assert_array_equal(one.image, canonical[::-1, ::-1, index])


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((0.8, 0.9, 3), 2),
        ((3, 0.8, 0.8), 0),
        ((0.8, 3, 0.8), 1),
        ((1, 1, 1), 2),
        ((3, 0.8, 3), 2),
        ((3, 0.8, 2.99), 2),
        ((3, 3, 0.8), 0),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_slices_are_stacked_along_the_largest_voxels(spacing, axis, order):
    """In case of a tie along the last axis of the turned volume, from the feet up, whichever it is in the file."""
    affine, shape = np.diag([*spacing, 1.0])[:, [*order, 3]], (4, 5, 6)
    stack = plan_stack(tuple(shape[i] for i in order), affine, None)
    assert (stack.axis, stack.slices) == (axis, shape[axis])
    assert stack.size == tuple(side for i, side in enumerate(shape) if i != axis)
    for chosen in range(3):
        assert plan_stack(tuple(shape[i] for i in order), affine, chosen).axis == chosen


def test_checksums_depend_on_the_file_and_on_the_slice():
    volume = stored("LPS")
    one, other = cut_volume(volume, 2), cut_volume(volume._replace(checksum="00000002"), 2)
    assert len({slice_.checksum for slice_ in one + other}) == 10
    assert {len(slice_.checksum) for slice_ in one} == {8}
    changed = volume.image.copy()
    changed[0, 0, 3] += 1
    again = cut_volume(volume._replace(image=changed), 2)
    assert [a.checksum == b.checksum for a, b in zip(one, again)] == [True, True, True, False, True]
