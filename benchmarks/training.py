"""Seconds per update of our networks against the textbook's, at the published sizes: 64x32 codes of 4x4 pixels.

    python benchmarks/training.py [--codes 512] [--device cuda] [--rounds 3] [--profile]

Also the machine's rate in a 3x3 convolution of 128 channels on the code grid, and the share of it that our updates
reach; pythae and MONAI, if they are installed; on a GPU the full preset's 5000 updates of the VQ-VAE by train.py.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleave, machine, profile, report
from peers import optimiser_step, vqvae_updates
from reference import PaperPixelCNN, TextbookVQVAE
from torch.utils.flop_counter import FlopCounterMode

import train
import trainer
from config import TrainConfig
from dataset import load_dataset
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import MICRO_BATCH_PIXELS, Refiner, RefinerConfig
from utils import autocast, channels_last, pick_device

BATCH, SIZE, DOWNSAMPLING, GRID = 32, (256, 128), 4, (64, 32)  # the published sizes


def our_vqvae_update(slices: torch.Tensor, size: int) -> Callable[[], None]:
    """Return an update of our VQ-VAE as in train.py, with quantisation."""
    device = slices.device
    model = channels_last(VQVAE(VQVAEConfig(DOWNSAMPLING, codebook_size=size)), device)
    optimiser = trainer.make_optimiser(model, TrainConfig())
    slices = slices.contiguous(memory_format=torch.channels_last)

    def update() -> None:
        with autocast(device):
            reconstructions, embedding_loss, codes, latents = model(slices)
        optimiser_step(optimiser, [F.mse_loss(reconstructions, slices) + embedding_loss], TrainConfig().gradient_clip)
        model.codebook.ema_update(latents.flatten(0, 2), codes.flatten())

    return update


def textbook_vqvae_update(slices: torch.Tensor, codes: int) -> Callable[[], None]:
    """Return an update of the textbook VQ-VAE in float32."""
    model = TextbookVQVAE(codes).to(slices.device)
    optimiser = torch.optim.Adam(model.parameters())

    def update() -> None:
        reconstructions, embedding_loss, _ = model(slices)
        optimiser_step(optimiser, [F.mse_loss(reconstructions, slices) + embedding_loss])

    return update


def our_prior_update(size: int, device: torch.device) -> Callable[[], None]:
    """Return an update of our prior as in train.py, but with 32 slices and without encoding, for K = `size`."""
    model = channels_last(GatedPixelCNN(PriorConfig(grid=GRID, codebook_size=size)), device)
    optimiser = trainer.make_optimiser(model, TrainConfig())
    codes, positions = torch.randint(size, (BATCH, *GRID), device=device), torch.rand(BATCH, device=device)

    def update() -> None:
        optimiser_step(optimiser, trainer.micro_batches(model.nll, codes, positions), TrainConfig().gradient_clip)

    return update


def paper_prior_update(size: int, device: torch.device) -> Callable[[], None]:
    """Return an update of the paper's PixelCNN in float32."""
    model = PaperPixelCNN(size).to(device)
    optimiser = torch.optim.Adam(model.parameters())
    codes = torch.randint(size, (BATCH, *GRID), device=device)

    def update() -> None:
        optimiser_step(optimiser, [F.cross_entropy(model(codes), codes)])

    return update


def convolution(device: torch.device) -> Callable[[], None]:
    """Return forward and backward of the convolution that gives the machine's rate, in the data type of training."""
    layer = channels_last(torch.nn.Conv2d(128, 128, 3, padding=1), device)
    x = torch.randn(BATCH, 128, *GRID, device=device).to(memory_format=torch.channels_last).requires_grad_()

    def update() -> None:
        with autocast(device):
            y = layer(x)
        y.float().sum().backward()

    return update


def our_refiner_update(slices: torch.Tensor, codes: int) -> Callable[[], None]:
    """Return an update of the refiner as in train.py, including encoding and decoding, but with 32 slices."""
    vqvae = channels_last(VQVAE(VQVAEConfig(DOWNSAMPLING, codebook_size=codes)), slices.device).eval()
    model = channels_last(Refiner(RefinerConfig(DOWNSAMPLING, codebook_size=codes)), slices.device)
    optimiser = trainer.make_optimiser(model, TrainConfig())

    def update() -> None:
        with autocast(slices.device):
            grids = vqvae.encode(slices)
        losses = trainer.micro_batches(
            lambda slices, codes: model.loss(slices, codes, vqvae), slices, grids, elements=MICRO_BATCH_PIXELS
        )
        optimiser_step(optimiser, losses, TrainConfig().gradient_clip)

    return update


def flops(update: Callable[[], object]) -> int:
    """Return the floating-point operations of convolutions and matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops()


def recipe(device: torch.device) -> tuple[float, float]:
    """Run 5000 updates of the VQ-VAE by train.py on the phantom at 256x128, whose slices are drawn before.

    Returns:
        Seconds, and the peak of the GPU's memory in GiB.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--run", f"{folder}/run", "--images", f"{folder}/images", "--device", str(device)]
        load_dataset("phantom", SIZE)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        train.main([*options, "--prior-updates", "1", "--refiner-updates", "1"])
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--codes", type=int, default=512, help="K (default: 512, the paper's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each (default: 3)")
    parser.add_argument("--profile", action="store_true", help="also print the operations that take most time")
    options = parser.parse_args()
    device = pick_device(options.device)
    settings = {"batch": BATCH, "grid": list(GRID), "codes": options.codes, "machine": machine(device)}
    size, slices = options.codes, torch.rand(BATCH, 1, *SIZE, device=device) * 2 - 1
    peers = vqvae_updates(slices, size)
    limit = convolution(device)
    found = []
    for name, ours, others in (
        ("vqvae", our_vqvae_update(slices, size), {"reference": textbook_vqvae_update(slices, size), **peers}),
        ("prior", our_prior_update(size, device), {"reference": paper_prior_update(size, device)}),
        ("refiner", our_refiner_update(slices, size), {}),
    ):
        seconds = interleave({"ours": ours, "convolution": limit, **others}, options.rounds)
        share = flops(ours) / seconds["ours"] / (flops(limit) / seconds["convolution"])
        report(f"{name}_update_seconds", seconds["ours"], "s", **settings)
        for other in others:
            report(f"{name}_update_seconds_{other}", seconds[other], "s", **settings)
        report(f"{name}_update_share_of_limit", share, "of the convolution's rate", **settings)
        says = f"an update of the {name} takes {seconds['ours']:.4g} s at {share:.0%} of the machine's convolution rate"
        if others:
            speedup = seconds["reference"] / seconds["ours"]
            report(f"{name}_update_speedup", speedup, "times", **settings)
            says += f", {speedup:.1f} times as fast as the textbook's"
        found.append(says)
        if options.profile:
            profile(ours, device)
    report("convolution_rate", flops(limit) / seconds["convolution"] / 1e9, "GFLOP/s", **settings)
    if device.type == "cuda":
        seconds_taken, memory = recipe(device)
        report("recipe_seconds", seconds_taken, "s", updates=5000, **settings)
        report("recipe_memory", memory, "GiB", updates=5000, **settings)
        found.append(
            f"the full preset's 5000 updates of the VQ-VAE take {seconds_taken:.0f} s with validation and figures"
        )
    print(f"On {settings['machine']}: {'; '.join(found)}.")


if __name__ == "__main__":
    main()
