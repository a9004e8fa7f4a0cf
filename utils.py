"""Devices, seeds and atomic file writes."""

import errno
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from console import RunError, logger, summarise

Network = TypeVar("Network", bound=torch.nn.Module)

# ---------------------------------------------------------------- device and seed


def pick_device(name: str) -> torch.device:
    """Return a device that is ready to compute.

    Args:
        name: `cpu`, `cuda`, `cuda:1` and so on, or `auto`: the GPU if there is one that computes, else the CPU.

    Raises:
        RunError: The device does not compute, or is of another kind.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not re.fullmatch("auto|cuda(:[0-9]{1,3})?", name):
        raise RunError(f"--device {name}: choose auto, cpu, cuda, or cuda:1 and so on")
    try:
        return start_gpu(torch.device("cuda" if name == "auto" else name))
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        if name != "auto":
            raise RunError(f"--device {name}: {summarise(error)} (or use --device auto)") from None
        logger.warning(f"the GPU cannot be used ({summarise(error)}): computing on the CPU")
        return torch.device("cpu")


def start_gpu(device: torch.device) -> torch.device:
    """Return a GPU by its number, tested with a convolution and made the current one. Raises RuntimeError.

    PyTorch may list a card that it cannot use: each build has kernels for some generations only. TF32 is switched off:
    SSIM subtracts squares and would lose its third digit. Training loses no speed, since it runs in bfloat16 on every
    card that has TF32.
    """
    picture = torch.ones(1, 1, 8, 8, device=device)
    (F.conv2d(picture, picture[:, :, :3, :3], padding=1) @ picture).sum().item()
    torch.cuda.set_device(picture.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return picture.device


def channels_last(network: Network, device: torch.device) -> Network:
    """Move a network to a device, in the memory format in which convolutions are fastest."""
    # PyTorch documents memory_format here, but its type hints omit it.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def autocast(device: torch.device) -> torch.autocast:
    """Return a bfloat16 autocast, enabled where the processor computes in it natively: elsewhere it would be slower."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, lambda: False)() for name in tests)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def seed_update(seed: int, stage: str, update: int) -> None:
    """Seed PyTorch for one update, so that a resumed run draws the same numbers without any saved random state."""
    entropy = np.random.SeedSequence([seed, *stage.encode(), update])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


# ---------------------------------------------------------------- files


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder unless it exists. Raises RunError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(option: str, path: Path) -> None:
    """Raise RunError unless files can be written to a folder or, if it is missing, to its nearest existing parent."""
    place = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    with writing(f"{option} {path}"), tempfile.TemporaryFile(dir=place):
        pass


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # not every network file system can flush a folder
            raise
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Write a file atomically: `path` always holds all of the old or all of the new content.

    Args:
        path: The file.
        write: Writes the content to the temporary path that it is given.
        previous: Where the old file is kept; None to replace it.

    Raises:
        RunError: The file cannot be written.
    """
    # A unique name, since another process may be writing the same file, such as a figure in a shared folder.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            write(temporary)
            flush(temporary)
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            flush(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
