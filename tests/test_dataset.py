"""dataset.py: splits, checks, scaling, cache and batches, on small real NIfTI files."""

import errno
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from campaign import largest, load_case, make_case, member
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dataset
from dataset import DataError, batch_indices, changed_files, load_dataset, read_slices, unscale

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "hipmri_like"
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
    if image is None:  # another one for each name
        image = picture(zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name}")))
    nibabel.save(kind(image, affine), path)
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


def entries(cache):
    """What the cache holds but for its lock."""
    return [path for path in cache.iterdir() if not path.name.startswith(".lock")]


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
        ("training", "valid", "testing"),
        ("TRAIN", "Val", "TEST"),
        ("train", "dev", "test"),
        ("imagesTr", "imagesVal", "imagesTs"),
        ("train_images", "val_images", "test_images"),
        ("T2w_slices_train", "T2w_slices_dev", "T2w_slices_test"),
        ("hipmri_train", "hipmri_validate", "HipMRI-test"),
        ("train set", "validation set", "test set"),
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
    first = "keras_slices_seg_train/case_004_week_0_slice_0.nii"
    assert loaded.notices == [f"2 label maps are left out ({first} and 1 more)"]


@pytest.mark.parametrize(
    "name", ["test_retest", "training_hospital_A", "train_test", "test_2020", "train1", "constraint", "keras_slices"]
)
def test_folders_that_are_no_splits(data, name):
    write_cases(data / name, (1, 2, 3))
    write_cases(data / "others", (4,))
    loaded = load_dataset(str(data))
    assert loaded.notices == ["split by case with seed 0: 4 train, 2 validate, 2 test slices"]


@pytest.mark.parametrize(
    "above",
    [
        "HipMRI_study_keras_slices_data",
        "keras_slices_data/HipMRI_study_keras_slices_data",
        "keras_slices_data/keras_slices_data",
        "download/export/keras_slices_data",
    ],
)
def test_lone_folders_above_the_splits_are_gone_through(data, tmp_path, above):
    write_splits(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", data / above)
    expected, loaded = load_dataset(str(tmp_path / "plain")), load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert cases_of(loaded.test) == {"case_040"}
    assert (loaded.files, loaded.fingerprint) == (expected.files, expected.fingerprint)
    assert loaded.notices == []
    np.testing.assert_array_equal(loaded.train.positions, expected.train.positions)


def test_lone_folders_above_a_flat_folder_are_gone_through(data, tmp_path):
    write_cases(tmp_path / "plain", range(10))
    shutil.copytree(tmp_path / "plain", data / "a" / "b")
    expected, loaded = load_dataset(str(tmp_path / "plain")), load_dataset(str(data))
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.validate.names == expected.validate.names


def test_keras_slices_data_is_used_below_a_lone_folder_too(data):
    write_splits(data / "HipMRI" / "keras_slices_data")
    write(data / "HipMRI" / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1, (8, 6, 5)))
    loaded = load_dataset(str(data))
    assert loaded.train.names[0] == "keras_slices_train/case_004_week_0_slice_0.nii"
    assert len(loaded.files) == 10


def test_a_lone_split_is_that_split(data):
    write_cases(data / "train", range(4))
    loaded = load_dataset(str(data))
    assert loaded.train.names[0].startswith("train/case_")
    assert has_notice(loaded, "no validation slices")
    assert len(loaded.test) == 0
    (data / "train").rename(data / "test")
    assert "no training slices" in message(load_dataset, str(data))


def test_a_lone_patient_keeps_its_folder(data):
    for number in range(4):
        write(data / "case_004" / "week_0" / f"slice_{number}.nii")
    loaded = load_dataset(str(data))
    assert all(name.startswith("case_004/week_0/slice_") for name in loaded.files)
    assert has_notice(loaded, "all slices are of case_004")


def test_splits_in_several_places_are_reported(data):
    for hospital, cases in (("hospital_A", (1, 2, 3)), ("hospital_B", (4, 5, 6))):
        for split, case in zip(("train", "val", "test"), cases):
            write_cases(data / hospital / split, (case,))
    loaded = load_dataset(str(data))
    start = "warning: folders named like splits are not used as splits (hospital_A/test, hospital_A/train, "
    assert has_notice(loaded, f"{start}hospital_A/val, hospital_B/test and 2 more): point --data at the folder")
    assert has_notice(loaded, "split by case")


def test_splits_below_a_split_are_reported_where_they_are_others(data):
    write_cases(data / "train" / "train", (1, 2))
    write_cases(data / "train" / "images", (3,))
    write_cases(data / "train" / "val", (4,))
    write_cases(data / "val", (5,))
    write_cases(data / "old" / "test", (6,))  # not read
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "not used as splits (train/val): point")
    assert has_notice(loaded, "2 files outside")
    assert len(loaded.notices) == 2


def test_images_and_masks_in_each_split(data):
    for split, case in (("train", 1), ("val", 2), ("test", 3)):
        write_cases(data / split / "images", (case,))
        write_cases(data / split / "masks", (case,))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 2, 2]
    assert loaded.train.names[0] == "train/images/case_001_week_0_slice_0.nii"
    assert loaded.notices == ["6 label maps are left out (test/masks/case_003_week_0_slice_0.nii and 5 more)"]


def test_folders_for_training_images_and_labels(data):
    """As nnU-Net and the Medical Segmentation Decathlon lay data out."""
    write_cases(data / "imagesTr", (1, 2, 3, 4))
    write_cases(data / "labelsTr", (1, 2, 3, 4))
    write_cases(data / "imagesTs", (5,))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert cases_of(loaded.test) == {"case_005"}
    assert has_notice(loaded, "8 label maps are left out (labelsTr/case_001_week_0_slice_0.nii and 7 more)")


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr/a.nii",
        "labelstr/a.nii",
        "Labels/a.nii",
        "semantic_labels_anon/Case_004_Week0.nii",
        "semantic/a.nii",
        "SEMANTIC_2/a.nii",
        "MR_labels/a.nii",
        "case_004/ground truth/a.nii",
        "GT/a.nii",
        "keras_slices_seg_train/a.nii",
        "seg_004_week_0_slice_0.nii",
        "case_004_slice_1_mask.nii",
        "case_004_slice_1_mask2.nii",
        "Case_004_Week0_SEMANTIC_LFOV_slice_3.nii.gz",
        "T2_Seg.nii",
        "T2Seg.nii",
        "prostateMask.nii",
        "Case00_segmentation.nii",
        "patient001_frame01_gt.nii",
        "sub-01_desc-prostate_dseg.nii",
        "bladder-contour.nii",
        "case_004.annotations.nii",
        "GroundTruth_004.nii",
        "export\\labels\\a.nii",
    ],
)
def test_label_maps_are_told_by_name(data, name):
    write_cases(data, (1, 2))
    write(data / name)
    loaded = load_dataset(str(data))
    assert len(loaded.files) == 4
    assert has_notice(loaded, f"1 label maps are left out ({name})".replace("\\", "/"))
    slices, _, notices = read_slices([data], (8, 6))
    assert len(slices) == 4
    assert notices == [f"1 label maps are left out ({data.as_posix()}/{name})".replace("\\", "/")]


