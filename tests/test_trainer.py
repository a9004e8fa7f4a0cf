"""trainer.py: optimiser, EMA weights, batches, augmentation, checkpoints and stop signals within a stage."""

import math
import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainings import arguments, assert_same_run, at_updates, lines_of, same_weights, select, send

import checkpoints
import train
import trainer
from dataset import load_dataset
from modules import GatedPixelCNN, PriorConfig
from utils import RunError

# ---------------------------------------------------------------- optimiser and EMA weights


def test_learning_rate_warms_up_and_decays_by_a_cosine_to_zero():
    weight = torch.nn.Linear(1, 1)
    stage = trainer.Stage(None, "vqvae", weight, 400, 0.5, train.parse_options([]))
    rates = []
    for stage.update in range(1, 401):
        stage.step([weight(torch.ones(1)).square().sum()])
        rates.append(stage.optimiser.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5 / 50)
    assert rates[24] == pytest.approx(0.25, rel=0.02)
    assert rates[200] == pytest.approx(0.25)
    assert 0 < rates[-1] < 1e-4
    assert np.argmax(rates) == 49
    assert (np.diff(rates[:50]) > 0).all()
    assert (np.diff(rates[49:]) < 0).all()


def test_ema_decay_grows_from_its_start():
    """From weights of 0 to weights of 1: the EMA agrees with a recursion by hand and is near 1 after 30 updates."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    average = trainer.EMA(layer, 0.99)
    torch.nn.init.ones_(layer.weight)
    expected = 0.0
    for update in range(1, 2000):
        average.follow(update)
        expected += (1 - expected) * max(0.01, 9 / (9 + update))
        if update in (1, 5, 30, 1999):
            assert average.network.weight.item() == pytest.approx(expected, abs=1e-5)
        if update == 30:
            assert expected > 0.9999
    assert layer.weight.item() == 1


@pytest.mark.parametrize("length, kept", [(0.5, 0.5), (1.0, 1.0), (1e4, 1.0)])
def test_gradient_clipping_uses_the_norm_over_all_weights(length, kept):
    """The norm is that of both gradients; Adam's first moment is a tenth of the clipped gradient after one step."""
    layer = torch.nn.Linear(1, 1)
    stage = trainer.Stage(None, "prior", layer, 400, 8e-3, train.parse_options([]))
    stage.update = 1
    stage.step([0.6 * length * layer.weight.sum(), 0.8 * length * layer.bias.sum()])  # of two parts of a batch
    moments = [stage.optimiser.state[weight]["exp_avg"].item() for weight in layer.parameters()]
    assert moments == pytest.approx([0.06 * kept, 0.08 * kept])


def test_a_stage_keeps_ema_weights_only_where_asked():
    layer = torch.nn.Linear(3, 1)
    options = train.parse_options([])
    stage = trainer.Stage(None, "refiner", layer, 400, 0.5, options, averaged=True)
    expected = trainer.EMA(layer, 0.99)
    for stage.update in range(1, 6):
        stage.step([layer(torch.ones(3)).square().sum()])
        expected.follow(stage.update)
        averaged = stage.networks["averaged"]
        assert same_weights(averaged.state_dict(), expected.network.state_dict())
    assert not same_weights(averaged.state_dict(), layer.state_dict())
    assert stage.tensors().keys() == {"model", "averaged", "optimiser"}
    assert trainer.Stage(None, "vqvae", layer, 400, 0.5, options).tensors().keys() == {"model", "optimiser"}


# ---------------------------------------------------------------- batches and augmentation


