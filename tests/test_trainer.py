"""trainer.py: optimiser, EMA weights, the training loop, stop signals, batches and augmentation."""

import io
import math
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm.std as tqdm_module
from tqdm import tqdm
from trainings import arguments, assert_same_run, at_updates, checkpoint_header, lines_of, same_weights, select, send

import checkpoints
import optimiser
import train
import trainer
from augmentation import augment
from config import TrainConfig
from console import RunError
from dataset import load_dataset
from modules import GatedPixelCNN, PriorConfig
from trainer import Progress, StopSignals


def make_trainer(layer, *losses, stage="prior", run=None, updates=400, learning_rate=0.5, with_ema=True):
    """A trainer of one layer. Each loss is a function of the layer and stands for one micro-batch."""

    class LayerTrainer(trainer.Trainer):
        objective = criterion = "loss"

        def compute_losses(self):
            for loss in losses:
                yield {"loss": loss(layer)}

    LayerTrainer.stage = stage
    loader = SimpleNamespace(device=torch.device("cpu"))
    return LayerTrainer(run, None, train.parse_options([]), loader, layer, updates, learning_rate, with_ema)


# ---------------------------------------------------------------- optimiser and EMA weights


def test_learning_rate_warms_up_and_decays_by_a_cosine_to_zero():
    made = make_trainer(torch.nn.Linear(1, 1), lambda layer: layer(torch.ones(1)).square().sum())
    rates = []
    for made.update in range(1, 401):
        made.train_update()
        rates.append(made.optimiser.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5 / 50)
    assert rates[24] == pytest.approx(0.25, rel=0.02)
    assert rates[200] == pytest.approx(0.25)
    assert 0 < rates[-1] < 1e-4
    assert np.argmax(rates) == 49
    assert (np.diff(rates[:50]) > 0).all()
    assert (np.diff(rates[49:]) < 0).all()


def test_ema_equals_a_recursion_and_forgets_the_first_weights():
    """From weights of 0 to weights of 1: the EMA agrees with a recursion by hand and is near 1 after 30 updates."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema = trainer.EMA(layer, 0.99)
    torch.nn.init.ones_(layer.weight)
    expected = 0.0
    for update in range(1, 2000):
        ema.step(update)
        expected += (1 - expected) * max(0.01, 9 / (9 + update))
        if update in (1, 5, 30, 1999):
            assert ema.network.weight.item() == pytest.approx(expected, abs=1e-5)
        if update == 30:
            assert expected > 0.9999
    assert layer.weight.item() == 1


@pytest.mark.parametrize("length, kept", [(0.5, 0.5), (1.0, 1.0), (1e4, 1.0)])
def test_gradient_clipping_uses_the_norm_over_all_weights(length, kept):
    """Adam's first moment is a tenth of the clipped gradient after one step; what is logged is the norm before."""
    layer = torch.nn.Linear(1, 1)
    micro_batches = [lambda layer: 0.6 * length * layer.weight.sum(), lambda layer: 0.8 * length * layer.bias.sum()]
    made = make_trainer(layer, *micro_batches)
    made.update = 1
    made.train_update()
    moments = [made.optimiser.state[weight]["exp_avg"].item() for weight in layer.parameters()]
    assert moments == pytest.approx([0.06 * kept, 0.08 * kept])
    assert made.losses["gradient_norm"][0].item() == pytest.approx(length)


def test_weight_decay_shrinks_weights_by_its_share_of_the_learning_rate():
    layer = torch.nn.Linear(1, 1)
    optimiser = trainer.make_optimiser(layer, TrainConfig(weight_decay=0.3))
    for group in optimiser.param_groups:
        group["lr"] = 0.01
    before = layer.weight.item()
    layer.weight.grad = torch.zeros(1, 1)
    optimiser.step()
    assert layer.weight.item() == pytest.approx(before * (1 - 0.003))


