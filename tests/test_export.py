"""export.py: what an export holds and never holds, and that it samples, trains and is evaluated like its run."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model_card import RESULTS
from trainings import WEIGHTS, arguments, lines_of, same_weights

import checkpoints
import evaluate
import export
import model_card
import predict
import train
import trainer
from checkpoints import read_config
from console import RunError
from dataset import DataError

EXPORTED = {"README.md", "config.json", *WEIGHTS}
NAMES = ("mueller", "schmidt")  # of patients


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, to be modified."""
    return shutil.copytree(trained.run, tmp_path / "run")


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory):
    """The run, exported in float32 and in float16."""
    folder = tmp_path_factory.mktemp("exports")
    for name, more in (("full", []), ("half", ["--half"])):
        export.main(["export", str(trained.run), str(folder / name), *more])
    return folder


def draw(run, out, **options):
    """Draw 4 samples; return their codes, and the bytes of their files."""
    predict.main(arguments(run=run, out=out, images=out / "images", num=4, device="cpu", **options))
    return np.load(out / "codes.npy"), [path.read_bytes() for path in sorted(out.glob("sample_*"))]


def networks_of(run):
    device, config = torch.device("cpu"), read_config(run)
    return predict.load_networks(run, config, device)


# ---------------------------------------------------------------- weights


def test_an_export_has_what_sampling_needs_and_no_more(trained, exports):
    for name in ("full", "half"):
        assert {file.name for file in (exports / name).iterdir()} == EXPORTED
    stored = load_file(exports / "full" / "vqvae.safetensors")
    assert load_file(trained.run / "vqvae.safetensors").keys() - stored.keys() == {"codebook.sums"}
    for name in WEIGHTS:
        assert (exports / "half" / name).stat().st_size < 0.75 * (trained.run / name).stat().st_size


def test_an_export_gives_the_samples_of_the_run(trained, exports, tmp_path):
    of_run, of_export = (draw(run, tmp_path / run.name) for run in (trained.run, exports / "full"))
    assert np.array_equal(of_run[0], of_export[0])
    assert of_run[1] == of_export[1]


def test_a_run_without_a_guide_is_exported_without_one(copied, tmp_path):
    (copied / "guide.safetensors").unlink()
    export.main(["export", str(copied), str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} == EXPORTED - {"guide.safetensors"}
    assert "guide.safetensors" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert networks_of(tmp_path / "out").guide is None


def test_a_run_whose_guide_was_removed_after_its_evaluation_is_refused(copied, tmp_path, error_line):
    (copied / "evaluation.json").write_text(json.dumps(RESULTS))
    export.main(["export", str(copied), str(tmp_path / "whole")])
    (copied / "guide.safetensors").unlink()
    error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / "out")])
    assert f"{copied} was evaluated with guide.safetensors: run evaluate.py again" in error
    assert not (tmp_path / "out").exists()


def test_an_export_of_an_export_keeps_what_people_wrote(copied, tmp_path):
    card = model_card.TEMPLATE.read_text().replace("NAME OF THE RUN", "our run")
    (copied / "MODEL_CARD.md").write_text(f"{card}\n## Files\n\nOf the scanner.\n")
    (copied / "evaluation.json").write_text(json.dumps(RESULTS))
    for run, out in ((copied, tmp_path / "first"), (tmp_path / "first", tmp_path / "second")):
        export.main(["export", str(run), str(out)])
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("first", "second"))
    assert "# Model card: our run" in first
    assert "| C2ST accuracy | 0.60 |" in first
    assert second == first


def test_an_empty_folder_is_filled_by_a_link_to_it_but_not_under_ones_feet(trained, tmp_path, monkeypatch):
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to("linked")
    export.main(["export", str(trained.run), str(tmp_path / "link")])
    assert {file.name for file in (tmp_path / "linked").iterdir()} == EXPORTED
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunError, match="is the current folder"):
        export.main(["export", str(trained.run), "."])


def test_half_precision_rounds_matrices_to_11_bits_and_keeps_vectors(trained, exports):
    for network, rounded in zip(networks_of(trained.run), networks_of(exports / "half")):
        others = rounded.state_dict()
        for name, tensor in network.state_dict().items():
            assert others[name].dtype == torch.float32
            if name == "codebook.sums":
                continue
            if tensor.ndim > 1:
                torch.testing.assert_close(others[name], tensor, rtol=2**-11, atol=2**-25)
            else:
                assert torch.equal(others[name], tensor)


def test_half_precision_hardly_changes_codes(trained, exports, tmp_path):
    codes, rounded = (draw(run, tmp_path / run.name)[0] for run in (trained.run, exports / "half"))
    assert (codes == rounded).mean() > 0.9  # after one other code, the rest of a sample may differ