def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_batch(monkeypatch):
    """Five slices of 16 codes in micro-batches of 2, 2 and 1; without autocast, whose rounding would differ."""
    monkeypatch.setattr(trainer, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    prior = GatedPixelCNN(PriorConfig(grid=(4, 4), codebook_size=7, channels=8, dropout=0.0, head_channels=8))
    codes, positions = torch.randint(7, (5, 4, 4)), torch.rand(5)
    whole = F.cross_entropy(prior(codes, positions), codes)
    expected = torch.autograd.grad(whole, list(prior.parameters()), allow_unused=True)
    for size, count in ((33, 3), (8, 5), (80, 1)):
        monkeypatch.setattr(trainer, "MICRO_BATCH_CODES", size)
        prior.zero_grad()
        losses = list(trainer.micro_batches(prior.nll, codes, positions))
        assert len(losses) == count
        sum(losses).backward()
        assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)
        for weight, gradient in zip(prior.parameters(), expected):
            assert gradient is None or torch.allclose(weight.grad, gradient, atol=1e-6)


def test_random_flip_flips_about_half_of_the_slices():
    """200 tosses: outside 60 to 140 once in 1e8 seeds, and this one is fixed."""
    torch.manual_seed(0)
    slices = torch.arange(8.0).view(1, 1, 4, 2).repeat(200, 1, 1, 1)
    for axis in (2, 3):
        mirrored = trainer.random_flip(slices, axis)
        turned = (mirrored == slices.flip(axis)).flatten(1).all(1)
        kept = (mirrored == slices).flatten(1).all(1)
        assert (turned ^ kept).all()
        assert 60 < turned.sum() < 140
    assert torch.equal(trainer.random_flip(slices, None), slices)


def test_augmentation_changes_each_slice_a_little(slices_folder):
    torch.manual_seed(0)
    slices = load_dataset(str(slices_folder)).train.batch(range(12))
    varied = trainer.augment(slices, torch.randn(12, 6))
    assert varied.shape == slices.shape
    assert varied.min() >= -1
    assert varied.max() <= 1
    change = (varied - slices).square().mean((1, 2, 3))
    other = (slices.roll(4, 0) - slices).square().mean((1, 2, 3))  # another patient's
    assert (change > 0).all()
    assert change.mean() < other.mean()
    assert len(change.unique()) == 12
    torch.testing.assert_close(trainer.augment(slices, torch.zeros(12, 6)), slices)


def test_augmentation_pads_by_reflection():
    """Slices that end within the body have no black border afterwards."""
    torch.manual_seed(0)
    variation = 2 * torch.randn(50, 6)
    variation[:, 5] = 0  # contrast stays
    slices = torch.full((50, 1, 32, 16), -0.5)
    torch.testing.assert_close(trainer.augment(slices, variation), slices)
    columns = torch.linspace(-1, 1, 20).expand(1, 1, 8, 20)
    moved = trainer.augment(columns, torch.tensor([[0.0, 0, 0, 10, 0, 0]]))  # by 0.15 of the width, 3 columns
    expected = torch.cat([columns[..., 3:], columns[..., 17:].flip(3)], 3)  # a mirror image
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


def test_augmentation_strength_scales_displacements():
    """A bright dot off the centre: its displacement by rotation, shift and scaling is proportional to the strength."""
    slices = torch.full((400, 1, 32, 64), -1.0)
    slices[:, :, 16, 56] = 1

    def places(strength):
        torch.manual_seed(0)
        light = (trainer.augment(slices, strength * torch.randn(400, 6))[:, 0] + 1).double()
        light = light / light.sum((1, 2), keepdim=True)
        rows = (light.sum(2) * torch.arange(32)).sum(1)
        columns = (light.sum(1) * torch.arange(64)).sum(1)
        return rows, columns

    # A turn of 0.06 rad at 24 pixels is 1.4 rows, a shift 0.5 of 32 rows: 1.5 in all. A stretch of 5 % is 1.2 columns,
    # a shift 1 of 64: 1.6. Standard deviations of 400 draws lie within 15 % (four times their error of 3.5 %).
    rows, columns = places(1.0)
    assert abs(rows.std() / 1.52 - 1) < 0.15
    assert abs(columns.std() / 1.55 - 1) < 0.15
    weak_rows, weak_columns = places(0.25)
    assert abs(weak_rows.std() / rows.std() - 0.25) < 0.05
    assert abs(weak_columns.std() / columns.std() - 0.25) < 0.05