def test_ema_weights_are_kept_only_if_requested():
    layer = torch.nn.Linear(3, 1)
    made = make_trainer(layer, lambda layer: layer(torch.ones(3)).square().sum())
    expected = trainer.EMA(layer, 0.99)
    for made.update in range(1, 6):
        made.train_update()
        expected.step(made.update)
        assert same_weights(made.saved_model.state_dict(), expected.network.state_dict())
    assert not same_weights(made.saved_model.state_dict(), layer.state_dict())
    kinds = {name.partition(".")[0] for name in made.learned_tensors()}
    assert kinds == {"model", "ema", "optimiser"}
    plain = make_trainer(layer, with_ema=False)
    assert plain.saved_model is layer
    assert {name.partition(".")[0] for name in plain.learned_tensors()} == {"model", "optimiser"}


# ---------------------------------------------------------------- the loop: validations and checkpoints


def test_validations_are_evenly_spaced(options):
    train.main(arguments(**options | {"updates": 47, "prior_updates": 1, "refiner_updates": 2}))
    lines = lines_of(options["run"])
    updates = [line["update"] for line in select(lines, "vqvae", "validate")]
    warm_up = 47 // 6
    assert updates[0] <= warm_up + 5
    assert updates[-1] == 47
    assert set(np.diff(updates)) <= {4, 5}
    assert [line["update"] for line in select(lines, "prior", "validate")] == [1]
    assert [line["update"] for line in select(lines, "refiner", "validate")] == [1, 2]


def test_checkpoint_every_saves_after_that_many_updates(options, monkeypatch):
    saved = []
    real = checkpoints.Run.save_checkpoint

    def save_checkpoint(run, tensors, **header):
        saved.append((header["stage"], header.get("update", 0)))
        real(run, tensors, **header)

    monkeypatch.setattr(checkpoints.Run, "save_checkpoint", save_checkpoint)
    train.main(arguments(**options, checkpoint_every=5))
    expected = {"vqvae": (5, 10, 12), "prior": (5, 9), "refiner": (5, 6), "done": (0,)}
    assert saved == [(stage, update) for stage, updates in expected.items() for update in updates]


def test_checkpoint_interval_is_at_most_two_minutes_by_default():
    assert trainer.INTERVAL_SECONDS <= 120
    made = make_trainer(torch.nn.Linear(1, 1))
    made.update = 7
    assert not made.is_checkpoint_due()
    made.checkpoint_interval.last -= trainer.INTERVAL_SECONDS
    assert made.is_checkpoint_due()


@pytest.mark.parametrize(("place", "value"), [("weight", math.nan), ("moment", -math.inf)])
def test_non_finite_weights_or_adam_moments_are_never_saved(tmp_path, run_config, value, place):
    linear = torch.nn.Linear(2, 2)
    with checkpoints.Run(tmp_path / "run", run_config(), {}) as run:
        made = make_trainer(linear, stage="vqvae", run=run)
        made.update = 7
        with torch.no_grad():
            weight = linear.weight
            (weight if place == "weight" else made.optimiser.state[weight]["exp_avg_sq"])[0, 1] = value
        with pytest.raises(RunError, match="vqvae update 7: a weight is not finite"):
            made.save_checkpoint()
        assert not run.checkpoint_path.exists()


@pytest.mark.parametrize(("patience", "last"), [(0, 10), (1, 3), (3, 8)])
def test_a_stage_ends_when_patience_does(tmp_path, run_config, monkeypatch, patience, last):
    """The loss of the validation after each of ten updates is lowest at the fifth."""
    values = [5.0, 4.0, 4.5, 3.0, 1.0, *[2.0] * 5]
    monkeypatch.setattr(trainer, "save_weights", lambda path, network: None)

    def fit(run, checkpoint):
        made = make_trainer(torch.nn.Linear(1, 1), lambda layer: layer(torch.ones(1, 1)).mean(), run=run, updates=10)
        made.options = run.config.options
        made.validate = lambda: {"loss": values[made.update - 1]}
        made.draw_figures = lambda: None
        with StopSignals() as made.stop, Progress(made.options) as progress:
            made.fit(checkpoint, progress)
        return made

    with checkpoints.Run(tmp_path / "run", run_config(patience=patience), {}) as run:
        assert fit(run, None).update == last
        resumed = fit(run, run.load_checkpoint())
        assert (resumed.update, resumed.best) == (last, min(values[:last]))


# ---------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock.now)
    return clock


class Terminal(io.StringIO):
    """A terminal that remembers what it showed."""

    def isatty(self):
        return True

    def lines(self):
        return [line for line in self.getvalue().replace("\n", "\r").split("\r") if line.strip()]


