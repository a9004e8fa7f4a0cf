"""Quality of the textbook networks and ours after equal updates, on slices averaged down to half their size.

Held-out SSIM of the VQ-VAEs, then held-out nats per code of the priors on the codes of our VQ-VAE. Neither uses
augmentation: this compares networks, not training recipes.

    python benchmarks/quality.py [--data DIR] [--updates 1000] [--prior-updates 500] [--seed 0]
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from common import machine, report
from reference import PaperPixelCNN, TextbookVQVAE, nats_per_code
from torch import Tensor, nn
from tqdm import tqdm

from config import TrainConfig
from console import nonempty
from dataset import Slices, batch_indices, load_dataset
from metrics import reconstruction_metrics
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from trainer import make_optimiser, schedule
from utils import autocast, channels_last, pick_device

BATCH = 32
PRIOR_RATE = 3e-3  # for batches of 32 and few patients; train.py uses other batches and another rate
LogitsOf = Callable[[Tensor, Tensor], Tensor]  # of code grids and their indices in the split


def halved(slices: Slices, device: torch.device) -> Tensor:
    """Return all slices (N, 1, H/2, W/2), each pixel the mean of four."""
    return F.avg_pool2d(slices.batch(np.arange(len(slices))), 2).to(device)


def train(
    model: nn.Module, loss_of: Callable[[int, Tensor], Tensor], data: Tensor, updates: int, rate: float, seed: int
) -> None:
    """Train with the optimiser and schedule of train.py, the same for both networks, without gradient clipping."""
    optimiser = make_optimiser(model, TrainConfig())
    for update in tqdm(range(updates), desc=type(model).__name__, disable=None, file=sys.stderr):
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule(update + 1, updates, TrainConfig().warmup_updates)
        optimiser.zero_grad()
        loss_of(update, torch.from_numpy(batch_indices(len(data), BATCH, seed, update))).backward()
        optimiser.step()


def train_ours(model: VQVAE, slices: Tensor, options: argparse.Namespace) -> None:
    """Train as train.py does, without flips: encoder warm-up without quantisation, then k-means initialisation."""
    warm_up = min(100, options.updates // 6)

    def loss_of(update: int, chosen: Tensor) -> Tensor:
        batch = slices[chosen]
        if update == warm_up:
            with torch.no_grad():
                start = slices[torch.from_numpy(batch_indices(len(slices), 128, options.seed, 0))]
                model.codebook.kmeans_init(model.latents(start).flatten(0, 2))
        with autocast(slices.device):
            reconstructions, embedding_loss, codes, latents = model(batch, quantise=update >= warm_up)
        if update >= warm_up:
            model.codebook.ema_update(latents.flatten(0, 2), codes.flatten())
        return F.mse_loss(reconstructions, batch) + embedding_loss

    train(model, loss_of, slices, options.updates, TrainConfig().learning_rate, options.seed)
    model.eval()


def train_textbook(model: TextbookVQVAE, slices: Tensor, options: argparse.Namespace) -> None:
    """Train without warm-up of the encoder, in float32, with the same learning rates."""

    def loss_of(update: int, chosen: Tensor) -> Tensor:
        reconstructions, embedding_loss, _ = model(slices[chosen])
        return F.mse_loss(reconstructions, slices[chosen]) + embedding_loss

    train(model, loss_of, slices, options.updates, TrainConfig().learning_rate, options.seed)


@torch.no_grad()
def heldout_ssim(model: nn.Module, slices: Tensor) -> float:
    """Return the mean SSIM of reconstructions, in float32."""
    metrics = reconstruction_metrics().to(slices.device)
    for batch in slices.split(BATCH):
        metrics.update(model(batch)[0], batch)
    return metrics.compute()["ssim"].item()


@torch.no_grad()
def heldout_nats(model: nn.Module, logits_of: LogitsOf, codes: Tensor) -> float:
    """Return the nats per code, in float32 and without dropout."""
    model.eval()
    chosen = torch.arange(len(codes), device=codes.device).split(BATCH)
    total = sum(nats_per_code(logits_of(codes[part], part), codes[part]).item() * len(part) for part in chosen)
    model.train()
    return total / len(codes)


def best_nats(
    model: nn.Module,
    logits_of: LogitsOf,
    heldout_logits_of: LogitsOf,
    codes: Tensor,
    heldout: Tensor,
    options: argparse.Namespace,
    rate: float,
) -> float:
    """Train a prior; return the lowest held-out nats per code of ten validations at even intervals."""
    validated = []

    def loss_of(update: int, chosen: Tensor) -> Tensor:
        if update and update % max(1, options.prior_updates // 10) == 0:
            validated.append(heldout_nats(model, heldout_logits_of, heldout))
        with autocast(codes.device):
            return nats_per_code(logits_of(codes[chosen], chosen), codes[chosen])

    train(model, loss_of, codes, options.prior_updates, rate, options.seed)
    return min([*validated, heldout_nats(model, heldout_logits_of, heldout)])


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=nonempty(str), default="phantom", help="folder of slices, or 'phantom' (default)"
    )
    parser.add_argument("--updates", type=int, default=1000, help="updates of each VQ-VAE (default: 1000)")
    parser.add_argument("--prior-updates", type=int, default=500, help="updates of each prior (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    options = parser.parse_args()
    device = pick_device(options.device)
    data = load_dataset(options.data, multiple=(8, 8))
    slices, heldout = halved(data.train, device), halved(data.validate, device)
    settings = {"data": options.data, "slice_size": list(slices.shape[2:]), "batch": BATCH, "seed": options.seed}
    settings["machine"] = machine(device)

    torch.manual_seed(options.seed)
    ours = channels_last(VQVAE(VQVAEConfig(downsampling=4)), device)
    train_ours(ours, slices, options)
    textbook = TextbookVQVAE().to(device)
    train_textbook(textbook, slices, options)
    ssim = heldout_ssim(ours, heldout), heldout_ssim(textbook, heldout)
    report("heldout_ssim_ours", ssim[0], "SSIM", updates=options.updates, **settings)
    report("heldout_ssim_reference", ssim[1], "SSIM", updates=options.updates, **settings)

    codes, heldout_codes = (torch.cat([ours.encode(b) for b in x.split(BATCH)]) for x in (slices, heldout))
    positions, heldout_positions = (torch.from_numpy(x.positions).to(device) for x in (data.train, data.validate))
    rows, columns = codes.shape[1:]
    prior = channels_last(GatedPixelCNN(PriorConfig(grid=(rows, columns), codebook_size=512)), device)
    prior.init_embedding(ours.codebook.embeddings)
    paper = PaperPixelCNN().to(device)
    nats = (
        best_nats(
            prior,
            lambda batch, chosen: prior(batch, positions[chosen]),
            lambda batch, chosen: prior(batch, heldout_positions[chosen]),
            codes,
            heldout_codes,
            options,
            PRIOR_RATE,
        ),
        best_nats(
            paper, lambda batch, _: paper(batch), lambda batch, _: paper(batch), codes, heldout_codes, options, 1e-3
        ),
    )
    report("heldout_nats_ours", nats[0], "nats/code", updates=options.prior_updates, **settings)
    report("heldout_nats_reference", nats[1], "nats/code", updates=options.prior_updates, **settings)
    print(
        f"After equal updates on {options.data}: held-out SSIM {ssim[0]:.3f}, the textbook's {ssim[1]:.3f}; "
        f"{nats[0]:.2f} nats per held-out code, the paper's network {nats[1]:.2f}."
    )


if __name__ == "__main__":
    main()
