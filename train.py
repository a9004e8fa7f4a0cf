"""Train the VQ-VAE on slices, then the gated PixelCNN on their codes, then what gives decoded slices their detail.

    python train.py --preset demo                       # the phantom, some minutes on two CPU cores
    python train.py --data keras_slices_data --run runs/hipmri

Writes the run directory --run (weights, metrics.jsonl, what resuming needs) and figures to --images. Run the same
command again to resume a stopped run.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import (
    MAX_SIDE,
    PERCENTILE,
    DataError,
    Dataset,
    Slices,
    batch_indices,
    changed_files,
    load_dataset,
    to_float,
)
from metrics import code_counts, codebook_use, reconstruction_metrics
from modules import PART_CODES, VARIATIONS, VQVAE, Detail, DetailConfig, GatedPixelCNN, PriorConfig, VQVAEConfig
from utils import (
    FORMAT,
    LIMITS,
    Clock,
    Parser,
    Run,
    RunError,
    StopSignals,
    autocast,
    caption,
    check_fields,
    check_folder,
    close_tensorboard,
    codebook_figure,
    detail_figure,
    detail_loss_figure,
    fail,
    filled,
    in_short,
    is_series,
    left_right_axis,
    load_weights,
    make_folder,
    number,
    pick_device,
    prior_loss_figure,
    real,
    reconstructions_figure,
    restore,
    save_weights,
    say,
    seed_update,
    spread,
    tensorboard,
    tensors_in,
    text,
    vqvae_loss_figure,
    whole,
    writing,
)

EVALUATIONS = 20  # a stage
LOG_LINES = 250  # of the training losses, a stage
KMEANS_SLICES = 128
CHECKPOINT_SECONDS = 60
MAX_NORM = 1.0  # of a gradient: at the prior's rate a few long ones would undo what was learned, for good
AVERAGE_DECAY = 0.99  # of averaged weights in the end: a memory of some 100 updates
SPREAD_SLICES = 256  # from which the spread of detail is measured
SHARE = 4  # prior and detail learn from a quarter of a batch: small updates teach them more in the same time
COPIED_SLICES = 4096  # at a time to a GPU's memory: 128 MB of 256x128
LONG_SECONDS = 1  # an update that takes longer is left on a signal: a checkpoint has to be written in five
COLLAPSED = (0.1, 500)  # share of codes used, and for how many updates
LEARNED = 0.95  # of the nats that cost the codes by their frequencies alone: a prior has to need less
SMALLEST_SIDE = 8  # pixels; SSIM's window needs 6


@dataclass(frozen=True)
class Preset:
    """What --preset chooses: the networks' shapes (the grid follows the slice size), the phantom's slice size where
    --slice-size does not give one, updates, the strength of augmentation, and peak learning rates."""

    vqvae: VQVAEConfig
    prior: PriorConfig
    detail: DetailConfig
    phantom_size: tuple[int, int]
    updates: int
    prior_updates: int
    detail_updates: int
    augmentation: float
    learning_rate: float = 1e-3
    prior_learning_rate: float = 8e-3
    detail_learning_rate: float = 4e-3


PRESETS = {
    "full": Preset(
        VQVAEConfig(codes=2048),
        PriorConfig(),
        DetailConfig(),
        (256, 128),
        updates=5000,
        prior_updates=20000,
        detail_updates=20000,
        augmentation=1.0,
    ),
    "demo": Preset(
        VQVAEConfig(),
        PriorConfig(cycles=1),
        DetailConfig(),
        (128, 64),
        updates=1000,
        prior_updates=1600,
        detail_updates=3000,
        augmentation=0.0,
    ),
}


def parse_options(arguments: Sequence[str] | None):
    """The command line; numbers of updates filled in from the preset."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Run the same command again to resume.")
    parser.add_argument(
        "--data",
        type=filled(str),
        default="phantom",
        help="folder of 2D .nii/.nii.gz slices, or 'phantom', the embedded data (default)",
    )
    parser.add_argument(
        "--run", type=filled(Path), default=Path("runs/default"), help="run directory (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=filled(Path), default=Path("images"), help="folder of figures (default: %(default)s)"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="full",
        help="full: the published recipe (default); demo: smaller networks and phantom, fewer updates: minutes",
    )
    limited = {name: number(int, *limits) for name, limits in LIMITS.items()}
    parser.add_argument(
        "--updates", type=limited["updates"], metavar="N", help="updates of the VQ-VAE (default: the preset's)"
    )
    parser.add_argument(
        "--prior-updates",
        type=limited["prior_updates"],
        metavar="N",
        help="updates of the prior, of a quarter of a batch (default: the preset's)",
    )
    parser.add_argument(
        "--detail-updates",
        type=limited["detail_updates"],
        metavar="N",
        help="updates of the detail, of a quarter of a batch (default: the preset's, at most 4 times --updates)",
    )
    parser.add_argument(
        "--batch-size",
        type=limited["batch_size"],
        default=32,
        metavar="N",
        help="slices an update of the VQ-VAE; prior and detail have a quarter (default: 32)",
    )
    parser.add_argument(
        "--slice-size",
        type=number(int, SMALLEST_SIDE, MAX_SIDE),
        nargs=2,
        metavar=("H", "W"),
        help="pixels; other slices are cropped or padded, the phantom is drawn so (default: the most common size)",
    )
    parser.add_argument(
        "--augmentation",
        type=number(float, 0, 4),
        metavar="S",
        help="how much the prior's slices are turned, stretched, shifted and so on (default: full 1, demo 0)",
    )
    parser.add_argument("--seed", type=limited["seed"], default=0, help="of all randomness (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument(
        "--checkpoint-every",
        type=limited["checkpoint_every"],
        metavar="N",
        help="updates from checkpoint to checkpoint (default: as many as take a minute); a signal writes one too",
    )
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="resume although files of the data were added, removed or altered since the run began",
    )
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    options.updates = options.updates or preset.updates
    options.prior_updates = options.prior_updates or preset.prior_updates
    options.detail_updates = options.detail_updates or min(SHARE * options.updates, preset.detail_updates)
    options.augmentation = preset.augmentation if options.augmentation is None else options.augmentation
    return options


