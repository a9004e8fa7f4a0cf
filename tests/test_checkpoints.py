"""checkpoints.py: the run directory, its lock, log and config.json, checkpoints and weights."""

import errno
import json
import os
import pickle
import resource
import signal
import struct
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import portalocker
import pytest
import safetensors
import torch
from broken_writes import half_done, on_writes
from conftest import VQVAE_TINY
from torch import nn

import checkpoints
import config
from checkpoints import CheckpointHeader, Run, load_weights, save_tensors, save_weights
from console import RunError
from modules import VQVAE, VQVAEConfig

FILES = {"a.nii": "00000001", "b.nii": "00000002"}


@pytest.fixture
def begin(run_config):
    """Create or open a run directory, which is unlocked afterwards."""

    def make(path, **options):
        with Run(path, run_config(**options), FILES):
            pass

    return make


@pytest.fixture
def run(tmp_path, run_config):
    with Run(tmp_path / "run", run_config(), FILES) as run:
        yield run


# ---------------------------------------------------------------- run directory


def test_a_new_run_has_its_config_the_data_and_an_empty_log(tmp_path, run_config):
    made, path = run_config(slice_size=[64, 32]), tmp_path / "deep" / "run"
    with Run(path, made, FILES) as run:
        assert run.config == checkpoints.read_config(path) == made
        assert checkpoints.read_data_files(run.path) == FILES
    written = json.loads((path / "config.json").read_text())
    assert written["libraries"].keys() == set(checkpoints.LIBRARIES)
    assert written["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert written["options"].keys() == config.TrainConfig.model_fields.keys()
    assert (path / "metrics.jsonl").read_text() == ""


def test_config_json_records_command_and_git_revision(run_config, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints.sys, "argv", ["train.py", "--run", "\udcff"])
    made = run_config()
    assert made.command == ["train.py", "--run", "\udcff"]
    assert made.git_revision is None or len(made.git_revision.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert run_config().git_revision is None


def test_an_empty_folder_is_accepted_as_a_run_directory(tmp_path, begin):
    begin(tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("names", [["thesis.tex"], ["data.json"], ["lock", "thesis.tex"]])
def test_a_folder_that_is_not_a_run_is_refused(tmp_path, names, begin):
    for name in names:
        (tmp_path / name).write_text("years")
    with pytest.raises(RunError, match="not a run directory"):
        begin(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "years")


def test_a_file_is_refused(tmp_path, begin):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(RunError, match="not a run directory"):
        begin(path)
    assert path.read_text() == "content"


def test_a_path_below_a_file_is_refused(tmp_path, begin):
    (tmp_path / "file").write_text("content")
    with pytest.raises(RunError, match="file/run"):
        begin(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_a_run_killed_while_it_is_created_starts_over(tmp_path, name, begin):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: 1 / 0 if new.name == name else os.rename(old, new))
        patch.setattr(Path, "unlink", lambda path, **_: None)  # a killed process removes nothing
        with pytest.raises(ZeroDivisionError):
            begin(tmp_path)
    assert list(tmp_path.glob(f"{name}.*.part"))
    begin(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"lock", "data.json", "config.json", "metrics.jsonl"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "checkpoint.safetensors"])
def test_symlinks_in_a_run_are_refused(tmp_path, name, begin):
    """Training must not write to the target of a link in an untrusted run."""
    begin(tmp_path / "run")
    (tmp_path / "mine").write_text("years")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=f"{name} is not a plain file"):
        begin(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "years"


def test_other_options_are_refused_by_name(tmp_path, begin):
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


def test_options_that_change_no_result_may_differ(tmp_path, begin):
    begin(tmp_path)
    begin(tmp_path, run="elsewhere", images="pictures", device="cuda", data="moved", checkpoint_every=7)
    assert checkpoints.read_config(tmp_path).options.images == Path("i")


def test_a_slice_size_is_compared_by_value(tmp_path, begin):
    begin(tmp_path, slice_size=(64, 32))
    begin(tmp_path, slice_size=[64, 32])
    with pytest.raises(RunError, match="--slice-size was"):
        begin(tmp_path, slice_size=(32, 64))


def test_a_missing_config_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        checkpoints.read_config(tmp_path / "nothing")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        checkpoints.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{}", b"[]", b"[" * 10_000, b"9" * 9000])
def test_a_damaged_config_is_a_run_error(tmp_path, content, begin):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        checkpoints.read_config(tmp_path)
    with pytest.raises(RunError, match=r"config\.json cannot be used"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("format",),
            checkpoints.FORMAT + 1,
            f"of run format {checkpoints.FORMAT + 1}, of a newer version than this one",
        ),
        (("format",), 1, "of run format 1, of an older version than this one"),
        (("format",), "2", "format cannot be '2'"),
        (("colour",), "blue", "colour is unknown to this version"),
        (("options", "colour"), "blue", "options.colour is unknown to this version"),
        (("options", "seed"), True, "options.seed cannot be True"),
        (("options", "batch_size"), 10**9, "options.batch_size cannot be 1000000000"),
        (("options", "refiner_updates"), 0, "options.refiner_updates cannot be 0"),
        (("options", "refiner_updates"), 10**8, "options.refiner_updates cannot be 100000000"),
        (("options", "data"), 3, "options.data cannot be 3"),
        (("slice_size",), [10**6, 10**6], "slice_size.0 cannot be 1000000"),
        (("slice_size",), [64], "slice_size.1 is missing"),
        (("slice_size",), None, "slice_size cannot be None"),
        (("intensity", "scale"), 0, "intensity cannot have scale 0.0 and low 0.0"),
        (("intensity", "scale"), float("nan"), "intensity.scale cannot be nan"),
        (("intensity",), 7, "intensity cannot be 7"),
        (("affine",), np.eye(4).tolist()[:3], "affine.3 is missing"),
        (("affine",), np.zeros((4, 4)).tolist(), "affine is no voxel grid"),
        (("affine",), np.full((4, 4), np.inf).tolist(), "affine.0.0 cannot be inf"),
        (("positions", "quantiles"), [0.5] * 100, "positions has 100 quantiles, not 101"),
        (("positions", "quantiles"), [], "positions has 0 quantiles, not 101"),
        (("positions", "unknown"), "1", "positions.unknown cannot be '1'"),
        (("command",), "train.py", "command cannot be 'train.py'"),
        (("git_revision",), "x" * 5000, "git_revision cannot be"),
        (("libraries", "torch"), None, "libraries.torch cannot be None"),
    ],
)
def test_a_config_is_checked_field_by_field(tmp_path, place, value, message, begin):
    begin(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    *above, last = place
    part = config
    for name in above:
        part = part[name]
    part[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"config\.json cannot be used: .*{message}"):
        checkpoints.read_config(tmp_path)


def test_a_missing_config_field_is_named(tmp_path, begin):
    begin(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "affine"}))
    with pytest.raises(RunError, match="affine is missing"):
        checkpoints.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a.nii": 3}', b'{"a.nii": "' + b"7" * 5000 + b'"}'])
