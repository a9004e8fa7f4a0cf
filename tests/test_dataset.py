"""dataset.py: splits, scaling, cache, notices and batches, on small real NIfTI files."""

import gzip
import os
import shutil
import time
import tracemalloc
from collections import Counter
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mutated_files import largest, load_case, make_case
from nibabel.affines import apply_affine
from slice_files import (
    AFFINE,
    big_endian,
    entries,
    forbid_decoding,
    has_notice,
    message,
    picture,
    write,
    write_cases,
    write_splits,
    write_volume,
)

import dataset
import decoding
from dataset import DataError, batch_indices, denormalize, describe_changes, load_dataset, read_slices
from files import Reading
from intensity import Limits, to_grey
from nifti import encode_slice, read_image
from volumes import cut_volume

pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "hipmri_like"


# ---------------------------------------------------------------- loading


def test_unusable_folders_are_refused(data, tmp_path):
    assert message(load_dataset, str(data)) == f"no such folder: {data}"
    assert message(load_dataset, " ") == "no data folder: its path is empty"
    path = write(data / "case_001_week_0_slice_0.nii")
    assert "is a file" in message(load_dataset, str(path))
    assert "only one slice" in message(load_dataset, str(data))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    write(empty / "seg_001.nii")
    assert "no slices or volumes in" in message(load_dataset, str(empty))
    write(empty / "test" / "case_001_week_0_slice_0.nii")
    assert "no training slices" in message(load_dataset, str(empty))


def test_the_first_ten_bad_files_are_listed(data):
    write_splits(data)
    for number in range(12):
        (data / "keras_slices_train" / f"bad{number:02}.nii").write_bytes(b"bad")
    entries = message(load_dataset, str(data)).split("; ")
    assert entries[0] == "12 of 22 files cannot be used: keras_slices_train/bad00.nii: not a NIfTI file"
    assert len(entries) == 10 and entries[-1].endswith("bad09.nii: not a NIfTI file and 2 more")


def test_a_folder_of_empty_files_is_refused(data):
    for number in range(3):
        (data / "train").mkdir(parents=True, exist_ok=True)
        (data / "train" / f"{number}.nii").write_bytes(b"")
    assert message(load_dataset, str(data)).startswith("3 of 3 files")


def test_a_single_4d_file_is_refused_for_its_shape(data):
    """The message does not call it the only slice."""
    write(data / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1, (8, 6, 5, 2)))
    text = message(load_dataset, str(data))
    assert text.startswith("1 of 1 file cannot be used: ")
    assert text.endswith("LFOV.nii.gz: has shape (8, 6, 5, 2): only 2D slices and 3D volumes are supported")
    write(data / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1))
    assert "only one slice" in message(load_dataset, str(data))


def test_mutated_files_load_or_are_refused(tmp_path):
    """A short form of `python tests/campaign.py files`."""
    loaded = sum(load_case(make_case(seed, tmp_path / str(seed))) for seed in range(200))
    assert 20 <= loaded <= 180


def test_mutated_files_are_resampled_cropped_and_standardised_or_refused(tmp_path):
    reading = Reading(pixel_size=1.3, crop="body", intensity="zscore")
    loaded = sum(load_case(make_case(seed, tmp_path / str(seed)), reading) for seed in range(200, 300))
    assert 10 <= loaded <= 90


@pytest.mark.skipif(not REAL.is_dir(), reason="the real slices are not here")
def test_real_slices_load():
    loaded = load_dataset(str(REAL), multiple=(8, 8))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [135, 19, 20]
    assert loaded.slice_size == (256, 128)
    cropped, sizes = loaded.notices
    assert cropped == "38 slices of 256x144 cropped or padded about the centre to 256x128"
    assert sizes.startswith("warning: pixel sizes differ, from 0.75x0.75 to ")
    assert loaded.train.cases == [name[19:27] for name in loaded.train.names]
    names = [name for name in loaded.train.names if "case_007" in name]
    volume = np.stack([nib.load(REAL / name).get_fdata().reshape(256, 128) for name in names])
    scale = np.percentile(volume, 99.5)
    first = loaded.train.names.index(names[0])
    assert loaded.train.scales[first] == pytest.approx(scale)
    shown = loaded.train.batch(range(first, first + len(names)))[:, 0]
    np.testing.assert_allclose(denormalize(shown, scale), np.clip(volume, 0, scale), atol=scale / 509)
    np.testing.assert_allclose(loaded.affine, nib.load(REAL / names[0]).affine, rtol=1e-6)


def test_read_slices_accepts_files_and_folders(data):
    write_cases(data / "b", (1,), slices=2)
    path = write(data / "a.nii")
    slices, affines, _ = read_slices([data / "b", path], (8, 6))
    assert [name.rpartition("/")[2] for name in slices.names] == [
        "case_001_week_0_slice_0.nii",
        "case_001_week_0_slice_1.nii",
        "a.nii",
    ]
    assert slices.scales[0] == slices.scales[1] != slices.scales[2]
    assert len(affines) == 3
    with pytest.raises(DataError, match="missing.nii: No such file"):
        read_slices([data / "missing.nii"], (8, 6))
    with pytest.raises(DataError, match="is no slice: "):
        read_slices([write(data / "seg_001.nii")], (8, 6))
    with pytest.raises(DataError, match="no slices or volumes in"):
        read_slices([], (8, 6))


def test_read_slices_scales_single_files_as_one_volume(data):
    paths = [write(data / f"case_1/slice_{number}.nii", picture(number) * (number + 1)) for number in (1, 0)]
    slices, *_ = read_slices(paths, (8, 6))
    assert slices.names == [path.as_posix() for path in paths]
    assert slices.scales[0] == slices.scales[1]
    assert slices.positions.tolist() == [1, 0]