class Average:
    """The moving average of a network's weights, a network itself. Its memory grows to some 100 updates."""

    def __init__(self, network: nn.Module):
        self.network = deepcopy(network)
        # Both listed once, and moved by one kernel: a GPU's host would else be busy with each weight in turn.
        self.weights = list(self.network.parameters()), list(network.parameters())

    @torch.no_grad()
    def follow(self, update: int) -> None:
        """One step of the average, after an update, counted from 1."""
        decay = min(AVERAGE_DECAY, update / (update + 9))
        torch._foreach_lerp_(*self.weights, 1 - decay)


class Stage:
    """What the training loops share: resuming, the optimiser's step, log lines, checkpoints, a stop on a signal."""

    def __init__(
        self,
        run: Run,
        name: str,
        model: nn.Module,
        updates: int,
        learning_rate: float,
        options,
        averaged: bool = False,
    ):
        self.run, self.name, self.total, self.seed = run, name, updates, options.seed
        self.average = Average(model) if averaged else None
        self.networks = {"model": model}  # what a checkpoint holds the weights of
        if averaged:
            self.networks["averaged"] = self.average.network
        self.optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        for weight in model.parameters():  # as its first step would make them, so that a checkpoint has its place
            step = torch.zeros((), device=weight.device)
            moments = {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[weight] = {"step": step, **moments}
        self.learning_rate, self.checkpoint_every = learning_rate, options.checkpoint_every
        self.update, self.best = 0, float("inf")
        self.losses: dict[str, list[Tensor]] = {}  # since the last log line
        self.clock, self.writer = Clock(CHECKPOINT_SECONDS), None

    def tensors(self) -> dict[str, dict]:
        """What is learned: a checkpoint's tensors, which resuming writes to."""
        weights = {name: network.state_dict() for name, network in self.networks.items()}
        return weights | {"optimiser": self.optimiser.state_dict()["state"]}

    def state(self) -> dict:
        """All that resuming needs, after an update. Raises RunError where training diverged."""
        losses, tensors = self.noted(), self.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors_in(tensors)):  # one by one: devices may differ
            raise self.diverged("a weight", self.update)
        plain = {"stage": self.name, "update": self.update, "best": self.best, "losses": losses}
        return plain | tensors | {"log_bytes": self.run.log_bytes()}

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint of this stage; from the beginning where it is another's.

        Raises RunError where it does not fit. Empties `state`, whose tensors are still in the file.
        """
        if state.get("stage") != self.name:
            return
        tensors = self.tensors()
        plain = {name: value for name, value in state.items() if name not in tensors}
        checks = {"update": whole(0, self.total), "best": real(0, math.inf), "losses": is_series}
        try:
            check_fields(plain, checks | {"stage": text, "log_bytes": real(0, math.inf)})
            restore(tensors, {name: state.get(name) for name in tensors})
        except ValueError as error:
            raise RunError(f"{self.run.checkpoint_path} cannot be used: {error}; choose another --run") from None
        self.update, self.best = state["update"], state["best"]
        device = next(self.networks["model"].parameters()).device
        for name, values in state["losses"].items():
            self.losses[name] = list(torch.tensor(values, dtype=torch.float32, device=device))
        state.clear()

    def updates(self) -> Iterator[int]:
        """The updates still to do, counted from 1; between them checkpoints, and the stop if one was asked for."""
        self.writer = tensorboard(self.run.path / "tensorboard" / self.name, self.update)
        self.bar = tqdm(total=self.total, initial=self.update, desc=self.name, unit="update", disable=None)
        self.started, self.start = time.monotonic(), self.update
        seconds = math.inf  # the first one may take long
        with ExitStack() as closing:
            closing.callback(self.bar.close)
            if self.writer:
                closing.callback(close_tensorboard, self.writer)
            signals = self.run.signals
            signals.hold()
            while self.update < self.total:
                # A signal waits for an update's end, or leaves a long one: what was before it is then saved.
                long = seconds > LONG_SECONDS or self.at_share(EVALUATIONS, self.update + 1)
                self.run.unsaved = deepcopy(self.state()) if long else None
                self.update += 1
                seed_update(self.seed, self.name, self.update)
                began = time.monotonic()
                if long:
                    signals.release()
                yield self.update
                signals.hold()
                seconds = time.monotonic() - began
                self.bar.update()
                stop = signals.received
                if stop or self.checkpoint_due():
                    self.checkpoint()
                if stop:
                    break
            signals.release()

    def step(self, losses: Iterable[Tensor]) -> Tensor:
        """One step down the gradient of the sum of losses, which it gives; a longer gradient is cut to MAX_NORM.

        The rate rises over 50 updates, then falls to 0 along a cosine.
        """
        rise = min(1.0, self.update / 50)
        fall = 0.5 + 0.5 * math.cos(math.pi * (self.update - 1) / self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * rise * fall
        self.optimiser.zero_grad()
        total = 0.0
        for loss in losses:
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(self.networks["model"].parameters(), MAX_NORM)
        self.optimiser.step()
        if self.average:
            self.average.follow(self.update)
        return total

    def keep_best(self, loss: float, network: nn.Module) -> None:
        """Write the weights of the lowest validation loss so far."""
        if loss < self.best:
            self.best = loss
            save_weights(self.run.path / f"{self.name}.safetensors", network)

    def note(self, **losses: Tensor) -> None:
        """Keep training losses, and log their means now and then. A GPU is not waited for in between."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss.detach())
        if self.at_share(LOG_LINES):
            self.log("train", {name: sum(values) / len(values) for name, values in self.noted().items()})
            self.losses = {}

    def noted(self) -> dict[str, list[float]]:
        """The training losses since the last log line. Raises RunError naming the first that is not finite."""
        losses = {name: torch.stack(values).tolist() for name, values in self.losses.items()}
        for name, values in losses.items():
            for update, loss in enumerate(values, self.update - len(values) + 1):
                if not math.isfinite(loss):
                    raise self.diverged(f"the {name}", update)
        return losses

    def diverged(self, what: str, update: int) -> RunError:
        """What to say where training diverged, and what to try."""
        return RunError(
            f"{self.name} update {update}: {what} is not finite, most likely because the preset's learning rate, "
            f"{self.learning_rate:g}, is too high for these batches: try a larger --batch-size, or lower it in "
            "train.py's PRESETS; the checkpoint before is kept"
        )

    def at_share(self, times: int, update: int | None = None) -> bool:
        """Whether an update, this one if none is given, is one of `times` evenly spread, the last among them."""
        update = self.update if update is None else update
        return update * times // self.total > (update - 1) * times // self.total

    def log(self, split: str, values: dict[str, float]) -> None:
        """To metrics.jsonl, TensorBoard, and for validation the terminal. Raises RunError where training diverged."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(f"the {name} in {'training' if split == 'train' else 'validation'}", self.update)
        self.run.log(self.name, split, self.update, values)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{self.name}/{split}/{name}", value, self.update)
        if split == "validate":
            rate = (self.update - self.start) / (time.monotonic() - self.started)
            left = int((self.total - self.update) / rate)
            figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            speed = f"{rate:.2f} updates/s  {left // 60}:{left % 60:02d} left"
            self.bar.write(f"{self.name} {self.update}/{self.total}  {figures}  {speed}")
            if "codes_used" in values:
                self.warn_of_collapse()

    def warn_of_collapse(self) -> None:
        """Say so once where hardly any codes have been used for long."""
        share, long = COLLAPSED
        updates, used = self.run.curves(self.name)["validate", "codes_used"]
        few = [update for update, _ in takewhile(lambda line: line[1] < share, zip(updates[::-1], used[::-1]))]
        if len(few) > 1 and few[0] - few[-1] >= long > few[1] - few[-1]:
            self.bar.write(
                f"warning: under {share:.0%} of the codes were used since update {few[-1]}, the codebook collapses: "
                "try a larger --batch-size or another --seed, or fewer codes in train.py's PRESETS"
            )

    def checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint: after the last update always."""
        if self.update == self.total:
            return True
        return self.update % self.checkpoint_every == 0 if self.checkpoint_every else self.clock.due()

    def checkpoint(self) -> None:
        """Write all that resuming needs."""
        self.run.save(**self.state())
        if self.writer:
            with writing(self.run.path / "tensorboard"):
                self.writer.flush()


