"""The on-disk cache: entries with decoded slices, and listings, which spare later starts a search of the data folder.

An entry belongs to exactly the files that it was decoded from, with their sizes and modification times. A listing says
which files a folder contained, and which entry holds them. It is used while no folder below the data folder has been
modified since, nor any of the files, of which at most CHECKED_FILES are looked at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

if sys.platform != "win32":  # on Windows, partial entries of killed processes stay in the cache
    import fcntl

import numpy as np

from containers import parts_of
from nifti import DataError, describe_stats, open_regular

CHECKED_FILES = 20_000  # more than HipMRI has; on a slow network disk a thousand a second can be looked at
JOURNAL_SECONDS = 5  # between entries of the journal: what a killed first pass loses
SETTLED_SECONDS = 2  # the coarsest modification times of file systems: a later change could leave the same time
MAX_LISTING = 1 << 28  # bytes that are read of a listing: a million slices take 100 MB


def cache_folder() -> Path:
    """Return the folder that holds all cache entries."""
    chosen = os.environ.get("PROSTATEVQ_CACHE", "").strip()
    if chosen:
        return Path(chosen).expanduser()  # a .env file's ~ has not been expanded by a shell
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "prostatevq")


# ---------------------------------------------------------------- entries


@contextmanager
def new_cache_entry(entry: Path, resumable: bool = False) -> Iterator[Path]:
    """Yield a new folder on the cache's disk and rename it to `entry` once it is filled: all of it or nothing.

    If another process was faster, its entry stays. If `resumable`, the folder may hold what a process that was stopped
    or killed has left of the same entry. Raises DataError if the cache cannot be written.
    """
    cache, kept = entry.parent, f".partial-{entry.name}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with lock_cache(cache, kept), partial_folder(cache, kept if resumable else None) as partial:
            new = partial / "new"
            new.mkdir(exist_ok=True)
            yield new
            try:
                new.rename(entry)
            except OSError as error:
                # Looking for the entry would not do: a third process may just have moved it away to put its own there.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    except OSError as error:
        reason = error.strerror or error
        advice = "free some space there, or set $PROSTATEVQ_CACHE to another folder"
        raise DataError(f"the cache folder {cache} cannot be written ({reason}): {advice}") from error


@contextmanager
def lock_cache(cache: Path, kept: str) -> Iterator[None]:
    """Mark the cache as being written to, after removing what killed processes left there, except the folder `kept`.

    The kernel drops a process's lock when the process ends, however it ends. All hold the lock shared while they
    write. A process that gets it exclusively therefore knows that no partial folder belongs to a living process.
    """
    with ExitStack() as stack:
        if sys.platform != "win32":
            # One lock per user: in a cache shared by several, another user's lock could not be opened.
            lock = stack.enter_context(open(cache / f".lock-{os.getuid()}", "ab"))
            with suppress(OSError):  # others are writing, or the disk has no locks: then nothing is removed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in cache.glob(".partial-*"):
                    if left.name != kept and left.lstat().st_uid == os.getuid():
                        rmtree(left, ignore_errors=True)
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def partial_folder(cache: Path, name: str | None) -> Iterator[Path]:
    """Yield a folder in the cache, and remove it at the end.

    A folder with a name stays if the process is stopped or killed meanwhile, and serves the next one that asks for it.
    While another process uses it, or if the disk has no locks, this one gets a folder without a name.
    """
    with ExitStack() as stack:
        if not name or not lock_folder(cache / name, stack):
            yield Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix=".partial-", dir=cache, ignore_cleanup_errors=True)
                )
            )
            return
        try:
            yield cache / name
        except Exception:  # not KeyboardInterrupt or SystemExit, which stop the process
            rmtree(cache / name, ignore_errors=True)
            raise
        rmtree(cache / name, ignore_errors=True)


def lock_folder(folder: Path, stack: ExitStack) -> bool:
    """Make a folder unless it exists, and lock it until `stack` closes; return whether it is locked."""
    if sys.platform == "win32":
        return False
    try:
        folder.mkdir(exist_ok=True)
        lock = stack.enter_context((folder / "lock").open("ab"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last user removes a folder before unlocking it: this may be the lock of one that no longer exists.
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
    except (BlockingIOError, FileNotFoundError):  # another process uses it, or has just removed it
        return False
    except OSError:  # the disk has no locks: then no process uses it
        rmtree(folder, ignore_errors=True)
        return False


class PixelWriter:
    """The pixels of an entry that is being filled, and a journal of the slices whose pixels are on the disk.

    The journal spares the next process, if this one is stopped or killed, what has been decoded. It lies beside the
    folder that becomes the entry.

    Args:
        folder: Of `new_cache_entry`.
        slice_bytes: Bytes of a slice's pixels.
    """

    def __init__(self, folder: Path, slice_bytes: int):
        self.slice_bytes = slice_bytes
        self.path, self.journal_path = folder / "pixels.uint8", folder.with_name("journal")
        self.recorded, intact = self.read_journal()
        # Written, not mapped: a full disk makes a write fail, but would kill a process that writes to mapped memory.
        self.file = open(self.path, "r+b" if self.recorded else "wb")  # noqa: SIM115 - closed in __exit__
        self.journal = open(self.journal_path, "ab")  # noqa: SIM115
        self.journal.truncate(intact)
        self.pending, self.flushed = list[bytes](), time.monotonic()

    def __enter__(self) -> PixelWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError), self.file, self.journal:
            self.flush()

    def read_journal(self) -> tuple[dict[int, list[Any]], int]:
        """Return what was recorded of slices, by row, up to the first damaged line, and the bytes up to there."""
        recorded: dict[int, list[Any]] = {}
        intact = 0
        with suppress(OSError, ValueError, TypeError), open_regular(self.journal_path) as lines:
            written = self.path.stat().st_size // self.slice_bytes
            for line in lines:
                checksum, _, body = line.rstrip(b"\n").partition(b" ")
                rows = {row: values for row, *values in json.loads(body)}
                if not line.endswith(b"\n") or checksum != f"{zlib.crc32(body):08x}".encode() or max(rows) >= written:
                    break
                recorded |= rows
                intact += len(line)
        return recorded, intact

    def store(self, row: int, pixels: np.ndarray) -> None:
        """Write a slice's pixels (H, W) uint8."""
        self.file.seek(row * self.slice_bytes)
        self.file.write(pixels.data)

    def record(self, slices: dict[int, list[Any]]) -> None:
        """Note what is known of stored slices, by row, as JSON can hold it."""
        body = json.dumps([[row, *values] for row, values in slices.items()]).encode()
        self.pending.append(f"{zlib.crc32(body):08x} ".encode() + body + b"\n")
        if time.monotonic() - self.flushed >= JOURNAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until all stored pixels are on the disk, and then the journal."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.journal.writelines(self.pending)
        self.journal.flush()
        os.fsync(self.journal.fileno())
        self.pending, self.flushed = [], time.monotonic()


