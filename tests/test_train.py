"""train.py: complete trainings of a second each: what they write, stopping and resuming, and what they refuse."""

import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from broken_writes import half_done, on_writes
from conftest import VQVAE_TINY, make_quick, options_of
from matplotlib.image import imread
from safetensors.torch import load_file
from slice_files import write_volume
from tampering import judge_run, resume, tamper
from trainings import (
    UPDATES,
    WEIGHTS,
    arguments,
    assert_same_run,
    at_updates,
    checkpoint_header,
    lines_of,
    same_weights,
    select,
    send,
)

import checkpoints
import config
import evaluate
import phantom
import predict
import train
import trainer
import utils
from checkpoints import CheckpointHeader, load_tensors, load_weights, save_tensors
from console import RunError
from dataset import DataError, load_dataset
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import Refiner, RefinerConfig

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "hipmri_like"
FIGURES = {"vqvae_loss.png", "prior_loss.png", "refiner_loss.png"}
FIGURES |= {"codebook_usage.png", "reconstructions.png", "refinement.png"}
FILES = set(checkpoints.FILES)
OPTIMISATION = {"gradient_norm", "learning_rate"}
VQVAE_LOSSES = {"reconstruction_loss", "embedding_loss", "total_loss"}
VQVAE_METRICS = VQVAE_LOSSES | {"ssim", "psnr", "codes_used", "perplexity"}
PRIOR_LOSSES = {"nats_per_code", "bits_per_code"}
REFINER_LOSSES = {"flow_loss"}


# ---------------------------------------------------------------- what a training writes


def test_all_files_and_figures_are_written(trained):
    assert {path.name for path in trained.run.iterdir()} - {"tensorboard"} == FILES
    assert {path.name for path in trained.images.iterdir()} == FIGURES
    for name in FIGURES:
        height, width = imread(trained.images / name).shape[:2]
        assert min(height, width) > 200


def test_config_json_records_options_data_and_libraries(trained):
    config = json.loads((trained.run / "config.json").read_text())
    data = load_dataset(str(trained.data), None, (4, 4), 0)
    assert config["slice_size"] == config["options"]["slice_size"] == [64, 32]
    expected = {"preset": "tiny", "updates": 12, "prior_updates": 9, "refiner_updates": 6, "batch_size": 5, "seed": 0}
    assert expected.items() <= config["options"].items()
    assert config["fingerprint"] == data.fingerprint
    assert config["intensity"]["scale"] == pytest.approx(data.scale)
    np.testing.assert_allclose(config["affine"], data.affine)
    assert config["libraries"].keys() == set(checkpoints.LIBRARIES)


def test_a_run_on_volumes_records_how_they_are_read(options, tmp_path, cache, error_line):
    data, given = tmp_path / "volumes", options | {"pattern": r"t2-(?P<case>\w)", "axis": 1}
    affine = np.diag([1.5, 2, 1.0, 1])
    for seed, case in enumerate("abcde"):
        write_volume(data / f"t2-{case}.nii.gz", seed, (16, 6, 12), affine, codes="PIR")
    given["data"] = data
    train.main(arguments(**given))
    run = checkpoints.read_config(options["run"])
    assert (run.options.axis, run.options.pattern, run.slice_size) == (1, given["pattern"], (16, 12))
    evaluated = evaluate.parse_options(arguments(run=options["run"]))
    with pytest.raises(RunError, match="a side needs at least"):  # the data are those of the run, but too small
        evaluate.training_data(evaluated, run)
    predict.main(
        ["--run", str(options["run"]), "--num", "1", "--out", str(tmp_path / "samples"), "--images", str(tmp_path)]
    )
    sample = nib.load(tmp_path / "samples" / "sample_000000.nii.gz")
    assert nib.aff2axcodes(sample.affine) == ("L", "I", "P")
    np.testing.assert_allclose(nib.affines.voxel_sizes(sample.affine), [1.5, 1, 2], rtol=1e-6)
    for other in ({"axis": 2}, {"pattern": "2-(?P<case>[a-e])"}):
        (name,) = other
        assert f"--{name} was" in error_line("train.py", arguments(**given | other))


def test_config_json_is_written_before_the_first_update(options, monkeypatch):
    def stop(*_):
        assert checkpoints.read_config(options["run"]).options.batch_size == 5
        raise ZeroDivisionError

    monkeypatch.setattr(train, "make_vqvae", stop)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(**options))


def test_metrics_have_the_documented_names(trained):
    lines = lines_of(trained.run)
    names = {}
    for line in lines:
        place = line.pop("stage"), line.pop("split")
        line.pop("update")
        names.setdefault(place, set()).add(frozenset(line))
        assert all(isinstance(value, float) and math.isfinite(value) for value in line.values())
    assert names == {
        ("vqvae", "train"): {frozenset(VQVAE_LOSSES | OPTIMISATION)},
        ("vqvae", "validate"): {frozenset(VQVAE_METRICS)},
        ("prior", "train"): {frozenset(PRIOR_LOSSES | OPTIMISATION)},
        ("prior", "validate"): {frozenset(PRIOR_LOSSES)},
        ("refiner", "train"): {frozenset(REFINER_LOSSES | OPTIMISATION)},
        ("refiner", "validate"): {frozenset(REFINER_LOSSES)},
    }


def test_metrics_agree_with_each_other(trained):
    lines = lines_of(trained.run)
    for line in lines:
        if line["stage"] == "vqvae":
            assert line["total_loss"] == pytest.approx(line["reconstruction_loss"] + line["embedding_loss"], rel=1e-5)
        elif line["stage"] == "prior":
            assert line["bits_per_code"] == pytest.approx(line["nats_per_code"] / math.log(2), rel=1e-5)
    for line in select(lines, "vqvae", "validate"):
        assert 0 < line["codes_used"] <= 1
        assert 1 <= line["perplexity"] <= 16.001
        assert line["perplexity"] <= 16 * line["codes_used"] * 1.001
        assert -1 <= line["ssim"] <= 1
        assert line["psnr"] >= 10 * math.log10(4 / line["reconstruction_loss"]) - 0.2  # clipping only helps


def test_the_last_update_is_logged_and_validated(trained):
    lines = lines_of(trained.run)
    for stage, last in UPDATES.items():
        for split in ("train", "validate"):
            updates = [line["update"] for line in select(lines, stage, split)]
            assert updates == sorted(set(updates))
            assert updates[-1] == last


@pytest.mark.parametrize(("updates", "saved_after"), [(20, [2, 4]), (5, [1]), (2, [1])])
def test_the_guide_is_the_prior_after_a_fifth_of_its_updates(options, monkeypatch, updates, saved_after):
    """Its weights are those of the last validation until then, or of the first one."""
    saved = {}

    def save(path, model):
        saved[prior.update] = deepcopy(model.state_dict())
        checkpoints.save_weights(path, model)

    def validate(self):
        nonlocal prior
        prior = self
        return real(self)

    prior, real = None, train.PriorTrainer.validate
    monkeypatch.setattr(train.PriorTrainer, "validate", validate)
    monkeypatch.setattr(train, "save_weights", save)
    train.main(arguments(**options | {"prior_updates": updates}))
    assert list(saved) == saved_after
    guide = load_weights(options["run"] / "guide.safetensors", GatedPixelCNN, PriorConfig, "prior_").state_dict()
    assert same_weights(guide, saved[saved_after[-1]])
    assert not same_weights(guide, prior.saved_model.state_dict())