class Feed:
    """The training slices of each update, mirrored and varied at random, and their positions.

    On a GPU their pixels lie in its memory, where they leave half of it free, and a batch is one gather there; else the
    host gathers them. It never waits for the GPU. Whether they fit is decided once for all stages.
    """

    def __init__(self, data: Dataset, options, device: torch.device):
        self.train, self.batch_size, self.seed = data.train, options.batch_size, options.seed
        self.device, self.left_right = device, left_right_axis(data.affine)
        self.positions = torch.from_numpy(data.train.positions).to(device)
        resident = device.type == "cuda" and data.train.pixels.nbytes < free_memory(device) / 2
        self.pixels = to_device(data.train.pixels, device) if resident else None

    def __call__(self, update: int, share: int = 1, augmentation: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Of a `share`-th of a batch: slices (N, 1, H, W), positions (N,) and how the slices were varied
        (N, VARIATIONS), on the device."""
        chosen = batch_indices(len(self.train), -(-self.batch_size // share), self.seed, update - 1)
        indices = self.send(torch.from_numpy(chosen))
        pixels = self.send(torch.from_numpy(self.train.pixels[chosen])) if self.pixels is None else self.pixels[indices]
        variation = augmentation * torch.randn(len(chosen), VARIATIONS, device=self.device)
        slices = mirror(to_float(pixels), self.left_right)
        if augmentation:
            slices = vary(slices, variation)
        return slices.contiguous(memory_format=torch.channels_last), self.positions[indices], variation

    def send(self, values: Tensor) -> Tensor:
        """Values on the device. From pinned memory, since the host waits until any other has been copied."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may still fill: PyTorch keeps what was freed for itself."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (N, H, W), which may be mapped from a file, on a device. The host holds a part at a time."""
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), COPIED_SLICES):
        part = pixels[start : start + COPIED_SLICES]
        there[start : start + len(part)] = torch.from_numpy(np.array(part))  # copied: mapped memory is read-only
    return there


def train_vqvae(run: Run, state: dict, data: Dataset, options, preset: Preset, feed: Feed) -> None:
    """Stage 1: the VQ-VAE, its best weights to vqvae.safetensors."""
    device = feed.device
    seed_update(options.seed, "vqvae", 0)
    model = VQVAE(preset.vqvae).to(device, memory_format=torch.channels_last)
    stage = Stage(run, "vqvae", model, options.updates, preset.learning_rate, options)
    stage.resume(state)
    # The encoder first learns without codes; they then start where its vectors are, and nearly all stay in use.
    warm_up = min(100, options.updates // 6)
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        if update == warm_up + 1:
            model.codebook.fit(encoder_vectors(model, data.train, options, device))
        slices, _, _ = feed(update)  # not varied: interpolation smooths, which made SSIM lower
        with autocast(device):
            reconstructions, embedding_loss, _ = model(slices, quantise=update > warm_up)
        reconstruction_loss = F.mse_loss(reconstructions, slices)
        total_loss = reconstruction_loss + embedding_loss
        stage.step([total_loss])
        stage.note(reconstruction_loss=reconstruction_loss, embedding_loss=embedding_loss, total_loss=total_loss)

        # At even intervals and after the last update: validation; figures not more often than once a minute.
        if update > warm_up and stage.at_share(EVALUATIONS):
            values, counts = evaluate_vqvae(model, data.validate, options.batch_size, device)
            stage.log("validate", values)
            stage.keep_best(values["reconstruction_loss"], model)
            if figures_due.due() or update == options.updates:
                write_vqvae_figures(run, model, data.validate, counts, options.images, device)


def in_parts(loss_of: Callable[..., Tensor], codes: Tensor, *others: Tensor) -> Iterator[Tensor]:
    """What adds up to the loss of a batch: loss_of(codes, *others), a mean over slices, of its parts, each weighted.

    codes (N, h, w), others (N, ...). On a CPU a part has some PART_CODES codes, so that what is kept for its gradient
    stays in the caches.
    """
    size = len(codes) if codes.is_cuda else max(1, PART_CODES // codes[0].numel())
    for part in zip(*(of.split(size) for of in (codes, *others))):
        with autocast(codes.device):
            loss = loss_of(*part) * (len(part[0]) / len(codes))
        yield loss


def mirror(slices: Tensor, axis: int | None) -> Tensor:
    """Slices (N, 1, H, W), each mirrored along the axis by the toss of a coin: a mirrored pelvis is one too."""
    if axis is None:
        return slices
    heads = torch.rand(len(slices), 1, 1, 1, device=slices.device) < 0.5
    return torch.where(heads, slices.flip(axis), slices)


def describe_mirroring(affine: np.ndarray) -> str:
    """Along which axis slices are mirrored, for a user who knows whether it is the right one."""
    axis = left_right_axis(affine)
    if axis is None:
        return "no slice is mirrored: by their headers neither axis runs left-right"
    return f"half of the training slices are mirrored, along their {('first', 'second')[axis - 2]} axis: left-right"


def vary(slices: Tensor, variation: Tensor) -> Tensor:
    """Slices (N, 1, H, W), each turned, stretched, shifted and changed in contrast a little, as patients differ.

    variation: (N, 6), of which 1 stands for 3.4 degrees, 5 % along either axis, 1.5 % of either side, and 15 % of the
    exponent (gamma) of brightness in [0, 1]. What comes in from outside is the mirror image of what lies at the edge:
    tissue where the slice ends within the body, so that samples do not take over black borders.
    """
    height, width = slices.shape[2:]
    angle = 0.06 * variation[:, 0]
    stretch = (0.05 * variation[:, 1:3]).exp()
    shift = 0.03 * variation[:, 3:5]  # grid_sample's coordinates: a side is 2 long
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([cos * stretch[:, 0], -sin * stretch[:, 0] * height / width, shift[:, 0]], 1)
    along = torch.stack([sin * stretch[:, 1] * width / height, cos * stretch[:, 1], shift[:, 1]], 1)
    places = F.affine_grid(torch.stack([across, along], 1), list(slices.shape), align_corners=False)
    brightness = F.grid_sample((slices + 1) / 2, places, padding_mode="reflection", align_corners=False).clamp(0, 1)
    gamma = (0.15 * variation[:, 5]).exp()[:, None, None, None]
    return 2 * brightness**gamma - 1


def drawn_batches(train: Slices, count: int, options, device: torch.device) -> Iterator[Tensor]:
    """`count` training slices drawn at random, in batches (n, 1, H, W) of at most the batch size, on the device."""
    chosen = batch_indices(len(train), count, options.seed, 0)
    for part in np.array_split(chosen, -(-count // options.batch_size)):
        yield train.batch(part).to(device, memory_format=torch.channels_last)


@torch.no_grad()
def encoder_vectors(model: VQVAE, train: Slices, options, device: torch.device) -> Tensor:
    """Vectors (65536 at most, D) of training slices drawn at random, for k-means."""
    vectors = []
    for batch in drawn_batches(train, KMEANS_SLICES, options, device):
        with autocast(device):
            z = model.vectors(batch)
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
    counts = torch.zeros(model.config.codes, dtype=torch.int64, device=device)
    sums = np.zeros(2)
    for batch in slices.batches(batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        with autocast(device):
            reconstructions, embedding_loss, codes = model(batch)
        sums += len(batch) * np.array([F.mse_loss(reconstructions, batch).item(), embedding_loss.item()])
        counts += code_counts(codes, model.config.codes)
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
    chosen = spread(len(slices))
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


def train_prior(run: Run, state: dict, vqvae: VQVAE, data: Dataset, options, preset: Preset, feed: Feed) -> None:
    """Stage 2: the prior on the codes of the training slices, its best weights to prior.safetensors."""
    device = feed.device
    validation_codes = extract_codes(vqvae, data.validate, options.batch_size, device)
    validation_positions = torch.from_numpy(data.validate.positions).to(device)
    seed_update(options.seed, "prior", 0)
    config = replace(preset.prior, grid=tuple(validation_codes.shape[1:]), codes=vqvae.config.codes)
    model = GatedPixelCNN(config).to(device, memory_format=torch.channels_last)
    model.know_codes(vqvae.codebook.embeddings)
    stage = Stage(run, "prior", model, options.prior_updates, preset.prior_learning_rate, options, averaged=True)
    averaged = stage.average.network
    stage.resume(state)
    stage.checkpoint()  # from here on stage 1 need not be looked at again
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        slices, positions, variation = feed(update, SHARE, options.augmentation)
        with autocast(device):
            codes = vqvae.encode(slices)  # anew for each update: a mirrored slice has other codes
        loss = stage.step(in_parts(model.nats, codes, positions, variation))
        stage.note(**in_bits(loss))

        # At even intervals and after the last update: validation of the averaged weights; the best so far are kept.
        if stage.at_share(EVALUATIONS):
            nats = evaluate_prior(averaged, validation_codes, validation_positions, options.batch_size)
            stage.log("validate", in_bits(nats))
            stage.keep_best(nats, averaged)
            if figures_due.due() or update == options.prior_updates:
                prior_loss_figure(options.images / "prior_loss.png", run.curves("prior"), config.codes)
    warn_of_ignorance(stage.best, validation_codes, config.codes)


def warn_of_ignorance(nats: float, codes: Tensor, size: int) -> None:
    """Say so where a prior has learned no more of codes (N, h, w) of K = `size` than how often each is used."""
    _, perplexity = codebook_use(code_counts(codes, size))
    if codes.numel() > 4 * size and nats > LEARNED * math.log(perplexity):
        say(
            f"warning: the prior has learned hardly more than how often each code is used ({nats:.2f} nats a code): "
            "samples will be noise; try more --prior-updates, or a lower rate in train.py's PRESETS"
        )


def describe_positions(positions: np.ndarray) -> dict:
    """What sampling needs of the training slices' positions: 101 quantiles, and the share that is not known."""
    known = positions[np.isfinite(positions)]
    quantiles = np.quantile(known, np.linspace(0, 1, 101)).tolist() if len(known) else []
    return {"quantiles": quantiles, "unknown": 1 - len(known) / len(positions)}


def in_bits(nats: Tensor | float) -> dict[str, Tensor | float]:
    """A loss under both its names."""
    return {"nats_per_code": nats, "bits_per_code": nats / np.log(2)}


@torch.no_grad()
def evaluate_prior(model: GatedPixelCNN, codes: Tensor, positions: Tensor, batch_size: int) -> float:
    """Mean negative log-likelihood of codes (N, h, w) at positions (N,), in nats a code."""
    model.eval()
    total = 0.0
    for batch in zip(codes.split(batch_size), positions.split(batch_size)):
        total += sum(in_parts(model.nats, *batch)).item() * batch[0].numel()
    model.train()
    return total / codes.numel()


def train_detail(run: Run, state: dict, vqvae: VQVAE, data: Dataset, options, preset: Preset, feed: Feed) -> None:
    """Stage 3: the detail that decoded training slices lack, its best weights to detail.safetensors."""
    device = feed.device
    seed_update(options.seed, "detail", 0)
    given = vqvae.config
    config = replace(preset.detail, downsampling=given.downsampling, codes=given.codes, code_dim=given.code_dim)
    model = Detail(config).to(device, memory_format=torch.channels_last)
    if state.get("stage") != "detail":
        model.measure(*lossy_slices(vqvae, data.train, options, device))
    stage = Stage(run, "detail", model, options.detail_updates, preset.detail_learning_rate, options, averaged=True)
    averaged = stage.average.network
    stage.resume(state)
    stage.checkpoint()  # from here on stage 2 need not be looked at again
    figures_due = Clock(CHECKPOINT_SECONDS)

    for update in stage.updates():
        slices, _, _ = feed(update, SHARE)  # not varied: interpolated slices lack detail
        with autocast(device):
            codes = vqvae.encode(slices)
        loss = stage.step(in_parts(lambda part, of: model.loss(of, part, vqvae), codes, slices))
        stage.note(flow_loss=loss)

        # At even intervals and after the last update: validation of the averaged weights; the best so far are kept.
        if stage.at_share(EVALUATIONS):
            flow_loss = evaluate_detail(averaged, vqvae, data.validate, options, device)
            stage.log("validate", {"flow_loss": flow_loss})
            stage.keep_best(flow_loss, averaged)
            if figures_due.due() or update == options.detail_updates:
                write_detail_figures(run, averaged, vqvae, data.validate, options.images, device)


@torch.no_grad()
def lossy_slices(vqvae: VQVAE, train: Slices, options, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Training slices drawn at random, what they are decoded to (N, 1, H, W), and their codes (N, h, w)."""
    parts = []
    for batch in drawn_batches(train, SPREAD_SLICES, options, device):
        with autocast(device):
            codes = vqvae.encode(batch)
            parts.append((batch, vqvae.decode(codes), codes))
    return tuple(map(torch.cat, zip(*parts)))


@torch.no_grad()
def evaluate_detail(model: Detail, vqvae: VQVAE, slices: Slices, options, device: torch.device) -> float:
    """Mean loss over a split, for the same noise and times whenever it is called."""
    seed_update(options.seed, "detail validation", 0)
    total = 0.0
    for batch in slices.batches(options.batch_size):
        batch = batch.to(device, memory_format=torch.channels_last)
        with autocast(device):
            total += len(batch) * model.loss(batch, vqvae.encode(batch), vqvae).item()
    return total / len(slices)


def write_detail_figures(
    run: Run, model: Detail, vqvae: VQVAE, slices: Slices, images: Path, device: torch.device
) -> None:
    """The loss curve, and six slices spread over the split: as they are, decoded, and with detail drawn twice."""
    detail_loss_figure(images / "detail_loss.png", run.curves("detail"))
    chosen = spread(len(slices))
    batch = slices.batch(chosen).to(device)
    codes = vqvae.encode(batch)
    drawn = [model.sample(range(len(batch)), codes, vqvae, seed) for seed in (0, 1)]
    strips = dict(zip(("slice", "decoded", "with detail", "with other detail"), (batch, vqvae.decode(codes), *drawn)))
    titles = [caption(slices.names[i]) for i in chosen]
    detail_figure(images / "detail.png", {name: of[:, 0].cpu().numpy() for name, of in strips.items()}, titles)


def describe_run(options, data: Dataset) -> dict:
    """What config.json holds."""
    return {
        "format": FORMAT,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "slice_size": data.slice_size,
        "intensity": {"percentile": PERCENTILE, "scale": data.scale},
        "affine": data.affine.tolist(),
        "positions": describe_positions(data.train.positions),
        "fingerprint": data.fingerprint,
    }


def refuse_changed_data(run: Run, data: Dataset, allowed: bool) -> None:
    """Raise RunError, or say where it is allowed, how the data differ from those that the run began with."""
    if run.config["fingerprint"] == data.fingerprint:
        return
    before = run.files()
    changes = ", ".join(changed_files(before, data.files) if before else []) or "files or splits are others"
    if not allowed:
        raise RunError(
            f"the data changed since {run.path} began: {changes}; bring them back, choose another --run, "
            "or go on with --allow-changed-data"
        )
    say(f"warning: the data changed since {run.path} began: {changes}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python train.py`."""
    options = parse_options(arguments)
    preset = PRESETS[options.preset]
    device = pick_device(options.device)
    check_folder("--run", options.run)
    check_folder("--images", options.images)
    side = preset.vqvae.downsampling
    size = options.slice_size or (preset.phantom_size if options.data == "phantom" else None)
    with StopSignals():
        data = load_dataset(options.data, size, (side, side), options.seed)
        for notice in data.notices:
            say(notice)
        if min(data.slice_size) < SMALLEST_SIDE:
            raise DataError(f"slices of {data.slice_size} pixels are too small: a side has {SMALLEST_SIDE} at least")
        options.slice_size = data.slice_size
        with Run(options.run, describe_run(options, data), data.files) as run:
            refuse_changed_data(run, data, options.allow_changed_data)
            state = run.load()
            sizes = f"{len(data.train)} training, {len(data.validate)} validation and {len(data.test)} test slices"
            say(f"{sizes} of {data.slice_size[0]}x{data.slice_size[1]} on {device}; run directory {options.run}")
            say(describe_mirroring(data.affine))
            train_stages(run, state, data, options, preset, device)


def train_stages(run: Run, state: dict, data: Dataset, options, preset: Preset, device: torch.device) -> None:
    """The three stages, or what is left of them."""
    if state.get("stage") == "done":
        say(f"{options.run} is complete: nothing to do")
        return
    make_folder(options.images)
    feed = Feed(data, options, device)
    if state.get("stage", "vqvae") == "vqvae":
        train_vqvae(run, state, data, options, preset, feed)
    vqvae = load_weights(run.path / "vqvae.safetensors", VQVAE, VQVAEConfig)
    if vqvae.config != preset.vqvae:
        raise RunError(f"{run.path / 'vqvae.safetensors'} is not of this run: choose another --run")
    vqvae.to(device, memory_format=torch.channels_last)
    if state.get("stage") != "detail":
        train_prior(run, state, vqvae, data, options, preset, feed)
    train_detail(run, state, vqvae, data, options, preset, feed)
    run.save(stage="done")
    say(f"{options.run} is complete: figures in {options.images}; sample with: python predict.py --run {options.run}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError, OSError) as error:
        fail(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(f"out of memory, try a smaller --batch-size or other --device ({in_short(error)})")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
