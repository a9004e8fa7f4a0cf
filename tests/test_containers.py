"""containers.py: images of other containers, against the same volume in NIfTI."""

import os
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from slice_files import message, picture, write, write_cases, write_volume

import containers
import nifti
from dataset import denormalize, load_dataset, read_slices
from files import Reading

pytestmark = pytest.mark.usefixtures("cache")
OBLIQUE = nib.affines.from_matvec(
    np.array([[0.940, -0.342, 0], [0.337, 0.925, -0.174], [0.059, 0.163, 0.985]]) @ np.diag([-0.8, 0.9, 3]),
    [11, -20, 30],
)
LPS = np.diag([-1, -1, 1, 1])
FORMATS = ("mha", "mhd", "nrrd", "dcm")


@pytest.fixture
def sitk():
    return pytest.importorskip("SimpleITK")


def write_itk(sitk, path, volume):
    """Write a NIfTI volume, (A, B, C), with SimpleITK: a file, or for .dcm a folder of one file per slice."""
    image = sitk.GetImageFromArray(np.asarray(volume.dataobj, np.int16).T)
    lps = np.diag([-1, -1, 1, 1]) @ volume.affine
    spacing = nib.affines.voxel_sizes(lps)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    if path.suffix != ".dcm":
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path), useCompression=path.suffix != ".mhd")
        return str(path)
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    for index in range(image.GetDepth()):
        cut = image[:, :, index]
        tags = {"0020|000e": "1.2.3.4", "0008|0060": "MR", "0020|0013": str(index)}
        tags["0020|0032"] = "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, index))))
        tags["0020|0037"] = "\\".join(
            f"{lps[row, column] / spacing[column]:.10f}" for column in (0, 1) for row in range(3)
        )
        for tag, value in tags.items():
            cut.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{7 * index % image.GetDepth()}.dcm"))  # not in spatial order
        writer.Execute(cut)
    return os.path.join(folder, "")


def orthonormal(affine):
    """The affine with its axes at right angles to the last digit, as ITK requires."""
    spacing = nib.affines.voxel_sizes(affine)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    return nib.affines.from_matvec(left @ right * spacing, affine[:3, 3])


def stamp(path):
    return nifti.describe_stats([os.stat(part) for part in containers.parts_of(path)])


def read(path):
    return containers.read_image(path, *stamp(path))


def whole(seed, path, **options):
    """A volume of integers."""
    made = write_volume(path, seed, affine=OBLIQUE, **options)
    return nib.Nifti1Image(np.rint(np.asarray(made.dataobj)).astype(np.int16), made.affine)


