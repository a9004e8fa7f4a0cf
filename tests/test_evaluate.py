"""evaluate.py on a tiny trained run: evaluation.json, the table, the figures, and what each comparison compares."""

import contextlib
import errno
import io
import json
import math
import re
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from trainings import arguments

import anatomy
import comparison
import evaluate
import metrics
import predict
from anatomy import Coherence, Tail
from c2st import TwoSampleTest
from checkpoints import read_config
from console import RunError
from copying import Copies
from dataset import Slices, load_dataset
from utils import autocast

SAMPLE_KEYS = {
    "c2st_accuracy",
    "c2st_interval",
    "c2st_p_value",
    "coverage",
    "coverage_by_patient",
    "density",
    "density_by_patient",
    "random_feature_frechet",
    "sliced_wasserstein",
    "sliced_wasserstein_levels",
    "ms_ssim_diversity",
    "duplicates",
}
RECONSTRUCTION_KEYS = {"ssim", "ssim_unit_range", "ms_ssim", "psnr", "psnr_per_slice", "mse", "bits_per_pixel"}
FIGURES = ["copying.png", "evaluation.png", "membership.png", "outliers.png"]
COPYING_KEYS = {"min_distance", "median_distance", "memorisation_rate", "c_t"}


@pytest.fixture(scope="module")
def quick():
    """Fewer patches, pairs and updates of the networks of anatomy.py; test_metrics.py tests the metrics themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PATCHES", 256)
        patch.setattr(metrics, "PAIRS", 10)
        patch.setattr(anatomy, "JUDGE_UPDATES", 2)
        patch.setattr(anatomy, "MATCHER_UPDATES", 2)
        yield


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, trained, quick):
    """Evaluate a copy of the run; return the folder of figures, the content of evaluation.json and the output."""

    def run(draw=False, **options):
        folder = tmp_path_factory.mktemp("evaluated")
        shutil.copytree(trained.run, folder / "run")
        given = {"run": folder / "run", "images": folder / "images", "device": "cpu"} | options
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            outputs = ("evaluation_figure", "write_copying_figure", "membership_figure", "outliers_figure")
            for figure in (*outputs, "report_samples", "write_report"):
                if not draw:  # they take half of the time
                    patch.setattr(evaluate, figure, lambda *_: None)
            evaluate.main(arguments(**given))
        results = json.loads((folder / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)
        return folder / "images", results, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def evaluation(evaluated):
    return evaluated(draw=True, num=6)


def numbers_of(value):
    """All numbers of a nested object."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in numbers_of(part)] if isinstance(value, list) else [value]


def test_evaluation_json_has_all_metrics_of_all_comparisons(evaluation):
    _, results, _ = evaluation
    assert results["settings"] == {
        "split": "test",
        "heldout_slices": 4,
        "heldout_slices_in_all": 4,
        "heldout_cases": 1,
        "training_slices": 12,
        "training_slices_searched": 12,
        "training_cases": 3,
        "samples": 6,
        "samples_compared": 6,
        "seed": 0,
        "temperature": 1.0,
        "top_p": 0.995,
        "guidance": 1.0,
        "refiner_noise": 1.0,
    }
    for part in (results, results["training"]):
        assert part["reconstructions"].keys() == RECONSTRUCTION_KEYS
        assert part["codes"].keys() == {"used", "perplexity"}
        assert part["prior"].keys() - {"jpeg2000_bits_per_slice"} == {
            "nats_per_code",
            "bits_per_code",
            "bits_per_slice",
        }
    for part in (results, results["decoder_alone"], results["prior_alone"], results["baseline"]):
        assert part["samples"].keys() == SAMPLE_KEYS
        assert part["copying"].keys() == COPYING_KEYS
        low, high = part["samples"]["c2st_interval"]
        assert 0 <= low <= part["samples"]["c2st_accuracy"] <= high <= 1
        assert part["samples"]["c2st_p_value"] == 1  # one held-out patient
        assert part["samples"]["duplicates"] is None  # one held-out patient cannot say what is alike
    numbers = numbers_of({**results, "settings": {}})
    assert numbers.count(None) == 4 and all(number is None or math.isfinite(number) for number in numbers)
    assert results["reconstructions"]["bits_per_pixel"] == 4 / 16  # 16 codes for 4x4 pixels
    prior = results["prior"]
    assert prior["bits_per_code"] == pytest.approx(prior["nats_per_code"] / math.log(2))
    assert prior["bits_per_slice"] == pytest.approx(prior["bits_per_code"] * 16 * 8)
    levels = results["samples"]["sliced_wasserstein_levels"]
    assert levels.keys() == {"64x32", "32x16"}
    assert results["samples"]["sliced_wasserstein"] == pytest.approx(sum(levels.values()) / 2)


