"""cache.py: entries, their locks, and listings."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from slice_files import entries, forbid_decoding, message, picture, write, write_cases, write_splits

import decoding
import files
from cache import Listing, PixelWriter, cache_folder, index_checksum, new_cache_entry, read_listing, write_listing
from dataset import DataError, load_dataset
from files import Reading

pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------- entries


def forged_index(path, **fields):
    """Rewrite an index with other fields and a correct checksum."""
    body = json.dumps(json.loads(path.read_bytes().partition(b"\n")[2]) | fields).encode()
    path.write_bytes(index_checksum(path.parent.name, body) + b"\n" + body)


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
def test_a_damaged_cache_entry_is_replaced(data, cache, damage):
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


def test_a_cache_entry_of_other_data_is_not_used(data, cache, tmp_path):
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


def test_an_interrupt_stops_decoding_at_once(data, cache, monkeypatch):
    calls = []

    def interrupt(path):
        calls.append(path)
        time.sleep(0.01)
        raise KeyboardInterrupt

    write_cases(data, range(50), slices=1)
    monkeypatch.setattr(decoding, "read_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(str(data), workers=1)
    assert len(calls) < 40


def count_decoded(monkeypatch):
    """Count the files that are decoded, in a list."""
    read, original = [], decoding.read_file
    monkeypatch.setattr(decoding, "read_file", lambda file: (read.append(file.name), original(file))[1])
    return read


def test_a_stopped_first_pass_is_continued(data, cache, monkeypatch):
    write_cases(data, range(30), slices=1)
    expected = load_dataset(str(data))
    shutil.rmtree(cache)
    read, original = count_decoded(monkeypatch), decoding.read_file

    def stop(file):
        if len(read) == 12:
            raise KeyboardInterrupt
        return original(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding, "read_file", stop)
        load_dataset(str(data), workers=1)
    (partial,) = entries(cache)
    assert partial.name.startswith(".partial-") and len(read) == 12
    assert_same(load_dataset(str(data)), expected)
    assert sorted(read) == sorted(expected.files)  # each once
    (entry,) = entries(cache)
    assert {path.name for path in entry.iterdir()} == {"index.json", "pixels.uint8"}


KILLED = """
import os, signal, sys, time
import cache, dataset, decoding
cache.JOURNAL_SECONDS = 0
read, original = [], decoding.read_file
def kill(file):
    read.append(file)
    if len(read) == 13:
        (journal,) = cache.cache_folder().glob(".partial-*/journal")
        while journal.read_bytes().count(b"\\n") < 12:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(file)
decoding.read_file = kill
dataset.load_dataset(sys.argv[1], workers=1)
"""


def cut_journal(partial):
    path = partial / "journal"
    path.write_bytes(path.read_bytes()[:-20])


def alter_journal(partial):
    path = partial / "journal"
    path.write_bytes(path.read_bytes().replace(b"[[0,", b"[[1,", 1))


def cut_pixels(partial):
    os.truncate(partial / "new" / "pixels.uint8", 5 * 48)


DAMAGED_PARTS = {
    "nothing": (lambda partial: None, 12),
    "journal cut": (cut_journal, 11),
    "journal of text": (lambda partial: (partial / "journal").write_text("decoded\n"), 0),
    "journal missing": (lambda partial: (partial / "journal").unlink(), 0),
    "journal altered": (alter_journal, 0),
    "pixels cut": (cut_pixels, 5),
    "pixels missing": (lambda partial: (partial / "new" / "pixels.uint8").unlink(), 0),
    "old entry left": (lambda partial: (partial / "old" / "x").mkdir(parents=True), 12),
}


def test_a_killed_first_pass_is_continued(data, cache, monkeypatch):
    write_cases(data, range(30), slices=1)
    expected = load_dataset(str(data))
    read = count_decoded(monkeypatch)
    shutil.rmtree(cache)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(data)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9
    (partial,) = entries(cache)
    for damage, spared in DAMAGED_PARTS.values():
        kept = cache.with_name("kept")
        shutil.copytree(cache, kept)
        damage(partial)
        read.clear()
        with PixelWriter(partial / "new", 48) as writer:  # as another process that is stopped at once
            assert len(writer.recorded) == spared
        assert_same(load_dataset(str(data)), expected)
        assert 30 - len(read) == spared
        shutil.rmtree(cache)
        kept.rename(cache)


def test_a_pass_over_other_data_removes_what_a_stopped_one_left(data, cache, monkeypatch, tmp_path):
    write_splits(data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cache.PixelWriter.flush", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        load_dataset(str(data))
    assert [path.name[:9] for path in entries(cache)] == [".partial-"]
    write_splits(tmp_path / "other")
    load_dataset(str(tmp_path / "other"))
    assert [path.name[:9] for path in entries(cache)] != [".partial-"] and len(entries(cache)) == 1


def test_a_cache_folder_that_cannot_be_created_is_named(data, tmp_path, monkeypatch):
    write_splits(data)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(tmp_path / "file" / "cache"))
    text = message(load_dataset, str(data))
    assert text.startswith(f"the cache folder {tmp_path / 'file' / 'cache'} cannot be written (Not a directory): ")
    assert "$PROSTATEVQ_CACHE" in text
    assert message(load_dataset, "phantom", (64, 32)).startswith(text)


@pytest.mark.parametrize("step", ["fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_no_partial_entry(data, cache, monkeypatch, step):
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


def test_a_file_size_limit_is_reported_on_one_line(data, cache, tmp_path):
    """30 slices of 32x32 pixels exceed the 20,000 bytes that a file may have."""
    for case in range(30):
        write(data / f"case_{case:03}_week_0_slice_0.nii", picture(case, (32, 32)))
    run = tmp_path / "run"
    code = f"import sys; sys.argv = ['train.py', '--data', {str(data)!r}, '--run', {str(run)!r}]; {LIMITED}"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    line = f"error: the cache folder {cache} cannot be written (File too large): free some space there, or set"
    assert finished.stderr == f"{line} $PROSTATEVQ_CACHE to another folder\n"
    assert entries(cache) == [] and not run.exists()


STALLED = """
import sys, time
import dataset
import decoding
import decoding
import files
def stall(file):
    print(file=sys.stderr, flush=True)
    time.sleep(600)
