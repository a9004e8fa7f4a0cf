"""Sample new slices from a trained run, or reconstruct given ones.

python predict.py --run runs/default --num 64                    # new slices to samples/ and images/samples.png
python predict.py --run runs/default --reconstruct FILE_OR_FOLDER --out reconstructions
"""

import csv
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import is_complete, load_weights, read_config
from config import MAX_BATCH_SIZE, MAX_SEED
from dataset import SAME_SPACING, denormalize, read_slices
from metrics import reconstruction_metrics
from modules import (
    MICRO_BATCH_CODES,
    MIN_TEMPERATURE,
    VQVAE,
    GatedPixelCNN,
    PriorConfig,
    Refiner,
    RefinerConfig,
    VQVAEConfig,
)
from nifti import write_slice
from plots import caption, evenly_spaced, reconstructions_figure, samples_figure
from utils import (
    Parser,
    RunError,
    check_folder,
    filled,
    number,
    pick_device,
    printable,
    run_command,
    say,
    writing,
)

DEFAULT_NUM = 64  # samples
SHOWN = 64  # samples in the figure
TOP_P = 0.995  # at 1 one of 30 samples has a broken outline
DIGITS = "[0-9]" * 6  # in the names of files
LONGEST = 200  # bytes of a slice's own name in that of a file, which may have 255
REFINER_BATCH = 64  # slices refined at a time on a GPU: 0.9 GB of 256x128
MOST = 10**6  # samples, so that their numbers have six digits


def parse_options(arguments: Sequence[str] | None):
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_sampling_options(parser)
    parser.add_argument(
        "--num",
        type=number(int, 1, MOST),
        default=DEFAULT_NUM,
        metavar="N",
        help="slices to sample (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=filled(Path), default=Path("samples"), help="folder of slices (default: %(default)s)"
    )
    parser.add_argument(
        "--position",
        type=number(float, 0, 1),
        metavar="P",
        help="height of the slices in their volume, 0 (lowest) to 1 (default: as often as in the training data)",
    )
    parser.add_argument(
        "--reconstruct",
        type=filled(Path),
        nargs="+",
        metavar="PATH",
        help="instead of sampling: encode and decode these files, or a folder's",
    )
    return parser.parse_args(arguments)


