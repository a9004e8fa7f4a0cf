"""Noise ceiling of reconstructions: SSIM between two exposures of the same phantom slice.

Two exposures differ in their Rician noise alone. SSIM between an exposure and the noise-free slice is also given: a
network that reconstructs everything but the noise reaches no more.

    python benchmarks/noise_floor.py [--cases 10] [--size 256 128] [--seed 0]
"""

import argparse

import numpy as np
import torch
from common import report
from torch import Tensor

import phantom
from intensity import PERCENTILE
from metrics import reconstruction_metrics


def exposures(seed: int, case: int, size: tuple[int, int]) -> Tensor:
    """Return a noise-free volume and two exposures of it: (3, slices, 1, H, W) in [-1, 1]."""
    drawn = [phantom.draw_volume(seed, case, size=size, exposure=exposure)[0] for exposure in (None, 0, 1)]
    volumes = np.stack(drawn)[:, :, None]
    scale = np.percentile(volumes[1], PERCENTILE)
    return torch.from_numpy(volumes / scale).clamp(0, 1).float() * 2 - 1


def main() -> None:
    """Run the benchmark: print JSON lines and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10, help="patients (default: 10)")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), help="slice size in pixels (default: 256 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the phantom (default: 0)")
    options = parser.parse_args()
    noisy, clean = reconstruction_metrics(), reconstruction_metrics()
    for case in range(options.cases):
        noise_free, one, other = exposures(options.seed, case, tuple(options.size))
        noisy.update(one, other)
        clean.update(noise_free, one)
    settings = {"cases": options.cases, "size": list(options.size), "seed": options.seed}
    two, one = noisy.compute()["ssim"].item(), clean.compute()["ssim"].item()
    report("ssim_of_two_exposures", two, "SSIM", **settings)
    report("ssim_without_noise", one, "SSIM", **settings)
    print(f"SSIM between two exposures of a phantom slice {two:.3f}, between one and the noise-free slice {one:.3f}.")


if __name__ == "__main__":
    main()
