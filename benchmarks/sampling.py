"""Seconds to sample code grids, against a full forward a code with the same prior.

The full forwards are timed at places spread over the grid and multiplied up: all 2048 would take most of an hour.

    python benchmarks/sampling.py [--device cuda] [--rounds 3] [--profile]
"""

import argparse

import torch
from common import interleave, machine, profile, report
from reference import sample_by_full_forwards

from modules import GatedPixelCNN, PriorConfig
from utils import pick_device

BATCH, GRID = 32, (64, 32)
FORWARDS = 2  # full forwards a timing


def main() -> None:
    """Print the JSON lines and the sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each (default: 3)")
    parser.add_argument("--profile", action="store_true", help="also print where sampling one grid spends its time")
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.manual_seed(0)
    prior = GatedPixelCNN(PriorConfig(grid=GRID)).to(device, memory_format=torch.channels_last).eval()
    positions = torch.rand(BATCH, device=device)
    codes = torch.randint(512, (BATCH, *GRID), device=device)
    places = [(16, 8), (48, 24)][:FORWARDS]
    seconds = interleave(
        {
            "batch": lambda: prior.sample(range(BATCH), positions),
            "one": lambda: prior.sample(range(1), positions[:1]),
            "forwards": lambda: sample_by_full_forwards(lambda c: prior(c, positions), codes, places),
        },
        options.rounds,
    )
    settings = {"batch": BATCH, "grid": list(GRID), "codes": 512, "machine": machine(device)}
    forward = seconds["forwards"] / FORWARDS
    by_forwards = forward * GRID[0] * GRID[1]
    speedup = by_forwards / seconds["batch"]
    report("sampling_seconds", seconds["batch"], "s", **settings)
    report("sampling_one_grid_seconds", seconds["one"], "s", **settings | {"batch": 1})
    report("sampling_by_full_forwards_seconds", by_forwards, "s", **settings, extrapolated_from=FORWARDS)
    report("sampling_speedup", speedup, "times", **settings)
    report("sampling_over_one_forward", seconds["batch"] / forward, "times", **settings)
    if options.profile:
        profile(lambda: prior.sample(range(BATCH), positions))
    print(
        f"On {settings['machine']}: {BATCH} grids of {GRID[0]}x{GRID[1]} codes take {seconds['batch']:.1f} s, "
        f"{seconds['batch'] / forward:.1f} times one forward over them and {speedup:.0f} times as fast as a forward "
        f"a code; one grid takes {seconds['one']:.2f} s."
    )


if __name__ == "__main__":
    main()