decoding.read_file = stall
dataset.load_dataset(sys.argv[1])
"""


def test_only_partial_entries_of_dead_processes_are_removed(data, cache):
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


def test_a_finished_first_pass_keeps_the_entries_of_running_ones(cache):
    """The second pass starts while the first is running, and the third after the first has finished."""
    with ExitStack() as first, ExitStack() as others:
        first.enter_context(new_cache_entry(cache / "first"))
        second = others.enter_context(new_cache_entry(cache / "second"))
        first.close()
        with new_cache_entry(cache / "third"):
            assert second.is_dir()
    assert {path.name for path in entries(cache)} == {"first", "second", "third"}


def test_partial_entries_stay_where_locks_are_unsupported(data, cache, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    write_splits(data)
    (cache / ".partial-another").mkdir(parents=True)
    monkeypatch.setattr("cache.fcntl.flock", unsupported)
    load_dataset(str(data))
    assert len(entries(cache)) == 2


def test_concurrent_first_passes_agree(data, cache):
    write_splits(data)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_dataset(str(data)), range(8)))
    assert len({one.fingerprint for one in loaded}) == 1
    for one in loaded[1:]:
        np.testing.assert_array_equal(one.train.pixels, loaded[0].train.pixels)
    assert len(entries(cache)) == 1


def test_a_faster_process_keeps_its_cache_entry(cache):
    with new_cache_entry(cache / "entry") as new:
        (new / "ours").touch()
        (cache / "entry").mkdir()
        (cache / "entry" / "theirs").touch()
    assert [path.name for path in (cache / "entry").iterdir()] == ["theirs"]


def test_an_entry_that_vanishes_after_a_failed_rename_is_not_an_error(cache, monkeypatch):
    """A second process puts its entry in place before the rename, and a third moves it away afterwards."""

    def rename(new, entry):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(new), None, str(entry))

    monkeypatch.setattr("cache.Path.rename", rename)
    with new_cache_entry(cache / "entry") as new:
        (new / "ours").touch()
    assert entries(cache) == []


def test_a_file_in_place_of_a_cache_entry_is_an_error(cache):
    cache.mkdir(exist_ok=True)
    (cache / "entry").touch()
    with pytest.raises(DataError, match="cannot be written"), new_cache_entry(cache / "entry") as new:
        (new / "ours").touch()


def test_the_cache_folder_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PROSTATEVQ_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "prostatevq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "prostatevq"


# ---------------------------------------------------------------- listings


@pytest.fixture
def settled(data):
    """Return a function that dates all folders of the data back, as if they had been made an hour ago."""

    def settle():
        hour_ago = time.time() - 3600
        for folder in (data, *(path for path in data.rglob("*") if path.is_dir())):
            os.utime(folder, (hour_ago, hour_ago))

    write_splits(data)
    (data / "empty").mkdir()
    settle()
    return settle


@pytest.fixture
def calls(data, monkeypatch):
    """Count what a start does: folders listed, files and folders of the data looked at, headers and slices read."""
    counted = Counter()

    def count(place, name, key):
        original = getattr(place, name)

        def call(*arguments, **options):
            if key != "stats" or str(arguments[0]).startswith(str(data)):  # Python itself looks at its own files
                counted[key] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    count(os, "scandir", "folders")
    count(os, "stat", "stats")
    count(files, "read_grid", "headers")
    count(decoding, "read_file", "slices")
    return counted


def assert_same(one, two):
    for split in ("train", "validate", "test"):
        own, other = getattr(one, split), getattr(two, split)
        np.testing.assert_array_equal(own.pixels, other.pixels)
        np.testing.assert_array_equal(own.positions, other.positions)
        np.testing.assert_array_equal(own.scales, other.scales)
        np.testing.assert_array_equal(own.lows, other.lows)
        assert (own.names, own.cases) == (other.names, other.cases)
    assert (one.files, one.fingerprint, one.notices) == (two.files, two.fingerprint, two.notices)
    assert (one.slice_size, one.scale, one.low) == (two.slice_size, two.scale, two.low)
    np.testing.assert_array_equal(one.affine, two.affine)


def test_a_reopened_folder_is_neither_listed_nor_read(data, settled, calls):
    first = load_dataset(str(data))
    assert calls["folders"] > 4 and calls["headers"] == calls["slices"] == 10
    calls.clear()
    assert_same(load_dataset(str(data)), first)
    assert calls == {"stats": 5 + 10}  # folders and files, each once
    calls.clear()
    assert load_dataset(str(data), slice_size=first.slice_size).fingerprint == first.fingerprint
    assert "folders" not in calls
    assert_same(load_dataset(str(data), recheck=True), first)
    assert calls["headers"] == 10 and "slices" not in calls


def test_a_reopened_folder_may_be_named_differently(data, settled, calls, monkeypatch):
    first = load_dataset(str(data))
    calls.clear()
    monkeypatch.chdir(data.parent)
    assert_same(load_dataset(data.name), first)
    monkeypatch.chdir(data)
    assert_same(load_dataset("."), first)
    assert "folders" not in calls


def test_names_and_cases_of_any_kind_are_kept(data, settled):
    train = data / "keras_slices_train"
    write(train / "no_case.nii")
    write(train / "case_7_line\nbreak.nii")
    write(train / os.fsdecode(b"case_8_\xff.nii"))
    settled()
    first = load_dataset(str(data))
    assert None in first.train.cases and np.isnan(first.train.positions).any()
    assert_same(load_dataset(str(data)), first)


CHANGES = {
    "added": lambda train: write(train / "case_007_week_0_slice_0.nii"),
    "added to an empty folder": lambda train: write(train.parent / "empty" / "case_007_week_0_slice_0.nii"),
    "removed": lambda train: (train / "case_004_week_0_slice_0.nii").unlink(),
    "renamed": lambda train: (train / "case_004_week_0_slice_0.nii").rename(train / "case_009_week_0_slice_0.nii"),
    "altered in place": lambda train: write(train / "case_004_week_0_slice_0.nii", picture(5)),
    "of another time": lambda train: os.utime(train / "case_004_week_0_slice_0.nii", ns=(0, 1)),
    "folder renamed": lambda train: train.rename(train.with_name("train")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_listed_again(data, settled, calls, change):
    load_dataset(str(data))
    change(data / "keras_slices_train")
    calls.clear()
    again = load_dataset(str(data))
    assert calls["headers"] >= 9
    settled()
    assert_same(load_dataset(str(data), recheck=True), again)


def test_a_folder_behind_a_link_is_watched(data, settled, calls, tmp_path):
    (data / "keras_slices_train").rename(tmp_path / "elsewhere")
    (data / "keras_slices_train").symlink_to(tmp_path / "elsewhere")
    settled()
    load_dataset(str(data))
    calls.clear()
    write(tmp_path / "elsewhere" / "case_007_week_0_slice_0.nii")
    assert len(load_dataset(str(data)).train) == 7


def test_a_folder_that_has_just_been_modified_is_listed_again(data, settled, calls):
    """A file that is added within the same tick of the clock would not change the folder's time."""
    (data / "keras_slices_train").touch()
    load_dataset(str(data))
    calls.clear()
    load_dataset(str(data))
    assert calls["headers"] == 10
    settled()
    load_dataset(str(data))
    calls.clear()
    load_dataset(str(data))
    assert "headers" not in calls