UPDATES_OF_STAGES = {"updates": 100, "prior_updates": 300, "refiner_updates": 200, "batch_divisor": 4}


def progress_on(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    return Progress(TrainConfig(**UPDATES_OF_STAGES | options))


def test_time_left_is_that_of_all_stages(clock, monkeypatch):
    with progress_on(monkeypatch, io.StringIO()) as progress:
        assert progress.time_left() == "unknown"
        clock.now += 40
        progress.advance(20)  # two seconds each; an update of the prior takes 0.5 as long, one of the refiner 0.625
        assert progress.rate() == 0.5
        assert progress.time_left() == tqdm.format_interval(2 * (80 + 300 * 0.5 + 200 * 0.625))
        clock.now += 5
        progress.begin("prior", 0)
        clock.now += 100
        progress.advance(100)
        assert progress.time_left() == tqdm.format_interval(200 + 200 * 2.5 / 2)
        progress.begin("refiner", 0)
        clock.now += 30
        progress.advance(200)
        assert progress.time_left() == "00:00"


def test_a_resumed_run_is_timed_from_where_it_resumes(clock, monkeypatch):
    terminal = Terminal()
    with progress_on(monkeypatch, terminal) as progress:
        progress.bar.mininterval = 0  # seconds between drawings
        progress.begin("refiner", 150)
        clock.now += 10
        progress.advance(151)
    assert str(progress) == "refiner 151/200, time left 08:10"
    done = (100 + 300 * 0.5 + 151 * 0.625) / (100 + 300 * 0.5 + 200 * 0.625)
    assert f" {done:.0%} |" in terminal.lines()[-1]


def test_one_bar_runs_from_the_first_stage_to_the_last(clock, monkeypatch):
    terminal = Terminal()
    with progress_on(monkeypatch, terminal) as progress:
        progress.bar.mininterval = 0  # seconds between drawings
        for stage, updates in progress.updates.items():
            progress.begin(stage, 0)
            for update in range(1, updates + 1):
                clock.now += 1
                progress.advance(update)
    shares = [int(line.partition("%")[0].split()[-1]) for line in terminal.lines() if "%" in line]
    assert shares == sorted(shares) and shares[0] <= 1 and shares[-1] == 100
    assert "\x1b[3" not in terminal.getvalue()  # no colours
    *_, blank, end = terminal.getvalue().split("\r")
    assert not (blank + end).strip()  # the bar is removed


@pytest.mark.parametrize("columns", [20, 50, 200])
def test_the_bar_fits_the_terminal(clock, monkeypatch, columns):
    monkeypatch.setattr(tqdm_module, "_screen_shape_wrapper", lambda: lambda stream: (columns, 24))
    terminal = Terminal()
    with progress_on(monkeypatch, terminal) as progress:
        progress.bar.mininterval = 0  # seconds between drawings
        for update in range(1, 101):
            clock.now += 1
            progress.advance(update)
    widths = [len(line) for line in terminal.lines()]
    assert len(widths) > 5 and max(widths) <= columns


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_terminal_there_is_a_line_every_five_minutes(clock, monkeypatch, dumb):
    stream = Terminal() if dumb else io.StringIO()
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    with progress_on(monkeypatch, stream) as progress:
        for update in range(1, 101):
            clock.now += 10
            progress.advance(update)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "vqvae 30/100, time left 57:30"
    assert len(lines) == 3
    assert "\r" not in stream.getvalue()


# ---------------------------------------------------------------- the loop: stops


def test_a_stop_signal_waits_for_the_end_of_the_update(options, monkeypatch):
    monkeypatch.setattr(trainer, "VALIDATIONS", 2)
    train.main(arguments(**options | {"run": options["run"].with_name("unbroken")}))
    places = [("vqvae", 4), ("vqvae", 8), ("prior", 3), ("refiner", 2)]
    stops = dict(zip(places, map(send, (signal.SIGTERM, signal.SIGINT) * 2)))
    for place in list(stops):
        at_updates(monkeypatch, stops)
        with pytest.raises(SystemExit):
            train.main(arguments(**options))
        header = checkpoint_header(options["run"])
        assert (header.stage, header.update, header.validation_pending) == (*place, False)
    train.main(arguments(**options))
    assert_same_run(options["run"], options["run"].with_name("unbroken"))


@pytest.mark.parametrize(("stage", "update"), [("vqvae", 4), ("prior", 4), ("refiner", 6)])
def test_a_stop_signal_waits_for_the_end_of_a_validation_batch(options, monkeypatch, stage, update):
    """Validation stops after the second of four batches and is repeated on resuming, with the same result."""
    options["batch_size"] = 1
    train.main(arguments(**options | {"run": options["run"].with_name("unbroken")}))
    seen = []
    real = trainer.Trainer.until_stopped

    def until_stopped(self, batches):
        for number, batch in enumerate(real(self, batches), 1):
            if (self.stage, self.update) == (stage, update):
                seen.append(number)
                if number == 2:
                    send(signal.SIGTERM)()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "until_stopped", until_stopped)
        with pytest.raises(SystemExit):
            train.main(arguments(**options))
    assert seen == [1, 2]
    header = checkpoint_header(options["run"])
    assert (header.stage, header.update, header.validation_pending) == (stage, update, True)
    assert select(lines_of(options["run"]), stage, "validate")[-1]["update"] == update - 1
    train.main(arguments(**options))
    assert_same_run(options["run"], options["run"].with_name("unbroken"))


