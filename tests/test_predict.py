"""predict.py on a tiny trained run: the samples and reconstructions it writes, and what they depend on."""

import csv
import errno
import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from tampering import judge_run, tamper
from trainings import WEIGHTS, arguments

import metrics
import predict
import samples
from checkpoints import Run, lock_run, read_config, save_tensors, save_weights
from config import Positions
from console import RunError, printable
from dataset import DataError, denormalize, load_dataset
from files import Reading
from metrics import reconstruction_metrics
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import Refiner, RefinerConfig

ROOT = Path(__file__).parents[1]
READ_BY_PREDICT = ("config.json", *WEIGHTS)


@pytest.fixture
def call(tmp_path, trained):
    """Run predict.py in this process; return the folder that it wrote to."""

    def call(name="samples", **options):
        folder = tmp_path / name
        written = {} if "animate" in options else {"out": folder, "images": tmp_path / "images"}
        predict.main(arguments(**{"run": trained.run, "device": "cpu"} | written | options))
        return folder

    return call


def values_of(image):
    """The values (H, W) of an image of one slice."""
    return np.squeeze(image.get_fdata(), 2) if image.ndim == 3 else image.get_fdata()


def pixels_of(folder, pattern="sample_*.nii.gz"):
    return np.stack([values_of(nib.load(path)) for path in sorted(folder.glob(pattern))])


def codes_of(folder):
    return np.load(folder / "codes.npy")


# ---------------------------------------------------------------- samples


def test_sampling_writes_numbered_slices_codes_and_a_figure(call, tmp_path, capsys):
    folder = call(num=11, batch_size=4)
    names = [f"sample_{n:06d}.nii.gz" for n in range(11)]
    assert sorted(path.name for path in folder.iterdir()) == ["codes.npy", *names, "samples.json"]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["samples.png"]
    assert imread(tmp_path / "images" / "samples.png").shape[1] >= 8 * 64
    assert "11 slices" in capsys.readouterr().out


def test_samples_have_the_affine_and_spacing_of_the_training_slices(call, trained):
    original = nib.load(next((trained.data / "keras_slices_train").glob("*_slice_0.nii.gz")))
    for path in call(num=2).glob("*.nii.gz"):
        image = nib.load(path)
        assert image.shape == (64, 32, 1)
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
        np.testing.assert_allclose(image.affine, read_config(trained.run).affine, atol=1e-4)
        assert image.header.get_zooms()[:2] == pytest.approx(original.header.get_zooms())
        assert image.header.get_zooms() == pytest.approx((410 / 64, 205 / 32, 3))
        assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(original.affine)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_samples_have_the_intensity_scale_of_the_data(call, trained):
    scale = read_config(trained.run).intensity.scale
    pixels = pixels_of(call(num=4))
    assert pixels.min() >= 0
    assert pixels.max() <= scale * (1 + 1e-6)
    assert pixels.max() > 0.2 * scale
    assert pixels.std() > 0


def test_codes_are_integers_below_the_codebook_size(call):
    codes = codes_of(call(num=5, batch_size=2))
    assert codes.shape == (5, 16, 8)
    assert np.issubdtype(codes.dtype, np.integer)
    assert codes.min() >= 0
    assert codes.max() < 16
    assert len(np.unique(codes)) > 4


def load_decoders(run):
    """The VQ-VAE and the refiner of a run."""
    vqvae = predict.load_weights(run / "vqvae.safetensors", predict.VQVAE, predict.VQVAEConfig)
    return vqvae, predict.load_weights(run / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")


@pytest.mark.parametrize("seed", [0, 5])
def test_written_slices_are_the_refined_codes(call, trained, seed):
    folder = call(num=3, seed=seed)
    vqvae, refiner = load_decoders(trained.run)
    codes = torch.from_numpy(codes_of(folder)).long()
    slices = refiner.sample(range(3), codes, vqvae, seed)[:, 0].numpy()
    scale = read_config(trained.run).intensity.scale
    np.testing.assert_allclose(pixels_of(folder), (slices + 1) / 2 * scale, atol=1e-4 * scale)


def test_samples_with_equal_codes_differ_in_the_detail_of_the_refiner(call):
    folder = call(num=3, temperature=1e-6, position=0.5)
    codes, pixels = codes_of(folder), pixels_of(folder)
    assert (codes == codes[0]).all()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pixels[one] - pixels[other]).mean() > 0.01 * pixels.max()


