"""The folder that predict.py writes: slices, codes, and the settings of samples."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from config import RunConfig
from console import RunError, say
from dataset import denormalize
from nifti import encode_slice, read_image
from utils import write_file, writing

SIX_DIGITS = "[0-9]" * 6  # glob pattern of a sample's number
CODE_TYPE = np.dtype(np.uint16)


def prepare_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make the output folder, and remove the files of an earlier call. Call it once the new ones are computed."""
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        old = [path for pattern in patterns for path in out.glob(pattern)]
        for path in old:
            path.unlink()
    if old:
        say(f"{out} held {len(old)} files of an earlier call: replaced")


class SampleFolder:
    """Samples, their codes, and in samples.json the settings that they were drawn with.

    Several processes may fill one folder at the same time, each with samples of its own.

    Args:
        folder: Made by the first sample that is written; samples of other settings are then removed.
        numbers: Of the samples to be written.
        shared: Whether other processes write other numbers: codes are then numbered too, and nothing is removed.
        settings: All that samples depend on besides their numbers.
        config: Of the run.
    """

    def __init__(self, folder: Path, numbers: range, shared: bool, settings: dict[str, Any], config: RunConfig):
        self.folder, self.numbers, self.shared, self.settings = folder, numbers, shared, settings
        self.intensity, self.affine = config.intensity, np.array(config.affine)
        self.grid = tuple(side // config.options.downsampling for side in config.slice_size)
        self.codes = folder / (f"codes_{numbers.start:06d}.npy" if shared else "codes.npy")
        self.same = self.read_settings() == settings
        self.known = self.count_codes() if self.same else 0
        self.ready = False

    def read_settings(self) -> object:
        """Return the content of samples.json, or None if there is none."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "samples.json").read_bytes())
        return None

    def count_codes(self) -> int:
        """Return for how many samples the file of codes has room, from the first on; 0 if it cannot be used."""
        with suppress(OSError, ValueError, EOFError):
            codes = np.load(self.codes, mmap_mode="r")
            return len(codes) if codes.shape[1:] == self.grid and codes.dtype == CODE_TYPE else 0
        return 0

    def path(self, n: int) -> Path:
        """Return the file of sample n."""
        return self.folder / f"sample_{n:06d}.nii.gz"

    def holds(self, n: int) -> bool:
        """Return whether sample n and its codes were written with the same settings."""
        return n - self.numbers.start < self.known and self.path(n).exists()

    def prepare(self) -> None:
        """Make the folder, remove samples of other settings, and make room for codes."""
        samples = (f"sample_{SIX_DIGITS}.nii.gz", f"sample_{SIX_DIGITS}.nii.gz.*.part", "codes*.npy", "samples.json")
        if not self.same and self.shared and any(any(self.folder.glob(pattern)) for pattern in samples):
            raise RunError(f"--out {self.folder} holds samples of other settings: choose another folder")
        prepare_folder(self.folder, () if self.same else samples)
        write_file(self.folder / "samples.json", lambda part: part.write_text(json.dumps(self.settings, indent=1)))
        if self.known < len(self.numbers):
            write_file(self.codes, self.make_codes)
        self.ready = True

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
        """Write the codes (N, h, w) of N samples; call it before `write`.

        No memory map is used: on a full disk it would end the process without a message.
        """
        if not self.ready:  # not before there is something to write
            self.prepare()
        with writing(self.codes), open(self.codes, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            for n, grid in zip(sample_ids, codes.astype(CODE_TYPE)):
                file.seek(start + (n - self.numbers.start) * grid.nbytes)
                file.write(grid.tobytes())

    def write(self, n: int, pixels: np.ndarray) -> None:
        """Write sample n, pixels (H, W) in [-1, 1]."""
        content = encode_slice(denormalize(pixels, self.intensity.scale, self.intensity.low), self.affine)
        write_file(self.path(n), lambda part: part.write_bytes(content))

    def read(self, n: int) -> np.ndarray:
        """Return the pixels (H, W) of sample n, in [-1, 1]."""
        status = self.path(n).stat()
        low, high = self.intensity.low, self.intensity.scale
        return (read_image(self.path(n), status.st_size, status.st_mtime_ns).image - low) / (high - low) * 2 - 1
