"""Long searches for what breaks the project, run by hand; pytest runs short forms of them. Linux only.

    python tests/campaign.py                                   # all campaigns
    python tests/campaign.py files --count 20000 --seed 0      # one of them

Prints one JSON line of totals a campaign, says on stderr what went wrong, and exits with status 1 where anything did.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree

import nibabel
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's files are not installed

from dataset import DataError, load_dataset, read_slices

# ---------------------------------------------------------------- files: whatever a NIfTI file may hold

SIZE = (32, 16)  # pixels of a slice, before it is mutated
HANG_SECONDS = 2
GIVE_UP_SECONDS = 30  # without an answer: the worker is killed
MOST_MEGABYTES = 200  # above the idle worker
HEADERS = {348: nibabel.nifti1.header_dtype, 540: nibabel.nifti2.header_dtype}
DATATYPES = (*nibabel.nifti1.data_type_codes.value_set(), 3, 9999, -2)
WHOLE_EXTREMES = (0, 1, -1, 2, 3, 7, 8, 16, 2048, 2049, 2**15, 2**31 - 1, 2**40, 2**63 - 1, -(2**63))
REAL_EXTREMES = (0, -0.0, 1, -1, 1e-45, 1e-38, 1e-6, 0.5, 348, 352, 353.5, 1e9, 1e30, 3e38, np.inf, -np.inf, np.nan)
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
    """Slices as nibabel writes them: every plain data type, both formats and byte orders; a slope, an extension."""
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
    return [image.to_bytes() for image in written]


def pick(rng: Generator, choices):
    """One of them; rng.choice would make an array of them first, and change their types."""
    return choices[rng.integers(len(choices))]


def flip_bits(rng: Generator, raw: bytearray) -> bytes:
    for place in rng.integers(8 * len(raw), size=rng.integers(1, 20)).tolist():
        raw[place // 8] ^= 1 << place % 8
    return raw


def set_fields(rng: Generator, raw: bytearray) -> bytes:
    """Header fields at their extremes."""
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
            whole = min(max(pick(rng, WHOLE_EXTREMES), limits.min), limits.max)
            value = np.array(whole, field.newbyteorder(order)).tobytes()
        elif field.kind == "f" and rng.random() < 0.8:
            value = np.array(pick(rng, REAL_EXTREMES), field.newbyteorder(order)).tobytes()
        start = header.fields[name][1] + field.itemsize * int(rng.integers(np.prod(header[name].shape, dtype=int)))
        raw[start : start + field.itemsize] = value
    return raw


def set_pixels(rng: Generator, raw: bytearray) -> bytes:
    """Bytes of all ones, which are NaN in floats, or zeros, or any."""
    start, length = int(rng.integers(len(raw))), int(rng.integers(1, 64))
    raw[start : start + length] = pick(rng, (b"\xff" * length, bytes(length), rng.bytes(length)))
    return raw


def swap_bytes(rng: Generator, raw: bytearray) -> bytes:
    """The header, or part of it, in the other byte order."""
    width, start, end = pick(rng, (2, 4, 8)), pick(rng, (0, 4, 40)), pick(rng, (4, 40, 56, 348, len(raw)))
    part = raw[start:end]
    part = part[: len(part) // width * width]
    raw[start : start + len(part)] = np.frombuffer(part, f"u{width}").byteswap().tobytes()
    return raw


def truncate(rng: Generator, raw: bytearray) -> bytes:
    return raw[: pick(rng, (rng.integers(400), rng.integers(len(raw)), len(raw) - 1))]


def extend(rng: Generator, raw: bytearray) -> bytes:
    return raw + pick(rng, (rng.bytes(rng.integers(1, 5000)), bytes(rng.integers(1, 100_000)), raw))


def splice(rng: Generator, raw: bytearray) -> bytes:
    """The beginning of one file and the end of another."""
    other = pick(rng, valid_files())
    return raw[: rng.integers(len(raw))] + other[rng.integers(len(other)) :]


def move(rng: Generator, raw: bytearray) -> bytes:
    """A stretch taken out, or put in twice."""
    start, length = rng.integers(len(raw)), rng.integers(1, 100)
    return raw[:start] + raw[start + length * pick(rng, (1, -1)) :]


MUTATIONS = (flip_bits, set_fields, set_fields, set_fields, set_pixels, swap_bytes, truncate, extend, splice, move)


def member(content: bytes, level: int = 6, extra: bytes = b"", name: bytes = b"", comment: bytes = b"") -> bytes:
    """A gzip member with the optional fields that are given (RFC 1952)."""
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
    """A header that claims 2048x2048 pixels of 8 bytes, zipped with as many zeros, but for the missing ones."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((2048, 2048))
    header.set_data_dtype(np.float64)
    header["vox_offset"] = 352
    return member(header.binaryblock + bytes(4 + 8 * 2048**2 - missing), 1)


def zip_up(rng: Generator, content: bytes) -> bytes:
    """Gzip as writers make it, and as only an attacker would."""
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
    """A file that was valid once."""
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
    """Writes a mutated file, half of the time into a data folder with two good ones, and gives what to load."""
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


