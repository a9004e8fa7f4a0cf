"""NIfTI files as a fuzzer makes them: valid ones with mutated headers, pixels and gzip streams; and how they load."""

import struct
import zlib
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
from numpy.random import Generator
from tampering import extend, flip_bits, move, pick, set_pixels, truncate

from dataset import AS_NAMED, DataError, load_dataset, read_slices
from files import Reading

SIZE = (32, 16)  # pixels of a slice, before it is mutated
HEADERS = {348: nibabel.nifti1.header_dtype, 540: nibabel.nifti2.header_dtype}
DATATYPES = (*nibabel.nifti1.data_type_codes.value_set(), 3, 9999, -2)
INTEGER_EXTREMES = (0, 1, -1, 2, 3, 7, 8, 16, 2048, 2049, 2**15, 2**31 - 1, 2**40, 2**63 - 1, -(2**63))
FLOAT_EXTREMES = (0, -0.0, 1, -1, 1e-45, 1e-38, 1e-6, 0.5, 348, 352, 353.5, 1e9, 1e30, 3e38, np.inf, -np.inf, np.nan)
NAMES = (
    "a.nii",
    "a.nii.gz",
    "case_900_week_0_slice_1.nii.gz",  # in the good file's volume
    "case_" + "9" * 150 + "_slice_" + "9" * 60 + ".nii",
    "line\nbreak\r.nii",
    "\x1b[31mred\x1b[2J.nii",
    "\udcff\udc80.nii.gz",  # bytes that are no UTF-8
    "\u202eright to left é.NII",
    "-rf $(touch x) ; |.nii",
)


@lru_cache
def valid_files() -> list[bytes]:
    """Return slices and volumes as nibabel writes them: plain data types, formats, byte orders, scaling, extensions."""
    pixels = (np.random.default_rng(0).random(SIZE) * 100).astype(np.float32)
    affine = np.diag([0.8, 0.9, 3, 1])
    written = []
    for image, header in ((nibabel.Nifti1Image, nibabel.Nifti1Header), (nibabel.Nifti2Image, nibabel.Nifti2Header)):
        for dtype in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64):
            written += [image(pixels.astype(dtype), affine, header(endianness=order), dtype=dtype) for order in "<>"]
        scaled = image(pixels.reshape(*SIZE, 1), affine)
        scaled.header.set_data_dtype(np.int16)
        scaled.header.set_slope_inter(0.25, -3)
        scaled.set_qform(affine, 1)
        scaled.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"scanned " * 20))
        written.append(scaled)
        written += [image(pixels.reshape(8, 16, 4), affine), image(pixels.reshape(4, 8, 16), affine[:, [2, 0, 1, 3]])]
    return [image.to_bytes() for image in written]


def set_fields(rng: Generator, raw: bytearray) -> bytes:
    """Set header fields to extreme values."""
    order = "<" if raw[0] else ">"
    header = HEADERS.get(int.from_bytes(raw[:4], "little" if raw[0] else "big"), HEADERS[348])
    for _ in range(rng.integers(1, 4)):
        name = pick(rng, header.names)
        field = header[name].base
        value = rng.bytes(field.itemsize)
        if name == "datatype":
            value = struct.pack(f"{order}h", pick(rng, DATATYPES))
        elif field.kind in "iu" and rng.random() < 0.8:
            limits = np.iinfo(field)
            number = min(max(pick(rng, INTEGER_EXTREMES), limits.min), limits.max)
            value = np.array(number, field.newbyteorder(order)).tobytes()
        elif field.kind == "f" and rng.random() < 0.8:
            value = np.array(pick(rng, FLOAT_EXTREMES), field.newbyteorder(order)).tobytes()
        start = header.fields[name][1] + field.itemsize * int(rng.integers(np.prod(header[name].shape, dtype=int)))
        raw[start : start + field.itemsize] = value
    return raw


