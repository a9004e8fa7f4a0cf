"""splits.py: which slices train, validate and test, by folder or by case, on small real folders."""

import numpy as np
import pytest
from slice_files import cases_of, has_notice, message, write, write_cases, write_splits, write_volume

from dataset import load_dataset

pytestmark = pytest.mark.usefixtures("cache")


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
def test_folders_named_like_splits_are_the_splits(data, names):
    for name, cases in zip(names, ((1, 2), (3,), (4,))):
        write_cases(data / name, cases)
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [4, 2, 2]
    assert loaded.train.names[0] == f"{names[0]}/case_001_week_0_slice_0.nii"
    assert cases_of(loaded.validate) == {"case_003"}
    assert cases_of(loaded.test) == {"case_004"}
    assert loaded.notices == []


@pytest.mark.parametrize("name", ["train_test", "train1", "constraint", "keras_slices", "tr_3000"])
def test_other_folder_names_are_not_splits(data, name):
    write_cases(data / name, (1, 2, 3))
    write_cases(data / "others", (4,))
    loaded = load_dataset(str(data))
    assert loaded.notices == ["split by case with seed 0: 4 train, 2 validate, 2 test slices"]


@pytest.mark.parametrize("name", ["test_retest", "training_hospital_A", "test_2020"])
def test_a_name_that_may_be_a_split_is_none_beside_others_but_reported(data, name):
    write_cases(data / name, (1, 2, 3))
    write_cases(data / "others", (4,))
    loaded = load_dataset(str(data))
    assert has_notice(loaded, f"warning: folders named like splits are not used as splits ({name})")
    assert has_notice(loaded, "split by case with seed 0: 4 train, 2 validate, 2 test slices")


@pytest.mark.parametrize(
    "names",
    [
        ("fold0_train", "fold0_val", "fold0_test"),
        ("train_2D_v2", "val_2D_v2", "test_2D_v2"),
        ("train (1)", "val (1)", "test (1)"),
        ("prostate_train", "val", "prostate_test"),
    ],
)
def test_folders_that_all_name_a_split_are_the_splits_whatever_else_they_say(data, names):
    for name, cases in zip(names, ((1, 2), (3,), (4,))):
        write_cases(data / name, cases)
    loaded = load_dataset(str(data))
    assert cases_of(loaded.train) == {"case_001", "case_002"}
    assert cases_of(loaded.validate) == {"case_003"}
    assert cases_of(loaded.test) == {"case_004"}
    assert has_notice(loaded, "splits by the names of folders: ")


def test_a_missing_training_folder_names_the_one_that_may_be_meant(data):
    write_cases(data / "train (1)", (1, 2))
    write_cases(data / "val", (3,))
    write_cases(data / "docs", (4,))
    assert message(load_dataset, str(data)).endswith("into keras_slices_train or train; is it train (1)? name it train")


def test_split_folders_that_are_not_used_are_reported(data):
    for hospital, cases in (("hospital_A", (1, 2, 3)), ("hospital_B", (4, 5, 6))):
        for split, case in zip(("train", "val", "test"), cases):
            write_cases(data / hospital / split, (case,))
    loaded = load_dataset(str(data))
    start = "warning: folders named like splits are not used as splits (hospital_A/test, hospital_A/train, "
    assert has_notice(loaded, f"{start}hospital_A/val, hospital_B/test and 2 more): point --data at the folder")
    assert has_notice(loaded, "split by case")


def test_a_split_folder_within_another_split_is_reported(data):
    write_cases(data / "train" / "train", (1, 2))
    write_cases(data / "train" / "images", (3,))
    write_cases(data / "train" / "val", (4,))
    write_cases(data / "val", (5,))
    write_cases(data / "old" / "test", (6,))  # not read
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "not used as splits (train/val): point")
    assert has_notice(loaded, "ignored 2 files outside")
    assert len(loaded.notices) == 2


def test_nnunet_folders_are_the_splits(data):
    """nnU-Net and the Medical Segmentation Decathlon use these names."""
    write_cases(data / "imagesTr", (1, 2, 3, 4))
    write_cases(data / "labelsTr", (1, 2, 3, 4))
    write_cases(data / "imagesTs", (5,))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert cases_of(loaded.test) == {"case_005"}
    assert has_notice(loaded, "ignored 8 label maps (labelsTr/case_001_week_0_slice_0.nii and 7 more)")


