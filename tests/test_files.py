"""files.py: finding slices, and what their names say, on small real folders."""

import os
import shutil
import socket

import nibabel as nib
import numpy as np
import pytest
from slice_files import (
    cases_of,
    has_notice,
    message,
    picture,
    volumes_of,
    write,
    write_cases,
    write_splits,
    write_volume,
)

import files
from dataset import load_dataset, read_slices
from files import Reading

pytestmark = pytest.mark.usefixtures("cache")

# ---------------------------------------------------------------- finding files


def test_keras_slices_data_is_loaded_without_its_label_maps(data):
    write_splits(data / "keras_slices_data")
    write_cases(data / "other", (9,))
    write(data / "keras_slices_data" / "keras_slices_seg_train" / "case_004_week_0_slice_0.nii")
    write(data / "keras_slices_data" / "keras_slices_train" / "seg_004_week_0_slice_0.nii")
    (data / "keras_slices_data" / "keras_slices_train" / "._case_004_week_0_slice_0.nii").write_bytes(b"finder")
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert not any("seg" in name for name in loaded.train.names)
    first = "keras_slices_seg_train/case_004_week_0_slice_0.nii"
    assert loaded.notices == [f"ignored 2 label maps ({first} and 1 more)"]


@pytest.mark.parametrize(
    "above",
    [
        "HipMRI_study_keras_slices_data",
        "keras_slices_data/HipMRI_study_keras_slices_data",
        "keras_slices_data/keras_slices_data",
        "download/export/keras_slices_data",
    ],
)
def test_splits_are_found_below_lone_folders(data, tmp_path, above):
    write_splits(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", data / above)
    expected, loaded = load_dataset(str(tmp_path / "plain")), load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [6, 2, 2]
    assert cases_of(loaded.test) == {"case_040"}
    assert (loaded.files, loaded.fingerprint) == (expected.files, expected.fingerprint)
    assert loaded.notices == []
    np.testing.assert_array_equal(loaded.train.positions, expected.train.positions)


def test_a_flat_folder_is_found_below_lone_folders(data, tmp_path):
    write_cases(tmp_path / "plain", range(10))
    shutil.copytree(tmp_path / "plain", data / "a" / "b")
    expected, loaded = load_dataset(str(tmp_path / "plain")), load_dataset(str(data))
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.validate.names == expected.validate.names


def test_keras_slices_data_is_found_below_a_lone_folder(data):
    write_splits(data / "HipMRI" / "keras_slices_data")
    write(data / "HipMRI" / "semantic_MRs_anon" / "Case_004_Week0_LFOV.nii.gz", picture(1, (8, 6, 5)))
    loaded = load_dataset(str(data))
    assert loaded.train.names[0] == "keras_slices_train/case_004_week_0_slice_0.nii"
    assert len(loaded.files) == 10


def test_a_lone_folder_named_like_a_split_is_that_split(data):
    write_cases(data / "train", range(4))
    loaded = load_dataset(str(data))
    assert loaded.train.names[0].startswith("train/case_")
    assert has_notice(loaded, "no validation slices")
    assert len(loaded.test) == 0
    (data / "train").rename(data / "test")
    assert "no training slices" in message(load_dataset, str(data))


def test_the_folder_of_a_lone_patient_stays_in_the_names(data):
    for number in range(4):
        write(data / "case_004" / "week_0" / f"slice_{number}.nii")
    loaded = load_dataset(str(data))
    assert all(name.startswith("case_004/week_0/slice_") for name in loaded.files)
    assert has_notice(loaded, "all slices are of case_004")


def test_backslashes_in_names_are_read_as_slashes(data, tmp_path):
    """Zip files made on Windows unpack to such names elsewhere."""
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
        == ["ignored 2 label maps (keras_slices_seg_train/case_004_week_0_slice_0.nii and 1 more)"]
    )
    np.testing.assert_array_equal(loaded.train.positions, expected.train.positions)
    slices, *_ = read_slices([data], (8, 6))
    assert len(slices) == 10
    assert slices.names[0] == f"{data.as_posix()}/keras_slices_data/keras_slices_test/case_040_week_0_slice_0.nii"


def test_two_files_with_the_same_name_are_refused(data):
    write_splits(data)
    copy = write(data / "keras_slices_train\\case_004_week_0_slice_0.nii")
    text = message(load_dataset, str(data))
    assert str(copy) in text and str(data / "keras_slices_train" / "case_004_week_0_slice_0.nii") in text
    assert "have the same name" in text