def best_line(lines, stage, name):
    return min(select(lines, stage, "validate"), key=lambda line: line[name])


def test_saved_weights_reproduce_the_best_validation_line(trained):
    """Recomputed from the saved weights in float32."""
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    prior = load_weights(trained.run / "prior.safetensors", GatedPixelCNN, PriorConfig, "prior_")
    refiner = load_weights(trained.run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    data, lines, cpu = load_dataset(str(trained.data), None, (4, 4), 0), lines_of(trained.run), torch.device("cpu")
    slices = data.validate.batch(range(len(data.validate)))
    with torch.no_grad():
        reconstructions, embedding_loss, codes, _ = vqvae(slices)
    line = best_line(lines, "vqvae", "reconstruction_loss")
    assert line["reconstruction_loss"] == pytest.approx(F.mse_loss(reconstructions, slices).item(), rel=0.05)
    assert line["embedding_loss"] == pytest.approx(embedding_loss.item(), rel=0.05)
    assert line["codes_used"] == pytest.approx(len(codes.unique()) / 16, abs=0.15)

    with utils.autocast(cpu), torch.no_grad():
        codes = vqvae.encode(slices)
        loss = F.cross_entropy(prior(codes, torch.from_numpy(data.validate.positions)).float(), codes).item()
    assert best_line(lines, "prior", "nats_per_code")["nats_per_code"] == pytest.approx(loss, abs=2e-3)

    loss = train.evaluate_refiner(refiner, vqvae, data.validate.batches(5), 0)
    assert best_line(lines, "refiner", "flow_loss")["flow_loss"] == pytest.approx(loss, rel=1e-4)


BEST = [
    ("vqvae", "evaluate_vqvae", "reconstruction_loss"),
    ("prior", "evaluate_prior", "nats_per_code"),
    ("refiner", "evaluate_refiner", "flow_loss"),
]


def make_the_third_best(monkeypatch, evaluate):
    """Add 100 to every loss of `train.<evaluate>` except the third; return the list of the evaluated weights."""
    real, measured = getattr(train, evaluate), []

    def worse_but_once(model, *given):
        measured.append(deepcopy(model.state_dict()))
        found, worse = real(model, *given), 100 * (len(measured) != 3)
        if evaluate == "evaluate_vqvae":
            values, counts = found
            return values | {"reconstruction_loss": values["reconstruction_loss"] + worse}, counts
        return found + worse

    monkeypatch.setattr(train, evaluate, worse_but_once)
    return measured


@pytest.mark.parametrize(("stage", "evaluate", "loss"), BEST)
def test_weights_with_the_lowest_validation_loss_are_kept(options, monkeypatch, stage, evaluate, loss):
    measured = make_the_third_best(monkeypatch, evaluate)
    train.main(arguments(**options))
    logged = [line[loss] for line in select(lines_of(options["run"]), stage, "validate")]
    assert len(measured) == len(logged) > 3
    assert np.argmin(logged) == 2
    kept = load_file(options["run"] / f"{stage}.safetensors")
    assert [same_weights(weights, kept) for weights in measured] == [n == 2 for n in range(len(measured))]


@pytest.mark.parametrize(("stage", "evaluate", "update"), [("vqvae", 0, 8), ("prior", 1, 5), ("refiner", 2, 5)])
def test_the_best_weights_survive_a_stop(options, monkeypatch, stage, evaluate, update):
    """A run that is stopped in the fifth validation of a stage keeps the weights of the third."""
    measured = make_the_third_best(monkeypatch, BEST[evaluate][1])
    at_updates(monkeypatch, {(stage, update): send(signal.SIGTERM)})
    with pytest.raises(SystemExit):
        train.main(arguments(**options))
    assert len(measured) == 5
    train.main(arguments(**options))
    assert len(measured) > 6
    assert same_weights(load_file(options["run"] / f"{stage}.safetensors"), measured[2])


def test_a_large_validation_split_is_drawn_from(options, monkeypatch, capsys):
    given = []
    for kind in (train.PriorTrainer, train.RefinerTrainer):
        real = kind.__init__

        def remember(self, run, stop, options, loader, data, vqvae, real=real):
            given.append(data.validate.names)
            real(self, run, stop, options, loader, data, vqvae)

        monkeypatch.setattr(kind, "__init__", remember)
    whole = load_dataset(str(options["data"]), multiple=(4, 4)).validate
    monkeypatch.setattr(train, "VALIDATION_SLICES", 3)
    train.main(arguments(**options))
    assert given == [whole.draw_patients(3).names] * 2
    assert len(given[0]) == 3 < len(whole)
    assert f"3 of {len(whole)} validation slices are used, of patients drawn at random" in capsys.readouterr().out


def test_prior_and_refiner_train_on_the_best_vqvae(options, monkeypatch):
    """Not on the VQ-VAE of the last update."""
    measured, given = make_the_third_best(monkeypatch, "evaluate_vqvae"), []
    for kind in (train.PriorTrainer, train.RefinerTrainer):
        monkeypatch.setattr(kind, "fit", lambda self, checkpoint, progress: given.append(self.vqvae.state_dict()))
    train.main(arguments(**options))
    assert len(given) == 2
    assert all(same_weights(weights, measured[2]) for weights in given)


def test_training_log_lines_are_means_since_the_previous_line(options, trained, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_LINES", 250)
    train.main(arguments(**options))
    for stage, name in (("vqvae", "total_loss"), ("prior", "nats_per_code"), ("refiner", "flow_loss")):
        each = {line["update"]: line[name] for line in select(lines_of(options["run"]), stage, "train")}
        means = select(lines_of(trained.run), stage, "train")
        assert len(means) == 5 < len(each)
        for before, line in zip([{"update": 0}, *means], means):
            expected = np.mean([each[n] for n in range(before["update"] + 1, line["update"] + 1)])
            assert line[name] == pytest.approx(expected, rel=1e-4)


def test_the_learning_rate_and_the_gradient_norm_are_logged(trained):
    """The rate follows the schedule. The norm is that before gradient clipping."""
    for stage, total, peak in (("vqvae", 12, 8e-3), ("prior", 9, 12e-3), ("refiner", 6, 6e-3)):
        for line in select(lines_of(trained.run), stage, "train"):
            rate = peak * trainer.schedule(line["update"], total, 50)
            assert line["learning_rate"] == pytest.approx(rate, rel=1e-5)
            assert line["gradient_norm"] > 0


def test_losses_of_all_networks_decrease(options, monkeypatch):
    """On few slices: far below the losses of constant slices and of uniformly distributed codes."""
    faster = {"learning_rate": 2e-2, "prior_learning_rate": 3e-2, "refiner_learning_rate": 3e-2}
    faster = config.PRESETS["tiny"] | faster
    monkeypatch.setitem(config.PRESETS, "tiny", faster)
    monkeypatch.setattr(trainer, "LOG_LINES", 250)
    lengths = {"updates": 150, "prior_updates": 150, "refiner_updates": 100, "batch_size": 20}
    train.main(arguments(**options | lengths))
    lines = lines_of(options["run"])
    data = load_dataset(str(options["data"]), None, (4, 4), 0)
    slices = data.train.batch(range(len(data.train)))
    reconstruction = [line["reconstruction_loss"] for line in select(lines, "vqvae", "train")]
    assert np.mean(reconstruction[-10:]) < 0.4 * slices.var().item()
    assert select(lines, "vqvae", "validate")[-1]["ssim"] > select(lines, "vqvae", "validate")[0]["ssim"] + 0.05
    bits = [line["bits_per_code"] for line in select(lines, "prior", "train")]
    assert np.mean(bits[-10:]) < 0.8 * math.log2(16)
    assert np.mean(bits[-10:]) < 0.8 * bits[0]
    flow = [line["flow_loss"] for line in select(lines, "refiner", "train")]
    assert np.mean(flow[:3]) == pytest.approx(1.74, abs=0.2)  # of Gaussian residuals with the right standard deviation
    assert np.mean(flow[-10:]) < 0.9 * np.mean(flow[:3])
    validated = [line["flow_loss"] for line in select(lines, "refiner", "validate")]
    assert min(validated) < 0.95 * validated[0]


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    prior = load_weights(trained.run / "prior.safetensors", GatedPixelCNN, PriorConfig, "prior_")
    slices, cpu = load_dataset(str(trained.data), None, (4, 4), 0).train, torch.device("cpu")
    values, counts = train.evaluate_vqvae(vqvae, slices.batches(12))
    codes, positions = train.extract_codes(vqvae, slices, 12, cpu), torch.from_numpy(slices.positions)
    nats = train.evaluate_prior(prior, [(codes, positions)])
    assert counts.sum() == codes.numel() == 12 * 16 * 8
    for batch_size in (1, 5):
        assert torch.equal(train.extract_codes(vqvae, slices, batch_size, cpu), codes)
        other, other_counts = train.evaluate_vqvae(vqvae, slices.batches(batch_size))
        assert other == pytest.approx(values, rel=1e-3)
        assert torch.equal(other_counts, counts)
        batches = zip(codes.split(batch_size), positions.split(batch_size))
        assert train.evaluate_prior(prior, batches) == pytest.approx(nats, rel=1e-3)


def test_refiner_validation_always_uses_the_same_noise(trained):
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    refiner = load_weights(trained.run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    slices = load_dataset(str(trained.data), None, (4, 4), 0).train
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(train.evaluate_refiner(refiner, vqvae, slices.batches(5), 0))
    assert losses[0] == losses[1]
    assert 0.5 < losses[0] < 2.5
    assert train.evaluate_refiner(refiner, vqvae, slices.batches(5), 1) != losses[0]


def test_validation_flow_loss_is_the_mean_over_slices_and_not_over_batches(trained, monkeypatch):
    """Batches of 5, 5 and 2 slices; the loss of each is its first pixel."""
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    monkeypatch.setattr(Refiner, "loss", lambda refiner, slices, *_, noise: slices[0, 0, 0, 0])
    slices = torch.zeros(12, 1, 64, 32)
    slices[:5], slices[5:10], slices[10:] = 1, 2, 3
    loss = train.evaluate_refiner(Refiner(RefinerConfig()), vqvae, slices.split(5), 0)
    assert loss == pytest.approx((5 * 1 + 5 * 2 + 2 * 3) / 12)


def test_residuals_are_fitted_on_decoded_training_slices(trained, monkeypatch):
    """24 draws are each of the 12 slices twice. Slices, codes and decoded slices agree up to bfloat16."""
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    data, cpu = load_dataset(str(trained.data), None, (4, 4), 0), torch.device("cpu")
    every = data.train.batch(range(12))
    for batch_size in (1, 5, 64):
        given = train.parse_options(["--batch-size", str(batch_size), "--std-slices", "24"])
        slices, decoded, codes = train.reconstruct_subset(vqvae, data.train, given, cpu)
        apart = torch.cdist(slices.flatten(1), every.flatten(1))
        assert torch.bincount(apart.argmin(1)).tolist() == [2] * 12
        assert apart.min(1).values.max() < 1e-3
        assert (vqvae.encode(slices) == codes).float().mean() > 0.98
        torch.testing.assert_close(decoded, vqvae.decode(codes), rtol=0, atol=0.02)
    refiner = load_weights(trained.run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    saved, grain_mean = refiner.residual_std.clone(), refiner.grain_mean.clone()
    refiner.fit_residuals(
        *train.reconstruct_subset(
            vqvae, data.train, train.parse_options(["--batch-size", "5", "--std-slices", "16"]), cpu
        )
    )
    torch.testing.assert_close(refiner.residual_std, saved, rtol=1e-4, atol=0)
    torch.testing.assert_close(refiner.grain_mean, grain_mean, rtol=1e-3, atol=0)
    assert grain_mean.abs().min() > 1e-3
    assert saved.std() > 0.1 * saved.mean() > 0  # codes differ


def test_rows_of_the_refinement_figure_match_their_labels(trained, tmp_path, monkeypatch):
    vqvae = load_weights(trained.run / "vqvae.safetensors", VQVAE, VQVAEConfig)
    refiner = load_weights(trained.run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    slices, drawn = load_dataset(str(trained.data)).validate, []
    monkeypatch.setattr(train, "refinement_figure", lambda *given: drawn.append(given))
    train.draw_refinement(tmp_path / "refinement.png", refiner, vqvae, slices, torch.device("cpu"))
    path, rows, titles = drawn[0]
    assert path == tmp_path / "refinement.png"
    assert titles == [Path(name).name.removesuffix(".nii.gz") for name in slices.names]
    assert list(rows) == ["slice", "decoded", "refined", "refined again"]
    batch = slices.batch(range(4))
    codes = vqvae.encode(batch)
    expected = [batch, vqvae.decode(codes), *(refiner.sample(range(4), codes, vqvae, seed) for seed in (0, 1))]
    for row, pictures in zip(rows.values(), expected):
        np.testing.assert_allclose(row, pictures[:, 0].numpy(), atol=1e-5)


def test_all_slices_of_the_prior_and_half_of_the_refiners_are_augmented(options, monkeypatch):
    """The VQ-VAE's are flipped, but not augmented, because rotation and scaling blur them.

    Each update of prior and refiner uses two slices: a quarter of the batch of five, rounded up.
    """
    seen, real = [], trainer.BatchLoader.__call__

    def call(loader, update, size=None, augmentation=0.0, share=1.0):
        made = real(loader, update, size, augmentation, share)
        seen.append((len(made[0]), augmentation, share))
        return made

    monkeypatch.setattr(trainer.BatchLoader, "__call__", call)
    train.main(arguments(**options))
    expected = {"vqvae": (5, 0.0, 1.0), "prior": (2, 1.0, 1.0), "refiner": (2, 1.0, 0.5)}
    assert seen == [batch for stage, batch in expected.items() for _ in range(UPDATES[stage])]


def test_the_refiner_is_told_how_its_slices_were_augmented(options, monkeypatch):
    told, real = [], Refiner.loss

    def loss(refiner, slices, codes, vqvae, augmentation, noise):
        told.append(augmentation)
        return real(refiner, slices, codes, vqvae, augmentation, noise)

    made, call = [], trainer.BatchLoader.__call__
    monkeypatch.setattr(trainer.BatchLoader, "__call__", lambda *given: (made.append(call(*given)), made[-1])[1])
    monkeypatch.setattr(Refiner, "loss", loss)
    monkeypatch.setattr(train, "evaluate_refiner", lambda *_: 1.0)
    train.main(arguments(**options))
    batches = [parameters for _, _, parameters in made[-UPDATES["refiner"] :]]
    assert torch.equal(torch.cat(told), torch.cat(batches))
    assert 0 < (torch.cat(batches) == 0).all(1).float().mean() < 1


def test_describe_positions():
    described = train.describe_positions(np.array([0.0, 0.5, 1.0, np.nan], np.float32))
    assert described["unknown"] == 0.25
    np.testing.assert_allclose(described["quantiles"], np.linspace(0, 1, 101), atol=1e-6)
    assert train.describe_positions(np.array([np.nan, np.nan])) == {"quantiles": [], "unknown": 1}


def test_the_flip_axis_is_reported():
    assert "along their first axis" in train.describe_flip(2)
    assert "along their second axis" in train.describe_flip(3)
    assert "not flipped" in train.describe_flip(None)


@pytest.mark.parametrize("share, warned", [(1.0, True), (0.96, True), (0.94, False), (0.5, False)])
def test_a_prior_no_better_than_a_unigram_model_is_warned_of(caplog, share, warned):
    """Codes that are used equally often have a unigram entropy of log K nats."""
    codes = torch.arange(16).repeat(8).view(2, 8, 8)
    train.warn_if_unigram(share * math.log(16), codes, 16)
    assert ("the prior has learned little more" in caplog.text) == warned
    caplog.clear()
    train.warn_if_unigram(share * math.log(16), codes[:1], 16)  # too few to tell
    assert caplog.text == ""


def test_different_seeds_give_different_weights(options, trained):
    other = options | {"seed": 1}
    train.main(arguments(**other))
    for name, weight in zip(WEIGHTS, ("codebook.embeddings", "embedding.weight", "embedding.weight", "stem.weight")):
        here, there = (load_file(run / name)[weight] for run in (other["run"], trained.run))
        assert not torch.equal(here, there)


# ---------------------------------------------------------------- starting from another run


def test_a_run_starts_from_the_weights_of_another(trained, options, monkeypatch):
    """Without updates, all weights stay; the refiner's standard deviations are fitted to the own slices."""
    monkeypatch.setattr(trainer.Trainer, "train_update", lambda self: None)
    monkeypatch.setattr(train, "encode_latents", lambda *_: pytest.fail("k-means began"))
    train.main(arguments(**options, init=trained.run))
    for name in WEIGHTS:
        here, there = load_file(options["run"] / name), load_file(trained.run / name.replace("guide", "prior"))
        assert same_weights(here, there)


def test_k_means_is_left_out_when_a_run_starts_from_another(trained, options, monkeypatch):
    monkeypatch.setattr(train, "encode_latents", lambda *_: pytest.fail("k-means began"))
    train.main(arguments(**options, init=trained.run))
    header = checkpoint_header(options["run"])
    assert header.stage == "done"
    assert not same_weights(load_file(options["run"] / WEIGHTS[0]), load_file(trained.run / WEIGHTS[0]))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"codebook_size": 20}, "vqvae.safetensors does not fit these options"),
        ({"slice_size": [32, 32]}, "prior.safetensors does not fit these options"),
        ({"refiner_channels": 8}, "refiner.safetensors does not fit these options"),
        ({"init": "gone"}, "--init gone is not a run directory"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_the_run_begins(trained, options, error_line, given, part):
    given = options | {"init": trained.run} | given
    assert part in error_line("train.py", arguments(**given))
    assert not Path(given["run"]).exists()


# ---------------------------------------------------------------- stopping and resuming


WITHOUT_VALIDATION = {("vqvae", 1), ("vqvae", 2)}  # k-means initialises the codebook in update 3
STOPS = [
    [("vqvae", 1, signal.SIGTERM)],  # in the encoder's warm-up
    [("vqvae", 2, signal.SIGINT)],  # just before k-means initialises the codebook
    [("vqvae", 8, signal.SIGTERM), ("prior", 4, signal.SIGINT)],
    [("refiner", 1, signal.SIGINT), ("refiner", 4, signal.SIGTERM)],
    [(stage, last, signal.SIGTERM) for stage, last in UPDATES.items()],
    [("vqvae", n, signal.SIGINT) for n in (3, 4, 8)]
    + [("prior", n, signal.SIGTERM) for n in (1, 2, 8)]
    + [("refiner", n, signal.SIGINT) for n in (2, 3, 5)],
]


@pytest.mark.parametrize("stops", STOPS)
def test_a_resumed_run_equals_an_uninterrupted_one(options, trained, monkeypatch, capsys, stops):
    """A signal waits for the end of the update. The validation after it is interrupted and repeated on resuming."""
    hooks = {(stage, update): send(kind) for stage, update, kind in stops}
    at_updates(monkeypatch, hooks)
    for stage, update, kind in stops:
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(**options))
        assert stop.value.code == 128 + kind
        header = checkpoint_header(options["run"])
        assert (header.stage, header.update) == (stage, update)
        assert header.validation_pending == ((stage, update) not in WITHOUT_VALIDATION)
        assert f"stopped after {stage} update {update};" in capsys.readouterr().out
    assert not hooks
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


def test_resuming_restores_what_was_fitted(options, trained, monkeypatch):
    """It is not fitted again."""
    at_updates(monkeypatch, {("refiner", 2): send(signal.SIGTERM)})
    with pytest.raises(SystemExit):
        train.main(arguments(**options))
    monkeypatch.setattr(Refiner, "fit_residuals", lambda self, *_: self.residual_std.fill_(9))
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


def at_call(monkeypatch, place, name, when, act):
    """Call `act` once, at the first call of a function after the update `when`, (stage, update), has begun."""
    real, begun = getattr(place, name), []

    def hooked(*given, **named):
        if begun:
            begun.clear()
            act()
        return real(*given, **named)

    at_updates(monkeypatch, {when: lambda: begun.append(True)})
    monkeypatch.setattr(place, name, hooked)


@pytest.mark.parametrize(
    ("place", "name", "when", "kind"),
    [
        (train, "encode_latents", ("vqvae", 3), signal.SIGTERM),
        (train, "evaluate_vqvae", ("vqvae", 4), signal.SIGINT),
        (trainer, "save_weights", ("vqvae", 3), signal.SIGTERM),
        (train.VQVAETrainer, "draw_figures", ("vqvae", 12), signal.SIGTERM),
        (train, "load_weights", ("vqvae", 12), signal.SIGINT),
        (train, "extract_codes", ("vqvae", 12), signal.SIGTERM),
        (train, "evaluate_prior", ("prior", 5), signal.SIGTERM),
        (trainer, "save_weights", ("prior", 3), signal.SIGINT),
        (train.PriorTrainer, "draw_figures", ("prior", 9), signal.SIGTERM),
        (train, "reconstruct_subset", ("prior", 9), signal.SIGINT),
        (train, "evaluate_refiner", ("refiner", 3), signal.SIGINT),
        (trainer, "save_weights", ("refiner", 5), signal.SIGTERM),
        (train.RefinerTrainer, "draw_figures", ("refiner", 6), signal.SIGINT),
    ],
)
def test_a_stop_signal_between_updates_loses_nothing(options, trained, monkeypatch, capsys, place, name, when, kind):
    """During validation, while figures are drawn, between the stages."""
    with monkeypatch.context() as patch:
        at_call(patch, place, name, when, send(kind))
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(**options))
    assert stop.value.code == 128 + kind
    header = checkpoint_header(options["run"])
    assert (header.stage, header.update) == when
    assert "stopped after {} update {};".format(*when) in capsys.readouterr().out
    with monkeypatch.context() as patch:  # a second stop, while the data are loaded
        patch.setattr(train, "load_dataset", lambda *_, **__: send(kind)())
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(**options))
    assert stop.value.code == 128 + kind
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


class Killed(BaseException):
    """Simulates SIGKILL: nothing more is written."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    "kills",
    [
        [("vqvae", 2)],
        [("vqvae", 9), ("vqvae", 12)],
        [("vqvae", 5), ("prior", 3), ("prior", 8), ("prior", 9), ("refiner", 2)],
        [("refiner", 1), ("refiner", 5), ("refiner", 6)],
    ],
)
def test_a_killed_run_resumes_from_its_last_checkpoint(options, trained, monkeypatch, kills):
    """Updates and log lines since then are lost and repeated identically."""
    for place in kills:
        at_updates(monkeypatch, {place: kill})
        with pytest.raises(Killed):
            train.main(arguments(**options, checkpoint_every=3))
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


@pytest.mark.parametrize(("stage", "update"), [("prior", 5), ("refiner", 3)])
def test_a_kill_between_log_line_and_checkpoint_logs_no_line_twice(options, trained, monkeypatch, stage, update):
    """The log has the line of the unfinished update and half of the next; both are removed on resuming."""
    monkeypatch.setattr(trainer, "INTERVAL_SECONDS", 0)  # a checkpoint after each update
    real = checkpoints.Run.log

    def log(run, *given):
        real(run, *given)
        if given[:3] == (stage, "validate", update):
            with open(run.log_path, "a") as file:
                file.write('{"stage": "pri')
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Run, "log", log)
        with pytest.raises(Killed):
            train.main(arguments(**options))
    header = checkpoint_header(options["run"])
    assert (header.stage, header.update) == (stage, update - 1)
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


@pytest.mark.parametrize(
    "point",
    [
        "start: write_text config.json",
        "vqvae 1: write_bytes checkpoint.safetensors",
        "vqvae 7: replace checkpoint.previous.safetensors",
        "prior 1: replace checkpoint.safetensors",
        "prior 4: log metrics.jsonl",
        "prior 9: write_bytes prior.safetensors",
        "refiner 2: fsync checkpoint.safetensors",
        "refiner 6: fsync .",
    ],
)
def test_a_run_killed_during_a_write_resumes(options, trained, monkeypatch, point):
    """A short form of `python tests/campaign.py kills`."""
    monkeypatch.setattr(trainer, "INTERVAL_SECONDS", 0)  # a checkpoint after each update

    def act(now, real, given):
        if now == point:
            half_done(real, given)
            raise Killed
        return real(*given)

    with monkeypatch.context() as patch:
        on_writes(patch, act)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            train.main(arguments(**options))
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)
    assert not list(options["run"].glob("*.part"))


@pytest.mark.parametrize(
    "point",
    [
        "vqvae 2: write_bytes checkpoint.safetensors",
        "prior 3: fsync metrics.jsonl",
        "refiner 4: replace checkpoint.safetensors",
    ],
)
def test_a_full_disk_is_one_line_and_the_run_resumes(options, trained, monkeypatch, point):
    """A short form of `python tests/campaign.py disk`: nothing can be written from that point on."""
    monkeypatch.setattr(trainer, "INTERVAL_SECONDS", 0)
    reached = []

    def act(now, real, given):
        if now == point:
            reached.append(now)
        if not reached or real.__name__ in ("read_bytes", "log"):
            return real(*given)
        half_done(real, given)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        on_writes(patch, act)
        with pytest.raises(RunError, match="cannot be written: No space left on device"):
            train.main(arguments(**options))
    train.main(arguments(**options))
    assert_same_run(options["run"], trained.run)


@pytest.mark.parametrize("damage", [b"junk", None])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(options, stopped, trained, caplog, damage):
    path = options["run"] / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage is None else damage)
    train.main(arguments(**options))
    assert f"{path} cannot be used" in caplog.text
    assert "resuming from the previous checkpoint" in caplog.text
    assert_same_run(options["run"], trained.run)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    ("stage", "place", "name", "loss"),
    [("prior", GatedPixelCNN, "nll", "nats_per_code"), ("refiner", Refiner, "loss", "flow_loss")],
)
def test_a_non_finite_loss_ends_the_run_and_keeps_the_checkpoint(options, monkeypatch, stage, place, name, loss):
    monkeypatch.setattr(trainer, "VALIDATIONS", 1)
    monkeypatch.setattr(trainer, "LOG_LINES", 1)
    real, calls = getattr(place, name), itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, lambda *given: real(*given) * (1 if next(calls) < 4 else torch.nan))
        with pytest.raises(RunError) as error:
            train.main(arguments(**options, checkpoint_every=2))
    assert f"{stage} update 4: the {loss} is not finite" in str(error.value)
    assert "--batch-size" in str(error.value)
    header, tensors = load_tensors(options["run"] / "checkpoint.safetensors", CheckpointHeader)
    assert (header.stage, header.update) == (stage, 2)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    train.main(arguments(**options))
    assert all(math.isfinite(value) for line in lines_of(options["run"]) for value in list(line.values())[2:])


@pytest.mark.parametrize(
    ("stage", "evaluate", "loss"),
    [("prior", "evaluate_prior", "nats_per_code"), ("refiner", "evaluate_refiner", "flow_loss")],
)
def test_a_non_finite_validation_loss_ends_the_run(options, monkeypatch, stage, evaluate, loss):
    monkeypatch.setattr(train, evaluate, lambda *_: math.inf)
    with pytest.raises(RunError, match=f"{stage} update 1: the {loss} in validation is not finite"):
        train.main(arguments(**options))
    assert all(math.isfinite(value) for line in lines_of(options["run"]) for value in list(line.values())[2:])


# ---------------------------------------------------------------- warnings


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
def test_codebook_collapse_is_warned_of_once(tmp_path, run_config, caplog, used, warned):
    """The share of codes in use, at validations every 100 updates."""
    warnings = []
    with checkpoints.Run(tmp_path / "run", run_config(), {}) as run:
        trainer = SimpleNamespace(run=run, stage="vqvae")
        for number, share in enumerate(used, 1):
            run.log("vqvae", "validate", 100 * number, {"codes_used": share})
            train.VQVAETrainer.warn(trainer, {})
            warnings += [100 * number] * len(caplog.records)
            assert all("codebook collapse" in record.message for record in caplog.records)
            caplog.clear()
    assert warnings == warned


@pytest.mark.parametrize(("validation", "warned"), [([2.1, 2.19], 0), ([2.1, 2.3, 2.4], 1), ([], 0)])
def test_a_prior_that_knows_its_training_slices_better_is_warned_of_once(
    tmp_path, run_config, caplog, validation, warned
):
    """The mean of the last ten training losses is 2."""
    with checkpoints.Run(tmp_path / "run", run_config(), {}) as run:
        trainer = SimpleNamespace(run=run, stage="prior", criterion="nats_per_code", warned=False)
        train.PriorTrainer.warn(trainer, {"nats_per_code": 9.0})  # before the first log line
        for update, nats in enumerate([9.0] * 5 + [1.9, 2.1] * 5):
            run.log("prior", "train", update + 1, {"nats_per_code": nats})
        for nats in validation:
            train.PriorTrainer.warn(trainer, {"nats_per_code": nats})
    assert len(caplog.records) == warned
    assert all("% more bits for validation than for training slices" in record.message for record in caplog.records)


# ---------------------------------------------------------------- untrusted run directories


def killed_run(options, stage, update):
    """Return the folder of a run that was killed in an update."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        at_updates(patch, {(stage, update): kill})
        with pytest.raises(Killed):
            train.main(arguments(**options, checkpoint_every=1))
    return options["run"]


@pytest.fixture(scope="session")
def killed_in_prior(tmp_path_factory, slices_folder, tiny_preset):
    """A run that was killed in update 4 of the prior."""
    return killed_run(
        options_of(slices_folder, tmp_path_factory.mktemp("killed_in_prior") / "run", tiny_preset), "prior", 4
    )


@pytest.fixture(scope="session")
def killed_in_refiner(tmp_path_factory, slices_folder, tiny_preset):
    """A run that was killed in update 4 of the refiner."""
    return killed_run(
        options_of(slices_folder, tmp_path_factory.mktemp("killed_in_refiner") / "run", tiny_preset), "refiner", 4
    )


@pytest.fixture
def stopped(killed_in_prior, options):
    """Copy `killed_in_prior` to --run; return a function that changes its checkpoint."""
    shutil.copytree(killed_in_prior, options["run"])
    return lambda act: change_checkpoint(options["run"], act)


def change_checkpoint(run, act):
    """Let `act` change the header and tensors of a checkpoint; its checksum is then correct again."""
    path = run / "checkpoint.safetensors"
    header, tensors = load_tensors(path, CheckpointHeader)
    fields = header.model_dump()
    act(fields, tensors)
    path.unlink()
    save_tensors(path, fields, tensors)
    (run / "checkpoint.previous.safetensors").unlink()


def shorten(header, tensors):
    tensors["model.row_embedding"] = tensors["model.row_embedding"][:2].clone()


def name_a_loss(header, tensors):
    header["losses"] = [*header["losses"], "another"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda header, tensors: header.update(update=-1), "update cannot be -1"),
        (lambda header, tensors: header.update(update=10**6), "its update 1000000 is after the last, 9"),
        (lambda header, tensors: header.update(update="3"), "update cannot be '3'"),
        (lambda header, tensors: header.update(best="low"), "best cannot be 'low'"),
        (lambda header, tensors: header.update(stage="evaluation"), "stage cannot be 'evaluation'"),
        (lambda header, tensors: header.update(log_bytes=-1), "log_bytes cannot be -1"),
        (lambda header, tensors: header.update(colour="blue"), "colour is unknown to this version"),
        (lambda header, tensors: header.pop("log_bytes"), "log_bytes is missing"),
        (name_a_loss, "its losses are not those that its header names"),
        (lambda header, tensors: tensors.update(losses=torch.tensor([[math.nan]])), "its losses are not"),
        (lambda header, tensors: tensors.update(losses=torch.zeros(3)), "its losses are not those"),
        (lambda header, tensors: tensors.pop("model.row_embedding"), "its model.row_embedding is missing"),
        (lambda header, tensors: tensors.update(x=torch.zeros(1)), "its x is unknown to this network"),
        (shorten, "its model.row_embedding has shape .* which does not fit this network"),
        (lambda header, tensors: tensors["ema.row_embedding"].fill_(math.nan), "its ema.row_embedding is not finite"),
        (lambda header, tensors: tensors.pop("optimiser.row_embedding.exp_avg"), "exp_avg is missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(options, stopped, act, message):
    stopped(act)
    with pytest.raises(RunError, match=rf"checkpoint\.safetensors cannot be used.*{message}"):
        train.main(arguments(**options))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda header, tensors: header.update(update=7), "its update 7 is after the last, 6"),
        (lambda header, tensors: tensors.pop("model.residual_std"), "its model.residual_std is missing"),
        (lambda header, tensors: tensors["ema.residual_std"].fill_(math.inf), "its ema.residual_std is not finite"),
    ],
)
def test_a_refiner_checkpoint_that_does_not_fit_is_refused(options, killed_in_refiner, act, message):
    shutil.copytree(killed_in_refiner, options["run"])
    change_checkpoint(options["run"], act)
    with pytest.raises(RunError, match=rf"checkpoint\.safetensors cannot be used.*{message}"):
        train.main(arguments(**options))