def test_printed_table_agrees_with_evaluation_json(evaluation):
    _, results, printed = evaluation
    lines = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    ssim = [f"{part['reconstructions']['ssim']:.3f}" for part in (results, results["training"])]
    assert lines["SSIM, Gaussian window"][:2] == ssim
    parts = [results, results["decoder_alone"], results["prior_alone"], results["baseline"]]
    for label, key in (("coverage, as published", "coverage"), ("coverage, by patient", "coverage_by_patient")):
        assert lines[label][:4] == [f"{part['samples'][key]:.3f}" for part in parts]
    assert lines["data-copying C_T"][:4] == [f"{part['copying']['c_t']:.1f}" for part in parts]
    interval = results["baseline"]["samples"]["c2st_interval"]
    assert lines["95 % interval"][3] == "-".join(f"{end:.2f}" for end in interval)


def test_a_model_card_is_written_and_its_other_parts_are_kept(evaluated, monkeypatch, caplog):
    images, _, printed = evaluated()
    card = images.with_name("run") / "MODEL_CARD.md"
    assert "| training slices, patients | 12, 3 |" in card.read_text()
    assert "MODEL_CARD.md" in printed
    card.write_text("mine")
    evaluate.write_model_card(card, None, {})
    assert card.read_text() == "mine"
    assert "MODEL_CARD.md is left as it is: it lacks the lines" in caplog.text


def test_single_slices_are_judged(evaluation):
    _, results, printed = evaluation
    assert results["slices"].keys() == {"samples", "reconstructions", "heldout_slices"}
    for own in results["slices"].values():
        assert own.keys() == {"copied", "copied_expected", "tail_share", "tail_p_value"}
        assert 0 <= own["copied"] <= 1
        assert 0 < own["tail_p_value"] <= 1
    lines = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    assert lines["called copies"][:3] == [f"{own['copied']:.3f}" for own in results["slices"].values()]
    assert all(called["training_slice"].endswith(".nii.gz") for called in results["called_copies"])


def test_membership_is_inferred_from_networks_and_samples(evaluation):
    _, results, printed = evaluation
    assert (results["membership"]["patients"], results["membership"]["slices"]) == (1, 4)
    attacks = {"likelihood", "calibrated", "guide", "min_k", "neighbourhood", "reconstruction", "refiner", "samples"}
    assert results["membership"]["attacks"].keys() == attacks
    for values in results["membership"]["attacks"].values():
        assert values.keys() == {
            "auc",
            "auc_interval",
            "auc_by_patient",
            "auc_by_patient_interval",
            "tpr_at_1_percent_fpr",
        }
        assert 0 <= values["auc"] <= 1
    lines = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    assert lines["AUC"][:8] == [f"{values['auc']:.3f}" for values in results["membership"]["attacks"].values()]


def test_evaluation_writes_its_figures(evaluation):
    images, _, _ = evaluation
    assert sorted(path.name for path in images.iterdir()) == FIGURES
    assert imread(images / "evaluation.png").shape[1] == 1440
    assert imread(images / "copying.png").shape[1] == pytest.approx(6 * 2.4 * 120, rel=0.05)


def test_a_report_of_patients_has_samples_only(evaluation):
    """The phantom's files in a folder of their own are taken for patients."""
    images, results, printed = evaluation
    report = (images.with_name("run") / "report.html").read_text(encoding="utf-8")
    assert "MODEL_CARD.md and report.html" in printed
    assert report.count("<img") == 6 - len(results["called_copies"])
    assert "<span>DATA</span>" in report and "case_" not in report and str(images.parent) not in report
    assert f'<td data-column="test">{results["reconstructions"]["ssim"]:.3f}</td>' in report