def test_links_out_of_the_folder_are_followed(data, tmp_path):
    """Clusters often keep data in a store and link to it."""
    write_cases(tmp_path / "store", (1, 2))
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "store")
    (data / "case_003_week_0_slice_0.nii").symlink_to(tmp_path / "store" / "case_001_week_0_slice_0.nii")
    assert len(load_dataset(str(data)).files) == 5


def test_circular_links_are_followed_once(data):
    write_cases(data, (1, 2))
    (data / "again").symlink_to(data)
    assert len(load_dataset(str(data)).train) == 2


def test_pipes_devices_and_broken_links_are_refused(data, monkeypatch):
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
        assert words in message(read_slices, [data / f"{name}.nii"], (8, 6))
    assert message(load_dataset, str(data)).startswith("7 of 7 files")
    assert "no slices or volumes in" in message(read_slices, [data / "folder.nii"], (8, 6))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_named(data):
    write_splits(data)
    (data / "keras_slices_test" / "case_040_week_0_slice_0.nii").chmod(0)
    assert "slice_0.nii: cannot be read: Permission denied" in message(load_dataset, str(data))
    (data / "keras_slices_test").chmod(0)
    assert "cannot read folder" in message(load_dataset, str(data))
    (data / "keras_slices_test").chmod(0o700)


def test_files_and_folders_are_limited_in_number(data, monkeypatch):
    write_cases(data / "train", range(3))
    write_cases(data / "val", range(3, 5))
    monkeypatch.setattr(files, "MAX_FILES", 10)
    monkeypatch.setattr(files, "MAX_FOLDERS", 3)
    assert len(load_dataset(str(data)).train) == 6
    monkeypatch.setattr(files, "MAX_FOLDERS", 2)
    assert "contains more than 2 folders" in message(load_dataset, str(data))
    monkeypatch.setattr(files, "MAX_FOLDERS", 3)
    monkeypatch.setattr(files, "MAX_FILES", 9)
    assert "contains more than 9 slices" in message(load_dataset, str(data))


@pytest.mark.parametrize(
    "ending", ["_cost$1_of$2", "_$T2__tse$", "_K\udcf6ln", "_前列腺", "_" + "x" * 210, " copy (1)", "\nx", "\t\x1b[1m"]
)
def test_file_names_in_any_script_load(data, ending):
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


def test_a_name_that_ends_in_a_line_break_is_not_a_slice(data):
    write_cases(data, (1, 2))
    shutil.copy(data / "case_001_week_0_slice_0.nii", data / "case_003_week_0_slice_0.nii\r")
    assert len(load_dataset(str(data)).files) == 4


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
def test_control_characters_in_names_are_escaped(data, name, shown):
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
    assert f"outside the split folders of {moved.with_name(shown)}" in load_dataset(str(moved)).notices[0]


# ---------------------------------------------------------------- label maps


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
def test_label_maps_are_recognised_by_name(data, name):
    write_cases(data, (1, 2))
    write(data / name)
    loaded = load_dataset(str(data))
    assert len(loaded.files) == 4
    assert has_notice(loaded, f"ignored 1 label map ({name})".replace("\\", "/"))
    slices, _, notices = read_slices([data], (8, 6))
    assert len(slices) == 4
    assert notices == [f"ignored 1 label map ({data.as_posix()}/{name})".replace("\\", "/")]


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
def test_slices_with_similar_names_are_not_label_maps(data, name):
    write_cases(data, (1, 2))
    write(data / name)
    assert len(load_dataset(str(data)).files) == 5
    assert len(read_slices([data / name], (8, 6))[0]) == 1


def test_names_above_the_data_folder_do_not_count(data):
    folder = data / "segmentation" / "train" / "case_9"
    write_cases(folder, (1, 2))
    loaded = load_dataset(str(folder))
    assert loaded.notices == ["split by case with seed 0: 2 train, 2 validate, 0 test slices"]
    assert len(read_slices([folder], (8, 6))[0]) == 4


