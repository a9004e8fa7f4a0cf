"""What is measured of reconstructions, codes and samples.

Slices are (N, 1, H, W) in [-1, 1], codes any shape of integers in [0, K).
"""

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

# The scale of slices, not what one batch happens to span: else a figure depends on its batch.
DATA_RANGE = (-1.0, 1.0)


def reconstruction_metrics() -> MetricCollection:
    """SSIM and PSNR of reconstructions against slices: `.update(reconstructions, slices)`, then `.compute()`.

    SSIM: mean over slices, Gaussian window 11x11 of sigma 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004,
    IEEE Trans. Image Process. 13:600, section III.B), at most 1. PSNR in dB, of the squared error over all
    slices. Both clip to [-1, 1] first.
    """
    return MetricCollection(
        {
            "ssim": StructuralSimilarityIndexMeasure(data_range=DATA_RANGE),
            "psnr": PeakSignalNoiseRatio(data_range=DATA_RANGE),
        }
    )


def code_counts(codes: Tensor, size: int) -> Tensor:
    """How often each of `size` codes occurs: (size,) int64."""
    return torch.bincount(codes.flatten(), minlength=size)


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Share of codes used at least once, in [0, 1], and perplexity exp(entropy), in [1, K], of counts (K,).

    Raises ValueError where nothing was counted.
    """
    if counts.sum() == 0:
        raise ValueError("no codes were counted")
    counts = counts.cpu().double()
    p = counts / counts.sum()
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()
