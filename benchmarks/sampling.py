"""Seconds to sample code grids, against one full forward pass per code with the same prior; then to decode slices.

    python benchmarks/sampling.py [--codes 512] [--device cuda] [--rounds 2] [--profile]

At the published sizes, 64x32 codes of 4x4 pixels; the refiner also with the full preset's 32x16 codes of 8x8 pixels.
The full forward passes are timed at a few places of the grid and extrapolated: all 2048 would take most of an hour. So
are pythae and MONAI, if they are installed.
"""

import argparse

import torch
from common import interleave, machine, profile, report
from peers import sampling_steps
from reference import sample_by_full_forwards

import predict
from modules import MICRO_BATCH_CODES, VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import Refiner, RefinerConfig
from utils import channels_last, pick_device

BATCH, DOWNSAMPLING, GRID = 32, 4, (64, 32)  # the published sizes
FULL = VQVAEConfig()  # of the full preset
PLACES = [(16, 8), (48, 24)]  # where full forwards are timed
SLICES = {"cpu": 128, "cuda": 1024}  # sampled and decoded


def make_networks(config: VQVAEConfig, grid: tuple[int, int], device: torch.device) -> predict.Networks:
    """Return networks with random weights for a grid of codes."""
    codes = config.codebook_size
    vqvae = channels_last(VQVAE(config), device).eval()
    prior, guide = (
        channels_last(GatedPixelCNN(PriorConfig(grid=grid, codebook_size=codes)), device).eval() for _ in range(2)
    )
    refiner = channels_last(Refiner(RefinerConfig(config.downsampling, codes)), device).eval()
    return predict.Networks(vqvae, prior, guide, refiner)


def sample_and_decode(networks: predict.Networks, count: int, batch: int, device: torch.device) -> torch.Tensor:
    """Return slices (count, 1, H, W) on the host, sampled in batches as in predict.py."""
    options = predict.parse_options(["--batch-size", str(batch)])
    predict.set_guidance(options, networks)
    return predict.draw_samples(options, networks, range(count), torch.full((count,), 0.5), device).slices


