"""Read one 2D slice or 3D volume as NIfTI, and write one slice.

The reader is our own, not nibabel's, for two reasons. It is about twice as fast (benchmarks/loading.py measures both),
and it reads hostile files, such as zip bombs, in bounded memory and time. nibabel still interprets the header fields
and writes files.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError

from console import UserError

# Limits on what a file may claim, whoever wrote it. They bound memory, time and later arithmetic.
MAX_SIDE = 2048  # pixels; in-plane MR matrices end near 1024, so a longer side means a broken header
MAX_VOXELS = 1 << 27  # of one file, 512x512x512, half a GiB as float32; prostate MR has some 10 million
MAX_OFFSET = 1 << 24  # bytes before the pixels; header extensions take kilobytes
MAX_DISTANCE = 1e9  # in an affine: a kilometre in micrometres, whose square still fits float32
MIN_DISTANCE = 1e-6  # in an affine: a nanometre in millimetres
MIN_SINE = 1e-3  # volume of a voxel over the product of its sides: axes that are closer to one plane have no order
MAX_MEMBERS = 1024  # gzip members per file; block-wise writers (bgzip) put 64 KiB into each
DEFLATE_RATIO = 1032  # the highest compression ratio that deflate can reach

HEADER_BYTES = 540  # of a NIfTI-2 header, the longer one; NIfTI-1 has 348
PEEK_BYTES = 4096  # of a compressed file, nearly always enough to decompress its header
READ_BYTES = 1 << 18  # of a compressed file per read, more than most slices have
LARGE_BYTES = 1 << 23  # per file: larger ones are read one at a time, so that threads do not add up their memory
LARGE_FILE_LOCK = Lock()


class DataError(UserError):
    """Data that cannot be used; the message names them and the reason."""


class RawImage(NamedTuple):
    """One slice or volume as its file stores it."""

    image: np.ndarray  # (H, W) or (A, B, C) float32, in the file's own units
    affine: np.ndarray  # (4, 4) from indices to mm; shared between images, so copy it before changing it
    checksum: str  # CRC-32 of the uncompressed file


class Header(NamedTuple):
    """The header fields that are needed to read the pixels."""

    shape: tuple[int, ...]  # (H, W) of a slice, (A, B, C) of a volume
    dtype: np.dtype
    offset: int  # bytes before the pixels
    slope: float | None  # None where values are stored unscaled
    inter: float | None
    affine: np.ndarray  # (4, 4)

    @property
    def end(self) -> int:
        """Return the size in bytes of the uncompressed file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------- one image


def read_image(path: str | Path, size: int, mtime_ns: int) -> RawImage:
    """Read one slice or volume from a NIfTI-1 or NIfTI-2 file, gzipped or not, or from a pair of files.

    Args:
        path: The file; of a pair, the .hdr.
        size: Its size in bytes when it was found; of a pair, the sum.
        mtime_ns: Its modification time when it was found; of a pair, the later one. A file that has changed since is
            not read.

    Returns:
        The image (H, W) or (A, B, C), its affine (4, 4) and a checksum.

    Raises:
        DataError: If the file cannot be used. The message gives the reason, not the file's name.
    """
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open_regular(part)) for part in parts_of(path)]
            header, block = read_header(files[0], len(files) == 2)
            with LARGE_FILE_LOCK if header.end > LARGE_BYTES else nullcontext():
                content = read_whole(files, header.end, size, mtime_ns)
                checksum = zlib.crc32(content, zlib.crc32(block) if len(files) == 2 else 0)
                return RawImage(to_image(content, header), header.affine, f"{checksum:08x}")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Read an image's shape, (H, W) or (A, B, C), and its affine (4, 4) from the header alone.

    Returns:
        None for a file that cannot be used.
    """
    try:
        with open_regular(path) as file:
            header, _ = read_header(file, len(parts_of(path)) == 2)
    except (OSError, DataError):
        return None
    return header.shape, header.affine


def parts_of(path: str | Path) -> tuple[str, ...]:
    """Return the files that hold an image: a pair's header (.hdr) and pixels (.img), else the file itself."""
    name = os.fspath(path)
    if not name.lower().endswith(".hdr"):
        return (name,)
    return name, name[:-3] + ("IMG" if name.endswith("HDR") else "img")


