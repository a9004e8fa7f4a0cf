"""Evaluate a trained run on held-out slices: reconstructions, the prior, samples, and copying of training slices.

    python evaluate.py --run runs/default

Prints a table, and writes RUN/evaluation.json, RUN/MODEL_CARD.md, and the figures evaluation.png, copying.png,
membership.png and outliers.png.
"""

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anatomy import MIN_TRAINING, TAIL, Coherence, coherence
from augmentation import augment
from checkpoints import read_bytes, read_config, read_data_files, strict_json
from config import RunConfig
from console import Parser, RunError, log_notices, logger, nonempty, number, run_command, say
from copying import Copies, align, data_copying_statistic, find_copies, memorisation_rate, nearest_distances
from dataset import DataSplits, Slices, describe_changes, load_dataset
from membership import attack_metrics, attack_scores, pair_patients, roc_curve
from metrics import (
    MIN_SIDE,
    RandomFeatures,
    all_reconstruction_metrics,
    bits_per_pixel,
    c2st,
    code_counts,
    codebook_use,
    density_and_coverage,
    jpeg2000_bits_per_slice,
    ms_ssim_diversity,
    random_feature_frechet,
    round_to_grey_levels,
    sliced_wasserstein,
    two_fold_split,
    wilson_interval,
)
from model_card import TEMPLATE, fill_card
from modules import VQVAE
from nifti import left_right_axis
from plots import (
    caption,
    evaluation_figure,
    evenly_spaced,
    membership_figure,
    outliers_figure,
    reconstructions_figure,
)
from predict import (
    DEFAULT_NUM,
    MAX_NUM,
    Networks,
    SamplingOptions,
    add_sampling_options,
    describe_sampling,
    draw_positions,
    draw_samples,
    load_networks,
    load_vqvae,
    refine,
    sampling_device,
    warn_if_incomplete,
)
from utils import autocast, check_folder, make_folder, write_file

MIN_SLICES = 4  # slices or samples that can be evaluated
BATCH_SIZE = 64  # training slices loaded at a time
MAX_LISTED = 100  # samples in evaluation.json
OUTLIERS = 8  # slices of a set in outliers.png
MAX_CARD = 1 << 20  # bytes of a model card that is read

COMPARISONS = ("samples", "decoder_alone", "prior_alone", "baseline")
LEGEND = """
samples        samples vs. held-out slices
decoder alone  refined reconstructions of training slices vs. held-out slices (copying: of held-out slices)
prior alone    samples vs. refined reconstructions of held-out slices; the column to judge copying by
baseline       training slices vs. held-out slices (copying: one half of the held-out cases vs. the other half)
"""


class TableRow(NamedTuple):
    """A row of the printed table."""

    section: str  # of evaluation.json
    key: str  # in that section
    label: str
    format: str
    reading: str = ""  # which way is better


