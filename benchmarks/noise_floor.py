"""How like two exposures of the same phantom slice are: what a perfect reconstruction of one from the other reaches.

SSIM between two slices that differ in Rician noise alone, and between one and the slice without noise, which is the
most that a network can reach that gives back all but the noise.

    python benchmarks/noise_floor.py [--cases 10] [--size 256 128] [--seed 0]
"""

import argparse

import numpy as np
import torch
from common import report
from torch import Tensor

import phantom
from dataset import PERCENTILE
from metrics import reconstruction_metrics


def exposures(seed: int, case: int, size: tuple[int, int]) -> Tensor:
    """A volume without noise, and with noise drawn twice: (3, slices, 1, H, W) in [-1, 1]."""
    drawn = [phantom.draw_volume(seed, case, size=size, exposure=exposure)[0] for exposure in (None, 0, 1)]
    volumes = np.stack(drawn)[:, :, None]
    scale = np.percentile(volumes[1], PERCENTILE)
    return torch.from_numpy(volumes / scale).clamp(0, 1).float() * 2 - 1


def main() -> None:
    """Print the JSON lines and the sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10, help="patients (default: 10)")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), help="of a slice (default: 256 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the phantom (default: 0)")
    options = parser.parse_args()
    noisy, clean = reconstruction_metrics(), reconstruction_metrics()
    for case in range(options.cases):
        without, one, other = exposures(options.seed, case, tuple(options.size))
        noisy.update(one, other)
        clean.update(without, one)
    settings = {"cases": options.cases, "size": list(options.size), "seed": options.seed}
    two, one = noisy.compute()["ssim"].item(), clean.compute()["ssim"].item()
    report("ssim_of_two_exposures", two, "SSIM", **settings)
    report("ssim_without_noise", one, "SSIM", **settings)
    print(f"SSIM of two exposures of a phantom slice {two:.3f}, of one with the slice without noise {one:.3f}.")


if __name__ == "__main__":
    main()
