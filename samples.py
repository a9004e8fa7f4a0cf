"""The folder that predict.py writes: samples, their codes, and the settings that they were drawn with."""

import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import RunConfig
from console import RunError, say
from containers import LARGEST_GREY, encode_picture, read_image
from dataset import DataError, denormalize
from nifti import encode_slice
from utils import write_file, writing

SIX_DIGITS = "[0-9]" * 6  # glob pattern of a sample's number
CODE_TYPE = np.dtype(np.uint16)
FORMATS = ("nii.gz", "png", "npz")
SHARD = 100  # samples of a shard, and what --first is a multiple of: 13 MB of slices of 256x128
SAMPLE_FILES = tuple(  # glob patterns, also of files that killed processes left
    f"{name}{left}"
    for name in (f"sample_{SIX_DIGITS}.nii.gz", f"sample_{SIX_DIGITS}.png", f"samples_{SIX_DIGITS}.npz")
    for left in ("", ".*.part")
)


def prepare_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make the output folder, and remove the files of an earlier call. Call it once the new ones are computed."""
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        old = [path for pattern in patterns for path in out.glob(pattern)]
        for path in old:
            path.unlink()
    if old:
        say(f"{out} held {len(old)} files of an earlier call: replaced")


class SampleFolder(ABC):
    """Samples, their codes, and in samples.json the settings that they were drawn with.

    Several processes may fill one folder at the same time, each with samples of its own.

    Args:
        folder: Made by the first samples that are added; samples of other settings are then removed.
        numbers: Of the samples to be written.
        shared: Whether other processes write other numbers: nothing is then removed.
        settings: All that samples depend on besides their numbers.
        config: Of the run.
    """

    def __init__(self, folder: Path, numbers: range, shared: bool, settings: dict[str, Any], config: RunConfig):
        self.folder, self.numbers, self.shared, self.settings = folder, numbers, shared, settings
        self.low, self.scale = config.intensity.low, config.intensity.scale
        self.same = self.read_settings() == settings
        self.ready = False

    @abstractmethod
    def missing(self) -> list[int]:
        """Return the numbers of the samples that the folder does not hold, drawn with the same settings."""

    @abstractmethod
    def add(
        self, sample_ids: Sequence[int], slices: np.ndarray, codes: np.ndarray, positions: np.ndarray
    ) -> list[Callable[[], None]]:
        """Take N samples, in the order of their numbers.

        Args:
            sample_ids: N numbers.
            slices: (N, H, W) in [-1, 1].
            codes: (N, h, w).
            positions: (N,), NaN for unknown.

        Returns:
            Calls that write files, which other threads may make.
        """

    @abstractmethod
    def read(self, sample_ids: Sequence[int]) -> np.ndarray:
        """Return the slices (N, H, W) of N samples, in [-1, 1]."""

    def read_settings(self) -> object:
        """Return the content of samples.json, or None if there is none."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "samples.json").read_bytes())
        return None

    def prepare(self) -> None:
        """Make the folder, unless it is ready, and remove samples of other settings."""
        if self.ready:  # not before there is something to write
            return
        samples = (*SAMPLE_FILES, "codes*.npy", "samples.json")
        if not self.same:
            held = self.shared and any(any(self.folder.glob(pattern)) for pattern in samples)
            # Another process may have begun to fill the folder since; it wrote the settings before anything else.
            self.same = self.read_settings() == self.settings
            if held and not self.same:
                raise RunError(f"--out {self.folder} holds samples of other settings: choose another folder")
        prepare_folder(self.folder, () if self.same else samples)
        write_file(self.folder / "samples.json", lambda part: part.write_text(json.dumps(self.settings, indent=1)))
        self.ready = True

    def check_owner(self) -> None:
        """Raise RunError if another process has begun to fill the folder with samples of other settings."""
        if self.read_settings() not in (None, self.settings):
            raise RunError(f"--out {self.folder} is now filled with samples of other settings: choose another folder")

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """Map the data's units to [-1, 1]: the inverse of `denormalize`."""
        return (values - self.low) / (self.scale - self.low) * 2 - 1