def test_a_folder_of_label_maps_alone_is_refused(data):
    write_cases(data / "labels", (1, 2))
    text = message(load_dataset, str(data))
    said = "ignored 4 files named like label maps (labels/case_001_week_0_slice_0.nii and 3 more)"
    assert text == f"no slices or volumes in {data}: {said}; names above the given folder do not count"
    assert "ignored 4 files" in message(read_slices, [data], (8, 6))
    path = data / "labels" / "case_001_week_0_slice_0.nii"
    assert len(read_slices([path], (8, 6))[0]) == 1  # a folder above says nothing
    assert "name of a label map" in message(read_slices, [path.rename(data / "case_001_GT.nii")], (8, 6))


def test_mask_folders_within_splits_are_left_out(data):
    for split, case in (("train", 1), ("val", 2), ("test", 3)):
        write_cases(data / split / "images", (case,))
        write_cases(data / split / "masks", (case,))
    loaded = load_dataset(str(data))
    assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [2, 2, 2]
    assert loaded.train.names[0] == "train/images/case_001_week_0_slice_0.nii"
    assert loaded.notices == ["ignored 6 label maps (test/masks/case_003_week_0_slice_0.nii and 5 more)"]


# ---------------------------------------------------------------- names


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
        ("sub-001_ses-02_acq-tse_T2w", ("sub_001", 2, None)),
        ("sub-control_ses-pre_T2w", ("sub_control", None, None)),
        ("sub-AB/ses-2/anat/sub-AB_ses-2_run-1_T2w", ("sub_ab", 2, None)),
        ("sub-control", (None, None, None)),
        ("sub-slice_3", (None, None, None)),
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
def test_names_give_case_week_and_slice_number(name, expected):
    assert files.identify(f"{name}.nii.gz") == expected


def test_slices_carry_their_cases(data):
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


def test_different_spellings_of_a_case_are_one_patient(data):
    write(data / "train" / "case_004_week_0_slice_0.nii")
    write(data / "train" / "case_005_week_0_slice_0.nii")
    write(data / "val" / "Case_4_Week1_slice_0.nii")
    write(data / "test" / "case_05" / "slice_0.nii")
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "warning: data leak between splits: train and validate share case_004")
    assert has_notice(loaded, "warning: data leak between splits: train and test share case_005")
    assert len(loaded.notices) == 2


def test_case_4_and_subject_4_are_different_patients(data):
    write(data / "train" / "case_004_slice_0.nii")
    write(data / "val" / "sub-004_slice_0.nii")
    write(data / "test" / "case_004b_slice_0.nii")
    assert load_dataset(str(data)).notices == []


def test_names_without_case_or_slice_number_are_reported(data):
    for split, names in (("train", ("a", "b", "case_001")), ("val", ("case_002_week_1", "case_003_slice_1"))):
        for name in names:
            write(data / split / f"{name}.nii")
    write(data / "notes" / "c.nii")  # outside the splits
    loaded = load_dataset(str(data))
    assert has_notice(loaded, "2 file names without a case", "scaled individually", "position are unknown")
    assert has_notice(loaded, "2 file names without a slice number", "positions of such slices")
    assert len(loaded.notices) == 3


# ---------------------------------------------------------------- volumes


def test_positions_are_ranks_within_the_volume(data):
    for number in (2, 10, 4):
        write(data / "train" / f"case_001_week_0_slice_{number}.nii")
    write(data / "train" / "case_001_week_1_slice_7.nii")
    write_cases(data / "val", (2,))
    loaded = load_dataset(str(data))
    assert [name.rpartition("_")[2] for name in loaded.train.names] == ["2.nii", "4.nii", "10.nii", "7.nii"]
    assert loaded.train.positions.tolist() == [0, 0.5, 1, 0.5]


@pytest.mark.parametrize("folder", ["{}.nii/{}.nii", "{}/{}.nii.gz", "{}.nii.gz/{}.nii.gz", "{}.nii.gz/{}.nii"])
def test_files_unzipped_into_folders_of_their_own_are_one_volume(data, folder):
    """Windows unpacks x.nii.gz to x.nii/x.nii."""
    for case in (4, 5, 6):
        for number in range(3):
            name = f"case_{case:03}_week_0_slice_{number}"
            write(data / "train" / folder.format(name, name), picture(10 * case + number) * (number + 1))
    loaded = load_dataset(str(data))
    assert len(volumes_of(loaded.train)) == 2 and len(volumes_of(loaded.validate)) == 1
    assert loaded.train.positions.tolist() == [0, 0.5, 1] * 2


