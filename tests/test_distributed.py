"""distributed.py: trainings in several processes (gloo, on the CPU) against one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Processes
from safetensors.torch import load_file
from trainings import WEIGHTS, arguments, checkpoint_header, lines_of, select

import distributed
import phantom

TESTS = Path(__file__).parent
UPDATES = {"vqvae": 50, "prior": 50, "refiner": 50}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Starts trainings of a tiny model, without figures and in float32."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "cache").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))  # for the server's imports
        yield Processes(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 training, 8 validation and 4 test slices."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(folder, cases=(3, 2, 1), slices=4, size=(64, 32), workers=1)
    return folder


@pytest.fixture
def options(tmp_path, folder):
    """Five slices per update in all stages, for two processes two and three, for three one, two and two.

    Validations have two batches, of five and three slices: of three processes one has none.
    """
    return options_of(tmp_path, folder)


def options_of(folder, data):
    options = {"data": data, "run": folder / "run", "images": folder / "images", "preset": "tiny", "device": "cpu"}
    options |= {"batch_size": 5, "batch_divisor": 1, "checkpoint_every": 10, "updates": UPDATES["vqvae"]}
    # At the demo's rates rounding grows from update to update.
    options |= {"learning_rate": 4e-3, "prior_learning_rate": 4e-3}
    return options | {"prior_updates": UPDATES["prior"], "refiner_updates": UPDATES["refiner"]}


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory, folder):
    """The run of one process."""
    options = options_of(tmp_path_factory.mktemp("alone"), folder)
    (ended,) = processes.train(1, options)
    assert (ended.status, ended.errors) == (0, [])
    return options["run"]


def assert_close(run, other):
    """The losses of each update and validation agree within 1e-4, the weights within 1e-3."""
    here, there = lines_of(run), lines_of(other)
    assert len(here) == len(there)
    for line, expected in zip(here, there):
        assert (line.pop("stage"), line.pop("split")) == (expected.pop("stage"), expected.pop("split"))
        assert line == pytest.approx(expected, rel=1e-4)
    for name in WEIGHTS:
        weights, others = load_file(run / name), load_file(other / name)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, others[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_as_one_does(processes, options, alone, count):
    ended = processes.train(count, options)
    assert [process.status for process in ended] == [0] * count
    assert_close(options["run"], alone)
    assert len(select(lines_of(alone), "vqvae", "train")) == UPDATES["vqvae"]
    assert len(ended[0].states.splitlines()) > sum(UPDATES.values()) / 10
    for process in ended[1:]:
        assert process.states == ended[0].states  # weights, averages and moments, bit for bit
        assert (process.stdout, process.stderr) == ("", "")
    assert "is complete" in ended[0].stdout
    assert not any("gloo_runloop" in process.threads for process in ended)


@pytest.mark.slow
def test_a_stopped_training_goes_on_with_another_number_of_processes(processes, options, tmp_path):
    """SIGTERM to one process, to all of them twice, and in a validation: all stop at the same update."""
    options |= {"updates": 12, "prior_updates": 12, "refiner_updates": 6}
    unbroken = options | {"run": tmp_path / "unbroken"}
    assert [process.status for process in processes.train(1, unbroken)] == [0]
    stops = [  # each update is followed by a validation
        (2, ("update", "vqvae", 5, 1, signal.SIGTERM), ("vqvae", 5, False)),
        (3, ("update", "prior", 4, "all", signal.SIGTERM, signal.SIGTERM), ("prior", 4, False)),
        (2, ("validation", "refiner", 2, 1, signal.SIGTERM), ("refiner", 3, True)),
    ]
    for count, act, place in stops:
        ended = processes.train(count, options, act)
        assert [process.status for process in ended] == [143] * count
        assert not any("gloo_runloop" in process.threads for process in ended)
        header = checkpoint_header(options["run"])
        assert (header.stage, header.update, header.validation_pending) == place
    assert [process.status for process in processes.train(1, options)] == [0]
    assert_close(options["run"], unbroken["run"])


def test_the_death_of_a_process_ends_all_and_the_next_start_goes_on(processes, options):
    options |= {"updates": 12, "prior_updates": 12, "refiner_updates": 2}
    first, second = processes.train(2, options, ("update", "prior", 12, 1, signal.SIGKILL))
    assert (first.status, second.status) == (2, -signal.SIGKILL)
    assert "gloo_runloop" not in first.threads
    assert first.seconds < 30
    (error,) = first.errors
    assert error.startswith("error: another process has ended")
    assert checkpoint_header(options["run"]).update == 10
    first, second = processes.train(2, options)
    assert (first.status, second.status) == (0, 0)
    assert not any(line.startswith("vqvae") for line in first.stdout.splitlines())


def test_a_cold_cache_is_filled_by_one_process(processes, options):
    few = options | {"updates": 1, "prior_updates": 1, "refiner_updates": 1, "slice_size": [32, 32]}
    ended = processes.train(2, few)
    assert [process.status for process in ended] == [0, 0]
    assert [process.decoded for process in ended] == [24, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "missing"}, "missing"),
        ({"batch_size": 1}, "updates of 1 slices are too small for 2 processes"),
        ({"batch_size": 0}, "--batch-size"),
        ({"device": "cuda:1"}, "--device cuda:1: several processes take one GPU each"),
    ],
)
def test_an_error_is_reported_once(processes, options, changed, message):
    first, second = processes.train(2, options | changed)
    assert (first.status, second.status) == (2, 2)
    (error,) = first.errors
    assert error.startswith("error: ")
    assert message in error
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(tmp_path, folder):
    """A SIGTERM to torchrun itself, which passes it on. torchrun has an option --run-path: hence the `--`."""
    few = {"updates": 8, "prior_updates": 2, "refiner_updates": 2, "channels": 8, "codebook_size": 16}
    options = options_of(tmp_path, folder) | {"preset": "demo", "checkpoint_every": 1} | few
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "train.py"]
    environment = os.environ | {"PROSTATEVQ_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def start():
        given = {"env": environment, "cwd": TESTS.parent, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*launch, *arguments(**options)], **given, **pipes)

    with start() as stopped:
        while stopped.poll() is None and not (options["run"] / "checkpoint.safetensors").exists():
            time.sleep(0.1)
        stopped.terminate()
        stdout, _ = stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    assert "; the same command resumes" in stdout
    with start() as resumed:
        stdout, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    assert stdout.count("is complete") == 1
    assert checkpoint_header(options["run"]).stage == "done"


def test_other_options_are_refused_in_all_processes(processes, options, alone):
    first, second = processes.train(2, options | {"run": alone, "learning_rate": 0.5})
    assert (first.status, second.status) == (2, 2)
    assert "--learning-rate was" in first.stderr
    assert second.stderr == ""


@pytest.mark.parametrize(("count", "size"), [(8, 3), (5, 2), (3, 3), (7, 1)])
def test_parts_are_even_and_leave_nothing_out(monkeypatch, count, size):
    parts = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: size)
        parts.append(list(range(count))[distributed.part(count)])
    assert sum(parts, []) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) >= 1


def test_processes_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, 8])
    distributed.check_same("the weights", 8, "advice")
    with pytest.raises(distributed.RunError, match="the weights differ between the processes: advice"):
        distributed.check_same("the weights", 7, "advice")


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "local_rank", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.device_name("auto") == distributed.device_name("cuda") == "cuda:1"
    assert distributed.device_name("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(distributed.RunError, match="GPUs for 1 processes"):
        distributed.device_name("auto")


def test_one_process_alone_is_not_distributed(monkeypatch):
    """Neither without torchrun nor with one process of it, nor if a cluster sets such variables by itself."""
    for variables in ({}, {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4", "RANK": "3"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with distributed.processes():
                assert (distributed.rank(), distributed.size()) == (0, 1)
