"""utils.py: devices, seeds and atomic file writes."""

import errno
import os
from pathlib import Path

import pytest
import torch

import utils
from console import RunError
from utils import seed_update

# ---------------------------------------------------------------- devices and seeds


def test_pick_device():
    assert utils.pick_device("cpu") == torch.device("cpu")
    assert utils.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "", "meta", "hpu"])
def test_unusable_devices_are_refused(name):
    with pytest.raises(RunError) as error:
        utils.pick_device(name)
    assert str(error.value).startswith(f"--device {name}")
    assert "\n" not in str(error.value)


def test_seed_update_gives_each_stage_and_update_its_own_random_numbers():
    def drawn(*key):
        seed_update(*key)
        return tuple(torch.rand(4).tolist())

    stages = ("vqvae", "prior", "refiner", "refiner validation")
    keys = [(seed, stage, update) for seed in (0, 1, 2**32 - 1) for stage in stages for update in range(5)]
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


# ---------------------------------------------------------------- files


def test_write_file_keeps_the_old_content_if_writing_fails(tmp_path):
    path = tmp_path / "file"
    utils.write_file(path, lambda part: part.write_text("old"))

    def fail_half_way(part):
        part.write_text("ne")
        assert path.read_text() == "old"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="file cannot be written: No space left on device"):
        utils.write_file(path, fail_half_way)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]
    utils.write_file(path, lambda part: part.write_text("new"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "new")]


def test_write_file_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def replace(old, new):
        done.append((old.name, new.name))
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    utils.write_file(tmp_path / "file", lambda part: part.write_text("new"))
    part = Path(done[0])
    assert part.match(f"{tmp_path}/file.*.part")
    assert done[1:] == [(part.name, "file"), str(tmp_path)]


def test_check_folder_leaves_nothing_behind(tmp_path):
    utils.check_folder("--out", tmp_path)
    utils.check_folder("--out", tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/1/new"])
def test_check_folder_names_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=f"--out .*{place} cannot be written: "):
        utils.check_folder("--out", tmp_path / place)


def test_write_file_uses_a_unique_temporary_file(tmp_path):
    """Two runs that share a folder of figures: neither overwrites the other's temporary file."""
    path = tmp_path / "loss.png"

    def write(part):
        utils.write_file(path, lambda other: other.write_text("other"))
        part.write_text("mine")

    utils.write_file(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("loss.png", "mine")]
