"""The run directory, figures, options, device and seed."""

import argparse
import json
import os
import pickle
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from torch import nn

import utils
from utils import Clock, Parser, Run, RunError, StopSignals, load_weights, number, save_weights, seed_update


def config_of(fingerprint="f0", **options):
    options = {"data": "somewhere", "run": "r", "images": "i", "device": "cpu", "batch_size": 32, "seed": 0} | options
    return {"options": options, "slice_size": (64, 32), "fingerprint": fingerprint}


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (number(int, 1), ["1", "32", "1000000"], ["0", "-3"]),
        (number(int, 0, 9), ["0", "9"], ["10", "-1"]),
        (number(float, 0, above=True), ["0.1", "7"], ["0", "-1", "nan"]),
        (number(float, 0, 1, above=True), ["1", "1e-9"], ["0", "1.001", "nan", "inf"]),
    ],
)
def test_number_keeps_its_range(parse, good, bad):
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not"):
            parse(text)
    with pytest.raises(ValueError):
        parse("many")


def test_numbers_are_of_their_kind():
    assert isinstance(number(int, 0)("3"), int)
    assert isinstance(number(float, 0)("3"), float)
    with pytest.raises(ValueError):
        number(int, 0)("2.5")


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (number(int, 1), "0", "0 is not at least 1"),
        (number(int, 0, 9), "10", "10 is not at least 0 and at most 9"),
        (number(float, 0, 1, above=True), "2", "2 is not above 0 and at most 1"),
    ],
)
def test_number_says_what_is_allowed(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--count", "0"], "argument --count: 0 is not at least 1"),
        (["--count", "x"], "invalid int value: 'x'"),
        (["--what", "x"], "unrecognized arguments: --what x"),
        (["--count"], "expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, arguments, part):
    parser = Parser()
    parser.add_argument("--count", type=number(int, 1))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert part in error
    assert error.count("\n") == 1


def test_pick_device():
    assert utils.pick_device("cpu") == torch.device("cpu")
    assert utils.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "", "meta", "hpu"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(RunError) as error:
        utils.pick_device(name)
    assert str(error.value).startswith(f"--device {name}")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- seeds, signals, clock


def test_an_update_has_its_own_seed():
    def drawn(*key):
        seed_update(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(seed, stage, update) for seed in (0, 1, 2**32 - 1) for stage in ("vqvae", "prior") for update in range(5)]
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(first)) == len(keys)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_noted_and_the_handlers_come_back(kind):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        assert signal.getsignal(kind) not in before
        os.kill(os.getpid(), kind)
        assert signals.received == kind
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_come_back_without_a_signal_and_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.time.monotonic", lambda: now[0])
    clock = Clock(60)
    answers = []
    for now[0] in (100, 159, 160, 161, 219, 225, 284, 285):
        answers.append(clock.due())
    assert answers == [False, False, True, False, False, True, False, True]


# ---------------------------------------------------------------- run directory


def test_write_file_keeps_the_old_content_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    utils.write_file(path, lambda part: part.write_text("old"))

    def fail_half_way(part):
        part.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_file(path, fail_half_way)
    assert path.read_text() == "old"
    utils.write_file(path, lambda part: part.write_text("new"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "new")]


def test_a_new_run_has_its_config_and_an_empty_log(tmp_path):
    config = config_of()
    Run(tmp_path / "deep" / "run", config)
    written = utils.read_config(tmp_path / "deep" / "run")
    assert written["libraries"].keys() == set(utils.LIBRARIES)
    assert written["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert {name: written[name] for name in config} == config | {"slice_size": [64, 32]}
    assert (tmp_path / "deep" / "run" / "metrics.jsonl").read_text() == ""


def test_an_empty_folder_can_become_a_run(tmp_path):
    Run(tmp_path, config_of())
    assert (tmp_path / "config.json").exists()


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="not a run directory"):
        Run(tmp_path, config_of())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    with pytest.raises(RunError, match="not a run directory"):
        Run(path, config_of())
    assert path.read_text() == "content"


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(RunError, match="file/run"):
        Run(tmp_path / "file" / "run", config_of())


def test_other_options_are_refused_by_name(tmp_path):
    Run(tmp_path, config_of())
    before = (tmp_path / "config.json").read_bytes()
    other = config_of(batch_size=8, seed=3, run="elsewhere", images="pictures", device="cuda", data="moved")
    with pytest.raises(RunError) as error:
        Run(tmp_path, other)
    message = str(error.value)
    assert "--batch-size was 32, is 8" in message
    assert "--seed was 0, is 3" in message
    assert not any(name in message for name in ("--images", "--device", "--data", "--run was"))
    assert "\n" not in message
    assert (tmp_path / "config.json").read_bytes() == before


def test_options_that_change_no_result_may_differ(tmp_path):
    Run(tmp_path, config_of())
    Run(tmp_path, config_of(run="elsewhere", images="pictures", device="cuda", data="moved"))
    assert utils.read_config(tmp_path)["options"]["images"] == "i"


def test_other_data_are_refused(tmp_path):
    Run(tmp_path, config_of("f0", data="one"))
    with pytest.raises(RunError, match="data differ: --data was one, is two"):
        Run(tmp_path, config_of("f1", data="two"))


def test_tuples_and_lists_are_no_difference(tmp_path):
    Run(tmp_path, config_of(slice_size=(64, 32)))
    Run(tmp_path, config_of(slice_size=(64, 32)))
    with pytest.raises(RunError, match="--slice-size was"):
        Run(tmp_path, config_of(slice_size=(32, 64)))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{}", b"[]"])
def test_a_damaged_config_is_a_run_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        utils.read_config(tmp_path)
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        Run(tmp_path, config_of())


def test_a_missing_config_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        utils.read_config(tmp_path / "nothing")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        utils.read_config(tmp_path)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    run = Run(tmp_path, config_of())
    assert run.load() == {}
    tensor = torch.randn(3, 4)
    run.save(stage="vqvae", update=7, best=float("inf"), model={"w": tensor}, sums={"loss": torch.tensor(0.1)})
    state = Run(tmp_path, config_of()).load()
    assert (state["stage"], state["update"], state["best"]) == ("vqvae", 7, float("inf"))
    assert torch.equal(state["model"]["w"], tensor)
    assert torch.equal(state["sums"]["loss"], torch.tensor(0.1))


def test_lines_logged_after_the_checkpoint_are_dropped(tmp_path):
    run = Run(tmp_path, config_of())
    run.log("vqvae", "train", 1, {"loss": 1.0})
    run.save(stage="vqvae", update=1)
    kept = run.log_path.read_bytes()
    run.log("vqvae", "train", 2, {"loss": 2.0})
    with open(run.log_path, "a") as file:
        file.write('{"cut sho')
    run = Run(tmp_path, config_of())
    run.load()
    assert run.log_path.read_bytes() == kept
    run.log("vqvae", "train", 2, {"loss": 3.0})
    assert run.curves("vqvae") == {("train", "loss"): ([1, 2], [1.0, 3.0])}


def test_without_a_checkpoint_the_log_starts_anew(tmp_path):
    run = Run(tmp_path, config_of())
    run.log("vqvae", "train", 1, {"loss": 1.0})
    assert run.load() == {}
    assert run.log_path.read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_a_run_error(tmp_path, content):
    run = Run(tmp_path, config_of())
    run.log("vqvae", "train", 1, {"loss": 1.0})
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"training\.pt cannot be used"):
        run.load()
    assert run.log_path.stat().st_size > 0


