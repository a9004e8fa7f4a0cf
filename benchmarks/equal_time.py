"""Held-out bits per code of our prior and of the paper's 15 gated layers after equal training time.

All learn the same codes, those of a finished run's training slices without augmentation. Our prior is trained as in
train.py: batches of 8 slices, slice positions, EMA weights. The paper's network is trained twice: with our batch size
and learning rate (better for it than 1e-3 or 3e-3), which compares networks; and with those of public code, which
compares recipes. Optimiser, bfloat16, micro-batches, gradient clipping, warm-up and cosine decay are ours for all. They
take turns: the one that has used least time makes the next update. Each is validated ten times at even intervals, which
is not timed; its best validation counts.

    python benchmarks/equal_time.py --run RUN [--minutes 20] [--split test] [--seed 0]
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, report
from peers import optimiser_step
from reference import PaperPixelCNN, nats_per_code
from torch import Tensor
from tqdm import tqdm

from checkpoints import read_config
from config import TrainConfig
from console import nonempty
from dataset import Slices, batch_indices, load_dataset
from files import Reading
from modules import VQVAE, GatedPixelCNN, PriorConfig
from predict import load_vqvae
from train import extract_codes
from trainer import EMA, make_optimiser, micro_batches
from utils import channels_last, pick_device

RECIPE = TrainConfig()  # of train.py
OURS = 8, RECIPE.prior_learning_rate  # slices per update and peak learning rate, as for the prior in train.py
PUBLIC = 32, 3e-4  # of pixelcnn_baseline.py in github.com/ritheshkumar95/pytorch-vqvae
BATCH_SIZE = 4  # held-out slices at a time
VALIDATIONS = 10

Split = tuple[Tensor, Tensor]  # codes (N, h, w) and positions (N,)


def loss_of(network: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a network's loss as a function of codes and positions, in nats per code."""
    if isinstance(network, GatedPixelCNN):
        return network.nll
    return lambda codes, _: nats_per_code(network(codes), codes)


class Contender:
    """A prior in training, ours or the paper's, with the seconds used and the validation losses reached."""

    def __init__(self, network: torch.nn.Module, batch: int, rate: float):
        self.network, self.batch, self.rate = network, batch, rate
        self.ema = EMA(network, RECIPE.ema_decay) if isinstance(network, GatedPixelCNN) else None
        self.optimiser = make_optimiser(network, RECIPE)
        self.seconds, self.updates = 0.0, 0
        self.validation_bits: list[float] = []  # per code

    def train_update(self, codes: Tensor, positions: Tensor, share: float) -> None:
        """Make one update after `share` of the time, with warm-up and cosine decay of the learning rate."""
        start = time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, (self.updates + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share))
        optimiser_step(self.optimiser, micro_batches(loss_of(self.network), codes, positions), RECIPE.gradient_clip)
        self.updates += 1
        if self.ema:
            self.ema.step(self.updates)
        if codes.is_cuda:
            torch.cuda.synchronize()  # otherwise the next update would be charged for this one
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def validate(self, codes: Tensor, positions: Tensor) -> None:
        """Append the bits per held-out code, in float32 and without dropout."""
        network = (self.ema.network if self.ema else self.network).eval()
        batches = zip(codes.split(BATCH_SIZE), positions.split(BATCH_SIZE))
        nats = sum(loss_of(network)(*batch).item() * len(batch[0]) for batch in batches)
        network.train()
        self.validation_bits.append(nats / len(codes) / math.log(2))


def train_in_turns(contenders: list[Contender], training: Split, held_out: Split, seconds: float, seed: int) -> None:
    """Train each contender for the same number of seconds."""
    codes, positions = training
    with tqdm(total=round(seconds * len(contenders)), unit="s", disable=None) as bar:
        while (one := min(contenders, key=lambda contender: contender.seconds)).seconds < seconds:
            chosen = torch.from_numpy(batch_indices(len(codes), one.batch, seed, one.updates))
            one.train_update(codes[chosen], positions[chosen], one.seconds / seconds)
            bar.update(round(sum(other.seconds for other in contenders)) - bar.n)
            if one.seconds >= seconds * (len(one.validation_bits) + 1) / VALIDATIONS:
                one.validate(*held_out)


def codes_and_positions(vqvae: VQVAE, slices: Slices, device: torch.device) -> Split:
    """Return the codes (N, h, w) and positions (N,) of a split."""
    return extract_codes(vqvae, slices, BATCH_SIZE, device), torch.from_numpy(slices.positions).to(device)


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=nonempty(Path), required=True, help="a run with a trained VQ-VAE")
    parser.add_argument("--minutes", type=float, default=20, help="training time of each prior (default: 20)")
    parser.add_argument("--split", choices=("validate", "test"), default="test", help="held-out slices (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    options = parser.parse_args()
    device = pick_device(options.device)
    given = read_config(options.run)
    vqvae = load_vqvae(options.run, given, device)
    side = vqvae.config.downsampling
    reading = Reading(given.options.axis, given.options.pattern, given.options.table)
    data = load_dataset(given.options.data, given.slice_size, (side, side), given.options.seed, reading=reading)
    training, held_out = (codes_and_positions(vqvae, of, device) for of in (data.train, getattr(data, options.split)))

    torch.manual_seed(options.seed)
    rows, columns = training[0].shape[1:]
    config = PriorConfig(grid=(rows, columns), codebook_size=vqvae.config.codebook_size)
    prior = channels_last(GatedPixelCNN(config), device)
    prior.init_embedding(vqvae.codebook.embeddings)
    contenders = {
        "ours": Contender(prior, *OURS),
        "reference": Contender(PaperPixelCNN(vqvae.config.codebook_size).to(device), *OURS),
        "public": Contender(PaperPixelCNN(vqvae.config.codebook_size).to(device), *PUBLIC),
    }
    train_in_turns(list(contenders.values()), training, held_out, 60 * options.minutes, options.seed)

    bits = {name: min(one.validation_bits) for name, one in contenders.items()}
    updates = {name: one.updates for name, one in contenders.items()}
    lower = {name: 1 - bits["ours"] / bits[name] for name in bits}
    settings = {"run": str(options.run), "split": options.split, "minutes": options.minutes, "seed": options.seed}
    settings["machine"] = machine(device)
    for name, one in contenders.items():
        report(f"equal_time_bits_{name}", bits[name], "bits/code", updates=one.updates, batch=one.batch, **settings)
    print(
        f"In {options.minutes:g} minutes each: ours {bits['ours']:.2f} bits per held-out code after {updates['ours']} "
        f"updates. The paper's network {bits['reference']:.2f} after {updates['reference']} with our batches and rate "
        f"(ours is {lower['reference']:.0%} lower), {bits['public']:.2f} after {updates['public']} with public code's "
        f"({lower['public']:.0%} lower)."
    )


if __name__ == "__main__":
    main()