def test_added_removed_and_altered_files_are_listed():
    before = {f"{number}.nii": "aa" for number in range(8)}
    assert describe_changes(before, dict(reversed(before.items()))) == "files or splits differ"
    assert describe_changes({}, before) == "files or splits differ"  # they were too many to keep
    assert describe_changes(before, {}) == "8 removed (0.nii, 1.nii, 2.nii and 5 more)"
    now = {"9.nii": "aa", "b\n.nii": "aa"} | before | {"4.nii": "ab", "5.nii": "ab", "3.nii": "ab"}
    del now["7.nii"]
    expected = r"2 added (9.nii, b\n.nii), 1 removed (7.nii), 3 altered (3.nii, 4.nii, 5.nii)"
    assert describe_changes(before, now) == expected


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, (3, 4), elements=st.floats(0, 2000, width=32)),
    st.floats(1, 1000, width=32),
    st.floats(-1000, 0.5, width=32),
)
def test_denormalize_inverts_intensity_scaling(values, scale, low):
    stored = to_grey(values, Limits(np.float32(low), np.float32(scale)))
    slices = dataset.Slices(stored[None], ["a"], [None], np.zeros(1), np.array([scale]), np.array([low]))
    back = denormalize(slices.batch([0]), scale, low)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[0, 0], np.clip(values, low, scale), atol=(scale - low) / 255)
    assert denormalize(np.array([-1.0, 1.0]), scale).tolist() == [0, np.float32(scale)]


# ---------------------------------------------------------------- batches


def test_batches_are_all_slices_in_order(data):
    write_splits(data)
    train = load_dataset(str(data)).train
    batches = list(train.batches(3))
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), train.batch(range(len(train))))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_every_epoch_visits_each_slice_once(count, batch_size, seed):
    updates = -(-3 * count // batch_size)
    batches = [batch_indices(count, batch_size, seed, update) for update in range(updates)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    laid = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(laid[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_patients_are_drawn_whole(data):
    write_cases(data / "train", range(10), slices=3)
    write_cases(data / "val", range(20, 22))
    train = load_dataset(str(data)).train
    assert train.draw_patients(30) is train
    some = train.draw_patients(10)
    assert {len(getattr(some, field.name)) for field in fields(some)} == {10}
    counts = Counter(some.cases)
    assert sorted(counts.values()) == [1, 3, 3, 3] and counts.keys() != set(train.cases[:12])
    rows = [train.names.index(name) for name in some.names]
    assert rows == sorted(rows)
    np.testing.assert_array_equal(some.pixels, train.pixels[rows])
    np.testing.assert_array_equal(some.positions, train.positions[rows])
    assert some.names == train.draw_patients(10).names


def test_slices_of_unknown_patients_are_drawn_singly():
    pixels, zeros = np.zeros((9, 2, 2), np.uint8), np.zeros(9)
    unknown = dataset.Slices(pixels, list("abcdefghi"), [None] * 9, zeros, np.ones(9), zeros)
    assert len(set(unknown.draw_patients(4).names)) == 4


def test_permutations_differ_between_epochs_and_seeds():
    first, second, other = (batch_indices(100, 100, seed, update) for seed, update in ((0, 0), (0, 1), (1, 0)))
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()
    assert first.tolist() == batch_indices(100, 100, 0, 0).tolist()


def test_the_permutation_of_an_epoch_is_drawn_once(monkeypatch):
    drawn = []

    class Generator:
        def __init__(self, key):
            self.key, self.rng = key, default_rng(key)

        def permutation(self, count):
            drawn.append(self.key)
            return self.rng.permutation(count)

    default_rng = np.random.default_rng
    dataset.epoch_permutation.cache_clear()
    expected = np.concatenate([default_rng((7, epoch)).permutation(10) for epoch in range(3)])
    monkeypatch.setattr(np.random, "default_rng", Generator)
    batches = [batch_indices(10, 4, 7, update) for update in range(7)]
    assert drawn == [(7, 0), (7, 1), (7, 2)]
    np.testing.assert_array_equal(np.concatenate(batches), expected[:28])


def test_changing_a_batch_leaves_the_permutation_unchanged():
    first = batch_indices(10, 4, 7, 0)
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(batch_indices(10, 4, 7, 0), expected)
    with pytest.raises(ValueError, match="read-only"):
        dataset.epoch_permutation(10, 7, 0)[0] = 1


# ---------------------------------------------------------------- cache


def test_the_cache_is_reopened_without_decoding(data, cache, monkeypatch):
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
    assert first.files == second.files
    np.testing.assert_array_equal(first.affine, second.affine)
    assert isinstance(second.train.pixels.base.base, np.memmap) or isinstance(second.train.pixels.base, np.memmap)
    assert len(entries(cache)) == 1
    for size in ([8, 6], (8, 6)):  # the most common one
        assert load_dataset(str(data), slice_size=size).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data), slice_size=(16, 16))
    path = data / "keras_slices_train" / "case_004_week_0_slice_0.nii"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data))


def test_each_slice_size_has_its_own_cache_entry(data, cache, monkeypatch):
    write_splits(data)
    common, small = load_dataset(str(data)), load_dataset(str(data), slice_size=[16, 16])
    assert len(entries(cache)) == 2
    forbid_decoding(monkeypatch)
    assert load_dataset(str(data)).fingerprint == common.fingerprint
    again = load_dataset(str(data), slice_size=(16, 16))
    assert again.fingerprint == small.fingerprint
    np.testing.assert_array_equal(again.train.pixels, small.train.pixels)
    assert again.train.pixels.shape[1:] == (16, 16)


def test_the_fingerprint_depends_on_content_alone(data, tmp_path):
    write_splits(data)
    first = load_dataset(str(data))
    assert list(first.files) == first.train.names + first.validate.names + first.test.names
    moved = tmp_path / "moved"
    shutil.copytree(data, moved, copy_function=shutil.copyfile)
    second = load_dataset(str(moved))
    assert (second.files, second.fingerprint) == (first.files, first.fingerprint)
    name = "keras_slices_test/case_040_week_0_slice_0.nii"
    write(moved / name, picture(12345))
    third = load_dataset(str(moved))
    assert third.fingerprint != first.fingerprint
    assert describe_changes(first.files, third.files) == f"1 altered ({name})"
    write(moved / name, picture(12345), 2 * AFFINE)
    assert describe_changes(third.files, load_dataset(str(moved)).files) == f"1 altered ({name})"
    assert load_dataset(str(moved), slice_size=(16, 16)).fingerprint != third.fingerprint


def test_compression_does_not_change_checksums(data):
    write_cases(data, (1, 2), slices=1)
    before = load_dataset(str(data)).files
    for path in data.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert load_dataset(str(data)).files == before


@pytest.fixture
def phantom_calls(monkeypatch):
    calls = []

    def write_phantom(folder, **_):
        calls.append(folder)
        write_splits(Path(folder))

    monkeypatch.setattr(dataset.phantom, "write_phantom", write_phantom)
    return calls


