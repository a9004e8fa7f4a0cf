"""Sample new slices from a trained run, reconstruct given ones, or evaluate the run.

python predict.py --run runs/default --num 64                    # new slices to samples/ and images/samples.png
python predict.py --run runs/default --reconstruct FILE_OR_FOLDER --out reconstructions
python predict.py --run runs/default --evaluate                  # a table, evaluation.json in the run, and figures
"""

import csv
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import SAME_SPACING, DataError, Dataset, Slices, denormalize, load_dataset, read_slices
from metrics import (
    SMALLEST_SIDE,
    Nearest,
    RandomFeatures,
    all_reconstruction_metrics,
    bits_per_pixel,
    closest_views,
    code_counts,
    codebook_use,
    copying_statistic,
    density_and_coverage,
    frechet_distance,
    halves,
    jpeg2000_bits,
    ms_ssim_diversity,
    nearest,
    quantise,
    reconstruction_metrics,
    share_nearer,
    sliced_wasserstein,
    two_sample_test,
    wilson_interval,
)
from modules import COLDEST, PART_CODES, VQVAE, Detail, DetailConfig, GatedPixelCNN, PriorConfig, VQVAEConfig
from nifti import write_slice
from utils import (
    LIMITS,
    Parser,
    RunError,
    caption,
    check_folder,
    evaluation_figure,
    fail,
    filled,
    in_short,
    is_complete,
    left_right_axis,
    load_weights,
    make_folder,
    number,
    pick_device,
    printable,
    read_config,
    reconstructions_figure,
    samples_figure,
    say,
    spread,
    strict_json,
    write_file,
)

DEFAULT_NUM = 64  # samples
FEWEST = 4  # slices or samples that can be evaluated
SHOWN = 64  # samples in the figure
TOP_P = 0.995  # at 1 one of 30 samples has a broken outline
DIGITS = "[0-9]" * 6  # in the names of files
LONGEST = 200  # bytes of a slice's own name in that of a file, which may have 255
DETAIL_AT_ONCE = 64  # slices whose detail is drawn at a time on a GPU: 0.9 GB of 256x128
MOST = 10**6  # samples, so that their numbers have six digits


def parse_options(arguments: Sequence[str] | None):
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--run", type=filled(Path), default=Path("runs/default"), help="run directory (default: %(default)s)"
    )
    parser.add_argument(
        "--num",
        type=number(int, 1, MOST),
        metavar="N",
        help="slices to sample (default: 64; with --evaluate as many as held-out slices if they are more)",
    )
    parser.add_argument(
        "--out", type=filled(Path), default=Path("samples"), help="folder of slices (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=filled(Path), default=Path("images"), help="folder of figures (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=number(float, COLDEST, 100),
        default=1.0,
        metavar="T",
        help="1e-6 to 100; below 1 the likelier codes are drawn more often (default: 1.0)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=TOP_P,
        metavar="P",
        help="draw from the fewest codes that have probability P together; 1: from all, and from time to time one that "
        "breaks an outline (default: 0.995)",
    )
    parser.add_argument(
        "--detail",
        type=number(float, 0, 1),
        default=1.0,
        metavar="D",
        help="noise that detail is made from, 0 to 1: less is smoother, and clears samples of short runs (default: 1)",
    )
    parser.add_argument(
        "--position",
        type=number(float, 0, 1),
        metavar="P",
        help="height of the slices in their volume, 0 (lowest) to 1 (default: as often as in the training data)",
    )
    parser.add_argument(
        "--batch-size",
        type=number(int, *LIMITS["batch_size"]),
        metavar="N",
        help="slices at a time (default: 32, on a GPU 512; half as many where its memory runs short)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, *LIMITS["seed"]),
        default=0,
        help="of the samples; sample n is fixed by it (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--reconstruct",
        type=filled(Path),
        nargs="+",
        metavar="PATH",
        help="instead of sampling: encode and decode these files, or a folder's",
    )
    instead.add_argument(
        "--evaluate",
        action="store_true",
        help="instead of sampling: measure reconstructions, prior, samples and copying on held-out slices",
    )
    parser.add_argument(
        "--split", choices=("validate", "test"), default="test", help="held-out slices of --evaluate (default: test)"
    )
    parser.add_argument(
        "--data",
        type=filled(str),
        metavar="DIR",
        help="where the training data of --evaluate lie now (default: where they lay then)",
    )
    options = parser.parse_args(arguments)
    if options.evaluate and options.position is not None:
        parser.error("--position goes with no --evaluate: held-out slices are of every height")
    if options.evaluate and options.num is not None and options.num < FEWEST:
        parser.error(f"--evaluate needs --num {FEWEST} at least")
    return options


def prepare_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make the folder; remove what an earlier call wrote there, and say so."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = [path for pattern in patterns for path in out.glob(pattern)]
        if old:
            say(f"{out} held {len(old)} files of an earlier call: replaced")
        for path in old:
            path.unlink()
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}") from None


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
    detail: Detail


