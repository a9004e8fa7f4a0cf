"""Seconds an update of both networks, ours against the textbook's, at the published recipe's sizes.

python benchmarks/training.py [--device cuda] [--rounds 5] [--profile]
"""

import argparse

import torch
import torch.nn.functional as F
from common import interleave, machine, profile, report
from reference import PaperPixelCNN, TextbookVQVAE

from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from train import code_loss
from utils import autocast, pick_device

BATCH, SIZE, GRID = 32, (256, 128), (64, 32)


def our_vqvae_update(device: torch.device):
    """One update of stage 1 as train.py makes it, codes in use."""
    model = VQVAE(VQVAEConfig()).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    slices = (torch.rand(BATCH, 1, *SIZE, device=device) * 2 - 1).to(memory_format=torch.channels_last)

    def update():
        with autocast(device):
            reconstructions, embedding_loss, _ = model(slices)
        descend(optimiser, F.mse_loss(reconstructions, slices) + embedding_loss)

    return update


def textbook_vqvae_update(device: torch.device):
    """The same of the textbook's, in float32."""
    model = TextbookVQVAE().to(device)
    optimiser = torch.optim.Adam(model.parameters())
    slices = torch.rand(BATCH, 1, *SIZE, device=device) * 2 - 1

    def update():
        reconstructions, embedding_loss, _ = model(slices)
        descend(optimiser, F.mse_loss(reconstructions, slices) + embedding_loss)

    return update


def our_prior_update(device: torch.device):
    """One update of stage 2 as train.py makes it, without the encoding."""
    model = GatedPixelCNN(PriorConfig(grid=GRID)).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    codes, positions = torch.randint(512, (BATCH, *GRID), device=device), torch.rand(BATCH, device=device)

    def update():
        with autocast(device):
            loss = code_loss(model(codes, positions), codes)
        descend(optimiser, loss)

    return update


def paper_prior_update(device: torch.device):
    """The same of the paper's network, in float32."""
    model = PaperPixelCNN().to(device)
    optimiser = torch.optim.Adam(model.parameters())
    codes = torch.randint(512, (BATCH, *GRID), device=device)

    def update():
        descend(optimiser, F.cross_entropy(model(codes), codes))

    return update


def descend(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Backward and step."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def main() -> None:
    """Print the JSON lines and the sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each (default: 5)")
    parser.add_argument("--profile", action="store_true", help="also print where an update of ours spends its time")
    options = parser.parse_args()
    device = pick_device(options.device)
    settings = {"batch": BATCH, "grid": list(GRID), "codes": 512, "machine": machine(device)}
    found = []
    for name, ours, reference in (
        ("vqvae", our_vqvae_update(device), textbook_vqvae_update(device)),
        ("prior", our_prior_update(device), paper_prior_update(device)),
    ):
        seconds = interleave({"ours": ours, "reference": reference}, options.rounds)
        ratio = seconds["reference"] / seconds["ours"]
        report(f"{name}_update_seconds", seconds["ours"], "s", **settings)
        report(f"{name}_update_seconds_reference", seconds["reference"], "s", **settings)
        report(f"{name}_update_speedup", ratio, "times", **settings)
        found.append(
            f"an update of the {name} takes {seconds['ours']:.2f} s, {ratio:.1f} times as fast as the textbook's"
        )
        if options.profile:
            profile(ours)
    print(f"On {settings['machine']}: {'; '.join(found)}.")


if __name__ == "__main__":
    main()
