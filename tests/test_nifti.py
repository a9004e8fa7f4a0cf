"""nifti.py: pixels, affines and checks of a single file, against nibabel."""

import gzip
import os
import tracemalloc
import warnings
import zlib

import nibabel as nib
import numpy as np
import pytest
from mutated_files import member
from slice_files import AFFINE, big_endian, changed, message, picture, write

import nifti
from nifti import RawImage


def read(path) -> RawImage:
    """Read a file as it is now."""
    stat = os.stat(path)
    return nifti.read_image(path, stat.st_size, stat.st_mtime_ns)


# ---------------------------------------------------------------- pixels

OBLIQUE = np.array([[0.7, 0.2, 0.3, 1], [-0.2, 0.9, 0.1, 2], [0.1, 0.1, 3, 3], [0, 0, 0, 1]])


def with_slope(image, affine):
    written = nib.Nifti1Image(image, affine)
    written.header.set_data_dtype(np.int16)
    written.header.set_slope_inter(0.25, -3)
    return written


def with_qform(image, affine):
    written = nib.Nifti1Image(image, None)
    written.set_qform(affine, 1)
    return written


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("a.nii", np.float32, nib.Nifti1Image),
        ("a.nii.gz", np.float32, nib.Nifti1Image),
        ("a.nii.gz", np.float64, nib.Nifti1Image),
        ("a.nii", np.uint8, nib.Nifti1Image),
        ("a.nii.gz", np.int32, nib.Nifti2Image),
        ("a.nii", np.float32, nib.Nifti2Image),
        ("a.nii.gz", np.float32, big_endian),
        ("a.nii", np.int16, big_endian),
        ("a.nii.gz", np.float32, with_slope),
        ("a.nii", np.float32, with_qform),
    ],
)
def test_values_and_affine_agree_with_nibabel(tmp_path, name, dtype, kind):
    path = write(tmp_path / name, picture(3).astype(dtype), kind=kind)
    expected, (image, affine, _) = nib.load(path), read(path)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(affine, expected.affine, rtol=1e-6)


def test_header_extensions_and_gzip_members_are_read(tmp_path):
    image = nib.Nifti1Image(picture(3), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanned " * 100))
    plain = write(tmp_path / "plain.nii")
    nib.save(image, plain)
    raw = plain.read_bytes()
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]) + b"\0" * 100)
    np.testing.assert_array_equal(read(plain).image, picture(3))
    np.testing.assert_array_equal(read(tmp_path / "members.nii.gz").image, picture(3))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((1, 8, 6), (1, 2)), ((8, 1, 6), (0, 2)), ((8, 6, 1), (0, 1)), ((1, 8, 6, 1), (1, 2)), ((8, 1, 6, 1, 1), (0, 2))],
)
def test_a_thin_axis_is_dropped_and_pixels_keep_their_coordinates(tmp_path, shape, axes):
    path = write(tmp_path / "a.nii", picture(1).reshape(shape), OBLIQUE)
    theirs, (image, affine, _) = nib.load(path), read(path)
    np.testing.assert_array_equal(image, theirs.get_fdata().reshape(8, 6))
    for row, column in ((0, 0), (7, 0), (0, 5), (3, 2)):
        voxel = np.zeros(3)
        voxel[list(axes)] = row, column
        expected = nib.affines.apply_affine(theirs.affine, voxel)
        np.testing.assert_allclose(nib.affines.apply_affine(affine, [row, column, 0]), expected, rtol=1e-6)
    (thin,) = {0, 1, 2} - set(axes)
    np.testing.assert_allclose(affine[:, 2], theirs.affine[:, thin], rtol=1e-6)


def test_values_are_unscaled_where_the_slope_is_zero_or_nan(tmp_path):
    for slope in (0, np.nan):
        path = changed(tmp_path / "a.nii", scl_slope=slope, scl_inter=9)
        np.testing.assert_array_equal(read(path).image, picture(1))


def test_the_shape_is_read_from_the_header_alone(tmp_path):
    path = write(tmp_path / "a.nii", picture(1, (8, 1, 6)))
    path.write_bytes(path.read_bytes()[:352])
    assert nifti.read_grid(path)[0] == (8, 6)
    path.write_bytes(b"bad")
    assert nifti.read_grid(path) is None
    assert nifti.read_grid(tmp_path / "missing.nii") is None