def test_log_lines_and_curves(tmp_path):
    run = Run(tmp_path, config_of())
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


def test_weights_come_back_with_their_config(tmp_path):
    made = Pair(PairConfig((4, 5), 0.25))
    save_weights(tmp_path / "w.safetensors", made)
    loaded = load_weights(tmp_path / "w.safetensors", Pair, PairConfig)
    assert loaded.config == made.config
    assert not loaded.training
    assert loaded.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_in_another_memory_order_come_back(tmp_path):
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


def without_config(path):
    safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, path)


def with_unknown_field(path):
    header = {"config": json.dumps({"size": [2, 3], "colour": "blue"})}
    safetensors.torch.save_file({"weight": torch.zeros(2, 3), "counts": torch.arange(3)}, path, header)


def with_another_shape(path):
    header = {"config": json.dumps({"size": [3, 2], "scale": 0.5})}
    safetensors.torch.save_file({"weight": torch.zeros(2, 3), "counts": torch.arange(3)}, path, header)


def without_a_tensor(path):
    header = {"config": json.dumps({"size": [2, 3], "scale": 0.5})}
    safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, path, header)


def a_folder(path):
    path.mkdir()


DAMAGES = [a_folder, pickled, torch_saved, empty, cut_short, without_config, with_unknown_field, with_another_shape]