def test_a_volume_may_be_spread_over_several_folders(data):
    for number in range(4):
        write(data / "train" / f"part_{number % 2}" / f"case_001_week_0_slice_{number}.nii")
    write_cases(data / "val", (2,))
    train = load_dataset(str(data)).train
    assert len(volumes_of(train)) == 1
    assert [name[-5] for name in train.names] == ["0", "1", "2", "3"]
    np.testing.assert_allclose(train.positions, [0, 1 / 3, 2 / 3, 1])


def test_folders_with_the_same_slice_numbers_are_different_series(data):
    for series, bright in (("T2", 1), ("ADC", 20)):
        for number in range(3):
            name = f"case_001_slice_{number}"
            write(data / "train" / series / f"{name}.nii" / f"{name}.nii", picture(number) * bright)
    write_cases(data / "val", (2,))
    train = load_dataset(str(data)).train
    assert [{name.split("/")[1] for name in names} for names in volumes_of(train)] == [{"ADC"}, {"T2"}]
    assert train.positions.tolist() == [0, 0.5, 1] * 2


def test_repeated_slice_numbers_in_one_folder_are_reported(data):
    for case in (1, 2):
        for series in ("ADC", "T2"):
            write(data / "train" / f"case_{case}_{series}_slice_0.nii")
    write_cases(data / "val", (3,))
    loaded = load_dataset(str(data))
    names = "train/case_1_T2_slice_0.nii, train/case_2_T2_slice_0.nii"
    repeated = "2 repeated slice numbers within one case, week and folder"
    assert loaded.notices == [f"warning: {repeated} ({names}): all these slices are scaled as one volume"]


def test_folders_of_unnumbered_slices_are_different_series(data):
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


def test_folders_per_case_and_week_are_volumes(data):
    for case in (1, 2, 3):
        for week in (0, 1):
            for number in (0, 1):
                image = picture(100 * case + 10 * week + number)
                write(data / f"case_{case}" / f"week_{week}" / f"slice_{number}.nii", image)
    loaded = load_dataset(str(data))
    assert loaded.notices == ["split by case with seed 0: 4 train, 4 validate, 4 test slices"]
    assert [len(names) for names in volumes_of(loaded.train)] == [2, 2]
    assert loaded.train.positions.tolist() == [0, 1, 0, 1]


# ---------------------------------------------------------------- a pattern or a table of the user's

PATTERN = r"sub-(?P<case>\w+?)_.*_z(?P<slice>\d+)"


def test_a_pattern_finds_case_week_and_slice_number(data):
    for case in ("P7", "x", "12"):
        for number in range(3):
            write(data / f"sub-{case}_acq-t2_z{number}.nii")
    loaded = load_dataset(str(data), reading=Reading(pattern=PATTERN))
    assert {*loaded.train.cases, *loaded.validate.cases, *loaded.test.cases} == {"P7", "x", "12"}
    assert loaded.train.positions.tolist() == [0, 0.5, 1] and len(set(loaded.train.scales)) == 1
    assert loaded.notices == ["split by case with seed 0: 3 train, 3 validate, 3 test slices"]
    found = files.identify_by_pattern(files.compile_pattern(r"(?P<case>.+)/w(?P<week>\d)"), "a/b/w3.nii")
    assert found == ("a/b", 3, None)


def test_files_that_a_pattern_does_not_match_are_named_and_left_out(data):
    for case in range(3):
        write(data / f"sub-{case}_a_z0.nii")
    write(data / "scout.nii")
    loaded = load_dataset(str(data), reading=Reading(pattern=PATTERN))
    assert "scout.nii" not in loaded.files and len(loaded.files) == 3
    assert has_notice(loaded, f"warning: --pattern {PATTERN} does not match 1 file (scout.nii): not read")
    assert "does not match 4 files (" in message(load_dataset, str(data), reading=Reading(pattern="(?P<case>zebra)"))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?P<case>", "is no regular expression: "),
        ("*", "is no regular expression: nothing to repeat"),
        (r"case_(\d+)", "needs a group (?P<case>...)"),
        (r"(?P<slice>\d+)", "needs a group (?P<case>...)"),
        (r"(?P<case>\d)(?P<number>\d)", "needs a group (?P<case>...)"),
        (r"(?P<case>s)ub-(?P<week>\w)", "its week is a, where a whole number is needed"),
    ],
)
def test_a_bad_pattern_is_refused(data, pattern, words):
    write(data / "sub-a.nii")
    assert words in message(load_dataset, str(data), reading=Reading(pattern=pattern))