@pytest.mark.parametrize("run", ["killed_in_prior", "killed_in_refiner"])
def test_a_vqvae_of_another_run_is_refused(options, request, run):
    shutil.copytree(request.getfixturevalue(run), options["run"])
    other = VQVAE(replace(VQVAE_TINY, codebook_size=8))
    checkpoints.save_weights(options["run"] / "vqvae.safetensors", other)
    with pytest.raises(RunError, match=r"vqvae\.safetensors is not of this run"):
        train.main(arguments(**options))
    (options["run"] / "vqvae.safetensors").unlink()
    with pytest.raises(RunError, match=r"vqvae\.safetensors does not exist"):
        train.main(arguments(**options))


def test_tampered_runs_are_loaded_or_refused_and_execute_nothing(
    killed_in_prior, killed_in_refiner, options, monkeypatch, tmp_path
):
    """A short form of `python tests/campaign.py runs`."""
    monkeypatch.setattr(trainer.Trainer, "fit", trainer.Trainer.fit)  # which `resume` replaces
    canary, outcomes = tmp_path / "canary", Counter()
    (tmp_path / "outside").write_text("not the run's")
    for seed in range(40):
        rng = np.random.default_rng(seed)
        run = tmp_path / "tampered"
        shutil.copytree((killed_in_prior, killed_in_refiner)[seed % 2], run)
        name, evil = tamper(rng, run, canary)
        outcome, details = judge_run(lambda run=run: resume(arguments(**options | {"run": run})), run)
        assert outcome != "crashed", f"{seed}, {name}: {details}"
        assert not (evil and outcome == "loaded" and name not in WEIGHTS[1:])
        outcomes[outcome] += 1
        shutil.rmtree(run)
    assert not canary.exists()
    assert (tmp_path / "outside").read_text() == "not the run's"
    assert min(outcomes["loaded"], outcomes["refused"]) >= 5


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_is_left_unchanged(trained, tiny_preset, tmp_path, capsys):
    before = contents(trained.run)
    same = {"data": trained.data, "run": trained.run, "preset": tiny_preset, "batch_size": 5}
    train.main(arguments(**same, images=tmp_path / "images"))
    assert f"{trained.run} is complete" in capsys.readouterr().out
    assert contents(trained.run) == before
    assert not (tmp_path / "images").exists()


