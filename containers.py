"""Read one image of any container: NIfTI, MetaImage, NRRD, a DICOM series, or a PNG or TIFF picture; write a PNG.

NIfTI is read by nifti.py, pictures by Pillow, all else by SimpleITK where it is installed. Whatever the container, the
image and its affine are as nifti.py returns them, within the same limits.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

import nifti
from console import summarise
from nifti import LARGE_BYTES, LARGE_FILE_LOCK, DataError, RawImage, check_grid, describe_stats, open_regular

# The kinds of containers. Of a data folder, the first kind that it contains is read: pictures beside volumes, say, are
# figures.
KINDS = ((".nii", ".nii.gz", ".hdr"), (".mha", ".mhd", ".nrrd"), (".dcm",), (".png", ".tif", ".tiff"))
ENDINGS = tuple(ending for kind in KINDS for ending in kind)
NIFTI, _, DICOM, PICTURES = KINDS
IMAGE_IO = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".dcm": "GDCMImageIO"}
SERIES = "0020|000e"  # the tag of a DICOM series' identifier
LONG_VALUES = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
REFUSED_SYNTAXES = (b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99")
UNDEFINED = 0xFFFFFFFF  # length of what ends at a delimiter
MAX_UNEVENNESS = 0.1  # of the distances of DICOM slices, relative to their mean
HEADER_BYTES = 1 << 16  # of .mhd and .nrrd, more than they have
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
LARGEST_GREY = 65_535  # of 16 bits
GREY_MODES = ("L", "I;16", "I;16B", "I;16L")  # Pillow's names of 8 and 16 bits


def ending_of(path: str) -> str:
    """Return the ending that tells a container, in small letters; .dcm for a folder, whose path ends in a separator."""
    if path.endswith(os.sep):
        return ".dcm"
    return max((ending for ending in ENDINGS if path.lower().endswith(ending)), key=len, default="")


def without_ending(name: str) -> str:
    """Return a file's name without the ending that tells its container."""
    return name[: len(name) - len(ending_of(name))]


def parts_of(path: str) -> list[str]:
    """Return the files that hold an image: one, a header and its pixels, or those of a DICOM series' folder.

    Raises:
        OSError: If a folder cannot be read.
        DataError: If a header does not name its pixels as a file beside it.
    """
    if path.endswith(os.sep):
        with os.scandir(path) as entries:
            return sorted(entry.path for entry in entries if entry.name.lower().endswith(".dcm"))
    if path.lower().endswith(".mhd"):
        return [path, os.path.join(os.path.dirname(path), meta_image_pixels(path))]
    return list(nifti.parts_of(path))


def meta_image_pixels(path: str) -> str:
    """Return where the header of a MetaImage says that the pixels are: a file beside it, or LOCAL.

    Raises:
        DataError: If it says anything else: it could be any file.
    """
    with open_regular(path) as file:
        named = re.findall(rb"ElementDataFile[ \t]*=[ \t]*([^\r\n]*?)[ \t]*\r?\n", file.read(HEADER_BYTES) + b"\n")
    wanted = rb"LOCAL" if path.lower().endswith(".mha") else rb"[\w. -]+\.(z?raw|img|bin)"
    if len(named) != 1 or not re.fullmatch(wanted, named[0], re.I):
        raise DataError("its header does not name one file of pixels, in an .mha LOCAL, in an .mhd a .raw beside it")
    return named[0].decode("ascii")


def read_grid(path: str) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Read an image's shape and affine as `nifti.read_grid` does, whatever its container."""
    try:
        if (ending := ending_of(path)) in NIFTI:
            return nifti.read_grid(path)
        if ending in PICTURES:
            with open_picture(path) as picture:
                return check_grid(picture.size, LPS_TO_RAS)
        return itk_grid(path)
    except (OSError, DataError):
        return None


def read_image(path: str, size: int, mtime_ns: int) -> RawImage:
    """Read an image as `nifti.read_image` does, whatever its container."""
    if (ending := ending_of(path)) in NIFTI:
        return nifti.read_image(path, size, mtime_ns)
    try:
        image, affine = read_picture(path) if ending in PICTURES else read_itk(path)
        if describe_stats([os.stat(part) for part in parts_of(path)]) != (size, mtime_ns):
            raise DataError("changed while it was being read: try again once it is complete")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    if not np.isfinite(image).all():
        raise DataError("contains NaN, infinite values, or values beyond float32")
    return RawImage(image, affine, f"{zlib.crc32(image.tobytes('F'), zlib.crc32(affine.tobytes())):08x}")