@pytest.mark.parametrize("place", [("vqvae", 4), ("prior", 9), ("refiner", 2)])
def test_a_second_sigterm_does_not_lose_the_checkpoint(options, monkeypatch, place):
    """torchrun and Slurm send SIGTERM twice: here twice in an update, and again as the checkpoint is written."""
    real = checkpoints.save_tensors

    def save_tensors(*given):
        send(signal.SIGTERM)()
        real(*given)

    def stop():
        monkeypatch.setattr(checkpoints, "save_tensors", save_tensors)
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    at_updates(monkeypatch, {place: stop})
    with pytest.raises(SystemExit) as status:
        train.main(arguments(**options))
    assert status.value.code == 143
    header = checkpoint_header(options["run"])
    assert (header.stage, header.update) == place


# ---------------------------------------------------------------- stop signals and intervals


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_exits_at_once_and_restores_the_handlers(kind, status):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, StopSignals():
        assert signal.getsignal(kind) not in before
        os.kill(os.getpid(), kind)
        pytest.fail("went on")
    assert stop.value.code == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_deferred_stop_signal_waits_for_the_next_check():
    done = []
    with pytest.raises(SystemExit) as exit_, StopSignals() as stop, stop.deferred():
        stop.check()  # nothing came
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("what may not be left half done")
        stop.check()
        pytest.fail("went on")
    assert exit_.value.code == 143
    assert done


def test_a_deferred_stop_signal_waits_no_longer_than_the_block():
    with pytest.raises(SystemExit), StopSignals() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


def test_handlers_are_restored_without_a_signal_and_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals() as stop, stop.deferred():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_two_signals_at_once_are_no_error():
    """Python runs both handlers one after the other, the second with the handlers that the first has installed."""
    with pytest.raises(SystemExit) as exit_, StopSignals() as stop, stop.deferred():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
    assert exit_.value.code in (143, 129)


