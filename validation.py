"""Losses and metrics of validation slices: over the batches of all processes, each of which measures its own."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from dataset import Slices
from metrics import code_counts, codebook_use, reconstruction_metrics
from modules import VQVAE, GatedPixelCNN
from refiner import MICRO_BATCH_PIXELS, Refiner, RefinerNoise
from trainer import device_batches, micro_batches
from utils import autocast, seed_update


@torch.no_grad()
def evaluate_vqvae(model: VQVAE, batches: Iterable[Tensor]) -> tuple[dict[str, float], Tensor]:
    """Return losses, SSIM, PSNR and codebook use over batches of slices, and how often each code was used (K,)."""
    model.eval()
    device = model.codebook.embeddings.device
    metrics = reconstruction_metrics().to(device)
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=device)
    sums, count = np.zeros(2), 0
    for batch in batches:
        with autocast(device):
            reconstructions, embedding_loss, codes, _ = model(batch)
        sums += len(batch) * np.array([F.mse_loss(reconstructions, batch).item(), embedding_loss.item()])
        count += len(batch)
        counts += code_counts(codes, model.config.codebook_size)
        metrics.update(reconstructions, batch)
    distributed.add_up(counts)
    with distributed.connected():  # torchmetrics adds up by itself
        measured = {name: value.item() for name, value in metrics.compute().items()}
    *losses, total = distributed.add_up_numbers(*sums, count)
    reconstruction_loss, embedding_loss = (loss / total for loss in losses)
    used, perplexity = codebook_use(counts)
    return {
        "reconstruction_loss": reconstruction_loss,
        "embedding_loss": embedding_loss,
        "total_loss": reconstruction_loss + embedding_loss,
        **measured,
        "codes_used": used,
        "perplexity": perplexity,
    }, counts


@torch.no_grad()
def extract_codes(model: VQVAE, slices: Slices, batch_size: int, device: torch.device) -> Tensor:
    """Return the codes (N, h, w) of a split, on the device."""
    codes = []
    for batch in device_batches(slices.batches(batch_size), device):
        with autocast(device):
            codes.append(model.encode(batch))
    return torch.cat(codes)


@torch.no_grad()
def evaluate_prior(model: GatedPixelCNN, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the mean negative log-likelihood of codes (N, h, w) at positions (N,), in nats per code."""
    model.eval()
    total, count = 0.0, 0.0
    for codes, positions in batches:
        total += sum(loss.item() for loss in micro_batches(model.nll, codes, positions)) * codes.numel()
        count += codes.numel()
    total, count = distributed.add_up_numbers(total, count)
    return total / count


@torch.no_grad()
def evaluate_refiner(model: Refiner, vqvae: VQVAE, batches: Iterable[Tensor], seed: int) -> float:
    """Return the mean loss over batches of slices, for the same noise and times at each call."""
    seed_update(seed, "refiner validation", 0)
    total, count = 0.0, 0.0

    def loss_of(slices: Tensor, codes: Tensor, *noise: Tensor) -> Tensor:
        return model.loss(slices, codes, vqvae, noise=RefinerNoise(*noise))

    for batch in batches:
        with autocast(batch.device):
            codes = vqvae.encode(batch)
        losses = micro_batches(loss_of, batch, codes, *model.draw_noise(batch.shape), elements=MICRO_BATCH_PIXELS)
        total += sum(loss.item() for loss in losses) * len(batch)
        count += len(batch)
    total, count = distributed.add_up_numbers(total, count)
    return total / count