@pytest.mark.parametrize("ending", FORMATS)
def test_values_and_affine_are_those_of_the_volume(tmp_path, sitk, ending):
    volume = whole(1, tmp_path / "a.nii")
    path = write_itk(sitk, tmp_path / f"b.{ending}", volume)
    image, affine, checksum = read(path)
    np.testing.assert_array_equal(image, volume.get_fdata())
    assert image.dtype == np.float32 and len(checksum) == 8
    np.testing.assert_allclose(affine, volume.affine, atol=1e-3)
    shape, grid = containers.read_grid(path)
    assert shape == (8, 6, 5)
    np.testing.assert_allclose(grid, affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("pixel_size", [None, 0.6, 1.3])
@pytest.mark.parametrize("codes", ["RAS", "PIR", "LSA"])
def test_simpleitk_reads_what_is_written_at_the_same_place(tmp_path, sitk, axis, pixel_size, codes):
    """A slice of a volume, resampled or not, has at each physical point the value of the volume there."""
    shape, volume = (24, 20, 16), orthonormal(OBLIQUE)
    smooth = np.sin(np.indices(shape) / np.reshape([4, 5, 6], (3, 1, 1, 1))).sum(0) * 100 + 300
    turn = nib.orientations.ornt_transform(nib.io_orientation(volume), nib.orientations.axcodes2ornt(codes))
    nib.save(nib.Nifti1Image(smooth.astype(np.float32), volume).as_reoriented(turn), tmp_path / "case_1.nii")
    source = sitk.ReadImage(str(tmp_path / "case_1.nii"), sitk.sitkFloat64)
    slices, affines, _ = read_slices([tmp_path / "case_1.nii"], (32, 32), Reading(axis=axis, pixel_size=pixel_size))
    grey = denormalize(slices.batch([7])[0, 0], slices.scales[7])
    (tmp_path / "slice.nii.gz").write_bytes(nifti.encode_slice(grey, affines[7]))
    written = sitk.ReadImage(str(tmp_path / "slice.nii.gz"))
    assert written.GetDimension() == 3 and written.GetSize() == (32, 32, 1)
    if pixel_size:
        np.testing.assert_allclose(written.GetSpacing()[:2], pixel_size, rtol=1e-5)
    compared = 0
    for row, column in np.ndindex(32, 32):
        point = written.TransformIndexToPhysicalPoint((row, column, 0))
        ours = LPS @ affines[7] @ (row, column, 0, 1)
        np.testing.assert_allclose(point, ours[:3], atol=1e-3)
        inside = source.TransformPhysicalPointToContinuousIndex(point)
        if all(1 <= place <= side - 2 for place, side in zip(inside, source.GetSize())):
            expected = source.EvaluateAtPhysicalPoint(point, sitk.sitkLinear)
            assert written.GetPixel(row, column, 0) == pytest.approx(min(expected, slices.scales[7]), abs=12)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_loads_as_in_nifti(data, tmp_path, sitk, ending):
    for split, case in (("train", 1), ("train", 2), ("val", 3), ("test", 4)):
        volume = whole(case, data / split / f"case_{case}.nii", codes="LPS" if ending == "dcm" else "PIR")
        nib.save(volume, data / split / f"case_{case}.nii")
        write_itk(sitk, tmp_path / "other" / split / f"case_{case}.{ending}", volume)
    one, other = load_dataset(str(data)), load_dataset(str(tmp_path / "other"))
    assert other.train.cases == one.train.cases and len(other.train) == 10
    assert other.train.names[0] == f"train/case_1_slice_000.{ending}"
    np.testing.assert_array_equal(one.train.pixels, other.train.pixels)
    np.testing.assert_array_equal(one.test.positions, other.test.positions)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-3)
    assert load_dataset(str(tmp_path / "other")).fingerprint == other.fingerprint


def test_one_dicom_file_is_a_slice(tmp_path, sitk):
    folder = write_itk(sitk, tmp_path / "b.dcm", whole(1, tmp_path / "a.nii"))
    slices, *_ = read_slices([f"{folder}0.dcm"], (8, 6))
    assert len(slices) == 1


def test_two_series_in_one_folder_are_refused(tmp_path, sitk):
    volume = whole(1, tmp_path / "a.nii")
    folder, other = (write_itk(sitk, tmp_path / f"{name}.dcm", volume) for name in "bc")
    os.rename(f"{other}0.dcm", f"{folder}9.dcm")
    file = sitk.ReadImage(f"{folder}9.dcm")
    file.SetMetaData("0020|000e", "1.2.3.5")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(f"{folder}9.dcm")
    writer.Execute(file)
    assert message(read, folder) == "contains 2 DICOM series: put each into a folder of its own"


def test_without_simpleitk_one_line_names_the_package(data, monkeypatch):
    containers.itk.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    for case in range(3):
        path = data / f"case_{case}.mha"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"ElementDataFile = LOCAL\n")
    text = message(load_dataset, str(data))
    assert text.startswith("3 of 3 files cannot be used: case_0.mha: needs SimpleITK: pip install -r requirements-")
    containers.itk.cache_clear()


@pytest.mark.parametrize(
    "pixels", ["/etc/passwd", "../b.raw", "LIST", "b%d.raw 1 5 1", "", "b.raw\nElementDataFile = x"]
)
@pytest.mark.parametrize("ending", ["mha", "mhd"])
def test_a_header_that_names_other_files_is_refused(data, ending, pixels):
    data.mkdir()
    (data / f"case_1.{ending}").write_text(f"NDims = 3\nDimSize = 8 6 5\nElementDataFile = {pixels}\n")
    text = message(read_slices, [data], (8, 6))
    assert "its header does not name one file of pixels" in text or "SimpleITK" in text


