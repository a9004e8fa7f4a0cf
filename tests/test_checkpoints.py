"""checkpoints.py: the run directory, its lock, log and config.json, checkpoints and weights."""

import errno
import fcntl
import json
import os
import pickle
import resource
import signal
import struct
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch import nn

import checkpoints
import config
from checkpoints import Run, load_weights, save_weights
from utils import RunError

FILES = {"a.nii": "00000001", "b.nii": "00000002"}


def config_of(**options):
    own = {"data": "somewhere", "run": "r", "images": "i", "device": "cpu"}
    options = config.TrainConfig().model_dump(mode="json") | own | options
    return {
        "format": checkpoints.FORMAT,
        "options": options,
        "slice_size": (64, 32),
        "intensity": {"percentile": 99.5, "scale": 700.0},
        "affine": np.diag([0.8, 0.8, 3.0, 1.0]).tolist(),
        "positions": {"quantiles": np.linspace(0, 1, 101).tolist(), "unknown": 0.25},
        "fingerprint": "f0",
    }


def begin(path, **options):
    """A run directory that nobody holds."""
    with Run(path, config_of(**options), FILES):
        pass


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "run", config_of(), FILES) as run:
        yield run


# ---------------------------------------------------------------- run directory


def test_a_new_run_has_its_config_the_data_and_an_empty_log(tmp_path):
    config = config_of()
    path = tmp_path / "deep" / "run"
    with Run(path, config, FILES) as run:
        assert run.config == checkpoints.read_config(path)
        assert checkpoints.read_data_files(run.path) == FILES
    written = checkpoints.read_config(path)
    assert written["libraries"].keys() == set(checkpoints.LIBRARIES)
    assert written["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {name: written[name] for name in config} == config | {"slice_size": [64, 32]}
    assert (path / "metrics.jsonl").read_text() == ""


def test_an_empty_folder_can_become_a_run(tmp_path):
    begin(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("names", [["thesis.tex"], ["data.json"], ["lock", "thesis.tex"]])
def test_a_folder_that_is_no_run_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("years")
    with pytest.raises(RunError, match="not a run directory"):
        begin(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "years")


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(RunError, match="not a run directory"):
        begin(path)
    assert path.read_text() == "content"


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(RunError, match="file/run"):
        begin(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_run_killed_while_it_is_created_starts_over(tmp_path, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: 1 / 0 if new.name == name else os.rename(old, new))
        patch.setattr(Path, "unlink", lambda path, **_: None)  # a killed process tidies nothing up
        with pytest.raises(ZeroDivisionError):
            begin(tmp_path)
    assert list(tmp_path.glob(f"{name}.*.part"))
    begin(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"lock", "data.json", "config.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "training.pt"])
def test_symlinks_in_a_run_are_refused(tmp_path, name):
    """A stranger's run must not write to what a link in it leads to."""
    begin(tmp_path / "run")
    (tmp_path / "mine").write_text("years")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=f"{name} is not a plain file"):
        begin(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "years"


def test_other_options_are_refused_by_name(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    other = {"batch_size": 8, "seed": 3, "run": "elsewhere", "images": "pictures", "device": "cuda", "data": "moved"}
    with pytest.raises(RunError) as error:
        begin(tmp_path, **other)
    message = str(error.value)
    assert "--batch-size was 32, is 8" in message
    assert "--seed was 0, is 3" in message
    assert not any(name in message for name in ("--images", "--device", "--data", "--run was"))
    assert "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_options_that_change_no_result_may_differ(tmp_path):
    begin(tmp_path)
    begin(tmp_path, run="elsewhere", images="pictures", device="cuda", data="moved", checkpoint_every=7)
    assert checkpoints.read_config(tmp_path)["options"]["images"] == "i"


def test_a_slice_size_as_tuple_or_list_is_the_same_option(tmp_path):
    begin(tmp_path, slice_size=(64, 32))
    begin(tmp_path, slice_size=(64, 32))
    with pytest.raises(RunError, match="--slice-size was"):
        begin(tmp_path, slice_size=(32, 64))


def test_a_missing_config_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        checkpoints.read_config(tmp_path / "nothing")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        checkpoints.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{}", b"[]", b"[" * 10_000, b"9" * 9000])
def test_a_damaged_config_is_a_run_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        checkpoints.read_config(tmp_path)
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), checkpoints.FORMAT + 1, "of run format 3, of a newer version than this one, which reads 2"),
        (("format",), 1, "of run format 1, of an older version than this one"),
        (("format",), "2", "format cannot be '2'"),
        (("colour",), "blue", "colour is unknown to this version"),
        (("options", "colour"), "blue", "options.colour is unknown to this version"),
        (("options", "seed"), True, "options.seed cannot be True"),
        (("options", "batch_size"), 10**9, "options.batch_size cannot be 1000000000"),
        (("options", "refiner_updates"), 0, "options.refiner_updates cannot be 0"),
        (("options", "refiner_updates"), 10**8, "options.refiner_updates cannot be 100000000"),
        (("options", "data"), 3, "options.data cannot be 3"),
        (("slice_size",), [10**6, 10**6], r"slice_size cannot be \[1000000, 1000000\]"),
        (("slice_size",), [64], "slice_size cannot be"),
        (("slice_size",), None, "slice_size cannot be None"),
        (("intensity", "scale"), 0, "intensity.scale cannot be 0"),
        (("intensity", "scale"), float("nan"), "intensity.scale cannot be nan"),
        (("intensity",), 7, "intensity is no set of named values"),
        (("affine",), np.eye(4).tolist()[:3], "affine cannot be"),
        (("affine",), np.zeros((4, 4)).tolist(), "affine cannot be"),
        (("affine",), np.full((4, 4), np.inf).tolist(), "affine cannot be"),
        (("positions", "quantiles"), [0.5] * 100, "positions.quantiles cannot be"),
        (("positions", "quantiles"), [], "positions.quantiles is empty"),
        (("positions", "unknown"), "1", "positions.unknown cannot be '1'"),
        (("libraries", "torch"), None, "libraries.torch cannot be None"),
    ],
)
def test_a_config_is_checked_field_by_field(tmp_path, place, value, message):
    begin(tmp_path)
    config = checkpoints.read_config(tmp_path)
    *above, last = place
    part = config
    for name in above:
        part = part[name]
    part[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"config\.json cannot be used: .*{message}"):
        checkpoints.read_config(tmp_path)


def test_a_missing_config_field_is_named(tmp_path):
    begin(tmp_path)
    config = checkpoints.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "affine"}))
    with pytest.raises(RunError, match="affine is missing"):
        checkpoints.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a.nii": 3}', b'{"a.nii": "' + b"7" * 5000 + b'"}'])
