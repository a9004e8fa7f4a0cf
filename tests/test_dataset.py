"""dataset.py: splits, checks, scaling, cache and batches, on small real NIfTI files."""

import gzip
import json
import os
import shutil
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dataset
from dataset import DataError, batch_indices, load_dataset, read_slices, unscale

REAL = Path(__file__).parents[2] / "shared" / "hipmri_like"
AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.9, 0, 20], [0, 0, 3, 5], [0, 0, 0, 1.0]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(folder))
    return folder


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def picture(seed, shape=(8, 6)):
    return (np.random.default_rng(seed).random(shape) * 100).astype(np.float32)


def write(path, image=None, affine=AFFINE, kind=nibabel.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(kind(picture(abs(hash(path.name)) % 1000) if image is None else image, affine), path)
    return path


def write_cases(folder, cases, slices=2, week=0, **options):
    for case in cases:
        for number in range(slices):
            write(folder / f"case_{case:03}_week_{week}_slice_{number}.nii", **options)


def write_splits(folder):
    """Writes three training volumes, one for validation and one for testing."""
    for split, cases in (("train", (4, 5, 6)), ("validate", (36,)), ("test", (40,))):
        write_cases(folder / f"keras_slices_{split}", cases)


def cases_of(slices):
    return {name.rpartition("/")[2][:8] for name in slices.names}


def values_of(slices):
    """The slices in the data's units."""
    return unscale(slices.batch(range(len(slices)))[:, 0], slices.scales[:, None, None])


def has_notice(loaded, *words):
    return any(all(word in notice for word in words) for notice in loaded.notices)


# Splits


@pytest.mark.parametrize(
    "names",
    [
        ("keras_slices_train", "keras_slices_validate", "keras_slices_test"),
        ("train", "validate", "test"),
        ("train", "val", "test"),
        ("Train", "validation", "Test"),
    ],
)
def test_split_folders(data, names):
    for name, cases in zip(names, ((1, 2), (3,), (4,))):
        write_cases(data / name, cases)
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [4, 2, 2]
    assert loaded.train.names[0] == f"{names[0]}/case_001_week_0_slice_0.nii"
    assert cases_of(loaded.validate) == {"case_003"}
    assert cases_of(loaded.test) == {"case_004"}
    assert loaded.notices == []


def test_keras_slices_data_below_is_used_and_label_maps_are_not(data):
    write_splits(data / "keras_slices_data")
    write_cases(data / "other", (9,))
    write(data / "keras_slices_data" / "keras_slices_seg_train" / "case_004_week_0_slice_0.nii")
    write(data / "keras_slices_data" / "keras_slices_train" / "seg_004_week_0_slice_0.nii")
    (data / "keras_slices_data" / "keras_slices_train" / "._case_004_week_0_slice_0.nii").write_bytes(b"finder")
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert not any("seg" in name for name in loaded.train.names)
    assert loaded.notices == []


def test_missing_test_is_empty_and_loose_files_are_mentioned(data):
    write_cases(data / "train", (1,))
    write_cases(data / "val", (2,))
    write(data / "case_003_week_0_slice_0.nii")
    loaded = load_dataset(str(data))
    assert len(loaded.test) == 0
    assert loaded.test.batch([]).shape == (0, 1, 8, 6)
    assert has_notice(loaded, "1 files outside")


def test_missing_validate_is_carved_off_train_by_case(data):
    write_cases(data / "train", range(5))
    write_cases(data / "test", (9,))
    loaded = load_dataset(str(data))
    assert len(cases_of(loaded.validate)) == 1
    assert len(cases_of(loaded.train)) == 4
    assert not cases_of(loaded.train) & cases_of(loaded.validate)
    assert cases_of(loaded.test) == {"case_009"}
    assert has_notice(loaded, "no validation slices")


def test_flat_folder_is_split_by_case_with_the_seed(data):
    write_cases(data / "a", range(30), slices=1)
    write_cases(data / "b", range(30, 60), slices=1, week=1)
    first, again, other = (load_dataset(str(data), seed=seed) for seed in (0, 0, 1))
    assert [len(first.train), len(first.validate), len(first.test)] == [54, 3, 3]
    assert not cases_of(first.train) & (cases_of(first.validate) | cases_of(first.test))
    assert not cases_of(first.validate) & cases_of(first.test)
    assert first.validate.names == again.validate.names
    assert first.validate.names != other.validate.names
    assert other.notices == ["split by case with seed 1: 54 train, 3 validate, 3 test slices"]


@pytest.mark.parametrize(("cases", "expected"), [(2, [2, 2, 0]), (3, [2, 2, 2]), (10, [16, 2, 2])])
def test_flat_folder_of_few_cases(data, cases, expected):
    write_cases(data, range(cases))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == expected


def test_single_case_is_split_by_file(data):
    write_cases(data, (1,), slices=4)
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 1, 1]
    assert has_notice(loaded, "warning", "case_001", "one patient")
    assert has_notice(loaded, "split by file with seed 0: 2 train, 1 validate, 1 test")
    assert len({*loaded.train.scales, *loaded.validate.scales, *loaded.test.scales}) == 1  # it is one volume


