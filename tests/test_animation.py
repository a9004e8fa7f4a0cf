"""animation.py: the order in which codes appear, what is decoded of them, and the GIF."""

import numpy as np
import pytest
import torch
from PIL import Image

import animation
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig

SMALL = VQVAEConfig(
    downsampling=4, channels=16, residual_blocks=1, hidden_channels=8, codebook_size=20, embedding_dim=6
)


@pytest.fixture
def vqvae():
    torch.manual_seed(0)
    return VQVAE(SMALL).eval()


def prior_of(grid, left_right=0):
    config = PriorConfig(grid=grid, codebook_size=20, left_right=left_right, channels=8, head_channels=16)
    return GatedPixelCNN(config).eval()


def frames_of(vqvae, grid=(10, 6), left_right=0, steps=3):
    """Two samples of random codes, with refiner steps of rising brightness."""
    codes = torch.randint(20, (2, *grid))
    slices = [torch.full((2, 1, 4 * grid[0], 4 * grid[1]), 0.2 * step) for step in range(steps + 1)]
    prior = prior_of(grid, left_right)
    return list(animation.sampling_frames(codes, vqvae, prior, slices[:-1], slices[-1])), codes, prior


@pytest.mark.parametrize(("grid", "left_right"), [((10, 6), 0), ((6, 9), 1)])
def test_codes_appear_in_the_order_in_which_the_prior_draws_them(vqvae, grid, left_right):
    frames, codes, prior = frames_of(vqvae, grid, left_right)
    assert len(frames) == prior.rows + 3 + 1
    before = np.zeros(grid, bool)
    for row, frame in zip(prior.order.tolist(), frames):
        new = frame.drawn & ~before
        np.testing.assert_array_equal(new, np.indices(grid)[left_right] == row)
        assert (before <= frame.drawn).all()
        before = frame.drawn
        np.testing.assert_array_equal(frame.codes, codes)
    assert all(frame.drawn.all() for frame in frames[prior.rows - 1 :])


def test_the_refiner_follows_and_the_last_frame_shows_its_slices(vqvae):
    frames, _, prior = frames_of(vqvae)
    brightness = [float(frame.slices.mean()) for frame in frames[prior.rows :]]
    assert brightness == pytest.approx([0, 0.2, 0.4, 0.6], abs=1e-6)
    assert [frame.milliseconds for frame in frames[-2:]] == [animation.STEP, animation.HOLD]


def test_codes_that_are_not_drawn_yet_do_not_matter(vqvae):
    codes, drawn = torch.randint(20, (2, 10, 6)), torch.arange(10)[:, None].expand(-1, 6) < 4
    others = torch.where(drawn, codes, (codes + 1) % 20)
    decoded = animation.decode_drawn(vqvae, codes, drawn)
    np.testing.assert_array_equal(decoded, animation.decode_drawn(vqvae, others, drawn))
    complete = animation.decode_drawn(vqvae, codes, torch.ones_like(drawn))
    np.testing.assert_array_equal(complete, vqvae.decode(codes)[:, 0])
    assert not np.array_equal(decoded, complete)


def test_codes_are_as_bright_as_their_squares(vqvae):
    colours, palette = animation.code_colours(vqvae)
    assert colours.shape == (20,)
    red, green, blue = palette[colours].T
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    fields = vqvae.decode(torch.arange(20)[:, None, None].expand(-1, 3, 3))[:, 0, 4:8, 4:8].mean((1, 2))
    assert np.corrcoef(luma, fields)[0, 1] > 0.9


@pytest.mark.parametrize("shape", [{"codebook_size": 2, "embedding_dim": 1}, {"codebook_size": 700}])
def test_codebooks_of_any_shape_have_colours(shape):
    size = shape["codebook_size"]
    colours, palette = animation.code_colours(VQVAE(VQVAEConfig(**shape)).eval())
    assert colours.shape == (size,)
    assert colours.max() < len(palette) <= animation.COLOURS
    assert palette.shape[1] == 3


def test_the_gif_shows_codes_above_slices(vqvae, tmp_path):
    frames, codes, prior = frames_of(vqvae, grid=(16, 8), steps=2)
    path = tmp_path / "new" / "sampling.gif"
    animation.write_animation(path, frames, vqvae, ["height 0.25", "height 0.75"])
    assert [file.name for file in path.parent.iterdir()] == ["sampling.gif"]
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        pictures, durations = [], []
        for n in range(gif.n_frames):
            gif.seek(n)
            pictures.append(np.asarray(gif.convert("RGB")).astype(int))
            durations.append(gif.info["duration"])
    assert len(pictures) == 16 + 2 + 1
    assert durations == [animation.DRAWING // 16] * 16 + [animation.STEP] * 2 + [animation.HOLD]
    width, height = animation.SLICE_WIDTH, animation.SLICE_WIDTH // 2
    top, left = animation.STRIP + animation.GAP // 2, animation.GAP
    codes_shown = np.s_[top : top + height, left : left + width]
    slice_shown = np.s_[top + height + animation.GAP : top + 2 * height + animation.GAP, left : left + width]
    page = round(animation.PAGE * 255 / (animation.GREYS - 1))
    for shown in (codes_shown, slice_shown):  # two of 16 rows, in the middle
        blank = (pictures[1][shown] == page).all(2)
        assert blank[:, : 7 * width // 16].all() and blank[:, 9 * width // 16 :].all()
    last = pictures[-1][slice_shown]
    np.testing.assert_allclose(last, 255 * (0.4 + 1) / 2, atol=1.5)
    # Equal codes have equal colours, in squares of 16 pixels, anterior on top.
    colours, palette = animation.code_colours(vqvae)
    expected = palette[colours[codes[0].T.numpy()]].repeat(16, 0).repeat(16, 1)
    np.testing.assert_array_equal(pictures[-1][codes_shown], expected)


def test_large_slices_are_shrunk(vqvae):
    frame = animation.Frame(np.zeros((1, 128, 96), int), np.ones((128, 96), bool), np.zeros((1, 512, 384)), "", 100)
    picture = animation.draw_frame(frame, np.zeros(20, np.uint8), [""])
    assert picture.size[0] == animation.SLICE_WIDTH + 2 * animation.GAP