def refine_in_batches(networks: predict.Networks, codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return refined slices (N, 1, 256, 128) of codes (N, h, w), in batches for the device as in predict.py."""
    options = predict.parse_options(["--batch-size", str(len(codes))])
    return predict.refine(options, networks, range(len(codes)), codes, device)


@torch.inference_mode()
def pass_forward(prior: GatedPixelCNN, codes: torch.Tensor, positions: torch.Tensor) -> None:
    """Compute the logits of finished grids of codes (N, h, w): on a CPU in parts that fit its caches."""
    size = len(codes) if codes.is_cuda else max(1, MICRO_BATCH_CODES // codes[0].numel())
    for part in zip(codes.split(size), positions.split(size)):
        prior(*part)


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--codes", type=int, default=512, help="K (default: 512, the paper's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=int, default=2, help="timings of each (default: 2)")
    parser.add_argument("--profile", action="store_true", help="also print the operations that take most time")
    options = parser.parse_args()
    device = pick_device(options.device)
    size = options.codes
    torch.manual_seed(0)
    networks = make_networks(VQVAEConfig(DOWNSAMPLING, codebook_size=size), GRID, device)
    vqvae, prior, guide, refiner = networks
    scale = FULL.downsampling // DOWNSAMPLING
    full_grid = GRID[0] // scale, GRID[1] // scale
    full = make_networks(FULL, full_grid, device)
    positions = torch.rand(BATCH, device=device)
    codes = torch.randint(size, (BATCH, *GRID), device=device)
    full_codes = torch.randint(FULL.codebook_size, (BATCH, *full_grid), device=device)
    count, batch = SLICES[device.type], predict.BATCH_SIZES[device.type]
    batch_positions = torch.rand(batch, device=device)
    batch_codes = torch.randint(FULL.codebook_size, (batch, *full_grid), device=device)
    steps = sampling_steps(GRID, size, device)
    seconds = interleave(
        {
            "batch": lambda: prior.sample(range(BATCH), positions, top_p=predict.TOP_P),
            "all_codes": lambda: prior.sample(range(BATCH), positions),
            "guided": lambda: prior.sample(range(BATCH), positions, top_p=predict.TOP_P, guide=guide),
            "full_batch": lambda: full.prior.sample(
                range(batch), batch_positions, top_p=predict.TOP_P, guide=full.guide
            ),
            "full_forward": lambda: [
                pass_forward(network, batch_codes, batch_positions) for network in (full.prior, full.guide) if network
            ],
            "one": lambda: prior.sample(range(1), positions[:1], top_p=predict.TOP_P),
            "forwards": lambda: sample_by_full_forwards(lambda c: prior(c, positions), codes, PLACES),
            "slices": lambda: sample_and_decode(networks, count, batch, device),
            "decoding": lambda: vqvae.decode(codes),
            "refiner": lambda: refine_in_batches(networks, codes, device),
            "full_refiner": lambda: refine_in_batches(full, full_codes, device),
            "refiner_at_once": lambda: refiner.sample(range(BATCH), codes, vqvae),
            **steps,
        },
        options.rounds,
    )
    settings = {"batch": BATCH, "grid": list(GRID), "codes": size, "machine": machine(device)}
    one = settings | {"batch": 1}
    forward = seconds["forwards"] / len(PLACES)
    by_forwards = forward * GRID[0] * GRID[1]
    speedup = by_forwards / seconds["batch"]
    report("sampling_seconds", seconds["batch"], "s", **settings)
    report("sampling_one_grid_seconds", seconds["one"], "s", **one)
    report("sampling_by_full_forwards_seconds", by_forwards, "s", **settings, extrapolated_from=len(PLACES))
    report("sampling_speedup", speedup, "times", **settings)
    report("sampling_over_one_forward", seconds["batch"] / forward, "times", **settings)
    report("guided_over_unguided_sampling", seconds["guided"] / seconds["batch"], "times", **settings)
    report("top_p_over_all_codes", seconds["batch"] / seconds["all_codes"], "times", **settings)
    report("sampled_and_decoded_seconds", seconds["slices"], "s", **settings | {"batch": batch}, slices=count)
    report("decoding_seconds", seconds["decoding"], "s", **settings)
    report("refiner_seconds", seconds["refiner"], "s", **settings)
    report("refiner_at_once_seconds", seconds["refiner_at_once"], "s", **settings)
    in_full = settings | {"grid": list(full_grid), "codes": FULL.codebook_size}
    over_forward = seconds["full_batch"] / seconds["full_forward"]
    report("full_sampling_over_one_forward", over_forward, "times", **in_full | {"batch": batch})
    report("full_refiner_passes", full.refiner.config.ode_steps, "passes", **in_full)
    report("full_refiner_seconds_per_slice", seconds["full_refiner"] / BATCH, "s", **in_full)
    for name in steps:
        total = seconds[name] * GRID[0] * GRID[1]
        report(f"sampling_one_grid_seconds_{name}", total, "s", **one, extrapolated_from=1)
    if options.profile:
        profile(lambda: prior.sample(range(BATCH), positions, top_p=predict.TOP_P), device)
    print(
        f"On {settings['machine']}: {BATCH} grids of {GRID[0]}x{GRID[1]} codes take {seconds['batch']:.1f} s, "
        f"{seconds['batch'] / forward:.1f} times one forward over them and {speedup:.0f} times as fast as a forward "
        f"pass per code; one grid takes {seconds['one']:.2f} s; decoding {BATCH} takes {seconds['decoding']:.2f} s, "
        f"refined {seconds['refiner']:.1f} s; {count} refined slices {seconds['slices']:.1f} s."
    )


if __name__ == "__main__":
    main()