def test_the_phantom_is_drawn_once(cache, phantom_calls):
    first, second = load_dataset("phantom"), load_dataset("phantom")
    assert len(phantom_calls) == 1
    assert [len(first.train), len(first.validate), len(first.test)] == [6, 2, 2]
    assert first.fingerprint == second.fingerprint
    assert sum(path.name.startswith("phantom-") for path in cache.iterdir()) == 1


def test_a_damaged_phantom_is_named_with_its_folder(cache, phantom_calls):
    load_dataset("phantom")
    (folder,) = cache.glob("phantom-*")
    (folder / "keras_slices_train" / "case_004_week_0_slice_0.nii").write_bytes(b"x")
    text = message(load_dataset, "phantom")
    assert "slice_0.nii: not a NIfTI file" in text and f"kept in {folder}: delete that folder" in text


# ---------------------------------------------------------------- notices


@pytest.mark.parametrize("value", [0, 100, -5])
@pytest.mark.parametrize(("split", "title"), [("train", "training"), ("validate", "validation"), ("test", "test")])
def test_a_blank_split_is_refused(data, split, title, value):
    write_splits(data)
    for path in (data / f"keras_slices_{split}").iterdir():
        write(path, np.full((8, 6), value, np.int16))
    count = 6 if split == "train" else 2
    text = message(load_dataset, str(data))
    assert text.startswith(f"all {count} {title} slices are constant (keras_slices_{split}/case_")
    slices, *_ = read_slices([data / f"keras_slices_{split}"], (8, 6))
    assert len(slices) == count


def test_identical_slices_in_two_splits_are_reported_as_a_data_leak(data):
    write_splits(data)
    for number in range(2):
        image = nib.load(data / "keras_slices_train" / f"case_004_week_0_slice_{number}.nii").get_fdata()
        write(data / "keras_slices_test" / f"case_050_slice_{number}.nii.gz", image, 2 * AFFINE)  # float64
    pairs = [
        f"keras_slices_train/case_004_week_0_slice_{number}.nii = keras_slices_test/case_050_slice_{number}.nii.gz"
        for number in range(2)
    ]
    expected = f"warning: data leak between splits: train and test share 2 identical slices ({', '.join(pairs)})"
    loaded = load_dataset(str(data))
    assert loaded.notices[0] == expected and "pixel sizes" in loaded.notices[1]
    assert load_dataset(str(data)).notices == loaded.notices  # from the cache


def test_identical_slices_in_a_flat_folder_are_reported(data):
    write_cases(data, range(4), image=picture(1), slices=1)
    loaded = load_dataset(str(data))
    for pair in ("train and validate", "train and test", "validate and test"):
        assert has_notice(loaded, f"warning: data leak between splits: {pair} share 1 identical slice (case_00")
    assert has_notice(loaded, "1 duplicate slice in train (case_00")


@pytest.mark.parametrize("name", ["{} copy (1).nii", "{}.nii.gz", "copy/{}.nii"])
def test_duplicates_within_a_split_are_reported(data, name):
    write_splits(data)
    train = data / "keras_slices_train"
    original = train / "case_004_week_0_slice_0.nii"
    image = nib.load(original).get_fdata()
    copy = write(train / name.format("case_004_week_0_slice_0"), image)
    one, other = sorted(path.relative_to(data).as_posix() for path in (original, copy))
    notice = load_dataset(str(data)).notices[-1]
    assert notice in (f"1 duplicate slice in train ({pair})" for pair in (f"{one} = {other}", f"{other} = {one}"))


def test_similar_slices_are_not_duplicates(data):
    """They are constant, mirrored, scaled, slightly changed in one value, or of another shape."""
    image = np.arange(48, dtype=np.float32).reshape(8, 6)
    near = image.copy()
    near[7, 5] = np.nextafter(near[7, 5], np.float32(0))
    images = [image, near, image[::-1], image[:, ::-1], image * 2, image[:4], np.zeros((8, 6)), np.zeros((8, 6))]
    images += [np.pad(image, ((0, 1), (0, 0))), image.ravel(order="F").reshape((6, 8), order="F")]
    for number, one in enumerate(images):
        write(data / "train" / f"case_{number}_slice_0.nii", one.astype(np.float32))
    write_cases(data / "val", (100,))
    assert not has_notice(load_dataset(str(data)), "duplicate")


def test_duplicates_of_another_data_type_are_found(data):
    image = np.arange(48, dtype=np.float32).reshape(8, 6) % 40
    zeros = np.where(image == 0, np.float32(-0.0), image)
    write(data / "train" / "case_1_slice_0.nii", image.astype(np.uint8))
    write(data / "train" / "case_2_slice_0.nii", zeros, kind=big_endian)
    write(data / "train" / "case_3_slice_0.nii.gz", image[None].astype(np.float64), kind=nib.Nifti2Image)
    write_cases(data / "val", (100,))
    assert has_notice(load_dataset(str(data)), "2 duplicate slices in train")


def test_slices_with_equal_samples_are_not_duplicates(data):
    image = np.zeros((100, 83), np.float32)
    image[0] = 9
    images = [image.copy() for _ in range(3)]
    images[1][50, 41] = images[2][50, 42] = 1
    assert len({decoding.sample_pixels(one).tobytes() for one in images}) == 1
    for number, one in enumerate(images):
        write(data / "train" / f"case_{number}_slice_0.nii", one)
    write_cases(data / "val", (100,))
    assert not has_notice(load_dataset(str(data)), "duplicate")


def test_a_slice_that_changes_before_it_is_compared_is_refused(data, monkeypatch):
    write_cases(data, (1, 2), image=picture(1), slices=1)
    monkeypatch.setattr(dataset, "refuse_blank_splits", lambda files, *_: os.utime(files[0].path, ns=(0, 0)))
    assert "slice_0.nii: changed while it was being read" in message(load_dataset, str(data))