@pytest.mark.parametrize(
    ("data", "table", "given", "phantom"),
    [
        ("phantom", None, None, True),
        ("somewhere", None, None, False),
        ("phantom", "slices.csv", None, False),
        ("phantom", "slices.csv", "phantom", False),
        ("phantom", None, "somewhere", False),
    ],
)
def test_slices_that_a_table_lists_are_of_patients(run_config, data, table, given, phantom):
    """Without --data, a table's folder is read, and not the phantom."""
    options = evaluate.parse_options(["--data", given] if given else [])
    assert evaluate.data_options(options, run_config(data=data, table=table)).on_phantom == phantom


def test_a_report_has_real_slices_if_asked(trained, tmp_path, quick):
    shutil.copytree(trained.run, tmp_path / "run")
    given = {"run": tmp_path / "run", "images": tmp_path / "images", "device": "cpu", "num": 6}
    evaluate.main([*arguments(**given), "--report-real-slices"])
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert report.count("<img") == 2 * 6 + 3 * 4 + 2 * 3  # samples and training slices, held-out slices, similar pairs
    assert "case_" not in report and str(tmp_path) not in report


def test_called_copies_are_left_out_with_the_training_slices(trained):
    """Samples 0 to 3 are the highest first; 1 is called a copy."""
    data = load_dataset(str(trained.data), (64, 32), (4, 4), 0)
    slices = data.train.batch([4, 5, 6, 7])
    zeros, unmoved = torch.zeros(4), torch.eye(2, 3).repeat(4, 1, 1)
    copied = torch.tensor([False, True, False, False])
    copies = Copies(zeros, torch.tensor([4, 5, 6, 0]), copied, 1.0, 0.01, unmoved, zeros, zeros, zeros)
    anatomy = Coherence({}, {"samples": Tail(np.array([0, 0, 1, 0.25]), np.zeros(1))})
    positions = torch.tensor([0.9, 0.7, 0.5, math.nan])
    shown = evaluate.report_samples(slices, positions, copies, anatomy, None)
    assert shown.numbers.tolist() == [2, 0, 3]
    assert shown.incoherent.tolist() == [True, False, False]
    assert shown.nearest is None
    shown = evaluate.report_samples(slices, positions, copies, anatomy, data.train)
    assert shown.numbers.tolist() == [2, 1, 0, 3]
    assert shown.copied.tolist() == [False, True, False, False]
    np.testing.assert_allclose(shown.nearest[:3], shown.slices[:3], atol=1e-5)
    assert abs(shown.nearest[3] - shown.slices[3]).max() > 0.1
    copies = copies._replace(copied=torch.ones(4, dtype=torch.bool))
    assert len(evaluate.report_samples(slices, positions, copies, anatomy, None).slices) == 0


def test_evaluation_is_bounded(evaluated, monkeypatch):
    """Of 12 training slices of 3 patients, 8 are searched, and of 4 test slices all are evaluated."""
    monkeypatch.setattr(evaluate, "MAX_TRAINING", 8)
    monkeypatch.setattr(evaluate, "MAX_HELD_OUT", 4)
    monkeypatch.setattr(evaluate, "MIN_TRAINING", 8)
    _, results, printed = evaluated()
    settings = results["settings"]
    assert (settings["training_slices"], settings["training_slices_searched"], settings["training_cases"]) == (12, 8, 3)
    assert (settings["heldout_slices"], settings["heldout_slices_in_all"]) == (4, 4)
    assert "of 12 training slices, 8 are used, of patients drawn at random" in printed
    assert "searching 8 training slices for copies" in printed
    assert "test slices, " not in printed  # all are used