def swap_bytes(rng: Generator, raw: bytearray) -> bytes:
    """Swap the byte order of the header or of a part of it."""
    width, start, end = pick(rng, (2, 4, 8)), pick(rng, (0, 4, 40)), pick(rng, (4, 40, 56, 348, len(raw)))
    part = raw[start:end]
    part = part[: len(part) // width * width]
    raw[start : start + len(part)] = np.frombuffer(part, f"u{width}").byteswap().tobytes()
    return raw


def splice(rng: Generator, raw: bytearray) -> bytes:
    """Join the beginning of one file and the end of another."""
    other = pick(rng, valid_files())
    return raw[: rng.integers(len(raw))] + other[rng.integers(len(other)) :]


MUTATIONS = (flip_bits, set_fields, set_fields, set_fields, set_pixels, swap_bytes, truncate, extend, splice, move)


def member(content: bytes, level: int = 6, extra: bytes = b"", name: bytes = b"", comment: bytes = b"") -> bytes:
    """Return a gzip member with the given optional fields (RFC 1952)."""
    flags = 4 * bool(extra) | 8 * bool(name) | 16 * bool(comment)
    fields = (struct.pack("<H", len(extra)) + extra) * bool(extra) + name + comment
    packer = zlib.compressobj(level, wbits=-15)
    tail = struct.pack("<II", zlib.crc32(content), len(content) & 0xFFFFFFFF)
    return bytes((31, 139, 8, flags, 0, 0, 0, 0, 0, 255)) + fields + packer.compress(content) + packer.flush() + tail


@lru_cache
def zeros(megabytes: int) -> bytes:
    return member(bytes(megabytes << 20), 1)


@lru_cache
def largest(missing: int) -> bytes:
    """Return a gzipped file whose header claims 2048x2048 pixels of 8 bytes, all zeros, less the missing bytes."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((2048, 2048))
    header.set_data_dtype(np.float64)
    header["vox_offset"] = 352
    return member(header.binaryblock + bytes(4 + 8 * 2048**2 - missing), 1)


def zip_up(rng: Generator, content: bytes) -> bytes:
    """Gzip content in one of the ways of usual writers and of attackers."""
    cuts = sorted(rng.integers(len(content) + 1, size=4).tolist())
    name = rng.bytes(rng.integers(1, 500_000)).replace(b"\0", b"") + b"\0"
    ways = (
        lambda: member(content, int(rng.integers(10))),
        lambda: b"".join(member(content[start:end]) for start, end in zip([0, *cuts], [*cuts, None])),
        lambda: b"".join(member(content[start : start + 16]) for start in range(0, len(content), 16)),
        lambda: pick(rng, (member(content), b"")) + member(b"") * int(rng.integers(1, 20_000)),
        lambda: member(content, extra=rng.bytes(rng.integers(1, 65536)), name=name, comment=name),
        lambda: member(content) + bytes(rng.integers(1, 1_000_000)),
        lambda: member(content) + rng.bytes(rng.integers(1, 1000)),
        lambda: member(content) + zeros(pick(rng, (1, 8, 64))),
        lambda: member(member(content)),
        lambda: member(rng.bytes(rng.integers(5000))),
        lambda: pick(rng, (member(content)[:18], member(b"", 0), b"\x1f\x8b")),
    )
    return ways[0]() if rng.random() < 0.5 else pick(rng, ways)()


def mutate(seed: int) -> bytes:
    """Return the content of a valid file after mutations."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.005:
        return largest(pick(rng, (0, 1, -1, 8 * 2048**2)))
    raw = pick(rng, valid_files())
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        raw = pick(rng, MUTATIONS)(rng, bytearray(raw or b"\0"))
    if rng.random() < 0.5:
        raw = zip_up(rng, bytes(raw))
        if rng.random() < 0.3:
            raw = pick(rng, (flip_bits, truncate, extend, move))(rng, bytearray(raw))
    return bytes(raw)


def make_case(seed: int, folder: Path) -> Path:
    """Write a mutated file, half of the time into a data folder with two valid ones; return the path to load."""
    rng = np.random.default_rng((seed, 1))
    path = folder / "train" / pick(rng, NAMES)
    path.parent.mkdir(parents=True)
    path.write_bytes(mutate(seed))
    if rng.random() < 0.5:
        return path
    (folder / "val").mkdir()
    for split, case in (("train", 900), ("val", 901)):
        (folder / split / f"case_{case}_week_0_slice_0.nii").write_bytes(pick(rng, valid_files()))
    return folder


def load_case(path: Path, reading: Reading = AS_NAMED) -> bool:
    """Load a file or folder as users do; return False if DataError refuses it.

    Raises:
        Exception: Any other error, including an AssertionError for unsound data.
    """
    try:
        if path.is_dir():
            data = load_dataset(str(path), multiple=(4, 4), workers=2, reading=reading)
            again = load_dataset(str(path), multiple=(4, 4), workers=2, reading=reading)
            assert (again.files, again.fingerprint, again.notices) == (data.files, data.fingerprint, data.notices)
            slices, affines, size = data.train, [data.affine], data.slice_size
            assert all(notice.isprintable() for notice in data.notices)
            assert len(slices) >= 2 and set(slices.names) < set(data.files)
            assert np.isfinite([data.low, data.scale]).all() and data.scale > data.low
        else:
            slices, affines, _ = read_slices([path], SIZE, reading)
            size = SIZE
    except DataError as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 1000, "the message is not one line"
        return False
    assert slices.pixels.dtype == np.uint8 and slices.pixels.shape == (len(slices), *size)
    assert np.isfinite([slices.lows, slices.scales]).all() and (slices.scales > slices.lows).all()
    for affine in affines:
        assert np.isfinite(affine).all()
        nibabel.Nifti1Image(slices.pixels[0], affine)
        nibabel.aff2axcodes(affine)
    batch = slices.batch(range(len(slices)))
    assert batch.shape == (len(slices), 1, *size) and -1 <= batch.min() <= batch.max() <= 1
    return True