def test_a_detached_nrrd_is_refused(data, sitk):
    data.mkdir()
    for name in ("data file", "datafile", "DATA FILE"):
        (data / "case_1.nrrd").write_text(f"NRRD0004\ntype: short\ndimension: 3\nsizes: 8 6 5\n{name}: /etc/passwd\n\n")
        assert "its pixels are in another file" in message(read_slices, [data], (8, 6))


def test_a_pixel_file_that_is_a_pipe_does_not_block(data):
    data.mkdir()
    (data / "case_1.mhd").write_text("NDims = 3\nDimSize = 8 6 5\nElementDataFile = case_1.raw\n")
    os.mkfifo(data / "case_1.raw")
    assert "case_1.mhd: not a regular file" in message(read_slices, [data], (8, 6))


def test_changed_pixels_of_a_header_are_noticed(tmp_path, sitk):
    path = write_itk(sitk, tmp_path / "b.mhd", whole(1, tmp_path / "a.nii"))
    before = stamp(path)
    os.utime(tmp_path / "b.raw", ns=(0, before[1] + 1))
    assert message(containers.read_image, path, *before).startswith("changed while it was being read")


def test_large_and_damaged_files_are_refused(tmp_path, sitk):
    path = tmp_path / "a.mha"
    header = "ObjectType = Image\nNDims = {}\nDimSize = {}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    for sides, words in (
        ("4096 4 4", "each side must be 1 to 2048"),
        ("2048 2048 99", "a volume may have"),
        ("8 6 5", "SimpleITK cannot read it: "),
        ("8 6 5 2", "4 dimensions"),
    ):
        path.write_text(header.format(len(sides.split()), sides))
        assert words in message(read, str(path))
    path.write_bytes(b"ElementDataFile = LOCAL\n")
    assert "SimpleITK cannot read it: " in message(read, str(path))


def test_slices_missing_from_a_series_are_noticed(tmp_path, sitk):
    folder = write_itk(sitk, tmp_path / "b.dcm", whole(1, tmp_path / "a.nii"))
    os.remove(f"{folder}2.dcm")  # the second lowest but one
    assert message(read, folder) == "its DICOM slices are not at even distances: is one missing or repeated?"


def element(tag, representation, value, length=None):
    """A DICOM element, explicit or implicit little-endian, which claims a length."""
    head, length = struct.pack("<HH", *tag), len(value) if length is None else length
    if representation is None:
        return head + struct.pack("<I", length) + value
    if representation in (b"OW", b"SQ", b"UN"):
        return head + representation + struct.pack("<HI", 0, length) + value
    return head + representation + struct.pack("<H", length) + value


def item(value, length=None):
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value) if length is None else length) + value


END_OF_ITEM, END_OF_SEQUENCE = struct.pack("<HHI", 0xFFFE, 0xE00D, 0), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
UNDEFINED = containers.UNDEFINED


def dicom(path, body, syntax=b"1.2.840.10008.1.2.1"):
    path.write_bytes(bytes(128) + b"DICM" + element((2, 0x10), b"UI", syntax) + body)
    return path


@pytest.mark.parametrize("representation", [b"LO", None])
def test_dicom_files_whose_elements_fit_are_accepted(tmp_path, representation):
    explicit = representation is not None
    syntax = b"1.2.840.10008.1.2.1" if explicit else b"1.2.840.10008.1.2\0"
    name, sequence = element((0x10, 0x20), representation, b"x" * 6), b"SQ" if explicit else None
    bodies = [
        name,
        element((8, 0x1140), sequence, item(name) + item(name)) + name,
        element((8, 0x1140), sequence, item(name + END_OF_ITEM, UNDEFINED) + END_OF_SEQUENCE, UNDEFINED) + name,
        element((0x7FE0, 0x10), b"OW" if explicit else None, b"\xfe\xff\x00\xe0" + bytes(20)),
    ]
    if explicit:
        bodies.append(
            element((0x7FE0, 0x10), b"OW", item(b"") + item(b"\xff" * 40) + END_OF_SEQUENCE, UNDEFINED) + name
        )
    for body in bodies:
        containers.check_dicom(str(dicom(tmp_path / "a.dcm", body, syntax)))


