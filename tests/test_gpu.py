"""Training, sampling and evaluation on a simulated GPU: mixed devices, and waits of the host."""

import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import make_quick
from pretended_gpu import MEMORY, pretended_gpu
from trainings import UPDATES, WEIGHTS, checkpoint_header

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu as gpu_check

import anatomy
import evaluate
import metrics
import predict
import train
import trainer
import utils
from console import RunError
from dataset import load_dataset


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch) as pretended:
        yield pretended


def call(script, **options):
    script.main([text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))])


@pytest.fixture
def options(tmp_path, slices_folder, tiny_preset):
    given = {"data": slices_folder, "run": tmp_path / "run", "images": tmp_path / "images", "preset": tiny_preset}
    return given | {"batch_size": 5, "device": "cuda"}


def at_updates(patch, act):
    """Call act(stage, update) as each update begins."""
    real = trainer.seed_update

    def seed_update(seed, stage, update):
        real(seed, stage, update)
        act(stage, update)

    patch.setattr(trainer, "seed_update", seed_update)


# ---------------------------------------------------------------- the simulated GPU


def test_tensors_of_two_devices_do_not_mix(gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.is_cuda
    assert there.device == torch.device("cuda", 0)
    assert (there + 1).is_cuda
    assert not there.cpu().is_cuda
    assert (there * torch.tensor(2.0)).sum().item() == 6  # a scalar may be on the CPU
    mixtures = [
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([0])),
    ]
    for mixture in [*mixtures, lambda: torch.stack([there.sum(), here.sum()])]:
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            mixture()
    with pytest.raises(RuntimeError, match="a generator of another device"):
        there.normal_(generator=torch.Generator())


def test_waits_of_the_host_are_recorded(gpu):
    there = torch.ones(3, device="cuda")
    asked = {
        "a number": lambda: there.sum().item(),
        "a truth": lambda: bool(there.sum() > 0),
        "a copy to the host": lambda: there.cpu(),
        "a copy from the host": lambda: torch.ones(3).to("cuda"),
        "a copy of unpinned memory": lambda: torch.ones(3).to("cuda", non_blocking=True),
        "a mask": lambda: there[there > 0],
        "places": lambda: there.nonzero(),
        "counts": lambda: torch.bincount(there.long()),
    }
    for what, ask in asked.items():
        gpu.waits.clear()
        ask()
        assert gpu.waits, what
    gpu.waits.clear()
    torch.ones(3).pin_memory().to("cuda", non_blocking=True).mul_(2).add_(there).sum().sqrt()
    assert not gpu.waits


# ---------------------------------------------------------------- training, evaluation, sampling


def test_a_stopped_training_resumes_on_a_gpu(gpu, options, monkeypatch):
    """It is stopped after update 3 of each stage; the result equals that of an uninterrupted run."""
    make_quick(monkeypatch)
    stops = {(stage, 3) for stage in UPDATES}

    def stop(stage, update):
        if (stage, update) in stops:
            stops.remove((stage, update))
            signal.raise_signal(signal.SIGTERM)

    at_updates(monkeypatch, stop)
    for stage in UPDATES:
        with pytest.raises(SystemExit):
            call(train, **options)
        header = checkpoint_header(options["run"])
        assert (header.stage, header.update) == (stage, 3)
    call(train, **options)
    unbroken = options | {"run": options["run"].with_name("unbroken")}
    call(train, **unbroken)
    for name in (*WEIGHTS, "metrics.jsonl"):
        assert (options["run"] / name).read_bytes() == (unbroken["run"] / name).read_bytes()


def test_mixing_devices_in_a_checkpoint_raises(gpu, options, monkeypatch):
    """An earlier version stacked flags of weights on the GPU and of a counter on the CPU."""

    def save_checkpoint(self):
        tensors = [*self.learned_tensors().values(), torch.tensor(0)]
        assert torch.stack([tensor.isfinite().all() for tensor in tensors]).all()

    monkeypatch.setattr(trainer.Trainer, "save_checkpoint", save_checkpoint)
    with pytest.raises(RuntimeError, match="stack: expected all tensors to be on the same device"):
        call(train, **options)