@pytest.mark.parametrize(
    "name",
    [
        "semantic_MRs_anon/Case_004_Week0_slice_1.nii",
        "semantic_images/a.nii",
        "Segovia/a.nii",
        "masked_T2/a.nii",
        "segments/a.nii",
        "unlabelled/a.nii",
        "groundwater/a.nii",
        "case_004_unmasked.nii",
        "Eggtart.nii",
        "passegment.nii",
    ],
)
def test_slices_with_names_near_those_of_label_maps(data, name):
    write_cases(data, (1, 2))
    write(data / name)
    assert len(load_dataset(str(data)).files) == 5
    assert len(read_slices([data / name], (8, 6))[0]) == 1


def test_names_above_the_data_folder_say_nothing(data):
    folder = data / "segmentation" / "train" / "case_9"
    write_cases(folder, (1, 2))
    loaded = load_dataset(str(folder))
    assert loaded.notices == ["split by case with seed 0: 2 train, 2 validate, 0 test slices"]
    assert len(read_slices([folder], (8, 6))[0]) == 4


def test_nothing_but_label_maps(data):
    write_cases(data / "labels", (1, 2))
    text = message(load_dataset, str(data))
    said = "4 files are left out because their names say label map (labels/case_001_week_0_slice_0.nii and 3 more)"
    assert text == f"no .nii or .nii.gz slices in {data}: {said}; names above the folder that is given do not count"
    assert "4 files are left out" in message(read_slices, [data], (8, 6))
    path = data / "labels" / "case_001_week_0_slice_0.nii"
    assert len(read_slices([path], (8, 6))[0]) == 1  # a folder above says nothing
    assert "say label map" in message(read_slices, [path.rename(data / "case_001_GT.nii")], (8, 6))


def test_names_with_backslashes(data, tmp_path):
    """As a zip file made on Windows is unpacked elsewhere."""
    write_splits(tmp_path / "plain")
    write_cases(tmp_path / "plain" / "keras_slices_seg_train", (4,))
    (tmp_path / "plain" / "keras_slices_train" / "._case_004_week_0_slice_0.nii").touch()
    data.mkdir()
    for number, path in enumerate(sorted((tmp_path / "plain").rglob("*.nii"))):
        name = str(path.relative_to(tmp_path / "plain")).replace("/", "\\")
        shutil.copy(path, data / (f".\\keras_slices_data\\{name}" if number % 2 else f"keras_slices_data\\\\{name}"))
    expected, loaded = load_dataset(str(tmp_path / "plain")), load_dataset(str(data))
    assert (loaded.files, loaded.fingerprint) == (expected.files, expected.fingerprint)
    assert (
        loaded.notices
        == expected.notices
        == ["2 label maps are left out (keras_slices_seg_train/case_004_week_0_slice_0.nii and 1 more)"]
    )
    np.testing.assert_array_equal(loaded.train.positions, expected.train.positions)
    slices, *_ = read_slices([data], (8, 6))
    assert len(slices) == 10
    assert slices.names[0] == f"{data.as_posix()}/keras_slices_data/keras_slices_test/case_040_week_0_slice_0.nii"


def test_two_files_of_one_name_are_refused(data):
    write_splits(data)
    twin = write(data / "keras_slices_train\\case_004_week_0_slice_0.nii")
    text = message(load_dataset, str(data))
    assert str(twin) in text and str(data / "keras_slices_train" / "case_004_week_0_slice_0.nii") in text
    assert "have one name" in text


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("case_004_week_0_slice_3", ("case_004", 0, 3)),
        ("Case_004_Week0_LFOV_slice_3", ("case_004", 0, 3)),
        ("case_4_week_00_slice_003", ("case_004", 0, 3)),
        ("Case00_slice_3", ("case_000", None, 3)),
        ("case-1234.week-12.slice-60", ("case_1234", 12, 60)),
        ("CASE 4 SLICE 3 copy (1)", ("case_004", None, 3)),
        ("Case4Week2Slice3", ("case_004", 2, 3)),
        ("case004bWeek2Slice3", ("case_004b", 2, 3)),
        ("T2_case_004_slice_3", ("case_004", None, 3)),
        ("sub-001_ses-0_slice-003_T2w", ("sub_001", 0, 3)),
        ("subject7_visit2_slice9", ("subject_007", 2, 9)),
        ("sub-A1B2_slice-1", ("sub_a001b002", None, 1)),
        ("Patient_12_session_3", ("patient_012", 3, None)),
        ("case_A004_week_0_slice_1", ("case_a004", 0, 1)),
        ("case_004b_week_0_slice_1", ("case_004b", 0, 1)),
        ("case_004/week_0/slice_1", ("case_004", 0, 1)),
        ("case_004/case_005_slice_1", ("case_005", None, 1)),
        ("case_004/scan/case_005/slice_1", ("case_005", None, 1)),
        ("week_3/case_004/slice_2/image", ("case_004", 3, 2)),
        ("case_004/image", ("case_004", None, None)),
        ("slice_3", (None, None, None)),
        ("showcase_12_slice_3", (None, None, None)),
        ("subtle_3", (None, None, None)),
        ("lowercase12", (None, None, None)),
        ("case_week_3", (None, 3, None)),
        ("case_week3", (None, 3, None)),
        ("case_slice_3", (None, None, None)),
        ("case_004_multislice_3", ("case_004", None, None)),
        ("case_004_biweek_3", ("case_004", None, None)),
        ("keras_slices_3/case_004", ("case_004", None, None)),
        ("image", (None, None, None)),
        ("case_" + "9" * 150, ("case_" + "9" * 150, None, None)),
    ],
)
def test_case_week_and_number_of_names(name, expected):
    assert dataset._identify(f"{name}.nii.gz") == expected


def test_cases_are_given_beside_names(data):
    for name in ("Case_4_slice_0", "case_004_slice_1", "case_5_slice_0", "sub-4_slice_0", "image"):
        write(data / "train" / f"{name}.nii")
    write_cases(data / "val", (6,))
    loaded = load_dataset(str(data))
    assert dict(zip(loaded.train.names, loaded.train.cases)) == {
        "train/Case_4_slice_0.nii": "case_004",
        "train/case_004_slice_1.nii": "case_004",
        "train/case_5_slice_0.nii": "case_005",
        "train/sub-4_slice_0.nii": "sub_004",
        "train/image.nii": None,
    }
    assert loaded.validate.cases == ["case_006", "case_006"]
    assert read_slices([data / "val"], (8, 6))[0].cases == ["case_006", "case_006"]


def test_a_patient_is_found_under_other_spellings(data):
    write(data / "train" / "case_004_week_0_slice_0.nii")
    write(data / "train" / "case_005_week_0_slice_0.nii")
    write(data / "val" / "Case_4_Week1_slice_0.nii")
    write(data / "test" / "case_05" / "slice_0.nii")
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning: case_004 in both train and validate")
    assert has_notice(loaded, "warning: case_005 in both train and test")
    assert len(loaded.notices) == 2


def test_the_same_number_under_another_word_is_another_patient(data):
    write(data / "train" / "case_004_slice_0.nii")
    write(data / "val" / "sub-004_slice_0.nii")
    write(data / "test" / "case_004b_slice_0.nii")
    assert load_dataset(str(data)).notices == []