def test_samples_do_not_depend_on_the_batch_size_or_their_number(call, trained):
    expected = call("all", num=7, batch_size=7)
    scale = read_config(trained.run).intensity.scale
    for batch_size, num in ((1, 7), (3, 7), (32, 7), (2, 4), (5, 9)):
        folder = call(f"{batch_size}_{num}", num=num, batch_size=batch_size)
        shared = min(num, 7)
        assert (codes_of(folder)[:shared] == codes_of(expected)[:shared]).all()
        np.testing.assert_allclose(pixels_of(folder)[:shared], pixels_of(expected)[:shared], atol=1e-4 * scale)


def test_samples_and_seeds_give_different_codes(call):
    grids = np.concatenate([codes_of(call(f"seed_{seed}", num=4, seed=seed)) for seed in (0, 1)])
    assert len(np.unique(grids.reshape(8, -1), axis=0)) == 8


def test_low_temperature_and_low_top_p_give_the_mode(call):
    mode = codes_of(call("temperature", num=3, temperature=1e-6, position=0.5))
    assert (mode == mode[0]).all()
    assert (codes_of(call("top_p", num=3, top_p=1e-6, position=0.5)) == mode).all()
    assert not (codes_of(call("default", num=3, position=0.5)) == mode).all()


def test_position_conditions_the_prior(call):
    low, high = (codes_of(call(f"at_{position}", num=4, position=position)) for position in (0, 1))
    assert not (low == high).all()


def test_refiner_noise_of_0_makes_the_refiner_deterministic(call, trained):
    """Without noise the slices depend on the codes alone, whatever the seed and sample ids."""
    rough, smooth = (call(f"noise_{scale}", num=3, refiner_noise=scale) for scale in (1, 0))
    codes = torch.from_numpy(codes_of(smooth)).long()
    assert (codes_of(rough) == codes_of(smooth)).all()
    config = read_config(trained.run)
    device, scale = torch.device("cpu"), config.intensity.scale
    networks = predict.load_networks(trained.run, config, device)
    expected = networks.refiner.sample(range(5, 8), codes, networks.vqvae, seed=9, noise_scale=0)[:, 0].numpy()
    np.testing.assert_allclose(pixels_of(smooth), (expected + 1) / 2 * scale, atol=1e-4 * scale)
    assert np.abs(pixels_of(rough) - pixels_of(smooth)).max() > 0.01 * scale


FROM_02_TO_08 = [0.2 + 0.006 * n for n in range(101)]


@pytest.mark.parametrize(
    "quantiles, position, error",
    [
        (FROM_02_TO_08, 0.2, None),
        (FROM_02_TO_08, 0.8, None),
        (FROM_02_TO_08, None, None),
        ([], None, None),
        (FROM_02_TO_08, 0.1, "from 0.2 to 0.8"),
        ([0.5] * 101, 0.8, "from 0.5 to 0.5"),
        ([], 0.5, "not known: no names with slice numbers"),
    ],
)
def test_positions_outside_those_of_the_training_slices_are_refused(quantiles, position, error):
    given = SimpleNamespace(position=position, run=Path("runs/a"))
    config = SimpleNamespace(positions=Positions(quantiles=quantiles, unknown=0.5 if quantiles else 1))
    with pytest.raises(RunError, match=error) if error else nullcontext():
        predict.check_position(given, config)


def test_sampling_an_unfinished_run_prints_a_warning(call, trained, tmp_path, caplog):
    call(num=1)
    copy = tmp_path / "copy"
    shutil.copytree(trained.run, copy)
    (copy / "checkpoint.safetensors").write_bytes(b"damaged")
    call(num=1, run=copy)
    (copy / "checkpoint.safetensors").unlink()
    call(num=1, run=copy)
    assert not caplog.messages
    with Run(copy, read_config(copy), {}) as run:
        run.save_checkpoint({}, stage="refiner")
    call(num=1, run=copy)
    assert caplog.messages == [f"{copy} is not complete: the training is not finished"]


def test_positions_have_the_distribution_of_the_training_slices():
    distribution = Positions(quantiles=np.linspace(0.25, 0.75, 101).tolist(), unknown=0.25)
    positions = predict.draw_positions(range(800), 0, distribution).numpy()
    assert np.isnan(positions).mean() == pytest.approx(0.25, abs=0.08)  # 5 standard errors
    known = positions[np.isfinite(positions)]
    assert 0.25 <= known.min() < 0.3
    assert 0.7 < known.max() <= 0.75
    assert known.mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(predict.draw_positions(range(5, 9), 0, distribution), positions[5:9])
    assert not np.array_equal(predict.draw_positions(range(800), 1, distribution), positions, equal_nan=True)
    assert predict.draw_positions(range(3), 0, Positions(quantiles=[], unknown=1)).isnan().all()


