"""Train the VQ-VAE on slices, the gated PixelCNN prior on their codes, and the flow-matching refiner on decoded slices.

    python train.py --preset demo                       # the phantom, some minutes on two CPU cores
    python train.py --data keras_slices_data --run runs/hipmri

Writes the run directory --run (weights, metrics.jsonl, what resuming needs) and figures to --images. Run the same
command again to resume a stopped run.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from build import check_init, make_prior, make_refiner, make_vqvae
from checkpoints import Checkpoint, NoRun, Run, describe_code, load_weights, read_data_files, save_weights
from config import FORMAT, SMALLEST_SIDE, RunConfig, TrainConfig, add_options, configure, network_config, validate
from console import Parser, RunError, log_notices, logger, run_command, say
from dataset import DataError, DataSplits, Slices, batch_indices, describe_changes, load_dataset
from files import Reading
from intensity import PERCENTILE
from metrics import code_counts, codebook_use, reconstruction_metrics
from modules import MICRO_BATCH_CODES, VQVAE, GatedPixelCNN, PriorNoise, VQVAEConfig
from nifti import left_right_axis
from plots import (
    as_array,
    bin_centres,
    caption,
    codebook_figure,
    prior_loss_figure,
    reconstructions_figure,
    refinement_figure,
    refiner_loss_figure,
    vqvae_loss_figure,
)
from refiner import MICRO_BATCH_PIXELS, Refiner, RefinerNoise
from trainer import BatchLoader, Progress, StopSignals, Trainer, codebook_share, device_batches, micro_batches
from utils import autocast, channels_last, check_folder, make_folder, pick_device, seed_update
from validation import evaluate_prior, evaluate_refiner, evaluate_vqvae, extract_codes

COLLAPSE_SHARE, COLLAPSE_UPDATES = 0.1, 500  # codebook collapse: a smaller share of codes used for so many updates
AUGMENTED_SHARE = 0.5  # of the refiner's slices: it learns detail from the others, as interpolation blurs
GUIDE_SHARE = 0.2  # of the prior's updates, after which its weights become the guide
DRIFT = 0.1  # share of nats per code that validation slices need more than training slices when a warning is due
VALIDATION_SLICES = 1000  # at most, drawn by patient: of a large split all would take longer than training
UNIGRAM_SHARE = 0.95  # of the entropy of the code frequencies, the loss of a unigram model: a prior must reach less


# ---------------------------------------------------------------- stage 1: the VQ-VAE


class VQVAETrainer(Trainer[VQVAE]):
    """Train the VQ-VAE on slices.

    The encoder warms up without quantisation. K-means on its latents then initialises the codebook, so that nearly all
    codes stay in use.
    """

    stage, objective, criterion = "vqvae", "total_loss", "reconstruction_loss"

    def __init__(self, run: Run, stop: StopSignals, options: TrainConfig, loader: BatchLoader, data: DataSplits):
        seed_update(options.seed, self.stage, 0)
        model = channels_last(make_vqvae(options), loader.device)
        super().__init__(run, stop, options, loader, model, options.updates, options.learning_rate, with_ema=False)
        self.data, self.counts = data, torch.zeros(0)
        self.encoder_warmup = 0 if options.init else min(options.encoder_warmup, options.updates // 6)
        self.first_validation = self.encoder_warmup + 1

    def compute_losses(self) -> Iterator[dict[str, Tensor]]:
        if self.update == self.encoder_warmup + 1 and not self.options.init:
            self.model.codebook.kmeans_init(encode_latents(self.model, self.data.train, self.options, self.device))
            distributed.take_from_first(list(self.model.codebook.buffers()))
        slices, _, _ = self.loader(self.update)  # not augmented: with linear interpolation that lowered SSIM
        quantise, found = self.update > self.encoder_warmup, []
        for micro_batch in slices.split(-(-len(slices) // self.options.accumulate)):
            with autocast(self.device):
                reconstructions, embedding_loss, codes, latents = self.model(micro_batch, quantise)
            reconstruction_loss, weight = F.mse_loss(reconstructions, micro_batch), len(micro_batch) / len(slices)
            found.append((latents, codes))
            yield {
                "reconstruction_loss": weight * reconstruction_loss,
                "embedding_loss": weight * embedding_loss,
                "total_loss": weight * (reconstruction_loss + embedding_loss),
            }
        if quantise:
            latents, codes = map(torch.cat, zip(*found))
            share = codebook_share(self.batch_size, codes[0].numel())
            self.model.codebook.ema_update(latents.flatten(0, 2), codes.flatten(), share)

    def validate(self) -> dict[str, float]:
        values, self.counts = evaluate_vqvae(self.model, self.validation_batches(self.data.validate))
        return values

    def warn(self, values: dict[str, float]) -> None:
        """Warn once if the codebook has collapsed: hardly any codes have been used for long."""
        updates, used = self.run.curves(self.stage)["validate", "codes_used"]
        # The latest validations in a row with few codes. Warn at the first that makes the row long enough.
        few = [update for update, _ in takewhile(lambda line: line[1] < COLLAPSE_SHARE, zip(updates[::-1], used[::-1]))]
        if len(few) > 1 and few[0] - few[-1] >= COLLAPSE_UPDATES > few[1] - few[-1]:
            logger.warning(
                f"codebook collapse: under {COLLAPSE_SHARE:.0%} of the codes have been used since update {few[-1]}; "
                "try a larger --batch-size, another --seed or a smaller --codebook-size"
            )

    def draw_figures(self) -> None:
        curves, images = self.run.curves(self.stage), self.options.images
        vqvae_loss_figure(images / "vqvae_loss.png", curves)
        codebook_figure(images / "codebook_usage.png", curves, self.counts.cpu().numpy())
        draw_reconstructions(images / "reconstructions.png", self.model, self.data.validate, self.device)


def random_batches(train: Slices, count: int, options: TrainConfig, device: torch.device) -> Iterator[Tensor]:
    """Yield `count` training slices drawn at random, in batches (n, 1, H, W) of at most the batch size."""
    chosen = batch_indices(len(train), count, options.seed, 0)
    batches = np.array_split(chosen, -(-count // options.batch_size))
    return device_batches(map(train.batch, batches), device)


@torch.no_grad()
def encode_latents(model: VQVAE, train: Slices, options: TrainConfig, device: torch.device) -> Tensor:
    """Return latents (n, D), at most 65,536, of training slices drawn at random, for k-means."""
    latents = []
    for batch in random_batches(train, options.kmeans_slices, options, device):
        with autocast(device):
            z = model.latents(batch)
        latents.append(z.flatten(0, 2))
    pooled = torch.cat(latents)
    return pooled[torch.randperm(len(pooled), device=device)[:65536]]


@torch.no_grad()
def draw_reconstructions(path: Path, model: VQVAE, slices: Slices, device: torch.device) -> None:
    """Draw six reconstructions, evenly spaced over a split."""
    chosen = bin_centres(len(slices))
    batch = slices.batch(chosen).to(device)
    reconstructions = model.decode(model.encode(batch))
    metrics = reconstruction_metrics().to(device)
    ssim = [metrics(*pair)["ssim"].item() for pair in zip(reconstructions.split(1), batch.split(1))]
    titles = [f"{caption(slices.names[i])}\nSSIM {value:.3f}" for i, value in zip(chosen, ssim)]
    reconstructions_figure(path, as_array(batch), as_array(reconstructions), titles)


# ---------------------------------------------------------------- stage 2: the prior


class PriorTrainer(Trainer[GatedPixelCNN]):
    """Train the prior on the codes of augmented training slices; its EMA is validated and saved."""

    stage, objective, criterion = "prior", "nats_per_code", "nats_per_code"

    def __init__(
        self, run: Run, stop: StopSignals, options: TrainConfig, loader: BatchLoader, data: DataSplits, vqvae: VQVAE
    ):
        self.vqvae = vqvae
        self.validation_codes = extract_codes(vqvae, data.validate, options.batch_size, loader.device)
        self.validation_positions = torch.from_numpy(data.validate.positions).to(loader.device)
        seed_update(options.seed, self.stage, 0)
        model = channels_last(make_prior(options, data.slice_size, loader.left_right), loader.device)
        model.init_embedding(vqvae.codebook.embeddings)
        self.warned = False
        super().__init__(run, stop, options, loader, model, options.prior_updates, options.prior_learning_rate)

    def compute_losses(self) -> Iterator[dict[str, Tensor]]:
        options = self.options
        slices, positions, augmented = self.loader(self.update, self.batch_size, options.augmentation)
        with autocast(self.device):
            codes = self.vqvae.encode(slices)  # anew for each update: a flipped slice has other codes
        noise = self.own_noise(self.model.draw_noise, codes, MICRO_BATCH_CODES)
        for nats in micro_batches(self.nll, codes, positions, augmented, *noise, accumulate=options.accumulate):
            yield {"nats_per_code": nats, "bits_per_code": nats / math.log(2)}

    def nll(self, codes: Tensor, positions: Tensor, augmented: Tensor, *noise: Tensor) -> Tensor:
        """Return the prior's loss () of a micro-batch."""
        return self.model.nll(codes, positions, augmented, PriorNoise(*noise))

    def validate(self) -> dict[str, float]:
        early = math.isinf(self.best) or self.update <= GUIDE_SHARE * self.total
        if early and distributed.is_first():
            save_weights(self.run.path / "guide.safetensors", self.saved_model)
        size = self.options.batch_size
        batches = zip(self.validation_codes.split(size), self.validation_positions.split(size))
        nats = evaluate_prior(self.saved_model, self.until_stopped(batches))
        return {"nats_per_code": nats, "bits_per_code": nats / math.log(2)}

    def warn(self, values: dict[str, float]) -> None:
        """Warn once if the prior knows its training slices better than others, although those are augmented."""
        _, training = self.run.curves(self.stage).get(("train", self.criterion), ([], []))
        more = values[self.criterion] / np.mean(training[-10:]) - 1 if training else 0.0
        if more > DRIFT and not self.warned:
            self.warned = True
            logger.warning(
                f"the prior needs {more:.0%} more bits for validation than for training slices: weights and samples "
                "may give patients away; try --patience 2, a higher --augmentation or --prior-dropout, or fewer "
                "--prior-updates"
            )

    def draw_figures(self) -> None:
        curves = self.run.curves(self.stage)
        prior_loss_figure(self.options.images / "prior_loss.png", curves, self.model.config.codebook_size)