def test_a_finished_training_says_what_to_open(options, capsys):
    options["run"] = options["run"].with_name("my run")
    train.main(arguments(**options))
    *_, complete, curves, slices, sample, evaluation = capsys.readouterr().out.splitlines()
    assert complete == f"{options['run']} is complete"
    assert curves.split()[0] == "curves" and slices.split()[0] == "slices"
    commands = {predict: sample, evaluate: evaluation}
    for module, line in commands.items():
        _, python, script, *given = shlex.split(line)
        assert (python, script) == ("python", f"{module.__name__}.py")
        assert module.parse_options(given).run == options["run"]


def test_the_summary_names_figures_that_were_drawn(trained, capsys):
    train.say_what_to_open(train.parse_options(arguments(run=trained.run, images=trained.images)))
    named = set(re.findall(r"\w+\.png", capsys.readouterr().out))
    assert named == {path.name for path in trained.images.iterdir()}


# ---------------------------------------------------------------- users' mistakes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 6}, "--batch-size was 5, is 6"),
        ({"seed": 2, "updates": 13}, "--seed was 0, is 2; --updates was 12, is 13"),
        ({"prior_updates": 3}, "--prior-updates was 9, is 3"),
        ({"refiner_updates": 3}, "--refiner-updates was 6, is 3"),
        ({"preset": "demo", "updates": 12, "prior_updates": 9, "refiner_updates": 6}, "--preset was tiny, is demo"),
        ({"slice_size": [32, 32]}, r"--slice-size was \[64, 32\], is \[32, 32\]"),
    ],
)
def test_resuming_with_other_options_is_refused_by_name(trained, tiny_preset, changed, message):
    before = contents(trained.run)
    same = {"data": trained.data, "run": trained.run, "preset": tiny_preset, "batch_size": 5}
    with pytest.raises(RunError, match=message):
        train.main(arguments(**same | changed))
    assert contents(trained.run) == before