def add_sampling_options(parser: ArgumentParser) -> None:
    """The options that evaluate.py has too: which run, and how samples are drawn."""
    add = parser.add_argument
    add("--run", type=filled(Path), default=Path("runs/default"), help="run directory (default: %(default)s)")
    add("--images", type=filled(Path), default=Path("images"), help="folder of figures (default: %(default)s)")
    add(
        "--temperature",
        type=number(float, MIN_TEMPERATURE, 100),
        default=1.0,
        metavar="T",
        help="1e-6 to 100; below 1 the likelier codes are drawn more often (default: 1.0)",
    )
    add(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=TOP_P,
        metavar="P",
        help="draw from the fewest codes that have probability P together; 1: from all, and from time to time one that "
        "breaks an outline (default: 0.995)",
    )
    add(
        "--refiner-noise",
        type=number(float, 0, 1),
        default=1.0,
        metavar="D",
        help="scale of the refiner's initial noise, 0 to 1: less gives smoother slices, for short runs (default: 1)",
    )
    add(
        "--batch-size",
        type=number(int, 1, MAX_BATCH_SIZE),
        metavar="N",
        help="slices at a time (default: 32, on a GPU 512; half as many where its memory runs short)",
    )
    add(
        "--seed",
        type=number(int, 0, MAX_SEED),
        default=0,
        help="of the samples; sample n is fixed by it (default: 0)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def prepare_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make the folder, and remove what an earlier call wrote there, once there is something to take its place."""
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        old = [path for pattern in patterns for path in out.glob(pattern)]
        for path in old:
            path.unlink()
    if old:
        say(f"{out} held {len(old)} files of an earlier call: replaced")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Have a file written: all of it, or on an error, which names it, nothing."""
    try:
        with writing(path):
            yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def shortened(name: str) -> str:
    """The beginning of a name, of at most LONGEST bytes."""
    while len(os.fsencode(name)) > LONGEST:
        name = name[:-1]
    return name


def draw_positions(numbers: Sequence[int], seed: int, described: dict) -> torch.Tensor:
    """Positions (N,) for sample numbers, distributed as the training slices': NaN for not known."""
    draws = np.array([np.random.default_rng((seed, n)).random(2) for n in numbers])
    if described["unknown"] == 1:
        return torch.full((len(draws),), torch.nan)
    quantiles = described["quantiles"]
    positions = np.interp(draws[:, 0], np.linspace(0, 1, len(quantiles)), quantiles)
    positions[draws[:, 1] < described["unknown"]] = np.nan
    return torch.from_numpy(positions).float()


class Networks(NamedTuple):
    """What a run has trained."""

    vqvae: VQVAE
    prior: GatedPixelCNN
    refiner: Refiner


class Samples(NamedTuple):
    """New slices and what they were made from."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1]
    codes: Tensor  # (N, h, w) int64
    positions: Tensor  # (N,) in [0, 1], NaN for not known
    seconds: tuple[float, float]  # for codes, for decoding


def draw_samples(options, networks: Networks, positions: Tensor, device: torch.device) -> Samples:
    """Samples 0 to N - 1 at positions (N,), the same ones at every batch size."""
    start = time.perf_counter()
    codes = sample_codes(options, networks.prior, positions, device)
    drawn = time.perf_counter()
    slices = refine(options, networks, range(len(codes)), codes, device)
    return Samples(slices, codes, positions, (drawn - start, time.perf_counter() - drawn))


def sample_codes(options, prior: GatedPixelCNN, positions: Tensor, device: torch.device) -> Tensor:
    """Code grids (N, h, w) of samples 0 to N - 1 at positions (N,), on the CPU."""
    settings = options.seed, options.temperature, options.top_p
    with tqdm(total=len(positions) * prior.config.grid[0], desc="codes", unit="row", disable=None) as bar:

        def draw(part: range) -> Tensor:
            places = positions[part.start : part.stop].to(device)
            return prior.sample(part, places, *settings, progress=lambda row: bar.update(len(part))).cpu()

        return torch.cat(list(in_memory(draw, len(positions), options.batch_size)))


def refine(options, networks: Networks, numbers: Sequence[int], codes: Tensor, device: torch.device) -> Tensor:
    """Decode codes (N, h, w) and refine them for N sample ids: slices (N, 1, H, W), on the CPU."""
    size = REFINER_BATCH if device.type == "cuda" else max(1, MICRO_BATCH_CODES // codes[0].numel())
    with tqdm(total=len(codes), desc="refining", unit="slice", disable=None) as bar:

        def draw(part: range) -> Tensor:
            given = numbers[part.start : part.stop], codes[part.start : part.stop].to(device)
            slices = networks.refiner.sample(*given, networks.vqvae, options.seed, options.refiner_noise).cpu()
            bar.update(len(part))
            return slices

        return torch.cat(list(in_memory(draw, len(codes), size)))


def in_memory(compute: Callable[[range], Tensor], count: int, size: int) -> Iterator[Tensor]:
    """compute(part) of parts of [0, count), `size` at a time; of half as many from where a GPU's memory runs short.

    Raises RunError where it does not suffice for one.
    """
    start = 0
    while start < count:
        part, result = range(start, min(start + size, count)), None
        with suppress(torch.OutOfMemoryError):
            result = compute(part)
        if result is not None:
            yield result
            start = part.stop
        elif len(part) == 1:
            raise RunError("the GPU's memory does not suffice for a single slice: free some of it, or try --device cpu")
        else:
            torch.cuda.empty_cache()
            size = len(part) // 2


def sampling_device(options) -> torch.device:
    """The device that is asked for; where no batch size is, it is set to one that suits the device."""
    device = pick_device(options.device)
    options.batch_size = options.batch_size or (512 if device.type == "cuda" else 32)
    return device


def describe_sampling(options) -> str:
    """The options that samples depend on, for a title."""
    drawn = f"temperature {options.temperature:g}, top-p {options.top_p:g}, refiner noise {options.refiner_noise:g}"
    return f"{drawn}, seed {options.seed}"


def sample(options, config: dict, networks: Networks, device: torch.device) -> None:
    """Draw code grids, decode them, write slices, codes and the sheet."""
    positions = draw_positions(range(options.num), options.seed, config["positions"])
    if options.position is not None:
        positions = torch.full((options.num,), options.position)
    samples = draw_samples(options, networks, positions, device)
    slices = samples.slices[:, 0].numpy()
    prepare_folder(options.out, (f"sample_{DIGITS}.nii.gz", "codes.npy"))
    with whole(options.out / "codes.npy") as path:
        np.save(path, samples.codes.numpy().astype(np.int16))
    affine = np.array(config["affine"])
    for i, pixels in enumerate(denormalize(slices, config["intensity"]["scale"])):
        with whole(options.out / f"sample_{i:06d}.nii.gz") as path:
            write_slice(path, pixels, affine)
    shown = min(len(slices), SHOWN)
    samples_figure(options.images / "samples.png", slices[:shown], f"{shown} samples, {describe_sampling(options)}")
    seconds = samples.seconds
    say(
        f"{len(slices)} slices in {sum(seconds):.1f} s ({len(slices) / sum(seconds):.1f} slices/s; codes "
        f"{seconds[0]:.1f} s, decoding {seconds[1]:.1f} s): {options.out}, {options.images / 'samples.png'}"
    )


def warn_of_grids(affines: list[np.ndarray], trained: np.ndarray) -> None:
    """Say so where slices, by their affines (4, 4), have other pixel sizes or orientations than training slices."""
    sizes, usual = np.linalg.norm(np.array(affines)[:, :3, :2], axis=1), np.linalg.norm(trained[:3, :2], axis=0)
    factors = np.maximum(sizes / usual, usual / sizes).max(axis=1)
    if factors.max() > SAME_SPACING:
        height, width = sizes[factors.argmax()]
        say(
            f"warning: {(factors > SAME_SPACING).sum()} slices have other pixels ({height:.3g}x{width:.3g} mm) than "
            f"training slices ({usual[0]:.3g}x{usual[1]:.3g} mm): they are not resampled"
        )
    turned = sum(nib.aff2axcodes(affine)[:2] != nib.aff2axcodes(trained)[:2] for affine in affines)
    if turned:
        say(f"warning: {turned} slices have another orientation than training slices: they are not turned")


def reconstruct(options, config: dict, vqvae: VQVAE, device: torch.device) -> None:
    """Encode and decode given slices; write both, a table of SSIM and PSNR, and a figure."""
    slices, affines, notices = read_slices(options.reconstruct, tuple(config["slice_size"]))
    for notice in notices:
        say(notice)
    warn_of_grids(affines, np.array(config["affine"]))
    if any(Path(name).resolve().parent == options.out.resolve() for name in slices.names):
        raise RunError(f"--out {options.out} holds the slices to reconstruct: choose another folder")
    overall = reconstruction_metrics().to(device)
    single = reconstruction_metrics().to(device)
    rows, reconstructions = [], []
    for batch in slices.batches(options.batch_size):
        batch = batch.to(device)
        decoded = vqvae.decode(vqvae.encode(batch))
        overall.update(decoded, batch)
        for pair in zip(decoded.split(1), batch.split(1)):
            figures = {name: value.item() for name, value in single(*pair).items()}
            rows.append({"slice": printable(slices.names[len(rows)])} | figures)
        reconstructions.append(decoded[:, 0].cpu().numpy())
    reconstructions = np.concatenate(reconstructions)
    originals = slices.batch(np.arange(len(slices)))[:, 0].numpy()
    prepare_folder(
        options.out, (f"{DIGITS}_*_original.nii.gz", f"{DIGITS}_*_reconstruction.nii.gz", "reconstructions.csv")
    )
    for i, affine in enumerate(affines):
        name = f"{i:06d}_{shortened(Path(slices.names[i]).name.removesuffix('.gz').removesuffix('.nii'))}"
        for kind, pixels in (("original", originals[i]), ("reconstruction", reconstructions[i])):
            with whole(options.out / f"{name}_{kind}.nii.gz") as path:
                write_slice(path, denormalize(pixels, slices.scales[i]), affine)
    with whole(options.out / "reconstructions.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("slice", "ssim", "psnr"))
        writer.writeheader()
        writer.writerows(rows)
    chosen = evenly_spaced(len(slices))
    titles = [f"{caption(slices.names[i])}\nSSIM {rows[i]['ssim']:.3f}" for i in chosen]
    reconstructions_figure(options.images / "reconstructions.png", originals[chosen], reconstructions[chosen], titles)
    figures = {name: value.item() for name, value in overall.compute().items()}
    say(f"{len(slices)} slices: SSIM {figures['ssim']:.3f}, PSNR {figures['psnr']:.2f} dB: {options.out}")


def load_vqvae(run: Path, config: dict, device: torch.device) -> VQVAE:
    """A run's VQ-VAE. Raises RunError where it cannot be used, or takes no slices of the size that config.json has."""
    vqvae = load_weights(run / "vqvae.safetensors", VQVAE, VQVAEConfig).to(device)
    side = vqvae.config.downsampling
    rows, columns = config["slice_size"]
    if rows % side or columns % side:
        raise RunError(f"{run}: vqvae.safetensors takes no slices of {rows}x{columns}, which config.json has")
    return vqvae


def load_networks(run: Path, config: dict, vqvae: VQVAE, device: torch.device) -> Networks:
    """All of a run's networks. Raises RunError where one cannot be used, or where they are not of one training."""
    prior = load_weights(run / "prior.safetensors", GatedPixelCNN, PriorConfig).to(device)
    refiner = load_weights(run / "refiner.safetensors", Refiner, RefinerConfig)
    refiner.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    own = vqvae.config
    grid = tuple(side // own.downsampling for side in config["slice_size"])
    if (prior.config.grid, prior.config.codebook_size) != (grid, own.codebook_size):
        raise RunError(f"{run}: prior.safetensors and vqvae.safetensors are of different runs: their codes differ")
    if any(
        getattr(refiner.config, name) != getattr(own, name)
        for name in ("downsampling", "codebook_size", "embedding_dim")
    ):
        raise RunError(f"{run}: refiner.safetensors and vqvae.safetensors are of different runs: their codes differ")
    return Networks(vqvae, prior, refiner)


def refuse_unknown_position(options, config: dict) -> None:
    """Raise RunError where --position is one that no training slice had: the prior makes nothing of it."""
    heights = config["positions"]["quantiles"]
    if options.position is None or heights and heights[0] <= options.position <= heights[-1]:
        return
    known = f"from {heights[0]:g} to {heights[-1]:g}" if heights else "not known: no names with slice numbers"
    raise RunError(
        f"no --position {options.position:g} in {options.run}: the heights of its training slices are {known}"
    )


def warn_of_incomplete_run(run: Path) -> None:
    """Say so where train.py has not come to its end."""
    if not is_complete(run):
        say(f"warning: {run} is not complete: train.py has not come to its end")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python predict.py`."""
    options = parse_options(arguments)
    device = sampling_device(options)
    check_folder("--out", options.out)
    check_folder("--images", options.images)
    config = read_config(options.run)
    vqvae = load_vqvae(options.run, config, device)
    if options.reconstruct:
        reconstruct(options, config, vqvae, device)
        return
    networks = load_networks(options.run, config, vqvae, device)
    refuse_unknown_position(options, config)
    warn_of_incomplete_run(options.run)
    sample(options, config, networks, device)


if __name__ == "__main__":
    run_command(main)