NETWORK_ROWS = (
    TableRow("reconstructions", "ssim", "SSIM, Gaussian window", ".3f", "higher is better, at most 1"),
    TableRow("reconstructions", "ssim_unit_range", "SSIM, [0, 1], 7x7 window", ".3f", "scikit-image's default"),
    TableRow("reconstructions", "ms_ssim", "MS-SSIM", ".3f", "higher is better, at most 1"),
    TableRow("reconstructions", "psnr", "PSNR, dB", ".2f", "higher is better; of the error over all slices"),
    TableRow("reconstructions", "psnr_per_slice", "PSNR, dB, mean of slices", ".2f", "higher is better"),
    TableRow("reconstructions", "mse", "MSE", ".4f", "lower is better"),
    TableRow("reconstructions", "bits_per_pixel", "code grid, bits per pixel", ".4f", "fixed by the network"),
    TableRow("codes", "used", "share of codes used", ".3f", "higher is better, at most 1"),
    TableRow("codes", "perplexity", "perplexity of codes", ".0f", "higher is better, at most K"),
    TableRow(
        "prior", "nats_per_code", "prior, nats per code", ".3f", "lower is better; far lower in training: overfitted"
    ),
    TableRow("prior", "bits_per_code", "prior, bits per code", ".3f", "the same in bits"),
    TableRow("prior", "bits_per_slice", "prior, bits per slice", ".0f", "sum over the grid; should be below JPEG 2000"),
    TableRow(
        "prior", "jpeg2000_bits_per_slice", "JPEG 2000, bits per slice", ".0f", "at the PSNR of the reconstructions"
    ),
)
SAMPLE_ROWS = (
    TableRow("samples", "c2st_accuracy", "C2ST accuracy", ".3f", "0.5 is best, 1 is worst"),
    TableRow("samples", "c2st_interval", "  95 % interval", ".2f"),
    TableRow("samples", "coverage_by_patient", "coverage, by patient", ".3f", "higher is better, at most 1"),
    TableRow("samples", "density_by_patient", "density, by patient", ".3f", "the baseline's is best"),
    TableRow("samples", "coverage", "coverage, as published", ".3f", "the same, for independent slices"),
    TableRow("samples", "density", "density, as published", ".3f", "the same, for independent slices"),
    TableRow("samples", "random_feature_frechet", "random-feature Frechet distance", ".1f", "lower is better; not FID"),
    TableRow("samples", "sliced_wasserstein", "sliced Wasserstein distance", ".3f", "lower is better"),
    TableRow("samples", "ms_ssim_diversity", "MS-SSIM diversity", ".3f", "the baseline's is best"),
    TableRow("copying", "min_distance", "distance to training, minimum", ".3f", "0 is a copy"),
    TableRow("copying", "median_distance", "  median", ".3f"),
    TableRow("copying", "memorisation_rate", "memorisation rate", ".3f", "closer than any held-out; 1 for copies"),
    TableRow("copying", "c_t", "data-copying C_T", ".1f", "about 0; far below 0 for copies"),
)
SLICE_ROWS = (
    TableRow("slices", "copied", "called copies", ".3f", "the expected share is best; nan is unknown"),
    TableRow("slices", "copied_expected", "  expected of new patients", ".3f", "at most"),
    TableRow("slices", "tail_share", "incoherent anatomy", ".3f", f"{TAIL:g} is expected of new patients"),
    TableRow("slices", "tail_p_value", "  p-value", ".4f", "below 0.01: more than new patients have"),
)
MEMBERSHIP_ROWS = (
    TableRow("attack", "auc", "AUC", ".3f", "0.5 gives nobody away, 1 everybody"),
    TableRow("attack", "auc_interval", "  95 % interval, by patient", ".2f"),
    TableRow("attack", "auc_by_patient", "AUC of patients' means", ".3f", "0.5 gives nobody away, 1 everybody"),
    TableRow("attack", "auc_by_patient_interval", "  95 % interval, by patient", ".2f"),
    TableRow("attack", "tpr_at_1_percent_fpr", "found, 1 % wrongly accused", ".3f", "0.01 gives nobody away"),
    TableRow("attack", "tpr_at_0.1_percent_fpr", "found, 0.1 % wrongly accused", ".3f", "0.001 gives nobody away"),
)


# ---------------------------------------------------------------- options and data


class EvaluateOptions(SamplingOptions):
    """Options of evaluate.py."""

    num: int | None
    split: str
    data: str | None


def parse_options(arguments: Sequence[str] | None) -> EvaluateOptions:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_sampling_options(parser)
    parser.add_argument(
        "--num",
        type=number(int, MIN_SLICES, MAX_NUM),
        metavar="N",
        help="slices to sample (default: 64, or the number of held-out slices if larger)",
    )
    parser.add_argument(
        "--split", choices=("validate", "test"), default="test", help="the held-out slices (default: test)"
    )
    parser.add_argument(
        "--data", type=nonempty(str), metavar="DIR", help="folder of the training data, if it has moved"
    )
    return parser.parse_args(arguments, EvaluateOptions())