def test_the_checksum_is_of_the_uncompressed_file(tmp_path):
    path = write(tmp_path / "a.nii", picture(1))
    zipped = tmp_path / "a.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read(path).checksum == read(zipped).checksum == f"{zlib.crc32(path.read_bytes()):08x}"


def test_an_encoded_slice_reads_back(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nifti.encode_slice(picture(1), OBLIQUE))
    assert path.read_bytes() == nifti.encode_slice(picture(1), OBLIQUE)
    image, affine, _ = read(path)
    np.testing.assert_array_equal(image, picture(1))
    np.testing.assert_allclose(affine, OBLIQUE, rtol=1e-6)
    written = nib.load(path)
    assert written.shape == (8, 6, 1) and written.get_data_dtype() == np.float32
    assert written.header.get_xyzt_units()[0] == "mm"


# ---------------------------------------------------------------- volumes and pairs


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, big_endian, with_slope, with_qform])
@pytest.mark.parametrize("shape", [(8, 6, 5), (2, 8, 6), (8, 6, 5, 1)])
def test_volumes_agree_with_nibabel(tmp_path, name, kind, shape):
    path = write(tmp_path / name, picture(3, shape), OBLIQUE, kind)
    expected, (image, affine, _) = nib.load(path), read(path)
    assert image.dtype == np.float32 and image.shape == shape[:3]
    np.testing.assert_allclose(image, expected.get_fdata().reshape(shape[:3]), rtol=1e-6)
    np.testing.assert_allclose(affine, expected.affine, rtol=1e-5)


PAIRS = [nib.Nifti1Pair, nib.Nifti2Pair]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5)])
@pytest.mark.parametrize("endings", [("hdr", "img"), ("HDR", "IMG")])
def test_pairs_agree_with_nibabel(tmp_path, kind, shape, endings):
    write(tmp_path / "a.hdr", picture(3, shape), OBLIQUE, kind)
    expected, values = nib.load(tmp_path / "a.hdr"), nib.load(tmp_path / "a.hdr").get_fdata()
    for ending, other in zip(("hdr", "img"), endings):
        (tmp_path / f"a.{ending}").rename(tmp_path / f"b.{other}")
    image, affine, _ = read_pair(tmp_path / f"b.{endings[0]}")
    np.testing.assert_allclose(image, values, rtol=1e-6)
    np.testing.assert_allclose(affine, expected.affine, rtol=1e-5)


def read_pair(path) -> RawImage:
    """Read a pair of files as they are now."""
    return nifti.read_image(path, *nifti.describe_stats([os.stat(part) for part in nifti.parts_of(path)]))


def test_the_checksum_of_a_pair_depends_on_both_files(tmp_path):
    checksums = set()
    for seed, affine in ((1, AFFINE), (2, AFFINE), (1, 2 * AFFINE)):
        checksums.add(read_pair(write(tmp_path / "a.hdr", picture(seed), affine, nib.Nifti1Pair)).checksum)
    assert len(checksums) == 3


@pytest.mark.parametrize("ending", ["hdr", "img"])
def test_a_pair_of_which_one_file_changes_is_refused(tmp_path, ending):
    path = write(tmp_path / "a.hdr", kind=nib.Nifti1Pair)
    stamp = nifti.describe_stats([os.stat(part) for part in nifti.parts_of(path)])
    os.utime(tmp_path / f"a.{ending}", ns=(0, stamp[1] + 1))
    assert message(nifti.read_image, path, *stamp).startswith("changed while it was being read")


def test_analyze_files_are_refused(tmp_path):
    """Their headers do not tell left from right."""
    path = write(tmp_path / "a.hdr", kind=lambda image, _: nib.AnalyzeImage(image, None))
    assert message(read_pair, path) == "not a NIfTI pair: Analyze headers do not tell the sides"


def test_a_truncated_pair_is_refused(tmp_path):
    path = write(tmp_path / "a.hdr", kind=nib.Nifti1Pair)
    pixels = tmp_path / "a.img"
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-1])
    assert "truncated" in message(read_pair, path)
    pixels.write_bytes(whole + b"0")
    assert "contains more than" in message(read_pair, path)