# Volumes


def volumes_of(slices):
    """The names of slices that have one scale; images that differ give scales that do."""
    names = {}
    for name, scale in zip(slices.names, slices.scales):
        names.setdefault(scale, set()).add(name)
    return sorted(map(sorted, names.values()))


@pytest.mark.parametrize("folder", ["{}.nii/{}.nii", "{}/{}.nii.gz", "{}.nii.gz/{}.nii.gz", "{}.nii.gz/{}.nii"])
def test_files_in_folders_of_their_own_names_are_one_volume(data, folder):
    """As Windows unpacks x.nii.gz."""
    for case in (4, 5, 6):
        for number in range(3):
            name = f"case_{case:03}_week_0_slice_{number}"
            write(data / "train" / folder.format(name, name), picture(10 * case + number) * (number + 1))
    loaded = load_dataset(str(data))
    assert len(volumes_of(loaded.train)) == 2 and len(volumes_of(loaded.validate)) == 1
    assert loaded.train.positions.tolist() == [0, 0.5, 1] * 2


def test_a_volume_may_lie_in_several_folders(data):
    for number in range(4):
        write(data / "train" / f"part_{number % 2}" / f"case_001_week_0_slice_{number}.nii")
    write_cases(data / "val", (2,))
    train = load_dataset(str(data)).train
    assert len(volumes_of(train)) == 1
    assert [name[-5] for name in train.names] == ["0", "1", "2", "3"]
    np.testing.assert_allclose(train.positions, [0, 1 / 3, 2 / 3, 1])


def test_folders_with_the_same_slices_are_series(data):
    for series, bright in (("T2", 1), ("ADC", 20)):
        for number in range(3):
            name = f"case_001_slice_{number}"
            write(data / "train" / series / f"{name}.nii" / f"{name}.nii", picture(number) * bright)
    write_cases(data / "val", (2,))
    train = load_dataset(str(data)).train
    assert [{name.split("/")[1] for name in names} for names in volumes_of(train)] == [{"ADC"}, {"T2"}]
    assert train.positions.tolist() == [0, 0.5, 1] * 2


def test_series_in_one_folder_are_reported(data):
    for case in (1, 2):
        for series in ("ADC", "T2"):
            write(data / "train" / f"case_{case}_{series}_slice_0.nii")
    write_cases(data / "val", (3,))
    loaded = load_dataset(str(data))
    names = "train/case_1_T2_slice_0.nii, train/case_2_T2_slice_0.nii"
    said = "2 slices have the number of another one of their case, week and folder"
    assert loaded.notices == [f"warning: {said} ({names}): they are scaled together"]


def test_folders_of_slices_without_numbers_are_series(data):
    for number, series in enumerate(("T2", "ADC")):
        for letter in "ab":
            write(data / "train" / series / f"case_001_{letter}.nii", picture(number))
    for letter in "abc":
        write(data / "val" / f"case_002_{letter}.nii")
    loaded = load_dataset(str(data))
    assert [len(names) for names in volumes_of(loaded.train)] == [2, 2]
    assert [len(names) for names in volumes_of(loaded.validate)] == [3]


def test_the_same_case_in_two_splits_is_two_volumes(data):
    write(data / "train" / "case_001_slice_0.nii", picture(1))
    write(data / "val" / "case_001_slice_1.nii", picture(2) * 9)
    loaded = load_dataset(str(data))
    assert loaded.train.scales[0] == pytest.approx(np.percentile(picture(1), 99.5))
    assert loaded.validate.scales[0] == pytest.approx(np.percentile(picture(2) * 9, 99.5))


def test_one_folder_per_case_and_week(data):
    for case in (1, 2, 3):
        for week in (0, 1):
            for number in (0, 1):
                image = picture(100 * case + 10 * week + number)
                write(data / f"case_{case}" / f"week_{week}" / f"slice_{number}.nii", image)
    loaded = load_dataset(str(data))
    assert loaded.notices == ["split by case with seed 0: 4 train, 4 validate, 4 test slices"]
    assert [len(names) for names in volumes_of(loaded.train)] == [2, 2]
    assert loaded.train.positions.tolist() == [0, 1, 0, 1]


def test_read_slices_scales_a_volume_of_files_given_one_by_one(data):
    paths = [write(data / f"case_1/slice_{number}.nii", picture(number) * (number + 1)) for number in (1, 0)]
    slices, *_ = read_slices(paths, (8, 6))
    assert slices.names == [path.as_posix() for path in paths]
    assert slices.scales[0] == slices.scales[1]
    assert slices.positions.tolist() == [1, 0]


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