def test_a_damaged_data_json_is_a_run_error(run, content):
    (run.path / "data.json").write_bytes(content)
    with pytest.raises(RunError, match=r"data\.json cannot be used"):
        checkpoints.read_data_files(run.path)


def test_data_json_is_complete_for_a_hundred_thousand_files(tmp_path, run_config):
    """With names as long as HipMRI's, in deep folders."""
    deep = "keras_slices_train/" + "/".join(f"centre_{level:04}" for level in range(10))
    files = {f"{deep}/case_{n // 20:06}_week_0_slice_{n % 20}.nii.gz": f"{n:08x}" for n in range(100_000)}
    files |= {"line\nbreak.nii": "00000000", 'quote"}.nii': "00000001", os.fsdecode(b"\xff,.nii"): "00000002"}
    with Run(tmp_path, run_config(), files) as run:
        assert (run.path / "data.json").stat().st_size > 1 << 24
        assert checkpoints.read_data_files(run.path) == files
        assert json.loads((run.path / "data.json").read_bytes()) == files


def test_reading_data_json_takes_memory_in_proportion(tmp_path, monkeypatch):
    """Entries of a few bytes would take fifty times as much once they are Python objects."""
    (tmp_path / "data.json").write_bytes(b"{" + b'"a":"",' * 300_000 + b'"a":""}')
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match="one of more than 32768 bytes"):
            checkpoints.read_data_files(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(checkpoints, "MAX_DATA_LINES", 2)
    (tmp_path / "data.json").write_bytes(b'{\n"a": "1",\n"b": "2",\n"c": "3"\n}')
    with pytest.raises(RunError, match="more than 2 lines"):
        checkpoints.read_data_files(tmp_path)


def test_data_json_of_earlier_versions_is_read(run):
    (run.path / "data.json").write_text(json.dumps(FILES, indent=0))
    assert checkpoints.read_data_files(run.path) == FILES
    (run.path / "data.json").write_text(json.dumps({}, indent=0))
    assert checkpoints.read_data_files(run.path) == {}


# ---------------------------------------------------------------- lock


def in_child(task):
    """Return the result of a task, or the text of its RunError, in a process of its own."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writer, task().encode())
        except RunError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read()
    os.wait()
    return answer


def test_the_lock_refuses_a_second_process(run, begin):
    refused = f"{run.path} is in use by process {os.getpid()} on "
    assert in_child(lambda: f"got {checkpoints.lock_run(run.path)}").startswith(refused)
    with pytest.raises(RunError, match=refused):
        begin(run.path)


def test_the_lock_of_a_killed_process_is_released(tmp_path, begin):
    begin(tmp_path)
    child = os.fork()
    if child == 0:
        checkpoints.lock_run(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    begin(tmp_path)


def test_a_refused_run_is_unlocked(tmp_path, begin):
    begin(tmp_path)
    with pytest.raises(RunError, match="--seed was 0, is 1"):
        begin(tmp_path, seed=1)
    begin(tmp_path)


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, begin):
    def refuse(file, flags):
        raise portalocker.LockException(OSError(errno.ENOLCK, "No locks available"))

    monkeypatch.setattr(portalocker, "lock", refuse)
    begin(tmp_path)
    assert "cannot be locked here" in caplog.text
    assert "No locks available" in caplog.text


def test_a_lock_that_cannot_be_written_is_a_run_error(tmp_path, begin, monkeypatch):
    """A full disk: what names the owner is the first that is written. Nothing stays locked."""
    begin(tmp_path)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.platform, "node", full)
        with pytest.raises(RunError, match="lock cannot be written: No space left on device"):
            begin(tmp_path)
    begin(tmp_path)


def test_config_can_be_read_while_the_run_is_locked(run):
    assert checkpoints.read_config(run.path).options.seed == 0


# ---------------------------------------------------------------- checkpoints and the log


W = {"w": torch.arange(12.0).view(3, 4)}


def test_a_checkpoint_that_reads_back_differently_does_not_replace_the_last(tmp_path, monkeypatch):
    path, previous = tmp_path / "file", tmp_path / "previous"
    save_tensors(path, {"update": 1}, W, previous)
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: b"torn")
        with pytest.raises(RunError, match="its content differs from what was written"):
            save_tensors(path, {"update": 2}, W, previous)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": old}
    save_tensors(path, {"update": 2}, W, previous)
    assert {file.name for file in tmp_path.iterdir()} == {"file", "previous"}
    assert previous.read_bytes() == old != path.read_bytes()


def test_a_checkpoint_above_the_size_limit_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_TENSORS", 100)
    with pytest.raises(RunError, match="would have .* bytes, and 100 at most"):
        save_tensors(tmp_path / "file", {}, W)
    assert not list(tmp_path.iterdir())


def test_checkpoint_round_trip(run):
    assert run.load_checkpoint() is None
    run.save_checkpoint(W, stage="vqvae", update=7, best=0.1, validation_pending=True, losses=["loss"])
    header, tensors = run.load_checkpoint()
    assert header == CheckpointHeader(
        stage="vqvae", update=7, best=0.1, validation_pending=True, losses=["loss"], log_bytes=0
    )
    assert tensors.keys() == W.keys()
    assert torch.equal(tensors["w"], W["w"])


def test_checkpoint_files_are_deterministic(run):
    contents = []
    for _ in range(2):
        run.save_checkpoint(W | {"v": torch.ones(3)}, stage="prior", update=7)
        contents.append(run.checkpoint_path.read_bytes())
    assert contents[0] == contents[1]


def test_resuming_truncates_the_log_to_the_checkpoint(run):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    run.save_checkpoint({}, stage="vqvae", update=1)
    kept = run.log_path.read_bytes()
    run.log("vqvae", "train", 2, {"loss": 2.0})
    with open(run.log_path, "a") as file:
        file.write('{"cut sho')
    run.load_checkpoint()
    assert run.log_path.read_bytes() == kept
    run.log("vqvae", "train", 2, {"loss": 3.0})
    assert run.curves("vqvae") == {("train", "loss"): ([1, 2], [1.0, 3.0])}


def test_without_a_checkpoint_the_log_starts_empty(run):
    run.log("vqvae", "train", 1, {"loss": 1.0})
    assert run.load_checkpoint() is None
    assert run.log_path.read_bytes() == b""


def test_a_log_shorter_than_at_the_checkpoint_is_not_padded(run):
    for update in (1, 2):
        run.log("vqvae", "train", update, {"total_loss": 1.0})
    run.save_checkpoint({}, stage="vqvae")
    first = run.log_path.read_text().splitlines(keepends=True)[0]
    run.log_path.write_text(first)
    run.load_checkpoint()
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
    run.save_checkpoint({}, stage="vqvae", update=1)
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 cannot be used"):
        run.load_checkpoint()


def test_a_corrupt_checkpoint_falls_back_to_the_previous_one(run, caplog):
    """Wherever a bit is flipped."""
    for update in (1, 2):
        run.log("vqvae", "train", update, {"loss": 1.0})
        run.save_checkpoint({"w": torch.full((100,), update)}, stage="vqvae", update=update)
    content = bytearray(run.checkpoint_path.read_bytes())
    for place in range(0, len(content), 7):
        content[place] ^= 1
        run.checkpoint_path.write_bytes(content)
        content[place] ^= 1
        caplog.clear()
        header, tensors = run.load_checkpoint()
        assert header.update == 1 or content[place : place + 1] == b" "  # blanks end the header
        assert torch.equal(tensors["w"], torch.full((100,), header.update))
        assert ("checkpoint.safetensors cannot be used" in caplog.text) == (header.update == 1)
    run.checkpoint_path.unlink()  # a kill between the two renames
    assert run.load_checkpoint().header.update == 1
    assert run.log_path.read_text().count("\n") == 1


SAVING = [  # the calls that save a checkpoint, in order
    "fsync metrics.jsonl",
    "write_bytes checkpoint.safetensors",
    "fsync checkpoint.safetensors",
    "read_bytes checkpoint.safetensors",
    "replace checkpoint.previous.safetensors",
    "replace checkpoint.safetensors",
    "fsync .",
]


def test_checkpoints_are_flushed_and_read_back_before_they_are_renamed(run, monkeypatch):
    run.save_checkpoint({}, stage="vqvae", update=1)
    calls = []
    on_writes(monkeypatch, lambda point, real, given: (calls.append(point.removeprefix("start: ")), real(*given))[1])
    run.save_checkpoint({}, stage="vqvae", update=2)
    assert list(dict.fromkeys(calls)) == SAVING  # flushed before it is read back and renamed


@pytest.mark.parametrize("point", SAVING)
def test_checkpoint_rotation_keeps_the_previous_one_when_writing_fails(run, monkeypatch, point):
    run.save_checkpoint({}, stage="vqvae", update=1)

    def act(now, real, given):
        if now == f"start: {point}":
            half_done(real, given)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="cannot be written: No space left on device"):
        on_writes(patch, act)
        run.save_checkpoint({}, stage="vqvae", update=2)
    assert run.load_checkpoint().header.update == (2 if point == "fsync ." else 1)
    assert not list(run.path.glob("*.part"))


def test_a_vanished_folder_is_a_run_error(tmp_path, run_config):
    with Run(tmp_path / "run", run_config(), FILES) as run:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No such file"):
            run.log("vqvae", "train", 1, {"loss": 1.0})


def test_a_file_size_limit_is_a_run_error(run):
    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # for good, so in a process of its own
        run.save_checkpoint({"w": torch.zeros(9999)}, stage="vqvae", update=2)

    run.save_checkpoint({}, stage="vqvae", update=1)
    assert in_child(save) == f"{run.checkpoint_path} cannot be written: File too large"
    assert run.load_checkpoint().header.update == 1
    assert not list(run.path.glob("*.part"))


def test_a_stop_names_the_update_of_the_last_checkpoint(tmp_path, run_config, capsys):
    for updates, said in (((), "stopped; "), ((3, 4), "stopped after vqvae update 4; ")):
        with pytest.raises(SystemExit), Run(tmp_path, run_config(), FILES) as run:
            for update in updates:
                run.save_checkpoint({}, stage="vqvae", update=update)
            raise SystemExit(143)
        assert f"{said}the same command resumes" in capsys.readouterr().out


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


# ---------------------------------------------------------------- weights


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


@dataclass(frozen=True)
class PairConfig:
    """The config of a network of two tensors; its fields have the ranges of the options of these names."""

    grid: tuple[int, int] = (2, 3)
    prior_dropout: float = 0.5


class Pair(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.grid))
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


def with_header(header, **changes):
    """Write a file with another header or other tensors, and a correct checksum."""

    def write(path):
        tensors = {"weight": torch.zeros(2, 3), "counts": torch.arange(3)} | changes
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_tensors(path, header, tensors)

    return write


SOUND = {"grid": [2, 3], "prior_dropout": 0.5}


def with_text(text):
    return lambda path: safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, path, {"header": text})


DAMAGES = {
    a_folder: "plain file",
    a_pipe: "plain file",
    pickled: "header",
    torch_saved: "header",
    empty: "header",
    cut_short: "[Ii]ncomplete|header",
    bit_flipped: "its checksum is wrong",
    claiming_a_long_header: "its header claims more than",
    with_a_long_header: "its header claims more than",
    lambda path: safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, path): "it has no header of this project",
    with_header(
        SOUND | {"format": checkpoints.FORMAT + 1}
    ): f"it is of run format {checkpoints.FORMAT + 1}, of a newer version than this one",
    with_header(SOUND | {"format": 1}): "it is of run format 1, of an older version than this one",
    with_header(SOUND | {"format": "2"}): "its checksum is wrong",
    with_header(SOUND | {"checksum": "0"}): "its checksum is wrong",
    with_header(SOUND | {"colour": "blue"}): "colour is unknown to this version",
    with_header(SOUND | {"grid": [3, 2]}): r"its weight has shape \(2, 3\) .* does not fit",
    with_header(SOUND | {"grid": [10**9, 10**9]}): "grid.0 cannot be 1000000000",
    with_header(SOUND | {"grid": [60_000, 60_000]}): r"its weight has shape \(2, 3\)",
    with_header(SOUND | {"grid": [2, 3, 4]}): "grid cannot be",
    with_header(SOUND | {"grid": 7}): "grid cannot be 7",
    with_header(SOUND | {"grid": [2.0, 3]}): "grid.0 cannot be 2.0",
    with_header(SOUND | {"prior_dropout": "0.5"}): "prior_dropout cannot be '0.5'",
    with_header(SOUND | {"prior_dropout": None}): "prior_dropout cannot be None",
    with_header(SOUND | {"prior_dropout": True}): "prior_dropout cannot be True",
    with_header(SOUND | {"prior_dropout": 1.5}): "prior_dropout cannot be 1.5",
    with_text("[" * 9999): "recursion|nest",
    with_text("[]"): "it has no header of this project",
    with_text('{"grid": [2, 3], "prior_dropout": 0.5}'): "it is of run format 1, of an older version",
    with_header({"grid": [2, 3]}): "prior_dropout is missing",
    with_header(SOUND, counts=None): "its counts is missing",
    with_header(SOUND, more=torch.zeros(2)): "its more is unknown to this network",
    with_header(SOUND, weight=torch.zeros(2, 3, dtype=torch.float64)): "its weight has shape .* does not fit",
    with_header(SOUND, weight=torch.zeros(3, 2, dtype=torch.float16)): "its weight has shape .* does not fit",
    with_header(SOUND, counts=torch.zeros(3, dtype=torch.float16)): "its counts has shape .* does not fit",
    with_header(SOUND, weight=torch.full((2, 3), torch.inf)): "its weight is not finite",
}


@pytest.mark.parametrize(("write", "message"), DAMAGES.items())
def test_damaged_weights_are_a_run_error(tmp_path, write, message):
    write(tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=rf"w\.safetensors cannot be used: .*({message})"):
        load_weights(tmp_path / "w.safetensors", Pair, PairConfig)


def test_float16_is_read_as_float32(tmp_path):
    given = torch.randn(2, 3).half()
    with_header(SOUND, weight=given)(tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors", Pair, PairConfig).weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, given.float())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cluster_sizes", torch.ones(2**15), "its codebook.cluster_sizes has shape"),  # the product would take 4 GB
        ("embeddings", torch.ones(1, 2**15), "its codebook.embeddings has shape"),
        ("embeddings", None, "its codebook.embeddings is missing"),
    ],
)
def test_sums_are_made_of_checked_tensors_only(tmp_path, name, tensor, message):
    network = VQVAE(VQVAE_TINY)
    tensors = {name: of for name, of in network.state_dict().items() if name != checkpoints.SUMS}
    tensors.pop(f"codebook.{name}")
    tensors |= {} if tensor is None else {f"codebook.{name}": tensor}
    save_tensors(tmp_path / "w.safetensors", asdict(VQVAE_TINY), tensors)
    with pytest.raises(RunError, match=message):
        load_weights(tmp_path / "w.safetensors", VQVAE, VQVAEConfig)


def test_swapped_tensors_fail_the_checksum(tmp_path):
    """They have the same shape, so that comparing shapes finds nothing."""

    class Two(Pair):
        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Parameter(torch.randn(config.grid))

    path = tmp_path / "w.safetensors"
    save_weights(path, Two(PairConfig()))
    with safetensors.safe_open(path, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["weight"], tensors["other"] = tensors["other"], tensors["weight"]
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(RunError, match="its checksum is wrong"):
        load_weights(path, Two, PairConfig)


def test_shapes_are_compared_on_the_meta_device(tmp_path):
    """The largest network that a config may describe would take 17 GB."""
    with_header(SOUND | {"grid": [65_536, 65_536]})(tmp_path / "w.safetensors")
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