# ---------------------------------------------------------------- the folder of samples


def content(folder):
    """The bytes of each file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_drawn(monkeypatch):
    """The ids of samples whose codes are drawn from now on."""
    drawn, draw = [], GatedPixelCNN.sample

    def counted(prior, sample_ids, *args, **kwargs):
        drawn.extend(dict.fromkeys(sample_ids))  # a batch is filled up with its last id
        return draw(prior, sample_ids, *args, **kwargs)

    monkeypatch.setattr(GatedPixelCNN, "sample", counted)
    return drawn


def test_samples_of_other_settings_are_replaced_with_a_notice(call, capsys):
    folder = call(num=5)
    assert "replaced" not in capsys.readouterr().out
    (folder / "notes.txt").write_text("mine")
    call(num=2, seed=1)
    assert "7 files of an earlier call: replaced" in capsys.readouterr().out
    left = ["codes.npy", "notes.txt", "sample_000000.nii.gz", "sample_000001.nii.gz", "samples.json"]
    assert sorted(path.name for path in folder.iterdir()) == left


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.5}, {"top_p": 0.5}, {"guidance": 0}, {"refiner_noise": 0.5}, {"position": 0.5}]
)
def test_every_setting_that_changes_samples_is_recorded(call, capsys, setting):
    call(num=1)
    call(num=1, **setting)
    assert "3 files of an earlier call: replaced" in capsys.readouterr().out


def test_only_missing_samples_are_drawn(call, monkeypatch, capsys):
    folder = call(num=5)
    before = content(folder)
    drawn = count_drawn(monkeypatch)
    (folder / "sample_000003.nii.gz").unlink()
    call(num=5)
    assert drawn == [3]
    assert content(folder) == before
    assert "held 4 of 5 slices" in capsys.readouterr().out
    call(num=7)
    assert drawn == [3, 5, 6]
    assert content(folder) == content(call("all", num=7))
    call(num=2)  # the others stay
    assert content(folder) == content(call("all", num=7))
    assert drawn == [3, 5, 6, *range(7)]


@pytest.mark.parametrize("damaged", [b"", b"not a numpy file", None])
def test_without_usable_codes_all_samples_are_drawn(call, damaged):
    folder = call(num=3)
    before = content(folder)
    (folder / "codes.npy").unlink()
    if damaged is not None:
        (folder / "codes.npy").write_bytes(damaged)
    call(num=3)
    assert content(folder) == before


def test_parts_give_the_files_of_the_whole(call):
    """In any order, with an uneven batch size; each part has its own file of codes."""
    whole = content(call("whole", num=9, batch_size=4))
    for first, num in ((6, 3), (0, 6)):
        folder = call("parts", first=first, num=num, batch_size=4)
    parts = content(folder)
    codes = np.concatenate([np.load(folder / f"codes_{first:06d}.npy") for first in (0, 6)])
    np.testing.assert_array_equal(codes, codes_of(folder.with_name("whole")))
    for name in ("codes_000000.npy", "codes_000006.npy"):
        del parts[name]
    del whole["codes.npy"]
    assert parts == whole


@pytest.mark.parametrize("ending", ["png", "npz"])
def test_parts_in_other_formats_give_the_files_of_the_whole(call, monkeypatch, ending):
    monkeypatch.setattr(samples, "SHARD", 3)
    whole = content(call("whole", num=7, batch_size=2, format=ending))
    for first, num in ((3, 4), (0, 3)):
        folder = call("parts", first=first, num=num, batch_size=2, format=ending)
    parts = content(folder)
    named = f"sample*.{ending}"
    assert {name for name in parts if fnmatch(name, named)} == {name for name in whole if fnmatch(name, named)}
    assert all(parts[name] == whole[name] for name in whole if name != "codes.npy")


def test_every_format_holds_the_same_samples(call, trained, monkeypatch, tmp_path):
    intensity = read_config(trained.run).intensity
    expected = pixels_of(call("nifti", num=3))
    with np.load(call("npz", num=3, format="npz") / "samples_000000.npz") as arrays:
        np.testing.assert_array_equal(arrays["slices"], expected.astype(np.float32))
        np.testing.assert_array_equal(arrays["codes"], codes_of(tmp_path / "nifti"))
    for path, pixels in zip(sorted(call("png", num=3, format="png").glob("*.png")), expected):
        with Image.open(path) as picture:
            np.testing.assert_allclose(np.asarray(picture).T / 65535 * intensity.scale, pixels, atol=0.02)


def test_a_part_is_not_added_to_samples_of_other_settings(call):
    before = content(call("out", num=2))
    with pytest.raises(RunError, match="samples of other settings: choose another folder"):
        call("out", first=2, num=2, seed=1)
    assert content(call("out", num=2)) == before


def test_memory_does_not_grow_with_the_number_of_samples(call, monkeypatch):
    """No more than two batches of slices are alive, the one being written and the next."""
    alive, draw = [], predict.draw_samples

    def counted(*args):
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        samples = draw(*args)
        references.append(weakref.ref(samples.slices))
        return samples

    references = []
    monkeypatch.setattr(predict, "draw_samples", counted)
    call(num=8, batch_size=1)
    assert len(alive) == 8
    assert max(alive) <= 2


# ---------------------------------------------------------------- animation


def test_animate_writes_a_gif_and_nothing_else(call, tmp_path, capsys):
    path = tmp_path / "animated" / "sampling.gif"
    folder = call(animate=path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["animated"]
    assert not folder.exists()
    with Image.open(path) as gif:
        assert gif.n_frames == 16 + 4 + 1  # rows, steps of the refiner, the slices
    assert capsys.readouterr().out.startswith("21 frames, ")


def test_an_animation_ends_with_the_samples_of_its_seed_from_low_to_high(trained, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(predict, "write_animation", lambda path, *given: path.touch() or written.append(given))
    options = {"run": trained.run, "device": "cpu", "seed": 4, "animate": tmp_path / "a.gif"}
    predict.main(arguments(**options))
    predict.main(arguments(**options, position=0.5))
    (_, _, labels), (frames, vqvae, others) = written
    assert labels == sorted(labels) and len(set(labels)) == 4
    assert others == ["height 0.50"] * 4
    networks = predict.load_networks(trained.run, read_config(trained.run), torch.device("cpu"))
    codes = networks.prior.sample(range(4), torch.full((4,), 0.5), 4, 1.0, predict.TOP_P, networks.guide)
    slices = networks.refiner.sample(range(4), codes, vqvae, 4)
    np.testing.assert_array_equal(frames[-1].codes, codes)
    np.testing.assert_allclose(frames[-1].slices, slices[:, 0], atol=0.05)  # bfloat16 where the CPU has it


@pytest.mark.parametrize("name", ["sampling.mp4", "sampling", "folder.gif"])
def test_an_animation_is_a_gif(call, tmp_path, name):
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(RunError, match="an animation is a GIF"):
        call(animate=tmp_path / name)


# ---------------------------------------------------------------- reconstructions


def table_of(folder):
    with open(folder / "reconstructions.csv", newline="") as file:
        return list(csv.DictReader(file))


def clip_to_scale(pixels, scale):
    """Pixels clipped to [0, scale], as for training."""
    return np.clip(pixels, 0, scale)


def written(folder, stem):
    """The original and the reconstruction of the slice whose name contains `stem`."""
    pair = []
    for kind in ("original", "reconstruction"):
        (path,) = folder.glob(f"*{stem}*_{kind}.nii.gz")
        pair.append(nib.load(path))
    return pair


def test_reconstruction_of_a_folder_keeps_scale_and_geometry(call, trained, tmp_path, capsys):
    data = trained.data / "keras_slices_test"
    sources = sorted(data.glob("*.nii.gz"))
    folder = call("out", reconstruct=[data], batch_size=3)
    assert len(list(folder.iterdir())) == 2 * len(sources) + 1
    images = [nib.load(path) for path in sources]
    scale = np.percentile(np.stack([image.get_fdata() for image in images]), 99.5)
    for path, image in zip(sources, images):
        original, reconstruction = written(folder, path.name.split(".")[0])
        expected = clip_to_scale(image.get_fdata(), scale)
        assert np.abs(values_of(original) - expected).max() <= scale / 255 / 2 * 1.001
        for made in (original, reconstruction):
            assert made.shape == (64, 32, 1)
            assert made.get_data_dtype() == np.float32
            np.testing.assert_allclose(made.affine, image.affine, atol=1e-4)
            assert 0 <= made.get_fdata().min() <= made.get_fdata().max() <= scale * 1.00001
        assert np.abs(reconstruction.get_fdata() - original.get_fdata()).max() > 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["reconstructions.png"]
    assert f"{len(sources)} slices" in capsys.readouterr().out


def test_reconstructed_pictures_are_named_without_their_ending(call, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.arange(64 * 32, dtype=np.uint16).reshape(32, 64) * 20).save(folder / "case_001_slice_0.png")
    names = {path.name for path in call("out", reconstruct=[folder]).glob("*.nii.gz")}
    assert names == {f"000000_case_001_slice_0_{kind}.nii.gz" for kind in ("original", "reconstruction")}


def test_files_of_other_kinds_are_named_before_reconstructions(call, trained, tmp_path, caplog):
    source = min((trained.data / "keras_slices_test").iterdir())
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(source, folder)
    (folder / "figure.png").write_bytes(b"")
    with caplog.at_level("INFO"):
        call("out", reconstruct=[folder])
    assert f"1 file of other kinds not read ({folder.as_posix()}/figure.png)" in caplog.text


def test_reported_ssim_and_psnr_agree_with_the_written_slices(call, trained, capsys):
    """Per slice in the table, and over all slices in the output."""
    data = trained.data / "keras_slices_test"
    folder = call("out", reconstruct=[data])
    output = capsys.readouterr().out
    scale = np.percentile(np.stack([nib.load(path).get_fdata() for path in data.iterdir()]), 99.5)
    table = table_of(folder)
    assert len(table) == 4
    assert table[0].keys() == {"slice", "ssim", "psnr"}
    overall = reconstruction_metrics()
    for row in table:
        pair = [torch.tensor(values_of(image)) for image in written(folder, Path(row["slice"]).name.split(".")[0])]
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


def test_reconstruction_of_single_files_keeps_their_order(call, trained):
    first, second = sorted((trained.data / "keras_slices_validate").iterdir())[:2]
    folder = call("one", reconstruct=[first])
    scale = np.percentile(nib.load(first).get_fdata(), 99.5)  # of the one file: no other of its volume is there
    original, _ = written(folder, first.name.split(".")[0])
    expected = clip_to_scale(nib.load(first).get_fdata(), scale)
    assert np.abs(values_of(original) - expected).max() <= scale / 255 / 2 * 1.001
    folder = call("two", reconstruct=[second, first])
    assert [Path(row["slice"]).name for row in table_of(folder)] == [second.name, first.name]
    assert len(list(folder.glob("*.nii.gz"))) == 4


def test_slices_of_another_size_are_centre_cropped(call, tmp_path):
    """The affine moves with the crop."""
    pixels = np.random.default_rng(0).uniform(0, 500, (70, 40)).astype(np.float32)
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(pixels, affine), tmp_path / "wide.nii.gz")
    original, reconstruction = written(call("out", reconstruct=[tmp_path / "wide.nii.gz"]), "wide")
    scale = np.percentile(pixels, 99.5)
    expected = clip_to_scale(pixels[3:67, 4:36], scale)
    assert np.abs(values_of(original) - expected).max() <= scale / 255 / 2 * 1.001
    for image in (original, reconstruction):
        np.testing.assert_allclose(image.affine[:3, 3], affine[:3] @ (3, 4, 0, 1), atol=1e-4)


def test_reconstructions_do_not_depend_on_the_batch_size(call, trained):
    data = trained.data / "keras_slices_test"
    folders = [call(f"by_{size}", reconstruct=[data], batch_size=size) for size in (1, 3, 8)]
    first, *others = (pixels_of(folder, "*_reconstruction.nii.gz") for folder in folders)
    for pixels in others:
        np.testing.assert_allclose(pixels, first, atol=1e-3 * first.max())


def test_reconstructions_of_an_earlier_call_are_replaced_with_a_notice(call, trained, capsys):
    one = sorted((trained.data / "keras_slices_test").iterdir())[0]
    call("out", reconstruct=[trained.data / "keras_slices_test"])
    capsys.readouterr()
    folder = call("out", reconstruct=[one])
    assert "9 files of an earlier call: replaced" in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 3


def test_slices_with_similar_names_do_not_overwrite_each_other(call, trained, tmp_path, monkeypatch):
    """a/b.nii.gz, a_b.nii.gz and a/b.nii are different slices. No output file is hidden."""
    source = nib.load(next((trained.data / "keras_slices_test").iterdir()))
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("a/b.nii.gz", "a_b.nii.gz", "a/b.nii"):
        nib.save(source, tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path / "in" / "a")
    folder = call("out", reconstruct=[".."])
    names = [path.name for path in folder.glob("*_reconstruction.nii.gz")]
    assert len(names) == 3
    assert not any(name.startswith(".") for name in names)


def test_input_slices_in_the_output_folder_are_never_removed(call, trained, tmp_path):
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


# ---------------------------------------------------------------- resampled, cropped and scaled slices


def test_samples_have_the_pixel_size_and_the_intensity_of_training(call, prepared):
    config = read_config(prepared.run)
    assert config.intensity.percentile is None and config.intensity.low < 0 < config.intensity.scale
    folder = call(num=4, run=prepared.run)
    for path in folder.glob("*.nii.gz"):
        assert nib.load(path).header.get_zooms()[:2] == pytest.approx((8, 8))
        np.testing.assert_allclose(nib.load(path).affine, config.affine, atol=1e-4)
    pixels = pixels_of(folder)
    tolerance = 1e-5 * config.intensity.scale
    assert config.intensity.low - tolerance <= pixels.min() < 0
    assert 0.2 * config.intensity.scale < pixels.max() <= config.intensity.scale + tolerance


def test_reconstruction_reads_slices_as_training_did(call, prepared):
    """The written originals are, in value and place, the training's own view of the slices."""
    config = read_config(prepared.run)
    folder = call("out", run=prepared.run, reconstruct=[prepared.data / "keras_slices_test"])
    loaded = load_dataset(str(prepared.data), (48, 24), reading=Reading.of(config.options)).test
    for row, name in enumerate(loaded.names):
        original, _ = written(folder, Path(name).name.split(".")[0])
        low, scale = loaded.lows[row], loaded.scales[row]
        expected = denormalize(loaded.batch([row])[0, 0], scale, low)
        np.testing.assert_allclose(values_of(original), expected, atol=1e-4 * scale)
        source = nib.load(next(prepared.data.rglob(Path(name).name)))
        brightness = []
        for image in (source, original):
            values = np.clip(values_of(image), 0, scale)
            places = np.stack([*np.indices(values.shape), np.zeros(values.shape)], -1)
            points = nib.affines.apply_affine(image.affine, places)
            brightness.append((points * values[..., None]).sum((0, 1)) / values.sum())
        np.testing.assert_allclose(*brightness, atol=1.5)  # mm, of pixels of 6.4 and 8