def test_weights_too_large_for_half_precision_are_refused(copied, tmp_path, error_line):
    prior = networks_of(copied).prior
    with torch.no_grad():
        prior.row_embedding.view(-1)[0] = 1e5
    checkpoints.save_weights(copied / "prior.safetensors", prior)
    error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / "out"), "--half"])
    assert "row_embedding of prior.safetensors does not fit into float16: leave out --half" in error
    assert not (tmp_path / "out").exists()
    export.main(["export", str(copied), str(tmp_path / "out")])


def test_the_sums_that_an_export_leaves_out_follow_from_the_rest(trained, exports):
    sums, others = (networks_of(run).vqvae.codebook.sums for run in (trained.run, exports / "full"))
    assert not torch.equal(sums, torch.zeros_like(sums))
    torch.testing.assert_close(others, sums)


def test_a_training_starts_from_an_export(exports, options, monkeypatch):
    """Without updates, all weights stay, and k-means is left out."""
    monkeypatch.setattr(trainer.Trainer, "train_update", lambda self: None)
    monkeypatch.setattr(train, "encode_latents", lambda *_: pytest.fail("k-means began"))
    train.main(arguments(**options, init=exports / "half"))
    start = networks_of(exports / "half")
    for network, own in zip(start._replace(guide=start.prior), networks_of(options["run"])):
        given = network.state_dict()
        kept = {name: tensor for name, tensor in own.state_dict().items() if name not in train.RefinerTrainer.fitted}
        assert same_weights(kept, {name: given[name] for name in kept})


# ---------------------------------------------------------------- names


@pytest.fixture
def private(options, slices_folder, trained, tmp_path):
    """A finished run with patients' names wherever a user can write: paths, files, a pattern, a table, results."""
    data, init = tmp_path / "Mueller" / "data", tmp_path / "Schmidt" / "init"
    shutil.copytree(trained.run, init)
    for split in ("train", "validate", "test"):
        for path in (slices_folder / f"keras_slices_{split}").iterdir():
            patient = data / split / f"Schmidt_{path.name}"
            patient.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, patient)
    given = {"data": data, "run": tmp_path / "Mueller_run", "images": tmp_path / "Mueller_images", "init": init}
    pattern = r"Schmidt_case_(?P<case>\d+)_week_(?P<week>\d+)_slice_(?P<slice>\d+)"
    given = options | given | {"pattern": pattern}
    train.main(arguments(**given))
    config = read_config(given["run"])
    command = ["train.py", "--data", str(data)]
    checkpoints.write_config(given["run"], config.model_copy(update={"command": command}))
    results = RESULTS | {"called_copies": [{"sample": 3, "training_slice": "Schmidt.nii", "score": 1.0}]}
    (given["run"] / "evaluation.json").write_text(json.dumps(results))
    evaluate.write_model_card(given["run"] / "MODEL_CARD.md", config, results)
    return given