def warn_if_unigram(nats: float, codes: Tensor, codebook_size: int) -> None:
    """Warn if a prior has learned little more of codes (N, h, w) than how often each occurs."""
    _, perplexity = codebook_use(code_counts(codes, codebook_size))
    if codes.numel() > 4 * codebook_size and nats > UNIGRAM_SHARE * math.log(perplexity):
        logger.warning(
            f"the prior has learned little more than how often each code occurs ({nats:.2f} nats per code): samples "
            "will be noise; try more --prior-updates, or a lower --prior-learning-rate"
        )


# ---------------------------------------------------------------- stage 3: the refiner


class RefinerTrainer(Trainer[Refiner]):
    """Train the refiner on training slices and their reconstructions; its EMA is validated and saved."""

    stage, objective, criterion = "refiner", "flow_loss", "flow_loss"
    fitted = ("residual_std", "grain_mean", "grain_factor")

    def __init__(
        self, run: Run, stop: StopSignals, options: TrainConfig, loader: BatchLoader, data: DataSplits, vqvae: VQVAE
    ):
        self.data, self.vqvae = data, vqvae
        seed_update(options.seed, self.stage, 0)
        model = channels_last(make_refiner(options), loader.device)
        model.fit_residuals(*reconstruct_subset(vqvae, data.train, options, loader.device))
        super().__init__(run, stop, options, loader, model, options.refiner_updates, options.refiner_learning_rate)

    def compute_losses(self) -> Iterator[dict[str, Tensor]]:
        options = self.options
        slices, _, augmented = self.loader(self.update, self.batch_size, options.augmentation, AUGMENTED_SHARE)
        with autocast(self.device):
            codes = self.vqvae.encode(slices)
        noise = self.own_noise(self.draw_noise, slices, MICRO_BATCH_PIXELS)
        sizes = {"elements": MICRO_BATCH_PIXELS, "accumulate": options.accumulate}
        for loss in micro_batches(self.flow_loss, slices, codes, augmented, *noise, **sizes):
            yield {"flow_loss": loss}

    def flow_loss(self, slices: Tensor, codes: Tensor, augmented: Tensor, *noise: Tensor) -> Tensor:
        """Return the refiner's loss () of a micro-batch."""
        return self.model.loss(slices, codes, self.vqvae, augmented, RefinerNoise(*noise))

    def validate(self) -> dict[str, float]:
        batches = self.validation_batches(self.data.validate)
        return {"flow_loss": evaluate_refiner(self.saved_model, self.vqvae, batches, self.options.seed)}

    def draw_noise(self, count: int) -> RefinerNoise:
        """Return the random numbers of `count` slices."""
        return self.model.draw_noise((count, 1, *self.data.slice_size))

    def pass_over(self, batch: range) -> None:
        self.draw_noise(len(batch))

    def draw_figures(self) -> None:
        refiner_loss_figure(self.options.images / "refiner_loss.png", self.run.curves(self.stage))
        path = self.options.images / "refinement.png"
        draw_refinement(path, self.saved_model, self.vqvae, self.data.validate, self.device)


