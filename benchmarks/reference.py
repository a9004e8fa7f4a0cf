"""Reference implementations: textbook networks and a plain data loader, from PyTorch layers.

The VQ-VAE of arXiv:1711.00937 (section 4.1, as in most public code), the gated PixelCNN of arXiv:1606.05328 with 15
layers of 64 channels, sampled by one full forward pass per code, and a data set that opens one file per slice with
nibabel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x + 1x1(relu(3x3(relu(x)))), 32 hidden channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TextbookVQVAE(nn.Module):
    """VQ-VAE from slices (N, 1, H, W) to codes (N, H/4, W/4): D = 64, commitment cost 0.25, codebook by gradient."""

    def __init__(self, codes: int = 512):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1),
            Residual(128),
            Residual(128),
            nn.ReLU(),
            nn.Conv2d(128, 64, 1),
        )
        self.codebook = nn.Embedding(codes, 64)
        nn.init.uniform_(self.codebook.weight, -1 / codes, 1 / codes)
        self.decoder = nn.Sequential(
            nn.Conv2d(64, 128, 3, padding=1),
            Residual(128),
            Residual(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 1, 4, stride=2, padding=1),
        )

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstructions (N, 1, H, W), embedding loss () and codes (N, h, w)."""
        z = self.encoder(slices).permute(0, 2, 3, 1)  # (N, h, w, D)
        flat, e = z.flatten(0, 2), self.codebook.weight
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ e.T + e.square().sum(1)
        codes = distances.argmin(1)
        quantised = self.codebook(codes).view_as(z)
        loss = F.mse_loss(quantised, z.detach()) + 0.25 * F.mse_loss(z, quantised.detach())
        straight_through = z + (quantised - z).detach()
        return self.decoder(straight_through.permute(0, 3, 1, 2)), loss, codes.view(z.shape[:3])


class PaperLayer(nn.Module):
    """One gated layer of both stacks, without dilation; kernels are masked to be causal."""

    keep_row: Tensor
    keep_column: Tensor

    def __init__(self, channels: int, kernel: int, first: bool):
        super().__init__()
        half = kernel // 2
        self.first = first
        self.vertical = nn.Conv2d(channels, 2 * channels, (half + 1, kernel), padding=(half, half))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, half + 1), padding=(0, half))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        keep_row, keep_column = torch.ones(half + 1, 1), torch.ones(half + 1)
        if first:  # mask type A: neither stack sees the code itself
            keep_row[-1], keep_column[-1] = 0, 0
        self.register_buffer("keep_row", keep_row)
        self.register_buffer("keep_column", keep_column)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = v.shape[2:]
        below = F.conv2d(v, self.vertical.weight * self.keep_row, self.vertical.bias, padding=self.vertical.padding)
        below = below[:, :, :rows]
        beside = F.conv2d(
            h, self.horizontal.weight * self.keep_column, self.horizontal.bias, padding=self.horizontal.padding
        )
        gates = self.link(below) + beside[..., :columns]
        out = self.output(gate(gates))
        return gate(below), out if self.first else h + out


def gate(x: Tensor) -> Tensor:
    """Return tanh(a) * sigmoid(b) (arXiv:1606.05328, equation 2)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class PaperPixelCNN(nn.Module):
    """Logits (N, K, h, w) for codes (N, h, w): a 7x7 layer, then 3x3 layers."""

    def __init__(self, codes: int = 512, channels: int = 64, layers: int = 15):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        self.layers = nn.ModuleList(PaperLayer(channels, 7 if i == 0 else 3, i == 0) for i in range(layers))
        self.head = nn.Sequential(nn.Conv2d(channels, 512, 1), nn.ReLU(), nn.Conv2d(512, codes, 1))

    def forward(self, codes: Tensor) -> Tensor:
        v = h = self.embedding(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head(h)


@torch.inference_mode()
def sample_by_full_forwards(model: Callable[[Tensor], Tensor], codes: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Draw the codes at `places` (row, column), with one full forward pass each; all places of a grid make a sample."""
    for row, column in places:
        logits = model(codes)[:, :, row, column]
        codes[:, row, column] = torch.multinomial(logits.softmax(1), 1)[:, 0]
    return codes


class NibabelSlices(torch.utils.data.Dataset[Tensor]):
    """One file per slice, opened at each access."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = cast(nib.Nifti1Image, nib.load(self.paths[index]))
        return torch.from_numpy(image.get_fdata(dtype=np.float32))[None]


def nats_per_code(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy () of logits (N, K, h, w) and codes (N, h, w): ln K for uniform logits.

    The logits are flattened to one row per code first, because a softmax across the channels of a grid is slow.
    """
    return F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2), codes.flatten())
