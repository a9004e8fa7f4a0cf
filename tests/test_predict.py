"""Sampling, reconstructing and evaluating with a tiny trained run: what is written, and what it depends on."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from campaign import READ_BY_PREDICT, judge_run, tamper
from matplotlib.image import imread
from safetensors import safe_open
from safetensors.torch import save_file

import evaluate
import metrics
import predict
from checkpoints import lock, read_config, save_weights
from dataset import DataError, Slices, load_dataset
from metrics import reconstruction_metrics
from modules import GatedPixelCNN, PriorConfig, Refiner, RefinerConfig
from utils import RunError, printable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(tmp_path, trained):
    """`python predict.py --run ...` in this process; gives the folder it wrote to."""

    def call(name="samples", **options):
        folder = tmp_path / name
        given = {"run": trained.run, "out": folder, "images": tmp_path / "images", "device": "cpu"} | options
        predict.main(arguments(**given))
        return folder

    return call


def arguments(**options):
    texts = []
    for name, value in options.items():
        texts += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return texts


def pixels_of(folder, pattern="sample_*.nii.gz"):
    return np.stack([nib.load(path).get_fdata() for path in sorted(folder.glob(pattern))])


def codes_of(folder):
    return np.load(folder / "codes.npy")


# ---------------------------------------------------------------- samples


def test_samples_are_written_and_numbered(call, tmp_path, capsys):
    folder = call(num=11, batch_size=4)
    names = [f"sample_{n:06d}.nii.gz" for n in range(11)]
    assert sorted(path.name for path in folder.iterdir()) == ["codes.npy", *names]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["samples.png"]
    assert imread(tmp_path / "images" / "samples.png").shape[1] >= 8 * 64
    assert "11 slices" in capsys.readouterr().out


def test_samples_lie_in_space_as_the_training_slices_do(call, trained):
    trained_on = nib.load(next((trained.data / "keras_slices_train").glob("*_slice_0.nii.gz")))
    for path in call(num=2).glob("*.nii.gz"):
        image = nib.load(path)
        assert image.shape == (64, 32)
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine, trained_on.affine, atol=1e-4)
        np.testing.assert_allclose(image.affine, read_config(trained.run)["affine"], atol=1e-4)
        assert image.header.get_zooms() == pytest.approx(trained_on.header.get_zooms())
        assert image.header.get_zooms() == pytest.approx((410 / 64, 205 / 32))
        assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(trained_on.affine)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_samples_have_the_grey_levels_of_the_data(call, trained):
    scale = read_config(trained.run)["intensity"]["scale"]
    pixels = pixels_of(call(num=4))
    assert pixels.min() >= 0
    assert pixels.max() <= scale * (1 + 1e-6)
    assert pixels.max() > 0.2 * scale
    assert pixels.std() > 0


def test_codes_are_written(call):
    codes = codes_of(call(num=5, batch_size=2))
    assert codes.shape == (5, 16, 8)
    assert np.issubdtype(codes.dtype, np.integer)
    assert codes.min() >= 0
    assert codes.max() < 16
    assert len(np.unique(codes)) > 4


def load_decoders(run):
    """A run's VQ-VAE and refiner network."""
    vqvae = predict.load_weights(run / "vqvae.safetensors", predict.VQVAE, predict.VQVAEConfig)
    return vqvae, predict.load_weights(run / "refiner.safetensors", Refiner, RefinerConfig)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_files_are_the_decoded_codes_with_refiner(call, trained, seed):
    folder = call(num=3, seed=seed)
    vqvae, refiner = load_decoders(trained.run)
    codes = torch.from_numpy(codes_of(folder)).long()
    slices = refiner.sample(range(3), codes, vqvae, seed)[:, 0].numpy()
    scale = read_config(trained.run)["intensity"]["scale"]
    np.testing.assert_allclose(pixels_of(folder), (slices + 1) / 2 * scale, atol=1e-4 * scale)


def test_samples_of_the_same_codes_differ_in_refiner(call):
    folder = call(num=3, temperature=1e-6, position=0.5)
    codes, pixels = codes_of(folder), pixels_of(folder)
    assert (codes == codes[0]).all()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pixels[one] - pixels[other]).mean() > 0.01 * pixels.max()


def test_sample_n_is_the_same_in_any_batch_and_beside_any_others(call, trained):
    expected = call("all", num=7, batch_size=7)
    scale = read_config(trained.run)["intensity"]["scale"]
    for batch_size, num in ((1, 7), (3, 7), (32, 7), (2, 4), (5, 9)):
        folder = call(f"{batch_size}_{num}", num=num, batch_size=batch_size)
        shared = min(num, 7)
        assert (codes_of(folder)[:shared] == codes_of(expected)[:shared]).all()
        np.testing.assert_allclose(pixels_of(folder)[:shared], pixels_of(expected)[:shared], atol=1e-4 * scale)


def test_samples_differ_from_each_other_and_between_seeds(call):
    grids = np.concatenate([codes_of(call(f"seed_{seed}", num=4, seed=seed)) for seed in (0, 1)])
    assert len(np.unique(grids.reshape(8, -1), axis=0)) == 8