def test_a_pattern_finds_splits_and_volumes_below_lone_folders(data):
    for split, case in (("train", "a"), ("train", "b"), ("val", "c")):
        write_volume(data / "export" / split / f"t2_{case}.nii.gz", ord(case))
    loaded = load_dataset(str(data), reading=Reading(pattern=r"t2_(?P<case>\w)"))
    assert loaded.train.cases == ["a"] * 5 + ["b"] * 5 and loaded.validate.cases == ["c"] * 5
    assert loaded.notices == []


def test_another_pattern_or_table_is_other_data(data):
    for number in range(8):
        write(data / f"a{number // 2}_b{number // 4}_{number % 2}.nii", picture(number) * (number + 1))
    patterns = (r"a(?P<case>\d)_.*_(?P<slice>\d)", r"b(?P<case>\d)", r"a(?P<case>\d)")
    loaded = [load_dataset(str(data), reading=Reading(pattern=pattern)) for pattern in patterns]
    assert len({one.fingerprint for one in loaded}) == 3
    again = load_dataset(str(data), reading=Reading(pattern=patterns[0]))
    assert again.fingerprint == loaded[0].fingerprint
    np.testing.assert_array_equal(again.train.scales, loaded[0].train.scales)


def test_slices_to_reconstruct_are_named_by_a_pattern_or_as_usual(data):
    paths = [write(data / name) for name in ("sub-a_t_z1.nii", "sub-a_t_z0.nii", "case_4_slice_2.nii")]
    slices, *_ = read_slices(paths, (8, 6), Reading(pattern=PATTERN))
    assert slices.cases == ["a", "a", "case_004"] and slices.positions.tolist() == [1, 0, 0.5]


def test_a_bids_tree_is_recognised(data):
    """Its label maps are in derivatives, and all its images have their patients."""
    for seed, (subject, session) in enumerate([("01", "pre"), ("01", "02"), ("ctrl", "pre"), ("B3", "1"), ("7", "1")]):
        folder = data / f"sub-{subject}" / f"ses-{session}" / "anat"
        write_volume(folder / f"sub-{subject}_ses-{session}_acq-tse_T2w.nii.gz", seed)
        mask = data / "derivatives" / "manual" / f"sub-{subject}" / "anat"
        write_volume(mask / f"sub-{subject}_ses-{session}_desc-prostate_mask.nii.gz", seed)
    write_volume(data / "sub-noses" / "anat" / "sub-noses_T2w.nii.gz", 9)
    (data / "dataset_description.json").write_text("{}")
    loaded = load_dataset(str(data))
    cases = [set(part.cases) for part in (loaded.train, loaded.validate, loaded.test)]
    assert set.union(*cases) == {"sub_001", "sub_ctrl", "sub_b003", "sub_007", "sub_noses"}
    assert sum(map(len, cases)) == 5 and len(loaded.files) == 30
    assert sorted(loaded.notices)[0].startswith("ignored 5 label maps (derivatives/manual/sub-01/anat/")
    assert len(loaded.notices) == 2


def write_table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    return path