def test_of_many_files_some_are_checked(data, settled, calls, monkeypatch):
    monkeypatch.setattr("cache.CHECKED_FILES", 4)
    first = load_dataset(str(data))
    calls.clear()
    again = load_dataset(str(data))
    assert calls == {"stats": 5 + 4}
    assert again.notices[0] == "4 of 10 files, and all folders, were checked for changes: --recheck checks all"
    assert again.notices[1:] == first.notices
    unchecked = data / "keras_slices_train" / "case_004_week_0_slice_1.nii"
    write(unchecked, picture(9))
    assert load_dataset(str(data)).fingerprint == first.fingerprint  # its pixels are still those of before
    assert load_dataset(str(data), recheck=True).fingerprint != first.fingerprint
    checked = data / "keras_slices_train" / "case_004_week_0_slice_0.nii"
    write(checked, picture(9))
    assert load_dataset(str(data)).fingerprint != first.fingerprint


def test_an_altered_table_is_read_again(data, settled, calls):
    table = data.parent / "slices.csv"
    names = [path.relative_to(data.parent).as_posix() for path in sorted(data.rglob("*.nii"))]
    table.write_text("path,case\n" + "".join(f"{name},{number}\n" for number, name in enumerate(names)))
    first = load_dataset("phantom", reading=Reading(table=table))
    calls.clear()
    assert_same(load_dataset("phantom", reading=Reading(table=table)), first)
    assert "headers" not in calls
    table.write_text(table.read_text().replace(",9\n", ",10\n"))
    assert load_dataset("phantom", reading=Reading(table=table)).fingerprint != first.fingerprint


