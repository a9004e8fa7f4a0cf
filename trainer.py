"""The training loop of all three networks: batches, updates, EMA, log, validation, checkpoints, stop signals."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from importlib import util
from itertools import accumulate
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from augmentation import augment, flip
from build import read_init
from checkpoints import Checkpoint, Run, check_tensors, save_weights
from config import TrainConfig
from console import RunError, say, write_line
from dataset import SPLIT_TITLES, Slices, batch_indices, batch_rows, to_float
from files import counted
from modules import AUGMENTATIONS, MICRO_BATCH_CODES, Share
from optimiser import Muon
from utils import autocast, seed_update, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")

VALIDATIONS = 10  # per stage
LOG_LINES = 250  # of the training losses, per stage
INTERVAL_SECONDS = 60  # between checkpoints, and between figures
LINE_SECONDS = 300  # between lines on the progress where there is no terminal
COPIED_SLICES = 4096  # at a time to a GPU's memory: 128 MB of 256x128


# ---------------------------------------------------------------- optimiser


def make_optimiser(network: nn.Module, options: TrainConfig) -> Muon:
    """Return the optimiser of any of the networks."""
    return Muon(network, (options.adam_beta1, options.adam_beta2), options.weight_decay)


def schedule(update: int, total: int, warmup: int) -> float:
    """Return the learning rate of an update as a share of its peak: linear warm-up, times a cosine decay to 0.

    Args:
        update: From 1 to `total`.
        total: Updates of the stage.
        warmup: Updates of the warm-up.
    """
    return min(1.0, update / warmup) * (0.5 + 0.5 * math.cos(math.pi * (update - 1) / total))


class EMA(Generic[Network]):
    """An exponential moving average of a network's weights, as a network of its own.

    The decay starts at 1/10 and rises to its final value, so that the first weights are soon forgotten.
    """

    def __init__(self, network: Network, decay: float):
        self.network, self.decay = deepcopy(network), decay
        # Listed once and updated by one kernel: otherwise the host of a GPU would be busy with each weight in turn.
        self.averages: list[Tensor] = list(self.network.parameters())
        self.weights: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def step(self, update: int) -> None:
        """Move the average towards the weights after an update, which is counted from 1."""
        decay = min(self.decay, update / (update + 9))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)


# ---------------------------------------------------------------- stop signals


class StopSignals:
    """Stop signals as SystemExit(128 + number): SIGINT (130), SIGTERM (143), and SIGHUP (129) of a terminal.

    It is raised at once or, within `deferred`, by the next `check`. After the first signal further ones are ignored,
    since torchrun and Slurm send several; but a second SIGINT goes to the previous handler, for a user who will not
    wait. Signals that the process was started to ignore, for instance by nohup, stay ignored.
    """

    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __enter__(self) -> "StopSignals":
        self.requested, self.is_deferred = 0, False
        self.poll = distributed.Poll()
        handled = [number for number in self.NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for other, handler in self.previous.items():
            # Not SIG_IGN: Python reports a signal that is already pending as ignored.
            signal.signal(other, handler if other == signal.SIGINT else lambda *_: None)
        if not self.is_deferred:
            self.check()

    def check(self) -> None:
        """Raise SystemExit if a signal has come."""
        if self.requested:
            raise SystemExit(128 + self.requested)

    def check_together(self) -> None:
        """Raise SystemExit if a signal has come.

        Of several processes, all raise it at the same call: the second one after a signal came to any of them.
        """
        if distributed.size() == 1:
            self.check()
        elif requested := self.poll.largest(self.requested):
            raise SystemExit(128 + requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait for the next `check`, at the latest for the end of the block."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        self.requested = max(distributed.gather(self.requested))
        self.check()


# ---------------------------------------------------------------- training loop


class Interval:
    """A timer that is due every so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time, and if so start the next interval."""
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


class Progress:
    """The progress of a run over all of its stages: a bar on a terminal, elsewhere a line from time to time.

    The time left follows from the speed of the present stage in this process. Later stages are not measured yet: they
    take what `COSTS` says of it.
    """

    COSTS = {"vqvae": 1.0, "prior": 2.0, "refiner": 2.5}  # of a slice, relative: about right for both presets on CPUs

    def __init__(self, options: TrainConfig):
        self.updates = {"vqvae": options.updates, "prior": options.prior_updates, "refiner": options.refiner_updates}
        self.costs = {stage: cost / options.batch_divisor for stage, cost in self.COSTS.items()} | {"vqvae": 1.0}
        work = [updates * self.costs[stage] for stage, updates in self.updates.items()]
        *starts, self.total = accumulate(work, initial=0.0)
        self.starts = dict(zip(self.updates, starts))
        self.begin("vqvae", 0)
        self.line_interval = Interval(LINE_SECONDS)

    def __enter__(self) -> "Progress":
        # A dumb terminal cannot go back to the start of a line. None shows a bar on any other.
        disable = True if os.environ.get("TERM") == "dumb" or not distributed.is_first() else None
        look = "{desc} {percentage:3.0f}% |{bar}|"
        self.bar = tqdm(total=self.total, miniters=0, bar_format=look, dynamic_ncols=True, leave=False, disable=disable)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def begin(self, stage: str, update: int) -> None:
        """Begin a stage, or resume it after an update."""
        self.stage, self.update = stage, update
        self.first, self.started = update, time.monotonic()

    def advance(self, update: int) -> None:
        """Count the updates of the present stage up to this one; draw the bar, or print a line if it is time."""
        self.update = update
        if not self.bar.disable:
            self.bar.set_description_str(str(self), refresh=False)
            self.bar.update(self.done() - self.bar.n)
        elif distributed.is_first() and self.line_interval.is_due():
            write_line(str(self), "stderr")

    def done(self) -> float:
        """Return what is done of `total`."""
        return self.starts[self.stage] + self.update * self.costs[self.stage]

    def rate(self) -> float:
        """Return the updates per second of the present stage in this process."""
        return (self.update - self.first) / max(time.monotonic() - self.started, 1e-9)

    def time_left(self) -> str:
        """Return how long the present stage and all later ones will take."""
        speed = self.rate() * self.costs[self.stage]
        return tqdm.format_interval((self.total - self.done()) / speed) if speed else "unknown"

    def __str__(self) -> str:
        return f"{self.stage} {self.update}/{self.updates[self.stage]}, time left {self.time_left()}"


class Trainer(Generic[Network]):
    """The training of one network. A recipe derives from it and says what its losses, validation and figures are.

    A stop signal takes effect after the current update or batch of validation, once a checkpoint is written. A resumed
    training continues bit for bit, since all randomness of an update follows from its number.

    Several processes hold the same weights and the same state: each computes its part of a batch, and gradients, losses
    and validations are those of all parts. Files are those of the first.

    Args:
        run: The run directory.
        stop: The stop signals.
        options: Of the training.
        loader: The batches.
        model: The network.
        updates: Their total number.
        learning_rate: At its peak.
        with_ema: Whether the network that is validated and saved is an EMA of the weights.
    """

    stage: str  # "vqvae", "prior" or "refiner": names weights, log lines and options
    objective: str  # the loss that is minimised, one of `compute_losses`
    criterion: str  # the value of `validate` at whose minimum the weights are kept
    first_validation = 1  # the first update that a validation may follow
    progress: Progress  # of the run
    fitted: Sequence[str] = ()  # tensors of the network that are not learned, but fitted to these data beforehand

    def __init__(
        self,
        run: Run,
        stop: StopSignals,
        options: TrainConfig,
        loader: "BatchLoader",
        model: Network,
        updates: int,
        learning_rate: float,
        with_ema: bool = True,
    ):
        self.run, self.stop, self.options, self.loader = run, stop, options, loader
        self.device, self.model, self.total, self.learning_rate = loader.device, model, updates, learning_rate
        self.optimiser = make_optimiser(model, options)
        self.ema = EMA(model, options.ema_decay) if with_ema else None
        self.saved_model = self.ema.network if self.ema else model
        self.batch_size = options.batch_size if self.stage == "vqvae" else options.small_batch_size
        self.update, self.best, self.validation_pending = 0, math.inf, False
        self.validations_since_best = 0
        self.losses: dict[str, list[Tensor]] = {}  # since the last log line
        self.checkpoint_interval, self.figure_interval = Interval(INTERVAL_SECONDS), Interval(INTERVAL_SECONDS)
        self.writer: SummaryWriter | None = None

    # What a recipe defines.

    def compute_losses(self) -> Iterator[dict[str, Tensor]]:
        """Yield the losses of this update's micro-batches, weighted so that their sum is the loss of the batch.

        Of several processes, each yields those of its part.
        """
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Return losses and metrics of the validation slices, whose batches `until_stopped` shares out."""
        raise NotImplementedError

    def pass_over(self, batch: Any) -> None:
        """Do what keeps random numbers the same in all processes, for a batch of validation that another one takes."""

    def draw_figures(self) -> None:
        """Write the figures of this stage."""
        raise NotImplementedError

    def warn(self, values: dict[str, float]) -> None:
        """Warn of what the values of a validation and those before show."""

    # The loop.

    def fit(self, checkpoint: Checkpoint | None, progress: Progress) -> None:
        """Train to the last update or until patience ends, from a checkpoint if it is of this stage.

        Args:
            checkpoint: Of the run, or None.
            progress: Of the run.

        Raises:
            SystemExit: A stop signal came; the checkpoint is written.
            RunError: The training diverged, the checkpoint does not fit, or a file cannot be written.
        """
        if checkpoint and checkpoint.header.stage == self.stage:
            self.restore(checkpoint)
        elif self.options.init:
            self.start_from(self.options.init)
        distributed.take_from_first(list(self.learned_tensors().values()))
        self.progress = progress
        progress.begin(self.stage, self.update)
        with self.tensorboard(), self.stop.deferred():
            try:
                if self.validation_pending:  # it was stopped within a validation
                    self.run_validation()
                while self.update < self.total and not self.is_out_of_patience():
                    self.update += 1
                    self.train_update()
                    progress.advance(self.update)
                    if self.is_due(LOG_LINES):
                        self.log_training()
                    if self.is_due(VALIDATIONS) and self.update >= self.first_validation:
                        self.run_validation()
                    if self.is_checkpoint_due():
                        self.save_checkpoint()
                    self.stop.check_together()
            except SystemExit:
                self.save_checkpoint()
                distributed.wait_for_all()  # torchrun soon kills all when one has ended
                raise
            self.save_checkpoint()
        if self.update < self.total:
            say(f"{self.stage} ends: no better {self.criterion} in {counted(self.options.patience, 'validation')}")

    def train_update(self) -> None:
        """Make one update: losses in micro-batches, gradient clipping, an optimiser step, the EMA."""
        seed_update(self.options.seed, self.stage, self.update)
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.current_rate()
        self.optimiser.zero_grad()
        sums: dict[str, Tensor] = {}
        for losses in self.compute_losses():
            losses[self.objective].backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach()
        if distributed.size() > 1:
            self.average_over_processes(sums)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.gradient_clip)
        self.optimiser.step()
        if self.ema:
            self.ema.step(self.update)
        for name, value in (sums | {"gradient_norm": norm}).items():
            self.losses.setdefault(name, []).append(value)  # tensors, so that the host does not wait for the GPU

    def average_over_processes(self, losses: dict[str, Tensor]) -> None:
        """Turn gradients and losses of this process's part into those of the whole batch."""
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        own = distributed.part(self.batch_size)
        distributed.average([*gradients, *losses.values()], (own.stop - own.start) / self.batch_size)

    def run_validation(self) -> None:
        """Validate, log, keep the best weights, and from time to time draw the figures."""
        checksum = distributed.checksum(self.learned_tensors().values())
        distributed.check_same("the weights", checksum, "let processors of one kind compute them")
        self.validation_pending = True
        values = self.validate()
        self.log("validate", values)
        self.validations_since_best += 1
        if values[self.criterion] < self.best:
            self.best, self.validations_since_best = values[self.criterion], 0
            if distributed.is_first():
                save_weights(self.run.path / f"{self.stage}.safetensors", self.saved_model)
        self.validation_pending = False
        if not distributed.is_first():
            return
        self.warn(values)
        if self.figure_interval.is_due() or self.update == self.total or self.is_out_of_patience():
            self.draw_figures()

    def is_out_of_patience(self) -> bool:
        """Return whether too many validations in a row were no better than the best."""
        return 0 < self.options.patience <= self.validations_since_best

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield this process's batches of validation until a stop signal comes, then raise SystemExit."""
        for number, batch in enumerate(batches):
            taker = number % distributed.size()
            if taker == 0:
                self.stop.check_together()
            if taker == distributed.rank():
                yield batch
            else:
                self.pass_over(batch)

    def validation_batches(self, slices: Slices) -> Iterator[Tensor]:
        """Yield the slices of a validation (n, 1, H, W) on the device, in batches that are `until_stopped`."""
        rows = self.until_stopped(batch_rows(len(slices), self.options.batch_size))
        return device_batches(map(slices.batch, rows), self.device)

    def own_noise(self, draw: Callable[[int], Iterable[Tensor]], first: Tensor, elements: int) -> list[Tensor]:
        """Return this process's part of the random numbers of a batch.

        They are drawn in the micro-batches of one process alone, whatever `--accumulate` says.

        Args:
            draw: Returns the random numbers (n, ...) of n slices.
            first: As `micro_batches` takes it.
            elements: As `micro_batches` takes it.
        """
        size = micro_batch_size(self.batch_size, first, elements)
        drawn = [draw(min(size, self.batch_size - start)) for start in range(0, self.batch_size, size)]
        return [torch.cat(parts)[distributed.part(self.batch_size)] for parts in zip(*drawn)]

    def current_rate(self) -> float:
        """Return the learning rate of this update."""
        return self.learning_rate * schedule(self.update, self.total, self.options.warmup_updates)

    def is_due(self, times: int) -> bool:
        """Return whether this update is one of `times` evenly spaced ones, the last of which is the last update."""
        return self.update * times // self.total > (self.update - 1) * times // self.total

    def is_checkpoint_due(self) -> bool:
        """Return whether it is time for a checkpoint; the last update has one anyway."""
        every = self.options.checkpoint_every
        return self.update % every == 0 if every else self.checkpoint_interval.is_due()

    # The log.

    @contextmanager
    def tensorboard(self) -> Iterator[None]:
        """Write to TensorBoard where that is installed."""
        if distributed.is_first():
            self.writer = open_tensorboard(self.run.path / "tensorboard" / self.stage, self.update)
        try:
            yield
        finally:
            if self.writer:
                with suppress(OSError):  # a full disk was reported before, and metrics.jsonl has the same values
                    self.writer.close()

    def read_losses(self) -> dict[str, list[float]]:
        """Return the training losses since the last log line. Raises RunError naming the first that is not finite."""
        losses = {name: torch.stack(values).tolist() for name, values in self.losses.items()}
        for name, values in losses.items():
            for update, loss in enumerate(values, self.update - len(values) + 1):
                if not math.isfinite(loss):
                    raise self.divergence_error(f"the {name}", update)
        return losses

    def log_training(self) -> None:
        """Log the mean training losses and gradient norm since the last line, and the learning rate."""
        means = {name: sum(values) / len(values) for name, values in self.read_losses().items()}
        self.log("train", means | {"learning_rate": self.current_rate()})
        self.losses = {}

    def log(self, split: str, values: dict[str, float]) -> None:
        """Write values to metrics.jsonl and TensorBoard; those of validation also to the terminal.

        Raises:
            RunError: A value is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                raise self.divergence_error(f"the {name} in {SPLIT_TITLES[split]}", self.update)
        self.run.log(self.stage, split, self.update, values)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{self.stage}/{split}/{name}", value, self.update)
        if split == "validate":
            self.report_validation(values)

    def report_validation(self, values: dict[str, float]) -> None:
        """Print the values of a validation, the speed of the stage and the time that is left of the run."""
        listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        speed = f"{self.progress.rate():.2f} updates/s  time left {self.progress.time_left()}"
        say(f"{self.stage} {self.update}/{self.total}  {listed}  {speed}")

    def divergence_error(self, what: str, update: int) -> RunError:
        """Return the error for a value that is not finite."""
        option = "--learning-rate" if self.stage == "vqvae" else f"--{self.stage}-learning-rate"
        return RunError(
            f"{self.stage} update {update}: {what} is not finite, most likely because the learning rate, "
            f"{self.learning_rate:g}, is too high for these batches: try a larger --batch-size or a lower {option}; "
            "the last checkpoint is kept"
        )

    # Checkpoints.

    def learned_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that an update changes, by name: weights, their EMA, and the optimiser's moments."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.network.state_dict().items()}
        for name, weight in self.model.named_parameters():
            tensors |= {f"optimiser.{name}.{key}": value for key, value in self.optimiser.state[weight].items()}
        return tensors

    def save_checkpoint(self) -> None:
        """Write all that resuming needs. Raises RunError if the training diverged."""
        losses = self.read_losses()
        tensors = {name: tensor.cpu() for name, tensor in self.learned_tensors().items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise self.divergence_error("a weight", self.update)
        if losses:
            tensors["losses"] = torch.tensor(list(losses.values()))
        self.run.save_checkpoint(
            tensors,
            stage=self.stage,
            update=self.update,
            best=self.best if math.isfinite(self.best) else None,
            validation_pending=self.validation_pending,
            validations_since_best=self.validations_since_best,
            losses=list(losses),
        )
        if self.writer:
            with writing(self.run.path / "tensorboard"):
                self.writer.flush()

    def start_from(self, run: Path) -> None:
        """Take the weights of another run. Raises RunError if they do not fit."""
        given = distributed.from_first(lambda: read_init(run, self.stage, self.model))
        given |= {name: self.model.state_dict()[name].clone() for name in self.fitted}
        self.model.load_state_dict(given)
        self.saved_model.load_state_dict(given)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this stage. Raises RunError if it does not fit."""
        header, learned = checkpoint.header, self.learned_tensors()
        tensors = dict(checkpoint.tensors)
        losses = tensors.pop("losses", torch.zeros(0, 0))
        try:
            if header.update > self.total:
                raise ValueError(f"its update {header.update} is after the last, {self.total}")
            if losses.dtype != torch.float32 or losses.ndim != 2 or len(losses) != len(header.losses):
                raise ValueError("its losses are not those that its header names")
            if not losses.isfinite().all():
                raise ValueError("its losses are not finite")
            check_tensors(learned, tensors)
        except ValueError as error:
            raise RunError(f"{self.run.checkpoint_path} cannot be used: {error}; choose another --run") from None
        for name, tensor in learned.items():
            tensor.copy_(tensors[name])
        self.losses = {name: list(values) for name, values in zip(header.losses, losses.to(self.device))}
        self.update, self.validation_pending = header.update, header.validation_pending
        self.best = math.inf if header.best is None else header.best
        self.validations_since_best = header.validations_since_best


