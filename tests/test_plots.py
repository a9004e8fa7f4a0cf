"""plots.py: what the figures show."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

import plots

# ---------------------------------------------------------------- figures


def curves_of(*names):
    curves = {("validate", name): ([10, 20, 30], [3.0, 1.0, 2.0]) for name in names}
    return curves | {("train", name): ([5, 15, 25], [2.0, 1.0, 0.5]) for name in names if name.endswith("_loss")}


def read_png(path, width, height):
    """Return a figure (H, W, 3) in [0, 1]; check its size in pixels, and that it is not blank."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)[..., :3]
    assert picture.shape[1] == pytest.approx(width, rel=0.05)
    assert picture.shape[0] == pytest.approx(height, rel=0.1)
    assert (picture < 0.5).any()
    return picture


def test_vqvae_loss_figure(tmp_path):
    path = tmp_path / "new" / "folder" / "loss.png"
    curves = curves_of("reconstruction_loss", "embedding_loss", "total_loss", "ssim", "gradient_norm", "learning_rate")
    plots.vqvae_loss_figure(path, curves)
    read_png(path, 1440, 672)


def test_a_figure_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    """A long training must not end because the folder of figures was removed or is full."""
    (tmp_path / "images").write_text("mine")
    plots.prior_loss_figure(tmp_path / "images" / "loss.png", curves_of("bits_per_code"), 512)
    assert caplog.messages[0].startswith(f"{tmp_path / 'images'} cannot be written: ")
    assert (tmp_path / "images").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        "case_004_$T2__tse$",
        "100$_of_$",
        "K\udcf6ln",
        "\u524d\u5217\u817a",
        "two\nlines",
        "x" * 250,
        "\\$a\\_b$",
        "\x1b[31m",
    ],
)
def test_names_are_not_parsed_as_markup_in_a_figure(tmp_path, name):
    """Names may look like markup, need not be valid Unicode, and may have letters that the font lacks."""
    slices = np.zeros((1, 32, 16))
    title = f"{plots.caption(f'folder/{name}.nii.gz')}\nSSIM 0.9"
    assert len(title) < 60
    assert title.count("\n") == 1
    plots.reconstructions_figure(tmp_path / "reconstructions.png", slices, slices, [title])
    plots.refinement_figure(tmp_path / "refinement.png", {"slice": slices}, [title])
    assert len(list(tmp_path.iterdir())) == 2


def test_prior_loss_figure(tmp_path):
    path = tmp_path / "new" / "loss.png"
    plots.prior_loss_figure(path, curves_of("bits_per_code", "gradient_norm", "learning_rate"), 512)
    read_png(path, 1440, 408)


def test_refiner_loss_figure(tmp_path):
    path = tmp_path / "new" / "loss.png"
    plots.refiner_loss_figure(path, curves_of("flow_loss", "gradient_norm", "learning_rate"))
    read_png(path, 1440, 408)


@pytest.mark.parametrize(
    ("draw", "name", "kept"),
    [
        (lambda curves: plots.refiner_loss_figure("loss.png", curves), "flow_loss", "kept: 1.000"),
        (lambda curves: plots.prior_loss_figure("loss.png", curves, 512), "bits_per_code", "kept: 1.00 bits"),
    ],
)
def test_loss_figures_mark_the_lowest_validation_loss(monkeypatch, draw, name, kept):
    """It belongs to the weights that are kept."""
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    draw(curves_of(name))
    axes = drawn[0].axes[0]
    (marked,) = (line for line in axes.lines if line.get_label() == kept)
    assert (marked.get_xdata().tolist(), marked.get_ydata().tolist()) == ([20], [1.0])
    assert kept in [text.get_text() for text in axes.get_legend().get_texts()]


def test_codebook_figure(tmp_path):
    path = tmp_path / "new" / "codebook.png"
    plots.codebook_figure(path, curves_of("perplexity"), np.array([0, 5, 1, 9]))
    read_png(path, 1200, 408)


def test_figures_leave_pyplot_state_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.prior_loss_figure(tmp_path / "loss.png", curves_of("bits_per_code"), 512)
    assert plt.get_fignums() == before