def test_a_log_that_cannot_be_read_is_a_warning_and_a_missing_one_is_not(trained, tmp_path, caplog):
    shutil.copytree(trained.run, tmp_path / "run")
    assert evaluate.logged_curves(tmp_path / "run").keys() == {"vqvae", "prior", "refiner"}
    (tmp_path / "run" / "metrics.jsonl").write_text("{")
    assert evaluate.logged_curves(tmp_path / "run") == {}
    assert "metrics.jsonl line 1 cannot be used" in caplog.text
    caplog.clear()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert evaluate.logged_curves(tmp_path / "run") == {}
    assert not caplog.text


def test_reconstruction_metrics_agree_with_predict(evaluation, trained, tmp_path, capsys):
    """Up to the rounding of reconstructions to 256 grey levels, which `predict.py --reconstruct` does not do."""
    _, results, _ = evaluation
    given = {"run": trained.run, "out": tmp_path / "out", "images": tmp_path / "images", "device": "cpu"}
    predict.main(arguments(**given, reconstruct=[trained.data / "keras_slices_test"]))
    ssim, psnr = map(float, re.search(r"SSIM (-?[0-9.]+), PSNR (-?[0-9.]+) dB", capsys.readouterr().out).groups())
    assert results["reconstructions"]["ssim"] == pytest.approx(ssim, abs=2e-3)
    assert results["reconstructions"]["psnr"] == pytest.approx(psnr, abs=0.02)


def test_validation_split_of_moved_data_reproduces_the_best_validation_loss(evaluated, trained, tmp_path, monkeypatch):
    """The prior's loss equals the lowest of training, up to bfloat16. The default is as many samples as slices."""
    lines = map(json.loads, (trained.run / "metrics.jsonl").read_text().splitlines())
    logged = [line["nats_per_code"] for line in lines if (line["stage"], line["split"]) == ("prior", "validate")]
    shutil.copytree(trained.data, tmp_path / "moved")
    monkeypatch.setattr(evaluate, "DEFAULT_NUM", 1)
    _, results, _ = evaluated(split="validate", data=tmp_path / "moved")
    assert (results["settings"]["split"], results["settings"]["samples"]) == ("validate", 4)
    assert results["prior"]["nats_per_code"] == pytest.approx(min(logged), rel=0.01)


def test_evaluation_does_not_depend_on_the_batch_size(evaluation, evaluated):
    _, results, _ = evaluated(num=6, batch_size=4)
    for part, other in ((results, evaluation[1]), (results["baseline"], evaluation[1]["baseline"])):
        assert part["samples"]["sliced_wasserstein"] == pytest.approx(other["samples"]["sliced_wasserstein"], rel=1e-3)
        assert part["copying"]["median_distance"] == pytest.approx(other["copying"]["median_distance"], rel=1e-3)
    assert results["prior"]["nats_per_code"] == pytest.approx(evaluation[1]["prior"]["nats_per_code"], rel=1e-4)


def test_temperature_and_seed_change_the_evaluated_samples(evaluated, evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "DEFAULT_NUM", 5)  # more than held-out slices
    _, results, _ = evaluated(temperature=1e-6, seed=7)
    assert results["settings"] | {"seed": 7, "temperature": 1e-6, "samples": 5} == results["settings"]
    assert results["samples"]["ms_ssim_diversity"] != evaluation[1]["samples"]["ms_ssim_diversity"]


def test_copying_metrics_detect_a_model_that_copies(evaluated, trained, monkeypatch):
    """Its samples are training slices, flipped."""
    data = load_dataset(str(trained.data), (64, 32), (4, 4), 0)
    copies = data.train.batch(range(6)).flip(2)

    def draw_samples(options, networks, sample_ids, positions, device):
        return predict.Samples(copies, torch.zeros(6, 16, 8, dtype=torch.int64), torch.linspace(0, 1, 6), (1.0, 1.0))

    monkeypatch.setattr(evaluate, "draw_samples", draw_samples)
    _, results, _ = evaluated(num=6)
    assert results["copying"]["median_distance"] == 0
    for part in (results, results["prior_alone"]):
        assert part["copying"]["memorisation_rate"] == 1
        assert part["copying"]["c_t"] < -2
    assert results["baseline"]["copying"]["min_distance"] > 0