def map_pixels(entry: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Map the pixels of a cache entry into memory, read-only."""
    with open_regular(entry / "pixels.uint8") as file:
        if os.fstat(file.fileno()).st_size != math.prod(shape):
            raise ValueError("the file is truncated or of other slices")
        return np.asarray(np.memmap(file, np.uint8, "r", shape=shape))


# ---------------------------------------------------------------- JSON with a checksum


def write_index(path: Path, key: str, fields: dict[str, Any]) -> None:
    """Write JSON, after a line with its checksum."""
    body = json.dumps(fields).encode()
    with open(path, "wb") as file:
        file.write(index_checksum(key, body) + b"\n")
        file.write(body)


def read_index(path: Path, key: str, most: int) -> dict[str, Any] | None:
    """Return what `write_index` wrote, or None where it is missing, damaged, of another key, or of more bytes."""
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                return None
            checksum, body = file.readline(100).rstrip(b"\n"), file.read(size)
        fields = json.loads(body) if checksum == index_checksum(key, body) else None
    except (OSError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def index_checksum(key: str, body: bytes) -> bytes:
    """Return a checksum that reveals a damaged index and, since the key is part of it, one of other data."""
    checksum = hashlib.sha256(key.encode())
    checksum.update(body)
    return checksum.hexdigest().encode()


# ---------------------------------------------------------------- listings


class Listing(NamedTuple):
    """The slices of a data folder as they were found, and what tells that the folder has changed."""

    names: list[str]  # sorted by split
    cases: list[str | None]
    positions: np.ndarray  # (N,) float32
    counts: list[int]  # slices of each split
    notices: list[str]
    fingerprint: str
    entry: str  # name of the cache entry
    folders: dict[str, int]  # path to modification time in ns, of all folders that were searched
    file_count: int
    checked: list[tuple[str, int, int]]  # path, size and time, as `describe_stats` gives them, of all files or some


def thin_out(files: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Return at most CHECKED_FILES of the files, evenly spaced."""
    return files[:: max(1, -(-len(files) // CHECKED_FILES))]


def listing_notices(listing: Listing) -> list[str]:
    """Report that an earlier listing is used, if files were left out of the check."""
    some, count = len(listing.checked), listing.file_count
    notice = f"{some} of {count} files, and all folders, were checked for changes: --recheck checks all"
    return [notice] if some < count else []


def listing_path(key: str) -> Path:
    """Return the path of the listing for a key, which says what is read and how."""
    return cache_folder() / f"listing-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def write_listing(key: str, listing: Listing, started: float) -> None:
    """Keep a listing for later starts. These do without it if the cache cannot be written.

    Args:
        key: Of the listing.
        listing: What was found.
        started: The time.time() before it was made. A folder that has been modified shortly before may be modified
            again without a change of its time: then the listing is not kept.
    """
    if max(listing.folders.values(), default=0) > (started - SETTLED_SECONDS) * 1e9:
        return
    cases = list(dict.fromkeys(listing.cases))
    numbers = {case: number for number, case in enumerate(cases)}
    fields = listing._asdict() | {
        "cases": cases,
        "case_of": [numbers[case] for case in listing.cases],
        "positions": listing.positions.tolist(),
    }
    path = listing_path(key)
    with suppress(OSError), tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as partial:
        write_index(Path(partial, "listing"), key, fields)
        os.replace(Path(partial, "listing"), path)


def read_listing(key: str) -> Listing | None:
    """Return the listing for a key; None if there is none, if it is damaged, or if the folder has changed."""
    fields = read_index(listing_path(key), key, MAX_LISTING)
    if not fields:
        return None
    try:
        case_of, cases = fields.pop("case_of"), fields["cases"]
        converted = {
            "cases": [cases[number] for number in case_of],
            "positions": np.array(fields["positions"], np.float32),
            "checked": [(path, size, mtime_ns) for path, size, mtime_ns in fields["checked"]],
        }
        listing = Listing(**fields | converted)
        slices = {len(listing.names), len(listing.cases), len(listing.positions), sum(listing.counts)}
        usable = len(slices) == 1 and re.fullmatch("[0-9a-f]+", listing.entry) and is_unchanged(listing)
    except (TypeError, ValueError, LookupError, AttributeError):
        return None
    return listing if usable else None


def is_unchanged(listing: Listing) -> bool:
    """Return whether all folders, and the files that are checked, are as they were."""
    try:
        return all(os.stat(path).st_mtime_ns == mtime_ns for path, mtime_ns in listing.folders.items()) and all(
            describe_stats([os.stat(part) for part in parts_of(path)]) == (size, mtime_ns)
            for path, size, mtime_ns in listing.checked
        )
    except (OSError, DataError):
        return False