def test_different_pixel_sizes_are_reported(data):
    def scaled(height, width):
        return np.diag([height, width, 3, 1])

    for case, affine in enumerate((scaled(0.8, 0.8), scaled(0.8, 0.8), scaled(1.5, 1.5), scaled(0.81, 0.8))):
        write_cases(data / "train", (case,), affine=affine)
    write_cases(data / "val", (8,), affine=scaled(0.4, 0.4), slices=20)
    kept = "--pixel-size resamples them; without it, samples are written with the most common size, 0.8x0.8 mm"
    expected = f"warning: pixel sizes differ, from 0.4x0.4 to 1.5x1.5 mm: {kept}"
    assert load_dataset(str(data)).notices == [expected]
    assert load_dataset(str(data)).notices == [expected]  # from the cache


def test_pixel_sizes_that_differ_by_rounding_are_not_reported(data):
    turned = AFFINE.copy()
    turned[:2, :2] = np.array([[0.6, -0.8], [0.8, 0.6]]) @ AFFINE[:2, :2]
    write_cases(data / "train", (1,))
    write_cases(data / "train", (2,), affine=AFFINE * [1.01, 1, 1, 1])
    write_cases(data / "val", (3,), affine=turned)
    assert not has_notice(load_dataset(str(data)), "pixel sizes")


def test_pixel_sizes_that_differ_along_one_axis_are_reported(data):
    write_cases(data / "train", (1,))
    write_cases(data / "val", (2,), affine=AFFINE * [1, 1.1, 1, 1])
    assert has_notice(load_dataset(str(data)), "from 0.8x0.9 to 0.8x0.99 mm")


def test_different_orientations_are_reported(data):
    write_splits(data)
    assert load_dataset(str(data)).notices == []
    write(data / "train" / "case_007_week_0_slice_0.nii", affine=AFFINE[:, [1, 0, 2, 3]])
    assert has_notice(
        load_dataset(str(data)),
        "warning: slices have different orientations (AR, RA): all are treated as RA, the most common in training",
    )


def test_read_slices_reports_crop_and_pad(data):
    *_, notices = read_slices([write(data / "a.nii", picture(1, (12, 5)))], (8, 6))
    assert notices == ["1 slice of 12x5 cropped or padded about the centre to 8x6"]
    *_, notices = read_slices([data], (12, 5))
    assert notices == []


def test_values_far_below_0_are_reported(data):
    """Slices normalised to mean 0 count, and single pixels; undershoots of interpolation do not."""
    image = picture(1)
    for number, lowest in enumerate((0, -5, -50, -40)):
        write(data / f"case_{number:03}_slice_0.nii", image + lowest * (number == 3 or image == image.min()))
    notice = "warning: 2 slices with values far below 0, which become black"
    assert has_notice(load_dataset(str(data)), notice)
    assert has_notice(load_dataset(str(data)), notice)  # from the cache
    *_, notices = read_slices([data], (8, 6))
    assert len(notices) == 1 and notice in notices[0]


def test_volumes_darkened_by_a_few_bright_pixels_are_reported(data):
    write_splits(data)
    for number in range(3):
        image = picture(number, (40, 30))
        image[3, :10] = 60_000
        write(data / "keras_slices_train" / f"case_007_slice_{number}.nii", image)
    expected = "warning: 3 nearly black slices: a few far brighter pixels set the intensity scale of the volume"
    assert has_notice(load_dataset(str(data)), expected)
    assert expected in read_slices([data / "keras_slices_train"], (40, 30))[2]


def test_slices_with_few_values_are_reported(data):
    write_splits(data)
    labels = np.random.default_rng(0).integers(0, 6, (8, 6))
    whole = np.random.default_rng(0).integers(0, 30, (8, 6))
    folder = data / "keras_slices_train"
    write(folder / "case_007_slice_0.nii", labels.astype(np.uint8))
    write(folder / "case_007_slice_1.nii", (labels > 2).astype(np.float32) * 255)
    write(folder / "case_007_slice_2.nii", (labels * 0.3).astype(np.float32))
    write(folder / "case_007_slice_3.nii", whole.astype(np.int16))
    start = "warning: 2 slices with fewer than 12 distinct values, all integers, as in label maps"
    names = [f"keras_slices_train/case_007_slice_{number}.nii" for number in (0, 1)]
    loaded = load_dataset(str(data))
    assert loaded.notices == [f"{start} ({', '.join(names)})"]
    assert set(names) < set(loaded.train.names)
    *_, notices = read_slices([folder], (8, 6))
    assert notices == [f"{start} ({', '.join(f'{data.as_posix()}/{name}' for name in names)})"]


def test_few_values_in_the_sample_alone_are_not_reported(data):
    image = np.zeros((60, 50), np.int16)
    image[31, 1::2] = np.arange(25)
    assert len(np.unique(image.ravel(order="F")[::10])) < 12
    *_, notices = read_slices([write(data / "a.nii", image)], (60, 50))
    assert not any("distinct values" in notice for notice in notices)


# ---------------------------------------------------------------- slice size


def test_the_slice_size_is_the_most_common_one_rounded(data):
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


def test_an_unsuitable_slice_size_is_refused_with_the_nearest_ones(data):
    with pytest.raises(DataError, match="248x128 and 256x136"):
        load_dataset(str(data), slice_size=(250, 130), multiple=(8, 8))
    with pytest.raises(DataError, match="1 to 2048"):
        load_dataset(str(data), slice_size=(0, 8))


# ---------------------------------------------------------------- decoding


def test_intensity_is_scaled_per_volume(data):
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


