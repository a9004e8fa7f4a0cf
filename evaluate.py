"""Measure a trained run on held-out slices: reconstructions, the prior, samples, and whether it copies.

    python evaluate.py --run runs/default

Prints a table, and writes RUN/evaluation.json and the figures evaluation.png and copying.png.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoints import read_config, read_data_files, strict_json
from dataset import Dataset, Slices, describe_changes, load_dataset
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
    share_nearer,
    sliced_wasserstein,
    two_sample_test,
    wilson_interval,
)
from modules import VQVAE
from nifti import left_right_axis
from plots import caption, evaluation_figure, evenly_spaced, reconstructions_figure
from predict import (
    DEFAULT_NUM,
    MOST,
    Networks,
    add_sampling_options,
    describe_sampling,
    draw_positions,
    draw_samples,
    load_networks,
    load_vqvae,
    refine,
    sampling_device,
    warn_of_incomplete_run,
)
from utils import (
    Parser,
    RunError,
    check_folder,
    filled,
    make_folder,
    number,
    run_command,
    say,
    write_file,
)

FEWEST = 4  # slices or samples that can be evaluated


def parse_options(arguments: Sequence[str] | None):
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_sampling_options(parser)
    parser.add_argument(
        "--num",
        type=number(int, FEWEST, MOST),
        metavar="N",
        help="slices to sample (default: 64, or as many as held-out slices if they are more)",
    )
    parser.add_argument(
        "--split", choices=("validate", "test"), default="test", help="the held-out slices (default: test)"
    )
    parser.add_argument(
        "--data", type=filled(str), metavar="DIR", help="where the training data lie now (default: where they lay then)"
    )
    return parser.parse_args(arguments)


class Group(NamedTuple):
    """Slices that are measured together."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1], of 256 levels
    cases: Sequence  # N patients; each sample is a case of its own


def evaluate(options, config: dict, networks: Networks, device: torch.device) -> None:
    """Measure a run on held-out slices: a table, RUN/evaluation.json, images/evaluation.png and images/copying.png.

    Samples may differ from real slices because of the decoder and the refiner or because of the prior. To separate
    these, each metric of samples is reported for four comparisons. Reconstructions are refined, as samples are:

    samples        Samples beside held-out slices.
    decoder_alone  Reconstructions in the samples' place: they owe nothing to the prior. They are of training slices,
                   so that none lies beside its own original; for copying of the held-out slices, which no network has
                   seen.
    prior_alone    Samples beside reconstructions of the held-out slices: both are decoded and refined. Copying is
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
    drawn = draw_samples(options, networks, draw_positions(range(count), options.seed, config["positions"]), device)
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
            "refiner_noise": options.refiner_noise,
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
    by_height = np.argsort(held_out.positions)[evenly_spaced(len(held_out))]
    strips = {
        f"{options.split} slices": real.slices[by_height],
        "reconstructions": reconstructions.slices[by_height],
        "samples": samples.slices[drawn.positions.argsort()[evenly_spaced(count)]],
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
        changes = describe_changes(read_data_files(options.run), data.files)
        raise RunError(
            f"{folder} does not hold the data {options.run} was trained on ({changes}): say where they are with --data"
        )
    if len(getattr(data, options.split)) < FEWEST or len(data.train) < FEWEST:
        raise RunError(f"{folder} has fewer than {FEWEST} training or {options.split} slices: choose another --split")
    if min(data.slice_size) < SMALLEST_SIDE:
        raise RunError(f"slices of {data.slice_size} pixels cannot be evaluated: {SMALLEST_SIDE} a side at least")
    return data


def reconstruct_all(networks: Networks, group: Group, options) -> tuple[Tensor, Group, Group]:
    """Return codes (N, h, w) of slices, their reconstructions, and their refined reconstructions."""
    vqvae, device = networks.vqvae, group.slices.device
    codes = [vqvae.encode(batch) for batch in group.slices.split(options.batch_size)]
    decoded = torch.cat([vqvae.decode(batch) for batch in codes])
    codes = torch.cat(codes)
    numbers = range(MOST, MOST + len(codes))  # other random streams than those of samples
    refined = refine(options, networks, numbers, codes, device).to(device)
    return codes, *(Group(quantise(slices), group.cases) for slices in (decoded, refined))


@torch.no_grad()
def network_figures(
    networks: Networks,
    originals: Group,
    reconstructions: Group,
    codes: Tensor,
    positions: np.ndarray,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Return the metrics of the VQ-VAE, without the refiner, and of the prior, on slices and their codes (N, h, w)."""
    metrics = all_reconstruction_metrics(originals.slices.shape[2:]).to(codes.device)
    for pair in zip(reconstructions.slices.split(batch_size), originals.slices.split(batch_size)):
        metrics.update(*pair)
    size = networks.vqvae.config.codebook_size
    rate = bits_per_pixel(codes.shape[1:], size, originals.slices.shape[2:])
    used, perplexity = codebook_use(code_counts(codes, size))
    places = torch.from_numpy(positions).to(codes.device)
    total = sum(
        networks.prior.nll(batch, place).item() * batch.numel()
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
decoder alone  refined reconstructions in their place (of training slices; for copying of held-out slices)
prior alone    samples beside refined reconstructions of held-out slices; the column to judge copying by
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python evaluate.py`."""
    options = parse_options(arguments)
    device = sampling_device(options)
    check_folder("--images", options.images)
    config = read_config(options.run)
    check_folder("--run", options.run)
    networks = load_networks(options.run, config, load_vqvae(options.run, config, device), device)
    warn_of_incomplete_run(options.run)
    evaluate(options, config, networks, device)


if __name__ == "__main__":
    run_command(main)