def found_copies(distances, threshold=1.0):
    """Copies at these distances; none is called."""
    zeros = torch.zeros(len(distances))
    return Copies(zeros, zeros.long(), zeros > 0, threshold, 0.01, zeros, zeros, distances, zeros.long())


def test_copies_are_unknown_without_a_threshold():
    tail = Tail(np.zeros(2), np.zeros(10))
    anatomy = Coherence({}, {"a": tail, "b": tail})
    copies = {"a": found_copies(torch.zeros(2)), "b": found_copies(torch.zeros(2), math.inf)}
    found = comparison.slice_metrics(copies, anatomy)
    assert found["a"]["copied"] == 0
    assert math.isnan(found["b"]["copied"])


def test_incoherent_anatomy_is_counted_by_thirds_of_the_heights():
    positions = np.array([0.0, 0.3, 0.4, 0.7, 1.0, 1.0, np.nan])
    incoherent = np.array([1.0, 0.5, 0.0, 0.0, 1.0, 0.5, 1.0])
    found = comparison.incoherent_by_height(incoherent, positions)
    assert found == {"low": 0.75, "middle": 0.0, "high": 0.5}
    assert math.isnan(comparison.incoherent_by_height(incoherent[:2], positions[:2])["high"])


def test_each_comparison_uses_the_right_sets_of_slices(evaluated, trained, monkeypatch):
    """The sets passed to the C2ST and to the data-copying test, identified by the mean of each slice."""
    compared, copying, searched = [], [], []

    def means(slices):
        return slices.mean((1, 2, 3)).tolist()

    def c2st(slices, cases, reference, reference_cases, examples, example_cases):
        assert [*map(len, (slices, reference, examples))] == [*map(len, (cases, reference_cases, example_cases))]
        compared.append((means(slices), means(reference), means(examples)))
        return TwoSampleTest(0.5, (0.4, 0.6), 1.0)

    def find_copies(slices, load_training, count, cases, flip_axis):
        assert (len(cases), flip_axis) == (count, 2)
        searched.append(count)
        return found_copies(slices.mean((1, 2, 3)))

    def nearest_distances(slices, others, flip_axis):
        searched.append(len(others))
        return torch.zeros(len(slices))

    def data_copying_statistic(samples, reference):
        copying.append((samples.distances.tolist(), reference.distances.tolist()))
        return 0.0

    for module, replacement in (
        (evaluate, c2st),
        (evaluate, nearest_distances),
        (comparison, find_copies),
        (comparison, data_copying_statistic),
    ):
        monkeypatch.setattr(module, replacement.__name__, replacement)
    _, results, table = evaluated(num=14, batch_size=5)  # two more than training slices
    assert (results["settings"]["samples"], results["settings"]["samples_compared"]) == (14, 12)
    assert "14 samples; only the rows on copying use more than the first 12" in table
    data = load_dataset(str(trained.data), (64, 32), (4, 4), 0)
    config, cpu = read_config(trained.run), torch.device("cpu")
    vqvae, _, _, refiner = predict.load_networks(trained.run, config, cpu)
    real, training = data.test.batch(range(4)), data.train.batch(range(12))
    grids = [vqvae.encode(slices) for slices in (real, training)]
    with autocast(cpu):
        refined, refined_training = (  # with sample ids that no sample has
            metrics.round_to_grey_levels(refiner.sample(range(10**6, 10**6 + len(codes)), codes, vqvae))
            for codes in grids
        )
    assert searched == [12, 14]  # training slices; samples, by the attack on them
    samples, all_samples = compared[0][0], copying[0][0]
    assert (len(samples), len(all_samples)) == (12, 14)
    assert all_samples[:12] == samples
    first = torch.from_numpy(metrics.two_fold_split(data.train.cases))
    expected = [(samples, means(real), means(training)), (means(refined_training), means(real), means(training))]
    expected += [(samples, means(refined), means(refined_training))]
    expected += [(means(training[first]), means(real), means(training[~first]))]
    np.testing.assert_allclose(sum(sum(compared, ()), []), sum(sum(expected, ()), []), atol=1e-5)
    halves = (means(real[[0, 2]]), means(real[[1, 3]]))
    expected = [(all_samples, means(real)), (means(refined), means(real)), (all_samples, means(refined)), halves]
    np.testing.assert_allclose(sum(sum(copying, ()), []), sum(sum(expected, ()), []), atol=1e-5)
    for part, slices in ((results, real), (results["training"], training)):  # without the refiner
        decoded = metrics.round_to_grey_levels(vqvae.decode(vqvae.encode(slices)))
        assert part["reconstructions"]["mse"] == pytest.approx((decoded - slices).square().mean().item(), rel=1e-4)