def test_crop_and_pad_are_central_and_move_the_affine(data):
    oblique = np.array([[0.7, 0.2, 0, 1], [-0.2, 0.9, 0.1, 2], [0, 0.1, 3, 3], [0, 0, 0, 1]])
    image = picture(1, (12, 5))
    path = write(data / "case_001_week_0_slice_0.nii", image, oblique)
    slices, (affine,), _ = read_slices([path], (8, 10))
    grey = slices.pixels[0]
    shown = np.rint(np.clip(image / np.percentile(image, 99.5), 0, 1) * 255)
    np.testing.assert_array_equal(grey[:, 3:8], shown[2:10])
    assert not grey[:, :3].any() and not grey[:, 8:].any()
    np.testing.assert_allclose(affine @ [0, 3, 0, 1], oblique @ [2, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(affine[:3, :3], oblique[:3, :3], rtol=1e-6)


def test_the_affine_is_the_most_common_training_grid(data):
    write_cases(data / "train", (1, 2))
    write_cases(data / "train", (3,), affine=np.diag([2, 2, 2, 1]))
    write_cases(data / "val", (4,), affine=np.diag([2, 2, 2, 1]), slices=9)
    np.testing.assert_allclose(load_dataset(str(data)).affine, AFFINE, rtol=1e-6)


def test_constant_and_empty_slices_are_kept(data):
    write_cases(data / "train", (1,), image=np.full((8, 6), 5, np.float32))
    write_cases(data / "train", (2,), image=np.zeros((8, 6), np.float32))
    write_cases(data / "train", (3,), image=np.full((8, 6), -5, np.float32))
    write_cases(data / "train", (4,), image=picture(1), slices=1)
    write_cases(data / "val", (5,))
    loaded = load_dataset(str(data))
    assert loaded.notices[0] == "6 constant slices kept"
    assert loaded.train.pixels[:6, 0, 0].tolist() == [255, 255, 0, 0, 0, 0]
    assert loaded.train.scales[:6].tolist() == [5, 5, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (7, 1, 1)])
def test_slices_one_pixel_wide_load(data, shape):
    slices, *_ = read_slices([write(data / "a.nii", np.full(shape, 3, np.int16))], shape[:2])
    assert slices.scales.tolist() == [3]
    np.testing.assert_array_equal(slices.pixels, np.full((1, *shape[:2]), 255))


def test_a_few_bright_pixels_set_the_scale_of_an_empty_slice(data):
    image = np.zeros((40, 40), np.float32)
    image[3, 4] = 7
    slices, *_ = read_slices([write(data / "a.nii", image)], (40, 40))
    assert slices.scales.tolist() == [7]
    assert slices.pixels[0, 3, 4] == 255


@pytest.mark.parametrize(
    ("dtype", "factor", "offset", "words"),
    [
        (np.float32, 0.01, 0, []),
        (np.float64, 1e-6, 0, []),
        (np.uint16, 600, 0, []),
        (np.int64, 10_000, 0, []),
        (np.float32, 0.02, -1, ["far below 0"]),
        (np.float32, 0.04, -2, ["far below 0"]),
    ],
)
def test_data_of_any_range_keeps_its_contrast(data, dtype, factor, offset, words):
    for case in range(3):
        image = (picture(case).astype(np.float64) * factor + offset).astype(dtype)
        write(data / f"case_{case}_slice_0.nii", image, kind=lambda *of: nib.Nifti1Image(*of, dtype=dtype))
    loaded = load_dataset(str(data))
    assert [word in notice for word, notice in zip(words, loaded.notices[1:])] == [True] * len(words)
    assert len(loaded.notices) == 1 + len(words)
    assert loaded.train.pixels.std() > 40


def test_a_volume_without_values_above_0_is_refused(data):
    """CT stores air as -1024. Constant volumes are accepted."""
    write_splits(data)
    for number in range(2):
        write(data / "keras_slices_test" / f"case_041_slice_{number}.nii", picture(number) - 1024)
    text = message(load_dataset, str(data))
    reason = "its volume has no values above 0, where tissue should be: try --intensity zscore, or window for CT"
    name = "keras_slices_test/case_041_slice_{}.nii"
    assert text == f"2 of 12 files cannot be used: {name.format(0)}: {reason}; {name.format(1)}: {reason}"
    assert "no values above 0" in message(read_slices, [data], (8, 6))
    write(data / "keras_slices_test" / "case_041_slice_0.nii", picture(0) - picture(0).max())  # at 0 at most
    assert text == message(load_dataset, str(data))
    write(data / "keras_slices_test" / "case_041_slice_0.nii", picture(0) - 50)
    assert has_notice(load_dataset(str(data)), "2 slices with values far below 0")


def test_large_slices_are_read_one_at_a_time(data):
    """Each is refused after decompressing 34 MB. The traced peak is the memory of arrays and bytes held at once."""
    (data / "train").mkdir(parents=True)
    for number in range(8):
        (data / "train" / f"{number}.nii.gz").write_bytes(largest(number % 2 * 2 - 1))
    tracemalloc.start()
    try:
        assert message(load_dataset, str(data)).startswith("8 of 8 files")
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_refused_files_are_freed_from_memory(data):
    """There are 40 slices of 1 MB that end in NaN."""
    image = np.zeros((512, 512), np.float32)
    image[-1, -1] = np.nan
    for case in range(40):
        write(data / f"case_{case}.nii", image)
    tracemalloc.start()
    try:
        assert message(load_dataset, str(data), workers=1).startswith("40 of 40 files")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_volumes_are_limited_in_size(data, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_VOLUME", 100)
    write_cases(data / "train", (1,), slices=2)
    write_cases(data / "val", (2,), slices=2)
    assert len(load_dataset(str(data)).train) == 2
    write_cases(data / "train", (1,), slices=3)
    assert "case_001_week_0_slice_2.nii: its volume has more than 100 pixels" in message(load_dataset, str(data))


# ---------------------------------------------------------------- volumes in one file

ORDERS = {"train": ("RAS", "LPS", "PIR"), "val": ("SAL",), "test": ("ILA",)}


def write_volumes(folder, suffix=".nii.gz", kind=nib.Nifti1Image):
    """Write a volume for each of five cases, each stored in another order of axes."""
    case = 0
    for split, orders in ORDERS.items():
        for codes in orders:
            case += 1
            write_volume(folder / split / f"case_{case}{suffix}", seed=case, codes=codes, kind=kind)


def test_volumes_are_cut_scaled_and_split(data):
    write_volumes(data)
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [15, 5, 5]
    assert loaded.slice_size == (8, 6) and loaded.notices == []
    for case in range(3):
        volume = picture(case + 1, (8, 6, 5))
        scale = np.percentile(volume, 99.5)
        part = slice(5 * case, 5 * case + 5)
        np.testing.assert_allclose(loaded.train.scales[part], scale, rtol=1e-6)
        expected = np.rint(np.clip(volume[::-1, ::-1] / np.float32(scale), 0, 1) * 255).transpose(2, 0, 1)
        np.testing.assert_allclose(loaded.train.pixels[part], expected, atol=1)


def test_volumes_equal_the_slices_that_they_contain(data, tmp_path):
    write_volumes(data)
    for path in data.rglob("*.nii.gz"):
        stored = nib.load(path)
        turn = nib.orientations.ornt_transform(nib.io_orientation(stored.affine), nib.orientations.axcodes2ornt("LPS"))
        turned = stored.as_reoriented(turn)
        for index in range(5):
            cut = turned.slicer[:, :, index : index + 1]
            name = path.name.replace(".nii.gz", f"_slice_{index}.nii")
            write(tmp_path / "cut" / path.parent.name / name, cut.get_fdata(dtype=np.float32), cut.affine)
    one, other = load_dataset(str(data)), load_dataset(str(tmp_path / "cut"))
    for first, second in ((one.train, other.train), (one.validate, other.validate), (one.test, other.test)):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        np.testing.assert_array_equal(first.positions, second.positions)
        assert (first.cases, first.scales.tolist()) == (second.cases, second.scales.tolist())
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)


@pytest.mark.parametrize("workers", [2, 5])
def test_pixels_do_not_depend_on_the_number_of_workers(data, cache, workers):
    write_volumes(data)
    write_cases(data / "train", (1,), slices=3)
    one = load_dataset(str(data), workers=1)
    shutil.rmtree(cache)
    other = load_dataset(str(data), workers=workers)
    assert (one.files, one.fingerprint, one.scale) == (other.files, other.fingerprint, other.scale)
    for first, second in ((one.train, other.train), (one.validate, other.validate), (one.test, other.test)):
        np.testing.assert_array_equal(first.pixels, second.pixels)
        np.testing.assert_array_equal(first.scales, second.scales)


def record_reads(monkeypatch):
    """The paths of the files that are decoded from now on."""
    read, original = [], decoding.read_file

    def record(file):
        read.append(file.path)
        return original(file)

    monkeypatch.setattr(decoding, "read_file", record)
    return read


def test_volumes_are_read_once_and_then_reopened(data, monkeypatch):
    read = record_reads(monkeypatch)
    write_volumes(data)
    first = load_dataset(str(data))
    assert sorted(read) == sorted(map(str, data.rglob("*.nii.gz")))
    forbid_decoding(monkeypatch)
    second = load_dataset(str(data))
    assert (first.files, first.fingerprint, first.notices) == (second.files, second.fingerprint, second.notices)
    np.testing.assert_array_equal(first.train.pixels, second.train.pixels)
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data), reading=Reading(1))
    path = data / "train" / "case_1.nii.gz"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="decoded again"):
        load_dataset(str(data))