def test_a_damaged_data_json_is_a_run_error(run, content):
    (run.path / "data.json").write_bytes(content)
    with pytest.raises(RunError, match=r"data\.json cannot be used"):
        checkpoints.read_data_files(run.path)


def test_data_json_is_left_empty_beyond_its_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_DATA", 10)
    with Run(tmp_path, config_of(), FILES) as run:
        assert checkpoints.read_data_files(run.path) == {}


# ---------------------------------------------------------------- two at once


def in_child(task):
    """What a task says, or its RunError, in a process that ends with it."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writer, task().encode())
        except RunError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        answer = said.read()
    os.wait()
    return answer


def test_the_lock_refuses_a_second_process(run):
    refused = f"{run.path} is in use by process {os.getpid()} on "
    assert in_child(lambda: f"got {checkpoints.lock(run.path)}").startswith(refused)
    with pytest.raises(RunError, match=refused):
        begin(run.path)


def test_a_killed_process_leaves_no_lock(tmp_path):
    begin(tmp_path)
    child = os.fork()
    if child == 0:
        checkpoints.lock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    begin(tmp_path)


def test_a_refused_run_is_unlocked(tmp_path):
    begin(tmp_path)
    with pytest.raises(RunError, match="--seed was 0, is 1"):
        begin(tmp_path, seed=1)
    begin(tmp_path)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    begin(tmp_path)
    assert "cannot be locked here (No locks available)" in capsys.readouterr().out


def test_config_can_be_read_while_the_run_is_locked(run):
    assert checkpoints.read_config(run.path)["options"]["seed"] == 0


# ---------------------------------------------------------------- checkpoints and the log


def test_a_checkpoint_that_reads_back_differently_is_not_rotated_in(tmp_path, monkeypatch):
    path, before = tmp_path / "file", tmp_path / "before"
    checkpoints.write_tensors(path, b"old", before)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: b"torn")
        with pytest.raises(RunError, match="it reads other than it was written"):
            checkpoints.write_tensors(path, b"new", before)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}
    checkpoints.write_tensors(path, b"new", before)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"new", "before": b"old"}


def test_a_checkpoint_above_the_size_limit_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_TENSORS", 2)
    with pytest.raises(RunError, match="would have 3 bytes"):
        checkpoints.write_tensors(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_checkpoint_round_trip(run):
    assert run.load() == {}
    tensor = torch.randn(3, 4)
    run.save(stage="vqvae", update=7, best=float("inf"), model={"w": tensor}, losses={"loss": [0.1]})
    state = run.load()
    assert (state["stage"], state["update"], state["best"]) == ("vqvae", 7, float("inf"))
    assert torch.equal(state["model"]["w"], tensor)
    assert state["losses"] == {"loss": [0.1]}


def test_resuming_truncates_the_log_to_the_checkpoint(run):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    run.save(stage="vqvae", update=1)
    kept = run.log_path.read_bytes()
    run.log("vqvae", "train", 2, {"loss": 2.0})
    with open(run.log_path, "a") as file:
        file.write('{"cut sho')
    run.load()
    assert run.log_path.read_bytes() == kept
    run.log("vqvae", "train", 2, {"loss": 3.0})
    assert run.curves("vqvae") == {("train", "loss"): ([1, 2], [1.0, 3.0])}


def test_without_a_checkpoint_the_log_starts_empty(run):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    assert run.load() == {}
    assert run.log_path.read_bytes() == b""


def test_a_log_shorter_than_at_the_checkpoint_is_not_padded(run):
    for update in (1, 2):
        run.log("vqvae", "train", update, {"total_loss": 1.0})
    run.save(stage="vqvae")
    first = run.log_path.read_text().splitlines(keepends=True)[0]
    run.log_path.write_text(first)
    run.load()
    assert run.log_path.read_text() == first


LINE = b'{"stage": "vqvae", "split": "train", "update": 1, "loss": %s}\n'


@pytest.mark.parametrize(
    "line",
    [b"junk\n", b"[]\n", b'"line"\n', b"3\n", b"{}\n", b"[" * 9999, LINE % b"NaN", LINE % b"[1]", LINE % b'"1"']
    + [(LINE % b"1").replace(b"1,", b"-1,"), (LINE % b"1").replace(b'"vqvae"', b"7"), b"\xff\n"],
)
def test_a_malformed_log_line_is_a_run_error(run, line):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    with open(run.log_path, "ab") as file:
        file.write(line)
    run.save(stage="vqvae", update=1)
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 cannot be used"):
        run.load()


def test_a_corrupt_checkpoint_falls_back_to_the_previous_one(run, capsys):
    for update in (1, 2):
        run.log("vqvae", "train", update, {"loss": 1.0})
        run.save(stage="vqvae", update=update, model={"w": torch.full((100,), update)})
    content = bytearray(run.checkpoint_path.read_bytes())
    for place in range(0, len(content), 97):  # wherever a bit is not as it was
        content[place] ^= 1
        run.checkpoint_path.write_bytes(content)
        content[place] ^= 1
        state = run.load()
        said = capsys.readouterr().out
        assert state["update"] == 1 or torch.equal(state["model"]["w"], torch.full((100,), 2))
        assert ("training.pt cannot be used" in said) == (state["update"] == 1)
    content[content.index(struct.pack("<q", 2) * 9)] ^= 1
    run.checkpoint_path.write_bytes(content)
    assert run.load()["update"] == 1
    assert "training.pt cannot be used (its part" in capsys.readouterr().out
    assert run.log_path.read_text().count("\n") == 1
    run.checkpoint_path.unlink()  # a kill between the two renames
    assert run.load()["update"] == 1


@pytest.mark.parametrize(
    ("place", "call"), [(Path, "write_bytes"), (Path, "read_bytes"), (os, "fsync"), (os, "replace")]
)
def test_checkpoint_rotation_keeps_the_previous_one_when_writing_fails(run, monkeypatch, place, call):
    """A full disk at each call that saving makes, from the first to the last."""
    run.save(stage="vqvae", update=1)
    real = getattr(place, call)
    for fails in range(1, 9):
        left = [fails]

        def full(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(place, call, full)
            try:
                run.save(stage="vqvae", update=2)
            except RunError as error:
                assert str(error).endswith("cannot be written: No space left on device")
        if left[0] > 0:
            break  # there is no further such call
        assert run.load()["update"] in (1, 2)
        assert not list(run.path.glob("*.part"))
    assert fails > 1
    assert run.load()["update"] == 2


def test_a_vanished_folder_is_a_run_error(tmp_path):
    with Run(tmp_path / "run", config_of(), FILES) as run:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No such file"):
            run.log("vqvae", "train", 1, {"loss": 1.0})


def test_a_file_size_limit_is_a_run_error(run):
    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # for good, so in a process of its own
        run.save(stage="vqvae", update=2, model={"w": torch.zeros(9999)})

    run.save(stage="vqvae", update=1)
    assert in_child(save) == f"{run.checkpoint_path} cannot be written: File too large"
    assert run.load()["update"] == 1
    assert not list(run.path.glob("*.part"))


def test_a_stop_saves_the_updates_since_the_last_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit), Run(tmp_path, config_of(), FILES) as run:
        run.save(stage="vqvae", update=3)
        run.log("vqvae", "train", 4, {"loss": 1.0})
        run.unsaved = {"stage": "vqvae", "update": 4, "log_bytes": run.log_bytes()}
        run.log("vqvae", "validate", 5, {"loss": 1.0})
        raise SystemExit(143)
    assert "stopped after vqvae update 4; the same command goes on from there" in capsys.readouterr().out
    with Run(tmp_path, config_of(), FILES) as run:
        assert run.load()["update"] == 4
        assert run.log_path.read_text().count("\n") == 1


def test_an_error_writes_no_checkpoint(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path, config_of(), FILES) as run:
        run.unsaved = {"stage": "vqvae", "update": 4}
        raise ZeroDivisionError
    assert not (tmp_path / "training.pt").exists()


def test_log_lines_and_curves(run):
    run.log("vqvae", "train", 1, {"total_loss": 1 / 3})
    run.log("vqvae", "validate", 1, {"total_loss": 2.0, "ssim": 0.5})
    run.log("prior", "train", 1, {"total_loss": 9.0})
    run.log("vqvae", "train", 2, {"total_loss": 123456789.0})
    lines = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    assert lines[1] == {"stage": "vqvae", "split": "validate", "update": 1, "total_loss": 2.0, "ssim": 0.5}
    curves = run.curves("vqvae")
    assert curves.keys() == {("train", "total_loss"), ("validate", "total_loss"), ("validate", "ssim")}
    updates, values = curves["train", "total_loss"]
    assert updates == [1, 2]
    assert values == pytest.approx([1 / 3, 123456789.0], rel=1e-5)
    assert run.curves("prior") == {("train", "total_loss"): ([1], [9.0])}
    assert run.curves("other") == {}


# ---------------------------------------------------------------- a stranger's checkpoint


class Evil:
    """What runs code where a pickle of it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def zipped(path, pickle, compression=zipfile.ZIP_STORED, **parts):
    """A checkpoint file of that pickle and of storages."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/version", "3\n")
        for name, content in parts.items():
            file.writestr(f"archive/data/{name}", content)


def plain(path, canary):
    path.write_bytes(pickle.dumps(Evil(canary), 2))


def in_a_checkpoint(path, canary):
    torch.save({"stage": "vqvae", "log_bytes": 0, "update": Evil(canary)}, path)


def in_the_old_format(path, canary):
    torch.save({"stage": "vqvae", "update": Evil(canary)}, path, _use_new_zipfile_serialization=False)


def allocating(path, canary):
    """Allowed by weights_only, and takes 100 GB."""
    zipped(path, b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x17\x00\x85R.")


def doubling(path, canary):
    """A list is named again and again, and each time copied."""
    pairs = b"]q\x00(" + b"K\x01K\x02\x86" * 5000 + b"e"
    zipped(path, b"\x80\x02" + pairs + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 5000 + b".")


def compressed(path, canary):
    zipped(path, b"\x80\x02N.", zipfile.ZIP_DEFLATED, **{"0": bytes(200 << 20)})


def overlapping(path, canary):
    """Many entries of the directory that are all of the same bytes."""
    zipped(path, b"\x80\x02N.", **{"0": bytes(100_000)})
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entries = content[start:end] * 300
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 900, 900, len(entries), start, 0)
    path.write_bytes(content[:start] + entries + tail)


def of_another_kind(path, canary):
    torch.save([1, 2], path)


def of_no_stage(path, canary):
    torch.save({"stage": "evaluation", "log_bytes": 0}, path)


def negative(path, canary):
    torch.save({"stage": "vqvae", "log_bytes": -1}, path)


def a_folder(path, canary=None):
    path.mkdir()


def a_pipe(path, canary=None):
    os.mkfifo(path)


def junk(path, canary):
    path.write_bytes(b"junk")


HOSTILE = [plain, in_a_checkpoint, in_the_old_format, allocating, doubling, compressed, overlapping]
HOSTILE += [of_another_kind, of_no_stage, negative, a_folder, a_pipe, junk]


@pytest.mark.parametrize("write", HOSTILE)
def test_a_hostile_checkpoint_is_a_run_error(run, tmp_path, write):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    write(run.checkpoint_path, tmp_path / "canary")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"training\.pt cannot be used"):
        run.load()
    assert time.monotonic() - start < 5
    assert not (tmp_path / "canary").exists()
    assert run.log_bytes() > 0


def test_the_hostile_pickle_runs_code_without_weights_only(tmp_path):
    """The control of the test above: with it the canary is created."""
    in_a_checkpoint(tmp_path / "x.pt", tmp_path / "canary")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_a_storage_that_claims_more_than_it_holds_is_refused(run):
    """Else a tensor would show the memory behind its storage."""
    run.save(stage="vqvae", model={"w": torch.zeros(4)})
    with zipfile.ZipFile(run.checkpoint_path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    assert parts[name].count(b"K\x04") == 2
    parts[name] = parts[name].replace(b"K\x04", b"J\x00\x00\x00\x40")
    with zipfile.ZipFile(run.checkpoint_path, "w") as file:
        for part, content in parts.items():
            file.writestr(part, content)
    with pytest.raises(RunError, match=r"training\.pt cannot be used"):
        run.load()


LIVE = {"model": {"w": torch.zeros(2, 3)}, "optimiser": {0: {"step": torch.zeros(())}}}


def changed(**entries):
    return {"model": {"w": torch.ones(2, 3)}, "optimiser": {0: {"step": torch.ones(())}}} | entries


def test_restore_copies_in_place_and_keeps_the_memory_format():
    live = {"model": {"w": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)}}
    tensor = live["model"]["w"]
    values = torch.randn(2, 3, 4, 5)
    checkpoints.restore(live, {"model": {"w": values}})
    assert live["model"]["w"] is tensor
    assert torch.equal(tensor, values)
    assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (7, "its entries are not those"),
        ({}, "its entries are not those"),
        (changed(more={}), "its entries are not those"),
        (changed(model={"v": torch.ones(2, 3)}), "its model entries are not those"),
        (changed(model=torch.ones(2, 3)), "its model entries are not those"),
        (changed(model={"w": [[1.0] * 3] * 2}), "its model w does not fit"),
        (changed(model={"w": torch.ones(3, 2)}), "its model w does not fit"),
        (changed(model={"w": torch.ones(2, 3, dtype=torch.float64)}), "its model w does not fit"),
        (changed(model={"w": torch.full((2, 3), torch.nan)}), "its model w is not finite"),
        (changed(optimiser={0: {"step": torch.ones(1)}}), "its optimiser 0 step does not fit"),
        (changed(optimiser={1: {"step": torch.ones(())}}), "its optimiser entries are not those"),
        (changed(optimiser=OrderedDict({"0": {"step": torch.ones(())}})), "its optimiser entries are not those"),
    ],
)
def test_restore_names_a_mismatch_and_copies_nothing(saved, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(LIVE, saved)
    assert not any(tensor.any() for tensor in checkpoints.tensors_in(LIVE))


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class PairConfig:
    size: tuple[int, int] = (2, 3)
    scale: float = 0.5


class Pair(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.size))
        self.register_buffer("counts", torch.arange(3))


def test_weights_and_config_round_trip(tmp_path):
    made = Pair(PairConfig((4, 5), 0.25))
    save_weights(tmp_path / "w.safetensors", made)
    loaded = load_weights(tmp_path / "w.safetensors", Pair, PairConfig)
    assert loaded.config == made.config
    assert not loaded.training
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_channels_last_weights_round_trip(tmp_path):
    class Image(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.weight = nn.Parameter(torch.randn(2, 3, 4, 5))

    made = Image(PairConfig()).to(memory_format=torch.channels_last)
    save_weights(tmp_path / "w.safetensors", made)
    assert torch.equal(load_weights(tmp_path / "w.safetensors", Image, PairConfig).weight, made.weight)


def pickled(path):
    path.write_bytes(pickle.dumps({"weight": [0.0] * 6}))


def torch_saved(path):
    torch.save({"weight": torch.zeros(2, 3)}, path)


def empty(path):
    path.write_bytes(b"")


def cut_short(path):
    save_weights(path, Pair(PairConfig()))
    path.write_bytes(path.read_bytes()[:-1])


def bit_flipped(path):
    save_weights(path, Pair(PairConfig()))
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def claiming_a_long_header(path):
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def with_a_long_header(path):
    header = b"{" + b" " * (checkpoints.MAX_HEADER + 1) + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def with_tensors(path, config='{"format": 2, "size": [2, 3], "scale": 0.5}', **changes):
    """A file with other tensors or another config, otherwise sound."""
    tensors = {"weight": torch.zeros(2, 3), "counts": torch.arange(3)} | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(tensors, path, {"config": config})


def with_config(**fields):
    def write(path):
        with_tensors(path, json.dumps({"format": 2, "size": [2, 3], "scale": 0.5} | fields))

    write.__name__ = f"with_{'_'.join(fields)}"
    return write


DAMAGES = {
    a_folder: "plain file",
    a_pipe: "plain file",
    pickled: "header",
    torch_saved: "header",
    empty: "header",
    cut_short: "[Ii]ncomplete|header",
    bit_flipped: "its checksum is another",
    claiming_a_long_header: "its header claims more than",
    with_a_long_header: "its header claims more than",
    lambda path: safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, path): "it holds no config",
    with_config(format=3): "it is of run format 3, of a newer version than this one",
    with_config(format=1): "it is of run format 1, of an older version than this one",
    with_config(format="2"): "format cannot be '2'",
    with_config(checksum="0"): "its checksum is another",
    with_config(colour="blue"): "colour is unknown to this version",
    with_config(size=[3, 2]): r"its weight has shape \[2, 3\], and its config asks for \[3, 2\]",
    with_config(size=[10**9, 10**9]): "size cannot be",
    with_config(size=[60_000, 60_000]): r"its weight has shape \[2, 3\]",
    with_config(size=[2, 3, 4]): "size cannot be",
    with_config(size=7): "size cannot be 7",
    with_config(size=[2.0, 3]): "size cannot be",
    with_config(scale="0.5"): "scale cannot be '0.5'",
    with_config(scale=None): "scale cannot be None",
    with_config(scale=True): "scale cannot be True",
    lambda path: with_tensors(path, "[" * 9999): "recursion|nest",
    lambda path: with_tensors(path, "[]"): "no set of named values",
    lambda path: with_tensors(path, '{"size": [2, 3], "scale": 0.5}'): "it is of run format 1, of an older version",
    lambda path: with_tensors(path, '{"format": 2, "size": [2, 3]}'): "scale is missing",
    lambda path: with_tensors(path, counts=None): r"its counts has shape None, and its config asks for \[3\]",
    lambda path: with_tensors(path, more=torch.zeros(2)): r"its more has shape \[2\], and its config asks for None",
    lambda path: with_tensors(path, weight=torch.zeros(2, 3, dtype=torch.float64)): "its weight does not fit",
    lambda path: with_tensors(path, weight=torch.full((2, 3), torch.inf)): "its weight is not finite",
}


@pytest.mark.parametrize(("write", "message"), DAMAGES.items())
def test_damaged_weights_are_a_run_error(tmp_path, write, message):
    write(tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=rf"w\.safetensors cannot be used: .*({message})"):
        load_weights(tmp_path / "w.safetensors", Pair, PairConfig)


def test_swapped_tensors_fail_the_checksum(tmp_path):
    """They have the same shape, so that comparing shapes finds nothing."""

    class Two(Pair):
        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Parameter(torch.randn(config.size))

    path = tmp_path / "w.safetensors"
    save_weights(path, Two(PairConfig()))
    with safetensors.safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["weight"], tensors["other"] = tensors["other"], tensors["weight"]
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(RunError, match="its checksum is another"):
        load_weights(path, Two, PairConfig)


def test_shapes_are_compared_on_the_meta_device(tmp_path):
    """The largest that a config may ask for would take 17 GB."""
    with_config(size=[65_536, 65_536])(tmp_path / "w.safetensors")
    made = []

    def network(config):
        made.append(Pair(config))
        return made[-1]

    with pytest.raises(RunError, match="its weight has shape"):
        load_weights(tmp_path / "w.safetensors", network, PairConfig)
    assert [pair.weight.device.type for pair in made] == ["meta"]


def test_missing_weights_are_a_run_error(tmp_path):
    with pytest.raises(RunError, match=r"w\.safetensors does not exist"):
        load_weights(tmp_path / "w.safetensors", Pair, PairConfig)