def test_names_without_a_case_are_split_by_file(data):
    for number in range(4):
        write(data / f"image{number}.nii")
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 1, 1]
    assert has_notice(loaded, "warning", "4 names give no case")
    assert np.isnan(loaded.train.positions).all()
    assert loaded.train.scales[0] != loaded.train.scales[1]  # each file is its own volume


def test_a_case_in_two_splits_is_a_leak(data):
    write_splits(data)
    write_cases(data / "keras_slices_test", (5,), week=3)
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning", "case_005", "train", "test")
    assert not has_notice(loaded, "case_004")


def test_positions_are_ranks_within_the_volume(data):
    for number in (2, 10, 4):
        write(data / "train" / f"case_001_week_0_slice_{number}.nii")
    write(data / "train" / "case_001_week_1_slice_7.nii")
    write_cases(data / "val", (2,))
    loaded = load_dataset(str(data))
    assert [name.rpartition("_")[2] for name in loaded.train.names] == ["2.nii", "4.nii", "10.nii", "7.nii"]
    assert loaded.train.positions.tolist() == [0, 0.5, 1, 0.5]


# Pixels


def test_scaling_is_a_volume_at_a_time(data):
    bright, dark = picture(1, (2, 8, 6)) * 7 - 20, picture(2, (2, 8, 6))
    for week, volume in enumerate((bright, dark)):
        for number, image in enumerate(volume):
            write(data / "train" / f"case_001_week_{week}_slice_{number}.nii", image)
    write_cases(data / "val", (2,))
    loaded = load_dataset(str(data))
    scales = [np.percentile(volume, 99.5) for volume in (bright, dark)]
    expected = [np.clip(volume / scale, 0, 1) * 2 - 1 for volume, scale in zip((bright, dark), scales)]
    np.testing.assert_allclose(loaded.train.batch(range(4))[:, 0], np.concatenate(expected), atol=1 / 254)
    np.testing.assert_allclose(loaded.train.scales, np.repeat(scales, 2), rtol=1e-6)
    assert loaded.scale == pytest.approx(np.mean(scales))
    batch = loaded.train.batch([3, 0])
    assert batch.shape == (2, 1, 8, 6) and batch.dtype == torch.float32
    assert batch.min() == -1 and batch.max() == 1
    torch.testing.assert_close(batch[1], loaded.train.batch([0])[0])


def test_trailing_axes_are_dropped(data):
    for week, shape in enumerate([(8, 6), (8, 6, 1), (8, 6, 1, 1)]):
        write(data / "train" / f"case_001_week_{week}_slice_0.nii", picture(1).reshape(shape))
    write_cases(data / "val", (2,))
    loaded = load_dataset(str(data))
    assert loaded.slice_size == (8, 6)
    np.testing.assert_array_equal(loaded.train.pixels[0], loaded.train.pixels[1])
    np.testing.assert_array_equal(loaded.train.pixels[0], loaded.train.pixels[2])