OBLIQUE = np.array([[0.7, 0.2, 0.3, 1], [-0.2, 0.9, 0.1, 2], [0.1, 0.1, 3, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((1, 8, 6), (1, 2)), ((8, 1, 6), (0, 2)), ((8, 6, 1), (0, 1)), ((1, 8, 6, 1), (1, 2)), ((8, 1, 6, 1, 1), (0, 2))],
)
def test_a_thin_axis_anywhere_is_dropped_and_pixels_stay_where_they_are(data, shape, axes):
    path = write(data / "case_001_week_0_slice_0.nii", picture(1).reshape(shape), OBLIQUE)
    slices, (affine,), _ = read_slices([path], (8, 6))
    theirs = nibabel.load(path)
    values = theirs.get_fdata().reshape(8, 6)
    np.testing.assert_allclose(values_of(slices)[0], np.clip(values, 0, slices.scales[0]), atol=slices.scales[0] / 509)
    for row, column in ((0, 0), (7, 0), (0, 5), (3, 2)):
        voxel = np.zeros(3)
        voxel[list(axes)] = row, column
        expected = nibabel.affines.apply_affine(theirs.affine, voxel)
        np.testing.assert_allclose(nibabel.affines.apply_affine(affine, [row, column, 0]), expected, rtol=1e-6)
    (thin,) = {0, 1, 2} - set(axes)
    np.testing.assert_allclose(affine[:, 2], theirs.affine[:, thin], rtol=1e-6)


def test_the_empty_axis_of_a_thin_slice_is_completed(data):
    write(data / "a.nii", picture(1, (1, 8, 6)))
    path = data / "a.nii"
    raw = path.read_bytes()
    header = nibabel.Nifti1Header(raw[:348])
    header["srow_x"], header["srow_y"], header["srow_z"] = [0, 2, 0, 5], [0, 0, 3, 6], [0, 0, 0, 7]
    path.write_bytes(header.binaryblock + raw[348:])
    expected = np.array([[2, 0, 0, 5], [0, 3, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
    np.testing.assert_allclose(read_slices([path], (8, 6))[1][0], expected)


def test_crop_and_pad_are_central_and_the_affine_follows(data):
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
    with pytest.raises(DataError, match="1 to 2048"):
        load_dataset(str(data), slice_size=(0, 8))


def test_affine_is_the_most_common_grid_of_training(data):
    write_cases(data / "train", (1, 2))
    write_cases(data / "train", (3,), affine=np.diag([2, 2, 2, 1]))
    write_cases(data / "val", (4,), affine=np.diag([2, 2, 2, 1]), slices=9)
    np.testing.assert_allclose(load_dataset(str(data)).affine, AFFINE, rtol=1e-6)


def test_what_names_do_not_say_is_said(data):
    for split, names in (("train", ("a", "b", "case_001")), ("val", ("case_002_week_1", "case_003_slice_1"))):
        for name in names:
            write(data / split / f"{name}.nii")
    write(data / "notes" / "c.nii")  # outside the splits
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "2 names give no case", "scaled alone", "nor its height")
    assert has_notice(loaded, "2 names give no slice number", "height of these slices")
    assert len(loaded.notices) == 3


def test_slices_far_below_0_are_reported(data):
    """Normalised to mean 0, or one pixel; not where interpolation goes a little below 0."""
    image = picture(1)
    for number, lowest in enumerate((0, -5, -50, -40)):
        write(data / f"case_{number:03}_slice_0.nii", image + lowest * (number == 3 or image == image.min()))
    notice = "warning: 2 slices have values far below 0, which become black"
    assert has_notice(load_dataset(str(data)), notice)
    assert has_notice(load_dataset(str(data)), notice)  # from the cache
    *_, notices = read_slices([data], (8, 6))
    assert len(notices) == 1 and notice in notices[0]


def test_slices_that_lie_differently_are_reported(data):
    write_splits(data)
    assert load_dataset(str(data)).notices == []
    write(data / "train" / "case_007_week_0_slice_0.nii", affine=AFFINE[:, [1, 0, 2, 3]])
    assert has_notice(load_dataset(str(data)), "warning: training slices lie differently in the body")


def test_read_slices_says_what_was_cropped(data):
    *_, notices = read_slices([write(data / "a.nii", picture(1, (12, 5)))], (8, 6))
    assert notices == ["1 slices of 12x5 brought to 8x6 by centre crop or zero pad"]
    *_, notices = read_slices([data], (12, 5))
    assert notices == []


def test_constant_and_empty_slices_are_kept(data):
    write_cases(data / "train", (1,), image=np.full((8, 6), 5, np.float32))
    write_cases(data / "train", (2,), image=np.zeros((8, 6), np.float32))
    write_cases(data / "train", (3,), image=np.full((8, 6), -5, np.float32))
    write_cases(data / "train", (4,), image=picture(1), slices=1)
    write_cases(data / "val", (5,))
    loaded = load_dataset(str(data))
    assert loaded.notices[0] == "6 slices hold one value only (kept)"
    assert loaded.train.pixels[:6, 0, 0].tolist() == [255, 255, 0, 0, 0, 0]
    assert loaded.train.scales[:6].tolist() == [5, 5, 1, 1, 1, 1]


@pytest.mark.parametrize("value", [0, 100, -5])
@pytest.mark.parametrize(("split", "title"), [("train", "training"), ("validate", "validation"), ("test", "test")])
def test_a_blank_split_is_refused(data, split, title, value):
    write_splits(data)
    for path in (data / f"keras_slices_{split}").iterdir():
        write(path, np.full((8, 6), value, np.int16))
    count = 6 if split == "train" else 2
    text = message(load_dataset, str(data))
    assert text.startswith(f"all {count} {title} slices hold one value only (keras_slices_{split}/case_")
    slices, *_ = read_slices([data / f"keras_slices_{split}"], (8, 6))
    assert len(slices) == count


def test_a_volume_without_values_above_0_is_refused(data):
    """As CT is stored, air at -1024; but where one value is all that it holds."""
    write_splits(data)
    for number in range(2):
        write(data / "keras_slices_test" / f"case_041_slice_{number}.nii", picture(number) - 1024)
    text = message(load_dataset, str(data))
    reason = "its volume has no values above 0: intensities have to start at 0 (air)"
    name = "keras_slices_test/case_041_slice_{}.nii"
    assert text == f"2 of 12 files cannot be used: {name.format(0)}: {reason}; {name.format(1)}: {reason}"
    assert "no values above 0" in message(read_slices, [data], (8, 6))
    write(data / "keras_slices_test" / "case_041_slice_0.nii", picture(0) - picture(0).max())  # at 0 at most
    assert text == message(load_dataset, str(data))
    write(data / "keras_slices_test" / "case_041_slice_0.nii", picture(0) - 50)
    assert has_notice(load_dataset(str(data)), "2 slices have values far below 0")


def test_volumes_that_a_few_pixels_make_black_are_reported(data):
    write_splits(data)
    for number in range(3):
        image = picture(number, (40, 30))
        image[3, :10] = 60_000
        write(data / "keras_slices_train" / f"case_007_slice_{number}.nii", image)
    expected = "warning: 3 slices are nearly black: a few pixels of their volumes are far brighter"
    assert has_notice(load_dataset(str(data)), expected)
    assert expected in read_slices([data / "keras_slices_train"], (40, 30))[2]


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
def test_data_of_any_range(data, dtype, factor, offset, words):
    for case in range(3):
        image = (picture(case).astype(np.float64) * factor + offset).astype(dtype)
        write(data / f"case_{case}_slice_0.nii", image, kind=lambda *of: nibabel.Nifti1Image(*of, dtype=dtype))
    loaded = load_dataset(str(data))
    assert [word in notice for word, notice in zip(words, loaded.notices[1:])] == [True] * len(words)
    assert len(loaded.notices) == 1 + len(words)
    assert loaded.train.pixels.std() > 40


def test_slices_with_few_values_are_reported(data):
    write_splits(data)
    labels = np.random.default_rng(0).integers(0, 6, (8, 6))
    whole = np.random.default_rng(0).integers(0, 30, (8, 6))
    folder = data / "keras_slices_train"
    write(folder / "case_007_slice_0.nii", labels.astype(np.uint8))
    write(folder / "case_007_slice_1.nii", (labels > 2).astype(np.float32) * 255)
    write(folder / "case_007_slice_2.nii", (labels * 0.3).astype(np.float32))
    write(folder / "case_007_slice_3.nii", whole.astype(np.int16))
    start = "warning: 2 slices hold fewer than 12 whole values each, as label maps do"
    names = [f"keras_slices_train/case_007_slice_{number}.nii" for number in (0, 1)]
    loaded = load_dataset(str(data))
    assert loaded.notices == [f"{start} ({', '.join(names)})"]
    assert set(names) < set(loaded.train.names)
    *_, notices = read_slices([folder], (8, 6))
    assert notices == [f"{start} ({', '.join(f'{data.as_posix()}/{name}' for name in names)})"]


def test_a_sample_of_few_values_does_not_make_a_label_map(data):
    image = np.zeros((60, 50), np.int16)
    image[31, 1::2] = np.arange(25)
    assert len(np.unique(image.ravel(order="F")[::10])) < 12
    *_, notices = read_slices([write(data / "a.nii", image)], (60, 50))
    assert not any("whole values" in notice for notice in notices)


def test_pixel_sizes_that_differ_are_reported(data):
    def scaled(height, width):
        return np.diag([height, width, 3, 1])

    for case, affine in enumerate((scaled(0.8, 0.8), scaled(0.8, 0.8), scaled(1.5, 1.5), scaled(0.81, 0.8))):
        write_cases(data / "train", (case,), affine=affine)
    write_cases(data / "val", (8,), affine=scaled(0.4, 0.4), slices=20)
    kept = "slices are not resampled, and samples are written with the most common, 0.8x0.8 mm"
    expected = f"warning: pixel sizes differ, from 0.4x0.4 to 1.5x1.5 mm: {kept}"
    assert load_dataset(str(data)).notices == [expected]
    assert load_dataset(str(data)).notices == [expected]  # from the cache


def test_pixel_sizes_that_are_rounded_otherwise_are_not_reported(data):
    turned = AFFINE.copy()
    turned[:2, :2] = np.array([[0.6, -0.8], [0.8, 0.6]]) @ AFFINE[:2, :2]
    write_cases(data / "train", (1,))
    write_cases(data / "train", (2,), affine=AFFINE * [1.01, 1, 1, 1])
    write_cases(data / "val", (3,), affine=turned)
    assert not has_notice(load_dataset(str(data)), "pixel sizes")


def test_one_axis_of_the_pixels_that_differs_is_reported(data):
    write_cases(data / "train", (1,))
    write_cases(data / "val", (2,), affine=AFFINE * [1, 1.1, 1, 1])
    assert has_notice(load_dataset(str(data)), "from 0.8x0.9 to 0.8x0.99 mm")


# Twins


def test_equal_slices_in_two_splits_leak_whatever_their_names(data):
    write_splits(data)
    for number in range(2):
        image = nibabel.load(data / "keras_slices_train" / f"case_004_week_0_slice_{number}.nii").get_fdata()
        write(data / "keras_slices_test" / f"case_050_slice_{number}.nii.gz", image, 2 * AFFINE)  # float64
    pairs = [
        f"keras_slices_train/case_004_week_0_slice_{number}.nii is keras_slices_test/case_050_slice_{number}.nii.gz"
        for number in range(2)
    ]
    expected = (
        f"warning: 2 slices are in both train and test, whatever their names ({', '.join(pairs)}): the splits leak"
    )
    loaded = load_dataset(str(data))
    assert loaded.notices[0] == expected and "pixel sizes" in loaded.notices[1]
    assert load_dataset(str(data)).notices == loaded.notices  # from the cache


def test_equal_slices_in_a_flat_folder_are_reported(data):
    write_cases(data, range(4), image=picture(1), slices=1)
    loaded = load_dataset(str(data))
    for pair in ("train and validate", "train and test", "validate and test"):
        assert has_notice(loaded, f"warning: 1 slices are in both {pair}, whatever")
    assert has_notice(loaded, "1 slices of train are there twice (case_00")


@pytest.mark.parametrize("name", ["{} copy (1).nii", "{}.nii.gz", "copy/{}.nii"])
def test_copies_within_a_split_are_reported(data, name):
    write_splits(data)
    train = data / "keras_slices_train"
    original = train / "case_004_week_0_slice_0.nii"
    image = nibabel.load(original).get_fdata()
    copy = write(train / name.format("case_004_week_0_slice_0"), image)
    one, other = sorted(path.relative_to(data).as_posix() for path in (original, copy))
    notice = load_dataset(str(data)).notices[-1]
    assert notice in (
        f"1 slices of train are there twice ({pair})" for pair in (f"{one} is {other}", f"{other} is {one}")
    )


def test_what_is_no_twin(data):
    """Constant slices, other shapes of the same values, a value changed a little, mirrored, or at another scale."""
    image = np.arange(48, dtype=np.float32).reshape(8, 6)
    near = image.copy()
    near[7, 5] = np.nextafter(near[7, 5], np.float32(0))
    images = [image, near, image[::-1], image[:, ::-1], image * 2, image[:4], np.zeros((8, 6)), np.zeros((8, 6))]
    images += [np.pad(image, ((0, 1), (0, 0))), image.ravel(order="F").reshape((6, 8), order="F")]
    for number, one in enumerate(images):
        write(data / "train" / f"case_{number}_slice_0.nii", one.astype(np.float32))
    write_cases(data / "val", (100,))
    assert not has_notice(load_dataset(str(data)), "twice")


def test_a_twin_is_told_whatever_its_type_and_zeros_are(data):
    image = np.arange(48, dtype=np.float32).reshape(8, 6) % 40
    zeros = np.where(image == 0, np.float32(-0.0), image)
    write(data / "train" / "case_1_slice_0.nii", image.astype(np.uint8))
    write(data / "train" / "case_2_slice_0.nii", zeros, kind=big_endian)
    write(data / "train" / "case_3_slice_0.nii.gz", image[None].astype(np.float64), kind=nibabel.Nifti2Image)
    write_cases(data / "val", (100,))
    assert has_notice(load_dataset(str(data)), "2 slices of train are there twice")


def test_slices_that_are_alike_at_a_glance_are_no_twins(data):
    image = np.zeros((100, 83), np.float32)
    image[0] = 9
    images = [image.copy() for _ in range(3)]
    images[1][50, 41] = images[2][50, 42] = 1
    assert len({dataset._glance(one) for one in images}) == 1
    for number, one in enumerate(images):
        write(data / "train" / f"case_{number}_slice_0.nii", one)
    write_cases(data / "val", (100,))
    assert not has_notice(load_dataset(str(data)), "twice")


def test_a_slice_that_changes_before_it_is_compared(data, monkeypatch):
    write_cases(data, (1, 2), image=picture(1), slices=1)
    monkeypatch.setattr(dataset, "_refuse_blank", lambda files, *_: os.utime(files[0].path, ns=(0, 0)))
    assert "slice_0.nii: changed while it was read" in message(load_dataset, str(data))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (7, 1, 1)])
def test_slices_one_pixel_wide(data, shape):
    slices, *_ = read_slices([write(data / "a.nii", np.full(shape, 3, np.int16))], shape[:2])
    assert slices.scales.tolist() == [3]
    np.testing.assert_array_equal(slices.pixels, np.full((1, *shape[:2]), 255))


def test_a_few_bright_pixels_are_not_lost(data):
    image = np.zeros((40, 40), np.float32)
    image[3, 4] = 7
    slices, *_ = read_slices([write(data / "a.nii", image)], (40, 40))
    assert slices.scales.tolist() == [7]
    assert slices.pixels[0, 3, 4] == 255


def test_an_empty_third_axis_of_the_affine_is_completed(data):
    affine = np.array([[0, 2, 0, 5], [-0.5, 0, 0, 6], [0, 0, 0, 7], [0, 0, 0, 1.0]])
    path = changed(data / "a.nii", srow_x=affine[0], srow_y=affine[1], srow_z=affine[2])
    affine[2, 2] = 1  # both in-plane axes lie in the first two
    np.testing.assert_allclose(read_slices([path], (8, 6))[1][0], affine)


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
    slices, (affine,), _ = read_slices([path], (8, 6))
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
    slices, *_ = read_slices([plain, data / "members.nii.gz"], (8, 6))
    scale = np.percentile(picture(3), 99.5)
    np.testing.assert_allclose(values_of(slices)[0], np.clip(picture(3), 0, scale), atol=scale / 509)
    np.testing.assert_array_equal(slices.pixels[0], slices.pixels[1])


def test_read_slices_takes_files_and_folders(data):
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
    slices = dataset.Slices(stored[None], ["a"], [None], np.zeros(1), np.array([scale]))
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


def test_another_slice_size_is_decoded_once_beside_the_most_common_one(data, cache, monkeypatch):
    write_splits(data)
    common, small = load_dataset(str(data)), load_dataset(str(data), slice_size=[16, 16])
    assert len(entries(cache)) == 2
    forbid_decoding(monkeypatch)
    assert load_dataset(str(data)).fingerprint == common.fingerprint
    again = load_dataset(str(data), slice_size=(16, 16))
    assert again.fingerprint == small.fingerprint
    np.testing.assert_array_equal(again.train.pixels, small.train.pixels)
    assert again.train.pixels.shape[1:] == (16, 16)


def test_fingerprint_and_files_follow_the_content_alone(data, tmp_path):
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
    assert changed_files(first.files, third.files) == [f"1 altered ({name})"]
    write(moved / name, picture(12345), 2 * AFFINE)
    assert changed_files(third.files, load_dataset(str(moved)).files) == [f"1 altered ({name})"]
    assert load_dataset(str(moved), slice_size=(16, 16)).fingerprint != third.fingerprint


def test_zipping_changes_no_checksum(data):
    write_cases(data, (1, 2), slices=1)
    before = load_dataset(str(data)).files
    for path in data.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert load_dataset(str(data)).files == before


def test_changed_files():
    before = {f"{number}.nii": "aa" for number in range(8)}
    assert changed_files(before, dict(reversed(before.items()))) == []
    assert changed_files(before, {}) == ["8 removed (0.nii, 1.nii, 2.nii and 5 more)"]
    now = {"9.nii": "aa", "b\n.nii": "aa"} | before | {"4.nii": "ab", "5.nii": "ab", "3.nii": "ab"}
    del now["7.nii"]
    assert changed_files(before, now) == [
        r"2 added (9.nii, b\n.nii)",
        "1 removed (7.nii)",
        "3 altered (3.nii, 4.nii, 5.nii)",
    ]


def forged_index(path, **fields):
    """Rewrites an index with other fields, and a checksum that is right."""
    body = json.dumps(json.loads(path.read_bytes().partition(b"\n")[2]) | fields).encode()
    path.write_bytes(dataset._index_checksum(path.parent.name, body) + b"\n" + body)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def flip_digit(path):
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"scales": [9', b'"scales": [8'))
    assert path.read_bytes() != raw


DAMAGES = {
    "index cut": lambda pixels, index: index.write_bytes(index.read_bytes()[:-30]),
    "index empty": lambda pixels, index: index.write_bytes(b""),
    "index null": lambda pixels, index: index.write_text("null"),
    "index nested": lambda pixels, index: index.write_text("[" * 100_000),
    "index a digit": lambda pixels, index: flip_digit(index),
    "index a pipe": lambda pixels, index: replace_by_pipe(index),
    "index a device": lambda pixels, index: replace_by_device(index),
    "index of more": lambda pixels, index: forged_index(index, slice_size=[8, 7]),
    "index of none": lambda pixels, index: forged_index(index, slice_size=[-8, -6]),
    "index of text": lambda pixels, index: forged_index(index, slice_size=["8", "6"]),
    "index of fewer scales": lambda pixels, index: forged_index(index, scales=[1.0]),
    "index of no affine": lambda pixels, index: forged_index(index, affine=[1, 2]),
    "index of other fields": lambda pixels, index: forged_index(index, more=1),
    "pixels short": lambda pixels, index: pixels.write_bytes(pixels.read_bytes()[:-1]),
    "pixels long": lambda pixels, index: pixels.write_bytes(pixels.read_bytes() + b"0"),
    "pixels empty": lambda pixels, index: pixels.write_bytes(b""),
    "pixels missing": lambda pixels, index: pixels.unlink(),
    "pixels a pipe": lambda pixels, index: replace_by_pipe(pixels),
    "pixels a device": lambda pixels, index: replace_by_device(pixels),
    "entry a file": lambda pixels, index: (shutil.rmtree(index.parent), index.parent.touch()),
    "entry a link": lambda pixels, index: (shutil.rmtree(index.parent), index.parent.symlink_to("/tmp")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_made_again(data, cache, damage):
    write_splits(data)
    first = load_dataset(str(data))
    expected = first.train.pixels.copy()
    (folder,) = entries(cache)
    damage(folder / "pixels.uint8", folder / "index.json")
    again = load_dataset(str(data))
    np.testing.assert_array_equal(again.train.pixels, expected)
    np.testing.assert_array_equal(again.train.scales, first.train.scales)
    (folder,) = entries(cache)
    assert (folder / "pixels.uint8").stat().st_size == 10 * 8 * 6
    with pytest.MonkeyPatch.context() as patch:
        forbid_decoding(patch)
        assert load_dataset(str(data)).fingerprint == first.fingerprint


def test_the_cache_of_other_data_is_not_taken(data, cache, tmp_path):
    write_splits(data)
    first = load_dataset(str(data))
    (folder,) = entries(cache)
    expected = first.train.pixels.copy()
    other = tmp_path / "other"
    write_splits(other)
    write_cases(other / "keras_slices_train", (4, 5, 6), image=picture(77))
    assert load_dataset(str(other)).files.keys() == first.files.keys()
    (foreign,) = set(entries(cache)) - {folder}
    shutil.rmtree(folder)
    shutil.copytree(foreign, folder)
    np.testing.assert_array_equal(load_dataset(str(data)).train.pixels, expected)


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
    assert entries(cache) == []


def test_a_cache_that_cannot_be_made_is_named(data, tmp_path, monkeypatch):
    write_splits(data)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(tmp_path / "file" / "cache"))
    text = message(load_dataset, str(data))
    assert text.startswith(f"the cache folder {tmp_path / 'file' / 'cache'} cannot be written (Not a directory): ")
    assert "$PROSTATEVQ_CACHE" in text
    assert message(load_dataset, "phantom", (64, 32)).startswith(text)


@pytest.mark.parametrize("step", ["fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_nothing(data, cache, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_splits(data)
    cache.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        assert f"{cache} cannot be written (No space left on device)" in message(load_dataset, str(data))
    assert entries(cache) == []
    assert len(load_dataset(str(data)).train) == 6


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_limit_on_file_sizes_is_one_line(data, cache, tmp_path):
    """30 slices of 32x32 pixels are more than the 20,000 bytes that a file may have."""
    for case in range(30):
        write(data / f"case_{case:03}_week_0_slice_0.nii", picture(case, (32, 32)))
    run = tmp_path / "run"
    code = f"import sys; sys.argv = ['train.py', '--data', {str(data)!r}, '--run', {str(run)!r}]; {LIMITED}"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    line = f"error: the cache folder {cache} cannot be written (File too large): make room there, or name another"
    assert finished.stderr == f"{line} folder with $PROSTATEVQ_CACHE\n"
    assert entries(cache) == [] and not run.exists()


STALLED = """
import sys, time
import dataset
def stall(file):
    print(file=sys.stderr, flush=True)
    time.sleep(600)
dataset._read_image = stall
dataset.load_dataset(sys.argv[1])
"""


def test_only_dead_left_overs_are_removed(data, cache):
    write_splits(data)
    (cache / ".partial-old" / "new").mkdir(parents=True)
    (cache / ".partial-old" / "new" / "pixels.uint8").write_bytes(b"1234")
    stalled = subprocess.Popen([sys.executable, "-c", STALLED, str(data)], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        assert stalled.stderr.readline() == b"\n"  # it is in the middle of its first pass
        (living,) = (path for path in entries(cache))
        assert living.name != ".partial-old"
        load_dataset(str(data))
        assert living in entries(cache) and len(entries(cache)) == 2
    finally:
        stalled.kill()
        stalled.communicate()
    load_dataset(str(data), slice_size=(16, 16))
    assert living not in entries(cache) and len(entries(cache)) == 2


def test_a_first_pass_that_ends_leaves_the_others_their_folders(cache):
    """The second starts while the first is at work, and the third when the first is done."""
    with ExitStack() as first, ExitStack() as others:
        first.enter_context(dataset._new_entry(cache / "first"))
        second = others.enter_context(dataset._new_entry(cache / "second"))
        first.close()
        with dataset._new_entry(cache / "third"):
            assert second.is_dir()
    assert {path.name for path in entries(cache)} == {"first", "second", "third"}


def test_left_overs_stay_where_locks_do_not_work(data, cache, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    write_splits(data)
    (cache / ".partial-another").mkdir(parents=True)
    monkeypatch.setattr(dataset.fcntl, "flock", unsupported)
    load_dataset(str(data))
    assert len(entries(cache)) == 2


def test_processes_that_race_agree(data, cache):
    write_splits(data)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_dataset(str(data)), range(8)))
    assert len({one.fingerprint for one in loaded}) == 1
    for one in loaded[1:]:
        np.testing.assert_array_equal(one.train.pixels, loaded[0].train.pixels)
    assert len(entries(cache)) == 1


def test_an_entry_of_another_process_stays(cache):
    with dataset._new_entry(cache / "entry") as new:
        (new / "ours").touch()
        (cache / "entry").mkdir()
        (cache / "entry" / "theirs").touch()
    assert [path.name for path in (cache / "entry").iterdir()] == ["theirs"]


def test_an_entry_that_was_there_during_the_rename_alone_is_no_error(cache, monkeypatch):
    """A second process puts its entry there before the rename, a third one moves it away after it."""

    def rename(new, entry):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(new), None, str(entry))

    monkeypatch.setattr(dataset.Path, "rename", rename)
    with dataset._new_entry(cache / "entry") as new:
        (new / "ours").touch()
    assert entries(cache) == []


def test_a_file_in_the_place_of_an_entry_is_an_error(cache):
    cache.mkdir(exist_ok=True)
    (cache / "entry").touch()
    with pytest.raises(DataError, match="cannot be written"), dataset._new_entry(cache / "entry") as new:
        (new / "ours").touch()


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


def test_a_damaged_phantom_says_where_it_is(cache, phantom_calls):
    load_dataset("phantom")
    (folder,) = cache.glob("phantom-*")
    (folder / "keras_slices_train" / "case_004_week_0_slice_0.nii").write_bytes(b"x")
    text = message(load_dataset, "phantom")
    assert "slice_0.nii: not a NIfTI file" in text and f"kept in {folder}: delete it" in text


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
    assert message(load_dataset, " ") == "no folder of slices: its path is empty"
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
    assert len(entries) == 10 and entries[-1].endswith("bad09.nii: not a NIfTI file and 2 more")


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


@pytest.mark.parametrize("shape", [(8, 6, 5), (2, 8, 6), (8, 6, 1, 3), (1, 8, 6, 2), (1, 1, 8, 6), (1, 1, 6)])
def test_volumes_are_refused(data, shape):
    assert f"shape {shape}: these have to be 2D slices" in reason(write(data / "a.nii.gz", picture(1, shape)))


def test_a_single_volume_is_called_a_volume(data):
    """Not the only slice."""
    write(data / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1, (8, 6, 5)))
    text = message(load_dataset, str(data))
    assert text.startswith("1 of 1 files cannot be used: ")
    assert text.endswith("Case_004_Week0_LFOV.nii.gz: has shape (8, 6, 5): these have to be 2D slices")
    write(data / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1))
    assert "only one slice" in message(load_dataset, str(data))


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
        ({"dim": [2, 2049, 6, 1, 1, 1, 1, 1]}, "1 to 2048"),
        ({"dim": [2, -8, 6, 1, 1, 1, 1, 1]}, "1 to 2048"),
        ({"dim": [2, 2048, 2048, 1, 1, 1, 1, 1]}, "cut short"),
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
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine is not finite"),
        ({"srow_x": [1e30, 0, 0, 0]}, "affine is not finite, or far away"),
        ({"srow_x": [0, 0, 0, 0]}, "affine gives pixels no area"),
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
    path = changed(data / "a.nii", dim=[2, 2048, 2048, 1, 1, 1, 1, 1])
    zipped = data / "a.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert "cannot hold" in reason(zipped)


def test_zip_bomb(data):
    plain = write(data / "a.nii", picture(1)).read_bytes()
    path = data / "a.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(200_000_000), 1))
    assert "holds more" in reason(path)


def test_zip_of_empty_members(data):
    """Each costs the reader a start, and none brings it nearer to its limit."""
    plain = write(data / "a.nii", picture(1)).read_bytes()
    path = data / "a.nii.gz"
    path.write_bytes(member(plain[:400]) + member(b"") * 20_000 + member(plain[400:]))
    assert "far longer than its content" in reason(path)


@pytest.mark.parametrize("length", [200_000, 2_000_000])
def test_zip_with_a_long_name(data, length):
    path = write(data / "a.nii", picture(1))
    path.write_bytes(member(path.read_bytes(), extra=b"x" * 65_535, name=b"n" * length + b"\0"))
    if length > dataset.READ_BYTES:
        assert "far longer than its content" in reason(path)
    else:
        assert len(read_slices([path], (8, 6))[0]) == 1


def test_the_largest_slices_do_not_add_up(data):
    """Each is refused after 34 MB were unzipped; the traced peak is what arrays and bytes took at once."""
    (data / "train").mkdir(parents=True)
    for number in range(8):
        (data / "train" / f"{number}.nii.gz").write_bytes(largest(number % 2 * 2 - 1))
    tracemalloc.start()
    try:
        assert message(load_dataset, str(data)).startswith("8 of 8 files")
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_refused_files_are_let_go(data):
    """40 slices of 1 MB that end in NaN."""
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


def test_a_volume_has_a_limit(data, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_VOLUME", 100)
    write_cases(data / "train", (1,), slices=2)
    write_cases(data / "val", (2,), slices=2)
    assert len(load_dataset(str(data)).train) == 2
    write_cases(data / "train", (1,), slices=3)
    assert "case_001_week_0_slice_2.nii: the slices of its case and week up to it" in message(load_dataset, str(data))


def test_a_folder_has_a_limit(data, monkeypatch):
    write_cases(data / "train", range(3))
    write_cases(data / "val", range(3, 5))
    monkeypatch.setattr(dataset, "MAX_FILES", 10)
    monkeypatch.setattr(dataset, "MAX_FOLDERS", 3)
    assert len(load_dataset(str(data)).train) == 6
    monkeypatch.setattr(dataset, "MAX_FOLDERS", 2)
    assert "more than 2 folders are below" in message(load_dataset, str(data))
    monkeypatch.setattr(dataset, "MAX_FOLDERS", 3)
    monkeypatch.setattr(dataset, "MAX_FILES", 9)
    assert "more than 9 slices are below" in message(load_dataset, str(data))


def test_whatever_is_no_regular_file(data, monkeypatch):
    data.mkdir()
    os.mkfifo(data / "pipe.nii")
    (data / "zero.nii").symlink_to("/dev/zero")
    (data / "proc.nii").symlink_to("/proc/self/environ")
    (data / "gone.nii").symlink_to(data / "nothing")
    (data / "loop.nii").symlink_to(data / "loop.nii")
    (data / "loop").symlink_to(data / "loop")
    (data / "empty.nii").touch()
    (data / "folder.nii").mkdir()
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as made:
        patch.chdir(data)
        made.bind("socket.nii")
    for name, words in {
        "pipe": "not a regular file",
        "zero": "not a regular file",
        "socket": "not a regular file",
        "proc": "empty",
        "empty": "empty",
        "gone": "No such file",
        "loop": "Too many levels of symbolic links",
    }.items():
        assert words in reason(data / f"{name}.nii")
    assert message(load_dataset, str(data)).startswith("7 of 7 files")
    assert "no .nii or .nii.gz slices" in message(read_slices, [data / "folder.nii"], (8, 6))


def test_a_pipe_put_in_a_files_place_is_not_waited_for(data):
    path = write(data / "a.nii")
    (file,) = dataset._describe([(str(path), "a.nii")])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="cannot be read: not a regular file"):
        dataset._read_image(file)


def test_a_file_that_changes_while_it_is_read(data):
    path = write(data / "a.nii")
    (file,) = dataset._describe([(str(path), "a.nii")])
    os.utime(path, ns=(0, file.mtime_ns + 1))
    with pytest.raises(DataError, match="changed while it was read"):
        dataset._read_image(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(data):
    write_splits(data)
    (data / "keras_slices_test" / "case_040_week_0_slice_0.nii").chmod(0)
    assert "slice_0.nii: cannot be read: Permission denied" in message(load_dataset, str(data))
    (data / "keras_slices_test").chmod(0)
    assert "cannot read folder" in message(load_dataset, str(data))
    (data / "keras_slices_test").chmod(0o700)


def test_links_that_leave_the_folder_are_followed(data, tmp_path):
    """Clusters lay data out so."""
    write_cases(tmp_path / "store", (1, 2))
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "store")
    (data / "case_003_week_0_slice_0.nii").symlink_to(tmp_path / "store" / "case_001_week_0_slice_0.nii")
    assert len(load_dataset(str(data)).files) == 5


def test_links_that_go_round_are_followed_once(data):
    write_cases(data, (1, 2))
    (data / "again").symlink_to(data)
    assert len(load_dataset(str(data)).train) == 2


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("line\nbreak\r.nii", r"line\nbreak\r.nii"),
        ("\x1b[2Jred.nii", r"\x1b[2Jred.nii"),
        ("\udcff.nii", r"\udcff.nii"),
        ("left\u202eright.nii", r"left\u202eright.nii"),
        ("prostaté.nii", "prostaté.nii"),
    ],
)
def test_names_cannot_steer_the_terminal(data, name, shown):
    write_splits(data)
    path = data / "keras_slices_train" / name
    path.write_bytes(b"bad")
    assert f"/{shown}: not a NIfTI file" in message(load_dataset, str(data))
    shutil.copy(data / "keras_slices_train" / "case_004_week_0_slice_0.nii", path)
    loaded = load_dataset(str(data))
    assert f"keras_slices_train/{name}" in loaded.train.names
    (data / "keras_slices_train").rename(data / name)
    (data / "keras_slices_validate").rename(data / "train")
    loaded = load_dataset(str(data))
    assert all(notice.isprintable() for notice in loaded.notices)
    moved = data.rename(data.with_name(name))
    assert f"outside the split folders of {moved.with_name(shown)} are not read" in load_dataset(str(moved)).notices[0]


@pytest.mark.parametrize(
    "ending", ["_cost$1_of$2", "_$T2__tse$", "_K\udcf6ln", "_前列腺", "_" + "x" * 210, " copy (1)", "\nx", "\t\x1b[1m"]
)
def test_names_of_any_letters(data, ending):
    for case in range(3):
        for number in range(2):
            write(data / f"case_{case:03}_slice_{number}.nii").rename(
                data / f"case_{case:03}_slice_{number}{ending}.nii"
            )
    loaded, again = load_dataset(str(data)), load_dataset(str(data))
    assert loaded.notices == ["split by case with seed 0: 2 train, 2 validate, 2 test slices"]
    assert loaded.train.names[0].endswith(f"_slice_0{ending}.nii")
    assert loaded.train.positions.tolist() == [0, 1]
    assert (again.files, again.fingerprint) == (loaded.files, loaded.fingerprint)


def test_a_name_that_ends_in_a_line_break_is_no_slice(data):
    write_cases(data, (1, 2))
    shutil.copy(data / "case_001_week_0_slice_0.nii", data / "case_003_week_0_slice_0.nii\r")
    assert len(load_dataset(str(data)).files) == 4


def test_mutated_files_load_or_are_refused(tmp_path):
    """A short form of `python tests/campaign.py files`."""
    loaded = sum(load_case(make_case(seed, tmp_path / str(seed))) for seed in range(200))
    assert 20 <= loaded <= 180


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


def test_an_epoch_is_permuted_once_for_all_its_updates(monkeypatch):
    drawn = []

    class Generator:
        def __init__(self, key):
            self.key, self.rng = key, default_rng(key)

        def permutation(self, count):
            drawn.append(self.key)
            return self.rng.permutation(count)

    default_rng = np.random.default_rng
    dataset._permutation.cache_clear()
    expected = np.concatenate([default_rng((7, epoch)).permutation(10) for epoch in range(3)])
    monkeypatch.setattr(np.random, "default_rng", Generator)
    batches = [batch_indices(10, 4, 7, update) for update in range(7)]
    assert drawn == [(7, 0), (7, 1), (7, 2)]
    np.testing.assert_array_equal(np.concatenate(batches), expected[:28])


def test_a_changed_batch_changes_no_other():
    first = batch_indices(10, 4, 7, 0)
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(batch_indices(10, 4, 7, 0), expected)
    with pytest.raises(ValueError, match="read-only"):
        dataset._permutation(10, 7, 0)[0] = 1


# Real slices


@pytest.mark.skipif(not REAL.is_dir(), reason="the real slices are not here")
def test_real_slices():
    loaded = load_dataset(str(REAL), multiple=(8, 8))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [135, 19, 20]
    assert loaded.slice_size == (256, 128)
    cropped, sizes = loaded.notices
    assert cropped == "38 slices of 256x144 brought to 256x128 by centre crop or zero pad"
    assert sizes.startswith("warning: pixel sizes differ, from 0.75x0.75 to ")
    assert loaded.train.cases == [name[19:27] for name in loaded.train.names]
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