def test_each_way_of_reading_has_its_own_listing(data, settled):
    readings = [
        Reading(pattern=r"(?P<case>case_\d+)"),
        Reading(pixel_size=1.0),
        Reading(crop="body"),
        Reading(intensity="zscore"),
        Reading(intensity="window", window=(0, 50)),
        Reading(intensity="window", window=(0, 60)),
    ]
    ways = [{}, {"seed": 1}, {"multiple": (2, 2)}, *({"reading": reading} for reading in readings)]
    loaded = [load_dataset(str(data), **way) for way in ways]
    for way, first in zip(ways, loaded):
        assert_same(load_dataset(str(data), **way), first)
    assert len(list(cache_folder().glob("listing-*"))) == len(ways)
    assert len(entries(cache_folder())) == len(ways) - 1  # the splits of folders do not depend on the seed


def forged_listing(path, **fields):
    """Rewrite a listing with other fields and a correct checksum."""
    checksum, _, body = path.read_bytes().partition(b"\n")
    assert checksum
    forged = json.dumps(json.loads(body) | fields).encode()
    path.write_bytes(index_checksum(KEYS[-1], forged) + b"\n" + forged)


KEYS = []
DAMAGED_LISTINGS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "empty": lambda path: path.write_bytes(b""),
    "a pipe": replace_by_pipe,
    "a device": replace_by_device,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another key": lambda path: path.write_bytes(path.read_bytes().replace(b"case_004", b"case_005")),
    "of unknown fields": lambda path: forged_listing(path, more=1),
    "of unknown cases": lambda path: forged_listing(path, case_of=[99]),
    "of fewer names": lambda path: forged_listing(path, names=["a.nii"]),
    "of text": lambda path: forged_listing(path, positions="high"),
    "of folders without times": lambda path: forged_listing(path, folders={"/": "today"}),
    "of files without sizes": lambda path: forged_listing(path, checked=[["/a.nii"]]),
    "of no folders": lambda path: forged_listing(path, folders=None),
    "of another entry": lambda path: forged_listing(path, entry="../elsewhere"),
    "of an entry that is no text": lambda path: forged_listing(path, entry=None),
}


@pytest.mark.parametrize("damage", DAMAGED_LISTINGS.values(), ids=DAMAGED_LISTINGS)
def test_a_damaged_listing_is_not_used(data, settled, calls, monkeypatch, damage):
    monkeypatch.setattr("dataset.write_listing", lambda key, *_: (KEYS.append(key), write_listing(key, *_)))
    first = load_dataset(str(data))
    (path,) = cache_folder().glob("listing-*")
    damage(path)
    calls.clear()
    assert_same(load_dataset(str(data)), first)
    assert calls["headers"] == 10 and "slices" not in calls


def test_a_listing_that_cannot_be_written_is_done_without(data, settled, monkeypatch):
    first = load_dataset(str(data))
    (path,) = cache_folder().glob("listing-*")
    path.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cache.write_index", full)
    assert_same(load_dataset(str(data)), first)
    assert not [*cache_folder().glob("listing-*"), *cache_folder().glob(".partial-*")]


def test_a_listing_takes_bounded_memory():
    """Of a million slices with names as long as HipMRI's, less than 500 MB while it is read, and 200 MB afterwards."""
    count = 20_000
    names = [f"keras_slices_train/case_{n // 20:06}_week_0_slice_{n % 20}.nii.gz" for n in range(count)]
    cases = [f"case_{n // 20:06}" for n in range(count)]
    positions = np.linspace(0, 1, count, dtype=np.float32)
    listing = Listing(
        names, cases, positions, [count, 0, 0], [], "f0", "e0", {"/": os.stat("/").st_mtime_ns}, count, []
    )
    cache_folder().mkdir()
    write_listing("key", listing, time.time() + 10)
    tracemalloc.start()
    try:
        again = read_listing("key")
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert again is not None and again.names == names and again.cases == cases
    assert peak < 500 * count and now < 200 * count