def test_crop_and_pad_are_central_and_the_affine_follows(data):
    oblique = np.array([[0.7, 0.2, 0, 1], [-0.2, 0.9, 0.1, 2], [0, 0.1, 3, 3], [0, 0, 0, 1]])
    image = picture(1, (12, 5))
    path = write(data / "case_001_week_0_slice_0.nii", image, oblique)
    slices, (affine,) = read_slices([path], (8, 10))
    grey = slices.pixels[0]
    shown = np.rint(np.clip(image / np.percentile(image, 99.5), 0, 1) * 255)
    np.testing.assert_array_equal(grey[:, 3:8], shown[2:10])
    assert not grey[:, :3].any() and not grey[:, 8:].any()
    np.testing.assert_allclose(affine @ [0, 3, 0, 1], oblique @ [2, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(affine[:3, :3], oblique[:3, :3], rtol=1e-6)


def test_slice_size_is_the_most_common_rounded(data):
    write_cases(data / "train", (1, 2), image=picture(1, (21, 11)))
    write_cases(data / "train", (3,), image=picture(1, (32, 32)))
    write_cases(data / "val", (4,), image=picture(1, (32, 32)), slices=9)
    loaded = load_dataset(str(data), multiple=(8, 8))
    assert loaded.slice_size == (24, 8)
    assert has_notice(loaded, "15 slices", "21x11", "32x32", "24x8")
    assert load_dataset(str(data), slice_size=(32, 32)).slice_size == (32, 32)


def test_tiny_slices_are_padded_to_one_multiple(data):
    write_cases(data, (1, 2), image=picture(1, (3, 5)))
    assert load_dataset(str(data), multiple=(8, 16)).slice_size == (8, 16)


def test_slice_size_that_does_not_fit_names_the_nearest(data):
    with pytest.raises(DataError, match="248x128 and 256x136"):
        load_dataset(str(data), slice_size=(250, 130), multiple=(8, 8))
    with pytest.raises(DataError, match="1 to 4096"):
        load_dataset(str(data), slice_size=(0, 8))


def test_affine_is_the_most_common_grid_of_training(data):
    write_cases(data / "train", (1, 2))
    write_cases(data / "train", (3,), affine=np.diag([2, 2, 2, 1]))
    write_cases(data / "val", (4,), affine=np.diag([2, 2, 2, 1]), slices=9)
    np.testing.assert_allclose(load_dataset(str(data)).affine, AFFINE, rtol=1e-6)


def test_constant_and_empty_slices_are_kept(data):
    write_cases(data / "train", (1,), image=np.full((8, 6), 5, np.float32))
    write_cases(data / "train", (2,), image=np.zeros((8, 6), np.float32))
    write_cases(data / "train", (3,), image=np.full((8, 6), -5, np.float32))
    write_cases(data / "val", (4,))
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "6 slices hold one value")
    assert loaded.train.pixels[:, 0, 0].tolist() == [255, 255, 0, 0, 0, 0]
    assert loaded.train.scales.tolist() == [5, 5, 1, 1, 1, 1]


def test_a_few_bright_pixels_are_not_lost(data):
    image = np.zeros((40, 40), np.float32)
    image[3, 4] = 7
    slices, _ = read_slices([write(data / "a.nii", image)], (40, 40))
    assert slices.scales.tolist() == [7]
    assert slices.pixels[0, 3, 4] == 255


def big_endian(image, affine):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(image.dtype.newbyteorder(">"))
    return nibabel.Nifti1Image(image, affine, header)


def with_slope(image, affine):
    written = nibabel.Nifti1Image(image, affine)
    written.header.set_data_dtype(np.int16)
    written.header.set_slope_inter(0.25, -3)
    return written


def with_qform(image, affine):
    written = nibabel.Nifti1Image(image, None)
    written.set_qform(affine, 1)
    return written


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("a.nii", np.float32, nibabel.Nifti1Image),
        ("a.nii.gz", np.float32, nibabel.Nifti1Image),
        ("a.nii.gz", np.float64, nibabel.Nifti1Image),
        ("a.nii", np.uint8, nibabel.Nifti1Image),
        ("a.nii.gz", np.int32, nibabel.Nifti2Image),
        ("a.nii", np.float32, nibabel.Nifti2Image),
        ("a.nii.gz", np.float32, big_endian),
        ("a.nii", np.int16, big_endian),
        ("a.nii.gz", np.float32, with_slope),
        ("a.nii", np.float32, with_qform),
    ],
)
def test_agrees_with_nibabel(data, name, dtype, kind):
    path = write(data / name, picture(3).astype(dtype), kind=kind)
    theirs = nibabel.load(path)
    slices, (affine,) = read_slices([path], (8, 6))
    values = theirs.get_fdata()
    scale = np.percentile(values, 99.5)
    np.testing.assert_allclose(slices.scales, scale, rtol=1e-6)
    np.testing.assert_allclose(values_of(slices)[0], np.clip(values, 0, scale), atol=scale / 509)
    np.testing.assert_allclose(affine, theirs.affine, rtol=1e-6)


