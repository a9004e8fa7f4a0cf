"""Sample new slices from a trained run, or reconstruct given ones.

python predict.py --run runs/default --num 64           # writes new slices to samples/, and images/samples.png
python predict.py --run runs/default --reconstruct FILE_OR_FOLDER --out reconstructions
python predict.py --run runs/default --animate sampling.gif
"""

import csv
import hashlib
import math
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from animation import sampling_frames, write_animation
from checkpoints import WEIGHTS, is_complete, load_weights, read_config
from config import MAX_BATCH_SIZE, MAX_SEED, Positions, RunConfig
from console import Parser, RunError, log_notices, logger, nonempty, number, printable, run_command, say
from containers import without_ending
from dataset import SAME_SPACING, denormalize, read_slices
from files import Reading, counted
from modules import MIN_TEMPERATURE, VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from nifti import encode_slice
from plots import as_array, bin_centres, caption, reconstructions_figure, samples_figure
from refiner import MICRO_BATCH_PIXELS, Refiner, RefinerConfig
from samples import FORMATS, SHARD, SIX_DIGITS, open_folder, prepare_folder
from utils import autocast, channels_last, check_folder, pick_device, write_file

DEFAULT_NUM = 64  # samples
MAX_NUM = 10**6  # samples: their file names have six digits
MAX_SHOWN = 64  # samples in the figure
ANIMATED = 4  # samples in an animation
GUIDANCE = 1.0  # with 2, samples of patients are sounder, with edges too strong, and those of the phantom worse
TOP_P = 0.995  # with 1, one of 30 samples has a broken outline; with 0.95, three times as many are alike
UNUSED_OPTIONS = {  # beside the option that is named first
    "reconstruct": ("num", "first", "format", "position", "temperature", "top_p", "guidance", "refiner_noise", "seed"),
    "animate": ("num", "first", "format", "out", "images", "batch_size"),
}
MAX_NAME_BYTES = 200  # of a slice's name within a file name, which may have 255
WRITERS = 2  # threads that write slices while the next ones are computed
BATCH_SIZES = {"cpu": 64, "cuda": 512}  # of codes: larger ones take less time a grid, but small calls fill one up too
REFINER_BATCH_SIZE = 64  # slices refined at a time on a GPU: 0.9 GB for 256x128


# ---------------------------------------------------------------- options


class SamplingOptions(Namespace):
    """Options that predict.py and evaluate.py share."""

    run: Path
    images: Path
    temperature: float
    top_p: float
    guidance: float | None  # None: chosen by `set_guidance`
    refiner_noise: float
    batch_size: int  # 0: chosen by `sampling_device`
    seed: int
    device: str


class PredictOptions(SamplingOptions):
    """Options of predict.py."""

    num: int
    first: int | None
    format: str
    out: Path
    position: float | None
    reconstruct: list[Path] | None
    animate: Path | None