class SliceSet(NamedTuple):
    """Slices that are evaluated together."""

    slices: Tensor  # (N, 1, H, W) in [-1, 1], rounded to 256 grey levels
    cases: Sequence[Hashable]  # N patients; each sample is a case of its own


def select(slices: Slices, indices: np.ndarray, device: torch.device) -> SliceSet:
    """Load the slices at `indices` and their cases, None for unknown."""
    return SliceSet(slices.batch(indices).to(device), [slices.cases[i] for i in indices])


def training_data(options: EvaluateOptions, config: RunConfig, vqvae: VQVAE) -> DataSplits:
    """Load the data that a run was trained on.

    Raises:
        RunError: The data are missing, differ from those of the training, or cannot be evaluated.
    """
    folder = options.data or config.options.data
    if folder != "phantom" and not Path(folder).exists():
        raise RunError(f"the data of {options.run} are not in {folder}: name their folder with --data")
    side = vqvae.config.downsampling
    data = load_dataset(folder, config.slice_size, (side, side), config.options.seed)
    log_notices(data.notices)
    if data.fingerprint != config.fingerprint:
        changes = describe_changes(read_data_files(options.run), data.files)
        raise RunError(
            f"{folder} does not hold the data {options.run} was trained on ({changes}): name their folder with --data"
        )
    if len(getattr(data, options.split)) < MIN_SLICES or len(data.train) < MIN_TRAINING:
        raise RunError(
            f"{folder} has fewer than {MIN_TRAINING} training or {MIN_SLICES} {options.split} slices: choose another "
            "--split"
        )
    if min(data.slice_size) < MIN_SIDE:
        raise RunError(f"slices of {data.slice_size} pixels cannot be evaluated: a side needs at least {MIN_SIDE}")
    return data


# ---------------------------------------------------------------- evaluation