class SliceFolder(SampleFolder):
    """A file for each sample, `.nii.gz` or `.png`, and one of all codes; several processes have one of codes each."""

    def __init__(
        self, folder: Path, numbers: range, shared: bool, settings: dict[str, Any], config: RunConfig, ending: str
    ):
        super().__init__(folder, numbers, shared, settings, config)
        self.ending, self.affine = ending, np.array(config.affine)
        self.grid = tuple(side // config.options.downsampling for side in config.slice_size)
        self.codes = self.folder / (f"codes_{numbers.start:06d}.npy" if shared else "codes.npy")
        self.known = self.count_codes() if self.same else 0

    def count_codes(self) -> int:
        """Return for how many samples the file of codes has room, from the first on; 0 if it cannot be used."""
        with suppress(OSError, ValueError, EOFError):
            codes = np.load(self.codes, mmap_mode="r")
            return len(codes) if codes.shape[1:] == self.grid and codes.dtype == CODE_TYPE else 0
        return 0

    def path(self, n: int) -> Path:
        """Return the file of sample n."""
        return self.folder / f"sample_{n:06d}.{self.ending}"

    def missing(self) -> list[int]:
        known = self.numbers.start + self.known
        return [n for n in self.numbers if n >= known or not self.path(n).exists()]

    def add(
        self, sample_ids: Sequence[int], slices: np.ndarray, codes: np.ndarray, positions: np.ndarray
    ) -> list[Callable[[], None]]:
        if not self.ready:
            self.prepare()
            if self.known < len(self.numbers):
                write_file(self.codes, self.make_codes)
        self.write_codes(sample_ids, codes)
        return [partial(self.write, n, pixels) for n, pixels in zip(sample_ids, slices)]

    def make_codes(self, path: Path) -> None:
        """Write a file of codes with room for all samples, whose first ones are known."""
        shape = len(self.numbers), *self.grid
        with open(path, "wb") as file:
            fields = {"descr": np.lib.format.dtype_to_descr(CODE_TYPE), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, fields)
            end = file.tell() + math.prod(shape) * CODE_TYPE.itemsize
            if self.known:
                np.load(self.codes, mmap_mode="r").tofile(file)
            file.truncate(end)

    def write_codes(self, sample_ids: Sequence[int], codes: np.ndarray) -> None:
        """Write the codes (N, h, w) of N samples.

        No memory map is used: on a full disk it would end the process without a message.
        """
        with writing(self.codes), open(self.codes, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            for n, grid in zip(sample_ids, codes.astype(CODE_TYPE)):
                file.seek(start + (n - self.numbers.start) * grid.nbytes)
                file.write(grid.tobytes())

    def write(self, n: int, pixels: np.ndarray) -> None:
        """Write sample n, pixels (H, W) in [-1, 1]."""
        self.check_owner()
        if self.ending == "png":
            content = encode_picture((pixels + 1) / 2)
        else:
            content = encode_slice(denormalize(pixels, self.scale, self.low), self.affine)
        write_file(self.path(n), lambda part: part.write_bytes(content))

    def read(self, sample_ids: Sequence[int]) -> np.ndarray:
        return np.stack([self.read_one(self.path(n)) for n in sample_ids])

    def read_one(self, path: Path) -> np.ndarray:
        """Return the pixels (H, W) of a file, in [-1, 1]."""
        status = path.stat()
        try:
            values = read_image(str(path), status.st_size, status.st_mtime_ns).image
        except DataError as error:
            raise RunError(f"{path} {error}: remove it, and run the same command again") from None
        return values / LARGEST_GREY * 2 - 1 if self.ending == "png" else self.normalize(values)


class ShardFolder(SampleFolder):
    """Files of SHARD samples each, the last one with fewer: arrays `slices`, `codes`, `positions` and `numbers`."""

    def __init__(self, folder: Path, numbers: range, shared: bool, settings: dict[str, Any], config: RunConfig):
        if numbers.start % SHARD:
            raise RunError(f"--first {numbers.start} begins within a shard: --format npz needs a multiple of {SHARD}")
        super().__init__(folder, numbers, shared, settings, config)
        self.pending: list[tuple[int, np.ndarray, np.ndarray, float]] = []  # of one shard

    def path(self, start: int) -> Path:
        """Return the file of the shard that starts with a sample."""
        return self.folder / f"samples_{start:06d}.npz"

    def members(self, start: int) -> range:
        """Return the numbers of a shard's samples."""
        return range(start, min(start + SHARD, self.numbers.stop))

    def missing(self) -> list[int]:
        starts = [start for start in self.numbers[::SHARD] if not (self.same and self.holds(start))]
        return [n for start in starts for n in self.members(start)]

    def holds(self, start: int) -> bool:
        """Return whether a shard has all its samples: a shorter one is drawn as a whole again."""
        try:
            with open(self.path(start), "rb") as file, np.load(file) as arrays:
                return arrays["numbers"].tolist()[: len(self.members(start))] == list(self.members(start))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False

    def add(
        self, sample_ids: Sequence[int], slices: np.ndarray, codes: np.ndarray, positions: np.ndarray
    ) -> list[Callable[[], None]]:
        self.prepare()
        calls: list[Callable[[], None]] = []
        for n, pixels, grid, position in zip(sample_ids, slices, codes.astype(CODE_TYPE), positions):
            self.pending.append((n, denormalize(pixels, self.scale, self.low), grid, position))
            start = n // SHARD * SHARD
            if n == self.members(start)[-1]:
                calls.append(partial(self.write, start, self.pending))
                self.pending = []
        return calls

    def write(self, start: int, samples: Sequence[tuple[int, np.ndarray, np.ndarray, float]]) -> None:
        """Write a shard."""
        self.check_owner()
        numbers, slices, codes, positions = zip(*samples)
        arrays = {"slices": np.stack(slices), "codes": np.stack(codes)}
        arrays |= {"positions": np.array(positions, np.float32), "numbers": np.array(numbers, np.int64)}

        def save(part: Path) -> None:
            with open(part, "wb") as file:  # given a path, NumPy would add an ending
                np.savez(file, allow_pickle=False, **arrays)

        write_file(self.path(start), save)

    def read(self, sample_ids: Sequence[int]) -> np.ndarray:
        parts = []
        for start in sorted({n // SHARD * SHARD for n in sample_ids}):
            with np.load(self.path(start)) as arrays:
                parts.append(arrays["slices"][np.isin(arrays["numbers"], sample_ids)])
        return self.normalize(np.concatenate(parts))


def open_folder(
    ending: str, folder: Path, numbers: range, shared: bool, settings: dict[str, Any], config: RunConfig
) -> SampleFolder:
    """Return the folder for samples of one of FORMATS; the other arguments are those of `SampleFolder`."""
    if ending == "npz":
        return ShardFolder(folder, numbers, shared, settings, config)
    return SliceFolder(folder, numbers, shared, settings, config, ending)