class Samples(NamedTuple):
    """New slices and what they were made from."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1]
    codes: Tensor  # (N, h, w) int64
    positions: Tensor  # (N,) in [0, 1], NaN for not known
    seconds: tuple[float, float]  # for codes, for decoding


def draw_samples(options, config: dict, networks: Networks, count: int, device: torch.device) -> Samples:
    """Samples 0 to count - 1, the same ones at every batch size."""
    positions = draw_positions(range(count), options.seed, config["positions"])
    if options.position is not None:
        positions = torch.full((count,), options.position)
    start = time.perf_counter()
    codes = draw_codes(options, networks.prior, positions, device)
    drawn = time.perf_counter()
    slices = draw_detail(options, networks, range(count), codes, device)
    return Samples(slices, codes, positions, (drawn - start, time.perf_counter() - drawn))


def draw_codes(options, prior: GatedPixelCNN, positions: Tensor, device: torch.device) -> Tensor:
    """Code grids (N, h, w) of samples 0 to N - 1 at positions (N,), on the CPU."""
    settings = options.seed, options.temperature, options.top_p
    with tqdm(total=len(positions) * prior.config.grid[0], desc="codes", unit="row", disable=None) as bar:

        def draw(part: range) -> Tensor:
            places = positions[part.start : part.stop].to(device)
            return prior.sample(part, places, *settings, progress=lambda row: bar.update(len(part))).cpu()

        return torch.cat(list(in_memory(draw, len(positions), options.batch_size)))


def draw_detail(options, networks: Networks, numbers: Sequence[int], codes: Tensor, device: torch.device) -> Tensor:
    """Slices (N, 1, H, W) of codes (N, h, w), their detail drawn for N sample numbers, on the CPU."""
    size = DETAIL_AT_ONCE if device.type == "cuda" else max(1, PART_CODES // codes[0].numel())
    with tqdm(total=len(codes), desc="detail", unit="slice", disable=None) as bar:

        def draw(part: range) -> Tensor:
            given = numbers[part.start : part.stop], codes[part.start : part.stop].to(device)
            slices = networks.detail.sample(*given, networks.vqvae, options.seed, options.detail).cpu()
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


def describe_sampling(options) -> str:
    """The options that samples depend on, for a title."""
    told = f"temperature {options.temperature:g}, top-p {options.top_p:g}, detail {options.detail:g}"
    return f"{told}, seed {options.seed}"


def sample(options, config: dict, networks: Networks, device: torch.device) -> None:
    """Draw code grids, decode them, write slices, codes and the sheet."""
    prepare_folder(options.out, (f"sample_{DIGITS}.nii.gz", "codes.npy"))
    samples = draw_samples(options, config, networks, options.num or DEFAULT_NUM, device)
    slices = samples.slices[:, 0].numpy()
    np.save(options.out / "codes.npy", samples.codes.numpy().astype(np.int16))
    affine = np.array(config["affine"])
    for i, pixels in enumerate(denormalize(slices, config["intensity"]["scale"])):
        write_slice(options.out / f"sample_{i:06d}.nii.gz", pixels, affine)
    shown = min(len(slices), SHOWN)
    samples_figure(options.images / "samples.png", slices[:shown], f"{shown} samples, {describe_sampling(options)}")
    seconds = samples.seconds
    say(
        f"{len(slices)} slices in {sum(seconds):.1f} s ({len(slices) / sum(seconds):.1f} slices/s; codes "
        f"{seconds[0]:.1f} s, decoding {seconds[1]:.1f} s): {options.out}, {options.images / 'samples.png'}"
    )


def warn_of_spacing(affines: list[np.ndarray], trained: np.ndarray) -> None:
    """Say so where pixels of slices, by their affines (4, 4), are larger or smaller than those of training slices."""
    sizes, usual = np.linalg.norm(np.array(affines)[:, :3, :2], axis=1), np.linalg.norm(trained[:3, :2], axis=0)
    factors = np.maximum(sizes / usual, usual / sizes).max(axis=1)
    if factors.max() > SAME_SPACING:
        height, width = sizes[factors.argmax()]
        say(
            f"warning: {(factors > SAME_SPACING).sum()} slices have other pixels ({height:.3g}x{width:.3g} mm) than "
            f"training slices ({usual[0]:.3g}x{usual[1]:.3g} mm): they are not resampled"
        )


def reconstruct(options, config: dict, vqvae: VQVAE, device: torch.device) -> None:
    """Encode and decode given slices; write both, a table of SSIM and PSNR, and a figure."""
    slices, affines, notices = read_slices(options.reconstruct, tuple(config["slice_size"]))
    for notice in notices:
        say(notice)
    warn_of_spacing(affines, np.array(config["affine"]))
    if any(Path(name).resolve().parent == options.out.resolve() for name in slices.names):
        raise RunError(f"--out {options.out} holds the slices to reconstruct: choose another folder")
    prepare_folder(
        options.out, (f"{DIGITS}_*_original.nii.gz", f"{DIGITS}_*_reconstruction.nii.gz", "reconstructions.csv")
    )
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
    for i, affine in enumerate(affines):
        name = f"{i:06d}_{shortened(Path(slices.names[i]).name.removesuffix('.gz').removesuffix('.nii'))}"
        for kind, pixels in (("original", originals[i]), ("reconstruction", reconstructions[i])):
            write_slice(options.out / f"{name}_{kind}.nii.gz", denormalize(pixels, slices.scales[i]), affine)
    with open(options.out / "reconstructions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("slice", "ssim", "psnr"))
        writer.writeheader()
        writer.writerows(rows)
    chosen = spread(len(slices))
    titles = [f"{caption(slices.names[i])}\nSSIM {rows[i]['ssim']:.3f}" for i in chosen]
    reconstructions_figure(options.images / "reconstructions.png", originals[chosen], reconstructions[chosen], titles)
    figures = {name: value.item() for name, value in overall.compute().items()}
    say(f"{len(slices)} slices: SSIM {figures['ssim']:.3f}, PSNR {figures['psnr']:.2f} dB: {options.out}")


# ---------------------------------------------------------------- evaluation


class Group(NamedTuple):
    """Slices that are measured together."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1], of 256 levels
    cases: Sequence  # N patients; each sample is a case of its own


