"""The self-test: its parts by hand, and `evaluate.py --self-test` on a tiny run."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from trainings import arguments

import anatomy
import evaluate
import faults
import metrics
import self_test
from anatomy import Tail
from checkpoints import read_config
from console import RunError
from dataset import Slices, load_dataset
from self_test import HeldOut, gather, nearest_height, plant, smallest_share


@pytest.fixture(scope="module")
def tested(tmp_path_factory, trained):
    """Run the self-test of a copy of the run; return the content of self_test.json, the table and the folder."""
    folder = tmp_path_factory.mktemp("tested")
    shutil.copytree(trained.run, folder / "run")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(metrics, "PATCHES", 256)
        patch.setattr(metrics, "PAIRS", 10)
        patch.setattr(anatomy, "JUDGE_UPDATES", 2)
        patch.setattr(anatomy, "MATCHER_UPDATES", 2)
        patch.setattr(self_test, "COPIED_SLICES", 3)
        patch.setattr(self_test, "TEXTURE_FAULTS", {"blur 0.5 pixels": faults.TEXTURE_FAULTS["blur 0.5 pixels"]})
        patch.setattr(self_test, "ANATOMY_FAULTS", {name: faults.ANATOMY_FAULTS[name] for name in self_test.TENTHS})
        evaluate.main([*arguments(run=folder / "run", images=folder / "images", device="cpu"), "--self-test"])
    results = json.loads((folder / "run" / "self_test.json").read_text(), parse_constant=pytest.fail)
    return results, printed.getvalue(), folder


def test_self_test_names_each_fault_and_what_sees_it(tested):
    results, printed, _ = tested
    assert results["settings"]["slices"] + results["settings"]["reference_slices"] == 8  # both held-out splits
    names = ["none", "blur 0.5 pixels", *faults.VARIETY_FAULTS, *self_test.TENTHS]
    assert list(results["faults"]) == names + [f"a tenth: {name}" for name in self_test.TENTHS]
    for row in results["faults"].values():
        assert set(row["seen"]) <= {*self_test.P_VALUES, *self_test.SPREADS}
        assert 0 <= row["coherence_auc"] <= 1 and 0 < row["tail_p_value"] <= 1
    assert not set(results["faults"]["none"]["seen"]) & set(self_test.SPREADS)
    assert "random_feature_frechet" in results["faults"]["pure noise"]["seen"]
    lines = {line[:32].strip(): line[32:] for line in printed.splitlines()}
    noise = results["faults"]["pure noise"]
    assert f"{noise['random_feature_frechet']:.1f}*" in lines["pure noise"].split()
    assert "smallest_share" in noise and "smallest_share" not in results["faults"]["none"]


def test_self_test_searches_for_copies_of_training_slices(tested):
    results, printed, _ = tested
    assert list(results["copies"]) == ["none", *faults.COPIES]
    assert results["copies"]["exact"]["named"] == results["copies"]["mirrored"]["named"] == 1
    assert results["copies"]["exact"]["memorisation_rate"] == 1
    assert results["copies"]["none"]["named"] is None
    assert "copies of 3 training slices" in printed


def test_self_test_draws_nothing_and_needs_no_weights(tested, tmp_path):
    _, _, folder = tested
    assert not (folder / "images").exists()
    assert not (folder / "run" / "evaluation.json").exists()


def test_self_test_needs_no_particular_split(trained, monkeypatch):
    """Data without test slices, with the default --split."""
    data, config = load_dataset(str(trained.data), None, (4, 4), 0), read_config(trained.run)
    nothing = Slices(data.test.pixels[:0], [], [], *3 * [data.test.positions[:0]])
    monkeypatch.setattr(evaluate, "load_dataset", lambda *_, **__: dataclasses.replace(data, test=nothing))
    given = evaluate.parse_options([*arguments(run=trained.run), "--self-test"])
    assert len(evaluate.training_data(given, config).validate) == 4
    given.self_test = False
    with pytest.raises(RunError, match="fewer than 8 training or 4 test slices: choose another --split"):
        evaluate.training_data(given, config)


def some_slices(count, cases, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16)).astype(np.uint8)
    names = [str(i) for i in range(count)]
    return Slices(pixels, names, cases, *np.linspace((0, 1, 0), (1, 1, 0), count, dtype=np.float32).T)


def test_held_out_slices_of_both_splits_are_gathered_and_unknown_patients_kept_apart():
    splits = [some_slices(3, ["a", "a", None]), some_slices(2, [None, "b"], 1)]
    held_out = gather(splits, torch.device("cpu"))
    assert held_out.cases == ["a", "a", ("unknown", 2), ("unknown", 3), "b"]
    assert torch.equal(held_out.slices[3:], splits[1].batch([0, 1]))
    np.testing.assert_allclose(held_out.positions, [0, 0.5, 1, 0, 1])


def test_selected_slices_are_evenly_spread(monkeypatch):
    monkeypatch.setattr(self_test, "MAX_SLICES", 3)
    held_out = HeldOut(torch.arange(10.0).view(10, 1, 1, 1), np.arange(10), list("abcdefghij"))
    assert held_out.select(np.arange(1, 10)).cases == ["b", "f", "j"]
    assert held_out.select(np.array([2, 4])).slices.flatten().tolist() == [2, 4]


def test_a_tenth_of_the_slices_has_the_fault_and_all_are_grey_levels(monkeypatch):
    slices = metrics.round_to_grey_levels(2 * torch.rand(20, 1, 32, 16) - 1)
    planted = plant(faults.Originals(slices, np.linspace(0, 1, 20), list(range(20))))
    torch.testing.assert_close(planted["none"], slices)
    changed = (planted["a tenth: upside down"] != slices).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [0, 10]
    for own in planted.values():
        torch.testing.assert_close(own, metrics.round_to_grey_levels(own))


def test_smallest_share_is_the_first_that_is_called():
    """Of 100 slices, more than 5 in the tail are called: the null distribution has 4 % on average."""
    null = np.repeat([0.03, 0.05], 2000)
    unaltered, faulty = Tail(np.zeros(100), null), Tail(np.ones(100), null)
    assert smallest_share(faulty, unaltered) == 0.1
    half = Tail(np.arange(100) % 2 * 1.0, null)
    assert smallest_share(half, unaltered) == 0.2
    assert smallest_share(unaltered, unaltered) is None


def test_nearest_height_takes_any_slice_where_none_is_known():
    found = nearest_height(np.array([0.1, 0.9, np.nan]), np.array([0.8, 0.0, np.nan]))
    assert found.tolist()[:2] == [1, 0]
    assert 0 <= found[2] < 3