def test_signals_that_are_ignored_stay_ignored():
    """As nohup requests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        stop.check()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_repeated_sigterm_is_ignored(first):
    """torchrun and Slurm send several to a process."""
    with pytest.raises(SystemExit) as exit_, StopSignals() as stop, stop.deferred():
        for kind in (first, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), kind)
    assert exit_.value.code == 128 + first


def test_an_interval_is_due_once_it_has_passed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("trainer.time.monotonic", lambda: now[0])
    interval = trainer.Interval(60)
    answers = []
    for now[0] in (100, 159, 160, 161, 219, 225, 284, 285):
        answers.append(interval.is_due())
    assert answers == [False, False, True, False, False, True, False, True]


# ---------------------------------------------------------------- batches


def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_batch(monkeypatch):
    """Five slices of 16 codes in micro-batches of 2, 2 and 1; without autocast, whose rounding would differ."""
    monkeypatch.setattr(trainer, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    shape = PriorConfig(grid=(4, 4), codebook_size=7, channels=8, dropout=0.0, code_noise=0.0, head_channels=8)
    prior = GatedPixelCNN(shape)
    codes, positions = torch.randint(7, (5, 4, 4)), torch.rand(5)
    whole = F.cross_entropy(prior(codes, positions), codes)
    expected = torch.autograd.grad(whole, list(prior.parameters()), allow_unused=True)
    for size, count in ((33, 3), (8, 5), (80, 1)):
        prior.zero_grad()
        losses = list(trainer.micro_batches(prior.nll, codes, positions, elements=size))
        assert len(losses) == count
        sum(losses).backward()
        assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)
        for weight, gradient in zip(prior.parameters(), expected):
            assert gradient is None or torch.allclose(weight.grad, gradient, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "on_gpu", "accumulate", "size"),
    [(8, False, 1, 4), (8, False, 3, 3), (2, False, 1, 2), (8, True, 1, 8), (7, True, 2, 4), (3, True, 5, 1)],
)
def test_a_gpu_takes_a_batch_at_once_unless_told_otherwise(count, on_gpu, accumulate, size):
    """On a CPU, micro-batches of 100 elements are four slices of 25."""
    first = SimpleNamespace(is_cuda=True) if on_gpu else torch.zeros(count, 5, 5)
    assert trainer.micro_batch_size(count, first, 100, accumulate) == size


def test_accumulation_changes_rounding_alone(options, monkeypatch):
    """Whole batches of five, two and two slices, and one slice at a time, in float32."""
    for place in (train, trainer, optimiser):
        monkeypatch.setattr(place, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    whole = options | {"run": options["run"].with_name("whole")}
    train.main(arguments(**whole))
    train.main(arguments(**options, accumulate=5))
    for line, expected in zip(lines_of(options["run"]), lines_of(whole["run"]), strict=True):
        for name, value in expected.items():
            assert line[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_slices_is_augmented(options, slices_folder, share):
    """The others are as they are, and their parameters are 0. 5 standard deviations of 12 slices in 40 batches."""
    given = train.parse_options(arguments(**options))
    loader = trainer.BatchLoader(load_dataset(str(slices_folder)).train, None, given, torch.device("cpu"))
    augmented, count = 0, 0
    for update in range(1, 41):
        plain, _, _ = loader(update)
        slices, _, parameters = loader(update, augmentation=1.0, share=share)
        changed = (slices != plain).flatten(1).any(1)
        assert torch.equal(changed, (parameters != 0).all(1))
        assert torch.equal(changed, (parameters != 0).any(1))
        augmented, count = augmented + int(changed.sum()), count + len(changed)
    assert abs(augmented / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_strength_of_augmentation_scales_slices_not_parameters(options, slices_folder, strength):
    """What networks are told has the same range at any strength: large inputs made trainings diverge."""
    given = train.parse_options(arguments(**options))
    loader = trainer.BatchLoader(load_dataset(str(slices_folder)).train, None, given, torch.device("cpu"))
    for update in range(1, 4):
        plain, *_ = loader(update)
        torch.manual_seed(update)
        slices, _, parameters = loader(update, augmentation=strength)
        torch.manual_seed(update)
        assert torch.equal(loader(update, augmentation=1.0)[2], parameters)
        torch.testing.assert_close(slices, augment(plain, strength * parameters))
    assert 0.5 < parameters.std() < 1.5


def test_batches_from_device_memory_equal_those_from_the_host(options, slices_folder, monkeypatch):
    """The code path of a GPU, on the CPU."""
    given = train.parse_options(arguments(**options))
    loader = trainer.BatchLoader(load_dataset(str(slices_folder)).train, 2, given, torch.device("cpu"))
    monkeypatch.setattr(trainer, "COPIED_SLICES", 5)  # of 12
    for update in (1, 2, 9):
        torch.manual_seed(update)
        slices, *others = loader(update, augmentation=1.0)
        loader.pixels = trainer.to_device(loader.train.pixels, loader.device)
        torch.manual_seed(update)
        resident, *others_again = loader(update, augmentation=1.0)
        loader.pixels = None
        assert torch.equal(slices, resident)
        assert all(map(torch.equal, others, others_again))
        assert slices.shape == (given.batch_size, 1, 64, 32)