def load_case(path: Path) -> bool:
    """Whether a file or folder loads, as users load them; False where DataError refuses it.

    Anything else it may come to, what was loaded being unsound included, is raised."""
    try:
        if path.is_dir():
            data = load_dataset(str(path), multiple=(4, 4), workers=2)
            again = load_dataset(str(path), multiple=(4, 4), workers=2)
            assert (again.files, again.fingerprint, again.notices) == (data.files, data.fingerprint, data.notices)
            slices, affines, size = data.train, [data.affine], data.slice_size
            assert all(notice.isprintable() for notice in data.notices)
            assert len(slices) == 2 and set(slices.names) < set(data.files)
            assert np.isfinite(data.scale) and data.scale > 0
        else:
            slices, affines = read_slices([path], SIZE)
            size = SIZE
    except DataError as refusal:
        assert str(refusal).isprintable() and len(str(refusal)) < 1000, "the message is not one line"
        return False
    assert slices.pixels.dtype == np.uint8 and slices.pixels.shape == (len(slices), *size)
    assert np.isfinite(slices.scales).all() and (slices.scales > 0).all()
    for affine in affines:
        assert np.isfinite(affine).all()
        nibabel.Nifti1Image(slices.pixels[0], affine)
        nibabel.aff2axcodes(affine)
    batch = slices.batch(range(len(slices)))
    assert batch.shape == (len(slices), 1, *size) and -1 <= batch.min() <= batch.max() <= 1
    return True


def memory(name: str) -> float:
    """Megabytes: VmRSS is what this process holds, VmHWM the most that it held."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def load_cases(pipe: Connection, folder: Path) -> None:
    """What a worker does: loads what it is told to, and answers with what came of it and its peak memory."""
    warnings.simplefilter("error")
    os.environ["PROSTATEVQ_CACHE"] = str(folder / "cache")
    path = folder / "valid.nii"
    path.write_bytes(valid_files()[0])
    load_case(path)  # so that what every load needs counts as idle
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # makes the present memory the most so far
    # What swells without end shall fail in here, and not take the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (int(memory("VmSize") + 4096) << 20, resource.RLIM_INFINITY))
    with suppress(EOFError):  # the campaign is over
        while True:
            outcome, details = judge_case(pipe.recv())
            pipe.send((outcome, details, memory("VmHWM") - idle))


def judge_case(path: Path) -> tuple[str, str]:
    """What comes of it: "loaded", "refused", "crashed" or "hung", and for the last two how."""
    start = time.perf_counter()
    try:
        outcome, details = "loaded" if load_case(path) else "refused", ""
    except BaseException:
        outcome, details = "crashed", traceback.format_exc()
    seconds = time.perf_counter() - start
    return ("hung", f"took {seconds:.1f} s") if seconds > HANG_SECONDS else (outcome, details)


class Worker:
    """A process that loads files for another one, which stays when it crashes or hangs."""

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=load_cases, args=(end, folder), daemon=True)
        self.process.start()
        end.close()

    def stop(self) -> None:
        self.pipe.close()  # which ends its wait for the next file
        self.process.join()

    def load(self, path: Path) -> tuple[str, str, float]:
        """What `judge_case` says, or how the worker ended; and its peak memory so far, in MB."""
        self.pipe.send(path)
        if not self.pipe.poll(GIVE_UP_SECONDS):
            self.process.kill()
            self.process.join()
            return "hung", f"no answer in {GIVE_UP_SECONDS} s", 0
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "crashed", f"the process ended with {self.process.exitcode}", 0


def files(count: int | None, seed: int) -> dict:
    """Mutated NIfTI files (20,000): each loads or is refused by DataError, within seconds and 200 MB.

    File number n is made from seed + n alone: `--count 1 --seed` with the number that is printed makes it again."""
    count = count or 20_000
    totals = dict.fromkeys(("tried", "loaded", "refused", "crashed", "hung", "peak_megabytes"), 0)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="files", unit="file") as bar:
        folder, worker = Path(temporary), None
        for number in range(seed, seed + count):
            if not (worker and worker.process.is_alive()):
                worker = Worker(folder)
            case = folder / "case"
            outcome, details, megabytes = worker.load(make_case(number, case))
            totals["tried"] += 1
            totals[outcome] += 1
            totals["peak_megabytes"] = max(totals["peak_megabytes"], round(megabytes))
            if details:
                bar.write(f"file {number} {outcome}: {details}", file=sys.stderr)
            rmtree(case)
            rmtree(folder / "cache", ignore_errors=True)
            bar.update()
        worker.stop()
    totals["failed"] = totals["crashed"] + totals["hung"] + (totals["peak_megabytes"] > MOST_MEGABYTES)
    return totals


# ---------------------------------------------------------------- the command

# Each takes a count (None: its own) and a seed, and gives totals; `failed` is the number of things that went wrong.
CAMPAIGNS = {"files": files}


def main() -> int:
    """Runs the campaigns named, or all, and gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"{', '.join(CAMPAIGNS)} (default: all)")
    parser.add_argument("--count", type=int, metavar="N", help="cases of a campaign (default: its own number)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has the next (default: 0)")
    options = parser.parse_args()
    if unknown := set(options.campaigns) - set(CAMPAIGNS):
        parser.error(f"no campaign is called {', '.join(sorted(unknown))}")
    failed = 0
    for name in options.campaigns or CAMPAIGNS:
        totals = CAMPAIGNS[name](options.count, options.seed)
        failed += totals["failed"]
        print(json.dumps({"campaign": name, **totals}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