def test_a_table_says_what_files_are(data, tmp_path):
    for name in ("x.nii", "y.nii", "masks/z.nii", "elsewhere.nii"):
        write(data / name)
    write_volume(tmp_path / "list" / "vol.nii.gz", 5)
    table = write_table(
        tmp_path / "list" / "slices.csv",
        "path,case,week,slice,split,remark",
        "x.nii,anna,2,7,train,",
        'y.nii,anna,2,3,training,"a, b"',
        "masks/z.nii,bo,,,val,",
        "vol.nii.gz,cy,1,,test,",
    )
    loaded = load_dataset(str(data), reading=Reading(table=table))
    assert loaded.train.names == ["y.nii", "x.nii"] and loaded.train.cases == ["anna", "anna"]
    assert loaded.train.positions.tolist() == [0, 1] and len(set(loaded.train.scales)) == 1
    assert loaded.validate.names == ["masks/z.nii"]
    assert loaded.test.cases == ["cy"] * 5 and loaded.test.names[0] == "vol_slice_000.nii.gz"
    assert list(loaded.files) == loaded.train.names + loaded.validate.names + loaded.test.names


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_without_splits_is_split_by_case(data, separator):
    rows = [f"{write(data / f'{case}{number}.nii').name},{case}" for case in "abcd" for number in range(2)]
    table = write_table(data / "slices.csv", *(row.replace(",", separator) for row in ("path,case", *rows)))
    for given in (str(data), "phantom"):  # the table's own folder
        loaded = load_dataset(given, reading=Reading(table=table))
        assert [len(loaded.train), len(loaded.validate), len(loaded.test)] == [4, 2, 2]
        assert len(set(loaded.validate.cases)) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            ["file,case", "a.nii,1"],
            "needs the columns path and case, and may have week, slice and split; it has file",
        ),
        (["path,case"], "lists no files"),
        (["path,case", ","], "lists no files"),
        ([""], "needs the columns path and case"),
        (["path,case", "a.nii,1", "a.nii,2"], "row 3: a.nii is listed twice"),
        (["path,case", ",1"], "row 2: it has no path"),
        (["path,case", "a.nii,1", "b.nii,1"], "b.nii: No such file"),
        (["path,case", "a.txt,1"], "row 2: a.txt is none of .nii .nii.gz .hdr .mha"),
        (["path,case,slice", "a.nii,1,3.5"], "row 2: its slice is 3.5, where a whole number is needed"),
        (["path,case,split", "a.nii,1,train", "c.nii,2,"], "row 3: its split is empty, not train, validate or test"),
        (["path,case,split", "a.nii,1,train", "c.nii,2"], "row 3: its split is empty, not train, validate or test"),
        (["path,case", "a.nii,1", "./a.nii,2"], "row 3: a.nii is listed twice"),
        (["path,case,split", "a.nii,1,test"], "has no row with split train"),
        (["path,case", 'a.nii,"1'], "is no CSV file: "),
        (["path,case,Case", "a.nii,1,2"], "has two columns of one name: path, case, case"),
        (["path,case", "only_here.nii,1"], "only_here.nii: No such file"),
    ],
)
def test_a_bad_table_is_refused(data, rows, words, tmp_path, monkeypatch):
    write(data / "a.nii")
    write(data / "c.nii")
    write(tmp_path / "current" / "only_here.nii")
    monkeypatch.chdir(tmp_path / "current")
    assert words in message(load_dataset, str(data), reading=Reading(table=write_table(data / "t.csv", *rows)))


def test_a_table_may_be_written_by_a_spreadsheet_or_by_pandas(data):
    """With spaces after the commas, a dot for the folder, an empty row at the end, and whole numbers as floats."""
    for number in range(4):
        write(data / f"{number}.nii")
    rows = [f"./{number}.nii, a, {number}.0, train" for number in range(3)]
    table = write_table(data / "t.csv", " path , Case, slice, split,,", *rows, "3.nii, b, , validate", ",,,")
    loaded = load_dataset(str(data), reading=Reading(table=table))
    assert loaded.train.names == ["0.nii", "1.nii", "2.nii"]
    assert loaded.train.cases == ["a"] * 3
    assert loaded.train.positions.tolist() == [0, 0.5, 1]


def test_the_paths_of_a_linked_table_start_beside_the_link(data, tmp_path):
    """Not beside the table that the link leads to, from which a cache knows other slices."""
    folders = tmp_path / "one", tmp_path / "two"
    for value, folder in enumerate(folders):
        for number in range(3):
            write(folder / f"{number}.nii", picture(number, (8, 6 + 2 * value)))
    data.mkdir()
    table = write_table(folders[0] / "t.csv", "path,case", *(f"{number}.nii,{number}" for number in range(3)))
    (folders[1] / "t.csv").symlink_to(table)
    sizes = [load_dataset(str(data), reading=Reading(table=folder / "t.csv")).slice_size for folder in folders]
    assert sizes == [(8, 6), (8, 8)]


def test_files_of_other_kinds_are_named(data):
    """All slices of a folder have one kind of container: the others are left out, and the user is told."""
    write_cases(data, (1, 2))
    for name in ("case_003_week_0_slice_0.png", "case_004.nrrd"):
        (data / name).write_bytes(b"")
    unread = "2 files of other kinds not read (case_003_week_0_slice_0.png, case_004.nrrd)"
    assert f"{unread}: all slices of a folder have one kind of container" in load_dataset(str(data)).notices