def test_header_extensions_and_zip_members_are_read(data):
    image = nibabel.Nifti1Image(picture(3), AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"scanned " * 100))
    plain = write(data / "plain.nii")
    nibabel.save(image, plain)
    raw = plain.read_bytes()
    (data / "members.nii.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]) + b"\0" * 100)
    slices, _ = read_slices([plain, data / "members.nii.gz"], (8, 6))
    scale = np.percentile(picture(3), 99.5)
    np.testing.assert_allclose(values_of(slices)[0], np.clip(picture(3), 0, scale), atol=scale / 509)
    np.testing.assert_array_equal(slices.pixels[0], slices.pixels[1])


def test_read_slices_takes_files_and_folders(data):
    write_cases(data / "b", (1,), slices=2)
    path = write(data / "a.nii")
    slices, affines = read_slices([data / "b", path], (8, 6))
    assert [name.rpartition("/")[2] for name in slices.names] == [
        "case_001_week_0_slice_0.nii",
        "case_001_week_0_slice_1.nii",
        "a.nii",
    ]
    assert slices.scales[0] == slices.scales[1] != slices.scales[2]
    assert len(affines) == 3
    with pytest.raises(DataError, match="missing.nii: No such file"):
        read_slices([data / "missing.nii"], (8, 6))
    with pytest.raises(DataError, match="not a .nii"):
        read_slices([write(data / "seg_001.nii")], (8, 6))
    with pytest.raises(DataError, match="no .nii or .nii.gz"):
        read_slices([], (8, 6))


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, (3, 4), elements=st.floats(0, 2000, width=32)),
    st.floats(1, 1000, width=32),
)
def test_scale_and_unscale_round_trip(values, scale):
    stored = np.rint(np.clip(values, 0, scale) / scale * 255).astype(np.uint8)
    slices = dataset.Slices(stored[None], ["a"], np.zeros(1), np.array([scale]))
    back = unscale(slices.batch([0]), scale)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[0, 0], np.clip(values, 0, scale), atol=scale / 255)
    assert unscale(np.array([-1.0, 1.0]), scale).tolist() == [0, np.float32(scale)]


# Cache


def forbid_decoding(monkeypatch):
    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(dataset, "_read_image", fail)


def test_second_load_decodes_nothing(data, cache, monkeypatch):
    write_splits(data)
    write_cases(data / "keras_slices_test", (41,), image=picture(1, (9, 9)))
    first = load_dataset(str(data))
    forbid_decoding(monkeypatch)
    second = load_dataset(str(data))
    for one, two in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.scales, two.scales)
        assert one.names == two.names
    assert (first.scale, first.fingerprint, first.notices) == (second.scale, second.fingerprint, second.notices)
    np.testing.assert_array_equal(first.affine, second.affine)
    assert isinstance(second.train.pixels.base.base, np.memmap) or isinstance(second.train.pixels.base, np.memmap)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data), slice_size=(16, 16))
    path = data / "keras_slices_train" / "case_004_week_0_slice_0.nii"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data))


