"""Long randomised robustness tests, run by hand; pytest runs short forms of them. Linux only.

    python tests/campaign.py                                   # all campaigns
    python tests/campaign.py files --count 20000 --seed 0      # one of them

Prints one JSON line of totals per campaign, describes failures on stderr, and exits with status 1 if there was one.
"""

import argparse
import errno
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's files are not installed

from broken_writes import half_done, on_writes
from conftest import TINY, make_quick
from mutated_files import load_case, make_case, valid_files
from tampering import judge_run, pick, resume, tamper
from trainings import WEIGHTS, at_updates

import config
import phantom
import predict
import train
import trainer
from checkpoints import CheckpointHeader, load_tensors
from console import RunError
from dataset import DataError
from utils import writing

# ---------------------------------------------------------------- files: mutated NIfTI files

HANG_SECONDS = 2
GIVE_UP_SECONDS = 30  # without an answer; then the worker is killed
MOST_MEGABYTES = 200  # above the idle worker


def memory(name: str) -> float:
    """Return megabytes of this process: VmRSS for the present memory, VmHWM for its peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def load_cases(pipe: Connection, folder: Path) -> None:
    """Load the paths that come through a pipe; answer each with its outcome and the peak memory."""
    warnings.simplefilter("error")
    os.environ["PROSTATEVQ_CACHE"] = str(folder / "cache")
    path = folder / "valid.nii"
    path.write_bytes(valid_files()[0])
    load_case(path)  # so that memory that every load needs counts as idle
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    # Unbounded growth has to fail here, before it takes the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (int(memory("VmSize") + 4096) << 20, resource.RLIM_INFINITY))
    with suppress(EOFError):  # the campaign is over
        while True:
            outcome, details = judge_case(pipe.recv())
            pipe.send((outcome, details, memory("VmHWM") - idle))


def judge_case(path: Path) -> tuple[str, str]:
    """Return the outcome of loading a path, "loaded", "refused", "crashed" or "hung", and details of the last two."""
    start = time.perf_counter()
    try:
        outcome, details = "loaded" if load_case(path) else "refused", ""
    except BaseException:
        outcome, details = "crashed", traceback.format_exc()
    seconds = time.perf_counter() - start
    return ("hung", f"took {seconds:.1f} s") if seconds > HANG_SECONDS else (outcome, details)


class Worker:
    """A process that loads files, so that the campaign survives its crashes and hangs."""

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=load_cases, args=(end, folder), daemon=True)
        self.process.start()
        end.close()

    def stop(self) -> None:
        self.pipe.close()  # the worker then ends
        self.process.join()

    def load(self, path: Path) -> tuple[str, str, float]:
        """Return the result of `judge_case`, or how the worker ended, and its peak memory so far in MB."""
        self.pipe.send(path)
        if not self.pipe.poll(GIVE_UP_SECONDS):
            self.process.kill()
            self.process.join()
            return "hung", f"no answer in {GIVE_UP_SECONDS} s", 0
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "crashed", f"the process ended with {self.process.exitcode}", 0


def files(count: int | None, seed: int) -> dict:
    """Load mutated NIfTI files (20,000): each loads or is refused by DataError, within seconds and 200 MB.

    File number n is made from seed + n alone: `--count 1 --seed N` with the printed number repeats it.
    """
    count = count or 20_000
    totals = dict.fromkeys(("tried", "loaded", "refused", "crashed", "hung", "peak_megabytes"), 0)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="files", unit="file") as bar:
        folder, worker = Path(temporary), None
        for number in range(seed, seed + count):
            if not (worker and worker.process.is_alive()):
                worker = Worker(folder)
            case = folder / "case"
            outcome, details, megabytes = worker.load(make_case(number, case))
            totals["tried"] += 1
            totals[outcome] += 1
            totals["peak_megabytes"] = max(totals["peak_megabytes"], round(megabytes))
            if details:
                bar.write(f"file {number} {outcome}: {details}", file=sys.stderr)
            rmtree(case)
            rmtree(folder / "cache", ignore_errors=True)
            bar.update()
        worker.stop()
    totals["failed"] = totals["crashed"] + totals["hung"] + (totals["peak_megabytes"] > MOST_MEGABYTES)
    return totals


# ---------------------------------------------------------------- runs: killed, without disk space, tampered with

IN_STAGES = ("in_vqvae", "in_prior", "in_refiner")
STOP_SECONDS = 5
LOAD_SECONDS = 5
MOST_LOAD_MEGABYTES = 300  # above the process that loads
GROWTH_MEGABYTES = 5


class Trainings:
    """Trainings of a second each, in processes forked off this one, which need no time for imports."""

    def __init__(self, folder: Path):
        self.folder = folder
        tqdm.monitor_interval = 0  # its thread could hold a lock during a fork, which would then never be released
        os.environ["PROSTATEVQ_CACHE"] = str(folder / "cache")
        torch.set_num_threads(1)
        config.PRESETS["tiny"] = TINY
        trainer.LOG_LINES, trainer.VALIDATIONS = 5, 4
        # Figures take most of the time of a tiny training.
        make_quick(pytest.MonkeyPatch())
        predict.samples_figure = lambda *_: None
        logging.disable(logging.WARNING)  # so that only errors are on stderr
        phantom.write_phantom(folder / "data", cases=(3, 1, 1), slices=4, size=(32, 16), workers=1)
        self.reference = folder / "reference"
        with redirect_stdout(io.StringIO()):
            train.main(self.arguments(self.reference))  # in this process, so that forked ones find all modules loaded
        started = time.monotonic()
        problem = self.compare_resumed(folder / "again")
        assert not problem, problem
        self.seconds = time.monotonic() - started

    def arguments(self, run: Path, **options) -> list[str]:
        given = {"preset": "tiny", "data": self.folder / "data", "run": run, "images": self.folder / "images"}
        given |= {"device": "cpu", "batch_size": 5, "checkpoint_every": 4} | options
        return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def start(self, run: Path, prepare: Callable[[], None] = lambda: None, **options) -> int:
        """Start a training in a process of its own, after `prepare`; return its process id."""
        return fork(lambda: (prepare(), train.main(self.arguments(run, **options))), self.folder / "stderr")

    def finish(self, process: int) -> tuple[int, str]:
        """Wait for a training; return its exit status, negative for the signal that killed it, and its stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, (self.folder / "stderr").read_text()

    def points(self) -> list[str]:
        """Return the points at which a training writes."""
        passed = self.folder / "points"

        def record() -> None:
            act_on_writes(lambda point, real, given: (passed.open("a").write(f"{point}\n"), real(*given))[1])

        status, stderr = self.finish(self.start(self.folder / "recorded", record))
        assert status == 0, stderr
        return list(dict.fromkeys(passed.read_text().splitlines()))

    def compare_resumed(self, run: Path) -> str:
        """Resume a training; return how it differs from the uninterrupted one, or ""."""
        status, stderr = self.finish(self.start(run))
        if status or stderr:
            return f"resuming ended with {status}: {stderr}"
        for name in (*WEIGHTS, "metrics.jsonl"):
            if (run / name).read_bytes() != (self.reference / name).read_bytes():
                return f"{name} differs"
        return "a file is left over" if list(run.glob("*.part")) else ""


