"""Train the VQ-VAE on slices, the gated PixelCNN prior on their codes, and the flow-matching refiner on decoded slices.

    python train.py --preset demo                       # the phantom, some minutes on two CPU cores
    python train.py --data keras_slices_data --run runs/hipmri

Writes the run directory --run (weights, metrics.jsonl, what resuming needs) and figures to --images. Run the same
command again to resume a stopped run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints import FORMAT, Run, load_weights, read_data_files
from config import SMALLEST_SIDE, TrainConfig, add_options, configure
from dataset import PERCENTILE, DataError, Dataset, Slices, batch_indices, describe_changes, load_dataset
from metrics import code_counts, codebook_use, reconstruction_metrics
from modules import VQVAE, GatedPixelCNN, PriorConfig, Refiner, RefinerConfig, VQVAEConfig
from nifti import left_right_axis
from plots import (
    caption,
    codebook_figure,
    evenly_spaced,
    prior_loss_figure,
    reconstructions_figure,
    refinement_figure,
    refiner_loss_figure,
    vqvae_loss_figure,
)
from trainer import CHECKPOINT_SECONDS, BatchLoader, Stage, micro_batches
from utils import (
    Clock,
    Parser,
    RunError,
    StopSignals,
    autocast,
    check_folder,
    make_folder,
    pick_device,
    run_command,
    say,
    seed_update,
)

UNIGRAM_SHARE = 0.95  # of the entropy of the codes' frequencies: a prior has to need less


def parse_options(arguments: Sequence[str] | None) -> TrainConfig:
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Run the same command again to resume.")
    add_options(parser)
    return configure(vars(parser.parse_args(arguments)))


def network_config(kind: type, options: TrainConfig, prefix: str = "", **given: object) -> object:
    """The shape of a network: its fields are given, or are options of that name with a prefix."""
    chosen = {field.name: getattr(options, prefix + field.name) for field in fields(kind) if field.name not in given}
    return kind(**chosen, **given)


def train_vqvae(run: Run, state: dict, data: Dataset, options: TrainConfig, feed: BatchLoader) -> None:
    """Stage 1: the VQ-VAE, its best weights to vqvae.safetensors."""
    device = feed.device
    seed_update(options.seed, "vqvae", 0)
    model = VQVAE(network_config(VQVAEConfig, options)).to(device, memory_format=torch.channels_last)
    stage = Stage(run, "vqvae", model, options.updates, options.learning_rate, options)
    stage.resume(state)
    # The encoder first learns without codes; they then start where its vectors are, and nearly all stay in use.
    warm_up = min(options.encoder_warmup, options.updates // 6)
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        if update == warm_up + 1:
            model.codebook.kmeans_init(encode_latents(model, data.train, options, device))
        slices, _, _ = feed(update)  # not augmented: interpolation smooths, which lowered SSIM
        with autocast(device):
            reconstructions, embedding_loss, _ = model(slices, quantise=update > warm_up)
        reconstruction_loss = F.mse_loss(reconstructions, slices)
        total_loss = reconstruction_loss + embedding_loss
        stage.step([total_loss])
        stage.note(reconstruction_loss=reconstruction_loss, embedding_loss=embedding_loss, total_loss=total_loss)

        # At even intervals and after the last update: validation; figures not more often than once a minute.
        if update > warm_up and stage.validation_due():
            values, counts = evaluate_vqvae(model, data.validate, options.batch_size, device)
            stage.log("validate", values)
            stage.keep_best(values["reconstruction_loss"], model)
            if figures_due.due() or update == options.updates:
                write_vqvae_figures(run, model, data.validate, counts, options.images, device)


def describe_flip(affine: np.ndarray) -> str:
    """Along which axis slices are mirrored, for a user who knows whether it is the right one."""
    axis = left_right_axis(affine)
    if axis is None:
        return "no slice is mirrored: by their headers neither axis runs left-right"
    return f"half of the training slices are mirrored, along their {('first', 'second')[axis - 2]} axis: left-right"


def drawn_batches(train: Slices, count: int, options: TrainConfig, device: torch.device) -> Iterator[Tensor]:
    """`count` training slices drawn at random, in batches (n, 1, H, W) of at most the batch size, on the device."""
    chosen = batch_indices(len(train), count, options.seed, 0)
    for part in np.array_split(chosen, -(-count // options.batch_size)):
        yield train.batch(part).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def encode_latents(model: VQVAE, train: Slices, options: TrainConfig, device: torch.device) -> Tensor:
    """Vectors (65536 at most, D) of training slices drawn at random, for k-means."""
    vectors = []
    for batch in drawn_batches(train, options.kmeans_slices, options, device):
        with autocast(device):
            z = model.latents(batch)
        vectors.append(z.flatten(0, 2))
    vectors = torch.cat(vectors)
    return vectors[torch.randperm(len(vectors), device=device)[:65536]]


@torch.no_grad()
def evaluate_vqvae(
    model: VQVAE, slices: Slices, batch_size: int, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Losses, SSIM, PSNR and codebook use over a split, and how often each code was used (K,)."""
    model.eval()
    figures = reconstruction_metrics().to(device)
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=device)
    sums = np.zeros(2)
    for batch in slices.batches(batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        with autocast(device):
            reconstructions, embedding_loss, codes = model(batch)
        sums += len(batch) * np.array([F.mse_loss(reconstructions, batch).item(), embedding_loss.item()])
        counts += code_counts(codes, model.config.codebook_size)
        figures.update(reconstructions, batch)
    model.train()
    reconstruction_loss, embedding_loss = (sums / len(slices)).tolist()
    used, perplexity = codebook_use(counts)
    return {
        "reconstruction_loss": reconstruction_loss,
        "embedding_loss": embedding_loss,
        "total_loss": reconstruction_loss + embedding_loss,
        **{name: value.item() for name, value in figures.compute().items()},
        "codes_used": used,
        "perplexity": perplexity,
    }, counts


def write_vqvae_figures(
    run: Run, model: VQVAE, slices: Slices, counts: Tensor, images: Path, device: torch.device
) -> None:
    """Loss curves, codebook use, and six reconstructions spread over the split."""
    curves = run.curves("vqvae")
    vqvae_loss_figure(images / "vqvae_loss.png", curves)
    codebook_figure(images / "codebook_usage.png", curves, counts.cpu().numpy())
    chosen = evenly_spaced(len(slices))
    batch = slices.batch(chosen).to(device)
    reconstructions = model.decode(model.encode(batch))
    ssim = [
        reconstruction_metrics().to(device)(*pair)["ssim"] for pair in zip(reconstructions.split(1), batch.split(1))
    ]
    titles = [f"{caption(slices.names[i])}\nSSIM {s:.3f}" for i, s in zip(chosen, ssim)]
    pictures = (x[:, 0].cpu().numpy() for x in (batch, reconstructions))
    reconstructions_figure(images / "reconstructions.png", *pictures, titles)


@torch.no_grad()
def extract_codes(model: VQVAE, slices: Slices, batch_size: int, device: torch.device) -> Tensor:
    """The codes (N, h, w) of a split, on the device."""
    codes = []
    for batch in slices.batches(batch_size):
        with autocast(device):
            codes.append(model.encode(batch.to(device, memory_format=torch.channels_last)))
    return torch.cat(codes)


def train_prior(run: Run, state: dict, vqvae: VQVAE, data: Dataset, options: TrainConfig, feed: BatchLoader) -> None:
    """Stage 2: the prior on the codes of the training slices, its best weights to prior.safetensors."""
    device = feed.device
    validation_codes = extract_codes(vqvae, data.validate, options.batch_size, device)
    validation_positions = torch.from_numpy(data.validate.positions).to(device)
    seed_update(options.seed, "prior", 0)
    shape = {"grid": tuple(validation_codes.shape[1:]), "codebook_size": options.codebook_size}
    config = network_config(PriorConfig, options, "prior_", **shape)
    model = GatedPixelCNN(config).to(device, memory_format=torch.channels_last)
    model.init_embedding(vqvae.codebook.embeddings)
    stage = Stage(run, "prior", model, options.prior_updates, options.prior_learning_rate, options, averaged=True)
    averaged = stage.ema.network
    stage.resume(state)
    stage.checkpoint()  # from here on stage 1 need not be looked at again
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        slices, positions, variation = feed(update, options.batch_divisor, options.augmentation)
        with autocast(device):
            codes = vqvae.encode(slices)  # anew for each update: a mirrored slice has other codes
        loss = stage.step(micro_batches(model.nll, codes, positions, variation))
        stage.note(**nats_and_bits(loss))

        # At even intervals and after the last update: validation of the averaged weights; the best so far are kept.
        if stage.validation_due():
            nats = evaluate_prior(averaged, validation_codes, validation_positions, options.batch_size)
            stage.log("validate", nats_and_bits(nats))
            stage.keep_best(nats, averaged)
            if figures_due.due() or update == options.prior_updates:
                prior_loss_figure(options.images / "prior_loss.png", run.curves("prior"), config.codebook_size)
    warn_if_unigram(stage.best, validation_codes, config.codebook_size)


def warn_if_unigram(nats: float, codes: Tensor, size: int) -> None:
    """Say so where a prior has learned no more of codes (N, h, w) of K = `size` than how often each is used."""
    _, perplexity = codebook_use(code_counts(codes, size))
    if codes.numel() > 4 * size and nats > UNIGRAM_SHARE * math.log(perplexity):
        say(
            f"warning: the prior has learned hardly more than how often each code is used ({nats:.2f} nats a code): "
            "samples will be noise; try more --prior-updates, or a lower --prior-learning-rate"
        )


def describe_positions(positions: np.ndarray) -> dict:
    """What sampling needs of the training slices' positions: 101 quantiles, and the share that is not known."""
    known = positions[np.isfinite(positions)]
    quantiles = np.quantile(known, np.linspace(0, 1, 101)).tolist() if len(known) else []
    return {"quantiles": quantiles, "unknown": 1 - len(known) / len(positions)}


def nats_and_bits(nats: Tensor | float) -> dict[str, Tensor | float]:
    """A loss under both its names."""
    return {"nats_per_code": nats, "bits_per_code": nats / np.log(2)}


@torch.no_grad()
def evaluate_prior(model: GatedPixelCNN, codes: Tensor, positions: Tensor, batch_size: int) -> float:
    """Mean negative log-likelihood of codes (N, h, w) at positions (N,), in nats a code."""
    model.eval()
    total = 0.0
    for batch in zip(codes.split(batch_size), positions.split(batch_size)):
        total += sum(micro_batches(model.nll, *batch)).item() * batch[0].numel()
    model.train()
    return total / codes.numel()


def train_refiner(run: Run, state: dict, vqvae: VQVAE, data: Dataset, options: TrainConfig, feed: BatchLoader) -> None:
    """Stage 3: the refiner on training slices and their decodings, its best weights to refiner.safetensors."""
    device = feed.device
    seed_update(options.seed, "refiner", 0)
    shared = {name: getattr(options, name) for name in ("downsampling", "codebook_size", "embedding_dim")}
    config = network_config(RefinerConfig, options, "refiner_", **shared)
    model = Refiner(config).to(device, memory_format=torch.channels_last)
    if state.get("stage") != "refiner":
        model.fit_residual_std(*reconstruct_subset(vqvae, data.train, options, device))
    stage = Stage(run, "refiner", model, options.refiner_updates, options.refiner_learning_rate, options, averaged=True)
    averaged = stage.ema.network
    stage.resume(state)
    stage.checkpoint()  # from here on stage 2 need not be looked at again
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        slices, _, _ = feed(update, options.batch_divisor)  # not augmented: interpolated slices lack detail
        with autocast(device):
            codes = vqvae.encode(slices)
        loss = stage.step(micro_batches(lambda part, of: model.loss(of, part, vqvae), codes, slices))
        stage.note(flow_loss=loss)

        # At even intervals and after the last update: validation of the averaged weights; the best so far are kept.
        if stage.validation_due():
            flow_loss = evaluate_refiner(averaged, vqvae, data.validate, options, device)
            stage.log("validate", {"flow_loss": flow_loss})
            stage.keep_best(flow_loss, averaged)
            if figures_due.due() or update == options.refiner_updates:
                write_refiner_figures(run, averaged, vqvae, data.validate, options.images, device)


@torch.no_grad()
def reconstruct_subset(
    vqvae: VQVAE, train: Slices, options: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Training slices drawn at random, what they are decoded to (N, 1, H, W), and their codes (N, h, w)."""
    parts = []
    for batch in drawn_batches(train, options.std_slices, options, device):
        with autocast(device):
            codes = vqvae.encode(batch)
            parts.append((batch, vqvae.decode(codes), codes))
    return tuple(map(torch.cat, zip(*parts)))


@torch.no_grad()
def evaluate_refiner(model: Refiner, vqvae: VQVAE, slices: Slices, options: TrainConfig, device: torch.device) -> float:
    """Mean loss over a split, for the same noise and times whenever it is called."""
    seed_update(options.seed, "refiner validation", 0)
    total = 0.0
    for batch in slices.batches(options.batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        with autocast(device):
            total += len(batch) * model.loss(batch, vqvae.encode(batch), vqvae).item()
    return total / len(slices)


def write_refiner_figures(
    run: Run, model: Refiner, vqvae: VQVAE, slices: Slices, images: Path, device: torch.device
) -> None:
    """The loss curve, and six slices spread over the split: original, decoded, and refined twice."""
    refiner_loss_figure(images / "refiner_loss.png", run.curves("refiner"))
    chosen = evenly_spaced(len(slices))
    batch = slices.batch(chosen).to(device)
    codes = vqvae.encode(batch)
    drawn = [model.sample(range(len(batch)), codes, vqvae, seed) for seed in (0, 1)]
    strips = dict(zip(("slice", "decoded", "refined", "refined again"), (batch, vqvae.decode(codes), *drawn)))
    titles = [caption(slices.names[i]) for i in chosen]
    refinement_figure(images / "refinement.png", {name: of[:, 0].cpu().numpy() for name, of in strips.items()}, titles)


def describe_run(options: TrainConfig, data: Dataset) -> dict:
    """What config.json holds."""
    return {
        "format": FORMAT,
        "options": options.model_dump(mode="json"),
        "slice_size": data.slice_size,
        "intensity": {"percentile": PERCENTILE, "scale": data.scale},
        "affine": data.affine.tolist(),
        "positions": describe_positions(data.train.positions),
        "fingerprint": data.fingerprint,
    }


def refuse_changed_data(run: Run, data: Dataset, allowed: bool) -> None:
    """Raise RunError saying how the data differ from those of the run; where that is allowed, take them for its own."""
    if run.config["fingerprint"] == data.fingerprint:
        return
    changes = describe_changes(read_data_files(run.path), data.files)
    if not allowed:
        raise RunError(
            f"the data changed since {run.path} began: {changes}; bring them back, choose another --run, "
            "or go on with --allow-changed-data"
        )
    say(f"warning: the data changed since {run.path} began: {changes}")
    run.accept_data(data.fingerprint, data.files)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python train.py`."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    check_folder("--run", options.run)
    check_folder("--images", options.images)
    side = options.downsampling
    size = options.slice_size or (options.phantom_size if options.data == "phantom" else None)
    with StopSignals():
        data = load_dataset(options.data, size, (side, side), options.seed)
        for notice in data.notices:
            say(notice)
        if min(data.slice_size) < SMALLEST_SIDE:
            raise DataError(f"slices of {data.slice_size} pixels are too small: a side has {SMALLEST_SIDE} at least")
        options = options.model_copy(update={"slice_size": tuple(data.slice_size)})
        with Run(options.run, describe_run(options, data), data.files) as run:
            refuse_changed_data(run, data, options.allow_changed_data)
            state = run.load()
            sizes = f"{len(data.train)} training, {len(data.validate)} validation and {len(data.test)} test slices"
            say(f"{sizes} of {data.slice_size[0]}x{data.slice_size[1]} on {device}; run directory {options.run}")
            say(describe_flip(data.affine))
            train_stages(run, state, data, options, device)


def train_stages(run: Run, state: dict, data: Dataset, options: TrainConfig, device: torch.device) -> None:
    """The three stages, or what is left of them."""
    if state.get("stage") == "done":
        say(f"{options.run} is complete: nothing to do")
        return
    make_folder(options.images)
    feed = BatchLoader(data, options, device)
    if state.get("stage", "vqvae") == "vqvae":
        train_vqvae(run, state, data, options, feed)
    vqvae = load_weights(run.path / "vqvae.safetensors", VQVAE, VQVAEConfig)
    if vqvae.config != network_config(VQVAEConfig, options):
        raise RunError(f"{run.path / 'vqvae.safetensors'} is not of this run: choose another --run")
    vqvae.to(device, memory_format=torch.channels_last)
    if state.get("stage") != "refiner":
        train_prior(run, state, vqvae, data, options, feed)
    train_refiner(run, state, vqvae, data, options, feed)
    run.save(stage="done")
    say(f"{options.run} is complete: figures in {options.images}; sample with: python predict.py --run {options.run}")


if __name__ == "__main__":
    run_command(main)