@pytest.mark.parametrize("representation", [b"OW", None])
def test_dicom_elements_that_claim_more_than_the_file_are_refused(tmp_path, representation):
    explicit = representation is not None
    syntax = b"1.2.840.10008.1.2.1" if explicit else b"1.2.840.10008.1.2\0"
    liar, sequence = element((0x10, 0x20), representation, b"x" * 6, 0xF0000000), b"SQ" if explicit else None
    for body in (
        liar,
        element((8, 0x1140), sequence, item(liar)),
        element((8, 0x1140), sequence, item(liar, UNDEFINED), UNDEFINED),
        element((8, 0x1140), sequence, item(b"", 0xF0000000)),
        element((0x7FE0, 0x10), representation, b"1234", 0x7FFFFFFF),
        element((0x7FE0, 0x10), representation, item(b"1234", 0x7FFFFFFF), UNDEFINED),
    ):
        assert "truncated: an element of " in message(
            containers.check_dicom, str(dicom(tmp_path / "a.dcm", body, syntax))
        )


def test_other_dicom_files_are_refused(tmp_path):
    path = tmp_path / "a.dcm"
    for syntax in (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"):
        assert "big-endian or deflated" in message(containers.check_dicom, str(dicom(path, b"", syntax)))
    path.write_bytes(b"photo")
    assert message(containers.check_dicom, str(path)) == "not a DICOM file"
    assert "no value representation" in message(containers.check_dicom, str(dicom(path, bytes(20))))


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("ending", ["png", "tif", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_pictures_are_slices_that_are_shown_as_they_are(data, ending, dtype):
    images = {case: (picture(case) * (2 if dtype == np.uint8 else 600)).astype(dtype) for case in range(1, 5)}
    data.mkdir()
    for case, image in images.items():
        Image.fromarray(image.T).save(data / f"case_{case}_slice_1.{ending}")
    stored, affine, _ = read(str(data / f"case_1_slice_1.{ending}"))
    np.testing.assert_array_equal(stored, images[1])
    assert nib.aff2axcodes(affine) == ("L", "P", "S")
    loaded = load_dataset(str(data))
    assert loaded.slice_size == (8, 6) and len(loaded.files) == 4
    notice = "warning: pictures tell neither the size of a pixel nor the side: 1 mm is assumed, the front on top"
    assert any(line.startswith(notice) for line in loaded.notices)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "F", "I", "LA"])
def test_pictures_in_colour_or_of_other_depth_are_refused(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in "FI" else "a.png")
    Image.new(mode, (8, 6)).save(path)
    assert f"has mode {mode}: only grey pictures" in message(read, str(path))


def test_bad_pictures_are_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60)).astype(np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "damaged, or no grey PNG or TIFF" in message(read, str(path))
    path.write_bytes(b"bad")
    assert "damaged, or no grey PNG or TIFF" in message(read, str(path))
    Image.new("L", (2049, 5)).save(path)
    assert "each side must be 1 to 2048" in message(read, str(path))
    pages = [Image.new("L", (8, 6)), Image.new("L", (8, 6))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert "has 2 pages: only single pictures" in message(read, str(tmp_path / "a.tif"))


def test_pictures_beside_nifti_files_are_not_read(data):
    write_cases(data, range(3))
    Image.new("RGB", (9, 9)).save(data / "contact_sheet.png")
    (data / "case_4.mha").write_bytes(b"bad")
    (data / "case_5").mkdir()
    (data / "case_5" / "1.dcm").write_bytes(b"bad")
    write(data / "case_6.nii")
    assert len(load_dataset(str(data)).files) == 7