def test_batches_of_slices_held_on_the_device_are_the_same(options, slices_folder, monkeypatch):
    """The code path of a GPU, on the CPU."""
    given = train.parse_options(arguments(**options))
    feed = trainer.BatchLoader(load_dataset(str(slices_folder)), given, torch.device("cpu"))
    monkeypatch.setattr(trainer, "COPIED_SLICES", 5)  # of 12
    for update in (1, 2, 9):
        torch.manual_seed(update)
        slices, *told = feed(update, augmentation=1.0)
        feed.pixels = trainer.to_device(feed.train.pixels, feed.device)
        torch.manual_seed(update)
        resident, *told_again = feed(update, augmentation=1.0)
        feed.pixels = None
        assert torch.equal(slices, resident)
        assert all(map(torch.equal, told, told_again))
        assert slices.shape == (given.batch_size, 1, 64, 32)


# ---------------------------------------------------------------- checkpoints and validations


def test_validations_are_evenly_spaced(options):
    train.main(arguments(**options | {"updates": 47, "prior_updates": 1, "refiner_updates": 2}))
    lines = lines_of(options["run"])
    updates = [line["update"] for line in select(lines, "vqvae", "validate")]
    warm_up = 47 // 6
    assert updates[0] <= warm_up + 3
    assert updates[-1] == 47
    assert set(np.diff(updates)) <= {2, 3}
    assert [line["update"] for line in select(lines, "prior", "validate")] == [1]
    assert [line["update"] for line in select(lines, "refiner", "validate")] == [1, 2]


def test_checkpoint_every_saves_after_that_many_updates(options, monkeypatch):
    saved = []
    real = checkpoints.Run.save
    monkeypatch.setattr(checkpoints.Run, "save", lambda run, **state: (saved.append(state), real(run, **state)))
    train.main(arguments(**options, checkpoint_every=5))
    places = [(state["stage"], state.get("update")) for state in saved]
    expected = {"vqvae": (5, 10, 12), "prior": (0, 5, 9), "refiner": (0, 5, 6), "done": (None,)}
    assert places == [(stage, update) for stage, updates in expected.items() for update in updates]


def test_checkpoint_interval_is_at_most_two_minutes_by_default():
    assert trainer.CHECKPOINT_SECONDS <= 120
    stage = trainer.Stage(None, "vqvae", torch.nn.Linear(1, 1), 1000, 0.5, train.parse_options([]))
    stage.update = 7
    assert not stage.checkpoint_due()
    stage.clock.last -= trainer.CHECKPOINT_SECONDS
    assert stage.checkpoint_due()


@pytest.mark.parametrize(("place", "value"), [("weight", math.nan), ("moment", -math.inf)])
def test_non_finite_weights_or_adam_moments_are_never_saved(tmp_path, value, place):
    linear = torch.nn.Linear(2, 2)
    with checkpoints.Run(tmp_path / "run", {"options": {}}, {}) as run:
        stage = trainer.Stage(run, "vqvae", linear, 400, 0.5, train.parse_options([]))
        stage.update = 7
        with torch.no_grad():
            weight = linear.weight
            (weight if place == "weight" else stage.optimiser.state[weight]["exp_avg_sq"])[0, 1] = value
        with pytest.raises(RunError, match="vqvae update 7: a weight is not finite"):
            stage.checkpoint()
        assert not run.checkpoint_path.exists()


