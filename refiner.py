"""The refiner: a flow-matching network that draws the detail which codes leave open. PyTorch only.

Shapes: slices (N, 1, H, W) in [-1, 1]; codes (N, h, w) int64 in [0, K), with h = H / downsampling and
w = W / downsampling.

    refiner = Refiner(RefinerConfig())
    new_slices = refiner.sample(range(16), new_codes, vqvae, seed=0)

Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv:2210.02747
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import AUGMENTATIONS, VQVAE, stream_seed

SEED_OFFSET = 2**32  # added to a seed, which is smaller: the refiner's random streams differ from the prior's
MICRO_BATCH_PIXELS = 2**17  # per forward pass on a CPU, so that its activations stay in the caches
SOLVER_STD = 0.6  # between residuals as strong as their code's (1) and those in smooth places, which are weaker
PRIOR_COUNT = 10  # pseudo-observations: rare codes take the standard deviation of all codes
GREY_LEVEL = 2 / 255  # of the 256 of a slice
GRAIN = 2  # numbers that tell how strong a slice's grain is
GRAIN_JITTER = 1e-6  # added to their variances, which are 0 for equal slices


@dataclass(frozen=True)
class RefinerConfig:
    """Shape of a refiner.

    Attributes:
        downsampling: As in the VQ-VAE.
        codebook_size: As in the VQ-VAE.
        channels: Width of the layers on pixels, which doubles from level to level.
        levels: Resolutions of the U-Net; each has half the rows and columns of the one before.
        time_frequencies: Fourier features of the flow's time.
        ode_steps: Steps of the ODE solver, each one pass of the network.
    """

    downsampling: int = 8
    codebook_size: int = 512
    channels: int = 16
    levels: int = 4
    time_frequencies: int = 8
    ode_steps: int = 4


def to_roots(slices: Tensor) -> Tensor:
    """Return the square roots of intensities, in [0.09, 1.42], of slices in [-1, 1].

    Where there is no signal, the noise of magnitude images is one-sided (Gudbjartsson and Patz 1995, Magn. Reson. Med.
    34:910, eq. 2); its square root is nearly Gaussian. One grey level is added, so that black has a finite slope.
    """
    return (slices + 1 + GREY_LEVEL).sqrt()


def from_roots(roots: Tensor) -> Tensor:
    """Return the slices in [-1, 1] of square roots, clipped: the inverse of `to_roots`."""
    return (roots.clamp(min=0).square() - 1 - GREY_LEVEL).clamp(-1, 1)


def grain_strength(residual: Tensor) -> Tensor:
    """Return the strength of the grain, (N, GRAIN), in residuals (N, 1, H, W) of unit variance; sides of at least 2.

    The logarithms of the finest contrast, below which a fifth of all blocks of 4x4 pixels are, and of the root mean
    square. The contrast is that of a pixel's diagonals; of white noise, its root mean square is the standard deviation.
    """
    contrast = residual.diff(dim=2).diff(dim=3) / 2
    blocks = F.avg_pool2d(contrast.square(), 4, ceil_mode=True).flatten(1)
    smoothest = blocks.sort(1).values[:, blocks.shape[1] // 5]
    strengths = torch.stack([smoothest, residual.square().mean((1, 2, 3))], 1)
    return strengths.clamp(min=1e-6).log() / 2


def spread(time: Tensor, std: float = 1.0) -> Tensor:
    """Return the standard deviation of x = (1 - t) x_0 + t x_1 at times t for independent x_0 of 1 and x_1 of `std`."""
    return ((std * time) ** 2 + (1 - time) ** 2).sqrt()


def gaussian_rate(time: Tensor, std: float = 1.0) -> Tensor:
    """Return c(t) of the flow dx/dt = c(t) x from a Gaussian of 1 to one of `std`: the derivative of log `spread`."""
    return ((1 + std**2) * time - 1) / spread(time, std) ** 2


def solver_times(steps: int) -> list[float]:
    """Return the times at which the solver's steps begin, and 1. Steps are shorter near 0 and 1, where paths bend.

    0.07 and SOLVER_STD are those with which four steps come closest to 64 in the strength of fine detail.
    """
    even = (step / steps for step in range(steps + 1))
    return [time - 0.07 * math.sin(2 * math.pi * time) for time in even]


class RefinerNoise(NamedTuple):
    """What is random in a training pass of the refiner over N slices."""

    start: Tensor  # (N, 1, H, W): the noise that is transported
    time: Tensor  # (N,) in [0, 1], at which the velocity is learned


class Conditioning(NamedTuple):
    """What the refiner is given beside x and the time."""

    pictures: Tensor  # (N, 2, H, W): the decoded slices, and half the logarithm of the residual's standard deviation
    slice_wide: Tensor  # (N, 1 + AUGMENTATIONS + GRAIN): whether a slice was augmented, how, and its grain


class ModulatedBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; it starts as the identity.

    Scale and shift between the two make its features depend on the flow's time (FiLM, Perez et al. 2018,
    arXiv:1709.07871).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return the features (N, C, H, W) of x (N, C, H, W), scaled and shifted by a modulation (N, 2C, 1, 1)."""
        scale, shift = modulation.chunk(2, 1)
        h = self.conv1(F.relu(x))
        return x + self.conv2(F.relu(h + h * scale + shift))