@pytest.mark.parametrize("memory", [MEMORY, 0])
def test_an_update_does_not_make_the_host_wait(gpu, options, monkeypatch, memory):
    """With training slices in the GPU's memory or not. Only k-means initialisation makes the host wait, once."""
    make_quick(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory, MEMORY))
    monkeypatch.setattr(trainer, "VALIDATIONS", 1)
    monkeypatch.setattr(trainer, "LOG_LINES", 1)
    real, waits = trainer.Trainer.train_update, {}

    def train_update(self):
        gpu.waits.clear()
        real(self)
        waits[self.stage, self.update] = list(gpu.waits)

    monkeypatch.setattr(trainer.Trainer, "train_update", train_update)
    call(train, **options)
    assert len(waits) == sum(UPDATES.values())
    assert waits.pop(("vqvae", 3))  # k-means initialisation
    assert {place: lines for place, lines in waits.items() if lines} == {}


@pytest.fixture(scope="session")
def expected(trained, tmp_path_factory):
    """Evaluation and table of reconstructions on the CPU."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        return measure(patch, trained, folder, "cpu")


def few_anatomy_updates(patch):
    for name in ("JUDGE_UPDATES", "MATCHER_UPDATES"):
        patch.setattr(anatomy, name, 2)


def measure(patch, trained, folder, device):
    fewer = {"PATCHES": 256, "PAIRS": 10}
    for name, value in fewer.items():
        patch.setattr(metrics, name, value)
    few_anatomy_updates(patch)
    shutil.copytree(trained.run, folder / "run")
    given = {"run": folder / "run", "images": folder, "out": folder, "device": device}
    call(predict, **given, reconstruct=trained.data / "keras_slices_test")
    table = (folder / "reconstructions.csv").read_text()
    given = [str(text) for name, value in given.items() for text in (f"--{name}", value)]
    predict_out = given.index("--out")
    evaluate.main([*given[:predict_out], *given[predict_out + 2 :], "--num", "6"])
    return json.loads((folder / "run" / "evaluation.json").read_text()), table


def test_evaluation_and_reconstruction_on_a_gpu_equal_those_on_the_cpu(gpu, trained, expected, tmp_path, monkeypatch):
    """Random numbers differ on a real GPU; on the simulated one they are those of the CPU."""
    results, table = measure(monkeypatch, trained, tmp_path, "cuda")
    assert table == expected[1]
    assert abs(results["reconstructions"]["ssim"] - expected[0]["reconstructions"]["ssim"]) < 1e-4
    for part in ("reconstructions", "codes", "prior", "copying"):
        assert results[part] == pytest.approx(expected[0][part], rel=1e-3)


def test_sampling_waits_for_the_gpu_once_per_batch(gpu, trained, tmp_path):
    """The host launches rows ahead of the GPU and copies only the finished codes."""
    call(predict, run=trained.run, num=6, batch_size=3, out=tmp_path, images=tmp_path, device="cuda")
    waits = Counter(line.split()[-1] for line in gpu.waits)
    assert waits["sample_batch"] == waits["refine_batch"] == 2  # positions and codes to the GPU, for two batches
    assert waits["split_to_fit"] == 2 * 2  # codes and slices back
    assert not waits.keys() & {"sample", "generate", "sample_row", "begin", "forward"}


# ---------------------------------------------------------------- memory


def test_training_slices_stay_on_the_host_if_gpu_memory_is_short(gpu, slices_folder, monkeypatch):
    data, options = load_dataset(str(slices_folder)), train.parse_options(["--batch-size", "5"])
    size = data.train.pixels.nbytes
    for free, cached, resident in ((2 * size, 0, False), (2 * size + 1, 0, True), (size, size + 1, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, MEMORY))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_, cached=cached: cached + 7)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 7)
        loader = trainer.BatchLoader(data.train, 2, options, torch.device("cuda", 0))
        assert (loader.pixels is not None) == resident
        slices, positions, _ = loader(1)
        assert slices.is_cuda
        assert positions.is_cuda


def short_of_memory(real, most):
    """Wrap a `sample` method so that memory runs out beyond `most` slices."""

    def sample(network, numbers, given, *others, **named):
        sizes.append(len(numbers))
        if len(numbers) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(network, numbers, given, *others, **named)

    sizes = sample.sizes = []
    return sample


def test_sampling_halves_the_batch_size_when_memory_runs_out(trained, tmp_path, monkeypatch):
    given = {"run": trained.run, "num": 11, "images": tmp_path, "device": "cpu", "batch_size": 32}
    call(predict, **given, out=tmp_path / "all")
    for network in (predict.GatedPixelCNN, predict.Refiner):
        monkeypatch.setattr(network, "sample", short_of_memory(network.sample, 3))
    call(predict, **given, out=tmp_path / "few")
    assert predict.GatedPixelCNN.sample.sizes == predict.Refiner.sample.sizes == [32, 16, 8, 4, *[2] * 6]
    for every, few in zip(*(sorted((tmp_path / name).glob("*.nii.gz")) for name in ("all", "few"))):
        pixels, of_few = (nibabel.load(path).get_fdata() for path in (every, few))
        np.testing.assert_allclose(of_few, pixels, atol=1e-4 * pixels.max())


@pytest.mark.parametrize("network", ["GatedPixelCNN", "Refiner"])
def test_too_little_memory_for_one_slice_is_an_error(trained, tmp_path, monkeypatch, network):
    kind = getattr(predict, network)
    monkeypatch.setattr(kind, "sample", short_of_memory(kind.sample, 0))
    with pytest.raises(RunError, match="does not suffice for a single slice"):
        call(predict, run=trained.run, num=5, batch_size=32, out=tmp_path, images=tmp_path, device="cpu")
    assert kind.sample.sizes == [32, 16, 8, 4, 2, 1]


# ---------------------------------------------------------------- benchmarks/gpu.py


@pytest.mark.slow
def test_gpu_check_completes_without_failures(gpu, tiny_preset, tmp_path, monkeypatch, capsys):
    """With the networks of the tests, in this process; with those of the demo it takes minutes."""
    real = gpu_check.train_options
    fewer = {"PATCHES": 256, "PAIRS": 10}
    for name, value in fewer.items():
        monkeypatch.setattr(metrics, name, value)
    few_anatomy_updates(monkeypatch)
    monkeypatch.setattr(gpu_check, "train_options", lambda *given: [*real(*given), "--preset", tiny_preset])
    monkeypatch.setattr(gpu_check, "train_with_a_stop", lambda options, run: train.main(options))
    report = gpu_check.check(tmp_path, torch.device("cuda", 0), tiny=True)
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["SSIM of the same reconstructions"]["fits"]
    assert rows["share of equal codes, CUDA graph vs. no graph"]["gpu"] == 1
    assert [name for name, row in rows.items() if not row["fits"]] == []
    written = gpu_check.table(json.loads(json.dumps(report)))
    assert "| SSIM of the same reconstructions |" in written
    assert written.startswith("a pretended GPU, PyTorch ")


def test_gpu_check_reports_values_out_of_tolerance(tmp_path):
    rows = [gpu_check.Row("near", 1.0, 1.01, 0.1), gpu_check.Row("far", 1.0, 1.2, 0.1), gpu_check.Row("free", 1.0, 9.0)]
    assert [row.fits for row in rows] == [True, False, True]
    rows = [gpu_check.asdict(row) | {"fits": row.fits} for row in rows]
    speeds = [{"name": "recipe_seconds", "value": 20.5, "unit": "s"}]
    report = {"machine": "a card", "torch": "2", "date": "2026-11-26", "seconds": 3.2, "rows": rows, "speeds": speeds}
    assert gpu_check.table(report).splitlines()[4:7] == [
        "| near | 1 | 1.01 | 0.1 | yes |",
        "| far | 1 | 1.2 | 0.1 | NO |",
        "| free | 1 | 9 |  |  |",
    ]
    assert "| recipe seconds | 20.5 s |" in gpu_check.table(report)


# ---------------------------------------------------------------- choice of the device


def test_device_auto_picks_the_gpu_by_number(gpu):
    made_current = []
    torch.cuda.set_device = made_current.append  # the fixture puts it back
    assert utils.pick_device("auto") == utils.pick_device("cuda") == torch.device("cuda", 0)
    assert made_current == [torch.device("cuda", 0)] * 2
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_device_auto_falls_back_to_the_cpu_if_the_gpu_fails(monkeypatch, caplog):
    """PyTorch lists cards that it has no kernels for."""

    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    assert utils.pick_device("auto") == torch.device("cpu")
    assert caplog.messages == [
        "the GPU cannot be used (CUDA error: no kernel image is available for execution on the device): "
        "computing on the CPU"
    ]
    with pytest.raises(RunError, match="--device cuda: CUDA error: no kernel image"):
        utils.pick_device("cuda")


def test_device_auto_is_the_cpu_without_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.pick_device("auto") == torch.device("cpu")
    assert not caplog.messages


@pytest.mark.parametrize("script", ["train.py", "predict.py"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), MemoryError()])
def test_out_of_memory_is_one_line(error_line, monkeypatch, script, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(utils, "pick_device", fail)
    assert "out of memory, try a smaller" in error_line(script, [])
