"""inspection.py: what `python dataset.py DIR` prints and draws, on small real folders."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slice_files import AFFINE, picture, write, write_cases, write_volume

import dataset
import decoding
import inspection
from files import Reading

pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def inspect(tmp_path, capsys, monkeypatch):
    """Run the command; return the lines on stdout, and the slices and titles of the contact sheet."""
    sheets = []
    monkeypatch.setattr(inspection, "contact_sheet_figure", lambda *given: sheets.append(given))

    def run(*arguments):
        inspection.main([*map(str, arguments), "--out", str(tmp_path / "sheet.png")])
        ((path, slices, titles, title),) = sheets
        sheets.clear()
        assert path == tmp_path / "sheet.png" and len(slices) == len(titles)
        return capsys.readouterr().out.splitlines(), dict(zip(titles, slices)), title

    return run


def write_mixture(data):
    """Write 2D slices of four cases and two volumes, in splits."""
    write_cases(data / "train", (1, 2, 3), slices=3)
    write_cases(data / "train", (4,), slices=2, image=picture(9, (10, 6)), affine=np.diag([0.5, 0.9, 3, 1]))
    write_volume(data / "val" / "case_7.nii.gz", 7, codes="PIR")
    write_volume(data / "test" / "case_8.nii.gz", 8)
    (data / "notes.txt").touch()
    (data / "more").mkdir()
    (data / "more" / "header.tar.gz").touch()


def test_what_was_found_is_printed(data, inspect, caplog):
    write_mixture(data)
    with caplog.at_level(logging.INFO, "prostatevq"):
        lines, *_ = inspect(data)
    assert lines[:-2] == [
        f"{data}: 6 cases, 6 volumes, 21 slices (11 training, 5 validation, 5 test) in 13 files",
        "slices a case: 2 to 5, median 3",
        "slice sizes: 8x6 (19 slices), 10x6 (2, as case_004)",
        "pixel sizes and distances in mm: 0.8x0.9x3 (19 slices), 0.5x0.9x3 (2, as case_004)",
        "directions of rows and columns: RA (11 slices), LP (10, as case_007)",
        "axes of the volumes as stored: PIR (1 volume), RAS (1, as test/case_8.nii.gz)",
        "other files, not read: 2 (.txt: 1, .tar.gz: 1)",
        "networks see 8x8 pixels of 0.8x0.9 mm about the middle of each slice",
    ]
    assert lines[-2].startswith("intensities: 0 is black; the 99.5th percentile of a volume, ")
    assert any("pixel sizes differ" in line for line in caplog.messages)
    assert any("different orientations (LP, RA)" in line for line in caplog.messages)


def test_the_intensities_are_those_of_volumes(data, inspect):
    for case, brightest in ((1, 100), (2, 300), (3, 500)):
        write_cases(data, (case,), slices=case, image=np.linspace(0, brightest, 2000).reshape(40, 50))
    lines, *_ = inspect(data)
    white = [0.995 * brightest for brightest in (100, 500, 300)]
    assert "volume, {:.4g} to {:.4g}, median {:.4g}, is white".format(*white) in lines[-2]


def test_a_leak_between_splits_is_reported(data, inspect, caplog):
    write_mixture(data)
    write_volume(data / "train" / "case_9.nii.gz", 8)
    inspect(data)
    assert any("data leak between splits: train and test share 5 identical slices" in line for line in caplog.messages)


def test_the_sheet_has_the_middle_slice_of_each_case(data, inspect):
    write_mixture(data)
    _, sheet, title = inspect(data)
    splits = {"case_007": "validation", "case_008": "test"}
    expected = [f"case_{case:03}, {splits.get(f'case_{case:03}', 'training')}" for case in (1, 2, 3, 4, 7, 8)]
    assert list(sheet) == expected and title.endswith("the middle slice of 6 of 6 cases, as trained on")
    loaded = dataset.load_dataset(str(data), multiple=(4, 4))
    assert loaded.slice_size == (8, 8)
    np.testing.assert_array_equal(sheet["case_008, test"], loaded.test.batch([2])[0, 0])
    np.testing.assert_array_equal(sheet["case_002, training"], loaded.train.batch([4])[0, 0])


def test_large_folders_are_sampled(data, inspect, monkeypatch):
    write_cases(data, range(30), slices=1)
    monkeypatch.setattr(inspection, "MAX_SHOWN", 10)
    _, sheet, title = inspect(data)
    assert len(sheet) == 10 and title.endswith("the middle slice of 10 of 30 cases, as trained on")


def test_slices_without_a_case_are_shown_each(data, inspect):
    for number in range(4):
        write(data / f"image{number}.nii")
    lines, sheet, _ = inspect(data)
    assert "4 cases, 4 volumes, 4 slices" in lines[0]
    assert {name.partition(",")[0] for name in sheet} == {f"image{number}" for number in range(4)}


def test_an_axis_is_taken_as_in_training(data, inspect):
    write_mixture(data)
    lines, sheet, _ = inspect(data, "--axis", "0")
    assert "directions of rows and columns: PI (16 slices), RA (11, as case_001)" in lines
    assert "pixel sizes and distances in mm: 0.9x3x0.8 (16 slices), 0.8x0.9x3 (9, as case_001), 0.5x0.9x3" in lines[3]


def test_pixel_size_crop_intensity_and_slice_size_are_those_of_training(data, inspect, caplog):
    write_mixture(data)
    lines, sheet, _ = inspect(data, "--pixel-size", "0.4", "--crop", "body", "--intensity", "zscore")
    assert "slice sizes with pixels of 0.4 mm: 16x13 (19 slices), 12x13 (2, as case_004)" in lines
    assert "networks see 16x16 pixels of 0.4x0.4 mm about the middle of the body" in lines
    assert lines[-2].startswith("intensities: the mean of a volume's body minus 3 standard deviations, -")
    assert not any("pixel sizes differ" in line for line in caplog.messages)
    reading = Reading(pixel_size=0.4, crop="body", intensity="zscore")
    loaded = dataset.load_dataset(str(data), multiple=(8, 8), reading=reading)
    np.testing.assert_array_equal(sheet["case_008, test"], loaded.test.batch([2])[0, 0])
    lines, sheet, _ = inspect(data, "--intensity", "window", "--window", "-5", "50", "--slice-size", "8", "16")
    assert lines[-3:-1] == [
        "networks see 8x16 pixels of 0.8x0.9 mm about the middle of each slice",
        "intensities: -5 is black, 50 is white",
    ]
    assert sheet["case_008, test"].shape == (8, 16)


def test_the_command_writes_a_sheet_and_fills_the_cache_of_a_training(data, tmp_path, monkeypatch):
    write_mixture(data)
    sheet = tmp_path / "sheet.png"
    command = [sys.executable, "dataset.py", str(data), "--out", str(sheet)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0 and sheet.read_bytes().startswith(b"\x89PNG")
    assert finished.stdout.startswith(f"{data}: 6 cases") and "warning: pixel sizes differ" in finished.stderr

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "read_file", fail)
    assert len(dataset.load_dataset(str(data), multiple=(8, 8)).train) == 11


def test_mistakes_are_one_line(data, tmp_path, error_line):
    assert f"no such folder: {data}" in error_line("dataset.py", [str(data)])
    write_mixture(data)
    assert "cannot be written" in error_line("dataset.py", [str(data), "--out", "/proc/none/sheet.png"])
    assert "3 is not at least 0 and at most 2" in error_line("dataset.py", [str(data), "--axis", "3"])
    assert "--intensity window needs --window LOW HIGH" in error_line("dataset.py", [str(data), "--window", "1", "2"])
    write(data / "train" / "case_9.nii", picture(1, (8, 6, 5, 2)), AFFINE)
    assert "1 of 14 files cannot be used: train/case_9.nii: has shape" in error_line("dataset.py", [str(data)])