def test_a_copied_volume_is_a_leak_that_is_found_with_one_more_reading(data, monkeypatch):
    read = record_reads(monkeypatch)
    write_volumes(data)
    write_volume(data / "test" / "case_9.nii", seed=1, codes="AIR")  # case 1
    shared = "train/case_1_slice_000.nii.gz = test/case_9_slice_000.nii"
    loaded = load_dataset(str(data))
    assert has_notice(loaded, f"warning: data leak between splits: train and test share 5 identical slices ({shared}, ")
    assert len(read) == 6 + 2


def test_another_axis_gives_other_slices_and_another_fingerprint(data):
    for case in range(3):
        write_volume(data / f"case_{case}.nii", case, (6, 6, 6))
    loaded = [load_dataset(str(data), reading=Reading(axis)) for axis in (None, 0, 1, 2)]
    assert len({one.fingerprint for one in loaded}) == 3
    assert loaded[0].fingerprint == loaded[3].fingerprint
    assert all(one.files.keys() == loaded[0].files.keys() for one in loaded)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_samples_lie_where_the_slices_of_volumes_lie(data, axis):
    """Pixels written with the affine of a slice are at the physical points of the voxels, after crop and pad, too."""
    oblique = np.array([[0.7, 0.2, 0.3, 1], [-0.2, 0.9, 0.1, 2], [0.1, 0.1, 3, 3], [0, 0, 0, 1]])
    volume = write_volume(data / "case_1.nii", 3, (12, 9, 5), oblique, codes="PIR")
    voxels = volume.get_fdata(dtype=np.float32)
    slices, affines, _ = read_slices([data / "case_1.nii"], (8, 10), Reading(axis))
    seen = 0
    for grey, affine, scale in zip(slices.pixels, affines, slices.scales):
        (data / "sample.nii.gz").write_bytes(encode_slice(denormalize(grey / 127.5 - 1, scale), affine))
        sample = nib.load(data / "sample.nii.gz")
        for row, column in np.argwhere(grey):
            point = nib.affines.apply_affine(sample.affine, [row, column, 0])
            voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(volume.affine), point)).astype(int)
            np.testing.assert_allclose(nib.affines.apply_affine(volume.affine, voxel), point, atol=1e-4)
            expected = min(voxels[tuple(voxel)], scale)
            assert sample.get_fdata()[row, column, 0] == pytest.approx(expected, abs=float(scale) / 400)
            seen += 1
    assert seen > 200


def test_the_affine_of_training_volumes_has_the_spacing_and_axes_of_their_slices(data):
    write_volumes(data)
    loaded = load_dataset(str(data))
    assert nib.aff2axcodes(loaded.affine) == ("L", "P", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(loaded.affine), [0.8, 0.9, 3], rtol=1e-6)
    sagittal = load_dataset(str(data), reading=Reading(0))
    assert sagittal.slice_size == (6, 5) and nib.aff2axcodes(sagittal.affine) == ("P", "I", "L")
    np.testing.assert_allclose(nib.affines.voxel_sizes(sagittal.affine), [0.9, 3, 0.8], rtol=1e-6)


def test_volumes_of_slices_in_other_planes_are_reported(data):
    write_volumes(data)
    write_volume(data / "train" / "case_8.nii", 8, affine=np.diag([3, 0.8, 0.8, 1]))
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning: slices have different orientations (LP, PI): all are treated as LP")
    axial = load_dataset(str(data), reading=Reading(2))
    assert axial.notices[-1].startswith("warning: pixel sizes differ, from 0.8x0.9")


def test_a_bad_volume_is_named_once(data):
    write_volumes(data)
    whole = (data / "train" / "case_1.nii.gz").read_bytes()
    (data / "train" / "case_1.nii.gz").write_bytes(whole[:-9])
    write(data / "train" / "case_7.nii", picture(1, (8, 6, 5, 2)))
    write(data / "train" / "case_8.nii", picture(1, (8, 6, 5)) - 1024)
    text = message(load_dataset, str(data))
    assert text.startswith("3 of 7 files cannot be used: train/case_1.nii.gz: truncated: ")
    assert "train/case_7.nii: has shape (8, 6, 5, 2): only 2D slices and 3D volumes are supported; " in text
    assert text.endswith(
        "train/case_8.nii: its volume has no values above 0, where tissue should be: try --intensity "
        "zscore, or window for CT"
    )