def claim(path, *shape):
    """Write a volume whose header claims another shape."""
    return changed(path, dim=[len(shape), *shape, *[1] * (7 - len(shape))])


def test_volumes_are_limited_in_size(tmp_path):
    assert "a volume may have 134217728 voxels" in reason(claim(tmp_path / "a.nii", 1024, 1024, 129))
    assert "each side must be 1 to 2048" in reason(claim(tmp_path / "b.nii", 4, 4, 2049))
    assert "truncated" in reason(claim(tmp_path / "c.nii", 512, 512, 512))


def test_a_gzip_bomb_of_a_volume_is_refused(tmp_path):
    plain = write(tmp_path / "a.nii", picture(1, (8, 6, 5))).read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(200_000_000), 1))
    assert "contains more than" in reason(path)
    path.write_bytes(gzip.compress(claim(tmp_path / "b.nii", 512, 512, 512).read_bytes()))
    assert "more than a file of" in reason(path)


@pytest.mark.parametrize(
    "affine", [np.diag([1, 1, 0, 1.0]), np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1e-5, 0], [0, 0, 0, 1.0]])]
)
def test_a_volume_whose_axes_lie_in_one_plane_is_refused(tmp_path, affine):
    raw = write(tmp_path / "a.nii", picture(1, (8, 6, 5))).read_bytes()
    header = nib.Nifti1Header(raw[:348])
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    (tmp_path / "a.nii").write_bytes(header.binaryblock + raw[348:])
    assert "affine gives voxels no volume" in reason(tmp_path / "a.nii")


# ---------------------------------------------------------------- affines