def test_resuming_with_other_data_is_refused(trained, tiny_preset, tmp_path):
    phantom.write_phantom(tmp_path, cases=(3, 1, 1), slices=4, size=(64, 32), workers=1, seed=1)
    with pytest.raises(RunError, match="the data changed since .* began: 20 altered"):
        train.main(arguments(data=tmp_path, run=trained.run, preset=tiny_preset, batch_size=5))


def test_changed_data_are_named_and_may_be_allowed(options, slices_folder, tmp_path, monkeypatch, capsys, caplog):
    data = tmp_path / "data"
    shutil.copytree(slices_folder, data)
    options["data"] = data
    at_updates(monkeypatch, {("prior", 2): send(signal.SIGTERM)})
    with pytest.raises(SystemExit):
        train.main(arguments(**options))
    before = contents(options["run"])
    first, second, *_ = sorted((data / "keras_slices_train").iterdir())
    shutil.copy(first, first.with_name("case_009_week_0_slice_0.nii.gz"))
    first.unlink()
    shutil.copy(next((data / "keras_slices_test").iterdir()), second)
    with pytest.raises(RunError) as error:
        train.main(arguments(**options))
    message = str(error.value)
    assert "1 added (keras_slices_train/case_009_week_0_slice_0.nii.gz)" in message
    assert f"1 removed (keras_slices_train/{first.name})" in message
    assert f"1 altered (keras_slices_train/{second.name})" in message
    assert "--allow-changed-data" in message
    assert contents(options["run"]) == before
    train.main([*arguments(**options), "--allow-changed-data"])
    assert "the data changed" in caplog.text
    assert "is complete" in capsys.readouterr().out
    train.main(arguments(**options))  # recorded as the run's own data
    config = checkpoints.read_config(options["run"])
    given = evaluate.parse_options(arguments(run=options["run"]))
    assert len(evaluate.training_data(given, config).train) == 12