def test_integer_volumes_with_a_slope_and_pairs_load_alike(data, tmp_path):
    def scaled(kind):
        def make(image, affine):
            made = kind(image, affine)
            made.header.set_data_dtype(np.int16)
            made.header.set_slope_inter(0.25, -3)
            return made

        return make

    write_volumes(data, kind=scaled(nib.Nifti1Image))
    write_volumes(tmp_path / "pairs", ".hdr", scaled(nib.Nifti1Pair))
    one, other = load_dataset(str(data)), load_dataset(str(tmp_path / "pairs"))
    np.testing.assert_array_equal(one.train.pixels, other.train.pixels)
    np.testing.assert_array_equal(one.affine, other.affine)
    scales = [np.percentile(picture(seed, (8, 6, 5)) * 0.25 - 3, 99.5) for seed in (1, 2, 3)]  # stored as integers
    assert one.scale == other.scale == pytest.approx(np.median(scales), abs=0.25)


def test_large_volumes_are_decoded_one_at_a_time(data, monkeypatch):
    inside, most = [], []

    def watch(file):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.02)
        images = original(file)
        inside.remove(file)
        return images

    original = decoding.read_file
    write_volumes(data)
    monkeypatch.setattr(decoding, "read_file", watch)
    monkeypatch.setattr(decoding, "LARGE_VOLUME", 100)
    load_dataset(str(data), workers=4)
    assert most == [1] * 5


# ---------------------------------------------------------------- pixel size, crop and intensity


def phantom_body(shape, affine, shift=(0.0, 0.0), brightness=100.0):
    """An ellipse with semi-axes of 30 and 20 mm about the physical point (shift, 0), and air around it."""
    places = apply_affine(affine, np.stack([*np.indices(shape), np.zeros(shape)], -1))[..., :2] - shift
    inside = ((places / (30, 20)) ** 2).sum(-1) < 1
    return np.where(inside, brightness * (1 + 0.2 * np.sin(places[..., 0] / 8)), 0).astype(np.float32)


def read_nifti(path):
    return read_image(path, path.stat().st_size, path.stat().st_mtime_ns)


def centred(rows, columns, shape):
    """The affine of slices with pixels of rows x columns mm, whose middle is the physical origin."""
    steps = np.diag([rows, columns, 3, 1.0])
    steps[:2, 3] = -(np.array(shape) - 1) / 2 * (rows, columns)
    return steps


def write_bodies(data, grids=((0.8, 0.8, (100, 80)), (1.6, 1.2, (50, 60)), (0.5, 1.0, (160, 70))), **options):
    """Write the same body, in a volume of three slices a case, with other pixels for each case."""
    for case, (rows, columns, shape) in enumerate(grids, 1):
        affine = centred(rows, columns, shape)
        volume = np.stack([phantom_body(shape, affine, **options)] * 3, -1)
        for split, number in (("train", case), ("val", case + 10)):
            (data / split).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume * np.float32([1, 0.9, 0.8]), affine), data / split / f"case_{number}.nii")


def test_pixel_size_makes_patients_comparable(data):
    write_bodies(data)
    apart = load_dataset(str(data))
    assert has_notice(apart, "pixel sizes differ, from 0.5x1 to 1.6x1.2 mm", "--pixel-size")
    together = load_dataset(str(data), reading=Reading(pixel_size=1.0))
    assert together.slice_size == (80, 72)
    assert not has_notice(together, "pixel sizes")
    np.testing.assert_allclose(np.abs(together.affine[:3, :3]), np.diag([1, 1, 3]), atol=1e-6)
    first, *others = (together.train.batch([row])[0, 0].numpy() for row in (0, 3, 6))
    for other in others:
        assert np.abs(other - first).mean() < 0.03
    first, *others = (apart.train.batch([row])[0, 0].numpy() for row in (0, 3, 6))
    assert min(np.abs(other - first).mean() for other in others) > 0.15


def test_without_a_slice_size_it_is_that_after_resampling(data):
    write_bodies(data, grids=[(0.8, 0.8, (100, 80))] * 3)
    loaded = load_dataset(str(data), reading=Reading(pixel_size=2.0), multiple=(4, 4))
    assert loaded.slice_size == (40, 32)
    assert load_dataset(str(data), (32, 32), (4, 4), reading=Reading(pixel_size=2.0)).slice_size == (32, 32)


def test_resampled_and_cropped_slices_lie_where_their_features_lie(data):
    """The brightness has its centre at the same physical point in the file and, by the affines, in what is read."""
    affine = centred(0.5, 1.0, (160, 70))
    pixels = phantom_body((160, 70), affine, shift=(9.0, -6.0))
    path = write(data / "case_001_slice_1.nii", pixels, affine)
    for reading in (Reading(pixel_size=1.3), Reading(pixel_size=0.7, crop="body"), Reading(crop="body")):
        slices, (own,), _ = read_slices([path], (144, 80), reading)
        grey = slices.pixels[0] / 255 * float(slices.scales[0])
        points = apply_affine(own, np.stack([*np.indices(grey.shape), np.zeros(grey.shape)], -1))
        centre = (points * grey[..., None]).sum((0, 1)) / grey.sum()
        expected = apply_affine(affine, np.stack([*np.indices(pixels.shape), np.zeros(pixels.shape)], -1))
        clipped = np.minimum(pixels, slices.scales[0])
        np.testing.assert_allclose(centre, (expected * clipped[..., None]).sum((0, 1)) / clipped.sum(), atol=0.1)