def test_a_folder_without_slices_says_which_endings_are_read(data):
    (data / "series").mkdir(parents=True)
    (data / "series" / "IM0000").write_bytes(b"DICM")
    endings = ".nii .nii.gz .hdr .mha .mhd .nrrd .dcm .png .tif .tiff"
    assert message(load_dataset, str(data)) == f"no slices or volumes in {data}: no file ends in {endings}"


def test_a_table_is_read_within_bounds(data, monkeypatch):
    data.mkdir()
    (data / "binary.csv").write_bytes(b"path,case\n\xff\xfe")
    assert "is no CSV file in UTF-8" in message(load_dataset, str(data), reading=Reading(table=data / "binary.csv"))
    os.mkfifo(data / "pipe.csv")
    assert "not a regular file" in message(load_dataset, str(data), reading=Reading(table=data / "pipe.csv"))
    assert "No such file" in message(load_dataset, str(data), reading=Reading(table=data / "none.csv"))
    table = write_table(data / "long.csv", "path,case", *(f"{number}.nii,1" for number in range(20)))
    monkeypatch.setattr(files, "MAX_FILES", 10)
    assert "has more than 10 rows" in message(load_dataset, str(data), reading=Reading(table=table))


# ---------------------------------------------------------------- volumes in one file


def test_a_volume_file_gives_numbered_slices(data):
    write_volume(data / "train" / "Case_004_Week1_LFOV.nii.gz")
    write_volume(data / "val" / "scan.hdr", seed=1, kind=nib.Nifti1Pair)
    loaded = load_dataset(str(data))
    assert loaded.train.names == [f"train/Case_004_Week1_LFOV_slice_{index:03}.nii.gz" for index in range(5)]
    assert loaded.validate.names == [f"val/scan_slice_{index:03}.hdr" for index in range(5)]
    assert loaded.train.cases == ["case_004"] * 5 and loaded.validate.cases == ["val/scan"] * 5
    assert loaded.train.positions.tolist() == loaded.validate.positions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert has_notice(loaded, "1 volume without a case in the name (val/scan.hdr): each is taken for a patient")


def test_positions_rise_from_the_feet_whatever_the_order_in_the_file(data):
    up = np.asarray(write_volume(data / "case_1.nii", codes="RAS").dataobj)
    write_volume(data / "case_2.nii", codes="LPI")
    write_volume(data / "case_3.nii", codes="ARI")
    for name in ("case_1.nii", "case_2.nii", "case_3.nii"):
        slices, *_ = read_slices([data / name], (8, 6))
        assert slices.positions.tolist() == [0, 0.25, 0.5, 0.75, 1]
        lowest = slices.pixels[0] / 255 * slices.scales[0]
        np.testing.assert_allclose(lowest, up[::-1, ::-1, 0].clip(max=slices.scales[0]), atol=0.3)


def test_each_volume_file_of_a_case_is_scaled_alone(data):
    write_volume(data / "case_1_t2.nii", seed=1)
    write_volume(data / "case_1_adc.nii", seed=2)
    write_cases(data, (1,), slices=3)
    loaded, *_ = read_slices([data], (8, 6))
    assert sorted(len(names) for names in volumes_of(loaded)) == [3, 5, 5]
    assert loaded.cases == ["case_001"] * 13


def test_a_header_without_pixels_is_no_slice(data):
    """Other programs also write .hdr files."""
    write_cases(data, (1, 2, 3))
    (data / "photo.hdr").write_bytes(b"#?RADIANCE")
    (data / "disk.img").write_bytes(b"boot")
    assert len(load_dataset(str(data)).files) == 6


def test_a_slice_named_like_one_of_a_volume_is_refused(data):
    write_volume(data / "case_1.nii")
    write(data / "case_1_slice_003.nii")
    text = message(load_dataset, str(data))
    assert str(data / "case_1.nii") in text and "both contain a slice called case_1_slice_003.nii: remove one" in text


def test_slices_in_volumes_are_limited_in_number(data, monkeypatch):
    for case in range(3):
        write_volume(data / f"case_{case}.nii", seed=case)
    monkeypatch.setattr(files, "MAX_FILES", 12)
    assert message(load_dataset, str(data)).endswith("with this volume there are more than 12 slices")


def test_repeated_slice_numbers_are_not_reported_of_several_volumes(data):
    for case in range(3):
        write_volume(data / f"case_{case}.nii", seed=case)
    assert load_dataset(str(data)).notices == ["split by case with seed 0: 5 train, 5 validate, 5 test slices"]