def evaluate(options, config: dict, networks: Networks, device: torch.device) -> None:
    """Measure a run on held-out slices: a table, RUN/evaluation.json, images/evaluation.png and images/copying.png.

    A sample may be unlike a real slice because of the decoder and its detail or because of the prior. So what is
    measured of samples is measured four times, and reconstructions have their detail drawn anew, as samples do:

    samples        Samples beside held-out slices.
    decoder_alone  Reconstructions in the samples' place: they owe nothing to the prior. They are of training slices,
                   so that none lies beside its own original; for copying of the held-out slices, which no network has
                   seen.
    prior_alone    Samples beside reconstructions of the held-out slices: both are decoded and given detail. Copying is
                   to be judged here, because a slice smoother than real ones is nearer to every other slice, and a
                   rougher one farther.
    floor          Training slices in their place: how much real slices of other patients differ. For copying half of
                   the held-out cases beside the other half.

    Samples and training slices are as many, since most figures depend on that; all samples are searched for copies.
    """
    started = time.perf_counter()
    data = training_data(options, config, networks.vqvae)
    make_folder(options.images)  # now, not after minutes
    held_out = getattr(data, options.split)
    count = options.num or max(DEFAULT_NUM, len(held_out))
    drawn = draw_samples(options, config, networks, count, device)
    samples = Group(quantise(drawn.slices.to(device)), range(count))
    real = take(held_out, np.arange(len(held_out)), device)
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.train))[:count])
    training = take(data.train, chosen, device)
    codes, decoded, reconstructions = reconstruct_all(networks, real, options)
    training_codes, training_decoded, training_reconstructions = reconstruct_all(networks, training, options)

    print(f"{count} samples drawn; measuring reconstructions and the prior")
    results = {
        "settings": {
            "split": options.split,
            "heldout_slices": len(held_out),
            "heldout_cases": len(set(real.cases)),
            "training_slices": len(data.train),
            "samples": count,
            "samples_compared": len(chosen),
            "seed": options.seed,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "detail": options.detail,
        },
        **network_figures(networks, real, decoded, codes, held_out.positions, options.batch_size),
        "training": network_figures(
            networks, training, training_decoded, training_codes, data.train.positions[chosen], options.batch_size
        ),
    }
    results["prior"]["jpeg2000_bits_per_slice"] = jpeg2000_bits(real.slices, results["reconstructions"]["psnr"])

    print("measuring samples")
    features = RandomFeatures(training.slices)
    as_many = Group(*(part[: len(chosen)] for part in samples))
    compared = {
        "samples": (as_many, real),
        "decoder_alone": (training_reconstructions, real),
        "prior_alone": (as_many, reconstructions),
        "floor": (training, real),
    }
    of_samples = {name: sample_figures(features, *pair) for name, pair in compared.items()}

    print(f"searching {len(data.train)} training slices for copies")
    axis = left_right_axis(np.array(config["affine"]))
    near, near_decoded, near_real = (
        nearest(group.slices, data.train.batch, len(data.train), axis) for group in (samples, reconstructions, real)
    )
    half = torch.from_numpy(halves(real.cases)).to(device)
    near_halves = (Nearest(*(values[those] for values in near_real)) for those in (~half, half))
    compared = {
        "samples": (near, near_real),
        "decoder_alone": (near_decoded, near_real),
        "prior_alone": (near, near_decoded),
        "floor": near_halves,
    }
    of_copying = {name: copying_figures(*pair) for name, pair in compared.items()}
    parts = {name: {"samples": of_samples[name], "copying": of_copying[name]} for name in compared}
    results |= parts.pop("samples") | parts

    print_table(results)
    write_file(options.run / "evaluation.json", lambda part: part.write_text(strict_json(results)))
    by_height = np.argsort(held_out.positions)[spread(len(held_out))]
    strips = {
        f"{options.split} slices": real.slices[by_height],
        "reconstructions": reconstructions.slices[by_height],
        "samples": samples.slices[drawn.positions.argsort()[spread(count)]],
    }
    distances = {"samples": near, f"reconstructions of {options.split} slices": near_decoded}
    distances[f"{options.split} slices"] = near_real
    evaluation_figure(
        options.images / "evaluation.png",
        results,
        {label: slices[:, 0].cpu().numpy() for label, slices in strips.items()},
        {label: found.distances.cpu().numpy() for label, found in distances.items()},
        f"{options.run}: {count} samples ({describe_sampling(options)}) and {len(held_out)} {options.split} slices",
    )
    found = {"sample": (samples, near), f"{options.split} slice": (real, near_real)}
    write_copying_figure(options.images / "copying.png", data.train, found, axis)
    say(f"{time.perf_counter() - started:.0f} s: {options.run / 'evaluation.json'}, figures in {options.images}")