def test_crop_body_centres_the_whole_volume_on_the_body(data):
    affine = centred(1.0, 1.0, (120, 90))
    for case, shift in enumerate([(20.0, 10.0), (-15.0, 0.0), (0.0, -12.0)], 1):
        volume = np.stack([phantom_body((120, 90), affine, shift)] * 2, -1)
        volume[..., 1] = np.where(np.indices((120, 90))[0] < 60 + shift[0], volume[..., 1], 0)  # half a body
        for split, number in (("train", case), ("val", case + 10)):
            (data / split).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, affine), data / split / f"case_{number}.nii")
    body, centre = (load_dataset(str(data), (80, 64), reading=Reading(crop=crop)) for crop in ("body", "centre"))
    assert has_notice(body, "of 120x90 cropped or padded about the body to 80x64")
    for row in (0, 2, 4):
        whole, half = (body.train.pixels[row + i] > 30 for i in (0, 1))
        np.testing.assert_allclose(np.argwhere(whole).mean(0), (39.5, 31.5), atol=1)
        assert (half <= whole).all() and half.any()  # moved alike
    assert not (centre.train.pixels[0] == body.train.pixels[0]).all()


def test_padding_has_the_grey_of_air(data):
    image = np.pad(picture(1, (60, 40)), ((0, 0), (10, 0)))
    path = write(data / "case_001_slice_1.nii", image)
    slices, *_ = read_slices([path], (80, 50), Reading(intensity="zscore"))
    (grey,) = np.unique(slices.pixels[0, :10])
    assert 0 < grey < 128 and (slices.pixels[0, 10:70, :10] == grey).all()
    ct = write(data / "case_002_slice_1.nii", phantom_body((60, 50), np.eye(4)) - 1000, np.eye(4))
    slices, *_ = read_slices([ct], (80, 50), Reading(intensity="window", window=(-990, -900)))
    assert not slices.pixels[0, :8].any()


@pytest.mark.parametrize(
    "reading", [Reading(intensity="zscore"), Reading(intensity="window", window=(-50, 90))], ids=["zscore", "window"]
)
def test_other_intensities_are_undone_to_the_values_of_the_files(data, reading):
    write_bodies(data, grids=[(1.0, 1.0, (80, 60))] * 3)
    loaded = load_dataset(str(data), reading=reading)
    assert loaded.low == np.median(loaded.train.lows) and loaded.scale == np.median(loaded.train.scales)
    assert loaded.low < loaded.scale and loaded.low != 0
    values = denormalize(loaded.train.batch([0])[0, 0], loaded.train.scales[0], loaded.train.lows[0])
    stored = cut_volume(read_nifti(data / "train" / "case_1.nii"), 2)[0].image
    low, high = loaded.train.lows[0], loaded.train.scales[0]
    np.testing.assert_allclose(values, np.clip(stored, low, high), atol=(high - low) / 255 / 2 * 1.01)


@pytest.mark.parametrize(("slope", "offset"), [(3.5, 0), (1, 400), (2, -1024), (0.01, 7)])
def test_a_scanners_slope_and_offset_change_no_z_score(data, slope, offset):
    """Nor where the body is found, or the grey level around the slices."""
    affine = centred(1.0, 1.0, (80, 60))
    noise = np.random.default_rng(0).normal(5, 2, (80, 60))
    values = phantom_body((80, 60), affine, shift=(9.0, -4.0)) + noise
    values[3, 3] = -300  # an artefact
    one, other = (
        write(data / f"case_00{i}_slice_1.nii", (values * a + b).astype(np.float32), affine)
        for i, (a, b) in enumerate([(1, 0), (slope, offset)])
    )
    slices, affines, _ = read_slices([one, other], (88, 64), Reading(crop="body", intensity="zscore"))
    np.testing.assert_allclose(slices.pixels[1].astype(int), slices.pixels[0].astype(int), atol=1)
    np.testing.assert_allclose(affines[1], affines[0])
    np.testing.assert_allclose(affines[0][:2, 3], np.array([9.0, -4.0]) - (43.5, 31.5), atol=1)


def test_windows_that_show_nothing_are_reported(data):
    write_bodies(data)
    loaded = load_dataset(str(data), reading=Reading(intensity="window", window=(500, 900)))
    assert has_notice(loaded, "warning: 18 nearly black slices: few values of their volumes lie in the --window")


def test_volumes_below_0_can_be_windowed_or_standardised(data):
    for case in (1, 2, 3):
        write_cases(data, (case,), slices=1, image=picture(case, (40, 30)) - 1000)
    assert "no values above 0" in message(load_dataset, str(data))
    for reading in (Reading(intensity="window", window=(-1000, -900)), Reading(intensity="zscore")):
        loaded = load_dataset(str(data), reading=reading)
        assert np.ptp(loaded.train.pixels) > 140 and not has_notice(loaded, "warning")


def test_each_reading_has_its_own_cache_entry(data, monkeypatch):
    write_bodies(data, shift=(8.0, 3.0))
    readings = [
        Reading(),
        Reading(pixel_size=1.0),
        Reading(pixel_size=1.1),
        Reading(crop="body"),
        Reading(intensity="zscore"),
        Reading(intensity="window", window=(0, 90)),
        Reading(intensity="window", window=(0, 110)),
    ]
    loaded = [load_dataset(str(data), (64, 64), reading=reading) for reading in readings]
    assert len({one.train.pixels.tobytes() for one in loaded}) == len(readings)
    monkeypatch.setattr(decoding, "read_file", None)
    for reading, first in zip(readings, loaded):
        again = load_dataset(str(data), (64, 64), reading=reading)
        np.testing.assert_array_equal(again.train.pixels, first.train.pixels)
        np.testing.assert_array_equal(again.train.lows, first.train.lows)
        assert (again.low, again.scale, again.notices) == (first.low, first.scale, first.notices)


def test_pixels_so_small_that_slices_grow_too_large_are_refused(data):
    write_cases(data, (1, 2), affine=np.diag([1e6, 1e6, 1, 1]))
    refused = message(load_dataset, str(data), reading=Reading(pixel_size=0.01))
    assert "would have 800000000x600000000 pixels of --pixel-size 0.01: each side must be 1 to 2048" in refused


def test_slices_smaller_than_half_a_pixel_are_refused(data):
    write_cases(data, (1, 2), affine=np.diag([1e-5, 1, 1, 1]))
    assert "would have 0x60 pixels of --pixel-size 0.1" in message(
        load_dataset, str(data), reading=Reading(pixel_size=0.1)
    )


def test_the_phantom_is_resampled_and_scaled_like_other_data(cache):
    loaded = load_dataset("phantom", (32, 16), reading=Reading(pixel_size=10.0, intensity="zscore"))
    np.testing.assert_allclose(nib.affines.voxel_sizes(loaded.affine)[:2], 10)
    assert loaded.low < 0 < loaded.scale
