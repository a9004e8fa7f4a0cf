"""The training loop that the three recipes of train.py share: batches, updates, average, log, checkpoints, stops."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from importlib import util
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import Run, check_fields, is_series, real, restore, save_weights, tensors_in, text, whole
from config import TrainConfig
from dataset import Dataset, batch_indices, to_float
from modules import AUGMENTATIONS, MICRO_BATCH_CODES
from nifti import left_right_axis
from utils import Clock, RunError, autocast, say, seed_update, writing

EVALUATIONS = 20  # a stage
LOG_LINES = 250  # of the training losses, a stage
CHECKPOINT_SECONDS = 60
COPIED_SLICES = 4096  # at a time to a GPU's memory: 128 MB of 256x128
LONG_SECONDS = 1  # an update that takes longer is left on a signal: a checkpoint has to be written in five
COLLAPSED = (0.1, 500)  # share of codes used, and for how many updates


# ---------------------------------------------------------------- updates


def make_optimiser(network: nn.Module, options: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as all three networks are trained with: no weight decay, one fused kernel."""
    betas = options.adam_beta1, options.adam_beta2
    return torch.optim.AdamW(network.parameters(), betas=betas, weight_decay=0.0, fused=True)


def schedule(update: int, total: int, warmup: int) -> float:
    """The learning rate of an update, from 1 to total, as a share of its peak: linear warm-up, cosine decay to 0."""
    return min(1.0, update / warmup) * (0.5 + 0.5 * math.cos(math.pi * (update - 1) / total))


class EMA:
    """The moving average of a network's weights, a network itself. Its memory grows to some 100 updates."""

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = deepcopy(network), decay
        # Both listed once, and moved by one kernel: a GPU's host would else be busy with each weight in turn.
        self.weights = list(self.network.parameters()), list(network.parameters())

    @torch.no_grad()
    def follow(self, update: int) -> None:
        """One step of the average, after an update, counted from 1."""
        decay = min(self.decay, update / (update + 9))
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
        options: TrainConfig,
        averaged: bool = False,
    ):
        self.run, self.name, self.total, self.options = run, name, updates, options
        self.ema = EMA(model, options.ema_decay) if averaged else None
        self.networks = {"model": model}  # what a checkpoint holds the weights of
        if averaged:
            self.networks["averaged"] = self.ema.network
        self.optimiser = make_optimiser(model, options)
        for weight in model.parameters():  # as its first step would make them, so that a checkpoint has its place
            step = torch.zeros((), device=weight.device)
            moments = {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[weight] = {"step": step, **moments}
        self.learning_rate, self.update, self.best = learning_rate, 0, float("inf")
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
                seed_update(self.options.seed, self.name, self.update)
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
        """Take one step down the gradient of the sum of losses, clipped to a norm, and return that sum."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * schedule(self.update, self.total, self.options.warmup_updates)
        self.optimiser.zero_grad()
        total = 0.0
        for loss in losses:
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(self.networks["model"].parameters(), self.options.gradient_clip)
        self.optimiser.step()
        if self.ema:
            self.ema.follow(self.update)
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
            f"{self.name} update {update}: {what} is not finite, most likely because the learning rate, "
            f"{self.learning_rate:g}, is too high for these batches: try a larger --batch-size, or a lower rate "
            f"with --{'' if self.name == 'vqvae' else self.name + '-'}learning-rate; the checkpoint before is kept"
        )

    def validation_due(self) -> bool:
        """Whether this update is one of those, evenly spread, after which the networks are validated."""
        return self.at_share(EVALUATIONS)

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
            say(f"{self.name} {self.update}/{self.total}  {figures}  {speed}")
            if "codes_used" in values:
                self.warn_of_collapse()

    def warn_of_collapse(self) -> None:
        """Say so once where hardly any codes have been used for long."""
        share, long = COLLAPSED
        updates, used = self.run.curves(self.name)["validate", "codes_used"]
        few = [update for update, _ in takewhile(lambda line: line[1] < share, zip(updates[::-1], used[::-1]))]
        if len(few) > 1 and few[0] - few[-1] >= long > few[1] - few[-1]:
            say(
                f"warning: under {share:.0%} of the codes were used since update {few[-1]}, the codebook collapses: "
                "try a larger --batch-size or another --seed, or a smaller --codebook-size"
            )

    def checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint: after the last update always."""
        if self.update == self.total:
            return True
        every = self.options.checkpoint_every
        return self.update % every == 0 if every else self.clock.due()

    def checkpoint(self) -> None:
        """Write all that resuming needs."""
        self.run.save(**self.state())
        if self.writer:
            with writing(self.run.path / "tensorboard"):
                self.writer.flush()


def tensorboard(path: Path, update: int):
    """A TensorBoard writer that goes on at `update`, or None where tensorboard is not installed, or takes no such name:
    it wants UTF-8."""
    if util.find_spec("tensorboard") is None or not str(path).isprintable():
        return None
    from torch.utils.tensorboard import SummaryWriter  # costs a second; needed by train.py alone

    # Flushed with each checkpoint instead: a full disk is then an error here, not in a thread of its own.
    return SummaryWriter(path, purge_step=update + 1, flush_secs=10**9)


def close_tensorboard(writer) -> None:
    """Close it without a word: what it cannot write stands in metrics.jsonl too, and of a full disk it was told."""
    with suppress(OSError):
        writer.close()


# ---------------------------------------------------------------- batches


class BatchLoader:
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
        (N, AUGMENTATIONS), on the device."""
        chosen = batch_indices(len(self.train), -(-self.batch_size // share), self.seed, update - 1)
        indices = self.send(torch.from_numpy(chosen))
        pixels = self.send(torch.from_numpy(self.train.pixels[chosen])) if self.pixels is None else self.pixels[indices]
        variation = augmentation * torch.randn(len(chosen), AUGMENTATIONS, device=self.device)
        slices = random_flip(to_float(pixels), self.left_right)
        if augmentation:
            slices = augment(slices, variation)
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


def micro_batches(loss_of: Callable[..., Tensor], codes: Tensor, *others: Tensor) -> Iterator[Tensor]:
    """Yield the losses of micro-batches, weighted so that their sum is the loss of the batch.

    On a CPU a micro-batch has some MICRO_BATCH_CODES codes, so that its activations stay in the caches.

    Args:
        loss_of: Maps codes and others to a mean over slices.
        codes: (N, h, w).
        others: Tensors (N, ...), split alike.
    """
    size = len(codes) if codes.is_cuda else max(1, MICRO_BATCH_CODES // codes[0].numel())
    for part in zip(*(of.split(size) for of in (codes, *others))):
        with autocast(codes.device):
            loss = loss_of(*part) * (len(part[0]) / len(codes))
        yield loss


def random_flip(slices: Tensor, axis: int | None) -> Tensor:
    """Slices (N, 1, H, W), each mirrored along the axis by the toss of a coin: a mirrored pelvis is one too."""
    if axis is None:
        return slices
    heads = torch.rand(len(slices), 1, 1, 1, device=slices.device) < 0.5
    return torch.where(heads, slices.flip(axis), slices)


def augment(slices: Tensor, variation: Tensor) -> Tensor:
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