def occurrences(folder):
    """Return the files that hold a patient's name, in their own name or in any of their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes().lower() for path in files}
    return {
        name
        for name, content in contents.items()
        for patient in NAMES
        if patient.encode() in content or patient.encode("utf-16-le") in content or patient in name.lower()
    }


@pytest.mark.parametrize("more", [[], ["--half"]])
def test_no_name_of_a_patient_is_exported(private, tmp_path, more):
    run, out = private["run"], tmp_path / "out"
    assert occurrences(run) == {"config.json", "data.json", "evaluation.json"}
    config = read_config(run)
    table = config.options.model_copy(update={"table": tmp_path / "Mueller.csv"})
    checkpoints.write_config(run, config.model_copy(update={"options": table}))
    export.main(["export", str(run), str(out), *more])
    assert {file.name for file in out.iterdir()} == EXPORTED
    assert not occurrences(out)
    exported = read_config(out)
    for name in ("slice_size", "intensity", "affine", "positions", "fingerprint", "libraries", "git_revision"):
        assert getattr(exported, name) == getattr(config, name)
    assert str(exported.options.table) == "TABLE"
    assert exported.command[-4:] == ["--data", "DATA", "--run", "RUN"]


def test_an_export_is_evaluated_where_the_data_are(private, tmp_path):
    export.main(["export", str(private["run"]), str(tmp_path / "out")])
    given, config = {"run": tmp_path / "out"}, read_config(tmp_path / "out")
    with pytest.raises(RunError, match="are not in DATA: name their folder with --data"):
        evaluate.training_data(evaluate.parse_options(arguments(**given)), config)
    given["data"] = private["data"]
    with pytest.raises(DataError, match="PATTERN. does not match 20 files"):
        evaluate.training_data(evaluate.parse_options(arguments(**given)), config)
    given["pattern"] = private["pattern"]
    data = evaluate.training_data(evaluate.parse_options(arguments(**given)), config)
    assert len(data.train) == 12


def test_slices_are_reconstructed_with_an_export(private, tmp_path):
    export.main(["export", str(private["run"]), str(tmp_path / "out")])
    given = {"run": tmp_path / "out", "reconstruct": private["data"] / "test", "out": tmp_path / "reconstructions"}
    predict.main(arguments(**given, images=tmp_path / "images", device="cpu"))
    assert len(list((tmp_path / "reconstructions").glob("*_reconstruction.nii.gz"))) == 4


# ---------------------------------------------------------------- the model card


def front_matter(card):
    start, metadata, _ = card.split("---\n", 2)
    assert start == ""
    return dict(line.split(": ", 1) for line in metadata.splitlines() if ": " in line)


def test_the_card_has_what_a_hub_reads_and_how_to_use_the_weights(exports):
    card = (exports / "half" / "README.md").read_text(encoding="utf-8")
    metadata = front_matter(card)
    assert metadata == {"library_name": "prostatevq", "pipeline_tag": "unconditional-image-generation"}
    assert "The run was not evaluated." in card
    assert "python predict.py --run FOLDER" in card
    assert "stored in float16" in card
    assert "stored in float16" not in (exports / "full" / "README.md").read_text(encoding="utf-8")
    for name, network in networks_of(exports / "half")._asdict().items():
        count = sum(weight.numel() for weight in network.parameters())
        assert f"| `{name}.safetensors` | weights: {count:,} parameters |" in card


def test_only_weights_of_the_phantom_have_a_licence(copied, tmp_path):
    config = read_config(copied)
    phantom = config.options.model_copy(update={"data": "phantom"})
    checkpoints.write_config(copied, config.model_copy(update={"options": phantom}))
    export.main(["export", str(copied), str(tmp_path / "out")])
    assert front_matter((tmp_path / "out" / "README.md").read_text())["license"] == "mit"
    assert read_config(tmp_path / "out").options.data == "phantom"


def test_the_card_keeps_what_people_wrote_and_the_measurements(copied, tmp_path):
    results = RESULTS | {"slices": {**RESULTS["slices"], "samples": RESULTS["slices"]["samples"] | {"copied": None}}}
    (copied / "evaluation.json").write_text(json.dumps(results))
    card = model_card.TEMPLATE.read_text().replace("NAME OF THE RUN", "our run")
    (copied / "MODEL_CARD.md").write_text(card)
    export.main(["export", str(copied), str(tmp_path / "out")])
    exported = (tmp_path / "out" / "README.md").read_text()
    assert "# Model card: our run" in exported
    assert "| samples called copies of a training slice | unknown |" in exported
    assert math.isnan(export.read_evaluation(copied)["slices"]["samples"]["copied"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("evaluation.json", "{"), ("evaluation.json", "[" * 9999), ("config.json", "{}"), ("prior.safetensors", "")],
)
def test_files_that_cannot_be_used_are_named(copied, tmp_path, error_line, name, content):
    (copied / name).write_text(content)
    error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / "out")])
    assert f"{copied / name} cannot be used" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", text)
        for text in ("{}", "[]", '"text"', '{"settings": {}}', json.dumps(RESULTS | {"prior": 3}))
    ]
    + [("MODEL_CARD.md", "# mine"), ("MODEL_CARD.md", "\0" * (1 << 21))],
)
def test_a_card_that_cannot_be_filled_in_is_named(copied, tmp_path, error_line, name, content):
    (copied / name).write_text(content)
    error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / "out")])
    assert f"{copied / 'MODEL_CARD.md'} cannot be filled in from evaluation.json" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- the folder


def test_an_export_needs_a_new_or_an_empty_folder(copied, tmp_path, error_line):
    for path in (tmp_path / "empty", tmp_path / "full"):
        path.mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("full", "file"):
        error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / name)])
        assert f"{tmp_path / name} exists and is not empty: choose another folder" in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    export.main(["export", str(copied), str(tmp_path / "empty")])
    export.main(["export", str(copied), str(tmp_path / "a" / "new" / "one")])
    assert {file.name for file in (tmp_path / "a" / "new" / "one").iterdir()} == EXPORTED


def test_an_interrupted_export_leaves_nothing(copied, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_config", stop)  # all other files are written
    with pytest.raises(KeyboardInterrupt):
        export.main(["export", str(copied), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_can_be_read_by_others(exports):
    mask = os.umask(0)
    os.umask(mask)
    assert (exports / "full").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_run_that_is_not_finished_is_exported_with_a_warning(copied, tmp_path, caplog, error_line):
    shutil.copyfile(copied / "checkpoint.previous.safetensors", copied / "checkpoint.safetensors")
    export.main(["export", str(copied), str(tmp_path / "out")])
    assert "is not complete" in caplog.text
    assert lines_of(copied)
    (copied / "refiner.safetensors").unlink()
    error = error_line("checkpoints.py", ["export", str(copied), str(tmp_path / "other")])
    assert "refiner.safetensors does not exist" in error