def parse_options(arguments: Sequence[str] | None) -> PredictOptions:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_sampling_options(parser)
    parser.add_argument(
        "--num",
        type=number(int, 1, MAX_NUM),
        default=DEFAULT_NUM,
        metavar="N",
        help="slices to sample (default: %(default)s)",
    )
    parser.add_argument(
        "--first",
        type=number(int, 0, MAX_NUM - 1),
        metavar="N",
        help="number of the first sample: several processes can share the work, and --out (default: 0)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help=f"of samples: NIfTI, 16-bit PNG, or files of {SHARD} samples for NumPy (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=nonempty(Path), default=Path("samples"), help="folder of slices (default: %(default)s)"
    )
    parser.add_argument(
        "--position",
        type=number(float, 0, 1),
        metavar="P",
        help="position of the slices in their volume, 0 (lowest) to 1 (default: distributed as in the training data)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--reconstruct",
        type=nonempty(Path),
        nargs="+",
        metavar="PATH",
        help="encode and decode these files, or the files of a folder, instead of sampling",
    )
    instead.add_argument(
        "--animate",
        type=nonempty(Path),
        metavar="FILE.gif",
        help=f"write an animation of {ANIMATED} samples as they are drawn, from low to high, instead of slices",
    )
    options = parser.parse_args(arguments, PredictOptions())
    for mode, unused in UNUSED_OPTIONS.items():
        for name in unused if getattr(options, mode) else ():
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{mode} does not use --{name.replace('_', '-')}: leave it out")
    return options


def add_sampling_options(parser: ArgumentParser) -> None:
    """Add the options of `SamplingOptions` to a parser."""
    add = parser.add_argument
    add("--run", type=nonempty(Path), default=Path("runs/default"), help="run directory (default: %(default)s)")
    add("--images", type=nonempty(Path), default=Path("images"), help="folder of figures (default: %(default)s)")
    add(
        "--temperature",
        type=number(float, MIN_TEMPERATURE, 100),
        default=1.0,
        metavar="T",
        help="sampling temperature, 1e-6 to 100; below 1, likely codes are drawn more often (default: 1.0)",
    )
    add(
        "--top-p",
        type=number(float, 0, 1, exclusive=True),
        default=TOP_P,
        metavar="P",
        help="nucleus sampling: draw from the fewest codes that together have probability P; with 1, from all codes, "
        "some of which break an outline (default: 0.995)",
    )
    add(
        "--guidance",
        type=number(float, 0, 10),
        metavar="W",
        help="how far codes are drawn away from the mistakes of the prior's guide, 0 to 10; more gives sounder and "
        f"more typical anatomy, 0 leaves the guide out, which halves the time for codes (default: {GUIDANCE:g}; 0 for "
        "a run without guide.safetensors)",
    )
    add(
        "--refiner-noise",
        type=number(float, 0, 1),
        default=1.0,
        metavar="S",
        help="scale of the refiner's initial noise, 0 to 1; less gives smoother slices (default: 1)",
    )
    add(
        "--batch-size",
        type=number(int, 1, MAX_BATCH_SIZE),
        default=0,
        metavar="N",
        help=f"slices per batch (default: {BATCH_SIZES['cpu']}, on a GPU {BATCH_SIZES['cuda']}; halved if its memory "
        "runs out)",
    )
    add(
        "--seed",
        type=number(int, 0, MAX_SEED),
        default=0,
        help="random seed; sample n is the same however many are drawn (default: 0)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def sampling_device(options: SamplingOptions) -> torch.device:
    """Return the device of --device; set the batch size to the device's default if none was given."""
    device = pick_device(options.device)
    options.batch_size = options.batch_size or BATCH_SIZES[device.type]
    return device


def describe_sampling(options: SamplingOptions) -> str:
    """Return the options that samples depend on, for a title."""
    codes = f"temperature {options.temperature:g}, top-p {options.top_p:g}, guidance {options.guidance:g}"
    return f"{codes}, refiner noise {options.refiner_noise:g}, seed {options.seed}"


# ---------------------------------------------------------------- output files


def truncate_name(name: str) -> str:
    """Truncate a name to at most MAX_NAME_BYTES bytes."""
    while len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = name[:-1]
    return name


# ---------------------------------------------------------------- sampling


class Networks(NamedTuple):
    """The trained networks of a run."""

    vqvae: VQVAE
    prior: GatedPixelCNN
    guide: GatedPixelCNN | None  # the prior early in its training
    refiner: Refiner


class Samples(NamedTuple):
    """New slices, and the codes and positions that they were generated from."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1]
    codes: Tensor  # (N, h, w) int64
    positions: Tensor  # (N,) in [0, 1], NaN for unknown
    seconds: tuple[float, float]  # for sampling the codes, for decoding and refining


def draw_positions(sample_ids: Sequence[int], seed: int, distribution: Positions) -> Tensor:
    """Draw slice positions with the distribution of the training slices.

    Args:
        sample_ids: N integers; each sample has its own random stream.
        seed: Of all samples.
        distribution: Of the training slices' positions.

    Returns:
        Positions (N,) in [0, 1], NaN for unknown.
    """
    draws = np.array([np.random.default_rng((seed, n)).random(2) for n in sample_ids])
    if distribution.unknown == 1:
        return torch.full((len(draws),), torch.nan)
    quantiles = distribution.quantiles
    positions = np.interp(draws[:, 0], np.linspace(0, 1, len(quantiles)), quantiles)
    positions[draws[:, 1] < distribution.unknown] = np.nan
    return torch.from_numpy(positions).float()


def draw_samples(
    options: SamplingOptions, networks: Networks, sample_ids: Sequence[int], positions: Tensor, device: torch.device
) -> Samples:
    """Draw samples of N ids at positions (N,); they do not depend on the batch size."""
    start = time.perf_counter()
    codes = sample_codes(options, networks, sample_ids, positions, device)
    codes_done = time.perf_counter()
    slices = refine(options, networks, sample_ids, codes, device)
    return Samples(slices, codes, positions, (codes_done - start, time.perf_counter() - codes_done))


def sample_codes(
    options: SamplingOptions, networks: Networks, sample_ids: Sequence[int], positions: Tensor, device: torch.device
) -> Tensor:
    """Draw the code grids (N, h, w) of N sample ids at positions (N,); return them on the CPU."""
    prior, settings = networks.prior, (options.seed, options.temperature, options.top_p)
    guided = networks.guide, options.guidance or 0.0
    with tqdm(total=len(positions), desc="codes", unit="slice", leave=False, disable=None) as bar:

        def progress(row: int) -> None:
            bar.set_postfix_str(f"row {row + 1} of {prior.rows}")

        def sample_batch(indices: list[int]) -> Tensor:
            ids = [sample_ids[i] for i in indices]
            return prior.sample(ids, positions[indices].to(device), *settings, *guided, progress)

        return torch.cat(list(split_to_fit(sample_batch, len(positions), options.batch_size, bar)))


def refine(
    options: SamplingOptions, networks: Networks, sample_ids: Sequence[int], codes: Tensor, device: torch.device
) -> Tensor:
    """Decode codes (N, h, w) and refine them for N sample ids; return slices (N, 1, H, W) on the CPU."""
    codes, settings = codes.cpu(), (networks.vqvae, options.seed, options.refiner_noise)
    pixels = codes[0].numel() * networks.vqvae.config.downsampling**2
    fastest = REFINER_BATCH_SIZE if device.type == "cuda" else max(1, MICRO_BATCH_PIXELS // pixels)
    with tqdm(total=len(codes), desc="refining", unit="slice", leave=False, disable=None) as bar:

        def refine_batch(indices: list[int]) -> Tensor:
            ids = [sample_ids[i] for i in indices]
            with autocast(device):
                return networks.refiner.sample(ids, codes[indices].to(device), *settings)

        size = min(fastest, options.batch_size)
        return torch.cat(list(split_to_fit(refine_batch, len(codes), size, bar)))


def split_to_fit(compute: Callable[[list[int]], Tensor], count: int, size: int, bar: tqdm) -> Iterator[Tensor]:
    """Yield `compute` of consecutive batches of [0, count), on the CPU; halve their size if a GPU runs out of memory.

    The last batch is filled up with copies of its last index. All batches then have the same size, and a sample is the
    same to the last bit however many are drawn: the rounding of a matrix product depends on the number of its rows.

    Args:
        compute: Maps a batch of indices to its result.
        count: Number of indices.
        size: Initial batch size.
        bar: Counts the indices.

    Raises:
        RunError: The memory does not suffice for a batch of one.
    """
    start = 0
    while start < count:
        batch, result = range(start, min(start + size, count)), None
        with suppress(torch.OutOfMemoryError):
            result = compute([*batch, *[batch[-1]] * (size - len(batch))])[: len(batch)].cpu()
        if result is not None:
            yield result
            bar.update(len(batch))
            start = batch.stop
        elif size == 1:
            raise RunError("the GPU's memory does not suffice for a single slice: free some of it, or try --device cpu")
        else:
            torch.cuda.empty_cache()
            size = max(1, size // 2)


def sample(options: PredictOptions, config: RunConfig, networks: Networks, device: torch.device) -> None:
    """Draw samples batch by batch; write the slices, their codes and a figure. Memory does not grow with their number.

    A slice that --out already holds, drawn with the same settings, is not drawn again.
    """
    numbers = range(options.first or 0, (options.first or 0) + options.num)
    settings = sampling_settings(options, device)
    folder = open_folder(options.format, options.out, numbers, options.first is not None, settings, config)
    missing = folder.missing()
    seconds, written = np.zeros(2), list[Future[None]]()
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=len(missing), desc="samples", unit="slice", disable=None) as bar,
    ):
        for start in range(0, len(missing), options.batch_size):
            ids = missing[start : start + options.batch_size]
            samples = draw_samples(options, networks, ids, positions_of(ids, options, config), device)
            for future in written:  # of the batch before: no more than two are in memory
                future.result()
            arrays = samples.slices[:, 0].numpy(), samples.codes.numpy(), samples.positions.numpy()
            written = [writers.submit(write) for write in folder.add(ids, *arrays)]
            seconds += samples.seconds
            bar.update(len(ids))
        for future in written:
            future.result()
    shown = numbers[:MAX_SHOWN]
    title = f"{len(shown)} samples, {describe_sampling(options)}"
    samples_figure(options.images / "samples.png", folder.read(shown), title)
    if len(missing) < len(numbers):
        say(f"{options.out} held {len(numbers) - len(missing)} of {len(numbers)} slices, of an earlier call")
    speed = ""
    if missing:
        total, parts = sum(seconds), f"codes {seconds[0]:.1f} s, decoding {seconds[1]:.1f} s"
        speed = f" on {device} in {total:.1f} s ({len(missing) / total:.1f} slices/s; {parts})"
    say(f"{counted(len(missing), 'slice')}{speed}: {options.out}, {options.images / 'samples.png'}")


def sampling_settings(options: PredictOptions, device: torch.device) -> dict[str, Any]:
    """Return all that samples depend on besides their numbers."""
    digest = hashlib.sha256()
    for path in (options.run / name for name in ("config.json", *WEIGHTS)):
        digest.update(path.read_bytes() if path.exists() else b"")  # there may be no guide
    names = ("seed", "temperature", "top_p", "guidance", "refiner_noise", "position")
    chosen = {name: getattr(options, name) for name in names}
    return chosen | {"device": device.type, "torch": torch.__version__, "sha256_of_run": digest.hexdigest()}


def positions_of(sample_ids: Sequence[int], options: PredictOptions, config: RunConfig) -> Tensor:
    """Return the positions (N,) of N samples: --position, or drawn."""
    if options.position is not None:
        return torch.full((len(sample_ids),), options.position)
    return draw_positions(sample_ids, options.seed, config.positions)


# ---------------------------------------------------------------- animation


def animate(options: PredictOptions, path: Path, config: RunConfig, networks: Networks, device: torch.device) -> None:
    """Write an animation of samples as they are drawn, at positions evenly spaced over those of training slices."""
    options.batch_size = ANIMATED  # batches are filled up
    known = config.positions.quantiles
    shares = (np.arange(ANIMATED) + 0.5) / ANIMATED
    positions = torch.tensor(np.quantile(known, shares) if known else [math.nan] * ANIMATED, dtype=torch.float32)
    if options.position is not None:
        positions.fill_(options.position)
    codes = sample_codes(options, networks, range(ANIMATED), positions, device)
    steps: list[Tensor] = []
    with autocast(device):
        slices = networks.refiner.sample(
            range(ANIMATED), codes.to(device), networks.vqvae, options.seed, options.refiner_noise, steps.append
        )
    frames = list(sampling_frames(codes, networks.vqvae, networks.prior, steps, slices))
    labels = [f"height {position:.2f}" if known else "" for position in positions.tolist()]
    write_animation(path, frames, networks.vqvae, labels)
    say(f"{len(frames)} frames, {path.stat().st_size / 1e6:.1f} MB: {path}")


# ---------------------------------------------------------------- reconstruction


def warn_of_geometry(affines: Sequence[np.ndarray], training_affine: np.ndarray) -> None:
    """Warn if slices, by their affines (4, 4), differ from training slices in pixel spacing or orientation."""
    spacings = np.linalg.norm(np.array(affines)[:, :3, :2], axis=1)
    expected = np.linalg.norm(training_affine[:3, :2], axis=0)
    ratios = np.maximum(spacings / expected, expected / spacings).max(axis=1)
    if ratios.max() > SAME_SPACING:
        height, width = spacings[ratios.argmax()]
        logger.warning(
            f"{counted(int((ratios > SAME_SPACING).sum()), 'slice')} with another pixel spacing ({height:.3g}x"
            f"{width:.3g} mm) than training slices ({expected[0]:.3g}x{expected[1]:.3g} mm), not resampled"
        )
    orientation = nib.aff2axcodes(training_affine)[:2]
    others = sum(nib.aff2axcodes(affine)[:2] != orientation for affine in affines)
    if others:
        logger.warning(f"{counted(others, 'slice')} with another orientation than training slices, not reoriented")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table of SSIM and PSNR, a row for each slice, as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("slice", "ssim", "psnr"))
        writer.writeheader()
        writer.writerows(rows)


def reconstruct(options: PredictOptions, config: RunConfig, vqvae: VQVAE, device: torch.device) -> None:
    """Encode and decode given slices; write originals, reconstructions, a table of SSIM and PSNR, and a figure."""
    from metrics import reconstruction_metrics  # here: to sample without torchmetrics saves some tenths of a second

    reading = Reading.of(config.options)
    slices, affines, notices = read_slices(options.reconstruct or [], config.slice_size, reading)
    log_notices(notices)
    warn_of_geometry(affines, np.array(config.affine))
    if any(Path(name).resolve().parent == options.out.resolve() for name in slices.names):
        raise RunError(f"--out {options.out} holds the slices to reconstruct: choose another folder")
    overall = reconstruction_metrics().to(device)
    single = reconstruction_metrics().to(device)
    rows: list[dict[str, Any]] = []
    decoded_batches = []
    for batch in slices.batches(options.batch_size):
        batch = batch.to(device)
        decoded = vqvae.decode(vqvae.encode(batch))
        overall.update(decoded, batch)
        for pair in zip(decoded.split(1), batch.split(1)):
            metrics = {name: value.item() for name, value in single(*pair).items()}
            rows.append({"slice": printable(slices.names[len(rows)])} | metrics)
        decoded_batches.append(as_array(decoded))
    reconstructions = np.concatenate(decoded_batches)
    originals = as_array(slices.batch(np.arange(len(slices))))
    names = (f"{SIX_DIGITS}_*_original.nii.gz", f"{SIX_DIGITS}_*_reconstruction.nii.gz", "reconstructions.csv")
    prepare_folder(options.out, names)
    for i, affine in enumerate(affines):
        name = f"{i:06d}_{truncate_name(without_ending(Path(slices.names[i]).name))}"
        for kind, pixels in (("original", originals[i]), ("reconstruction", reconstructions[i])):
            content = encode_slice(denormalize(pixels, slices.scales[i], slices.lows[i]), affine)
            write_file(options.out / f"{name}_{kind}.nii.gz", partial(Path.write_bytes, data=content))
    write_file(options.out / "reconstructions.csv", lambda part: write_table(part, rows))
    shown = bin_centres(len(slices))
    titles = [f"{caption(slices.names[i])}\nSSIM {rows[i]['ssim']:.3f}" for i in shown]
    reconstructions_figure(options.images / "reconstructions.png", originals[shown], reconstructions[shown], titles)
    means = {name: value.item() for name, value in overall.compute().items()}
    say(f"{counted(len(slices), 'slice')}: SSIM {means['ssim']:.3f}, PSNR {means['psnr']:.2f} dB: {options.out}")


# ---------------------------------------------------------------- command


def load_vqvae(run: Path, config: RunConfig, device: torch.device) -> VQVAE:
    """Load the VQ-VAE of a run.

    Raises:
        RunError: It cannot be used, or the slice size of config.json does not fit it.
    """
    vqvae = load_weights(run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    side = vqvae.config.downsampling
    rows, columns = config.slice_size
    if rows % side or columns % side:
        raise RunError(f"{run}: vqvae.safetensors takes no slices of {rows}x{columns}, which config.json has")
    return vqvae.to(device)


def load_networks(run: Path, config: RunConfig, device: torch.device) -> Networks:
    """Load the networks of a run; the guide is None where there is none.

    Raises:
        RunError: A network cannot be used, or the networks are of different runs.
    """
    vqvae = load_vqvae(run, config, device)
    prior = load_weights(run / "prior.safetensors", GatedPixelCNN, PriorConfig, "prior_")
    guide = None
    if os.path.lexists(run / "guide.safetensors"):
        guide = load_weights(run / "guide.safetensors", GatedPixelCNN, PriorConfig, "prior_").to(device)
    refiner = load_weights(run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    own = vqvae.config
    grid = tuple(side // own.downsampling for side in config.slice_size)
    if (prior.config.grid, prior.config.codebook_size) != (grid, own.codebook_size):
        raise RunError(f"{run}: prior.safetensors and vqvae.safetensors are of different runs: their codes differ")
    if guide and guide.config != prior.config:
        raise RunError(f"{run}: guide.safetensors and prior.safetensors are of different runs: their options differ")
    if any(getattr(refiner.config, name) != getattr(own, name) for name in ("downsampling", "codebook_size")):
        raise RunError(f"{run}: refiner.safetensors and vqvae.safetensors are of different runs: their codes differ")
    return Networks(vqvae, prior.to(device), guide, channels_last(refiner, device))  # twice as fast on a CPU


def set_guidance(options: SamplingOptions, networks: Networks) -> None:
    """Set the guidance to its default if none was given. Raises RunError if there is no guide for what was given."""
    if options.guidance is None:
        options.guidance = GUIDANCE if networks.guide else 0.0
    if options.guidance and not networks.guide:
        raise RunError(f"{options.run} has no guide.safetensors: leave --guidance out")


def check_position(options: PredictOptions, config: RunConfig) -> None:
    """Raise RunError for a --position outside those of the training slices: the prior cannot extrapolate."""
    known = config.positions.quantiles
    if options.position is None or known and known[0] <= options.position <= known[-1]:
        return
    extent = f"from {known[0]:g} to {known[-1]:g}" if known else "not known: no names with slice numbers"
    raise RunError(
        f"no --position {options.position:g} in {options.run}: the positions of its training slices are {extent}"
    )


def check_animation(path: Path) -> None:
    """Raise RunError unless --animate names a GIF in a folder that can be written to."""
    if path.suffix.lower() != ".gif" or path.is_dir():
        raise RunError(f"--animate {path}: an animation is a GIF: give it a name like sampling.gif")
    check_folder("--animate", path.parent)


def warn_if_incomplete(run: Path) -> None:
    """Warn if the training of a run is not finished."""
    if not is_complete(run):
        logger.warning(f"{run} is not complete: the training is not finished")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python predict.py`."""
    options = parse_options(arguments)
    device = sampling_device(options)
    if options.animate:
        check_animation(options.animate)
    else:
        check_folder("--out", options.out)
        check_folder("--images", options.images)
    config = read_config(options.run)
    if options.reconstruct:
        reconstruct(options, config, load_vqvae(options.run, config, device), device)
        return
    if (options.first or 0) + options.num > MAX_NUM:
        raise RunError(f"--first and --num together must be at most {MAX_NUM}: file names have six digits")
    networks = load_networks(options.run, config, device)
    set_guidance(options, networks)
    check_position(options, config)
    warn_if_incomplete(options.run)
    if options.animate:
        animate(options, options.animate, config, networks, device)
        return
    sample(options, config, networks, device)


if __name__ == "__main__":
    run_command(main)