# ---------------------------------------------------------------- unusual files


@pytest.mark.parametrize(
    "name",
    ["case_004_week_0_slice_1_$T2__tse$", "K\udcf6ln", "\u524d\u5217\u817a", "two\nlines", "x" * 240, "\u00e9" * 120],
)
def test_slices_with_unusual_names_are_reconstructed(call, trained, tmp_path, name):
    """Not UTF-8, of the maximal length, or with markup."""
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


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.015, False), (0.5, True), (2.0, True)])
def test_another_pixel_spacing_than_in_training_prints_a_warning(call, trained, tmp_path, caplog, factor, warned):
    own = tmp_path / "own"
    own.mkdir()
    for number, scale in enumerate((1.0, factor)):
        image = nib.load(next((trained.data / "keras_slices_test").glob("*.nii.gz")))
        affine = image.affine @ np.diag([scale, scale, 1, 1])
        nib.save(nib.Nifti1Image(image.get_fdata(), affine), own / f"case_004_week_0_slice_{number}.nii.gz")
    call("out", reconstruct=own)
    assert ("1 slice with another pixel spacing" in caplog.text) == warned


def test_sampling_imports_nothing_slow_that_it_does_not_need(trained, tmp_path):
    """TorchDynamo takes a second, torchmetrics some tenths."""
    options = ["--run", trained.run, "--num", 1, "--batch-size", 1, "--out", tmp_path / "out", "--device", "cpu"]
    given = [str(option) for option in (*options, "--images", tmp_path)]
    slow = ("torch._dynamo", "torchmetrics", "matplotlib.pyplot")
    code = f"import sys, predict; predict.main({given}); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_interrupted_sampling_keeps_the_files_of_an_earlier_call(call, trained, monkeypatch):
    """Earlier files are removed only once the new ones are computed."""
    folder = call(num=2)
    before = pixels_of(folder)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict.Refiner, "sample", interrupted)
        patch.setattr(metrics, "reconstruction_metrics", interrupted)
        for task in ({"num": 3}, {"reconstruct": trained.data / "keras_slices_test"}):
            with pytest.raises(KeyboardInterrupt):
                call(**task)
    np.testing.assert_array_equal(pixels_of(folder), before)