def test_a_missing_test_split_is_empty_and_files_outside_are_ignored(data):
    write_cases(data / "train", (1,))
    write_cases(data / "val", (2,))
    write(data / "case_003_week_0_slice_0.nii")
    loaded = load_dataset(str(data))
    assert len(loaded.test) == 0
    assert loaded.test.batch([]).shape == (0, 1, 8, 6)
    assert has_notice(loaded, "ignored 1 file outside")


def test_a_missing_validation_split_is_drawn_from_training_by_case(data):
    write_cases(data / "train", range(5))
    write_cases(data / "test", (9,))
    loaded = load_dataset(str(data))
    assert len(cases_of(loaded.validate)) == 1
    assert len(cases_of(loaded.train)) == 4
    assert not cases_of(loaded.train) & cases_of(loaded.validate)
    assert cases_of(loaded.test) == {"case_009"}
    assert has_notice(loaded, "no validation slices")


def test_a_flat_folder_is_split_by_case_and_seed(data):
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
def test_few_cases_fill_validation_before_test(data, cases, expected):
    write_cases(data, range(cases))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == expected


def test_a_single_case_is_split_by_file(data):
    write_cases(data, (1,), slices=4)
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 1, 1]
    assert has_notice(loaded, "warning", "case_001", "the same patient")
    assert has_notice(loaded, "split by file with seed 0: 2 train, 1 validate, 1 test")
    assert len({*loaded.train.scales, *loaded.validate.scales, *loaded.test.scales}) == 1  # it is one volume


def test_names_without_a_case_are_split_by_file(data):
    for number in range(4):
        write(data / f"image{number}.nii")
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 1, 1]
    assert has_notice(loaded, "warning", "4 file names without a case")
    assert np.isnan(loaded.train.positions).all()
    assert loaded.train.scales[0] != loaded.train.scales[1]  # each file is its own volume


def test_a_case_in_two_splits_is_reported_as_a_data_leak(data):
    write_splits(data)
    write_cases(data / "keras_slices_test", (5,), week=3)
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning", "case_005", "train", "test")
    assert not has_notice(loaded, "case_004")


def test_the_slices_of_a_volume_stay_together(data):
    for seed, name in enumerate(("one", "two", "three", "four")):
        write_volume(data / f"{name}.nii.gz", seed)
    loaded = load_dataset(str(data))
    assert [len(part) for part in (loaded.train, loaded.validate, loaded.test)] == [10, 5, 5]
    assert all(len(set(part.cases)) == len(part) // 5 for part in (loaded.train, loaded.validate, loaded.test))
    assert not set(loaded.train.cases) & {*loaded.validate.cases, *loaded.test.cases}
    notice = "4 volumes without a case in the name (four.nii.gz and 3 more): each is taken for a patient of its own; "
    notice += "--pattern can find patients in paths"
    assert notice in loaded.notices


def test_the_weeks_of_a_single_patient_stay_together(data):
    for week in range(3):
        write_volume(data / f"case_004_week_{week}.nii", seed=week)
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning: all slices are of case_004: every split contains the same patient")
    for part in (loaded.train, loaded.validate, loaded.test):
        assert len(part) == 5 and len({name[:15] for name in part.names}) == 1


def test_a_single_volume_is_split_by_slice(data):
    write_volume(data / "case_004.nii")
    loaded = load_dataset(str(data))
    assert [len(part) for part in (loaded.train, loaded.validate, loaded.test)] == [3, 1, 1]
    assert has_notice(loaded, "warning: all slices are of case_004")
    every = np.sort(np.concatenate([part.positions for part in (loaded.train, loaded.validate, loaded.test)]))
    assert every.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_a_volume_outside_the_splits_counts_as_one_file(data):
    write_volume(data / "train" / "case_1.nii", seed=1)
    write_volume(data / "val" / "case_2.nii", seed=2)
    write_volume(data / "other" / "case_3.nii", seed=3)
    assert has_notice(load_dataset(str(data)), "ignored 1 file outside the split folders")