def evaluate(options: EvaluateOptions, config: RunConfig, networks: Networks, device: torch.device) -> None:
    """Evaluate a run on held-out slices; print a table, write evaluation.json, a model card and four figures.

    Samples can differ from real slices because of the decoder and the refiner or because of the prior. To separate
    these errors, each metric of samples is reported for four comparisons, in which reconstructions are refined:

    samples        Samples vs. held-out slices: the whole model.
    decoder_alone  Reconstructions of training slices vs. held-out slices: errors of decoder and refiner. Of training
                   slices, so that none is compared with its original; for copying, of held-out slices, which no network
                   was trained on.
    prior_alone    Samples vs. reconstructions of held-out slices, which share the errors of decoder and refiner. Judge
                   copying by this comparison, because blur shortens nearest-neighbour distances and grain lengthens
                   them.
    baseline       Training slices vs. held-out slices: how much real patients differ. For copying, one half of the
                   held-out cases vs. the other half.

    Most metrics depend on the number of slices, so all comparisons use the same number of samples and training slices.
    The search for copies uses all samples.
    """
    started = time.perf_counter()
    data = training_data(options, config, networks.vqvae)
    make_folder(options.images)  # fails now rather than after minutes
    held_out = getattr(data, options.split)
    count = options.num or max(DEFAULT_NUM, len(held_out))
    drawn = draw_samples(options, networks, draw_positions(range(count), options.seed, config.positions), device)
    samples = SliceSet(round_to_grey_levels(drawn.slices.to(device)), range(count))
    real = select(held_out, np.arange(len(held_out)), device)
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.train))[:count])
    training = select(data.train, chosen, device)
    codes, decoded, reconstructions = reconstruct_all(networks, real, options)
    training_codes, training_decoded, training_reconstructions = reconstruct_all(networks, training, options)

    print(f"{count} samples drawn; evaluating reconstructions and the prior")
    results: dict[str, Any] = {
        "settings": {
            "split": options.split,
            "heldout_slices": len(held_out),
            "heldout_cases": len(set(real.cases)),
            "training_slices": len(data.train),
            "training_cases": len(set(data.train.cases)),
            "samples": count,
            "samples_compared": len(chosen),
            "seed": options.seed,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "refiner_noise": options.refiner_noise,
        },
        **network_metrics(networks, real, decoded, codes, held_out.positions, options.batch_size),
        "training": network_metrics(
            networks, training, training_decoded, training_codes, data.train.positions[chosen], options.batch_size
        ),
    }
    psnr = results["reconstructions"]["psnr"]
    results["prior"]["jpeg2000_bits_per_slice"] = jpeg2000_bits_per_slice(real.slices, psnr)

    print("evaluating samples")
    features = RandomFeatures(training.slices)
    compared = SliceSet(samples.slices[: len(chosen)], samples.cases[: len(chosen)])
    of_samples = [
        sample_metrics(features, compared, real),
        sample_metrics(features, training_reconstructions, real),
        sample_metrics(features, compared, reconstructions),
        sample_metrics(features, training, real),
    ]

    print(f"searching {len(data.train)} training slices for copies")
    flip_axis = left_right_axis(np.array(config.affine))
    sets = {"samples": samples, "reconstructions": reconstructions, f"{options.split} slices": real}
    copies = find_set_copies(sets, data.train, flip_axis)
    sampled, reconstructed, held = copies.values()
    second_half = torch.from_numpy(two_fold_split(real.cases)).to(device)
    of_copying = [
        copying_metrics(sampled, held),
        copying_metrics(reconstructed, held),
        copying_metrics(sampled, reconstructed),
        copying_metrics(held.take(~second_half), held.take(second_half)),
    ]
    for name, sample_values, copying_values in zip(COMPARISONS, of_samples, of_copying):
        comparison = {"samples": sample_values, "copying": copying_values}
        results |= comparison if name == "samples" else {name: comparison}

    print("judging the anatomy of single slices")
    anatomy = judge_anatomy(sets, data.train, flip_axis)
    results["slices"] = {
        name.replace(f"{options.split} ", "heldout_"): of for name, of in slice_metrics(copies, anatomy).items()
    }
    results["called_copies"] = describe_copies(copies["samples"], data.train)

    print("asking whether training slices can be told from held-out ones")
    scores, results["membership"] = infer_membership(networks, data.train, held_out, samples, flip_axis)
    print_table(results)
    write_file(options.run / "evaluation.json", lambda part: part.write_text(strict_json(results)))
    write_model_card(options.run / "MODEL_CARD.md", config, results)
    by_position = np.argsort(held_out.positions)[evenly_spaced(len(held_out))]
    rows = {
        f"{options.split} slices": real.slices[by_position],
        "reconstructions": reconstructions.slices[by_position],
        "samples": samples.slices[drawn.positions.argsort()[evenly_spaced(count)]],
    }
    distances = {
        name.replace("reconstructions", f"reconstructions of {options.split} slices"): own.distances
        for name, own in copies.items()
    }
    evaluation_figure(
        options.images / "evaluation.png",
        results,
        {label: slices[:, 0].cpu().numpy() for label, slices in rows.items()},
        {label: values.cpu().numpy() for label, values in distances.items()},
        f"{options.run}: {count} samples ({describe_sampling(options)}) and {len(held_out)} {options.split} slices",
    )
    membership_figure(
        options.images / "membership.png",
        {attack: roc_curve(*own) for attack, own in scores.items()},
        {attack: values["auc"] for attack, values in results["membership"]["attacks"].items()},
        f"{options.run}: {results['membership']['slices']} training and as many {options.split} slices",
    )
    both = ("samples", f"{options.split} slices")
    write_copying_figure(
        options.images / "copying.png", data.train, {name: (sets[name], copies[name]) for name in both}
    )
    outliers_figure(
        options.images / "outliers.png", {name: lowest(sets[name].slices, anatomy.scores[name]) for name in both}
    )
    written = f"{options.run / 'evaluation.json'} and MODEL_CARD.md, figures in {options.images}"
    say(f"{time.perf_counter() - started:.0f} s: {written}")


