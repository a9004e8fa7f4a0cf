"""Decoding in processes. What decoding makes of slices is tested through the public functions of dataset.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slice_files import entries, write_cases, write_splits

import decoding
from dataset import load_dataset

pytestmark = pytest.mark.usefixtures("cache")
ROOT = Path(__file__).parents[1]

# A user's script, without `if __name__ == "__main__":`. The process that decodes case 7 tells its number and waits.
SCRIPT = """
import os, signal, sys, time
import dataset, decoding
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
def decode(volume, original=decoding.decode_volume, **how):
    if any(file.case == "case_007" for file in volume.values()):
        os.write(2, f"{os.getpid()}\\n".encode())
        time.sleep(600)
    return original(volume, **how)
print("started", flush=True)
decoding.PROCESS_SLICES, decoding.decode_volume = 1, decode
print(len(dataset.load_dataset(sys.argv[1], workers=2).train))
"""


@pytest.fixture
def start(data):
    """Starts the script in a process group of its own, as a shell does; what is left of it is killed."""
    started = []

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", SCRIPT, str(data)]
        started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for script in started:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        script.communicate()  # closes the pipes


def test_processes_decode_what_threads_do(data, cache, monkeypatch):
    write_splits(data)
    expected = load_dataset(str(data))
    (entry,) = entries(cache)
    entry.rename(cache / "away")
    monkeypatch.setattr(decoding, "PROCESS_SLICES", 10)
    loaded = load_dataset(str(data), workers=2, recheck=True)
    assert loaded.files == expected.files and loaded.notices == expected.notices
    for split in ("train", "validate", "test"):
        np.testing.assert_array_equal(getattr(loaded, split).pixels, getattr(expected, split).pixels)
        np.testing.assert_array_equal(getattr(loaded, split).scales, getattr(expected, split).scales)


def test_a_script_needs_no_guard(data, start):
    write_splits(data)
    assert start().communicate() == ("started\n6\n", "")


def test_ctrl_c_ends_all_processes(data, start):
    write_splits(data)
    write_cases(data / "keras_slices_train", (7,))
    script = start()
    process = int(script.stderr.readline())
    os.killpg(script.pid, signal.SIGINT)
    _, printed = script.communicate(timeout=30)
    assert printed.count("Traceback") == 1 and printed.endswith("KeyboardInterrupt\n")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_killed_process_is_reported(data, start):
    write_splits(data)
    write_cases(data / "keras_slices_train", (7,))
    script = start()
    os.kill(int(script.stderr.readline()), signal.SIGKILL)
    _, printed = script.communicate(timeout=30)
    assert printed.endswith("DataError: a process that decoded slices was killed: is there enough memory?\n")


def test_processes_end_with_a_killed_parent(data, start):
    write_splits(data)
    write_cases(data / "keras_slices_train", (7,))
    script = start()
    script.stderr.readline()
    script.kill()
    printed, _ = script.communicate(timeout=30)  # the pipes end when all that could write to them have ended
    assert printed == "started\n" and script.returncode == -signal.SIGKILL