def test_a_run_that_another_process_trains_is_refused(options):
    utils.make_folder(options["run"])
    lock = checkpoints.lock_run(options["run"])
    with pytest.raises(RunError, match="is in use by process"):
        train.main(arguments(**options))
    assert [path.name for path in options["run"].iterdir()] == ["lock"]
    lock.close()
    train.main(arguments(**options))


def test_the_same_data_in_another_folder_are_accepted(trained, tiny_preset, tmp_path, capsys):
    phantom.write_phantom(tmp_path, cases=(3, 1, 1), slices=4, size=(64, 32), workers=1)
    train.main(arguments(data=tmp_path, run=trained.run, preset=tiny_preset, batch_size=5))
    assert "is complete" in capsys.readouterr().out


def test_a_folder_that_is_not_a_run_is_left_unchanged(options):
    options["run"].mkdir()
    (options["run"] / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="not a run directory"):
        train.main(arguments(**options))
    assert [path.name for path in options["run"].iterdir()] == ["thesis.tex"]


def test_missing_data_create_no_run(options):
    with pytest.raises(DataError, match="no such folder"):
        train.main(arguments(**options | {"data": "nowhere"}))
    assert not options["run"].exists()


def test_an_unusable_figure_folder_is_refused_before_training(options, monkeypatch):
    options["images"].write_text("mine")
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: pytest.fail("began to work"))
    with pytest.raises(RunError, match="images"):
        train.main(arguments(**options))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"data": "nowhere"}, "no such folder: nowhere"),
        ({"updates": 0}, "argument --updates: 0 is not at least 1"),
        ({"updates": "many"}, "argument --updates: invalid int value: 'many'"),
        ({"updates": 10**8}, "argument --updates: 100000000 is not at least 1 and at most 10000000"),
        ({"prior_updates": 0}, "argument --prior-updates: 0 is not at least 1"),
        ({"refiner_updates": 0}, "argument --refiner-updates: 0 is not at least 1"),
        ({"refiner_updates": 10**8}, "argument --refiner-updates: 100000000 is not at least 1 and at most 10000000"),
        ({"batch_size": -1}, "argument --batch-size: -1 is not at least 1"),
        ({"batch_size": 10**6}, "argument --batch-size: 1000000 is not at least 1 and at most 65536"),
        ({"checkpoint_every": 0}, "argument --checkpoint-every: 0 is not at least 1"),
        ({"seed": -1}, "argument --seed: -1 is not at least 0"),
        ({"seed": 2**32}, "argument --seed: 4294967296 is not at least 0"),
        ({"preset": "best"}, "argument --preset: invalid choice: 'best'"),
        ({"device": "gpu"}, "--device gpu"),
        ({"device": "mps"}, "--device mps: choose auto, cpu, cuda, or cuda:1 and so on"),
        ({"device": "xla"}, "--device xla: choose auto"),
        ({"colour": "blue"}, "unrecognized arguments: --colour blue"),
        ({"slice_size": "64"}, "argument --slice-size: expected 2 arguments"),
        (
            {"slice_size": [62, 32]},
            "slice size 62x32 does not fit the network: the nearest that do are 56x32 and 64x32",
        ),
        ({"slice_size": [4, 32]}, "argument --slice-size: 4 is not at least 8"),
        ({"slice_size": [64, 100000]}, "argument --slice-size: 100000 is not at least 8 and at most 2048"),
        ({"run": "/proc/1/run"}, "--run /proc/1/run cannot be written"),
        ({"images": "/proc/1/images"}, "--images /proc/1/images cannot be written"),
    ],
)
def test_invalid_options_are_one_line_and_write_nothing(tmp_path, monkeypatch, error_line, tiny_preset, given, part):
    monkeypatch.chdir(tmp_path)
    assert part in error_line("train.py", arguments(**given))
    assert not list(tmp_path.iterdir())