def encode_slice(pixels: np.ndarray, affine: np.ndarray) -> bytes:
    """Return the content of a `.nii.gz` file of a slice (H, W, 1) as float32, the same bytes for the same pixels.

    Args:
        pixels: (H, W).
        affine: (4, 4) from pixel indices to mm.
    """
    # A volume of one slice: readers of a 2D file, such as ITK, would drop its height and its tilt.
    image = nib.Nifti1Image(pixels.astype(np.float32)[..., None], affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 1, mtime=0)  # a higher level takes longer and saves less than 1 %


# ---------------------------------------------------------------- content


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, or raise OSError for any other kind, without waiting for a pipe."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield file


def read_whole(files: Sequence[BinaryIO], expected: int, size: int, mtime_ns: int) -> bytes | bytearray:
    """Read the uncompressed content of the last file, which must have `expected` bytes, and check that none changed."""
    if expected > size * DEFLATE_RATIO:
        raise DataError(f"truncated: its header requires {expected} bytes, more than a file of {size} bytes can hold")
    content = read_content(files[-1], expected + 1)
    if describe_stats([os.fstat(file.fileno()) for file in files]) != (size, mtime_ns):
        raise DataError("changed while it was being read: try again once it is complete")
    if len(content) < expected:
        raise DataError(f"truncated: {len(content)} bytes where its header requires {expected}")
    if len(content) > expected:
        raise DataError(f"contains more than the {expected} bytes that its header describes")
    return content


def describe_stats(stats: Sequence[os.stat_result]) -> tuple[int, int]:
    """Return size and modification time of the files of one image: the sum of the sizes, and the latest time."""
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def read_content(file: BinaryIO, limit: int) -> bytes | bytearray:
    """Read the first `limit` bytes of a file's uncompressed content, however long all of it is."""
    file.seek(0)
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not compressed:
        return file.read(limit)
    stream, members = zlib.decompressobj(wbits=31), 1
    content, raw = bytearray(), file.read(PEEK_BYTES)
    while len(content) < limit and (raw := raw or file.read(READ_BYTES)):
        # Compressed data is never twice as long as its content, except for long names and comments in its headers.
        # Empty members could go on for ever.
        if file.tell() > 2 * (limit + READ_BYTES) or members > MAX_MEMBERS:
            raise DataError("damaged: its compressed data is far longer than its content")
        if stream.eof:  # some writers make several members
            raw = raw.lstrip(b"\0")  # padding is allowed
            if not raw:
                continue
            stream, members = zlib.decompressobj(wbits=31), members + 1
        try:
            content += stream.decompress(raw, min(limit - len(content), READ_BYTES))
        except zlib.error as error:
            raise DataError(f"damaged: {error}") from error
        raw = stream.unused_data or stream.unconsumed_tail
    if len(content) < limit and not stream.eof:
        raise DataError(f"truncated: its compressed data ends after {len(content)} bytes")
    return content


def to_image(content: bytes | bytearray, header: Header) -> np.ndarray:
    """Convert a file's content to an image (H, W) or (A, B, C) of finite float32 values."""
    image: np.ndarray = np.frombuffer(content, header.dtype, offset=header.offset).reshape(header.shape, order="F")
    with np.errstate(all="ignore"):  # values beyond float32 become infinite, which is checked below
        if header.slope is not None and header.inter is not None:
            image = image * header.slope
            image += header.inter
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise DataError("contains NaN, infinite values, or values beyond float32")
    return image


# ---------------------------------------------------------------- header


SINGLE_FILES = (Nifti1Header, Nifti2Header)
PAIRS = (Nifti1PairHeader, Nifti2PairHeader)


def read_header(file: BinaryIO, pair: bool) -> tuple[Header, bytes]:
    """Read a file's header, and return it with its bytes.

    Raises:
        DataError: If it does not describe a slice or a volume.
    """
    block = bytes(read_content(file, HEADER_BYTES))
    for kind in PAIRS if pair else SINGLE_FILES:
        length = kind.template_dtype.itemsize
        for endianness in "<>":
            if len(block) >= length and struct.unpack_from(f"{endianness}i", block) == (length,):
                return parse_header(kind, block[:length], endianness), block[:length]
    raise DataError("not a NIfTI file")


