"""phantom.py: noise and shapes against hand-computed values, anatomy in its places, files in HipMRI's layout."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import phantom

ROOT = Path(phantom.__file__).parent
SMALL = (128, 64)
ORGANS = {name: number for number, name in enumerate(phantom.LABELS)}


@pytest.fixture(scope="module")
def volume():
    return phantom.draw_volume(seed=0, case=1, size=SMALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "data"
    phantom.write_phantom(folder, cases=(2, 1, 1), weeks=2, slices=3, size=(64, 32), seed=5, workers=1)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.nii.gz"))
    }


def centroid(labels: np.ndarray, organ: str) -> np.ndarray:
    return np.argwhere(labels == ORGANS[organ]).mean(axis=0)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_phantom_is_the_same_on_every_processor():
    """A run can only be evaluated, or resumed, with the slices that it was trained on.

    NumPy's powers and float32 exponentials differ in the last bit between AVX2 and AVX-512: a pixel of every tenth
    slice did.
    """
    image, labels = phantom.draw_volume(0, 1, 0, slices=20, size=(256, 128))
    digest = hashlib.sha256(image.astype(np.int16).tobytes() + labels.tobytes()).hexdigest()
    assert digest == "da3cdf989e155168025236f514314542febb26d822049582666dbf4fc478ff47"


# ---------------------------------------------------------------- noise


def test_noise_in_air_is_rayleigh_distributed():
    # Without signal the magnitude of complex noise has mean / sd = sqrt(pi / 2) / sqrt(2 - pi / 2) = 1.913
    # and mean square / mean^2 = 4 / pi. Four corners of 20 slices hold 4 * 20 * 16 * 8 = 10240 independent
    # voxels: the ratio's standard error is about 1.9 / sqrt(10240) = 0.02, so 0.1 is five of them (false
    # alarm below 1e-6); the seed is fixed, so it can only fail after a change.
    image, labels = phantom.draw_volume(seed=3, case=2)
    corners = (slice(None), *np.ix_(np.r_[:16, 240:256], np.r_[:8, 120:128]))
    assert not labels[corners].any()
    noise = image[corners]
    rayleigh = np.sqrt(np.pi / 2) / np.sqrt(2 - np.pi / 2)
    assert noise.mean() / noise.std() == pytest.approx(rayleigh, abs=0.1)
    # Its sigma is 0.8 to 1.6 % of the 99.5th percentile; 10 % allow for rounding and for noise in the percentile.
    sigma = noise.mean() / np.sqrt(np.pi / 2)
    assert 0.9 * 0.008 < sigma / np.percentile(image, 99.5) < 1.1 * 0.016


def test_correlated_noise_has_unit_variance_and_is_smooth():
    axis = np.arange(400, dtype=np.float32)
    places, box = (axis[:40], axis, axis), ((0, 400),) * 3
    field = phantom.smooth_noise(np.random.default_rng(0), places, (5, 5, 5), box)
    # About 8 * 80 * 80 grid points: the standard error of the variance is sqrt(2 / 51200) = 0.6 %, an eighth of 5 %.
    assert field.shape == (40, 400, 400) and field.dtype == np.float32
    assert field.var() == pytest.approx(1, abs=0.05)
    step = np.abs(np.diff(field, axis=2)).mean()
    assert step < 0.5 * np.abs(field[:, :, 10:] - field[:, :, :-10]).mean()


# ---------------------------------------------------------------- shapes


def test_distances_are_zero_on_the_surface_and_have_unit_slope():
    ball = phantom.Ellipsoid((1.0, 2.0, 3.0), (5.0, 5.0, 5.0))
    z = np.full((1, 1, 1), 3.0, np.float32)
    for radius in (4.5, 5.0, 5.5):
        x = np.full((1, 1, 1), 1 + radius * 0.6, np.float32)
        y = np.full((1, 1, 1), 2 + radius * 0.8, np.float32)
        assert ball.distance(x, y, z).item() == pytest.approx(radius - 5, abs=1e-3)
    rod = phantom.Band((0.0, 10.0), np.array([[[0, 0, 1], [10, 0, 1]], [[0, 0, 3], [10, 0, 3]]], float))
    x, y, z = (np.full((1, 1, 1), value, np.float32) for value in (5, 4, 5))
    assert rod.distance(x, y, z).item() == pytest.approx(4 - 2, abs=1e-3)  # radius 2 half way between 1 and 3


def test_a_window_contains_its_whole_shape():
    canvas = phantom.Canvas(np.random.default_rng(0), 20, SMALL, 1.02, np.radians(3), (5.0, -3.0))
    shape = phantom.Ellipsoid((60.0, 20.0, 5.0), (20.0, 10.0, 15.0), 30.0, (0.3, -0.2))
    window = canvas.window([shape], 7)
    inside = shape.distance(canvas.x, canvas.y, canvas.z) < 0
    assert inside.any() and inside[window].sum() == inside.sum()


# ---------------------------------------------------------------- anatomy


def test_images_and_labels_have_the_documented_types_and_ranges(volume):
    image, labels = volume
    assert image.shape == labels.shape == (20, *SMALL)
    assert image.dtype == np.float32 and labels.dtype == np.uint8
    assert image.min() >= 0 and np.array_equal(image, np.rint(image))
    assert 300 < np.percentile(image, 99.5) < 1400
    assert set(np.unique(labels)) == set(range(6))


@pytest.mark.parametrize("case", [1, 2, 3, 11])
def test_every_organ_is_in_its_place(case):
    # Axes: slice (upwards), row (left-right), column (backwards).
    labels = phantom.draw_volume(seed=0, case=case, size=SMALL)[1]
    bladder, rectum, prostate = (centroid(labels, name) for name in ("bladder", "rectum", "prostate"))
    assert bladder[0] > rectum[0] and bladder[2] < rectum[2]
    assert bladder[0] > prostate[0]
    assert prostate[2] < rectum[2]
    for place in (bladder, rectum, prostate):
        assert abs(place[1] - (SMALL[0] - 1) / 2) < 0.06 * SMALL[0]
    body = np.isin(labels, [number for name, number in ORGANS.items() if name != "background"])
    assert 0.5 < body.mean() < 0.95
    # There is bone on either side of the prostate in the middle slice.
    middle = labels[10]
    rows = np.flatnonzero((middle == ORGANS["bone"]).any(axis=1))
    assert (rows < prostate[1] - 20).any() and (rows > prostate[1] + 20).any()
    left, right = ((half == ORGANS["bone"]).sum() for half in np.split(middle, 2))
    assert 0.7 < left / right < 1 / 0.7


def test_both_femoral_heads_are_round_and_bright_in_the_middle_slices():
    image, labels = phantom.draw_volume(seed=0, case=4)
    for half in (slice(0, 128), slice(128, 256)):
        bone = labels[14, half] == ORGANS["bone"]
        # the head's disc of 24 mm radius is 15 pixels: some pixel has bone all around it at 10 pixels
        rows, columns = np.ogrid[-10:11, -10:11]
        disc = rows**2 + columns**2 <= 100
        windows = np.lib.stride_tricks.sliding_window_view(bone, disc.shape)
        full = (windows[..., disc].all(axis=-1)).any()
        assert full
        muscle = np.percentile(image[14, half][labels[14, half] == ORGANS["body"]], 10)
        assert np.median(image[14, half][bone]) > 2 * muscle


def test_slices_change_smoothly(volume):
    image, labels = volume
    near = np.abs(image[1:] - image[:-1]).mean()
    far = np.abs(image[10:] - image[:-10]).mean()
    assert near < 0.6 * far
    assert all(dice(a > 0, b > 0) > 0.97 for a, b in zip(labels, labels[1:]))
    bones = labels == ORGANS["bone"]
    assert min(dice(a, b) for a, b in zip(bones, bones[1:])) > 0.7


def test_weeks_share_bones_and_differ_in_bladder_filling():
    first, second = (phantom.draw_volume(seed=0, case=6, week=week, size=SMALL)[1] for week in (0, 1))
    other = phantom.draw_volume(seed=0, case=7, size=SMALL)[1]
    bone = [labels == ORGANS["bone"] for labels in (first, second, other)]
    assert dice(bone[0], bone[1]) > 0.99 > dice(bone[0], bone[2])
    bladder = [labels == ORGANS["bladder"] for labels in (first, second)]
    assert dice(*bladder) < 0.97


def test_anatomy_does_not_depend_on_slices_and_only_coarsens_with_size():
    # 20 slices from -25.5 mm and 10 from -10.5 mm, 3 mm apart: the ten are numbers 5 to 14 of the twenty
    long, short = (phantom.draw_volume(0, 8, slices=slices, size=SMALL)[1] for slices in (20, 10))
    assert np.array_equal(long[5:15], short)
    fine = phantom.draw_volume(0, 8, slices=10, size=(256, 128))[1]
    for organ in ("body", "bone", "bladder", "rectum", "prostate"):
        halved = (fine == ORGANS[organ]).reshape(10, 128, 2, 64, 2).mean(axis=(2, 4)) > 0.5
        assert dice(halved, short == ORGANS[organ]) > 0.8


def test_volumes_are_deterministic_and_differ_between_seeds_cases_and_weeks():
    draw = lambda *key: phantom.draw_volume(*key, slices=2, size=(64, 32))[0]  # noqa: E731
    assert np.array_equal(draw(0, 1, 0), draw(0, 1, 0))
    others = [draw(1, 1, 0), draw(0, 2, 0), draw(0, 1, 1), draw(1, 0, 0)]
    assert all(not np.array_equal(draw(0, 1, 0), other) for other in others)


def test_the_first_exposure_is_reproducible_between_versions():
    image = phantom.draw_volume(5, 4, 1, 3, (64, 32))[0]
    assert np.array_equal(image, phantom.draw_volume(5, 4, 1, 3, (64, 32), exposure=0)[0])
    # Noise in two corners and the mean, recorded once. A tolerance of 1 allows for rounding on other processors.
    np.testing.assert_allclose(image[0, 0, :8], [21, 17, 9, 24, 30, 20, 9, 24], atol=1)
    np.testing.assert_allclose(image[2, -1, -8:], [12, 16, 25, 13, 26, 18, 26, 6], atol=1)
    assert image.mean() == pytest.approx(279.356, abs=0.05)


def test_another_exposure_has_other_noise_of_the_same_strength(volume):
    image, labels = volume
    other, again, third = (phantom.draw_volume(0, 1, size=SMALL, exposure=number) for number in (1, 1, 2))
    assert np.array_equal(other[0], again[0])
    assert all(np.array_equal(labels, others) for _, others in (other, third))
    # In the air near the corners, 4 * 20 * 16 * 8 = 10240 voxels of noise alone: 5 standard errors of the ratio of two
    # means are 5 * 0.523 * sqrt(2 / 10240) = 0.037, those of a correlation 0.05.
    corners = (slice(None), *np.ix_(np.r_[:16, 112:128], np.r_[:8, 56:64]))
    noise = [exposed[corners].ravel() for exposed in (image, other[0], third[0])]
    assert not labels[corners].any()
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert noise[one].mean() / noise[two].mean() == pytest.approx(1, abs=0.037)
        assert abs(np.corrcoef(noise[one], noise[two])[0, 1]) < 0.05


def test_the_mean_of_many_exposures_approaches_the_noiseless_one():
    count, drawing = 30, {"seed": 0, "case": 1, "slices": 4, "size": (64, 32)}
    clean, labels = phantom.draw_volume(**drawing, exposure=None)
    exposures = np.stack([phantom.draw_volume(**drawing, exposure=number)[0] for number in range(count)])
    assert clean.dtype == np.float32 and np.array_equal(clean, np.rint(clean))
    assert (clean[:, [0, -1]] == 0).all()
    assert np.array_equal(labels, phantom.draw_volume(**drawing)[1])
    # sigma from the noise in air, whose mean is sigma sqrt(pi / 2). Where the signal is 20 times as strong the noise
    # is normal, of a mean shifted by less than sigma / 40, and the mean of 30 is sigma / sqrt(30) off.
    sigma = exposures[:, :, [0, -1]].mean() / np.sqrt(np.pi / 2)
    bright = clean > 20 * sigma
    error = (exposures.mean(axis=0) - clean)[bright]
    assert bright.sum() > 3000  # 5 standard errors of a standard deviation of as many are 6 %, rounding adds 2 %
    assert abs(error.mean()) < sigma / 40 + 5 * sigma / np.sqrt(count * bright.sum())
    assert error.std() == pytest.approx(sigma / np.sqrt(count), rel=0.1)


def test_a_negative_exposure_is_refused():
    with pytest.raises(ValueError, match="exposure must not be negative, not -1"):
        phantom.draw_volume(0, 1, slices=1, size=(16, 8), exposure=-1)


@pytest.mark.parametrize("slices, size", [(1, (16, 8)), (1, (64, 32)), (3, (50, 70)), (40, (32, 16))])
def test_volumes_of_any_size_contain_anatomy(slices, size):
    image, labels = phantom.draw_volume(0, 1, slices=slices, size=size)
    assert image.shape == labels.shape == (slices, *size)
    assert np.isfinite(image).all() and {0, 1, 2} <= set(np.unique(labels))


# ---------------------------------------------------------------- files


def test_files_are_in_the_hipmri_layout(written):
    for split, cases in (("train", (1, 2)), ("validate", (3,)), ("test", (4,))):
        for folder, prefix in ((f"keras_slices_{split}", "case"), (f"keras_slices_seg_{split}", "seg")):
            names = {path.name for path in (written / folder).iterdir()}
            assert names == {
                f"{prefix}_{case:03d}_week_{week}_slice_{index}.nii.gz"
                for case in cases
                for week in range(2)
                for index in range(3)
            }
    assert len(list(written.iterdir())) == 6


def test_files_contain_what_was_drawn(written):
    images, labels = phantom.draw_volume(5, 4, 1, 3, (64, 32))
    image = nib.load(written / "keras_slices_test" / "case_004_week_1_slice_2.nii.gz")
    label = nib.load(written / "keras_slices_seg_test" / "seg_004_week_1_slice_2.nii.gz")
    assert image.shape == label.shape == (64, 32)
    assert image.get_data_dtype() == np.float32 and label.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(image.dataobj), images[2])
    assert np.array_equal(np.asarray(label.dataobj), labels[2])
    assert image.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(image.affine, label.affine)
    voxel = 410 / 64
    assert np.allclose(np.diag(image.affine), [-voxel, -voxel, 3, 1])
    # The centre of the image is the origin; slice 2 lies 6 mm up; rows run to the left, columns to the back.
    assert np.allclose(image.affine @ [31.5, 15.5, 0, 1], [0, 0, 6, 1], atol=1e-4)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


def test_files_depend_on_the_seed_and_not_on_the_workers(written, tmp_path):
    phantom.write_phantom(tmp_path / "again", (2, 1, 1), 2, 3, (64, 32), seed=5, workers=2)
    phantom.write_phantom(tmp_path / "other", (2, 1, 1), 2, 3, (64, 32), seed=6, workers=1)
    first, again, other = (digests(folder) for folder in (written, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first.keys() == other.keys()
    images = [name for name in first if "seg" not in name]
    assert len(images) == 24 and len({first[name] for name in images}) == 24
    assert all(first[name] != other[name] for name in images)


# ---------------------------------------------------------------- command line


def test_the_command_line_writes_a_data_set(tmp_path):
    arguments = ["--cases", "1", "0", "1", "--slices", "2", "--size", "32", "16", "--workers", "1"]
    command = [sys.executable, str(ROOT / "phantom.py"), str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 2 * 2 * 2
    assert os.listdir(tmp_path / "out" / "keras_slices_validate") == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--slices", "0"], "slices"),
        (["--size", "8", "8"], "size"),
        (["--cases", "1", "-2", "1"], "cases"),
        (["--weeks", "-1"], "weeks"),
        (["--seed", "-1"], "seed"),
        (["--workers", "0"], "workers"),
    ],
)
def test_numbers_out_of_range_are_reported_on_one_line(tmp_path, capsys, arguments, says):
    assert phantom.main([str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.fullmatch(r"error: .*\n", printed.err) and says in printed.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert phantom.main([str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert phantom.main([str(tmp_path / "mine.txt")]) == 2