def take(slices: Slices, chosen: Sequence[int], device: torch.device) -> Group:
    """Chosen slices and their cases; where a name gives none, the case is None."""
    return Group(slices.batch(chosen).to(device), [slices.cases[i] for i in chosen])


def training_data(options, config: dict, vqvae: VQVAE) -> Dataset:
    """The data a run was trained on. Raises RunError where they are others, or cannot be evaluated."""
    folder = options.data or config["options"]["data"]
    if folder != "phantom" and not Path(folder).exists():
        raise RunError(f"the data of {options.run} are not in {folder}: say where they are with --data")
    side = vqvae.config.downsampling
    data = load_dataset(folder, config["slice_size"], (side, side), config["options"]["seed"])
    for notice in data.notices:
        say(notice)
    if data.fingerprint != config["fingerprint"]:
        raise RunError(f"{folder} does not hold the data {options.run} was trained on: say where they are with --data")
    if len(getattr(data, options.split)) < FEWEST or len(data.train) < FEWEST:
        raise RunError(f"{folder} has fewer than {FEWEST} training or {options.split} slices: choose another --split")
    if min(data.slice_size) < SMALLEST_SIDE:
        raise RunError(f"slices of {data.slice_size} pixels cannot be evaluated: {SMALLEST_SIDE} a side at least")
    return data