def test_draw_curves_draws_both_splits():
    axes = Figure().subplots()
    curves = curves_of("total_loss", "ssim")
    plots.draw_curves(axes, curves, "total_loss", "title", "unit")
    drawn = {line.get_label(): ([*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines}
    assert drawn == {"training": curves["train", "total_loss"], "validation": curves["validate", "total_loss"]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("update", "unit")


def test_draw_curves_leaves_out_a_split_that_was_not_logged():
    axes = Figure().subplots()
    plots.draw_curves(axes, curves_of("ssim"), "ssim", "title", "unit")
    assert [line.get_label() for line in axes.lines] == ["validation"]


def test_to_display_puts_anterior_on_top_and_row_0_left():
    slices = np.zeros((2, 6, 4))
    slices[1, 5, 0] = 1  # last row, first column: anterior, on the other side
    pictures = plots.to_display(slices)
    assert pictures.shape == (2, 4, 6)
    assert np.argwhere(pictures).tolist() == [[1, 0, 5]]


def marked_slice(height, width, value, mark):
    """A slice of one grey level whose first rows and columns have another."""
    picture = np.full((height, width), value)
    picture[: height // 4, : width // 4] = mark
    return picture


def sheet_of(path, slices, columns):
    """The figure of samples, with one pixel per pixel of a slice."""
    count, height, width = slices.shape
    plots.samples_figure(path, slices, "a title", columns)
    picture = imread(path)[..., :3]
    assert (picture == picture[..., :1]).all()
    across, down = min(columns, count), -(-count // columns)
    # the pixels of the slices, and a few more for gaps and title
    assert across * height <= picture.shape[1] <= across * (height + 8)
    assert down * width <= picture.shape[0] <= down * (width + 8) + 60
    return picture[..., 0]


def test_samples_are_displayed_upright_in_their_grey_levels(tmp_path):
    slices = np.stack([marked_slice(256, 64, -1.0, 1.0)])
    sheet = sheet_of(tmp_path / "samples.png", slices, 8)
    assert sheet.shape[1] > 64
    shown = sheet[-64:, :256]  # 256 rows become 256 columns
    np.testing.assert_allclose(shown[2:14, 2:62], 1, atol=0.01)
    for rest in (shown[2:14, 66:-2], shown[18:-2, 2:62], shown[18:-2, 66:-2]):
        np.testing.assert_allclose(rest, 0, atol=0.01)


def test_small_samples_are_enlarged_by_an_integer_factor(tmp_path):
    slices = np.stack([marked_slice(64, 32, -1.0, 1.0)])
    plots.samples_figure(tmp_path / "samples.png", slices, "a title")
    shown = imread(tmp_path / "samples.png")[-128:, :256, 0]  # four times as large
    np.testing.assert_allclose(shown[3:28, 3:60], 1, atol=0.01)
    np.testing.assert_allclose(shown[36:-3, 3:-3], 0, atol=0.01)


def test_a_contact_sheet_shows_every_slice_upright_in_its_grey_levels(tmp_path):
    slices = np.stack([marked_slice(64, 32, -1 + index / 10, 1.0) for index in range(8)])
    names = [f"$case {index}" for index in range(8)]
    plots.contact_sheet_figure(tmp_path / "sheet.png", slices, names, "a $title")
    sheet = imread(tmp_path / "sheet.png")[..., :3]
    assert (sheet == sheet[..., :1]).all()
    width, height = plots.CONTACT_WIDTH, plots.CONTACT_WIDTH // 2
    assert sheet.shape[1] == pytest.approx(6 * (width + 6), abs=2)
    for index in range(8):
        top, left = 56 + index // 6 * (height + 22), index % 6 * (width + 6)
        shown = sheet[top : top + height, left : left + width, 0]
        np.testing.assert_allclose(shown[4:24, 4:50], 1, atol=0.01)  # a quarter of each side, at the upper left
        np.testing.assert_allclose(shown[40:-4, 80:-4], index / 20, atol=0.01)


def test_bin_centres_indices():
    assert plots.bin_centres(60, 6).tolist() == [5, 15, 25, 35, 45, 55]
    assert plots.bin_centres(3, 6).tolist() == [0, 1, 2]


def test_samples_have_a_fixed_grey_scale(tmp_path):
    """The scale does not depend on the samples: -1 is black, +1 white, 0 halfway; 2 and -3 are clipped."""
    values = np.array([0.0, 0.2, -0.5, -3.0, 2.0, 0.1, 0.0])
    slices = np.broadcast_to(values[:, None, None], (7, 160, 24))
    sheet = sheet_of(tmp_path / "samples.png", slices, 3)
    gap = (sheet.shape[1] - 3 * 160) // 2
    top = sheet.shape[0] - (3 * 24 + 2 * gap)
    for i, value in enumerate(values.clip(-1, 1)):
        y, x = top + i // 3 * (24 + gap), i % 3 * (160 + gap)
        np.testing.assert_allclose(sheet[y + 3 : y + 20, x + 3 : x + 156], (value + 1) / 2, atol=0.01)


def test_reconstructions_figure(tmp_path):
    """The rows are the slice, upright and in grey, the reconstruction, and their difference in colour."""
    path = tmp_path / "new" / "reconstructions.png"
    slices = np.stack([marked_slice(64, 32, 0.0, -1.0)] * 2)
    plots.reconstructions_figure(path, slices, np.ones_like(slices), ["one", "two"])
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


def test_refinement_figure(tmp_path, monkeypatch):
    """Labelled rows, titled columns; slices upright, -1 black and 1 white."""
    rows = {"slice": np.stack([marked_slice(64, 32, 0.0, 1.0)] * 3), "decoded": np.zeros((3, 64, 32))}
    path = tmp_path / "new" / "refinement.png"
    plots.refinement_figure(path, rows, ["one", "two", "three"])
    read_png(path, 2.4 * 3 * 120, (2.4 * 2 / 2 + 0.4) * 120)
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    plots.refinement_figure(path, rows, ["one", "two", "three"])
    drawn_rows = np.reshape(drawn[0].axes, (2, 3))
    assert [[axes.get_title() for axes in row] for row in drawn_rows] == [["one", "two", "three"], ["", "", ""]]
    assert [row[0].get_ylabel() for row in drawn_rows] == ["slice", "decoded"]
    for row, slices in zip(drawn_rows, rows.values()):
        for axes, expected in zip(row, slices):
            (image,) = axes.images
            np.testing.assert_array_equal(image.get_array(), expected.T)
            assert image.get_clim() == (-1, 1)


# ---------------------------------------------------------------- figures of an evaluation


def evaluated(**samples):
    """The part of evaluation.json that is drawn."""
    names = (
        "c2st_accuracy",
        "coverage_by_patient",
        "density_by_patient",
        "random_feature_frechet",
        "sliced_wasserstein",
        "ms_ssim_diversity",
    )
    part = {
        "samples": dict.fromkeys(names, 0.5) | samples,
        "copying": {"c_t": -3.2, "memorisation_rate": 0.1},
    }
    return {
        **part,
        "decoder_alone": part,
        "prior_alone": part,
        "baseline": part,
        "prior": {"bits_per_slice": 900.0, "jpeg2000_bits_per_slice": 1200.0},
        "reconstructions": {"bits_per_pixel": 0.5625, "psnr": 24.0},
    }


@pytest.mark.parametrize("coverage", [0.5, 0.0])
def test_evaluation_figure(tmp_path, coverage):
    rows = {"slices": np.stack([marked_slice(64, 32, 0.0, 1.0)] * 4), "samples": np.full((4, 64, 32), 0.5)}
    distances = {name: np.random.default_rng(0).random(20) for name in ("samples", "reconstructions", "slices")}
    path = tmp_path / "new" / "evaluation.png"
    plots.evaluation_figure(path, evaluated(coverage_by_patient=coverage), rows, distances, "a title")
    read_png(path, 1440, (2 * 11.6 / 4 / 2 + 5.2) * 120)


def test_draw_bars_keeps_the_order_and_labels_the_values():
    axes = Figure().subplots()
    plots.draw_bars(axes, {"one": 0.25, "other": 2.0}, ("black", "red"), ".1f", "a title", "lower is better")
    assert [bar.get_width() for bar in axes.patches] == [0.25, 2.0]
    assert [text.get_text() for text in axes.texts] == ["0.2", "2.0"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["one", "other"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert axes.get_xlim()[0] == 0


def test_draw_distances_normalises_histograms_on_shared_bins():
    axes = Figure().subplots()
    distances = {"samples": np.array([0.1, 0.2, 0.2, 0.9]), "slices": np.array([0.5, 0.5])}
    plots.draw_distances(axes, distances, "a title")
    outlines = [patch.get_xy() for patch in axes.patches if not isinstance(patch, Rectangle)]
    assert [outline[:, 1].max() for outline in outlines] == pytest.approx([0.5, 1.0])
    assert outlines[0][:, 0].tolist() == pytest.approx(outlines[1][:, 0].tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["samples", "slices"]