def test_a_damaged_config_is_one_line(tmp_path, error_line, slices_folder, tiny_preset):
    (tmp_path / "config.json").write_text("{")
    error = error_line("train.py", arguments(data=slices_folder, run=tmp_path))
    assert "config.json cannot be used" in error


@pytest.mark.parametrize("option", ["data", "run", "images"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_path_is_refused(error_line, option, value):
    """A job script passes one if its variable is not set; as a path it would be the current folder."""
    assert f"argument --{option}: it is empty; is a variable not set?" in error_line("train.py", [f"--{option}", value])


def test_paths_with_unusual_characters_are_trained_and_resumed(options, slices_folder, tmp_path, monkeypatch, trained):
    """Not UTF-8, with dollar signs, with a space; for the run, the figures and the data."""
    monkeypatch.undo()  # with figures and, if installed, TensorBoard
    data = tmp_path / "K\udcf6ln $a_$"
    shutil.copytree(slices_folder, data)
    given = options | {"data": data, "run": tmp_path / "\udcff $_", "images": tmp_path / "\udcfe"}
    at_updates(monkeypatch, {("prior", 3): send(signal.SIGTERM)})
    with pytest.raises(SystemExit):
        train.main(arguments(**given))
    train.main(arguments(**given))
    assert_same_run(given["run"].rename(tmp_path / "plain"), trained.run)
    assert {path.name for path in given["images"].iterdir()} == FIGURES


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 700),
        ({"updates": 60}, 240),
        ({"updates": 5000}, 700),
        ({"prior_updates": 3}, 700),
        ({"updates": 60, "refiner_updates": 7}, 7),
        ({"updates": 60, "refiner_updates": 700}, 700),
    ],
)
def test_default_refiner_updates_are_limited_by_those_of_the_vqvae(given, expected):
    assert train.parse_options(arguments(preset="demo", **given)).refiner_updates == expected