def test_temperature_and_top_p_reach_the_sampler(call):
    likeliest = codes_of(call("cold", num=3, temperature=1e-6, position=0.5))
    assert (likeliest == likeliest[0]).all()
    assert (codes_of(call("few", num=3, top_p=1e-6, position=0.5)) == likeliest).all()
    assert not (codes_of(call("usual", num=3, position=0.5)) == likeliest).all()


def test_the_position_reaches_the_sampler(call):
    low, high = (codes_of(call(f"at_{place}", num=4, position=place)) for place in (0, 1))
    assert not (low == high).all()


def test_the_strength_of_detail_reaches_the_samples(call, trained):
    """Without noise refiner depends on the codes alone; the codes are the same ones."""
    rough, smooth = (call(f"refiner_{strength}", num=3, refiner=strength) for strength in (1, 0))
    codes = torch.from_numpy(codes_of(smooth)).long()
    assert (codes_of(rough) == codes_of(smooth)).all()
    config = read_config(trained.run)
    device, scale = torch.device("cpu"), config["intensity"]["scale"]
    networks = predict.load_networks(trained.run, config, predict.load_vqvae(trained.run, config, device), device)
    expected = networks.refiner.sample(range(5, 8), codes, networks.vqvae, seed=9, noise_scale=0)[:, 0].numpy()
    np.testing.assert_allclose(pixels_of(smooth), (expected + 1) / 2 * scale, atol=1e-4 * scale)
    assert np.abs(pixels_of(rough) - pixels_of(smooth)).max() > 0.01 * scale


@pytest.mark.parametrize(
    "quantiles, position, refused",
    [
        ([0.2, 0.5, 0.8], 0.2, None),
        ([0.2, 0.5, 0.8], 0.8, None),
        ([0.2, 0.5, 0.8], None, None),
        ([], None, None),
        ([0.2, 0.5, 0.8], 0.1, "from 0.2 to 0.8"),
        ([0.5] * 101, 0.8, "from 0.5 to 0.5"),
        ([], 0.5, "not known: no names with slice numbers"),
    ],
)
def test_a_height_that_no_training_slice_had_is_refused(quantiles, position, refused):
    given = SimpleNamespace(position=position, run=Path("runs/a"))
    described = {"positions": {"quantiles": quantiles}}
    if refused:
        with pytest.raises(RunError, match=refused):
            predict.refuse_unknown_position(given, described)
    else:
        predict.refuse_unknown_position(given, described)


def test_an_incomplete_run_is_sampled_with_a_warning(call, trained, tmp_path, capsys):
    assert "warning" not in said(call, capsys, run=trained.run)
    copy = tmp_path / "copy"
    shutil.copytree(trained.run, copy)
    (copy / "training.pt").write_bytes(b"damaged")
    assert "warning" not in said(call, capsys, run=copy)
    (copy / "training.pt").unlink()
    assert "warning" not in said(call, capsys, run=copy)
    torch.save({"stage": "refiner", "log_bytes": 0}, copy / "training.pt")
    assert f"warning: {copy} is not complete" in said(call, capsys, run=copy)


def said(call, capsys, **options):
    call(num=1, **options)
    return capsys.readouterr().out


def test_slices_are_taken_with_their_cases():
    pixels = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    cases = ["case_004", None, "sub_001"]
    slices = Slices(pixels, ["a", "b", "c"], cases, np.zeros(3, np.float32), np.ones(3, np.float32))
    taken = evaluate.take(slices, np.array([2, 1]), torch.device("cpu"))
    assert taken.cases == ["sub_001", None]
    assert torch.equal(taken.slices, slices.batch([2, 1]))


def test_positions_are_drawn_as_in_the_training_data():
    described = {"quantiles": np.linspace(0.25, 0.75, 101).tolist(), "unknown": 0.25}
    positions = predict.draw_positions(range(800), 0, described).numpy()
    assert np.isnan(positions).mean() == pytest.approx(0.25, abs=0.08)  # 5 standard deviations
    known = positions[np.isfinite(positions)]
    assert 0.25 <= known.min() < 0.3
    assert 0.7 < known.max() <= 0.75
    assert known.mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(predict.draw_positions(range(5, 9), 0, described), positions[5:9])
    assert not np.array_equal(predict.draw_positions(range(800), 1, described), positions, equal_nan=True)
    assert predict.draw_positions(range(3), 0, {"quantiles": [], "unknown": 1}).isnan().all()


def test_samples_of_an_earlier_call_are_replaced_and_it_says_so(call, capsys):
    folder = call(num=5)
    assert "replaced" not in capsys.readouterr().out
    (folder / "notes.txt").write_text("mine")
    call(num=2)
    assert "6 files of an earlier call: replaced" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "codes.npy",
        "notes.txt",
        "sample_000000.nii.gz",
        "sample_000001.nii.gz",
    ]


# ---------------------------------------------------------------- reconstructions


def table_of(folder):
    with open(folder / "reconstructions.csv", newline="") as file:
        return list(csv.DictReader(file))


def as_trained_on(pixels, scale):
    """What a slice is after clipping to [0, scale]."""
    return np.clip(pixels, 0, scale)


