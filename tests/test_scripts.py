"""scripts/: the batch files of Slurm and the installer, with stand-ins for the programs that they call."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
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


# ---------------------------------------------------------------- install.sh

CPU_BUILD = "--index-url https://download.pytorch.org/whl/cpu torch=="
without_card = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA card")


@pytest.fixture
def install(tmp_path):
    """Run install.sh where the given programs exist only; return it, and what it called.

    Each program logs its arguments, and fails if they contain a given text. `python -m venv` makes an environment.
    """

    def install(*programs, system="Linux", failing="nothing"):
        calls, folder = tmp_path / "calls", tmp_path / "bin"
        folder.mkdir()
        for name in ("grep", "cp", "mkdir"):
            (folder / name).symlink_to(shutil.which(name))
        (folder / "uname").write_text(f"#!{BASH}\necho {system}\n")
        for name in ("python", *programs):
            (folder / name).write_text(
                f'#!{BASH}\necho "${{0##*/}} $*" >> {calls}\ncase "$*" in *"{failing}"*) exit 1; esac\n'
                f'case "$*" in *venv*) mkdir -p {tmp_path}/venv/bin; cp {folder}/python {tmp_path}/venv/bin; esac\n'
            )
        for name in ("uname", "python", *programs):
            (folder / name).chmod(0o755)
        command = [BASH, SCRIPTS / "install.sh", tmp_path / "venv", "python", "requirements.txt", "more.txt"]
        environment = {"PATH": str(folder)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done, [line for line in calls.read_text().splitlines() if " -c " not in line]

    return install


@without_card
def test_uv_installs_where_it_is_there(install, tmp_path):
    done, calls = install("uv")
    assert done.returncode == 0, done.stderr
    pip = f"uv pip install --quiet --python {tmp_path}/venv/bin/python"
    venv, cpu_build, *rest = calls
    assert venv == f"uv venv --quiet --seed --python python {tmp_path}/venv"
    assert cpu_build.startswith(f"{pip} {CPU_BUILD}")
    assert rest == [f"{pip} -r requirements.txt", f"{pip} -r more.txt"]


@without_card
def test_venv_and_pip_install_elsewhere(install, tmp_path):
    done, calls = install()
    assert done.returncode == 0, done.stderr
    pip = "python -m pip install --quiet --disable-pip-version-check"
    venv, cpu_build, *rest = calls
    assert venv == f"python -m venv {tmp_path}/venv"
    assert cpu_build.startswith(f"{pip} {CPU_BUILD}")
    assert rest == [f"{pip} -r requirements.txt", f"{pip} -r more.txt"]


@pytest.mark.parametrize(("programs", "system"), [(["nvidia-smi"], "Linux"), ([], "Darwin")])
def test_with_a_card_and_on_macos_the_default_build_is_installed(install, programs, system):
    done, calls = install(*programs, system=system)
    assert done.returncode == 0, done.stderr
    assert not any("--index-url" in call for call in calls)


@without_card
def test_a_driver_without_a_card_is_no_card(install):
    _, calls = install("nvidia-smi", failing="-L")
    assert any(CPU_BUILD in call for call in calls)


@without_card
def test_without_the_host_of_cpu_builds_the_default_build_is_installed(install):
    done, calls = install(failing="--index-url")
    assert done.returncode == 0
    assert "note: no CPU build of PyTorch" in done.stderr
    assert calls[-1].endswith("-r more.txt")


@pytest.mark.parametrize(("failing", "status", "text"), [("-c", 2, "error: Python 3.10"), ("-r requirements", 1, "")])
def test_a_failed_installation_ends(install, failing, status, text):
    done, calls = install(failing=failing)
    assert done.returncode == status
    assert text in done.stderr
    assert not any("more.txt" in call for call in calls)