def reconstruct_all(
    networks: Networks, originals: SliceSet, options: EvaluateOptions
) -> tuple[Tensor, SliceSet, SliceSet]:
    """Return the codes (N, h, w) of slices, their reconstructions, and their refined reconstructions."""
    vqvae, device = networks.vqvae, originals.slices.device
    code_batches = [vqvae.encode(batch) for batch in originals.slices.split(options.batch_size)]
    decoded = torch.cat([vqvae.decode(batch) for batch in code_batches])
    codes = torch.cat(code_batches)
    sample_ids = range(MAX_NUM, MAX_NUM + len(codes))  # other random streams than those of samples
    refined = refine(options, networks, sample_ids, codes, device).to(device)
    reconstructions, refined_reconstructions = (
        SliceSet(round_to_grey_levels(slices), originals.cases) for slices in (decoded, refined)
    )
    return codes, reconstructions, refined_reconstructions


# ---------------------------------------------------------------- metrics


@torch.no_grad()
def network_metrics(
    networks: Networks,
    originals: SliceSet,
    reconstructions: SliceSet,
    codes: Tensor,
    positions: np.ndarray,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Return the metrics of the VQ-VAE, without the refiner, and of the prior.

    Args:
        networks: The networks of the run.
        originals: N slices.
        reconstructions: The decoded codes.
        codes: (N, h, w).
        positions: Of the slices, (N,) in [0, 1], NaN for unknown.
        batch_size: Slices per forward pass.
    """
    metrics = all_reconstruction_metrics(originals.slices.shape[2:]).to(codes.device)
    for pair in zip(reconstructions.slices.split(batch_size), originals.slices.split(batch_size)):
        metrics.update(*pair)
    size = networks.vqvae.config.codebook_size
    rate = bits_per_pixel(codes.shape[1:], size, originals.slices.shape[2:])
    used, perplexity = codebook_use(code_counts(codes, size))
    batches = zip(codes.split(batch_size), torch.from_numpy(positions).to(codes.device).split(batch_size))
    total = sum(networks.prior.nll(*batch).item() * batch[0].numel() for batch in batches)
    nats = total / codes.numel()
    bits = nats / math.log(2)
    return {
        "reconstructions": {name: value.item() for name, value in metrics.compute().items()} | {"bits_per_pixel": rate},
        "codes": {"used": used, "perplexity": perplexity},
        "prior": {"nats_per_code": nats, "bits_per_code": bits, "bits_per_slice": bits * codes[0].numel()},
    }


def sample_metrics(features: RandomFeatures, samples: SliceSet, reference: SliceSet) -> dict[str, Any]:
    """Return the metrics of samples against a reference."""
    correct, trials = c2st(*samples, *reference)
    sample_features, reference_features = features(samples.slices), features(reference.slices)
    density, coverage = density_and_coverage(sample_features, reference_features)
    density_by_patient, coverage_by_patient = density_and_coverage(sample_features, reference_features, reference.cases)
    levels = sliced_wasserstein(samples.slices, reference.slices)
    return {
        "c2st_accuracy": correct / trials,
        "c2st_interval": wilson_interval(correct, trials),
        "coverage": coverage,
        "coverage_by_patient": coverage_by_patient,
        "density": density,
        "density_by_patient": density_by_patient,
        "random_feature_frechet": random_feature_frechet(sample_features, reference_features),
        "sliced_wasserstein": sum(levels.values()) / len(levels),
        "sliced_wasserstein_levels": levels,
        "ms_ssim_diversity": ms_ssim_diversity(samples.slices),
    }


def copying_metrics(samples: Copies, reference: Copies) -> dict[str, float]:
    """Return the metrics of copying, from the nearest training slices of samples and of a reference."""
    return {
        "min_distance": samples.distances.min().item(),
        "median_distance": samples.distances.median().item(),
        "memorisation_rate": memorisation_rate(samples.distances, reference.distances),
        "c_t": data_copying_statistic(samples, reference),
    }


def find_set_copies(sets: Mapping[str, SliceSet], train: Slices, flip_axis: int | None) -> dict[str, Copies]:
    """Search the training slices for what each set may have copied, in one pass over them."""
    slices = torch.cat([own.slices for own in sets.values()])
    found = find_copies(slices, train.batch, len(train), train.cases, flip_axis)
    rows = torch.arange(len(slices)).split([len(own.slices) for own in sets.values()])
    return {name: found.take(own) for name, own in zip(sets, rows)}


def judge_anatomy(sets: Mapping[str, SliceSet], train: Slices, flip_axis: int | None) -> Coherence:
    """Score the anatomical coherence of the slices of each set."""
    return coherence(
        train.batches(BATCH_SIZE),
        train.positions,
        train.cases,
        {name: own.slices for name, own in sets.items()},
        flip_axis,
        {name: own.cases for name, own in sets.items()},
    )


def slice_metrics(copies: Mapping[str, Copies], anatomy: Coherence) -> dict[str, dict[str, float]]:
    """Return the share of each set that is called a copy, and its share of incoherent anatomy with a p-value.

    The share of copies is NaN where fewer than two training patients are known: then no threshold can be set.
    """
    return {
        name: {
            "copied": own.copied.double().mean().item() if math.isfinite(own.threshold) else math.nan,
            "copied_expected": own.rate,
            "tail_share": anatomy.tail_shares[name],
            "tail_p_value": anatomy.p_values[name],
        }
        for name, own in copies.items()
    }


def describe_copies(copies: Copies, train: Slices) -> list[dict[str, Any]]:
    """Name the samples that are called copies, the most similar first, and their training slices; at most 100."""
    order = copies.scores.argsort(descending=True)
    return [
        {"sample": i, "training_slice": train.names[int(copies.indices[i])], "score": copies.scores[i].item()}
        for i in order[copies.copied[order]][:MAX_LISTED].tolist()
    ]


def infer_membership(
    networks: Networks, train: Slices, held_out: Slices, samples: SliceSet, flip_axis: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Attack the run: which slices was it trained on?

    Besides the attacks on the networks (`attack_scores`), one on samples alone: how near the nearest sample is
    (Chen et al. 2020, arXiv:1909.03935, section 4.1).

    Returns:
        Scores of members and non-members (patients, slices), by attack, and the section of evaluation.json.
    """
    device = samples.slices.device
    pairs = pair_patients(train.cases, train.positions, held_out.cases, held_out.positions)
    shape = pairs.members.shape
    slices = torch.cat([train.batch(pairs.members.ravel()), held_out.batch(pairs.non_members.ravel())]).to(device)
    positions = np.concatenate([train.positions[pairs.members.ravel()], held_out.positions[pairs.non_members.ravel()]])
    with autocast(device):
        found = attack_scores(slices, torch.from_numpy(positions).to(device), *networks, augment)
    found["samples"] = -nearest_distances(slices, samples.slices, flip_axis)
    scores = {name: tuple(own.cpu().view(2, *shape)) for name, own in found.items()}
    attacks = {name: attack_metrics(*own) for name, own in scores.items()}
    return scores, {"patients": shape[0], "slices": pairs.members.size, "attacks": attacks}


# ---------------------------------------------------------------- table and figure


def print_table(results: Mapping[str, Any]) -> None:
    """Print the metrics of the networks, then those of samples for each comparison."""
    settings = results["settings"]
    print(f"\n{settings['heldout_slices']} {settings['split']} slices (cases: {settings['heldout_cases']})")
    print_rows(NETWORK_ROWS, {settings["split"]: results, "training": results["training"]})
    fewer = settings["samples_compared"] < settings["samples"]
    note = f"; only the rows on copying use more than the first {settings['samples_compared']}" if fewer else ""
    print(f"\n{settings['samples']} samples{note}")
    columns = {name.replace("_", " "): results[name] for name in COMPARISONS[1:]}
    print_rows(SAMPLE_ROWS, {"samples": results} | columns)
    print(LEGEND)
    print("single slices")
    print_rows(
        SLICE_ROWS,
        {
            name.removesuffix("_slices").replace("reconstructions", "reconstructed"): {"slices": own}
            for name, own in results["slices"].items()
        },
    )
    print()
    membership = results["membership"]
    print(
        f"membership inference: {membership['slices']} training slices of {membership['patients']} patients, "
        f"and as many {settings['split']} slices"
    )
    print_rows(
        MEMBERSHIP_ROWS,
        {name.replace("_", "-"): {"attack": values} for name, values in membership["attacks"].items()},
    )


def print_rows(rows: Sequence[TableRow], columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of a table whose columns are objects of evaluation.json."""
    print(f"{'':32}" + "".join(f"{title:>15}" for title in columns))
    for row in rows:
        values = (column[row.section].get(row.key, ()) for column in columns.values())
        cells = ("-".join(f"{part:{row.format}}" for part in np.atleast_1d(value)) for value in values)
        print(f"{row.label:32}" + "".join(f"{cell:>15}" for cell in cells) + f"   {row.reading}".rstrip())


def write_model_card(path: Path, config: RunConfig, results: Mapping[str, Any]) -> None:
    """Write a run's model card, or replace the measured part of the one that is there."""
    try:
        card = read_bytes(path if path.exists() else TEMPLATE, MAX_CARD).decode()
        card = fill_card(card, config, results)
    except (OSError, ValueError) as error:
        logger.warning(f"{path} is left as it is: {error}")
        return
    write_file(path, lambda part: part.write_text(card))


def write_copying_figure(path: Path, training: Slices, found: Mapping[str, tuple[SliceSet, Copies]]) -> None:
    """Plot the three slices of each kind that resemble a training slice most, beside it in the frame of the match.

    Args:
        path: Of the PNG.
        training: The training slices.
        found: Slices and what they may have copied, by the kind of slices.
    """
    slices, nearest, titles = [], [], []
    for kind, (own, copies) in found.items():
        for i in copies.scores.argsort(descending=True)[:3].tolist():
            index = int(copies.indices[i])
            source = align(training.batch([index]).to(own.slices.device), copies.transforms[i : i + 1])
            slices.append(own.slices[i, 0].cpu().numpy())
            nearest.append(source[0, 0].cpu().numpy())
            called = "called a copy" if copies.copied[i] else "not called"
            titles.append(f"{kind}, {i}: {copies.scores[i]:.1f}, {called}\n{caption(training.names[index])}")
    labels = ("sample or slice", "training slice,\naligned")
    reconstructions_figure(path, np.stack(slices), np.stack(nearest), titles, labels, limit=0.5)


def lowest(slices: Tensor, scores: Tensor) -> tuple[np.ndarray, list[str]]:
    """Return the least coherent slices (n, H, W), the lowest first, with their numbers and scores as titles."""
    order = scores.argsort()[:OUTLIERS]
    return slices[order, 0].cpu().numpy(), [f"{i}: {scores[i]:.3f}" for i in order.tolist()]


# ---------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python evaluate.py`."""
    options = parse_options(arguments)
    device = sampling_device(options)
    check_folder("--images", options.images)
    config = read_config(options.run)
    check_folder("--run", options.run)
    networks = load_networks(options.run, config, load_vqvae(options.run, config, device), device)
    warn_if_incomplete(options.run)
    evaluate(options, config, networks, device)


if __name__ == "__main__":
    run_command(main)