def written(folder, stem):
    """The original and the reconstruction of the one slice whose name holds `stem`."""
    pair = []
    for kind in ("original", "reconstruction"):
        (path,) = folder.glob(f"*{stem}*_{kind}.nii.gz")
        pair.append(nib.load(path))
    return pair


def test_reconstructing_a_folder(call, trained, tmp_path, capsys):
    data = trained.data / "keras_slices_test"
    sources = sorted(data.glob("*.nii.gz"))
    folder = call("out", reconstruct=[data], batch_size=3)
    assert len(list(folder.iterdir())) == 2 * len(sources) + 1
    images = [nib.load(path) for path in sources]
    scale = np.percentile(np.stack([image.get_fdata() for image in images]), 99.5)
    for path, image in zip(sources, images):
        original, reconstruction = written(folder, path.name.split(".")[0])
        expected = as_trained_on(image.get_fdata(), scale)
        assert np.abs(original.get_fdata() - expected).max() <= scale / 255 / 2 * 1.001
        for made in (original, reconstruction):
            assert made.shape == (64, 32)
            assert made.get_data_dtype() == np.float32
            np.testing.assert_allclose(made.affine, image.affine, atol=1e-4)
            assert 0 <= made.get_fdata().min() <= made.get_fdata().max() <= scale * 1.00001
        assert np.abs(reconstruction.get_fdata() - original.get_fdata()).max() > 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["reconstructions.png"]
    assert f"{len(sources)} slices" in capsys.readouterr().out


def test_the_figures_are_those_of_the_files(call, trained, capsys):
    """SSIM and PSNR, a slice and all together, once more from the files that were written."""
    data = trained.data / "keras_slices_test"
    folder = call("out", reconstruct=[data])
    output = capsys.readouterr().out
    scale = np.percentile(np.stack([nib.load(path).get_fdata() for path in data.iterdir()]), 99.5)
    table = table_of(folder)
    assert len(table) == 4
    assert table[0].keys() == {"slice", "ssim", "psnr"}
    overall = reconstruction_metrics()
    for row in table:
        pair = [torch.tensor(image.get_fdata()) for image in written(folder, Path(row["slice"]).name.split(".")[0])]
        slices, reconstructions = (((x / scale) * 2 - 1)[None, None].float() for x in pair)
        values = reconstruction_metrics()(reconstructions, slices)
        assert float(row["ssim"]) == pytest.approx(values["ssim"].item(), abs=1e-4)
        assert float(row["psnr"]) == pytest.approx(values["psnr"].item(), abs=1e-2)
        overall.update(reconstructions, slices)
    expected = overall.compute()
    ssim, psnr = re.search(r"SSIM (-?[0-9.]+), PSNR (-?[0-9.]+) dB", output).groups()
    assert float(ssim) == pytest.approx(expected["ssim"].item(), abs=6e-4)
    assert float(psnr) == pytest.approx(expected["psnr"].item(), abs=6e-3)
    assert float(ssim) == pytest.approx(np.mean([float(row["ssim"]) for row in table]), abs=6e-4)


def test_reconstructing_single_files(call, trained):
    first, second = sorted((trained.data / "keras_slices_validate").iterdir())[:2]
    folder = call("one", reconstruct=[first])
    scale = np.percentile(nib.load(first).get_fdata(), 99.5)  # of the one file: no other of its volume is there
    original, _ = written(folder, first.name.split(".")[0])
    expected = as_trained_on(nib.load(first).get_fdata(), scale)
    assert np.abs(original.get_fdata() - expected).max() <= scale / 255 / 2 * 1.001
    folder = call("two", reconstruct=[second, first])
    assert [Path(row["slice"]).name for row in table_of(folder)] == [second.name, first.name]
    assert len(list(folder.glob("*.nii.gz"))) == 4


def test_slices_of_another_size_are_cropped(call, tmp_path):
    """The middle stays, and its place in space too."""
    pixels = np.random.default_rng(0).uniform(0, 500, (70, 40)).astype(np.float32)
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(pixels, affine), tmp_path / "wide.nii.gz")
    original, reconstruction = written(call("out", reconstruct=[tmp_path / "wide.nii.gz"]), "wide")
    scale = np.percentile(pixels, 99.5)
    expected = as_trained_on(pixels[3:67, 4:36], scale)
    assert np.abs(original.get_fdata() - expected).max() <= scale / 255 / 2 * 1.001
    for image in (original, reconstruction):
        np.testing.assert_allclose(image.affine[:3, 3], affine[:3] @ (3, 4, 0, 1), atol=1e-4)


def test_reconstructions_do_not_depend_on_the_batch_size(call, trained):
    data, folders = trained.data / "keras_slices_test", []
    for batch_size in (1, 3, 8):
        folders.append(call(f"by_{batch_size}", reconstruct=[data], batch_size=batch_size))
    first, *others = (pixels_of(folder, "*_reconstruction.nii.gz") for folder in folders)
    for pixels in others:
        np.testing.assert_allclose(pixels, first, atol=1e-3 * first.max())


