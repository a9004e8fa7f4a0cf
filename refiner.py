"""The refiner: a flow-matching network that draws the detail which codes leave open. PyTorch only.

Shapes: slices (N, 1, H, W) in [-1, 1]; codes (N, h, w) int64 in [0, K), with h = H / downsampling and
w = W / downsampling.

    refiner = Refiner(RefinerConfig())
    new_slices = refiner.sample(range(16), new_codes, vqvae, seed=0)

Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv:2210.02747
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import AUGMENTATIONS, VQVAE, ResidualBlock, stream_seed

SEED_OFFSET = 2**32  # added to a seed, which is smaller: the refiner's random streams differ from the prior's
MICRO_BATCH_PIXELS = 2**17  # per forward pass on a CPU, so that its activations stay in the caches
PRIOR_COUNT = 10  # pseudo-observations: rare codes take the standard deviation of all codes


@dataclass(frozen=True)
class RefinerConfig:
    """Shape of a refiner.

    Attributes:
        downsampling: As in the VQ-VAE.
        codebook_size: As in the VQ-VAE.
        embedding_dim: As in the VQ-VAE.
        channels: Width of the layers on the code grid.
        residual_blocks: Residual blocks on the code grid.
        hidden_channels: Width inside a residual block.
        pixel_features: Channels per pixel that the code grid hands to the layers on pixels.
        pixel_channels: Width of the layers on pixels.
        time_frequencies: Fourier features of the flow's time.
        ode_steps: Steps of the ODE solver, each one pass of the network.
    """

    downsampling: int = 4
    codebook_size: int = 2048
    embedding_dim: int = 64
    channels: int = 128
    residual_blocks: int = 4
    hidden_channels: int = 64
    pixel_features: int = 14
    pixel_channels: int = 32
    time_frequencies: int = 8
    ode_steps: int = 8


def spread(time: Tensor) -> Tensor:
    """Return the standard deviation of x = (1 - t) x_0 + t x_1 at times t for independent x_0, x_1 of variance 1."""
    return (time**2 + (1 - time) ** 2).sqrt()


def gaussian_rate(time: Tensor) -> Tensor:
    """Return c(t) of the flow dx/dt = c(t) x between two Gaussians of variance 1: the derivative of log `spread`."""
    return (2 * time - 1) / spread(time) ** 2


class Conditioning(NamedTuple):
    """What the refiner is given beside x and the time."""

    decoded: Tensor  # (N, 1, H, W)
    features: Tensor  # (N, C, h, w) of `decoded`, of the residual's standard deviation, and of the embeddings
    augmentation: Tensor  # (N, 1 + AUGMENTATIONS): whether a slice was augmented, and how


class Refiner(nn.Module):
    """Flow-matching network for p(slice | codes): samples the detail that codes leave open (arXiv:2210.02747).

    Many slices share one code grid, and the MSE decoder returns their mean, which is blurred. The refiner samples the
    standardised residual x_1 = (slice - decoded) / residual_std: it transports noise x_0 along the ODE dx/dt = v(x, t)
    from t = 0 to 1. It is trained to predict x_1 - x_0 at x = (1 - t) x_0 + t x_1 (there, eq. 23 with sigma_min = 0).

    The residual's standard deviation is estimated for each pixel of each code's square in the training slices, so that
    x_1 has unit variance in air as in muscle. If x_1 were Gaussian noise, v would be `gaussian_rate`(t) x; the network
    learns the rest. Most convolutions run on the code grid, as in the encoder. The last three run on pixels, because
    grain does not depend on where in a square it lies. As the prior, the refiner is told in training how a slice was
    augmented.
    """

    residual_std: Tensor  # (K, downsampling^2)

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        square, c = config.downsampling**2, config.channels
        self.register_buffer("residual_std", torch.ones(config.codebook_size, square))
        self.stem = nn.Conv2d(square, c, 3, padding=1)
        self.context = nn.Conv2d(2 * square + config.embedding_dim, c, 3, padding=1, bias=False)
        inputs = 1 + 2 * config.time_frequencies + 1 + AUGMENTATIONS
        self.modulation = nn.Linear(inputs, 2 * config.residual_blocks * c)
        self.blocks = nn.ModuleList(ResidualBlock(c, config.hidden_channels) for _ in range(config.residual_blocks))
        self.to_pixels = nn.Conv2d(c, square * config.pixel_features, 1)
        self.pixels = nn.Sequential(
            nn.Conv2d(config.pixel_features + 2, config.pixel_channels, 3, padding=1),
            nn.ReLU(inplace=True),  # saves memory, of which pixels take most
            nn.Conv2d(config.pixel_channels, config.pixel_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.pixel_channels, 1, 3, padding=1),
        )
        for parameter in self.pixels[-1].parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def fit_residual_std(self, slices: Tensor, decoded: Tensor, codes: Tensor) -> None:
        """Estimate residual_std from training slices, their decodings (N, 1, H, W), and their codes (N, h, w)."""
        squares = F.pixel_unshuffle((slices - decoded).square(), self.config.downsampling)  # (N, s*s, h, w)
        squares = squares.permute(0, 2, 3, 1).flatten(0, 2)
        sums = torch.zeros_like(self.residual_std).index_add_(0, codes.flatten(), squares)
        counts = torch.bincount(codes.flatten(), minlength=len(sums))[:, None]
        variances = (sums + PRIOR_COUNT * squares.mean(0)) / (counts + PRIOR_COUNT)
        self.residual_std.copy_(variances.sqrt().clamp(min=1e-3))  # half a grey level of 256 is 4e-3

    def pixel_std(self, codes: Tensor) -> Tensor:
        """Return the residual's standard deviation at each pixel (N, 1, H, W) for codes (N, h, w)."""
        return F.pixel_shuffle(F.embedding(codes, self.residual_std).permute(0, 3, 1, 2), self.config.downsampling)

    def condition(
        self, codes: Tensor, decoded: Tensor, vqvae: VQVAE, augmentation: Tensor | None = None
    ) -> Conditioning:
        """Return the conditioning, which does not depend on time.

        Args:
            codes: (N, h, w).
            decoded: (N, 1, H, W).
            vqvae: The VQ-VAE that the codes belong to.
            augmentation: (N, AUGMENTATIONS), 0 for a slice that was not augmented; None if none was.
        """
        pictures = decoded, self.pixel_std(codes).log() / 2  # both about in [-2, 1]
        squares = [F.pixel_unshuffle(picture, self.config.downsampling) for picture in pictures]
        features = self.context(torch.cat([*squares, vqvae.embed(codes)], 1))
        if augmentation is None:
            augmentation = decoded.new_zeros(len(decoded), AUGMENTATIONS)
        # Interpolation blurs however little it turns: so the network is also told whether a slice was augmented.
        augmented = augmentation.any(1, keepdim=True).to(augmentation)
        return Conditioning(decoded, features, torch.cat([augmented, augmentation], 1))

    def forward(self, x: Tensor, time: Tensor, given: Conditioning) -> Tensor:
        """Return the velocity (N, 1, H, W) at x (N, 1, H, W), times (N,) in [0, 1] and `condition`'s conditioning."""
        side = self.config.downsampling
        phases = time[:, None] * torch.arange(1, self.config.time_frequencies + 1, device=time.device) * torch.pi
        # FiLM (Perez et al. 2018, arXiv:1709.07871): time and augmentation scale and shift the features of each block.
        told = torch.cat([time[:, None], phases.sin(), phases.cos(), given.augmentation], 1)
        modulation = self.modulation(told)[:, :, None, None]
        h = self.stem(F.pixel_unshuffle(x, side)) + given.features
        for block, film in zip(self.blocks, modulation.to(h.dtype).chunk(self.config.residual_blocks, 1)):
            scale, shift = film.chunk(2, 1)
            h = block(h + h * scale + shift)
        pixels = F.pixel_shuffle(F.relu(self.to_pixels(F.relu(h))), side)
        pixels = torch.cat([pixels, x.to(pixels.dtype), given.decoded.to(pixels.dtype)], 1)
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # PixelShuffle loses it; convolutions need it
        return self.pixels(pixels).float() + gaussian_rate(time[:, None, None, None]) * x

    def loss(self, slices: Tensor, codes: Tensor, vqvae: VQVAE, augmentation: Tensor | None = None) -> Tensor:
        """Return the flow-matching loss (): 1.74 for Gaussian residuals of the right standard deviation.

        Times are logit-normal, because the middle of the trajectory is the hardest (Esser et al. 2024,
        arXiv:2403.03206, section 3.1).

        Args:
            slices: (N, 1, H, W) in [-1, 1].
            codes: Their codes (N, h, w).
            vqvae: The frozen VQ-VAE.
            augmentation: How they were augmented, as in `condition`.
        """
        decoded = vqvae.decode(codes)
        residual = (slices - decoded) / self.pixel_std(codes)
        noise = torch.randn_like(residual)
        time = torch.randn(len(slices), device=slices.device).sigmoid()
        x = torch.lerp(noise, residual, time[:, None, None, None])
        given = self.condition(codes, decoded, vqvae, augmentation)
        return F.mse_loss(self(x, time, given), residual - noise)

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

        Integrates the ODE in `ode_steps` steps, each one pass of the network. The velocity of Gaussian residuals, which
        is linear in x, is integrated exactly; the rest by the two-step Adams-Bashforth method (an exponential
        integrator, Hochbruck and Ostermann 2010, Acta Numer. 19:209, section 2.5).

        Args:
            sample_ids: N integers; each sample has its own random stream, as in `GatedPixelCNN.sample`.
            codes: (N, h, w); their device computes.
            vqvae: The VQ-VAE that the codes belong to.
            seed: Of all samples, in [0, 2^32).
            noise_scale: Scale of the initial noise, in [0, 1]. Below 1 the detail is smoother; at 0 it is
                deterministic.
            progress: Called at each step with the slices (N, 1, H, W) that the network expects at the end: x_1 at the
                end of a straight line of the present velocity.

        Returns:
            Slices (N, 1, H, W) in [-1, 1].
        """
        with torch.autocast(codes.device.type, enabled=False):  # bfloat16 would round the result to half a grey level
            decoded = vqvae.decode(codes)
        conditioning = self.condition(codes, decoded, vqvae)
        x = torch.empty_like(decoded)
        for own, sample_id in zip(x, sample_ids):
            stream = torch.Generator(x.device).manual_seed(stream_seed(seed + SEED_OFFSET, sample_id))
            own.normal_(generator=stream)
        y, slope = noise_scale * x, None  # x = spread(t) y, and spread is 1 at both ends
        for step in range(self.config.ode_steps):
            time = torch.full((len(y),), step / self.config.ode_steps, device=y.device)
            t = time[:, None, None, None]
            x = spread(t) * y
            velocity = self(x, time, conditioning)
            if progress:
                progress((decoded + self.pixel_std(codes) * (x + (1 - t) * velocity)).clamp(-1, 1))
            before, slope = slope, (velocity - gaussian_rate(t) * x) / spread(t)
            y = y + (slope if before is None else 1.5 * slope - 0.5 * before) / self.config.ode_steps
        return (decoded + self.pixel_std(codes) * y).clamp(-1, 1)