# ---------------------------------------------------------------- pictures


@contextmanager
def open_picture(path: str) -> Iterator[Image.Image]:
    """Open a grey PNG or TIFF with Pillow; its pixels are decoded when they are asked for. Raises DataError."""
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=("PNG", "TIFF")) as picture:
                if (pages := getattr(picture, "n_frames", 1)) != 1:
                    raise DataError(f"has {pages} pages: only single pictures are supported")
                if picture.mode not in GREY_MODES:
                    raise DataError(f"has mode {picture.mode}: only grey pictures of 8 or 16 bits are supported")
                yield picture
        except DataError:
            raise
        except Exception as error:  # whatever Pillow's parsers run into
            raise DataError(f"damaged, or no grey PNG or TIFF: {summarise(error)}") from error


def read_picture(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture as a slice (H, W): its columns become rows, as figures show slices. Pixels have 1 mm."""
    with open_picture(path) as picture:
        _, affine = check_grid(picture.size, LPS_TO_RAS)
        return np.asarray(picture).T.astype(np.float32), affine


def encode_picture(pixels: np.ndarray) -> bytes:
    """Return the content of a 16-bit grey PNG of a slice (H, W) in [0, 1], as `read_picture` reads it."""
    grey = np.rint(np.clip(pixels, 0, 1) * LARGEST_GREY).astype(np.uint16)
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey.T)).save(content, "PNG")
    return content.getvalue()


# ---------------------------------------------------------------- SimpleITK


@cache
def itk() -> Any:
    """Return SimpleITK, or raise DataError where it is not installed."""
    try:
        module = importlib.import_module("SimpleITK")
    except ImportError:
        raise DataError("needs SimpleITK: pip install -r requirements-containers.txt") from None
    module.ProcessObject.SetGlobalWarningDisplay(False)
    return module


def itk_information(path: str) -> Any:
    """Return a reader of one file that has read its header. Raises DataError."""
    if path.lower().endswith(".nrrd"):
        refuse_detached(path)
    elif path.lower().endswith((".mha", ".mhd")):
        meta_image_pixels(path)
    else:
        check_dicom(path)
    reader = itk().ImageFileReader()
    reader.SetImageIO(IMAGE_IO[ending_of(path)])
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"SimpleITK cannot read it: {last_line(error)}") from None
    if reader.GetNumberOfComponents() != 1 or reader.GetDimension() not in (2, 3):
        what = f"{reader.GetNumberOfComponents()} values per voxel and {reader.GetDimension()} dimensions"
        raise DataError(f"has {what}: only 2D slices and 3D volumes of one value are supported")
    return reader


def last_line(error: RuntimeError) -> str:
    """Return the line of SimpleITK's error that gives the reason."""
    return f"{str(error).strip().splitlines()[-1]:.200}"


def itk_grid(path: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape and affine of a file or a DICOM series from the headers. Raises DataError."""
    shape, affine, _ = stored_grid(path)
    return check_grid(shape, affine)


def stored_grid(path: str) -> tuple[tuple[int, ...], np.ndarray, list[str]]:
    """Return the shape as stored, the affine (4, 4) in RAS+, and the files, those of a series in spatial order."""
    files = parts_of(path) if ending_of(path) in DICOM else [path]
    readers = [itk_information(file) for file in files]
    dimension = readers[0].GetDimension()
    affine = np.eye(4)
    direction = np.reshape(readers[0].GetDirection(), (dimension, dimension))
    affine[:dimension, :dimension] = direction * readers[0].GetSpacing()
    affine[:dimension, 3] = readers[0].GetOrigin()
    shape = tuple(readers[0].GetSize())
    if len(files) > 1:
        order = series_order(readers)
        first, last = (np.array(readers[i].GetOrigin()) for i in (order[0], order[-1]))
        affine[:3, 2], affine[:3, 3] = (last - first) / (len(files) - 1), first
        shape, files = (*shape[:2], len(files)), [files[i] for i in order]
    return shape, LPS_TO_RAS @ affine, files


def series_order(readers: Sequence[Any]) -> np.ndarray:
    """Return the order of a DICOM series along its normal.

    Raises:
        DataError: If the files are of several series, or not parallel slices of one size at even distances.
    """
    series = {reader.GetMetaData(SERIES) if reader.HasMetaDataKey(SERIES) else "" for reader in readers}
    if len(series) != 1:
        raise DataError(f"contains {len(series)} DICOM series: put each into a folder of its own")
    sizes = {reader.GetSize() for reader in readers}
    directions = np.array([reader.GetDirection() for reader in readers])
    if (
        len(sizes) != 1
        or len(next(iter(sizes))) != 3
        or next(iter(sizes))[2] != 1
        or np.ptp(directions, axis=0).max() > 0.01
    ):
        raise DataError("its DICOM files are not parallel slices of one size")
    heights = np.array([reader.GetOrigin() for reader in readers]) @ directions[0].reshape(3, 3)[:, 2]
    order = np.argsort(heights)
    steps = np.diff(heights[order])
    if not np.abs(steps - steps.mean()).max() <= MAX_UNEVENNESS * steps.mean():
        raise DataError("its DICOM slices are not at even distances: is one missing or repeated?")
    return order


def check_dicom(path: str) -> None:
    """Raise DataError unless every element of a DICOM file fits into it: GDCM would allocate what the others claim."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(132)[128:] != b"DICM":
            raise DataError("not a DICOM file")
        position, implicit, in_fragments = 132, False, False
        while position + 8 <= size:
            file.seek(position)
            head = file.read(12)
            group, element, long = struct.unpack_from("<HHI", head)
            representation = head[4:6]
            position += 8
            if group == 0xFFFE:  # an item, whose elements follow, or the end of one
                in_fragments = in_fragments and element != 0xE0DD
                value = long if long != UNDEFINED and element == 0xE000 else 0
                inside = not in_fragments
            else:
                value = long
                if group == 2 or not implicit:
                    if not re.fullmatch(rb"[A-Z]{2}", representation):
                        raise DataError("damaged: an element has no value representation")
                    value = struct.unpack_from("<H", head, 6)[0]
                    if representation in LONG_VALUES:
                        value = struct.unpack("<I", head[8:].ljust(4, b"\0"))[0]
                        position += 4
                pixels = (group, element) == (0x7FE0, 0x0010)
                in_fragments = pixels and value == UNDEFINED
                inside = value == UNDEFINED or not pixels and starts_with_item(file, position)
                value = 0 if value == UNDEFINED else value
                if (group, element) == (2, 0x0010):
                    file.seek(position)
                    syntax = file.read(min(value, 64)).rstrip(b"\0 ")
                    if syntax in REFUSED_SYNTAXES:
                        raise DataError("is big-endian or deflated DICOM: convert it to explicit little-endian")
                    implicit = syntax == b"1.2.840.10008.1.2"
            if value > size - position:
                raise DataError(f"truncated: an element of {value} bytes where {max(size - position, 0)} are left")
            position += 0 if inside else value


def starts_with_item(file: BinaryIO, position: int) -> bool:
    """Return whether a value is a sequence, which begins with the tag of an item."""
    file.seek(position)
    return file.read(4) == b"\xfe\xff\x00\xe0"


def read_itk(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, (H, W) or (A, B, C) float32, and its affine (4, 4) with SimpleITK. Raises DataError."""
    shape, affine, files = stored_grid(path)
    sides, affine = check_grid(shape, affine)
    sitk = itk()
    with LARGE_FILE_LOCK if 4 * np.prod(sides) > LARGE_BYTES else nullcontext():
        try:
            image = sitk.ReadImage(files if len(files) > 1 else files[0], sitk.sitkFloat32, IMAGE_IO[ending_of(path)])
        except RuntimeError as error:
            raise DataError(f"SimpleITK cannot read it: {last_line(error)}") from None
        values = sitk.GetArrayFromImage(image).T
    if values.size != np.prod(sides):
        raise DataError(f"has {values.size} voxels, not those of its shape {shape}")
    return values.reshape(sides, order="F"), affine


def refuse_detached(path: str) -> None:
    """Raise DataError if a NRRD header names another file as its pixels: it could be any."""
    with open_regular(path) as file:
        header, end, _ = file.read(HEADER_BYTES).replace(b"\r", b"").partition(b"\n\n")
    if not end or re.search(rb"^\s*data ?file\s*:", header, re.M | re.I):
        raise DataError("its pixels are in another file: convert it to a single .nrrd")