def test_without_options_the_defaults_of_train_config_hold(tiny_preset):
    assert train.parse_options([]) == config.TrainConfig()


# ---------------------------------------------------------------- command line


def start(script, given, cache):
    environment = os.environ | {"PROSTATEVQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / script, *given]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def wait_for_content(path, process):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_commands_train_stop_resume_and_sample(tmp_path):
    """The demo networks on slices of 32x16: stopped by SIGTERM, resumed by the same command, sampled."""
    data, run, images, out = (tmp_path / name for name in ("data", "run", "images", "samples"))
    phantom.write_phantom(data, cases=(3, 1, 1), slices=4, size=(32, 16), workers=1)
    sizes = {"updates": 60, "prior_updates": 3, "refiner_updates": 2, "batch_size": 4, "device": "cpu"}
    command = arguments(preset="demo", data=data, run=run, images=images, **sizes)

    process = start("train.py", command, tmp_path / "cache")
    wait_for_content(run / "metrics.jsonl", process)
    process.terminate()
    status, output, errors = finish(process)
    assert (status, errors.startswith("note: ignored 20 label maps"), errors.count("\n")) == (143, True, 1)
    assert "the same command resumes" in output
    header = checkpoint_header(run)
    assert header.stage == "vqvae"
    assert 0 < header.update < 60

    status, output, errors = finish(start("train.py", command, tmp_path / "cache"))
    assert (status, errors.count("\n")) == (0, 1)
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == FILES
    assert {path.name for path in images.iterdir()} == FIGURES
    updates = [line["update"] for line in select(lines_of(run), "vqvae", "train")]
    assert updates == list(range(1, 61))

    sampling = arguments(run=run, num=3, out=out, images=images, device="cpu")
    status, output, errors = finish(start("predict.py", sampling, tmp_path / "cache"))
    assert (status, errors) == (0, "")
    names = ["codes.npy", *(f"sample_00000{n}.nii.gz" for n in range(3)), "samples.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (images / "samples.png").exists()


# ---------------------------------------------------------------- other data


def test_the_phantom_has_the_size_of_preset_or_option(options, monkeypatch):
    """--data phantom is drawn at the preset's size, or at --slice-size."""
    real = phantom.write_phantom
    monkeypatch.setattr(phantom, "write_phantom", lambda folder, **given: real(folder, (2, 1, 1), slices=2, **given))
    given = options | {"data": "phantom", "updates": 2, "prior_updates": 1, "refiner_updates": 1}
    train.main(arguments(**given, slice_size=[32, 16]))
    assert checkpoints.read_config(options["run"]).slice_size == (32, 16)
    monkeypatch.setitem(config.PRESETS, "tiny", config.PRESETS["tiny"] | {"phantom_size": (48, 24)})
    other = options["run"].parent / "other"
    train.main(arguments(**given | {"run": other}))
    assert checkpoints.read_config(other).slice_size == (48, 24)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the HipMRI-like slices beside the project")
def test_real_slices_train(options):
    sizes = {"updates": 2, "prior_updates": 2, "refiner_updates": 2, "batch_size": 4}
    train.main(arguments(**options | {"data": REAL} | sizes))
    config = checkpoints.read_config(options["run"])
    assert config.slice_size == (256, 128)
    prior = load_weights(options["run"] / "prior.safetensors", GatedPixelCNN, PriorConfig, "prior_")
    assert prior.config.grid == (64, 32)
    assert {line["stage"] for line in lines_of(options["run"])} == UPDATES.keys()
