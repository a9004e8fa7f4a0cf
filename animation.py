"""The animation of sampling, a GIF: codes arrive row by row and are decoded, then the refiner draws the detail.

Frames are arrays (H, W) of indices into one palette: `GREYS` grey levels, then the colours of codes. Slices are
(n, H, W) in [-1, 1], codes (n, h, w) int64 in [0, K).
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modules import VQVAE, GatedPixelCNN
from plots import as_array, to_display
from utils import make_folder, write_file

GREYS, COLOURS = 128, 120  # entries of the palette; GIF allows 256, and Pillow takes one for what does not change
PAGE, INK, FAINT = 14, 118, 84  # grey levels of the page, the caption, and the labels
SLICE_WIDTH = 256  # pixels of a slice
DARKEST, BRIGHTEST = (40, 94, 94), (230, 162, 162)  # luma and chromas of codes
GAP, STRIP = 14, 30  # pixels between slices; height of the strips of text above and below
DRAWING, STEP, HOLD = 3200, 180, 3000  # milliseconds: all rows of codes, a step of the refiner, the last frame


class Frame(NamedTuple):
    """A picture of the animation: n samples side by side."""

    codes: np.ndarray  # (n, h, w)
    drawn: np.ndarray  # (h, w) bool: the codes that are drawn so far
    slices: np.ndarray  # (n, H, W) in [-1, 1]
    caption: str
    milliseconds: int


def sampling_frames(
    codes: Tensor, vqvae: VQVAE, prior: GatedPixelCNN, steps: Sequence[Tensor], slices: Tensor
) -> Iterator[Frame]:
    """Yield the frames of sampling.

    Args:
        codes: Complete code grids (n, h, w), on the CPU.
        vqvae: Decodes them.
        prior: Drew them; its order of rows is followed.
        steps: The slices (n, 1, H, W) that each step of the refiner predicts.
        slices: The refined slices (n, 1, H, W).
    """
    grids, all_drawn = codes.numpy(), np.ones(codes.shape[1:], bool)
    # Of each code, the row of the prior that it belongs to, in the order in which rows are drawn.
    rows = torch.arange(prior.rows, device=prior.order.device)[:, None].expand(-1, prior.columns)
    rows = prior.in_place(rows).cpu()
    for row in range(prior.rows):
        drawn = rows <= row
        caption = f"The prior draws codes, from the midline outward: row {row + 1} of {prior.rows}"
        yield Frame(grids, drawn.numpy(), decode_drawn(vqvae, codes, drawn), caption, DRAWING // prior.rows)
    for step, predicted in enumerate(steps, 1):
        caption = f"The refiner draws the detail: step {step} of {len(steps)}"
        yield Frame(grids, all_drawn, as_array(predicted), caption, STEP)
    yield Frame(grids, all_drawn, as_array(slices), "New slices, and the codes that they were drawn from", HOLD)


@torch.no_grad()
def decode_drawn(vqvae: VQVAE, codes: Tensor, drawn: Tensor) -> np.ndarray:
    """Decode the codes (n, h, w) that are drawn, (h, w) bool; the others are zero, like the padding around a grid."""
    device = vqvae.codebook.embeddings.device
    return as_array(vqvae.decoder(vqvae.embed(codes.to(device)) * drawn.to(device)))


def code_colours(vqvae: VQVAE) -> tuple[np.ndarray, np.ndarray]:
    """Return the colour of each code, an index (K,) uint8 into a palette, and the palette (at most COLOURS, 3) as RGB.

    A code is as bright as a field of it, and of similar colour as codes with similar embeddings, whose second and third
    principal components are the chromas.
    """
    device, side = vqvae.codebook.embeddings.device, vqvae.config.downsampling
    embeddings = F.pad(vqvae.codebook.embeddings.cpu(), (0, 3))  # so that there are three components of any D
    fields = vqvae.decode(torch.arange(len(embeddings), device=device)[:, None, None].expand(-1, 3, 3))
    grey = (fields[:, 0, side : 2 * side, side : 2 * side].mean((1, 2)).cpu() + 1) / 2
    axes = torch.linalg.eigh(embeddings.T.cov()).eigenvectors[:, [-2, -3]]
    chromas = (embeddings @ axes).argsort(0).argsort(0) / len(embeddings)
    low, high = torch.tensor(DARKEST), torch.tensor(BRIGHTEST)
    ycbcr = low + (high - low) * torch.column_stack([grey, chromas])
    indexed = Image.fromarray(ycbcr.byte().numpy()[None], "YCbCr").convert("RGB").quantize(COLOURS)
    return np.asarray(indexed)[0], np.reshape(indexed.getpalette() or [], (-1, 3))[:COLOURS]


def resize(picture: np.ndarray, height: int, how: Image.Resampling) -> np.ndarray:
    """Return a picture (H, W) uint8 as (height, SLICE_WIDTH)."""
    return np.asarray(Image.fromarray(picture).resize((SLICE_WIDTH, height), how))


def draw_frame(frame: Frame, colours: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """Draw a frame: codes above, slices below, each with its label.

    Args:
        frame: What it shows.
        colours: Of the codes, indices (K,) into the palette after its grey levels.
        labels: One per slice.
    """
    greys = np.round((to_display(frame.slices) + 1) / 2 * (GREYS - 1)).astype(np.uint8)
    codes = to_display(GREYS + colours[frame.codes])
    n, *shape = greys.shape
    height = round(SLICE_WIDTH * shape[0] / shape[1])
    visible = resize(to_display(frame.drawn).astype(np.uint8), height, Image.Resampling.NEAREST)
    page = np.full((2 * STRIP + 2 * height + 2 * GAP, n * (SLICE_WIDTH + GAP) + GAP), PAGE, np.uint8)
    first, second = STRIP + GAP // 2, STRIP + GAP // 2 + height + GAP
    for left, own_codes, own_greys in zip(range(GAP, page.shape[1], SLICE_WIDTH + GAP), codes, greys):
        for top, picture in (
            (first, resize(own_codes, height, Image.Resampling.NEAREST)),
            (second, resize(own_greys, height, Image.Resampling.BOX)),
        ):
            page[top : top + height, left : left + SLICE_WIDTH] = np.where(visible, picture, PAGE)
    text = Image.new("L", page.shape[::-1], PAGE)  # antialiased: between grey levels, which are those of the palette
    draw = ImageDraw.Draw(text)
    draw.text((GAP, STRIP / 2 + 2), frame.caption, INK, ImageFont.load_default(15), "lm")
    for i, label in enumerate(labels):
        place = GAP + i * (SLICE_WIDTH + GAP) + SLICE_WIDTH / 2, page.shape[0] - STRIP / 2 - 1
        draw.text(place, label, FAINT, ImageFont.load_default(13), "mm")
    return Image.fromarray(np.where(np.asarray(text) == PAGE, page, np.asarray(text)), "P")


def write_animation(path: Path, frames: Sequence[Frame], vqvae: VQVAE, labels: Sequence[str]) -> None:
    """Write frames as a GIF that repeats.

    Args:
        path: Of the GIF.
        frames: In their order.
        vqvae: Of the codes, which it colours.
        labels: One per sample.

    Raises:
        RunError: The file cannot be written.
    """
    colours, palette = code_colours(vqvae)
    greys = np.linspace(0, 255, GREYS).round().astype(int)[:, None].repeat(3, 1)
    entries = np.concatenate([greys, palette]).ravel().tolist()
    images = [draw_frame(frame, colours, labels) for frame in frames]
    for image in images:
        image.putpalette(entries)
    content = io.BytesIO()
    durations = [frame.milliseconds for frame in frames]
    images[0].save(content, "gif", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)
    make_folder(path.parent)
    write_file(path, lambda part: part.write_bytes(content.getvalue()))