def test_fingerprint_follows_the_pixels_alone(data, tmp_path):
    write_splits(data)
    first = load_dataset(str(data)).fingerprint
    shutil.copytree(data, tmp_path / "moved", copy_function=shutil.copyfile)
    assert load_dataset(str(tmp_path / "moved")).fingerprint == first
    write(tmp_path / "moved" / "keras_slices_test" / "case_040_week_0_slice_0.nii", picture(12345))
    assert load_dataset(str(tmp_path / "moved")).fingerprint != first


@pytest.mark.parametrize("damage", ["index", "null", "short", "long", "header", "missing"])
def test_damaged_cache_is_made_again(data, cache, damage):
    write_splits(data)
    first = load_dataset(str(data))
    expected = first.train.pixels.copy()
    (folder,) = cache.iterdir()
    pixels, index = folder / "pixels.npy", folder / "index.json"
    if damage == "index":
        index.write_bytes(index.read_bytes()[:-30])
    if damage == "null":
        index.write_text("null")
    if damage == "short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    if damage == "long":
        pixels.write_bytes(pixels.read_bytes() + b"0")
    if damage == "header":
        pixels.write_bytes(b"x" * pixels.stat().st_size)
    if damage == "missing":
        pixels.unlink()
    np.testing.assert_array_equal(load_dataset(str(data)).train.pixels, expected)
    (folder,) = cache.iterdir()
    assert json.loads((folder / "index.json").read_text())["fingerprint"] == first.fingerprint
    assert (folder / "pixels.npy").stat().st_size == 128 + 10 * 8 * 6


def test_an_interrupt_does_not_wait_for_the_rest(data, cache, monkeypatch):
    calls = []

    def interrupt(path):
        calls.append(path)
        time.sleep(0.01)
        raise KeyboardInterrupt

    write_cases(data, range(50), slices=1)
    monkeypatch.setattr(dataset, "_read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(str(data), workers=1)
    assert len(calls) < 40
    assert list(cache.iterdir()) == []


def test_unwritable_cache_means_memory(data, tmp_path, monkeypatch):
    write_splits(data)
    expected = load_dataset(str(data))
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(tmp_path / "file" / "cache"))
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "cannot be written", "memory")
    np.testing.assert_array_equal(loaded.train.pixels, expected.train.pixels)
    assert loaded.fingerprint == expected.fingerprint


@pytest.mark.parametrize("step", ["posix_fallocate", "rename"])
def test_full_disk_means_memory(data, cache, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_splits(data)
    monkeypatch.setattr(os, step, full, raising=False)
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "No space left", "memory")
    assert len(loaded.train) == 6 and loaded.train.pixels.any()
    assert list(cache.iterdir()) == []