def test_earlier_reconstructions_are_replaced_and_it_says_so(call, trained, capsys):
    one = sorted((trained.data / "keras_slices_test").iterdir())[0]
    call("out", reconstruct=[trained.data / "keras_slices_test"])
    capsys.readouterr()
    folder = call("out", reconstruct=[one])
    assert "9 files of an earlier call: replaced" in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 3


def test_slices_of_like_names_are_all_written(call, trained, tmp_path, monkeypatch):
    """a/b.nii.gz, a_b.nii.gz and the like are different slices; and none of the files is a hidden one."""
    source = nib.load(next((trained.data / "keras_slices_test").iterdir()))
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("a/b.nii.gz", "a_b.nii.gz", "a/b.nii"):
        nib.save(source, tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in" / "a")
    folder = call("out", reconstruct=[".."])
    names = [path.name for path in folder.glob("*_reconstruction.nii.gz")]
    assert len(names) == 3
    assert not any(name.startswith(".") for name in names)


def test_the_slices_that_are_reconstructed_are_never_removed(call, trained, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = folder / "case_001_week_0_slice_0_original.nii.gz"
    shutil.copy(next((trained.data / "keras_slices_test").iterdir()), source)
    before = source.read_bytes()
    try:
        call("in", reconstruct=[folder])
    except RunError as error:
        assert "--out" in str(error)
    assert source.read_bytes() == before


# ---------------------------------------------------------------- evaluation

OF_SAMPLES = {
    "two_sample_accuracy",
    "two_sample_interval",
    "coverage",
    "density",
    "frechet_distance",
    "sliced_wasserstein",
    "sliced_wasserstein_levels",
    "ms_ssim_diversity",
}
OF_COPYING = {"smallest_distance", "median_distance", "share_nearer_than_heldout", "statistic"}


@pytest.fixture(scope="module")
def quick():
    """Fewer patches, pairs and updates of the classifier: what they are good for is tested with the metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PATCHES", 256)
        patch.setattr(metrics, "PAIRS", 10)
        patch.setattr(metrics, "CLASSIFIER_UPDATES", 2)
        yield


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, trained, quick):
    """The folder of figures, evaluation.json and the printed lines of one evaluation of a copy of the run."""

    def run(draw=False, **options):
        folder = tmp_path_factory.mktemp("evaluated")
        shutil.copytree(trained.run, folder / "run")
        given = {"run": folder / "run", "images": folder / "images", "device": "cpu"} | options
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            for figure in ("evaluation_figure", "write_copying_figure"):
                if not draw:  # half of the time
                    patch.setattr(evaluate, figure, lambda *given: None)
            evaluate.main(arguments(**given))
        results = json.loads((folder / "run" / "evaluation.json").read_text(), parse_constant=pytest.fail)
        return folder / "images", results, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def evaluation(evaluated):
    return evaluated(draw=True, num=6)


def numbers_of(value):
    """All numbers of a nested dict."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in numbers_of(part)] if isinstance(value, list) else [value]


def test_an_evaluation_has_all_figures(evaluation):
    _, results, _ = evaluation
    assert results["settings"] == {
        "split": "test",
        "heldout_slices": 4,
        "heldout_cases": 1,
        "training_slices": 12,
        "samples": 6,
        "samples_compared": 6,
        "seed": 0,
        "temperature": 1.0,
        "top_p": 0.995,
        "refiner_noise": 1.0,
    }
    for part in (results, results["training"]):
        assert part["reconstructions"].keys() == {"ssim", "ms_ssim", "psnr", "mse", "bits_per_pixel"}
        assert part["codes"].keys() == {"used", "perplexity"}
        assert part["prior"].keys() - {"jpeg2000_bits_per_slice"} == {
            "nats_per_code",
            "bits_per_code",
            "bits_per_slice",
        }
    for part in (results, results["decoder_alone"], results["prior_alone"], results["floor"]):
        assert part["samples"].keys() == OF_SAMPLES
        assert part["copying"].keys() == OF_COPYING
        low, high = part["samples"]["two_sample_interval"]
        assert 0 <= low <= part["samples"]["two_sample_accuracy"] <= high <= 1
    assert all(math.isfinite(number) for number in numbers_of({**results, "settings": {}}))
    assert results["reconstructions"]["bits_per_pixel"] == 4 / 16  # 16 codes for 4x4 pixels
    prior = results["prior"]
    assert prior["bits_per_code"] == pytest.approx(prior["nats_per_code"] / math.log(2))
    assert prior["bits_per_slice"] == pytest.approx(prior["bits_per_code"] * 16 * 8)
    levels = results["samples"]["sliced_wasserstein_levels"]
    assert levels.keys() == {"64x32", "32x16"}
    assert results["samples"]["sliced_wasserstein"] == pytest.approx(sum(levels.values()) / 2)


def test_the_table_says_what_the_file_says(evaluation):
    _, results, printed = evaluation
    lines = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    assert lines["SSIM"][:2] == [f"{part['reconstructions']['ssim']:.3f}" for part in (results, results["training"])]
    parts = [results, results["decoder_alone"], results["prior_alone"], results["floor"]]
    assert lines["coverage"][:4] == [f"{part['samples']['coverage']:.3f}" for part in parts]
    assert lines["copying statistic"][:4] == [f"{part['copying']['statistic']:.1f}" for part in parts]
    interval = results["floor"]["samples"]["two_sample_interval"]
    assert lines["95 % interval"][3] == "-".join(f"{end:.2f}" for end in interval)


def test_the_figures_of_an_evaluation(evaluation):
    images, _, _ = evaluation
    assert sorted(path.name for path in images.iterdir()) == ["copying.png", "evaluation.png"]
    assert imread(images / "evaluation.png").shape[1] == 1440
    assert imread(images / "copying.png").shape[1] == pytest.approx(6 * 2.4 * 120, rel=0.05)


def test_reconstructions_are_those_of_reconstruct(evaluation, call, trained, capsys):
    """The same figures once more, but for the 256 levels that reconstructions are rounded to here."""
    _, results, _ = evaluation
    call("out", reconstruct=[trained.data / "keras_slices_test"])
    ssim, psnr = map(float, re.search(r"SSIM (-?[0-9.]+), PSNR (-?[0-9.]+) dB", capsys.readouterr().out).groups())
    assert results["reconstructions"]["ssim"] == pytest.approx(ssim, abs=2e-3)
    assert results["reconstructions"]["psnr"] == pytest.approx(psnr, abs=0.02)


def test_validation_slices_of_data_that_have_moved(evaluated, trained, tmp_path, monkeypatch):
    """The prior's loss is the best of training, whose weights were kept, but for its bfloat16; by default there are as
    many samples as held-out slices."""
    lines = map(json.loads, (trained.run / "metrics.jsonl").read_text().splitlines())
    logged = [line["nats_per_code"] for line in lines if (line["stage"], line["split"]) == ("prior", "validate")]
    shutil.copytree(trained.data, tmp_path / "moved")
    monkeypatch.setattr(evaluate, "DEFAULT_NUM", 1)
    _, results, _ = evaluated(split="validate", data=tmp_path / "moved")
    assert (results["settings"]["split"], results["settings"]["samples"]) == ("validate", 4)
    assert results["prior"]["nats_per_code"] == pytest.approx(min(logged), rel=0.01)


def test_an_evaluation_is_the_same_at_every_batch_size(evaluation, evaluated):
    _, results, _ = evaluated(num=6, batch_size=4)
    for part, other in ((results, evaluation[1]), (results["floor"], evaluation[1]["floor"])):
        assert part["samples"]["sliced_wasserstein"] == pytest.approx(other["samples"]["sliced_wasserstein"], rel=1e-3)
        assert part["copying"]["median_distance"] == pytest.approx(other["copying"]["median_distance"], rel=1e-3)
    assert results["prior"]["nats_per_code"] == pytest.approx(evaluation[1]["prior"]["nats_per_code"], rel=1e-4)


def test_temperature_and_seed_reach_an_evaluation(evaluated, evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "DEFAULT_NUM", 5)  # where held-out slices are fewer
    _, results, _ = evaluated(temperature=1e-6, seed=7)
    assert results["settings"] | {"seed": 7, "temperature": 1e-6, "samples": 5} == results["settings"]
    assert results["samples"]["ms_ssim_diversity"] != evaluation[1]["samples"]["ms_ssim_diversity"]


def test_copies_are_found_out(evaluated, trained, monkeypatch):
    """A model whose samples are training slices, mirrored and moved."""
    data = load_dataset(str(trained.data), (64, 32), (4, 4), 0)
    copies = data.train.batch(range(6)).roll((3, -2), (2, 3)).flip(2)

    def draw_samples(options, networks, positions, device):
        return predict.Samples(copies, torch.zeros(6, 16, 8, dtype=torch.int64), torch.linspace(0, 1, 6), (1.0, 1.0))

    monkeypatch.setattr(evaluate, "draw_samples", draw_samples)
    _, results, _ = evaluated(num=6)
    assert results["copying"]["median_distance"] == 0
    for part in (results, results["prior_alone"]):
        assert part["copying"]["share_nearer_than_heldout"] == 1
        assert part["copying"]["statistic"] < -2
    assert results["floor"]["copying"]["smallest_distance"] > 0


def test_each_column_compares_what_it_says(evaluated, trained, monkeypatch):
    """What reaches the two-sample test and the copying statistic, told by the mean of each slice."""
    compared, copying = [], []

    def means(slices):
        return slices.mean((1, 2, 3)).tolist()

    def two_sample_test(slices, cases, reference, reference_cases):
        assert (len(slices), len(reference)) == (len(cases), len(reference_cases))
        compared.append((means(slices), means(reference)))
        return 1, 2

    def nearest(slices, training, count, axis):
        assert (count, axis) == (12, 2)
        return metrics.Nearest(slices.mean((1, 2, 3)), torch.zeros(len(slices)).long(), torch.zeros(len(slices)).long())

    def copying_statistic(near, reference):
        copying.append((near.distances.tolist(), reference.distances.tolist()))
        return 0.0

    for replaced in (two_sample_test, nearest, copying_statistic):
        monkeypatch.setattr(evaluate, replaced.__name__, replaced)
    _, results, table = evaluated(num=14, batch_size=5)  # two more than training slices
    assert (results["settings"]["samples"], results["settings"]["samples_compared"]) == (14, 12)
    assert "14 samples, of which all but the lines on copying take the first 12" in table
    data = load_dataset(str(trained.data), (64, 32), (4, 4), 0)
    vqvae, refiner = load_decoders(trained.run)
    real, training = data.test.batch(range(4)), data.train.batch(range(12))
    decoded, decoded_training = (  # refined, and not that of a sample
        metrics.quantise(refiner.sample(range(10**6, 10**6 + len(codes)), codes, vqvae))
        for codes in map(vqvae.encode, (real, training))
    )
    samples, every = compared[0][0], copying[0][0]
    assert (len(samples), len(every)) == (12, 14)
    assert every[:12] == samples
    expected = [(samples, means(real)), (means(decoded_training), means(real))]
    expected += [(samples, means(decoded)), (means(training), means(real))]
    np.testing.assert_allclose(sum(sum(compared, ()), []), sum(sum(expected, ()), []), atol=1e-5)
    halves = (means(real[[0, 2]]), means(real[[1, 3]]))
    expected = [(every, means(real)), (means(decoded), means(real)), (every, means(decoded)), halves]
    np.testing.assert_allclose(sum(sum(copying, ()), []), sum(sum(expected, ()), []), atol=1e-5)
    for part, slices in ((results, real), (results["training"], training)):  # of the network without refiner
        plain = metrics.quantise(vqvae.decode(vqvae.encode(slices)))
        assert part["reconstructions"]["mse"] == pytest.approx((plain - slices).square().mean().item(), rel=1e-4)


def test_other_data_are_refused(trained, tmp_path, complaint):
    """Copying measured against other slices than those of training would say nothing."""
    other = tmp_path / "other"
    shutil.copytree(trained.data, other)
    next((other / "keras_slices_train").iterdir()).unlink()
    given = {"run": trained.run, "images": tmp_path / "images", "data": other}
    error = complaint("evaluate.py", arguments(**given))
    assert f"{other} does not hold the data" in error
    assert "--data" in error
    assert not (trained.run / "evaluation.json").exists()


def test_data_that_are_not_there_are_said(trained, tmp_path, complaint):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    config = read_config(run)
    config["options"]["data"] = "gone"
    (run / "config.json").write_text(json.dumps(config))
    error = complaint("evaluate.py", arguments(run=run, images=tmp_path / "images"))
    assert "are not in gone: say where they are with --data" in error


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
def test_a_mistake_in_an_evaluation_is_one_line(trained, tmp_path, monkeypatch, complaint, given, part):
    monkeypatch.chdir(tmp_path)
    assert part in complaint("evaluate.py", arguments(**{"run": trained.run} | given))
    assert not (trained.run / "evaluation.json").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["run", "images"])
def test_what_an_evaluation_cannot_write_is_found_out_before_it_begins(trained, tmp_path, monkeypatch, option):
    """As on a file system that was mounted to be read only."""
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


def test_an_evaluation_is_json_that_every_reader_takes(evaluated, monkeypatch):
    """A figure that is no number is null: NaN is not JSON."""
    monkeypatch.setattr(evaluate, "ms_ssim_diversity", lambda _: math.nan)
    _, results, _ = evaluated(num=6)
    assert results["samples"]["ms_ssim_diversity"] is None
    assert results["floor"]["samples"]["coverage"] >= 0


def test_a_split_without_slices_is_refused(evaluated, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "FEWEST", 5)
    with pytest.raises(RunError, match="fewer than 5 training or test slices: choose another --split"):
        evaluated(num=6)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["case_004_week_0_slice_1_$T2__tse$", "K\udcf6ln", "\u524d\u5217\u817a", "two\nlines", "x" * 240, "\u00e9" * 120],
)
def test_slices_of_any_name_are_reconstructed(call, trained, tmp_path, name):
    """Not UTF-8, as long as a name may be, with what other programs take for markup."""
    own, images = tmp_path / "own", tmp_path / "images"
    own.mkdir()
    shutil.copy(next((trained.data / "keras_slices_test").glob("*.nii.gz")), own / f"{name}.nii.gz")
    out = call("out", reconstruct=own, images=images)
    written = {path.name for path in out.iterdir()}
    assert len(written) == 3
    assert any(f"000000_{name}"[:60] in path for path in written)
    with open(out / "reconstructions.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["slice"].endswith(f"{printable(name)}.nii.gz")
    assert (images / "reconstructions.png").exists()


@pytest.mark.parametrize(("side", "warned"), [(1.0, False), (1.015, False), (0.5, True), (2.0, True)])
def test_slices_with_other_pixels_than_in_training_are_warned_of(call, trained, tmp_path, capsys, side, warned):
    own = tmp_path / "own"
    own.mkdir()
    for number, factor in enumerate((1.0, side)):
        image = nib.load(next((trained.data / "keras_slices_test").glob("*.nii.gz")))
        affine = image.affine @ np.diag([factor, factor, 1, 1])
        nib.save(nib.Nifti1Image(image.get_fdata(), affine), own / f"case_004_week_0_slice_{number}.nii.gz")
    call("out", reconstruct=own)
    said = capsys.readouterr().out
    assert ("warning: 1 slices have other pixels" in said) == warned


def test_what_lies_there_stays_until_there_is_something_to_take_its_place(call, trained, monkeypatch):
    """A Ctrl-C while samples are drawn does not cost those of an earlier call."""
    folder = call(num=2)
    before = pixels_of(folder)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.Refiner, "sample", interrupted)
        patch.setattr(predict, "reconstruction_metrics", interrupted)
        for task in ({"num": 3}, {"reconstruct": trained.data / "keras_slices_test"}):
            with pytest.raises(KeyboardInterrupt):
                call(**task)
    np.testing.assert_array_equal(pixels_of(folder), before)