@pytest.mark.parametrize(
    ("used", "warned"),
    [
        ([0.05] * 11, [600]),
        ([0.05] * 5, []),
        ([0.05] * 5 + [0.2] + [0.05] * 6, [1200]),
        ([0.1] * 11, []),
        ([1.0] * 3 + [0.0] * 7, [900]),
    ],
)
def test_codebook_collapse_is_warned_of_once(tmp_path, monkeypatch, used, warned):
    """The share of codes in use, at validations every 100 updates."""
    said = []
    monkeypatch.setattr(trainer, "say", said.append)
    with checkpoints.Run(tmp_path / "run", {"options": {}}, {}) as run:
        stage = trainer.Stage(run, "vqvae", torch.nn.Linear(1, 1), 5000, 0.5, train.parse_options([]))
        stage.started, stage.start = 0, 0
        for number, share in enumerate(used, 1):
            stage.update = 100 * number
            stage.log("validate", {"codes_used": share})
            if "warning" in said[-1]:
                assert "try a larger --batch-size" in said[-1]
                said.append(stage.update)
    assert [update for update in said if isinstance(update, int)] == warned


# ---------------------------------------------------------------- stop signals


def test_a_stop_signal_waits_for_the_end_of_a_short_update(options, monkeypatch):
    monkeypatch.setattr(trainer, "EVALUATIONS", 2)
    train.main(arguments(**options | {"run": options["run"].with_name("unbroken")}))
    places = [("vqvae", 4), ("vqvae", 8), ("prior", 3), ("refiner", 2)]
    stops = dict(zip(places, map(send, (signal.SIGTERM, signal.SIGINT) * 2)))
    for place in list(stops):
        at_updates(monkeypatch, stops)
        with pytest.raises(SystemExit):
            train.main(arguments(**options))
        state = torch.load(options["run"] / "training.pt", weights_only=True)
        assert (state["stage"], state["update"]) == place
    train.main(arguments(**options))
    assert_same_run(options["run"], options["run"].with_name("unbroken"))


@pytest.mark.parametrize("place", [("vqvae", 4), ("prior", 9), ("refiner", 2)])
def test_a_second_sigterm_does_not_lose_the_checkpoint(options, monkeypatch, place):
    """torchrun and Slurm send SIGTERM twice: in an update, in a long one (the last), and during a save."""
    monkeypatch.setattr(trainer, "EVALUATIONS", 2)
    real = checkpoints.write_tensors

    def write_tensors(*given):
        send(signal.SIGTERM)()
        real(*given)

    def stop():
        monkeypatch.setattr(checkpoints, "write_tensors", write_tensors)
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()

    at_updates(monkeypatch, {place: stop})
    with pytest.raises(SystemExit) as status:
        train.main(arguments(**options))
    assert status.value.code == 143
    state = torch.load(options["run"] / "training.pt", weights_only=True)
    assert (state["stage"], state["update"]) == (place if place != ("prior", 9) else ("prior", 8))


def test_a_stop_signal_interrupts_a_long_validation(options, monkeypatch):
    monkeypatch.setattr(train, "evaluate_vqvae", lambda *_: time.sleep(60))
    threading.Timer(1, send(signal.SIGTERM)).start()
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(**options))
    assert time.monotonic() - start < 5
    assert stop.value.code == 143
    assert torch.load(options["run"] / "training.pt", weights_only=True)["update"] == 2


def test_a_stop_signal_interrupts_a_long_update(options, monkeypatch):
    """The first update is left in any case, a later one where the update before it took long."""
    monkeypatch.setattr(trainer, "EVALUATIONS", 1)
    monkeypatch.setattr(trainer, "LONG_SECONDS", 0.2)
    seconds = iter([0.0, 0.3, 60])
    at_updates(monkeypatch, {("vqvae", 3): lambda: threading.Timer(0.3, send(signal.SIGINT)).start()})
    real = train.F.mse_loss
    monkeypatch.setattr(train.F, "mse_loss", lambda *given: (time.sleep(next(seconds)), real(*given))[1])
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(**options))
    assert time.monotonic() - start < 5
    assert stop.value.code == 130
    assert torch.load(options["run"] / "training.pt", weights_only=True)["update"] == 2