def test_data_other_than_the_training_data_are_refused(trained, tmp_path, error_line):
    """Memorisation can be measured against the training slices only."""
    other = tmp_path / "other"
    shutil.copytree(trained.data, other)
    next((other / "keras_slices_train").iterdir()).unlink()
    given = {"run": trained.run, "images": tmp_path / "images", "data": other}
    error = error_line("evaluate.py", arguments(**given))
    assert f"{other} does not hold the data" in error
    assert "--data" in error
    assert not (trained.run / "evaluation.json").exists()


def test_missing_training_data_are_an_error_that_names_the_folder(trained, tmp_path, error_line):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    config = json.loads((run / "config.json").read_text())
    config["options"]["data"] = "gone"
    (run / "config.json").write_text(json.dumps(config))
    error = error_line("evaluate.py", arguments(run=run, images=tmp_path / "images"))
    assert "are not in gone: name their folder with --data" in error


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"num": 3}, "argument --num: 3 is not at least 4"),
        ({"position": 0.5}, "unrecognized arguments: --position 0.5"),
        ({"split": "train"}, "argument --split: invalid choice: 'train'"),
        ({"data": ""}, "argument --data: it is empty"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_invalid_options_are_one_line_and_write_nothing(trained, tmp_path, monkeypatch, error_line, given, part):
    monkeypatch.chdir(tmp_path)
    assert part in error_line("evaluate.py", arguments(**{"run": trained.run} | given))
    assert not (trained.run / "evaluation.json").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["run", "images"])
def test_unwritable_folders_are_refused_before_the_evaluation(trained, tmp_path, monkeypatch, option):
    """As on a file system that is mounted read-only."""
    given = {"run": trained.run, "images": tmp_path, "device": "cpu"}
    real = tempfile.TemporaryFile

    def refuse(dir):
        if dir == given[option]:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("began"))
    with pytest.raises(RunError, match=f"--{option} .* cannot be written: Read-only file system"):
        evaluate.main(arguments(**given))


def test_evaluation_json_has_null_for_nan(evaluated, monkeypatch):
    """NaN is not JSON."""
    monkeypatch.setattr(comparison, "ms_ssim_diversity", lambda _: math.nan)
    _, results, _ = evaluated(num=6)
    assert results["samples"]["ms_ssim_diversity"] is None
    assert results["baseline"]["samples"]["coverage"] >= 0


def test_a_split_with_too_few_slices_is_refused(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MIN_SLICES", 5)
    with pytest.raises(RunError, match="fewer than 8 training or 5 test slices: choose another --split"):
        evaluated(num=6)


def test_the_data_are_read_as_in_training(prepared):
    given = SimpleNamespace(run=prepared.run, data=None, pattern=None, table=None, split="test", self_test=False)
    config = read_config(prepared.run)
    data = evaluate.training_data(given, config)
    assert data.slice_size == (48, 24) and (data.low, data.scale) == (config.intensity.low, config.intensity.scale)
    np.testing.assert_allclose(data.affine, config.affine)


def test_selected_slices_keep_their_patients():
    pixels = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    cases = ["case_004", None, "sub_001"]
    slices = Slices(pixels, ["a", "b", "c"], cases, *np.float32([[0] * 3, [1] * 3, [0] * 3]))
    selected = evaluate.select(slices, np.array([2, 1]), torch.device("cpu"))
    assert selected.cases == ["sub_001", None]
    assert torch.equal(selected.slices, slices.batch([2, 1]))