@pytest.mark.parametrize("task", ["num", "reconstruct"])
def test_a_full_disk_is_one_line_that_names_the_file(call, trained, tmp_path, monkeypatch, task):
    """The truncated file is removed."""

    def write(path, *_):
        path.write_bytes(b"truncated")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predict, "write_slice", write)
    with pytest.raises(RunError, match=r"samples/\S*000000\S*\.nii\.gz cannot be written: No space left on device"):
        call(**{task: 2 if task == "num" else trained.data / "keras_slices_test"})
    assert not list((tmp_path / "samples").glob("*.nii.gz"))


def test_slices_with_another_orientation_than_in_training_are_warned_of(call, trained, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    image = nib.load(next((trained.data / "keras_slices_test").glob("*.nii.gz")))
    for number, sign in enumerate((1, -1, -1)):
        flipped = nib.Nifti1Image(image.get_fdata(), image.affine @ np.diag([sign, 1, 1, 1]))
        nib.save(flipped, own / f"case_004_week_0_slice_{number}.nii.gz")
    call("out", reconstruct=own)
    assert "warning: 2 slices have another orientation than training slices" in capsys.readouterr().out


def test_a_run_of_any_name_is_sampled(trained, tmp_path, capsys):
    run = tmp_path / "K\udcf6ln $a_$"
    shutil.copytree(trained.run, run)
    predict.main(arguments(run=run, num=2, out=tmp_path / "\udcff", images=tmp_path / "\udcfe", device="cpu"))
    assert len(list((tmp_path / "\udcff").glob("*.nii.gz"))) == 2
    assert "\\udcff" in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"temperature": 0}, "argument --temperature: 0 is not at least 1e-06"),
        ({"temperature": -1}, "argument --temperature: -1 is not at least 1e-06"),
        ({"temperature": "nan"}, "argument --temperature: nan is not at least 1e-06"),
        ({"top_p": 0}, "argument --top-p: 0 is not above 0 and at most 1"),
        ({"refiner_noise": 1.1}, "argument --refiner-noise: 1.1 is not at least 0 and at most 1"),
        ({"top_p": 1.01}, "argument --top-p: 1.01 is not above 0 and at most 1"),
        ({"position": 2}, "argument --position: 2 is not at least 0 and at most 1"),
        ({"temperature": "inf"}, "argument --temperature: inf is not at least 1e-06 and at most 100"),
        ({"num": 0}, "argument --num: 0 is not at least 1"),
        ({"num": 10**6 + 1}, "argument --num: 1000001 is not at least 1 and at most 1000000"),
        ({"num": "many"}, "argument --num: invalid int value: 'many'"),
        ({"batch_size": 0}, "argument --batch-size: 0 is not at least 1"),
        ({"batch_size": 10**6}, "argument --batch-size: 1000000 is not at least 1 and at most 65536"),
        ({"seed": 2**32}, "argument --seed: 4294967296 is not at least 0"),
        ({"device": "gpu"}, "--device gpu"),
        ({"device": "mps"}, "--device mps: choose auto, cpu, cuda, or cuda:1 and so on"),
        ({"run": "nowhere"}, "nowhere is not a run directory"),
        ({"run": ""}, "argument --run: it is empty"),
        ({"out": ""}, "argument --out: it is empty"),
        ({"images": " "}, "argument --images: it is empty"),
        ({"reconstruct": ""}, "argument --reconstruct: it is empty"),
        ({"out": "/proc/1/samples"}, "--out /proc/1/samples cannot be written"),
        ({"images": "/proc/1/images"}, "--images /proc/1/images cannot be written"),
        ({"reconstruct": []}, "argument --reconstruct: expected at least one argument"),
        ({"reconstruct": ["nowhere.nii.gz"]}, "nowhere.nii.gz"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(trained, tmp_path, monkeypatch, complaint, given, part):
    monkeypatch.chdir(tmp_path)
    assert part in complaint("predict.py", arguments(**{"run": trained.run} | given))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(trained, tmp_path):
    """A run that may be spoiled."""
    return shutil.copytree(trained.run, tmp_path / "run")


@pytest.mark.parametrize("name", READ_BY_PREDICT)
@pytest.mark.parametrize("content", [None, b"", b"{", b"\x80\x04K\x01."])
def test_a_run_that_cannot_be_used_is_one_line(copied, tmp_path, complaint, name, content):
    run = copied
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    error = complaint("predict.py", arguments(run=run, out=tmp_path / "out"))
    assert str(run) in error
    assert not (tmp_path / "out").exists()


def test_networks_of_different_runs_are_one_line(copied, tmp_path, complaint):
    prior = predict.load_weights(copied / "prior.safetensors", GatedPixelCNN, PriorConfig)
    for change in ({"codebook_size": 8}, {"grid": (8, 8)}):
        save_weights(copied / "prior.safetensors", GatedPixelCNN(replace(prior.config, **change)))
        error = complaint("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied}: prior.safetensors and vqvae.safetensors are of different runs" in error
    save_weights(copied / "prior.safetensors", prior)
    refiner = predict.load_weights(copied / "refiner.safetensors", Refiner, RefinerConfig)
    for change in ({"codebook_size": 8}, {"embedding_dim": 7}, {"downsampling": 8}):
        save_weights(copied / "refiner.safetensors", Refiner(replace(refiner.config, **change)))
        error = complaint("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied}: refiner.safetensors and vqvae.safetensors are of different runs" in error
    config = read_config(copied)
    (copied / "config.json").write_text(json.dumps(config | {"slice_size": [62, 32]}))
    error = complaint("predict.py", arguments(run=copied, out=tmp_path / "out"))
    assert "vqvae.safetensors takes no slices of 62x32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vqvae.safetensors", "prior.safetensors", "refiner.safetensors"])
def test_a_network_that_would_take_all_memory_is_one_line(copied, tmp_path, complaint, name):
    with safe_open(copied / name, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
        config = json.loads(file.metadata()["config"])
    changes = [{"channels": 10**9}, {"channels": 60_000}, {"codes": 2**40}, {"grid": [10**6, 10**6]}, {"x": 1}]
    for change in [*changes, {"downsampling": 2**20}, {"time_frequencies": 2**40}]:
        save_file(tensors, copied / name, {"config": json.dumps(config | change)})
        error = complaint("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied / name} cannot be used" in error


def test_runs_that_were_tampered_with(trained, tmp_path):
    """A short form of `python tests/campaign.py runs`."""
    run, canary, outcomes = tmp_path / "run", tmp_path / "canary", Counter()
    (tmp_path / "outside").write_text("not the run's")
    given = arguments(run=run, num=1, out=tmp_path / "out", images=tmp_path / "out", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "samples_figure", lambda *_: None)
        for seed in range(40):
            shutil.copytree(trained.run, run)
            name, evil = tamper(np.random.default_rng((seed, 7)), run, canary)
            outcome, details = judge_run(lambda: predict.main(given), run)
            assert outcome != "crashed", f"{seed}, {name}: {details}"
            assert not (evil and outcome == "loaded" and name in READ_BY_PREDICT)
            outcomes[outcome] += 1
            shutil.rmtree(run)
    assert not canary.exists()
    assert min(outcomes["loaded"], outcomes["refused"]) >= 5


def test_a_run_that_trains_can_be_sampled_from(copied, tmp_path, capsys):
    handle = lock(copied)
    predict.main(arguments(run=copied, num=2, out=tmp_path / "out", images=tmp_path / "images", device="cpu"))
    os.close(handle)
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("missing", [["refiner.safetensors"], ["refiner.safetensors", "prior.safetensors"]])
def test_what_a_run_that_trains_has_not_come_to(copied, trained, tmp_path, complaint, missing):
    """No samples yet, and it says so; but slices can be reconstructed."""
    for name in missing:
        (copied / name).unlink()
    handle = lock(copied)
    given = {"run": copied, "out": tmp_path / "out", "images": tmp_path / "images", "device": "cpu"}
    for script in ("predict.py", "evaluate.py"):
        error = complaint(script, arguments(**{name: given[name] for name in ("run", "images", "device")}))
        assert f"{copied / missing[-1]} does not exist: train.py has not come that far, or the run is of an" in error
    assert not (tmp_path / "out").exists()
    predict.main(arguments(**given, reconstruct=[trained.data / "keras_slices_test"]))
    os.close(handle)
    assert len(list((tmp_path / "out").glob("*_reconstruction.nii.gz"))) == 4


def test_an_output_folder_that_is_a_file_is_refused(call, tmp_path):
    (tmp_path / "samples").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"):
        call(num=1)
    assert (tmp_path / "samples").read_text() == "mine"


def test_a_figure_folder_that_is_a_file_is_refused(call, tmp_path):
    (tmp_path / "images").write_text("mine")
    with pytest.raises(RunError, match="images"):
        call(num=1)


def test_slices_that_cannot_be_read_leave_earlier_reconstructions(call, trained, tmp_path):
    folder = call("out", reconstruct=[trained.data / "keras_slices_test"])
    before = sorted(folder.iterdir())
    (tmp_path / "bad.nii.gz").write_bytes(b"no slice")
    with pytest.raises(DataError, match=r"bad\.nii\.gz"):
        call("out", reconstruct=[tmp_path / "bad.nii.gz"])
    assert sorted(folder.iterdir()) == before