@lru_cache(maxsize=4096)  # slices often share a header, and each header is read twice: for the slice size, then pixels
def parse_header(kind: type[Nifti1PairHeader], block: bytes, endianness: str) -> Header:
    """Interpret the bytes of a header and check every field that is used."""
    try:
        with np.errstate(all="ignore"):
            header = kind(block, endianness=endianness, check=False)
            shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
            slope, inter = header.get_slope_inter()
            affine = header.get_best_affine()
    except KeyError as code:
        raise DataError(f"bad header: unknown data type {code}") from code
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise DataError(f"bad header: {error}") from error
    single = kind in SINGLE_FILES
    if header["magic"].item() != (kind.single_magic if single else kind.pair_magic):
        raise DataError(
            "not a single-file NIfTI" if single else "not a NIfTI pair: Analyze headers do not tell the sides"
        )
    if dtype.kind not in "iuf":
        raise DataError(f"has {header.get_value_label('datatype')} voxels: they must be integers or real numbers")
    if not (kind.single_vox_offset if single else 0) <= offset <= MAX_OFFSET:
        raise DataError(f"bad header: pixels start at byte {offset}")
    sides, affine = check_grid(shape, affine)
    return Header(sides, dtype, offset, slope, inter, affine)


def check_grid(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Check the shape and the affine (4, 4) of a slice or a volume.

    Returns:
        The shape without axes one voxel thick, (H, W) or (A, B, C), and its affine.

    Raises:
        DataError: If it is neither slice nor volume, too large, or its affine is no voxel grid.
    """
    axes = image_axes(shape)
    if not axes:
        raise DataError(f"has shape {shape}: only 2D slices and 3D volumes are supported")
    sides = tuple(shape[axis] for axis in axes)
    if not all(0 < side <= MAX_SIDE for side in sides):
        raise DataError(f"has shape {shape}: each side must be 1 to {MAX_SIDE} pixels")
    if math.prod(sides) > MAX_VOXELS:
        raise DataError(f"has shape {shape}: a volume may have {MAX_VOXELS} voxels")
    if not np.abs(affine).max() <= MAX_DISTANCE:  # also true of NaN
        raise DataError("bad header: its affine is not finite or out of range")
    if len(axes) == 3:
        check_voxels(affine)
        return sides, affine
    # The axis across the slice comes third, whichever it is in the file.
    return sides, complete_affine(affine[:, [*axes, 3 - sum(axes), 3]])


def image_axes(shape: tuple[int, ...]) -> list[int]:
    """Return the two in-plane axes of a slice, the three axes of a volume, or [] for the shape of a line or a series.

    Of the three spatial axes, the one across a slice is one voxel thick: the last of several.
    """
    if len(shape) < 2 or any(side != 1 for side in shape[3:]):
        return []
    if len(shape) == 2 or shape[2] == 1:
        return [0, 1]
    axes = [axis for axis in range(3) if shape[axis] != 1]
    return axes if len(axes) >= 2 else []


def check_voxels(affine: np.ndarray) -> None:
    """Raise DataError if the affine of a volume gives voxels no volume."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() < MIN_DISTANCE or abs(np.linalg.det(affine[:3, :3] / steps)) < MIN_SINE:
        raise DataError("bad header: its affine gives voxels no volume")


def complete_affine(affine: np.ndarray) -> np.ndarray:
    """Return the affine (4, 4) with a unit step across the slice where a 2D writer left that column empty.

    Raises:
        DataError: If the affine gives pixels no area.
    """
    across = np.cross(affine[:3, 0], affine[:3, 1])
    area = np.linalg.norm(across)
    if area < MIN_DISTANCE**2:
        raise DataError("bad header: its affine gives pixels no area")
    if np.linalg.norm(affine[:3, 2]) < MIN_DISTANCE:
        affine[:3, 2] = across / area
    return affine


def left_right_axis(affine: np.ndarray) -> int | None:
    """Return the axis of slices (N, 1, H, W) that runs left to right: 2 in HipMRI's, None in sagittal slices."""
    sides = [code in ("L", "R") for code in nib.aff2axcodes(affine)[:2]]
    return 2 + sides.index(True) if any(sides) else None