@pytest.mark.parametrize("task", ["num", "reconstruct"])
def test_a_full_disk_is_an_error_that_names_the_file(call, trained, tmp_path, monkeypatch, task):
    """The truncated file is removed."""

    def write(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(RunError, match=r"samples/\S*000000\S*\.nii\.gz cannot be written: No space left on device"):
        call(**{task: 2 if task == "num" else trained.data / "keras_slices_test"})
    assert not list((tmp_path / "samples").glob("*.nii.gz*"))


def test_another_orientation_than_in_training_prints_a_warning(call, trained, tmp_path, caplog):
    own = tmp_path / "own"
    own.mkdir()
    image = nib.load(next((trained.data / "keras_slices_test").glob("*.nii.gz")))
    for number, sign in enumerate((1, -1, -1)):
        flipped = nib.Nifti1Image(image.get_fdata(), image.affine @ np.diag([sign, 1, 1, 1]))
        nib.save(flipped, own / f"case_004_week_0_slice_{number}.nii.gz")
    call("out", reconstruct=own)
    assert "2 slices with another orientation than training slices" in caplog.text


def test_a_run_with_an_unusual_name_is_sampled(trained, tmp_path, capsys):
    run = tmp_path / "K\udcf6ln $a_$"
    shutil.copytree(trained.run, run)
    predict.main(arguments(run=run, num=2, out=tmp_path / "\udcff", images=tmp_path / "\udcfe", device="cpu"))
    assert len(list((tmp_path / "\udcff").glob("*.nii.gz"))) == 2
    assert "\\udcff" in capsys.readouterr().out


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"temperature": 0}, "argument --temperature: 0 is not at least 1e-06"),
        ({"temperature": -1}, "argument --temperature: -1 is not at least 1e-06"),
        ({"temperature": "nan"}, "argument --temperature: nan is not at least 1e-06"),
        ({"top_p": 0}, "argument --top-p: 0 is not above 0 and at most 1"),
        ({"guidance": -1}, "argument --guidance: -1 is not at least 0 and at most 10"),
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
def test_invalid_options_are_one_line_and_write_nothing(trained, tmp_path, monkeypatch, error_line, given, part):
    monkeypatch.chdir(tmp_path)
    assert part in error_line("predict.py", arguments(**{"run": trained.run} | given))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, to be modified."""
    return shutil.copytree(trained.run, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *product([name for name in READ_BY_PREDICT if name != "guide.safetensors"], [None]),
        *product(READ_BY_PREDICT, [b"", b"{", b"\x80\x04K\x01."]),
    ],
)
def test_a_missing_or_damaged_file_of_a_run_is_one_line(copied, tmp_path, error_line, name, content):
    run = copied
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    error = error_line("predict.py", arguments(run=run, out=tmp_path / "out"))
    assert str(run) in error
    assert not (tmp_path / "out").exists()


def test_networks_of_different_runs_are_refused(copied, tmp_path, error_line):
    prior = predict.load_weights(copied / "prior.safetensors", GatedPixelCNN, PriorConfig, "prior_")
    for change in ({"codebook_size": 8}, {"grid": (8, 8)}):
        save_weights(copied / "prior.safetensors", GatedPixelCNN(replace(prior.config, **change)))
        error = error_line("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied}: prior.safetensors and vqvae.safetensors are of different runs" in error
    save_weights(copied / "prior.safetensors", prior)
    save_weights(copied / "guide.safetensors", GatedPixelCNN(replace(prior.config, dilation_cycles=3)))
    error = error_line("predict.py", arguments(run=copied, out=tmp_path / "out"))
    assert f"{copied}: guide.safetensors and prior.safetensors are of different runs" in error
    save_weights(copied / "guide.safetensors", prior)
    refiner = predict.load_weights(copied / "refiner.safetensors", Refiner, RefinerConfig, "refiner_")
    for change in ({"codebook_size": 8}, {"downsampling": 8}):
        save_weights(copied / "refiner.safetensors", Refiner(replace(refiner.config, **change)))
        error = error_line("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied}: refiner.safetensors and vqvae.safetensors are of different runs" in error
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"slice_size": [62, 32]}))
    error = error_line("predict.py", arguments(run=copied, out=tmp_path / "out"))
    assert "vqvae.safetensors takes no slices of 62x32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_huge_network_config_is_refused_before_allocation(copied, tmp_path, error_line, name):
    network = {
        "vqvae": (VQVAE, VQVAEConfig, ""),
        "prior": (GatedPixelCNN, PriorConfig, "prior_"),
        "guide": (GatedPixelCNN, PriorConfig, "prior_"),
        "refiner": (Refiner, RefinerConfig, "refiner_"),
    }
    made = predict.load_weights(copied / name, *network[name.partition(".")[0]])
    fields, tensors = asdict(made.config), made.state_dict()
    changes = [{"channels": 10**9}, {"channels": 60_000}, {"codes": 2**40}, {"grid": [10**6, 10**6]}, {"x": 1}]
    for change in [*changes, {"downsampling": 2**20}, {"time_frequencies": 2**40}]:
        save_tensors(copied / name, fields | change, tensors)
        error = error_line("predict.py", arguments(run=copied, out=tmp_path / "out"))
        assert f"{copied / name} cannot be used" in error


def test_tampered_runs_are_loaded_or_refused_and_execute_nothing(trained, tmp_path):
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


def test_a_run_can_be_sampled_while_it_trains(copied, tmp_path, capsys):
    lock = lock_run(copied)
    predict.main(arguments(run=copied, num=2, out=tmp_path / "out", images=tmp_path / "images", device="cpu"))
    lock.close()
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize(
    "missing",
    [["refiner.safetensors"], ["refiner.safetensors", "prior.safetensors"]],
)
def test_a_run_without_all_networks_reconstructs_but_does_not_sample(copied, trained, tmp_path, error_line, missing):
    """The error names the missing file."""
    for name in missing:
        (copied / name).unlink()
    lock = lock_run(copied)
    given = {"run": copied, "out": tmp_path / "out", "images": tmp_path / "images", "device": "cpu"}
    for script in ("predict.py", "evaluate.py"):
        error = error_line(script, arguments(**{name: given[name] for name in ("run", "images", "device")}))
        assert f"{copied / missing[-1]} does not exist: train.py has not come that far, or the run is of an" in error
    assert not (tmp_path / "out").exists()
    predict.main(arguments(**given, reconstruct=[trained.data / "keras_slices_test"]))
    lock.close()
    assert len(list((tmp_path / "out").glob("*_reconstruction.nii.gz"))) == 4


@pytest.mark.parametrize(
    ("mode", "unused"),
    [
        ({"animate": "a.gif"}, {"num": 3}),
        ({"animate": "a.gif"}, {"out": "here"}),
        ({"reconstruct": ["slices"]}, {"first": 0}),
        ({"reconstruct": ["slices"]}, {"top_p": 0.9}),
    ],
)
def test_options_that_are_not_used_are_refused(trained, error_line, mode, unused):
    error = error_line("predict.py", arguments(run=trained.run, **mode, **unused))
    (option,), (other,) = mode, unused
    assert f"--{option} does not use --{other.replace('_', '-')}: leave it out" in error


@pytest.mark.parametrize("name", ["samples", "images"])
def test_a_file_of_the_name_of_a_folder_does_not_matter_to_an_animation(call, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    call(animate=tmp_path / "a.gif")
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_without_a_guide_is_sampled_without_guidance(call, copied, tmp_path, error_line):
    (copied / "guide.safetensors").unlink()
    given = {"run": copied, "out": tmp_path / "out", "device": "cpu"}
    unguided = [call("default", num=2, run=copied), call("whole", num=2, guidance=0)]
    assert np.array_equal(*map(pixels_of, unguided))
    assert all(json.loads((folder / "samples.json").read_text())["guidance"] == 0 for folder in unguided)
    error = error_line("predict.py", arguments(**given, guidance=1))
    assert f"{copied} has no guide.safetensors: leave --guidance out" in error


def test_an_output_folder_that_is_a_file_is_refused(call, tmp_path):
    (tmp_path / "samples").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"):
        call(num=1)
    assert (tmp_path / "samples").read_text() == "mine"


def test_a_figure_folder_that_is_a_file_is_refused(call, tmp_path):
    (tmp_path / "images").write_text("mine")
    with pytest.raises(RunError, match="images"):
        call(num=1)


def test_unreadable_slices_leave_earlier_reconstructions(call, trained, tmp_path):
    folder = call("out", reconstruct=[trained.data / "keras_slices_test"])
    before = sorted(folder.iterdir())
    (tmp_path / "bad.nii.gz").write_bytes(b"no slice")
    with pytest.raises(DataError, match=r"bad\.nii\.gz"):
        call("out", reconstruct=[tmp_path / "bad.nii.gz"])
    assert sorted(folder.iterdir()) == before