def fork(task: Callable[[], object], stderr: Path) -> int:
    """Run a task in a process of its own, as from the command line, with its stderr in a file; return its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        tqdm._instances.clear()  # progress bars of the parent process
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        task()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except (DataError, RunError, OSError) as error:
        os.write(2, f"error: {error}\n".encode(errors="replace"))
        status = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(status)


def act_on_writes(act: Callable[[str, Callable, tuple], object]) -> None:
    """Apply `on_writes` until the process ends."""
    on_writes(pytest.MonkeyPatch(), act)


def kill_at(point: str, moment: str) -> Callable[[], None]:
    """Kill the process before, after, or in the middle of the call at a point."""

    def act(now: str, real: Callable, given: tuple) -> object:
        if now == point and moment == "middle":
            half_done(real, given)
        done = real(*given) if now != point or moment == "after" else None
        if now == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return lambda: act_on_writes(act)


def spread_over(points: list[str], number: int) -> str:
    """Return the point of a case: any number of cases is spread about evenly over all points."""
    return points[int(number * (5**0.5 - 1) / 2 % 1 * len(points))]


def kills(count: int | None, seed: int) -> dict:
    """Kill trainings (200) by SIGKILL at a random moment or a write; resumed, each equals an uninterrupted one."""
    count = count or 200
    totals = dict.fromkeys(("kills", "at_a_write", "points", *IN_STAGES, "identical", "failed"), 0)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="kills", unit="kill") as bar:
        trainings = Trainings(Path(temporary))
        points = trainings.points()
        totals["points"] = len(points)
        for number in range(seed, seed + count):
            rng, run, status = np.random.default_rng((seed, number)), Path(temporary, f"run{number}"), 0
            while status != -signal.SIGKILL:  # until it was killed before it was complete
                rmtree(run, ignore_errors=True)
                if number % 2:
                    moment = pick(rng, ("before", "middle", "after"))
                    process = trainings.start(run, kill_at(spread_over(points, number // 2), moment))
                else:
                    process = trainings.start(run, checkpoint_every=int(rng.integers(1, 6)))
                    time.sleep(rng.random() * trainings.seconds)
                    os.kill(process, signal.SIGKILL)
                status, stderr = trainings.finish(process)
                assert status in (0, -signal.SIGKILL), stderr
            stage = stage_of(run)
            problem = trainings.compare_resumed(run)
            if problem:
                bar.write(f"kill {number} in {stage}: {problem}", file=sys.stderr)
            totals["kills"] += 1
            totals["at_a_write"] += number % 2
            totals[f"in_{stage}"] += 1
            totals["identical"] += not problem
            totals["failed"] += bool(problem)
            rmtree(run)
            bar.update()
    return totals


def stage_of(run: Path) -> str:
    """Return the last stage in the log of a run."""
    log = run / "metrics.jsonl"
    logged = log.read_text() if log.exists() else ""
    return next((stage for stage in ("refiner", "prior") if f'"{stage}"' in logged), "vqvae")


def stops(count: int | None, seed: int) -> dict:
    """Stop trainings (100) by SIGTERM or SIGINT at a random moment; check exit status and seconds, and resume them."""
    count = count or 100
    totals = dict.fromkeys(("stops", *IN_STAGES, "longest_seconds", "identical", "failed"), 0)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="stops", unit="stop") as bar:
        trainings = Trainings(Path(temporary))
        for number in range(seed, seed + count):
            rng, run = np.random.default_rng((seed, number)), Path(temporary, f"run{number}")
            kind, status = pick(rng, (signal.SIGTERM, signal.SIGINT)), 0
            while status == 0:  # until it was stopped before it was complete
                rmtree(run, ignore_errors=True)
                process = trainings.start(run, checkpoint_every=1000)
                while not (run / "config.json").exists():
                    time.sleep(0.001)
                time.sleep(rng.random() * trainings.seconds)
                os.kill(process, kind)
                sent = time.monotonic()
                status, stderr = trainings.finish(process)
            seconds, stage = time.monotonic() - sent, stage_of(run)
            problem = (
                f"it ended with {status}: {stderr}"
                if status != 128 + kind or stderr
                else trainings.compare_resumed(run)
            )
            if problem or seconds > STOP_SECONDS:
                bar.write(f"stop {number} in {stage} after {seconds:.1f} s: {problem}", file=sys.stderr)
            totals["stops"] += 1
            totals[f"in_{stage}"] += 1
            totals["longest_seconds"] = max(totals["longest_seconds"], round(seconds, 2))
            totals["identical"] += not problem
            totals["failed"] += bool(problem) or seconds > STOP_SECONDS
            rmtree(run)
            bar.update()
    return totals


def fill_at(point: str, moment: str) -> Callable[[], None]:
    """Simulate a full disk from a point on: nothing more is written, or at first one half."""
    reached = []

    def act(now: str, real: Callable, given: tuple) -> object:
        first = now == point and not reached
        reached.extend([point] * first)
        # Reading still works, and after the first failure so do calls that make no file larger.
        if not reached or real.__name__ == "read_bytes" or (not first and real.__name__ in ("truncate", "replace")):
            return real(*given)
        if moment == "middle":
            half_done(real, given)
        with writing(given[0].log_path) if real.__name__ == "log" else nullcontext():  # as the real call does
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: act_on_writes(act)


def limit_to(size: int) -> Callable[[], None]:
    """Limit the size of all files, in bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk(count: int | None, seed: int) -> dict:
    """Run trainings (200) with a disk that is full at a write, a file-size limit, or a disk of 64 MB filled by others.

    Each must report it in one line and keep a checkpoint from which the resumed run equals an uninterrupted one.
    """
    count = count or 200
    totals = dict.fromkeys(("tried", "at_a_write", "file_size", "small_disk", "kept", "identical", "failed"), 0)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="disk", unit="run") as bar:
        trainings = Trainings(Path(temporary))
        points = trainings.points()
        largest_file = max(file.stat().st_size for file in trainings.reference.iterdir())
        with small_disk(Path(temporary, "disk")) as mounted:
            kinds = ("at_a_write", "file_size", "at_a_write", "small_disk" if mounted else "at_a_write")
            for number in range(seed, seed + count):
                rng, kind = np.random.default_rng((seed, number)), kinds[number % 4]
                run, ballast = Path(temporary, f"run{number}"), Path(temporary, "disk", "ballast")
                if kind == "at_a_write":
                    prepare = fill_at(spread_over(points, number // 2), pick(rng, ("before", "middle")))
                elif kind == "file_size":
                    prepare = limit_to(int(rng.integers(largest_file)))
                else:
                    run, prepare = ballast.with_name("run"), lambda: None
                    fill(ballast, int(rng.integers(2 * largest_file)))  # there are up to three checkpoints at a time
                status, stderr = trainings.finish(trainings.start(run, prepare))
                ballast.unlink(missing_ok=True)
                problem = f"it ended with {status}: {stderr}" if not is_write_error(status, stderr) else ""
                if not problem and (run / "checkpoint.safetensors").exists():
                    load_tensors(run / "checkpoint.safetensors", CheckpointHeader)
                    totals["kept"] += 1
                problem = problem or trainings.compare_resumed(run)
                if problem:
                    bar.write(f"disk {number}, {kind}: {problem}", file=sys.stderr)
                totals["tried"] += 1
                totals[kind] += 1
                totals["identical"] += not problem
                totals["failed"] += bool(problem)
                rmtree(run, ignore_errors=True)
                bar.update()
    return totals


def is_write_error(status: int, stderr: str) -> bool:
    """Return whether a command ended with the error of a failed write, on one line."""
    return status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and "cannot be written" in stderr


@contextmanager
def small_disk(folder: Path):
    """Mount 64 MB of memory at a folder; yield whether that was possible, which requires root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "campaign", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path, left: int) -> None:
    """Fill a disk, leaving `left` bytes free."""
    free = os.statvfs(ballast.parent).f_bavail * os.statvfs(ballast.parent).f_frsize
    ballast.write_bytes(bytes(max(free - left, 0)))


READ_BY_PREDICT = ("config.json", *WEIGHTS)


def measure(task: Callable[[], tuple[str, str]], seconds: int = GIVE_UP_SECONDS) -> tuple[str, str, float, float]:
    """Run a task in a process of its own; return its result, its seconds and its peak memory in MB."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            signal.alarm(seconds)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
            resource.setrlimit(resource.RLIMIT_AS, (int(memory("VmSize") + 4096) << 20, resource.RLIM_INFINITY))
            idle, start = memory("VmRSS"), time.perf_counter()
            outcome = task()
            answer = [*outcome, time.perf_counter() - start, memory("VmHWM") - idle]
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return tuple(json.loads(answer)) if answer else ("crashed", f"the process ended with {status}", 0, 0)


def killed_run(trainings: Trainings, stage: str, update: int) -> Path:
    """Return a run that was killed in an update."""
    run = trainings.folder / stage
    kill = {(stage, update): lambda: os.kill(os.getpid(), signal.SIGKILL)}
    trainings.finish(trainings.start(run, lambda: at_updates(pytest.MonkeyPatch(), kill), checkpoint_every=1))
    return run


def runs(count: int | None, seed: int) -> dict:
    """Give run directories (2,000) that were tampered with to train.py and predict.py.

    Each is refused by name, or loads if the change is harmless, within seconds and 300 MB, and never executes code. Run
    number n is made from seed + n alone: `--count 1 --seed N` with the printed number repeats it.
    """
    count = count or 2000
    totals = dict.fromkeys(("tried", "loads", "loaded", "refused", "crashed", "code_run", "evil", "peak_megabytes"), 0)
    totals["longest_seconds"] = 0.0
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=count, desc="runs", unit="run") as bar:
        trainings = Trainings(Path(temporary))
        places = (("vqvae", 7), ("prior", 6), ("refiner", 4))
        bases = [*(killed_run(trainings, *place) for place in places), trainings.reference]
        run, canary, out = (Path(temporary, name) for name in ("tampered", "canary", "out"))
        (canary.with_name("outside")).write_text("not the run's")
        given = trainings.arguments(run)
        sampling = ["--run", run, "--num", "1", "--out", out, "--images", out, "--device", "cpu"]
        for number in range(seed, seed + count):
            rng = np.random.default_rng((seed, number))
            base = pick(rng, bases)
            shutil.copytree(base, run)
            name, evil = tamper(rng, run, canary)
            loads = {"train.py": lambda: resume(given)}
            if (base / "refiner.safetensors").exists():
                loads["predict.py"] = lambda: predict.main([*map(str, sampling)])
            totals["tried"] += 1
            totals["evil"] += evil
            for script, load in loads.items():
                outcome, details, seconds, megabytes = measure(lambda load=load: judge_run(load, run))
                read = name in READ_BY_PREDICT or script == "train.py"
                if outcome == "loaded" and evil and read and (script, name) not in unread(base):
                    outcome, details = "crashed", "it was loaded"
                if outcome == "crashed" or seconds > LOAD_SECONDS or megabytes > MOST_LOAD_MEGABYTES:
                    heading = f"run {number}, {name} of {base.name}, {script}"
                    bar.write(f"{heading}: {outcome}, {seconds:.1f} s, {megabytes:.0f} MB: {details}", file=sys.stderr)
                totals["loads"] += 1
                totals[outcome] += 1
                totals["code_run"] += canary.exists()
                totals["peak_megabytes"] = max(totals["peak_megabytes"], round(megabytes))
                totals["longest_seconds"] = max(totals["longest_seconds"], round(seconds, 2))
                assert canary.with_name("outside").read_text() == "not the run's"
            rmtree(run)
            rmtree(canary, ignore_errors=True)
            bar.update()
    totals["failed"] = totals["crashed"] + totals["code_run"]
    totals["failed"] += totals["peak_megabytes"] > MOST_LOAD_MEGABYTES or totals["longest_seconds"] > LOAD_SECONDS
    return totals


def unread(base: Path) -> set[tuple[str, str]]:
    """Return the files that a command does not read in an unfinished run."""
    read = ["vqvae.safetensors"] if base.name in ("prior", "refiner") else []
    return {("train.py", name) for name in WEIGHTS if name not in read}


def memory_of(task: Callable[[Callable[[], None]], object]) -> list[float]:
    """Run a task in a process of its own; return the megabytes in use at each call of the function it is given."""

    def run() -> tuple[str, str]:
        seen = []
        task(lambda: seen.append(memory("VmRSS")))
        return json.dumps(seen), ""

    return json.loads(measure(run, seconds=3600)[0])


def memory_growth(count: int | None, seed: int) -> dict:
    """Check that memory stays constant after the first third of 3,000 updates and of 50 batches of samples."""
    updates, batches = max(count or 3000, 1500), 50  # fewer would show no growth
    each = updates // len(WEIGHTS)
    with tempfile.TemporaryDirectory() as temporary:
        trainings = Trainings(Path(temporary))
        trainer.LOG_LINES = 250
        real = trainer.seed_update

        def training(step: Callable[[], None]) -> None:
            trainer.seed_update = lambda *place: (real(*place), step())
            lengths = {"updates": each, "prior_updates": each, "refiner_updates": each}
            train.main(trainings.arguments(trainings.folder / "long", **lengths, seed=seed))

        def sampling(step: Callable[[], None]) -> None:
            draw = predict.draw_positions
            predict.draw_positions = lambda *given: (step(), draw(*given))[1]
            out = str(trainings.folder / "out")
            given = ["--run", str(trainings.reference), "--out", out, "--images", out, "--device", "cpu"]
            predict.main([*given, "--batch-size", "4", "--num", str(4 * batches)])

        seen = memory_of(training)
        parts = {
            "megabytes_vqvae": seen[:each],
            "megabytes_prior": seen[each : 2 * each],
            "megabytes_refiner": seen[2 * each :],
            "megabytes_sampling": memory_of(sampling),
        }
    ends = {name: [round(part[len(part) // 3], 1), round(part[-1], 1)] for name, part in parts.items()}
    grown = sum(end - begin > GROWTH_MEGABYTES for begin, end in ends.values())
    return {"updates": updates, "batches": batches, **ends, "failed": grown}


# ---------------------------------------------------------------- command line

# Each takes a count (None: its default) and a seed, and returns totals; `failed` is the number of failures.
CAMPAIGNS = {"files": files, "kills": kills, "stops": stops, "runs": runs, "disk": disk, "memory": memory_growth}


def main() -> int:
    """Run the named campaigns, or all; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"{', '.join(CAMPAIGNS)} (default: all)")
    parser.add_argument("--count", type=int, metavar="N", help="cases per campaign (default: as in docs/robustness.md)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first case, increased by 1 for each further one (default: 0)"
    )
    options = parser.parse_args()
    if unknown := set(options.campaigns) - set(CAMPAIGNS):
        parser.error(f"no campaign is called {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and what it starts, ignore it
    failed = 0
    for name in options.campaigns or CAMPAIGNS:
        totals = CAMPAIGNS[name](options.count, options.seed)
        failed += totals["failed"]
        print(json.dumps({"campaign": name, **totals}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