@pytest.mark.parametrize("write", [*DAMAGES, without_a_tensor])
def test_weights_that_cannot_be_used(tmp_path, write):
    write(tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"w\.safetensors cannot be used"):
        load_weights(tmp_path / "w.safetensors", Pair, PairConfig)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(RunError, match=r"w\.safetensors does not exist"):
        load_weights(tmp_path / "w.safetensors", Pair, PairConfig)


# ---------------------------------------------------------------- figures


def curves_of(*names):
    curves = {("validate", name): ([10, 20, 30], [3.0, 1.0, 2.0]) for name in names}
    return curves | {("train", name): ([5, 15, 25], [2.0, 1.0, 0.5]) for name in names if name.endswith("_loss")}


def read_png(path, width, height):
    """The figure as (H, W, 3) in [0, 1]; its size has to be about this many pixels, and it has to show something."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)[..., :3]
    assert picture.shape[1] == pytest.approx(width, rel=0.05)
    assert picture.shape[0] == pytest.approx(height, rel=0.1)
    assert (picture < 0.5).any()
    return picture


def test_vqvae_loss_figure(tmp_path):
    path = tmp_path / "new" / "folder" / "loss.png"
    curves = curves_of("reconstruction_loss", "embedding_loss", "total_loss", "ssim")
    utils.vqvae_loss_figure(path, curves)
    read_png(path, 1440, 384)


def test_figures_that_have_no_place_are_a_run_error(tmp_path):
    (tmp_path / "images").write_text("mine")
    with pytest.raises(RunError, match="images"):
        utils.prior_loss_figure(tmp_path / "images" / "loss.png", curves_of("bits_per_code"), 512)
    assert (tmp_path / "images").read_text() == "mine"


def test_prior_loss_figure(tmp_path):
    path = tmp_path / "new" / "loss.png"
    utils.prior_loss_figure(path, curves_of("bits_per_code"), 512)
    read_png(path, 720, 432)


def test_codebook_figure(tmp_path):
    path = tmp_path / "new" / "codebook.png"
    utils.codebook_figure(path, curves_of("perplexity"), np.array([0, 5, 1, 9]))
    read_png(path, 1200, 408)


def test_figures_hold_no_state_of_pyplot(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    utils.prior_loss_figure(tmp_path / "loss.png", curves_of("bits_per_code"), 512)
    assert plt.get_fignums() == before


def test_a_log_that_lost_lines_is_not_filled_up(tmp_path):
    run = utils.Run(tmp_path / "run", {"options": {}, "fingerprint": ""})
    for update in (1, 2):
        run.log("vqvae", "train", update, {"total_loss": 1.0})
    run.save(stage="vqvae")
    first = run.log_path.read_text().splitlines(keepends=True)[0]
    run.log_path.write_text(first)
    run.load()
    assert run.log_path.read_text() == first


def test_draw_curves_draws_both_splits():
    axes = Figure().subplots()
    curves = curves_of("total_loss", "ssim")
    utils.draw_curves(axes, curves, "total_loss", "title", "unit")
    drawn = {line.get_label(): ([*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines}
    assert drawn == {"training": curves["train", "total_loss"], "validation": curves["validate", "total_loss"]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", "unit")


def test_draw_curves_leaves_out_what_was_not_logged():
    axes = Figure().subplots()
    utils.draw_curves(axes, curves_of("ssim"), "ssim", "title", "unit")
    assert [line.get_label() for line in axes.lines] == ["validation"]


def test_upright_puts_the_front_on_top_and_row_0_left():
    slices = np.zeros((2, 6, 4))
    slices[1, 5, 0] = 1  # last row, first column: the front, at the other side
    pictures = utils.upright(slices)
    assert pictures.shape == (2, 4, 6)
    assert np.argwhere(pictures).tolist() == [[1, 0, 5]]


def marked_slice(height, width, value, mark):
    """A slice of one grey with a mark of another over its first rows and columns."""
    picture = np.full((height, width), value)
    picture[: height // 4, : width // 4] = mark
    return picture


def sheet_of(path, slices, columns):
    """The sheet without its title, a pixel of the figure a pixel of a slice; and the first slice in it."""
    count, height, width = slices.shape
    utils.samples_figure(path, slices, "a title", columns)
    picture = imread(path)[..., :3]
    assert (picture == picture[..., :1]).all()
    across, down = min(columns, count), -(-count // columns)
    # as many pixels as the slices have, and little more for gaps and title
    assert across * height <= picture.shape[1] <= across * (height + 8)
    assert down * width <= picture.shape[0] <= down * (width + 8) + 60
    return picture[..., 0]


def test_samples_are_upright_and_black_is_black(tmp_path):
    slices = np.stack([marked_slice(256, 64, -1.0, 1.0)])
    sheet = sheet_of(tmp_path / "samples.png", slices, 8)
    assert sheet.shape[1] > 64
    shown = sheet[-64:, :256]  # 256 rows become 256 columns
    np.testing.assert_allclose(shown[2:14, 2:62], 1, atol=0.01)
    for rest in (shown[2:14, 66:-2], shown[18:-2, 2:62], shown[18:-2, 66:-2]):
        np.testing.assert_allclose(rest, 0, atol=0.01)


def test_small_samples_are_drawn_larger(tmp_path):
    slices = np.stack([marked_slice(64, 32, -1.0, 1.0)])
    utils.samples_figure(tmp_path / "samples.png", slices, "a title")
    shown = imread(tmp_path / "samples.png")[-128:, :256, 0]  # four times as large
    np.testing.assert_allclose(shown[3:28, 3:60], 1, atol=0.01)
    np.testing.assert_allclose(shown[36:-3, 3:-3], 0, atol=0.01)


def test_spread_is_even_and_within():
    assert utils.spread(60, 6).tolist() == [5, 15, 25, 35, 45, 55]
    assert utils.spread(3, 6).tolist() == [0, 1, 2]


def test_grey_levels_are_those_of_the_slice_whatever_is_beside_it(tmp_path):
    """No stretching to what the sheet happens to hold: -1 is black and +1 white, 0 half way, 2 and -3 are clipped."""
    values = np.array([0.0, 0.2, -0.5, -3.0, 2.0, 0.1, 0.0])
    slices = np.broadcast_to(values[:, None, None], (7, 160, 24))
    sheet = sheet_of(tmp_path / "samples.png", slices, 3)
    gap = (sheet.shape[1] - 3 * 160) // 2
    top = sheet.shape[0] - (3 * 24 + 2 * gap)
    for i, value in enumerate(values.clip(-1, 1)):
        y, x = top + i // 3 * (24 + gap), i % 3 * (160 + gap)
        np.testing.assert_allclose(sheet[y + 3 : y + 20, x + 3 : x + 156], (value + 1) / 2, atol=0.01)


def test_reconstructions_figure(tmp_path):
    """Row by row: the slice, upright and in its grey; the reconstruction; their difference, in colour."""
    path = tmp_path / "new" / "reconstructions.png"
    slices = np.stack([marked_slice(64, 32, 0.0, -1.0)] * 2)
    utils.reconstructions_figure(path, slices, np.ones_like(slices), ["one", "two"])
    picture = read_png(path, 2.4 * 2 * 120, (2.4 * 3 / 2 + 0.5) * 120)
    upper, middle, lower = np.array_split(picture, 3)
    grey = (np.abs(upper - 0.5) < 0.02).all(-1)
    rows, columns = (np.flatnonzero(grey.sum(axis) > 20) for axis in (1, 0))
    columns = columns[: np.append(np.flatnonzero(np.diff(columns) > 1), len(columns) - 1)[0] + 1]  # the first slice
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    assert right - left == pytest.approx(2 * (bottom - top), rel=0.05)
    step = (right - left) // 8
    np.testing.assert_allclose(upper[top + 4 : top + step - 4, left + 4 : left + step - 4], 0, atol=0.02)
    for y, x in ((top + 4, right - 4), (bottom - 4, left + 4), (bottom - 4, right - 4)):
        np.testing.assert_allclose(upper[y, x], 0.5, atol=0.02)
    np.testing.assert_allclose(middle[len(middle) // 2, left + step : right - step], 1, atol=0.02)
    red = lower[len(lower) // 2, left + step : right - step]
    assert (red[:, 0] > red[:, 2] + 0.2).all()


# ---------------------------------------------------------------- figures of an evaluation


def evaluated(**samples):
    """What evaluation.json holds, as far as it is drawn."""
    names = (
        "two_sample_accuracy",
        "coverage",
        "density",
        "frechet_distance",
        "sliced_wasserstein",
        "ms_ssim_diversity",
    )
    part = {
        "samples": dict.fromkeys(names, 0.5) | samples,
        "copying": {"statistic": -3.2, "share_nearer_than_heldout": 0.1},
    }
    return {
        **part,
        "decoder_alone": part,
        "prior_alone": part,
        "floor": part,
        "prior": {"bits_per_slice": 900.0, "jpeg2000_bits_per_slice": 1200.0},
        "reconstructions": {"bits_per_pixel": 0.5625, "psnr": 24.0},
    }


@pytest.mark.parametrize("coverage", [0.5, 0.0])
def test_evaluation_figure(tmp_path, coverage):
    strips = {"slices": np.stack([marked_slice(64, 32, 0.0, 1.0)] * 4), "samples": np.full((4, 64, 32), 0.5)}
    distances = {name: np.random.default_rng(0).random(20) for name in ("samples", "reconstructions", "slices")}
    path = tmp_path / "new" / "evaluation.png"
    utils.evaluation_figure(path, evaluated(coverage=coverage), strips, distances, "a title")
    read_png(path, 1440, (2 * 11.6 / 4 / 2 + 5.2) * 120)


def test_bars_stand_in_order_with_their_numbers():
    axes = Figure().subplots()
    utils.draw_bars(axes, {"one": 0.25, "other": 2.0}, ("black", "red"), ".1f", "a title", "lower is better")
    assert [bar.get_width() for bar in axes.patches] == [0.25, 2.0]
    assert [text.get_text() for text in axes.texts] == ["0.2", "2.0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["one", "other"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert axes.get_xlim()[0] == 0


def test_histograms_of_distances_are_shares_on_the_same_bins():
    axes = Figure().subplots()
    distances = {"samples": np.array([0.1, 0.2, 0.2, 0.9]), "slices": np.array([0.5, 0.5])}
    utils.draw_distances(axes, distances, "a title")
    outlines = [patch.get_xy() for patch in axes.patches if not isinstance(patch, Rectangle)]
    assert [outline[:, 1].max() for outline in outlines] == pytest.approx([0.5, 1.0])
    assert outlines[0][:, 0].tolist() == pytest.approx(outlines[1][:, 0].tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["samples", "slices"]


@pytest.mark.parametrize(("columns", "axis"), [("xyz", 2), ("yxz", 3), ("zyx", None)])
def test_left_right_axis(columns, axis):
    """The first axis of a slice is axis 2 of a batch; where none of both runs from side to side there is none."""
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ["xyz".index(column) for column in columns]]
    affine[:3, :3] *= -2.5
    assert utils.left_right_axis(affine) == axis