def test_processes_that_race_agree(data, cache):
    write_splits(data)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_dataset(str(data)), range(8)))
    assert len({one.fingerprint for one in loaded}) == 1
    for one in loaded[1:]:
        np.testing.assert_array_equal(one.train.pixels, loaded[0].train.pixels)
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("PROSTATEVQ_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert dataset._cache_folder() == tmp_path / "xdg" / "prostatevq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset._cache_folder() == tmp_path / ".cache" / "prostatevq"


@pytest.fixture
def phantom_calls(monkeypatch):
    calls = []

    def write_phantom(folder, **_):
        calls.append(folder)
        write_splits(Path(folder))

    monkeypatch.setattr(dataset.phantom, "write_phantom", write_phantom)
    return calls


def test_phantom_is_written_once(cache, phantom_calls):
    first, second = load_dataset("phantom"), load_dataset("phantom")
    assert len(phantom_calls) == 1
    assert [len(first.train), len(first.validate), len(first.test)] == [6, 2, 2]
    assert first.fingerprint == second.fingerprint
    assert sum(path.name.startswith("phantom-") for path in cache.iterdir()) == 1


def test_phantom_without_a_cache(tmp_path, phantom_calls, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(tmp_path / "file"))
    loaded = load_dataset("phantom")
    assert has_notice(loaded, "memory")
    assert loaded.train.batch([0]).max() <= 1
    assert not phantom_calls[0].exists()


# Bad input


def message(call, *arguments, **options):
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def reason(path):
    """Why `path` is refused, and that it is so with memory bounded and no warning."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = message(read_slices, [path], (8, 6))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    start = f"1 of 1 files cannot be used: {path.as_posix()}: "
    assert text.startswith(start)
    return text.removeprefix(start)


def changed(path, **fields):
    """Writes a good file but for the header fields named."""
    write(path, picture(1))
    raw = path.read_bytes()
    header = nibabel.Nifti1Header(raw[:348], check=False)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + raw[348:])
    return path


def test_bad_folders(data, tmp_path):
    assert message(load_dataset, str(data)) == f"no such folder: {data}"
    path = write(data / "case_001_week_0_slice_0.nii")
    assert "is a file" in message(load_dataset, str(path))
    assert "only one slice" in message(load_dataset, str(data))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    write(empty / "seg_001.nii")
    assert "no .nii or .nii.gz slices" in message(load_dataset, str(empty))
    write(empty / "test" / "case_001_week_0_slice_0.nii")
    assert "no training slices" in message(load_dataset, str(empty))


def test_every_bad_file_is_listed_up_to_ten(data):
    write_splits(data)
    for number in range(12):
        (data / "keras_slices_train" / f"bad{number:02}.nii").write_bytes(b"bad")
    entries = message(load_dataset, str(data)).split("; ")
    assert entries[0] == "12 of 22 files cannot be used: keras_slices_train/bad00.nii: not a NIfTI file"
    assert len(entries) == 11 and entries[-1] == "and 2 more"


def test_all_headers_bad(data):
    for number in range(3):
        (data / "train").mkdir(parents=True, exist_ok=True)
        (data / "train" / f"{number}.nii").write_bytes(b"")
    assert message(load_dataset, str(data)).startswith("3 of 3 files")


def test_truncated_files(data):
    whole = write(data / "whole.nii.gz", picture(1, (60, 60))).read_bytes()
    for length in (0, 5, 30, len(whole) // 2, len(whole) - 1):
        path = data / "cut.nii.gz"
        path.write_bytes(whole[:length])
        assert "cut short" in reason(path) or length < 2
    plain = write(data / "plain.nii", picture(1, (60, 60)))
    plain.write_bytes(plain.read_bytes()[:-1])
    assert "cut short" in reason(plain)


def test_damaged_zip(data):
    path = write(data / "a.nii.gz", picture(1, (60, 60)))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 255  # in the checksum
    path.write_bytes(raw)
    assert "damaged" in reason(path)


@pytest.mark.parametrize("shape", [(8, 6, 5), (8, 6, 1, 3), (1, 8, 6)])
def test_volumes_are_refused(data, shape):
    assert f"shape {shape}: these have to be 2D slices" in reason(write(data / "a.nii.gz", picture(1, shape)))


def test_one_dimension_is_refused(data):
    assert "shape (8,): these have to be 2D slices" in reason(write(data / "a.nii", picture(1, (8,))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(data, value):
    image = picture(1)
    image[2, 3] = value
    assert "NaN or infinite" in reason(write(data / "a.nii", image))


def test_voxels_beyond_float32(data):
    assert "beyond float32" in reason(write(data / "a.nii", picture(1).astype(np.float64) * 1e300))


def test_complex_and_colour_are_refused(data):
    assert "complex64" in reason(write(data / "a.nii", picture(1).astype(np.complex64)))
    colour = np.zeros((8, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "RGB" in reason(write(data / "b.nii", colour))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [2, 5000, 6, 1, 1, 1, 1, 1]}, "1 to 4096"),
        ({"dim": [2, -8, 6, 1, 1, 1, 1, 1]}, "1 to 4096"),
        ({"dim": [2, 4096, 4096, 1, 1, 1, 1, 1]}, "cut short"),
        ({"dim": [0, 8, 6, 1, 1, 1, 1, 1]}, "2D slices"),
        ({"dim": [2, 4, 6, 1, 1, 1, 1, 1]}, "holds more"),
        ({"datatype": 9999}, "bad header"),
        ({"datatype": 0}, "plain numbers"),
        ({"magic": b"ni1"}, "single-file"),
        ({"vox_offset": np.nan}, "bad header"),
        ({"vox_offset": np.inf}, "bad header"),
        ({"vox_offset": 1e9}, "pixels at byte"),
        ({"vox_offset": 0}, "pixels at byte"),
        ({"scl_slope": 1, "scl_inter": np.nan}, "bad header"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "bad header"),
    ],
)
def test_bad_headers(data, fields, words):
    assert words in reason(changed(data / "a.nii", **fields))


def test_no_scaling_where_the_slope_is_zero_or_no_number(data):
    for slope in (0, np.nan):
        path = changed(data / "a.nii", scl_slope=slope, scl_inter=9)
        assert read_slices([path], (8, 6))[0].scales[0] == pytest.approx(np.percentile(picture(1), 99.5))


def test_header_that_a_small_zip_cannot_hold(data):
    path = changed(data / "a.nii", dim=[2, 4096, 4096, 1, 1, 1, 1, 1])
    zipped = data / "a.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert "cannot hold" in reason(zipped)


def test_zip_bomb(data):
    plain = write(data / "a.nii", picture(1)).read_bytes()
    path = data / "a.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(200_000_000), 1))
    assert "holds more" in reason(path)


def test_pipes_devices_and_broken_links(data):
    data.mkdir()
    os.mkfifo(data / "pipe.nii")
    assert "not a regular file" in reason(data / "pipe.nii")
    (data / "zero.nii").symlink_to("/dev/zero")
    assert "not a regular file" in reason(data / "zero.nii")
    (data / "gone.nii").symlink_to(data / "nothing")
    assert "No such file" in reason(data / "gone.nii")
    assert message(load_dataset, str(data)).startswith("3 of 3 files")


def test_links_that_go_round_are_followed_once(data):
    write_cases(data, (1, 2))
    (data / "again").symlink_to(data)
    assert len(load_dataset(str(data)).train) == 2


GOOD = {}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    zipped=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.none() | st.integers(0, 400),
)
def test_any_bytes_load_or_are_refused(data, zipped, edits, cut):
    path = data / ("a.nii.gz" if zipped else "a.nii")
    if path not in GOOD:
        GOOD[path] = write(path, picture(1)).read_bytes()
    raw = bytearray(GOOD[path])
    for place, value in edits:
        raw[place % len(raw)] = value
    path.write_bytes(raw[:cut])
    try:
        slices, _ = read_slices([path], (8, 6))
    except DataError as problem:
        assert str(problem).startswith("1 of 1 files cannot be used: ")
    else:
        assert slices.pixels.shape == (1, 8, 6)


# Batches


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(count, batch_size, seed):
    updates = -(-3 * count // batch_size)
    batches = [batch_indices(count, batch_size, seed, update) for update in range(updates)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    laid = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(laid[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ():
    first, second, other = (batch_indices(100, 100, seed, update) for seed, update in ((0, 0), (0, 1), (1, 0)))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert first.tolist() == batch_indices(100, 100, 0, 0).tolist()


# Real slices


@pytest.mark.skipif(not REAL.is_dir(), reason="the real slices are not here")
def test_real_slices():
    loaded = load_dataset(str(REAL), multiple=(8, 8))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [135, 19, 20]
    assert loaded.slice_size == (256, 128)
    assert loaded.notices == ["38 slices of 256x144 brought to 256x128 by centre crop or zero pad"]
    names = [name for name in loaded.train.names if "case_007" in name]
    volume = np.stack([nibabel.load(REAL / name).get_fdata().reshape(256, 128) for name in names])
    scale = np.percentile(volume, 99.5)
    first = loaded.train.names.index(names[0])
    assert loaded.train.scales[first] == pytest.approx(scale)
    shown = loaded.train.batch(range(first, first + len(names)))[:, 0]
    np.testing.assert_allclose(unscale(shown, scale), np.clip(volume, 0, scale), atol=scale / 509)
    np.testing.assert_allclose(loaded.affine, nibabel.load(REAL / names[0]).affine, rtol=1e-6)


def test_batches_are_all_slices_in_order(data):
    write_splits(data)
    train = load_dataset(str(data)).train
    batches = list(train.batches(3))
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), train.batch(range(len(train))))