def open_tensorboard(path: Path, update: int) -> "SummaryWriter | None":
    """Return a TensorBoard writer that continues after an update.

    None if tensorboard is not installed, or if the path is not UTF-8, which tensorboard needs.
    """
    if util.find_spec("tensorboard") is None or not str(path).isprintable():
        return None
    from torch.utils.tensorboard import SummaryWriter  # costs a second; needed by train.py alone

    # Flushed with each checkpoint instead: a full disk is then an error here, not in a thread of its own.
    return SummaryWriter(path, purge_step=update + 1, flush_secs=10**9)


# ---------------------------------------------------------------- batches


class BatchLoader:
    """The training slices of each update, flipped and augmented at random, and their positions.

    Of several processes, each gets its part. Random numbers are drawn for the whole batch.

    On a GPU, pixels that fill less than half of its free memory are kept there, and a batch is one gather; otherwise
    the host gathers it. The host never waits for the GPU. Whether they fit is decided once for all stages.
    """

    def __init__(self, train: Slices, left_right: int | None, options: TrainConfig, device: torch.device):
        self.train, self.left_right, self.device = train, left_right, device
        self.batch_size, self.seed = options.batch_size, options.seed
        if options.small_batch_size < distributed.size():
            raise RunError(
                f"updates of {options.small_batch_size} slices are too small for {distributed.size()} processes: start "
                "fewer, or choose a larger --batch-size or a smaller --batch-divisor"
            )
        self.positions = torch.from_numpy(train.positions).to(device)
        resident = device.type == "cuda" and train.pixels.nbytes < free_memory(device) / 2
        self.pixels = to_device(train.pixels, device) if resident else None

    def __call__(
        self, update: int, size: int | None = None, augmentation: float = 0.0, share: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch of an update, on the device.

        Args:
            update: Counted from 1.
            size: Slices of the batch; None for --batch-size.
            augmentation: Strength; 0 is none.
            share: Of the slices that are augmented, drawn at random.

        Returns:
            Slices (N, 1, H, W) in [-1, 1], positions (N,) and augmentation parameters (N, AUGMENTATIONS), relative to
            the strength: of variance 1, or 0 where a slice is not augmented.
        """
        whole = batch_indices(len(self.train), size or self.batch_size, self.seed, update - 1)
        own = distributed.part(len(whole))
        chosen = whole[own]
        indices = self.send(torch.from_numpy(chosen))
        pixels = self.send(torch.from_numpy(self.train.pixels[chosen])) if self.pixels is None else self.pixels[indices]
        slices = to_float(pixels)
        parameters = (augmentation > 0) * torch.randn(len(whole), AUGMENTATIONS, device=self.device)[own]
        if self.left_right is not None:
            slices = flip(slices, self.left_right, (torch.rand(len(whole), device=self.device) < 0.5)[own])
        if augmentation:
            augmented = (torch.rand(len(whole), 1, device=self.device) < share)[own]
            parameters = parameters * augmented
            slices = torch.where(augmented[..., None, None], augment(slices, augmentation * parameters), slices)
        return slices.contiguous(memory_format=torch.channels_last), self.positions[indices], parameters

    def send(self, values: Tensor) -> Tensor:
        """Copy to the device, from pinned memory, so that the host does not wait."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process may still fill, including those that PyTorch has cached."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Copy pixels (N, H, W), which may be mapped from a file, to a device in parts: the host holds one at a time."""
    copied = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(pixels), COPIED_SLICES):
        part = pixels[start : start + COPIED_SLICES]
        copied[start : start + len(part)] = torch.from_numpy(np.array(part))  # mapped memory is read-only
    return copied


def device_batches(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield batches of slices (N, 1, H, W) on a device, in the memory format of the networks."""
    for batch in batches:
        yield batch.to(device, memory_format=torch.channels_last)


def codebook_share(batch_size: int, codes: int) -> Share | None:
    """Return which latents of a batch this process has, at so many `codes` per slice; None if it has all."""
    if distributed.size() == 1:
        return None
    return Share(distributed.part(batch_size).start * codes, batch_size * codes, distributed.add_up)


def micro_batch_size(count: int, first: Tensor, elements: int, accumulate: int = 1) -> int:
    """Return the slices of each micro-batch of `count`; the other arguments are those of `micro_batches`."""
    most = -(-count // accumulate)
    return most if first.is_cuda else min(most, max(1, elements // first[0].numel()))


def micro_batches(
    loss_of: Callable[..., Tensor],
    first: Tensor,
    *others: Tensor,
    elements: int = MICRO_BATCH_CODES,
    accumulate: int = 1,
) -> Iterator[Tensor]:
    """Yield the losses of micro-batches, weighted so that their sum is the loss of the batch.

    On a CPU a micro-batch is so small that its activations stay in the caches.

    Args:
        loss_of: Maps the tensors to a mean over slices.
        first: Codes (N, h, w) or slices (N, 1, H, W).
        others: Tensors (N, ...), which are split likewise.
        elements: Codes or pixels of a micro-batch on a CPU.
        accumulate: A micro-batch has this fraction of the slices, rounded up, or fewer.
    """
    size = micro_batch_size(len(first), first, elements, accumulate)
    for micro_batch in zip(*(of.split(size) for of in (first, *others))):
        with autocast(first.device):
            loss = loss_of(*micro_batch) * (len(micro_batch[0]) / len(first))
        yield loss