def reconstruct_all(networks: Networks, group: Group, options) -> tuple[Tensor, Group, Group]:
    """Codes (N, h, w) of slices, their reconstructions, and these with detail."""
    vqvae, device = networks.vqvae, group.slices.device
    codes = [vqvae.encode(batch) for batch in group.slices.split(options.batch_size)]
    decoded = torch.cat([vqvae.decode(batch) for batch in codes])
    codes = torch.cat(codes)
    numbers = range(MOST, MOST + len(codes))  # other detail than that of samples
    detailed = draw_detail(options, networks, numbers, codes, device).to(device)
    return codes, *(Group(quantise(slices), group.cases) for slices in (decoded, detailed))


@torch.no_grad()
def network_figures(
    networks: Networks,
    originals: Group,
    reconstructions: Group,
    codes: Tensor,
    positions: np.ndarray,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """What is measured of the VQ-VAE and the prior on slices: of reconstructions without detail, of codes (N, h, w)."""
    metrics = all_reconstruction_metrics(originals.slices.shape[2:]).to(codes.device)
    for pair in zip(reconstructions.slices.split(batch_size), originals.slices.split(batch_size)):
        metrics.update(*pair)
    size = networks.vqvae.config.codes
    rate = bits_per_pixel(codes.shape[1:], size, originals.slices.shape[2:])
    used, perplexity = codebook_use(code_counts(codes, size))
    places = torch.from_numpy(positions).to(codes.device)
    total = sum(
        networks.prior.nats(batch, place).item() * batch.numel()
        for batch, place in zip(codes.split(batch_size), places.split(batch_size))
    )
    nats = total / codes.numel()
    bits = nats / math.log(2)
    return {
        "reconstructions": {name: value.item() for name, value in metrics.compute().items()} | {"bits_per_pixel": rate},
        "codes": {"used": used, "perplexity": perplexity},
        "prior": {
            "nats_per_code": nats,
            "bits_per_code": bits,
            "bits_per_slice": bits * codes[0].numel(),
        },
    }


def sample_figures(features: RandomFeatures, group: Group, reference: Group) -> dict:
    """What is measured of slices beside a reference."""
    right, trials = two_sample_test(*group, *reference)
    of, reference_of = features(group.slices), features(reference.slices)
    density, coverage = density_and_coverage(of, reference_of, reference.cases)
    levels = sliced_wasserstein(group.slices, reference.slices)
    return {
        "two_sample_accuracy": right / trials,
        "two_sample_interval": wilson_interval(right, trials),
        "coverage": coverage,
        "density": density,
        "frechet_distance": frechet_distance(of, reference_of),
        "sliced_wasserstein": sum(levels.values()) / len(levels),
        "sliced_wasserstein_levels": levels,
        "ms_ssim_diversity": ms_ssim_diversity(group.slices),
    }


def copying_figures(near: Nearest, reference: Nearest) -> dict[str, float]:
    """How near slices are to training slices, beside a reference."""
    return {
        "smallest_distance": near.distances.min().item(),
        "median_distance": near.distances.median().item(),
        "share_nearer_than_heldout": share_nearer(near.distances, reference.distances),
        "statistic": copying_statistic(near, reference),
    }


# What a line of the table shows: section and name in evaluation.json, label, format, and which way is better.
NETWORK_LINES = (
    ("reconstructions", "ssim", "SSIM", ".3f", "higher is better, 1 at most"),
    ("reconstructions", "ms_ssim", "MS-SSIM", ".3f", "higher is better, 1 at most"),
    ("reconstructions", "psnr", "PSNR, dB", ".2f", "higher is better"),
    ("reconstructions", "mse", "MSE", ".4f", "lower is better"),
    ("reconstructions", "bits_per_pixel", "bits a pixel of the code grid", ".4f", "fixed by the network"),
    ("codes", "used", "share of codes used", ".3f", "higher is better, 1 at most"),
    ("codes", "perplexity", "perplexity of codes", ".0f", "higher is better, K at most"),
    ("prior", "nats_per_code", "prior, nats a code", ".3f", "lower is better; far lower in training: overfitted"),
    ("prior", "bits_per_code", "prior, bits a code", ".3f", "the same in bits"),
    ("prior", "bits_per_slice", "prior, bits a slice", ".0f", "the same for the grid; should be below JPEG 2000"),
    ("prior", "jpeg2000_bits_per_slice", "JPEG 2000, bits a slice", ".0f", "at the PSNR of the reconstructions"),
)
SAMPLE_LINES = (
    ("samples", "two_sample_accuracy", "two-sample accuracy", ".3f", "0.5 is perfect, 1 the worst"),
    ("samples", "two_sample_interval", "  95 % interval", ".2f", ""),
    ("samples", "coverage", "coverage", ".3f", "higher is better, 1 at most"),
    ("samples", "density", "density", ".3f", "the floor's is best"),
    ("samples", "frechet_distance", "Frechet distance", ".1f", "lower is better"),
    ("samples", "sliced_wasserstein", "sliced Wasserstein distance", ".3f", "lower is better"),
    ("samples", "ms_ssim_diversity", "MS-SSIM diversity", ".3f", "the floor's is best"),
    ("copying", "smallest_distance", "nearest training slice, smallest", ".3f", "0 is a copy"),
    ("copying", "median_distance", "  median", ".3f", ""),
    ("copying", "share_nearer_than_heldout", "share nearer than any held-out", ".3f", "near 0; copies bring it to 1"),
    ("copying", "statistic", "copying statistic", ".1f", "around 0; copies bring it far below"),
)
COLUMNS = """
samples        samples beside held-out slices
decoder alone  reconstructions with detail in their place (of training slices; for copying of held-out slices)
prior alone    samples beside reconstructions of held-out slices with detail; the column to judge copying by
floor          training slices in their place (for copying half of the held-out cases beside the other half)
"""


def print_table(results: dict) -> None:
    """A line a figure: of VQ-VAE and prior on slices, then of samples."""
    settings = results["settings"]
    print(f"\n{settings['heldout_slices']} {settings['split']} slices (cases: {settings['heldout_cases']})")
    print_lines(NETWORK_LINES, {settings["split"]: results, "training": results["training"]})
    fewer = settings["samples_compared"] < settings["samples"]
    first = f", of which all but the lines on copying take the first {settings['samples_compared']}" if fewer else ""
    print(f"\n{settings['samples']} samples{first}")
    columns = {name.replace("_", " "): results[name] for name in ("decoder_alone", "prior_alone", "floor")}
    print_lines(SAMPLE_LINES, {"samples": results} | columns)
    print(COLUMNS)


def print_lines(lines: Sequence[tuple], columns: dict[str, dict]) -> None:
    """Lines of a table whose columns are parts of evaluation.json."""
    print(f"{'':32}" + "".join(f"{title:>15}" for title in columns))
    for section, name, label, form, better in lines:
        values = (column[section].get(name, ()) for column in columns.values())
        cells = ("-".join(f"{part:{form}}" for part in np.atleast_1d(value)) for value in values)
        print(f"{label:32}" + "".join(f"{cell:>15}" for cell in cells) + f"   {better}".rstrip())


def write_copying_figure(
    path: Path, training: Slices, found: dict[str, tuple[Group, Nearest]], axis: int | None
) -> None:
    """Of each kind of slices the three nearest to a training slice, beside it and moved as they were compared."""
    own, others, titles = [], [], []
    for kind, (group, near) in found.items():
        for i in near.distances.argsort()[:3].tolist():
            index = near.indices[i].item()
            training_slice = training.batch([index]).to(group.slices.device)
            views = closest_views(group.slices[i : i + 1], training_slice, axis)[:2]
            for pictures, view in zip((own, others), views):
                pictures.append(view[0].cpu().numpy())
            titles.append(f"{kind} {i}, distance {near.distances[i]:.3f}\nfrom {caption(training.names[index])}")
    labels = ("sample or slice", "nearest\ntraining slice")
    reconstructions_figure(path, np.stack(own), np.stack(others), titles, labels, limit=0.5)


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
    detail = load_weights(run / "detail.safetensors", Detail, DetailConfig)
    detail.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
    own = vqvae.config
    grid = tuple(side // own.downsampling for side in config["slice_size"])
    if (prior.config.grid, prior.config.codes) != (grid, own.codes):
        raise RunError(f"{run}: prior.safetensors and vqvae.safetensors are of different runs: their codes differ")
    if any(getattr(detail.config, name) != getattr(own, name) for name in ("downsampling", "codes", "code_dim")):
        raise RunError(f"{run}: detail.safetensors and vqvae.safetensors are of different runs: their codes differ")
    return Networks(vqvae, prior, detail)


def refuse_unknown_position(options, config: dict) -> None:
    """Raise RunError where --position is one that no training slice had: the prior makes nothing of it."""
    heights = config["positions"]["quantiles"]
    if options.position is None or heights and heights[0] <= options.position <= heights[-1]:
        return
    known = f"from {heights[0]:g} to {heights[-1]:g}" if heights else "not known: no names with slice numbers"
    raise RunError(
        f"no --position {options.position:g} in {options.run}: the heights of its training slices are {known}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python predict.py`."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    options.batch_size = options.batch_size or (512 if device.type == "cuda" else 32)
    check_folder("--out", options.out)
    check_folder("--images", options.images)
    config = read_config(options.run)
    if options.evaluate:
        check_folder("--run", options.run)
    vqvae = load_vqvae(options.run, config, device)
    if options.reconstruct:
        reconstruct(options, config, vqvae, device)
        return
    networks = load_networks(options.run, config, vqvae, device)
    refuse_unknown_position(options, config)
    if not is_complete(options.run):
        say(f"warning: {options.run} is not complete: train.py has not come to its end")
    (evaluate if options.evaluate else sample)(options, config, networks, device)


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError, OSError) as error:
        fail(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(f"out of memory, try a smaller --num or --batch-size, or other --device ({in_short(error)})")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