def test_the_affine_of_a_thin_slice_is_completed(tmp_path):
    path = write(tmp_path / "a.nii", picture(1, (1, 8, 6)))
    raw = path.read_bytes()
    header = nib.Nifti1Header(raw[:348])
    header["srow_x"], header["srow_y"], header["srow_z"] = [0, 2, 0, 5], [0, 0, 3, 6], [0, 0, 0, 7]
    path.write_bytes(header.binaryblock + raw[348:])
    expected = np.array([[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    np.testing.assert_allclose(read(path).affine, expected)


def test_an_empty_third_column_of_the_affine_is_completed(tmp_path):
    affine = np.array([[0, 2, 0, 5], [-0.5, 0, 0, 6], [0, 0, 0, 7], [0, 0, 0, 1.0]])
    path = changed(tmp_path / "a.nii", srow_x=affine[0], srow_y=affine[1], srow_z=affine[2])
    affine[2, 2] = 1  # both in-plane axes lie in the first two
    np.testing.assert_allclose(read(path).affine, affine)


# ---------------------------------------------------------------- bad files


def reason(path) -> str:
    """Return why a file is refused, and check that memory stays bounded and no warning is raised."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = message(read, path)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    return text


def test_truncated_files_are_refused(tmp_path):
    whole = write(tmp_path / "whole.nii.gz", picture(1, (60, 60))).read_bytes()
    for length in (0, 5, 30, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.nii.gz"
        path.write_bytes(whole[:length])
        assert "truncated" in reason(path) or length < 2
    plain = write(tmp_path / "plain.nii", picture(1, (60, 60)))
    plain.write_bytes(plain.read_bytes()[:-1])
    assert "truncated" in reason(plain)


def test_a_wrong_gzip_checksum_is_refused(tmp_path):
    path = write(tmp_path / "a.nii.gz", picture(1, (60, 60)))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 255  # in the checksum
    path.write_bytes(raw)
    assert "damaged" in reason(path)


@pytest.mark.parametrize("shape", [(8, 6, 5, 2), (8, 6, 1, 3), (1, 8, 6, 2), (1, 1, 8, 6), (1, 1, 6)])
def test_series_and_lines_are_refused(tmp_path, shape):
    assert f"shape {shape}: only 2D slices and 3D volumes are supported" in reason(
        write(tmp_path / "a.nii.gz", picture(1, shape))
    )


def test_one_dimensional_files_are_refused(tmp_path):
    assert "shape (8,): only 2D slices and 3D volumes are supported" in reason(
        write(tmp_path / "a.nii", picture(1, (8,)))
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_voxels_are_refused(tmp_path, value):
    image = picture(1)
    image[2, 3] = value
    assert "NaN, infinite" in reason(write(tmp_path / "a.nii", image))


def test_voxels_beyond_float32_are_refused(tmp_path):
    assert "beyond float32" in reason(write(tmp_path / "a.nii", picture(1).astype(np.float64) * 1e300))


def test_complex_and_rgb_voxels_are_refused(tmp_path):
    assert "complex64" in reason(write(tmp_path / "a.nii", picture(1).astype(np.complex64)))
    colour = np.zeros((8, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "RGB" in reason(write(tmp_path / "b.nii", colour))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [2, 2049, 6, 1, 1, 1, 1, 1]}, "1 to 2048"),
        ({"dim": [2, -8, 6, 1, 1, 1, 1, 1]}, "1 to 2048"),
        ({"dim": [2, 2048, 2048, 1, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [0, 8, 6, 1, 1, 1, 1, 1]}, "2D slices"),
        ({"dim": [2, 4, 6, 1, 1, 1, 1, 1]}, "contains more than"),
        ({"datatype": 9999}, "bad header"),
        ({"datatype": 0}, "integers or real numbers"),
        ({"magic": b"ni1"}, "single-file"),
        ({"vox_offset": np.nan}, "bad header"),
        ({"vox_offset": np.inf}, "bad header"),
        ({"vox_offset": 1e9}, "pixels start at byte"),
        ({"vox_offset": 0}, "pixels start at byte"),
        ({"scl_slope": 1, "scl_inter": np.nan}, "bad header"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine is not finite"),
        ({"srow_x": [1e30, 0, 0, 0]}, "affine is not finite or out of range"),
        ({"srow_x": [0, 0, 0, 0]}, "affine gives pixels no area"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "bad header"),
    ],
)
def test_bad_headers_are_refused(tmp_path, fields, words):
    assert words in reason(changed(tmp_path / "a.nii", **fields))


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.nii")
    assert message(read, tmp_path / "a.nii") == "cannot be read: not a regular file"


def test_a_file_that_changes_while_being_read_is_refused(tmp_path):
    path = write(tmp_path / "a.nii")
    stat = path.stat()
    for size, mtime_ns in ((stat.st_size, stat.st_mtime_ns + 1), (stat.st_size + 1, stat.st_mtime_ns)):
        assert message(nifti.read_image, path, size, mtime_ns).startswith("changed while it was being read")


# ---------------------------------------------------------------- bounded memory


def test_a_header_that_claims_more_than_the_gzip_can_hold_is_refused(tmp_path):
    path = changed(tmp_path / "a.nii", dim=[2, 2048, 2048, 1, 1, 1, 1, 1])
    zipped = tmp_path / "a.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert "more than a file of" in reason(zipped)


def test_a_gzip_bomb_is_refused(tmp_path):
    plain = write(tmp_path / "a.nii", picture(1)).read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(200_000_000), 1))
    assert "contains more than" in reason(path)


def test_a_gzip_of_empty_members_is_refused(tmp_path):
    """Each costs the reader a start, and none brings it nearer to its limit."""
    plain = write(tmp_path / "a.nii", picture(1)).read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(member(plain[:400]) + member(b"") * 20_000 + member(plain[400:]))
    assert "far longer than its content" in reason(path)


@pytest.mark.parametrize("length", [200_000, 2_000_000])
def test_a_gzip_with_a_long_name_is_bounded(tmp_path, length):
    path = write(tmp_path / "a.nii", picture(1))
    path.write_bytes(member(path.read_bytes(), extra=b"x" * 65_535, name=b"n" * length + b"\0"))
    if length > nifti.READ_BYTES:
        assert "far longer than its content" in reason(path)
    else:
        np.testing.assert_array_equal(read(path).image, picture(1))


@pytest.mark.parametrize(("columns", "axis"), [("xyz", 2), ("yxz", 3), ("zyx", None)])
def test_left_right_axis(columns, axis):
    """The first axis of a slice is axis 2 of a batch; where none of both runs from side to side there is none."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ["xyz".index(column) for column in columns]]
    affine[:3, :3] *= -2.5
    assert nifti.left_right_axis(affine) == axis