@torch.no_grad()
def reconstruct_subset(
    vqvae: VQVAE, train: Slices, options: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return training slices drawn at random, their reconstructions (N, 1, H, W), and their codes (N, h, w)."""
    slices, reconstructions, grids = [], [], []
    for batch in random_batches(train, options.std_slices, options, device):
        with autocast(device):
            codes = vqvae.encode(batch)
            reconstructions.append(vqvae.decode(codes))
        slices.append(batch)
        grids.append(codes)
    return torch.cat(slices), torch.cat(reconstructions), torch.cat(grids)


def draw_refinement(path: Path, model: Refiner, vqvae: VQVAE, slices: Slices, device: torch.device) -> None:
    """Draw six slices, evenly spaced over a split: original, decoded, and refined with two seeds."""
    chosen = bin_centres(len(slices))
    batch = slices.batch(chosen).to(device)
    codes = vqvae.encode(batch)
    refined = [model.sample(range(len(batch)), codes, vqvae, seed) for seed in (0, 1)]
    rows = dict(zip(("slice", "decoded", "refined", "refined again"), (batch, vqvae.decode(codes), *refined)))
    titles = [caption(slices.names[i]) for i in chosen]
    refinement_figure(path, {name: as_array(of) for name, of in rows.items()}, titles)


# ---------------------------------------------------------------- the command


def parse_options(arguments: Sequence[str] | None) -> TrainConfig:
    """Parse the command line."""
    parser = Parser(description=str(__doc__).split("\n\n")[0], epilog="Run the same command again to resume.")
    add_options(parser)
    return configure(vars(parser.parse_args(arguments)))


def describe_positions(positions: np.ndarray) -> dict[str, object]:
    """Return the positions that sampling draws from: 101 quantiles, and the share that is unknown."""
    known = positions[np.isfinite(positions)]
    quantiles = np.quantile(known, np.linspace(0, 1, 101)).tolist() if len(known) else []
    return {"quantiles": quantiles, "unknown": 1 - len(known) / len(positions)}


def describe_run(options: TrainConfig, data: DataSplits) -> RunConfig:
    """Return the content of config.json."""
    fields = {
        "options": options.model_dump(mode="json"),
        "slice_size": data.slice_size,
        "intensity": {
            "percentile": PERCENTILE if options.intensity == "percentile" else None,
            "scale": data.scale,
            "low": data.low,
        },
        "affine": data.affine.tolist(),
        "positions": describe_positions(data.train.positions),
        "fingerprint": data.fingerprint,
    }
    return validate(RunConfig, fields | {"format": FORMAT} | describe_code())


def describe_flip(left_right: int | None) -> str:
    """Say along which axis slices are flipped, for a user who can tell whether it is the right one."""
    if left_right is None:
        return "slices are not flipped: by their headers neither axis runs left-right"
    return f"half of the training slices are flipped along their {('first', 'second')[left_right - 2]} axis, left-right"


def open_run(options: TrainConfig, data: DataSplits) -> Run:
    """Open the run directory in the first process, which owns it."""
    if not distributed.is_first():
        return NoRun(options.run)
    return Run(options.run, describe_run(options, data), data.files)


def check_same_data(run: Run, data: DataSplits, allow_changes: bool) -> None:
    """Raise RunError saying how the data differ from the run's; if that is allowed, record them as the run's own."""
    if run.config.fingerprint == data.fingerprint:
        return
    changes = describe_changes(read_data_files(run.path), data.files)
    if not allow_changes:
        raise RunError(
            f"the data changed since {run.path} began: {changes}; restore them, choose another --run, "
            "or resume with --allow-changed-data"
        )
    logger.warning(f"the data changed since {run.path} began: {changes}")
    run.accept_data(data.fingerprint, data.files)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `python train.py`."""
    with distributed.processes():
        options = parse_options(arguments)
        device = distributed.together(lambda: pick_device(distributed.device_name(options.device)))
        distributed.check_same("the devices", device.type, "give --device cuda, or cpu")
        distributed.from_first(partial(check_folder, "--run", options.run))
        distributed.from_first(partial(check_folder, "--images", options.images))
        side = options.downsampling
        size = options.slice_size or (options.phantom_size if options.on_phantom else None)
        asked = (options.data, size, (side, side), options.seed)
        load = partial(load_dataset, *asked, reading=Reading.of(options), recheck=options.recheck)
        with StopSignals() as stop:
            data = distributed.in_turn(load)
            distributed.check_same("the slices", data.fingerprint, "give --data a folder that all machines share")
            log_notices(data.notices)
            if min(data.slice_size) < SMALLEST_SIDE:
                size_found = f"slices of {data.slice_size} pixels are too small"
                raise DataError(f"{size_found}: a side needs at least {SMALLEST_SIDE}")
            options = options.model_copy(update={"slice_size": tuple(data.slice_size)})
            if options.init and not (options.run / "config.json").exists():  # else it has begun
                left_right = left_right_axis(data.affine)
                distributed.from_first(partial(check_init, options.init, options, data.slice_size, left_right))
            with distributed.together(lambda: open_run(options, data)) as run:
                distributed.from_first(partial(check_same_data, run, data, options.allow_changed_data))
                checkpoint = distributed.from_first(run.load_checkpoint)
                sizes = f"{len(data.train)} training, {len(data.validate)} validation and {len(data.test)} test slices"
                say(f"{sizes} of {data.slice_size[0]}x{data.slice_size[1]} on {device}; run directory {options.run}")
                train_stages(run, stop, checkpoint, data, options, device)


def train_stages(
    run: Run,
    stop: StopSignals,
    checkpoint: Checkpoint | None,
    data: DataSplits,
    options: TrainConfig,
    device: torch.device,
) -> None:
    """Train the three networks, from a checkpoint if there is one."""
    stage = checkpoint.header.stage if checkpoint else "vqvae"  # where to begin; a later one ignores the checkpoint
    if stage == "done":
        say(f"{options.run} is complete: nothing to do")
        return
    held_out = len(data.validate)
    data = replace(data, validate=data.validate.draw_patients(VALIDATION_SLICES))
    if len(data.validate) < held_out:
        say(f"{len(data.validate)} of {held_out} validation slices are used, of patients drawn at random")
    distributed.from_first(partial(make_folder, options.images))
    left_right = left_right_axis(data.affine)
    say(describe_flip(left_right))
    loader = BatchLoader(data.train, left_right, options, device)
    with Progress(options) as progress:
        if stage == "vqvae":
            VQVAETrainer(run, stop, options, loader, data).fit(checkpoint, progress)
        path = options.run / "vqvae.safetensors"
        vqvae = distributed.from_first(lambda: load_weights(path, VQVAE, VQVAEConfig))
        if vqvae.config != network_config(VQVAEConfig, options):
            raise RunError(f"{path} is not of this run: choose another --run")
        vqvae = channels_last(vqvae, device)
        if stage != "refiner":
            prior = PriorTrainer(run, stop, options, loader, data, vqvae)
            prior.fit(checkpoint, progress)
            warn_if_unigram(prior.best, prior.validation_codes, options.codebook_size)
        RefinerTrainer(run, stop, options, loader, data, vqvae).fit(checkpoint, progress)
        run.save_checkpoint({}, stage="done")
    say_what_to_open(options)


def say_what_to_open(options: TrainConfig) -> None:
    """Print what a finished training has written, and which commands follow."""
    given = f"--run {shlex.quote(str(options.run))} --images {shlex.quote(str(options.images))}"
    say(f"{options.run} is complete")
    for what, where in (
        ("curves", f"vqvae_loss.png, prior_loss.png, refiner_loss.png and codebook_usage.png in {options.images}"),
        ("slices", f"reconstructions.png and refinement.png in {options.images}"),
        ("sample", f"python predict.py {given}"),
        ("evaluate", f"python evaluate.py {given}"),
    ):
        say(f"  {what:<10}{where}")


if __name__ == "__main__":
    run_command(main)
