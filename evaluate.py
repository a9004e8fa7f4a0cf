"""Evaluate a trained run on held-out slices: reconstructions, the prior, samples, and copying of training slices.

    python evaluate.py --run runs/default
    python evaluate.py --run runs/default --self-test

Prints a table, and writes RUN/evaluation.json, RUN/MODEL_CARD.md, RUN/report.html, and the figures evaluation.png,
copying.png, membership.png and outliers.png. The self-test plants faults in real slices instead, and shows which figure
sees which.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anatomy import MIN_TRAINING, Coherence
from augmentation import augment
from c2st import c2st
from checkpoints import read_config, read_curves, read_data_files, strict_json
from comparison import (
    SliceSet,
    compare,
    copying_metrics,
    describe_copies,
    find_set_copies,
    incoherent_by_height,
    judge_anatomy,
    slice_metrics,
)
from config import RunConfig, TrainConfig
from console import Parser, RunError, log_notices, logger, nonempty, number, run_command, say
from copying import Copies, align, nearest_distances
from dataset import SPLIT_TITLES, DataSplits, Slices, describe_changes, load_dataset
from files import Reading
from membership import attack_metrics, attack_scores, code_nll, pair_patients, roc_curve
from metrics import (
    MIN_SIDE,
    RandomFeatures,
    all_reconstruction_metrics,
    bits_per_pixel,
    code_counts,
    codebook_use,
    jpeg2000_bits_per_slice,
    round_to_grey_levels,
    two_fold_split,
)
from model_card import fill_card, read_card
from nifti import left_right_axis
from plots import (
    Curves,
    as_array,
    bin_centres,
    caption,
    evaluation_figure,
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
    refine,
    sampling_device,
    set_guidance,
    warn_if_incomplete,
)
from report import Evidence, HeldOutSlices, SampleSlices, shown_samples, write_report
from self_test import self_test
from tables import COMPARISONS, print_self_test, print_table
from utils import autocast, check_folder, make_folder, write_file

MIN_SLICES = 4  # slices or samples that can be evaluated
MAX_HELD_OUT, MAX_TRAINING = 2000, 20_000  # slices that are evaluated, and compared with: more than HipMRI has
OUTLIERS = 8  # slices of a set in outliers.png


# ---------------------------------------------------------------- options and data


class EvaluateOptions(SamplingOptions):
    """Options of evaluate.py."""

    num: int | None
    split: str
    data: str | None
    pattern: str | None
    table: Path | None
    self_test: bool
    report_real_slices: bool


def parse_options(arguments: Sequence[str] | None) -> EvaluateOptions:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_sampling_options(parser)
    parser.add_argument(
        "--num",
        type=number(int, MIN_SLICES, MAX_NUM),
        metavar="N",
        help="slices to sample (default: 64, or the number of held-out slices that are evaluated if larger)",
    )
    parser.add_argument(
        "--split", choices=("validate", "test"), default="test", help="the held-out slices (default: test)"
    )
    parser.add_argument(
        "--data", type=nonempty(str), metavar="DIR", help="folder of the training data, if it has moved"
    )
    parser.add_argument("--pattern", type=nonempty(str), help="that of the training, which an export does not hold")
    parser.add_argument("--table", type=nonempty(Path), help="that of the training, if it has moved, or for an export")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="plant faults in the held-out slices instead, and print which figure sees which (writes self_test.json)",
    )
    parser.add_argument(
        "--report-real-slices",
        action="store_true",
        help="show held-out and training slices in report.html too, which then must not be shared more widely than the "
        "data (default: only those of the phantom)",
    )
    return parser.parse_args(arguments, EvaluateOptions())


def select(slices: Slices, indices: np.ndarray, device: torch.device) -> SliceSet:
    """Load the slices at `indices` and their cases, None for unknown."""
    return SliceSet(slices.batch(indices).to(device), [slices.cases[i] for i in indices])


def data_options(options: EvaluateOptions, config: RunConfig) -> TrainConfig:
    """Return the options of the training, with the place of its data where another one is given."""
    given = {name: getattr(options, name) for name in ("data", "pattern", "table")}
    return config.options.model_copy(update={name: value for name, value in given.items() if value})


def training_data(options: EvaluateOptions, config: RunConfig) -> DataSplits:
    """Load the data that a run was trained on.

    Raises:
        RunError: The data are missing, differ from those of the training, or cannot be evaluated.
    """
    chosen = data_options(options, config)
    folder = chosen.data
    if folder != "phantom" and not Path(folder).exists():
        raise RunError(f"the data of {options.run} are not in {folder}: name their folder with --data")
    side = chosen.downsampling
    data = load_dataset(folder, config.slice_size, (side, side), chosen.seed, reading=Reading.of(chosen))
    log_notices(data.notices)
    if data.fingerprint != config.fingerprint:
        changes = describe_changes(read_data_files(options.run), data.files)
        raise RunError(
            f"{folder} does not hold the data {options.run} was trained on ({changes}): name their folder with --data"
        )
    held_out = (data.validate, data.test) if options.self_test else (getattr(data, options.split),)
    if sum(map(len, held_out)) < MIN_SLICES or len(data.train) < MIN_TRAINING:
        kind = "held-out" if options.self_test else SPLIT_TITLES[options.split]
        raise RunError(
            f"{folder} has fewer than {MIN_TRAINING} training or {MIN_SLICES} {kind} slices: choose another --split"
        )
    if min(data.slice_size) < MIN_SIDE:
        raise RunError(f"slices of {data.slice_size} pixels cannot be evaluated: a side needs at least {MIN_SIDE}")
    return data


def draw_splits(data: DataSplits) -> DataSplits:
    """Return the data with splits of at most MAX_TRAINING and MAX_HELD_OUT slices: they bound memory and time."""
    splits = {}
    for name, title in SPLIT_TITLES.items():
        whole = getattr(data, name)
        splits[name] = whole.draw_patients(MAX_TRAINING if name == "train" else MAX_HELD_OUT)
        if len(splits[name]) < len(whole):
            say(f"of {len(whole)} {title} slices, {len(splits[name])} are used, of patients drawn at random")
    return replace(data, **splits)


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

    The classifier of the two-sample test learns from training slices too, for the prior alone from their
    reconstructions; for the baseline from one half of the cases, and the other half is compared.

    Most metrics depend on the number of slices, so all comparisons use the same number of samples and training slices.
    The search for copies uses all samples.
    """
    started = time.perf_counter()
    whole = training_data(options, config)
    data = draw_splits(whole)
    make_folder(options.images)  # fails now rather than after minutes
    held_out, held_out_name = getattr(data, options.split), f"{SPLIT_TITLES[options.split]} slices"
    count = options.num or max(DEFAULT_NUM, len(held_out))
    positions = draw_positions(range(count), options.seed, config.positions)
    drawn = draw_samples(options, networks, range(count), positions, device)
    samples = SliceSet(round_to_grey_levels(drawn.slices.to(device)), range(count))
    real = select(held_out, np.arange(len(held_out)), device)
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.train))[:count])
    training = select(data.train, chosen, device)
    codes, decoded, reconstructions = reconstruct_all(networks, real, options)
    training_codes, training_decoded, training_reconstructions = reconstruct_all(networks, training, options)

    print(f"{count} samples drawn on {device}; evaluating reconstructions and the prior")
    results: dict[str, Any] = {
        "settings": {
            "split": options.split,
            "heldout_slices": len(held_out),
            "heldout_slices_in_all": len(getattr(whole, options.split)),
            "heldout_cases": len(set(real.cases)),
            "training_slices": len(whole.train),
            "training_slices_searched": len(data.train),
            "training_cases": len(set(whole.train.cases)),
            "samples": count,
            "samples_compared": len(chosen),
            "seed": options.seed,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "guidance": options.guidance,
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
    half = two_fold_split(training.cases)
    of_samples = [
        compare(features, compared, real, c2st(*compared, *real, *training)),
        compare(features, training_reconstructions, real, c2st(*training_reconstructions, *real, *training)),
        compare(features, compared, reconstructions, c2st(*compared, *reconstructions, *training_reconstructions)),
        compare(features, training, real, c2st(*training.where(half), *real, *training.where(~half))),
    ]

    print(f"searching {len(data.train)} training slices for copies")
    flip_axis = left_right_axis(np.array(config.affine))
    sets = {"samples": samples, "reconstructions": reconstructions, held_out_name: real}
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
        name.replace(held_out_name, "heldout_slices"): of for name, of in slice_metrics(copies, anatomy).items()
    }
    results["incoherent_by_height"] = incoherent_by_height(anatomy.tails["samples"].low, positions.numpy())
    results["called_copies"] = describe_copies(copies["samples"], data.train)

    print("asking whether training slices can be told from held-out ones")
    scores, results["membership"] = infer_membership(networks, data.train, held_out, samples, drawn.codes, flip_axis)
    print_table(results)
    write_file(options.run / "evaluation.json", lambda part: part.write_text(strict_json(results)))
    write_model_card(options.run / "MODEL_CARD.md", config, results)
    run_name = options.run.resolve().name  # in titles: a path may name people
    by_position = np.argsort(held_out.positions)[bin_centres(len(held_out))]
    rows = {
        held_out_name: real.slices[by_position],
        "reconstructions": reconstructions.slices[by_position],
        "samples": samples.slices[drawn.positions.argsort()[bin_centres(count)]],
    }
    distances = {
        name.replace("reconstructions", f"reconstructions of {held_out_name}"): own.distances.cpu().numpy()
        for name, own in copies.items()
    }
    evaluation_figure(
        options.images / "evaluation.png",
        results,
        {label: as_array(slices) for label, slices in rows.items()},
        distances,
        f"{run_name}: {count} samples ({describe_sampling(options)}) and {len(held_out)} {held_out_name}",
    )
    rates = {attack: roc_curve(*own) for attack, own in scores.items()}
    membership_figure(
        options.images / "membership.png",
        rates,
        {attack: values["auc"] for attack, values in results["membership"]["attacks"].items()},
        f"{run_name}: {results['membership']['slices']} training and as many {held_out_name}",
    )
    both = ("samples", held_out_name)
    write_copying_figure(
        options.images / "copying.png", data.train, {name: (sets[name], copies[name]) for name in both}
    )
    outliers_figure(
        options.images / "outliers.png", {name: lowest(sets[name].slices, anatomy.scores[name]) for name in both}
    )
    phantom = data_options(options, config).on_phantom
    real_shown = phantom or options.report_real_slices
    evidence = Evidence(
        logged_curves(options.run),
        report_samples(samples.slices, drawn.positions, sampled, anatomy, data.train if real_shown else None),
        HeldOutSlices(*(as_array(of.slices[by_position]) for of in (real, decoded, reconstructions)))
        if real_shown
        else None,
        phantom,
        distances,
        rates,
    )
    write_report(options.run / "report.html", run_name, config, results, evidence)
    written = f"{options.run / 'evaluation.json'}, MODEL_CARD.md and report.html, figures in {options.images}"
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
    with autocast(codes.device):
        nats = code_nll(networks.prior, codes, torch.from_numpy(positions).to(codes.device)).mean().item()
    bits = nats / math.log(2)
    return {
        "reconstructions": {name: value.item() for name, value in metrics.compute().items()} | {"bits_per_pixel": rate},
        "codes": {"used": used, "perplexity": perplexity},
        "prior": {"nats_per_code": nats, "bits_per_code": bits, "bits_per_slice": bits * codes[0].numel()},
    }


def infer_membership(
    networks: Networks, train: Slices, held_out: Slices, samples: SliceSet, codes: Tensor, flip_axis: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Attack the run, given its samples and their codes: which slices was it trained on?

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
        found = attack_scores(slices, torch.from_numpy(positions).to(device), *networks, augment, codes)
    found["samples"] = -nearest_distances(slices, samples.slices, flip_axis)
    scores = {name: tuple(own.cpu().view(2, *shape)) for name, own in found.items()}
    attacks = {name: attack_metrics(*own) for name, own in scores.items()}
    return scores, {"patients": shape[0], "slices": pairs.members.size, "attacks": attacks}


# ---------------------------------------------------------------- table and figure


def write_model_card(path: Path, config: RunConfig, results: Mapping[str, Any]) -> None:
    """Write a run's model card, or replace the measured part of the one that is there."""
    try:
        card = fill_card(read_card(path.parent), config, results)
    except (OSError, ValueError) as error:
        logger.warning(f"{path} is left as it is: {error}")
        return
    write_file(path, lambda part: part.write_text(card, encoding="utf-8"))


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


# ---------------------------------------------------------------- report


def report_samples(
    slices: Tensor, positions: Tensor, copies: Copies, anatomy: Coherence, training: Slices | None
) -> SampleSlices:
    """Choose the samples of the report by their positions alone; without training slices, leave out called copies.

    Args:
        slices: All samples (N, 1, H, W).
        positions: (N,) in [0, 1], NaN for unknown.
        copies: What they may have copied.
        anatomy: Their coherence.
        training: The training slices that are shown beside them, or None.
    """
    order = positions.argsort()
    order = order if training else order[~copies.copied.cpu()[order]]
    shown = order[bin_centres(len(order), shown_samples(len(order), slices[0].numel()))]
    own = copies.take(shown.to(copies.scores.device))
    nearest = None
    if training:
        sources = training.batch(own.indices.cpu().numpy()).to(slices.device)
        nearest = as_array(align(sources, own.transforms))
    return SampleSlices(
        as_array(slices[shown.to(slices.device)]),
        shown.numpy(),
        positions[shown].numpy(),
        own.scores.cpu().numpy(),
        own.copied.cpu().numpy(),
        anatomy.tails["samples"].low[shown] >= 0.5,
        nearest,
    )


def logged_curves(run: Path) -> dict[str, Curves]:
    """Return what was logged, by stage; warn if the log cannot be read, which must not cost an evaluation."""
    if not (run / "metrics.jsonl").exists():  # an export has none
        return {}
    try:
        return {stage: read_curves(run, stage) for stage in ("vqvae", "prior", "refiner")}
    except RunError as error:
        logger.warning(str(error))
        return {}


# ---------------------------------------------------------------- self-test


def run_self_test(options: EvaluateOptions, config: RunConfig, device: torch.device) -> None:
    """Plant faults in held-out slices; print a table of what each figure sees, and write self_test.json."""
    started = time.perf_counter()
    data = draw_splits(training_data(options, config))
    splits = [own for own in (data.validate, data.test) if len(own)]
    print("planting faults in held-out slices, and copying training slices")
    results = self_test(data.train, splits, left_right_axis(np.array(config.affine)), device)
    print_self_test(results)
    write_file(options.run / "self_test.json", lambda part: part.write_text(strict_json(results)))
    say(f"{time.perf_counter() - started:.0f} s: {options.run / 'self_test.json'}")


# ---------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python evaluate.py`."""
    options = parse_options(arguments)
    device = sampling_device(options)
    check_folder("--images", options.images)
    config = read_config(options.run)
    check_folder("--run", options.run)
    if options.self_test:
        run_self_test(options, config, device)
        return
    networks = load_networks(options.run, config, device)
    set_guidance(options, networks)
    warn_if_incomplete(options.run)
    evaluate(options, config, networks, device)


if __name__ == "__main__":
    run_command(main)
