"""Shared fixtures: a small phantom, a training on it that takes a second, an empty cache, a data folder."""

import runpy
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from trainings import arguments

import checkpoints
import config
import phantom
import train
import trainer
from modules import PriorConfig, VQVAEConfig
from refiner import RefinerConfig

ROOT = Path(__file__).parents[1]
VQVAE_TINY = VQVAEConfig(
    downsampling=4, channels=16, residual_blocks=1, hidden_channels=8, codebook_size=16, embedding_dim=8
)
PRIOR_TINY = PriorConfig(channels=8, dilation_cycles=1, head_channels=16)
REFINER_TINY = RefinerConfig(channels=4, levels=2)


def network_options(shape, prefix=""):
    """Return the options that give a network this shape."""
    options = {prefix + name: value for name, value in asdict(shape).items()}
    return {name: value for name, value in options.items() if name in config.TrainConfig.model_fields}


# 12, 9 and 6 updates of networks so small that a training takes a second.
TINY = {
    **config.PRESETS["demo"],
    **network_options(VQVAE_TINY),
    **network_options(PRIOR_TINY, "prior_"),
    **network_options(REFINER_TINY, "refiner_"),
    "updates": 12,
    "prior_updates": 9,
    "refiner_updates": 6,
    "augmentation": 1.0,
    "kmeans_slices": 16,
    "std_slices": 16,
}


@dataclass(frozen=True)
class Trained:
    """A finished run, its figures, and the folder of slices it was trained on."""

    run: Path
    images: Path
    data: Path


@pytest.fixture(scope="session")
def slices_folder(tmp_path_factory):
    """12 training, 4 validation and 4 test slices of 64x32, in HipMRI's layout."""
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(folder, cases=(3, 1, 1), slices=4, size=(64, 32), workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory):
    """--preset tiny: 12, 9 and 6 updates, with networks so small that a training takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.PRESETS, "tiny", TINY)
        patch.setattr(trainer, "LOG_LINES", 5)  # so that a log line is a mean over several updates
        patch.setenv("PROSTATEVQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more would slow down networks this small
        yield "tiny"
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, slices_folder, tiny_preset):
    """One complete training without patches."""
    root = tmp_path_factory.mktemp("trained")
    made = Trained(root / "run", root / "images", slices_folder)
    options = {"data": made.data, "run": made.run, "images": made.images, "preset": tiny_preset}
    options |= {"batch-size": 5, "device": "cpu"}
    train.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return made


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, slices_folder, tiny_preset):
    """One complete training on slices that are resampled, cropped about the body and scaled by z-score."""
    root = tmp_path_factory.mktemp("prepared")
    made = Trained(root / "run", root / "images", slices_folder)
    options = {"data": made.data, "run": made.run, "images": made.images, "preset": tiny_preset, "device": "cpu"}
    options |= {"batch_size": 5, "pixel_size": 8, "crop": "body", "intensity": "zscore", "slice_size": [48, 24]}
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        train.main(arguments(**options))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROSTATEVQ_CACHE", str(folder))
    return folder


@pytest.fixture
def data(tmp_path):
    """A data folder to be filled by the test."""
    return tmp_path / "data"


@pytest.fixture
def error_line(monkeypatch, capsys):
    """Run `python script ...`; return its stderr, which must be one line, with exit status 2."""

    def run(script, given):
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


def make_quick(patch):
    """Leave out figures and TensorBoard, which take most of the time of a tiny training."""
    patch.setattr(trainer, "open_tensorboard", lambda *_: None)
    for kind in (train.VQVAETrainer, train.PriorTrainer, train.RefinerTrainer):
        patch.setattr(kind, "draw_figures", lambda self: None)


@pytest.fixture
def run_config():
    """Return the content of a config.json with the given options."""

    def make(**options):
        own = {"data": "somewhere", "run": "r", "images": "i", "device": "cpu"}
        fields = {
            "format": config.FORMAT,
            "options": config.TrainConfig().model_dump(mode="json") | own | options,
            "slice_size": [64, 32],
            "intensity": {"percentile": 99.5, "scale": 700.0},
            "affine": [[0.8, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]],
            "positions": {"quantiles": [n / 100 for n in range(101)], "unknown": 0.25},
            "fingerprint": "f0",
        }
        return config.validate(config.RunConfig, fields | checkpoints.describe_code())

    return make


def options_of(data, run, preset):
    images = run.with_name("images")
    return {"data": data, "run": run, "images": images, "preset": preset, "batch_size": 5, "device": "cpu"}


@pytest.fixture
def options(tmp_path, slices_folder, tiny_preset, monkeypatch):
    """The options of `trained` with another run directory."""
    make_quick(monkeypatch)
    return options_of(slices_folder, tmp_path / "run", tiny_preset)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("Chromium or its driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