class Refiner(nn.Module):
    """Flow-matching network for p(slice | codes): samples the detail that codes leave open (arXiv:2210.02747).

    Many slices share one code grid, and the MSE decoder returns their mean, which is blurred. The refiner samples the
    standardised residual x_1 = (sqrt(slice) - sqrt(decoded)) / residual_std, of square roots as in `to_roots`: it
    transports noise x_0 along the ODE dx/dt = v(x, t) from t = 0 to 1. It is trained to predict x_1 - x_0 at
    x = (1 - t) x_0 + t x_1 (there, eq. 23 with sigma_min = 0).

    The residual's standard deviation is estimated for each pixel of each code's square in the training slices, so that
    x_1 has unit variance in air as in muscle. If x_1 were Gaussian noise, v would be `gaussian_rate`(t) x; the network
    learns the rest. It is a U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that begins on pixels: thin lines and
    grain are as fine as those, and do not depend on where in a code's square they lie.

    As the prior, the refiner is told in training how a slice was augmented. It is also told how strong the slice's
    grain is, which differs between patients and which codes do not tell; in sampling that is drawn once for each slice.
    """

    residual_std: Tensor  # (K, downsampling^2), of square roots
    grain_mean: Tensor  # (GRAIN,), over the training slices
    grain_factor: Tensor  # (GRAIN, GRAIN), the Cholesky factor of their covariance

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        self.register_buffer("residual_std", torch.ones(config.codebook_size, config.downsampling**2))
        self.register_buffer("grain_mean", torch.zeros(GRAIN))
        identity = torch.zeros(GRAIN, GRAIN).fill_diagonal_(1)  # eye() on the meta device imports TorchDynamo
        self.register_buffer("grain_factor", identity)
        *finer, coarsest = [config.channels * 2**level for level in range(config.levels)]
        self.modulation_widths = [2 * width for width in (*finer, coarsest, coarsest, *reversed(finer))]
        told = 1 + 2 * config.time_frequencies + 1 + AUGMENTATIONS + GRAIN
        self.modulation = nn.Linear(told, sum(self.modulation_widths))
        self.stem = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(map(ModulatedBlock, finer))
        self.shrink = nn.ModuleList(nn.Conv2d(fine, 2 * fine, 2, stride=2) for fine in finer)
        self.bottom = nn.ModuleList(ModulatedBlock(coarsest) for _ in range(2))
        self.grow = nn.ModuleList(nn.Conv2d(2 * fine, fine, 1) for fine in reversed(finer))
        self.up = nn.ModuleList(map(ModulatedBlock, reversed(finer)))
        self.output = nn.Conv2d(config.channels, 1, 3, padding=1)
        for parameter in (*self.modulation.parameters(), *self.output.parameters()):
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def fit_residuals(self, slices: Tensor, decoded: Tensor, codes: Tensor) -> None:
        """Estimate residual_std and the grain's distribution.

        Args:
            slices: Training slices (N, 1, H, W) in [-1, 1].
            decoded: Their decodings (N, 1, H, W).
            codes: Their codes (N, h, w).
        """
        squares = F.pixel_unshuffle((to_roots(slices) - to_roots(decoded)).square(), self.config.downsampling)
        squares = squares.permute(0, 2, 3, 1).flatten(0, 2)
        sums = torch.zeros_like(self.residual_std).index_add_(0, codes.flatten(), squares)
        counts = torch.bincount(codes.flatten(), minlength=len(sums))[:, None]
        variances = (sums + PRIOR_COUNT * squares.mean(0)) / (counts + PRIOR_COUNT)
        self.residual_std.copy_(variances.sqrt().clamp(min=1e-3))  # half a grey level is 1.4e-3 or more
        grains = grain_strength(self.linear_residual(slices, decoded, codes))
        covariance = grains.T.cov(correction=0) + GRAIN_JITTER * torch.eye(GRAIN, device=grains.device)
        self.grain_mean.copy_(grains.mean(0))
        self.grain_factor.copy_(torch.linalg.cholesky(covariance))

    def pixel_std(self, codes: Tensor) -> Tensor:
        """Return the residual's standard deviation at each pixel (N, 1, H, W) for codes (N, h, w)."""
        return F.pixel_shuffle(F.embedding(codes, self.residual_std).permute(0, 3, 1, 2), self.config.downsampling)

    def linear_residual(self, slices: Tensor, decoded: Tensor, codes: Tensor) -> Tensor:
        """Return the residual of intensities (N, 1, H, W), over its standard deviation to first order.

        Noise is as strong in bright tissue as in dark tissue, while its square root is not.
        """
        return (slices - decoded) / (2 * to_roots(decoded) * self.pixel_std(codes))

    def standard_grain(self, slices: Tensor, decoded: Tensor, codes: Tensor) -> Tensor:
        """Return the grain of slices (N, 1, H, W), (N, GRAIN): of mean 0 and covariance 1 over the training slices."""
        deviations = grain_strength(self.linear_residual(slices, decoded, codes)) - self.grain_mean
        return torch.linalg.solve_triangular(self.grain_factor, deviations.T, upper=False).T

    def condition(
        self, codes: Tensor, decoded: Tensor, augmentation: Tensor | None = None, grain: Tensor | None = None
    ) -> Conditioning:
        """Return the conditioning, which does not depend on time.

        Args:
            codes: (N, h, w).
            decoded: Their decoded slices (N, 1, H, W).
            augmentation: (N, AUGMENTATIONS), 0 for a slice that was not augmented; None if none was.
            grain: (N, GRAIN), `standard_grain`; None for the mean.
        """
        if augmentation is None:
            augmentation = decoded.new_zeros(len(decoded), AUGMENTATIONS)
        if grain is None:
            grain = decoded.new_zeros(len(decoded), GRAIN)
        # Interpolation blurs however little it turns: so the network is also told whether a slice was augmented.
        augmented = augmentation.any(1, keepdim=True).to(augmentation)
        pictures = torch.cat([decoded, self.pixel_std(codes).log() / 2], 1)  # both about in [-2, 1]
        return Conditioning(pictures, torch.cat([augmented, augmentation, grain], 1))

    def forward(self, x: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        """Return the velocity (N, 1, H, W) at x (N, 1, H, W), times (N,) in [0, 1] and `condition`'s conditioning."""
        (rows, columns), coarsest = x.shape[2:], 2 ** (self.config.levels - 1)
        pictures = torch.cat([x, given.pictures], 1)
        pictures = F.pad(pictures, (0, -columns % coarsest, 0, -rows % coarsest), mode="replicate")
        h = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        modulations = iter(self.modulate(time, given.slice_wide).to(h.dtype).split(self.modulation_widths, 1))
        skips = []
        for block, shrink in zip(self.down, self.shrink):
            h = block(h, next(modulations))
            skips.append(h)
            h = shrink(h)
        for block in self.bottom:
            h = block(h, next(modulations))
        for block, grow, skip in zip(self.up, self.grow, reversed(skips)):
            h = block(skip + F.interpolate(grow(h), scale_factor=2), next(modulations))
        velocity = self.output(F.relu(h))[..., :rows, :columns]
        return velocity.float() + gaussian_rate(time[:, None, None, None]) * x

    def modulate(self, time: Tensor, slice_wide: Tensor) -> Tensor:
        """Return the modulation of all blocks, side by side, (N, 2C, 1, 1)."""
        phases = time[:, None] * torch.arange(1, self.config.time_frequencies + 1, device=time.device) * torch.pi
        return self.modulation(torch.cat([time[:, None], phases.sin(), phases.cos(), slice_wide], 1))[..., None, None]

    def draw_noise(self, size: Sequence[int]) -> RefinerNoise:
        """Return the noise of a training pass over slices of `size` (N, 1, H, W)."""
        device = self.residual_std.device
        return RefinerNoise(torch.randn(*size, device=device), torch.randn(size[0], device=device).sigmoid())

    def loss(
        self,
        slices: Tensor,
        codes: Tensor,
        vqvae: VQVAE,
        augmentation: Tensor | None = None,
        noise: RefinerNoise | None = None,
    ) -> Tensor:
        """Return the flow-matching loss (): 1.74 for Gaussian residuals of the right standard deviation.

        Times are logit-normal, because the middle of the trajectory is the hardest (Esser et al. 2024,
        arXiv:2403.03206, section 3.1).

        Args:
            slices: (N, 1, H, W) in [-1, 1].
            codes: Their codes (N, h, w).
            vqvae: The frozen VQ-VAE.
            augmentation: How they were augmented, as in `condition`.
            noise: Drawn if it is None.
        """
        decoded = vqvae.decode(codes)
        residual = (to_roots(slices) - to_roots(decoded)) / self.pixel_std(codes)
        start, time = noise or self.draw_noise(slices.shape)
        x = torch.lerp(start, residual, time[:, None, None, None])
        given = self.condition(codes, decoded, augmentation, self.standard_grain(slices, decoded, codes))
        return F.mse_loss(self(x, time, given), residual - start)

    @torch.no_grad()
    def sample(
        self,
        sample_ids: Sequence[int],
        codes: Tensor,
        vqvae: VQVAE,
        seed: int = 0,
        noise_scale: float = 1.0,
        progress: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Draw slices for code grids.

        Integrates the ODE in `ode_steps` steps, each one pass of the network. The velocity of Gaussian residuals of
        standard deviation SOLVER_STD, which is linear in x, is integrated exactly; the rest by the two-step
        Adams-Bashforth method (an exponential integrator, Hochbruck and Ostermann 2010, Acta Numer. 19:209, section
        2.5).

        Args:
            sample_ids: N integers; each sample has its own random stream, as in `GatedPixelCNN.sample`.
            codes: (N, h, w); their device computes.
            vqvae: The VQ-VAE that the codes belong to.
            seed: Of all samples, in [0, 2^32).
            noise_scale: Scale of all that is random, in [0, 1]. Below 1 the detail is smoother; at 0 it is
                deterministic.
            progress: Called at each step with the slices (N, 1, H, W) that the network expects at the end: x_1 at the
                end of a straight line of the present velocity.

        Returns:
            Slices (N, 1, H, W) in [-1, 1].
        """
        with torch.autocast(codes.device.type, enabled=False):  # bfloat16 would round the result to half a grey level
            decoded = vqvae.decode(codes)
        x, grains = torch.empty_like(decoded), decoded.new_empty(len(decoded), GRAIN)
        for own, own_grain, sample_id in zip(x, grains, sample_ids):
            stream = torch.Generator(x.device).manual_seed(stream_seed(seed + SEED_OFFSET, sample_id))
            own.normal_(generator=stream)
            own_grain.normal_(generator=stream)
        conditioning = self.condition(codes, decoded, grain=noise_scale * grains)
        roots, std = to_roots(decoded), self.pixel_std(codes)
        y, step = noise_scale * x, 0.0  # x = spread(t) y
        slope: Tensor | None = None
        for begin, end in pairwise(solver_times(self.config.ode_steps)):
            time = torch.full((len(y),), begin, device=y.device)
            t = time[:, None, None, None]
            x = spread(t, SOLVER_STD) * y
            velocity = self(x, time, conditioning)
            if progress:
                progress(from_roots(roots + std * (x + (1 - t) * velocity)))
            before, slope = slope, (velocity - gaussian_rate(t, SOLVER_STD) * x) / spread(t, SOLVER_STD)
            step_before, step = step, end - begin
            y = y + step * slope
            if before is not None:
                y = y + step**2 / (2 * step_before) * (slope - before)
        return from_roots(roots + std * SOLVER_STD * y)
