"""scripts/: the batch files of Slurm, with stand-ins for srun and scontrol."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def submit(tmp_path):
    """Run a batch file as Slurm would; return its exit status and the commands that it called.

    `during` is what srun does before it ends with `status`.
    """

    def submit(script, *arguments, status=0, during="", **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        endings = {"srun": f"{during}\nexit {status}", "scontrol": '[ "$1" != show ] || echo node7'}
        for name, ending in endings.items():
            stand_in = tmp_path / name
            stand_in.write_text(f'#!/bin/bash\necho {name} "$@" >> "{calls}"\n{ending}\n')
            stand_in.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "12"} | variables
        done = subprocess.run([BASH, SCRIPTS / script, *arguments], env=environment, capture_output=True, check=False)
        return done.returncode, calls.read_text().splitlines()

    return submit


def test_a_training_passes_its_arguments_on(submit):
    status, calls = submit("train.sbatch", "--data", "slices", "--run", "runs/a")
    assert status == 0
    assert calls == ["srun .venv/bin/python train.py --data slices --run runs/a"]


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (2, False), (1, False)])
def test_only_a_stopped_training_is_queued_again(submit, status, requeued):
    ended, calls = submit("train.sbatch", status=status)
    assert ended == status
    assert ("scontrol requeue 12" in calls) == requeued


def test_each_sampling_job_draws_its_own_numbers(submit):
    status, calls = submit("sample.sbatch", "--run", "runs/a", SLURM_ARRAY_TASK_ID="3")
    assert status == 0
    numbers = "--first 3000 --num 1000 --images images/samples-3"
    assert calls == [f"srun .venv/bin/python predict.py --run runs/a {numbers}"]


NODES = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}


def test_torchrun_starts_a_process_for_each_gpu(submit):
    status, calls = submit("torchrun.sbatch", "--data", "my slices", "--run", "runs/a", **NODES)
    assert status == 0
    show, step = calls
    assert show == "scontrol show hostnames node[7-8]"
    assert step.startswith("srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes 2 --nproc-per-node 4 ")
    assert step.endswith("--rdzv-endpoint node7:29500 --rdzv-id 12 -- train.py --data my slices --run runs/a")


@pytest.mark.parametrize("stopped", [True, False])
def test_a_training_that_torchrun_stopped_is_queued_again(submit, stopped):
    """The shell gets the SIGTERM and passes it on; torchrun's status is 1 in either case."""
    wait = "trap 'exit 1' TERM\nsleep 0.2\nkill -TERM $PPID\nfor i in {1..100}; do sleep 0.1; done"
    status, calls = submit("torchrun.sbatch", status=1, during=wait if stopped else "", **NODES)
    assert status != 0
    assert ("scontrol requeue 12" in calls) == stopped


@pytest.mark.parametrize("script", ["train.sbatch", "sample.sbatch", "torchrun.sbatch"])
def test_outside_of_slurm_nothing_runs(script):
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([BASH, SCRIPTS / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "submit this file with sbatch" in done.stderr
