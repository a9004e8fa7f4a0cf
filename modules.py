"""The networks, in the order of the data: encoder, codebook, decoder, VQ-VAE; prior and its sampler. See refiner.py.

Shapes: slices (N, 1, H, W) in [-1, 1]; latents (N, h, w, D); codes (N, h, w) int64 in [0, K), with h = H / downsampling
and w = W / downsampling. PyTorch only: no files, no printing.

    vqvae = VQVAE(VQVAEConfig())
    codes = vqvae.encode(slices)
    prior = GatedPixelCNN(PriorConfig(grid=codes.shape[1:]))
    new_codes = prior.sample(range(16), torch.full((16,), 0.5), seed=0)
    decoded = vqvae.decode(new_codes)

van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937 (VQ-VAE)
van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328 (gated PixelCNN)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

# Logits or distances (rows x K) per chunk: they fit a CPU's caches, and 256 MB of a GPU's memory.
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**21, 2**26
MICRO_BATCH_CODES = 8192  # codes per forward pass on a CPU, so that its activations stay in the caches
MIN_TEMPERATURE = 1e-6  # logits divided by less overflow
UNGUIDED_SHARE = 1 / 8  # of the rows, the first ones: if they are guided too, samples are more alike
AUGMENTATIONS = 6  # parameters that describe how a slice was augmented


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a VQ-VAE.

    Attributes:
        downsampling: Side of the square of pixels that one code stands for.
        channels: Width of the encoder and the decoder.
        residual_blocks: Residual blocks of each of them.
        hidden_channels: Width inside a residual block.
        codebook_size: K, the number of embeddings.
        embedding_dim: D, the length of a latent and of an embedding.
        commitment_cost: beta of arXiv:1711.00937, eq. 3.
        codebook_decay: Decay of the codebook's EMA per update (there, appendix A.1).
        dead_code_threshold: Codes used less than this share of the mean are dead, and replaced.
    """

    downsampling: int = 8
    channels: int = 128
    residual_blocks: int = 2
    hidden_channels: int = 64
    codebook_size: int = 512
    embedding_dim: int = 64
    commitment_cost: float = 0.25
    codebook_decay: float = 0.99
    dead_code_threshold: float = 0.3


@dataclass(frozen=True)
class PriorConfig:
    """Shape of a gated PixelCNN.

    Attributes:
        grid: Rows and columns of a code grid.
        codebook_size: K, the number of codes.
        left_right: The axis of the grid that runs left-right: 0 along the rows' numbers, 1 along the columns'.
        channels: Width of both stacks.
        dilation_cycles: Cycles of layers through the dilations; the receptive field of each covers the whole grid.
        head_channels: Width of the layer before the logits.
        dropout: Share of channels dropped in each layer.
        code_noise: Share of the previous codes that are replaced at random in training, at most.
        position_frequencies: Fourier features of the slice position.
    """

    grid: tuple[int, int] = (32, 16)
    codebook_size: int = 512
    left_right: int = 0
    channels: int = 64
    dilation_cycles: int = 2
    head_channels: int = 256
    dropout: float = 0.1
    code_noise: float = 0.1
    position_frequencies: int = 4


# ---------------------------------------------------------------- encoder


class ResidualBlock(nn.Module):
    """Pre-activation residual block: a 3x3 convolution to `hidden` channels, a 1x1 convolution back."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def encoder(config: VQVAEConfig) -> nn.Sequential:
    """Map slices (N, 1, H, W) to latents (N, D, h, w).

    The stem moves each square of pixels into channels (space-to-depth) instead of striding over the full resolution.
    All convolutions then run on the code grid, where they are dense and fast.
    """
    s, c = config.downsampling, config.channels
    return nn.Sequential(
        nn.PixelUnshuffle(s),  # (N, s*s, h, w)
        nn.Conv2d(s * s, c, 3, padding=1),
        *(ResidualBlock(c, config.hidden_channels) for _ in range(config.residual_blocks)),
        nn.ReLU(),
        nn.Conv2d(c, config.embedding_dim, 1),
    )


# ---------------------------------------------------------------- codebook


def rows_per_chunk(rows: Tensor, size: int) -> int:
    """Return how many rows of `size` logits are computed at once."""
    return max(1, (GPU_CHUNK_LOGITS if rows.is_cuda else CHUNK_LOGITS) // size)


class Share(NamedTuple):
    """The share of a batch's latents that this process has; other processes have the others."""

    start: int  # number of the first in the batch
    batch: int  # number of latents of the whole batch
    add_up: Callable[[Tensor], object]  # replaces a tensor by its sum over all processes


class Codebook(nn.Module):
    """Vector quantiser: K embeddings of D numbers, each latent replaced by the nearest (arXiv:1711.00937, eq. 1 and 2).

    The quantised axis is the last: latents (..., D) = (65536, 64) and K = 512 give codes (65536,). The embeddings are
    an EMA of the latents assigned to them (there, appendix A.1). Cluster sizes start at one, together with the sums, so
    an unused embedding keeps its place instead of being divided by zero. Dead codes, used less than `dead_threshold`
    times the mean, are replaced by latents of the batch: without this the codebook collapses.
    """

    embeddings: Tensor  # (K, D)
    cluster_sizes: Tensor  # (K,)
    sums: Tensor  # (K, D)

    def __init__(self, size: int, dim: int, decay: float, dead_threshold: float):
        super().__init__()
        self.decay, self.dead_threshold = decay, dead_threshold
        self.register_buffer("embeddings", nn.init.normal_(torch.empty(size, dim)))
        self.register_buffer("cluster_sizes", torch.ones(size))
        self.register_buffer("sums", self.embeddings.clone())

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the codes (M,) of latents (M, D): argmin |z - e|^2 = argmax (z.e - |e|^2 / 2)."""
        half_norms = -0.5 * self.embeddings.square().sum(1)
        chunks = latents.split(rows_per_chunk(latents, len(self.embeddings)))
        scores = (torch.addmm(half_norms, chunk, self.embeddings.T) for chunk in chunks)
        return torch.cat([chunk.argmax(1) for chunk in scores])

    @torch.no_grad()
    def ema_update(self, latents: Tensor, codes: Tensor, share: Share | None = None) -> None:
        """Take one step of the EMA, then replace dead codes.

        Args:
            latents: (M, D), of a whole batch.
            codes: Theirs (M,).
            share: Given if latents and codes are a share of the batch: the step is then that of the whole batch.
        """
        ones = torch.ones(len(codes), device=codes.device)
        sizes = torch.zeros_like(self.cluster_sizes).index_add_(0, codes, ones)  # bincount would synchronise a GPU
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        # The latents that take the place of dead codes; drawn for all codes, as counting would synchronise too.
        chosen = torch.randint(share.batch if share else len(latents), self.cluster_sizes.shape, device=latents.device)
        if share:
            chosen = chosen - share.start
            here = (chosen >= 0) & (chosen < len(latents))
            drawn = torch.where(here[:, None], latents[chosen.where(here, 0)], 0)
            statistics = torch.cat([sizes[:, None], sums, drawn], 1)
            share.add_up(statistics)
            sizes, sums, drawn = statistics[:, 0], *statistics[:, 1:].chunk(2, 1)
        else:
            drawn = latents[chosen]
        self.cluster_sizes.lerp_(sizes, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean = self.cluster_sizes.mean()
        dead = self.cluster_sizes < self.dead_threshold * mean
        # A replaced code starts at the mean size: it has over 100 updates to find its use.
        self.cluster_sizes.copy_(torch.where(dead, mean, self.cluster_sizes))
        self.sums.copy_(torch.where(dead[:, None], mean * drawn, self.sums))
        self.embeddings.copy_(self.sums / self.cluster_sizes[:, None])

    @torch.no_grad()
    def kmeans_init(self, latents: Tensor, iterations: int = 10) -> None:
        """Initialise the embeddings by k-means on latents (M, D), from latents drawn at random."""
        self.embeddings.copy_(latents[torch.randint(len(latents), self.cluster_sizes.shape, device=latents.device)])
        decay, self.decay = self.decay, 0.0
        for _ in range(iterations):
            self.ema_update(latents, self.nearest(latents))
        self.decay = decay


# ---------------------------------------------------------------- decoder


def decoder(config: VQVAEConfig) -> nn.Sequential:
    """Map embeddings (N, D, h, w) to slices (N, 1, H, W): the encoder mirrored."""
    s, c = config.downsampling, config.channels
    return nn.Sequential(
        nn.Conv2d(config.embedding_dim, c, 3, padding=1),
        *(ResidualBlock(c, config.hidden_channels) for _ in range(config.residual_blocks)),
        nn.ReLU(),
        nn.Conv2d(c, s * s, 3, padding=1),
        nn.PixelShuffle(s),
    )


# ---------------------------------------------------------------- VQ-VAE


class VQVAE(nn.Module):
    """Encoder, codebook, decoder (arXiv:1711.00937, section 3)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.codebook = Codebook(
            config.codebook_size, config.embedding_dim, config.codebook_decay, config.dead_code_threshold
        )
        self.decoder = decoder(config)

    def forward(self, slices: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode, quantise and decode.

        The embedding loss is the commitment term of eq. 3, commitment_cost * |z - sg[e]|^2, a mean over latents and
        dimensions. The codebook term |sg[z] - e|^2 is minimised by `Codebook.ema_update` instead, which is left to the
        caller.

        Args:
            slices: (N, 1, H, W) in [-1, 1].
            quantise: False passes the latents on as they are, to warm up the encoder; the embedding loss is then 0.

        Returns:
            Reconstructions (N, 1, H, W), embedding loss (), codes (N, h, w) and latents (N, h, w, D).
        """
        z = self.latents(slices)
        if not quantise:
            codes = torch.zeros(z.shape[:3], dtype=torch.int64, device=z.device)
            return self.decoder(z.permute(0, 3, 1, 2)).float(), z.new_zeros(()), codes, z.detach()
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = self.codebook.nearest(z.flatten(0, 2)).view(z.shape[:3])
            e = F.embedding(codes, self.codebook.embeddings)
        embedding_loss = self.config.commitment_cost * F.mse_loss(z, e)
        straight_through = z + (e - z).detach()  # straight-through estimator: value of e, gradient of z
        return self.decoder(straight_through.permute(0, 3, 1, 2)).float(), embedding_loss, codes, z.detach()

    def latents(self, slices: Tensor) -> Tensor:
        """Return the encoder's output (N, h, w, D), float32, for slices (N, 1, H, W)."""
        return self.encoder(slices).float().permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, slices: Tensor) -> Tensor:
        """Return the codes (N, h, w) of slices (N, 1, H, W) in [-1, 1]. Never updates the codebook."""
        latents = self.latents(slices)
        with torch.autocast(latents.device.type, enabled=False):
            return self.codebook.nearest(latents.flatten(0, 2)).view(latents.shape[:3])

    def embed(self, codes: Tensor) -> Tensor:
        """Return the embeddings (N, D, h, w) of codes (N, h, w)."""
        return F.embedding(codes, self.codebook.embeddings).permute(0, 3, 1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return slices (N, 1, H, W), clipped to [-1, 1], for codes (N, h, w): the MSE-optimal mean, hence blurred."""
        return self.decoder(self.embed(codes)).float().clamp(-1, 1)


# ---------------------------------------------------------------- prior


def dilations(distance: int) -> list[int]:
    """Return dilations that add up to a distance: powers of two, the last one shortened.

    Every smaller distance is the sum of some of them.

    >>> dilations(30)
    [1, 2, 4, 8, 15]
    """
    steps: list[int] = []
    while sum(steps) < distance:
        steps.append(min(2 ** len(steps), distance - sum(steps)))
    return steps


def gated_linear_unit(gates: Tensor) -> Tensor:
    """Return a * sigmoid(b) for gates [a, b] (N, 2C, h, w)."""
    return F.glu(gates.permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2)  # along channels-last memory: faster backward


class GatedLayer(nn.Module):
    """One layer of both stacks (arXiv:1606.05328, figure 2), with dilated kernels.

        vertical, at row r        horizontal, at column c
        r-dv  x . x . x           x . o
              . . . . .           |   |
        r     x . o . x        c-dh   c

    The inputs of both stacks are shifted by one (GatedPixelCNN.features), so that the taps at r and c already lie in
    the past. Gates are a * sigmoid(b) (Dauphin et al. 2017, arXiv:1612.08083, eq. 1) where the paper has
    tanh(a) * sigmoid(b): cheaper, and the gradient does not vanish where a is large.
    """

    def __init__(self, channels: int, rows: int, columns: int, left: int):
        super().__init__()
        self.rows, self.columns, self.left = rows, columns, left
        self.vertical = nn.Conv2d(channels, 2 * channels, (2, 3), dilation=(rows, columns))
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, 2), dilation=(1, left), bias=False)
        self.output = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, v: Tensor, h: Tensor, dropout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map both stacks (N, C, h, w) to both stacks; `dropout` (N, C) scales whole channels."""
        v = v + gated_linear_unit(self.vertical(F.pad(v, (self.columns, self.columns, self.rows, 0))))
        gates = self.horizontal(F.pad(h, (self.left, 0, 0, 0))) + self.link(v)  # (N, 2C, h, w)
        x = gated_linear_unit(gates)
        return v, h + self.output(x if dropout is None else x * dropout[:, :, None, None])


class LinearCrossEntropy(torch.autograd.Function):
    """A linear layer and the sum of its cross-entropy, in chunks.

    Each chunk's logits are overwritten in place by their gradient, so that the logits of a batch are never stored or
    computed twice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, needs_grad: bool) -> Tensor:
        """Return nats () for x (M, C), weight (K, C), bias (K,) and codes (M,)."""
        w, nats = weight.to(x.dtype), bias.new_zeros(())
        grad_x, grad_weight, grad_bias = [], torch.zeros_like(weight), torch.zeros_like(bias)
        rows = rows_per_chunk(x, len(bias))
        for chunk, target in zip(x.split(rows), codes[:, None].split(rows)):
            logits = torch.mm(chunk, w.T).to(bias.dtype).add_(bias)
            normaliser = logits.logsumexp(1, keepdim=True)
            nats += (normaliser - logits.gather(1, target)).sum()
            if not needs_grad:
                continue
            grad_logits = logits.sub_(normaliser).exp_()  # softmax
            grad_logits.scatter_add_(1, target, -torch.ones_like(normaliser))  # less one-hot
            grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(x.dtype)
            grad_weight += torch.mm(grad_logits.T, chunk)
            grad_x.append(torch.mm(grad_logits, w))
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, grad_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        return *(gradient * scale for gradient in ctx.saved_tensors), None, None


class PriorNoise(NamedTuple):
    """What is random in a training pass of the prior over N slices."""

    replaced: Tensor  # (N, rows, columns) bool: which previous codes are wrong
    wrong_codes: Tensor  # (N, rows, columns) int64, in their place
    dropout: Tensor  # (N, layers, C): 0 for a channel that is dropped, 1 / (1 - dropout) for the others


class GatedPixelCNN(nn.Module):
    """Autoregressive prior: p(codes) = product over the grid of p(code | previous codes).

    van den Oord et al. 2016, arXiv:1606.05328.

    Rows are drawn from the midline of the body outward, one on the one side, then its mirror image on the other. So
    both hips are drawn together, and an organ grows outward from its middle. (If the grid's columns and not its rows
    succeed one another from left to right, it is transposed.)

    The vertical stack sees all rows above, the horizontal stack the codes to the left in its own row: there is no blind
    spot (there, section 2.2). Dilations double from layer to layer, so that the receptive field of each cycle through
    them covers every previous code of the grid. Both stacks are conditioned on the row and column (learned embeddings)
    and on the slice position (Fourier features), NaN where it is unknown. In training they are also conditioned on how
    the slice was augmented, so that samples, drawn without that, look like slices that were not augmented (non-leaking
    augmentation, Karras et al. 2022, arXiv:2206.00364, appendix F.2).

    In training some of the previous codes are replaced at random, a share of them that differs from slice to slice: in
    sampling, an unlikely code does not lead astray all that follow, and slices are not learned by heart. The prior is
    told that share, as it is told the augmentation, so that samples, drawn with a share of 0, are not as uncertain as
    codes after wrong ones (conditioning augmentation, Ho et al. 2022, arXiv:2106.15282, section 3).
    """

    order: Tensor  # (rows,), the rows of the grid in the order in which they are drawn

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        self.rows, self.columns = rows, columns = config.grid if config.left_right == 0 else config.grid[::-1]
        c = config.channels
        by_distance = sorted(range(rows), key=lambda row: abs(2 * row - (rows - 1)))  # from the midline
        self.register_buffer("order", torch.tensor(by_distance), persistent=False)
        self.embedding = nn.Embedding(config.codebook_size, c)
        self.row_embedding = nn.Parameter(nn.init.normal_(torch.empty(c, rows, 1), std=0.1))
        self.column_embedding = nn.Parameter(nn.init.normal_(torch.empty(c, 1, columns), std=0.1))
        self.position = nn.Linear(1 + 2 * config.position_frequencies, c, bias=False)
        self.augmentation = nn.Linear(AUGMENTATIONS, c, bias=False)
        self.replaced_share = nn.Linear(1, c, bias=False)
        for told in (self.augmentation, self.replaced_share):
            nn.init.zeros_(told.weight)  # random weights would drown what the codes say
        # The inputs are already shifted by one row and one column (see `features`).
        up, left, sideways = dilations(rows - 2), dilations(columns - 2), dilations(columns - 1)
        depth = max(len(up), len(left), len(sideways), 1)
        up, left, sideways = (steps + [1] * (depth - len(steps)) for steps in (up, left, sideways))
        self.layers = nn.ModuleList(
            GatedLayer(c, *steps) for steps in list(zip(up, sideways, left)) * config.dilation_cycles
        )
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c, config.head_channels, 1),
            nn.ReLU(),
            nn.Conv2d(config.head_channels, config.codebook_size, 1),
        )

    @torch.no_grad()
    def init_embedding(self, embeddings: Tensor) -> None:
        """Initialise the embedding of codes from the codebook (K, D), standardised and projected to C.

        Codes with similar decodings then start close together, which a few dozen patients could not teach.
        """
        standardised = (embeddings - embeddings.mean(0)) / embeddings.std()
        d, c = embeddings.shape[1], self.config.channels
        projection = torch.eye(d) if d == c else torch.randn(d, c) / d**0.5
        self.embedding.weight.copy_(standardised @ projection.to(standardised))

    def in_order(self, grids: Tensor) -> Tensor:
        """Return grids (..., h, w) with their rows in the order in which they are drawn (..., rows, columns)."""
        grids = grids if self.config.left_right == 0 else grids.transpose(-2, -1)
        return grids.index_select(-2, self.order)

    def in_place(self, grids: Tensor) -> Tensor:
        """Return grids (..., h, w) of rows in the order in which they were drawn (..., rows, columns)."""
        grids = grids.index_select(-2, self.order.argsort())
        return grids if self.config.left_right == 0 else grids.transpose(-2, -1)

    def position_features(self, position: Tensor) -> Tensor:
        """Return the conditioning (N, C) on slice positions (N,); zero where a position is NaN."""
        frequencies = torch.arange(1, self.config.position_frequencies + 1, device=position.device) * torch.pi
        phases = position[:, None] * frequencies
        known = torch.cat([torch.ones_like(position)[:, None], phases.sin(), phases.cos()], 1)
        features = known.where(position[:, None].isfinite(), 0)
        return self.position(features.to(self.row_embedding.dtype))

    def forward(self, codes: Tensor, position: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Return the logits (N, K, h, w) of each code given the previous ones.

        Args:
            codes: (N, h, w) int64.
            position: (N,) in [0, 1], NaN where it is unknown.
            augmentation: (N, AUGMENTATIONS), of mean 0 and variance 1; None for slices that were not augmented.
        """
        return self.in_place(self.head[-1](self.features(self.in_order(codes), position, augmentation)))

    def nll(
        self, codes: Tensor, position: Tensor, augmentation: Tensor | None = None, noise: PriorNoise | None = None
    ) -> Tensor:
        """Return the mean negative log-likelihood () in nats per code, the training loss.

        Args:
            codes: As in `forward`, like the next two.
            position: (N,).
            augmentation: (N, AUGMENTATIONS) or None.
            noise: As in `features`.
        """
        codes = self.in_order(codes)
        rows = self.features(codes, position, augmentation, noise).permute(0, 2, 3, 1).flatten(0, 2)
        output = cast(nn.Conv2d, self.head[-1])
        given = rows, output.weight[:, :, 0, 0], output.bias, codes.flatten(), torch.is_grad_enabled()
        return LinearCrossEntropy.apply(*given) / codes.numel()

    @torch.no_grad()
    def code_nll(self, codes: Tensor, position: Tensor) -> Tensor:
        """Return the negative log-likelihood of each code (N, h, w) in nats; arguments as in `forward`."""
        codes = self.in_order(codes)
        rows = self.features(codes, position, None).permute(0, 2, 3, 1).flatten(0, 2)
        output = cast(nn.Conv2d, self.head[-1])
        count = rows_per_chunk(rows, self.config.codebook_size)
        nll = [
            F.cross_entropy(F.linear(chunk, output.weight[:, :, 0, 0], output.bias).float(), own, reduction="none")
            for chunk, own in zip(rows.split(count), codes.flatten().split(count))
        ]
        return self.in_place(torch.cat(nll).view(codes.shape))

    def features(
        self, codes: Tensor, position: Tensor, augmentation: Tensor | None, noise: PriorNoise | None = None
    ) -> Tensor:
        """Return the features before the output layer (N, head_channels, rows, columns).

        Args:
            codes: (N, rows, columns), `in_order`.
            position: (N,), as in `forward`.
            augmentation: (N, AUGMENTATIONS) or None, as in `forward`.
            noise: Of training; None draws it in training mode, and is without noise otherwise.
        """
        if self.training and noise is None:
            noise = self.draw_noise(len(codes))
        conditioning = self.position_features(position)  # (N, C)
        if noise and self.config.code_noise:
            codes = torch.where(noise.replaced, noise.wrong_codes, codes)
            share = noise.replaced.to(conditioning.dtype).mean((1, 2))[:, None]  # (N, 1)
            conditioning = conditioning + self.replaced_share(share / self.config.code_noise)
        x = self.embedding(codes).permute(0, 3, 1, 2)  # (N, C, rows, columns)
        if augmentation is not None:
            conditioning = conditioning + self.augmentation(augmentation)
        place_embedding = self.row_embedding + self.column_embedding + conditioning[:, :, None, None]
        if torch.is_autocast_enabled(x.device.type):  # else the stacks stay float32, and each layer casts them anew
            dtype = torch.get_autocast_dtype(x.device.type)
            x, place_embedding = x.to(dtype), place_embedding.to(dtype)
        v = F.pad(x, (0, 0, 1, 0))[:, :, :-1] + place_embedding  # row r holds row r-1
        h = F.pad(x, (1, 0, 0, 0))[..., :-1] + place_embedding  # column c holds column c-1
        masks = noise.dropout.to(h.dtype).unbind(1) if noise else [None] * len(self.layers)
        for layer, mask in zip(self.layers, masks):
            v, h = layer(v, h, mask)
        return self.head[:-1](h)

    def draw_noise(self, count: int) -> PriorNoise:
        """Return noise for N = `count` slices: up to `code_noise` of the codes replaced, `dropout` of the channels."""
        grid, device = (count, self.rows, self.columns), self.row_embedding.device
        replaced = torch.rand(count, 1, 1, device=device) * self.config.code_noise > torch.rand(grid, device=device)
        wrong_codes = torch.randint(self.config.codebook_size, grid, device=device)
        kept = 1 - self.config.dropout
        dropout = [torch.ones(count, self.config.channels, device=device) for _ in self.layers]
        if self.config.dropout:
            for mask in dropout:
                mask.bernoulli_(kept)
        return PriorNoise(replaced, wrong_codes, torch.stack(dropout, 1) / kept)

    @torch.inference_mode()
    def sample(
        self,
        sample_ids: Sequence[int],
        position: Tensor,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        guide: "GatedPixelCNN | None" = None,
        guidance: float = 1.0,
        progress: Callable[[int], None] = lambda row: None,
    ) -> Tensor:
        """Draw code grids.

        A guide, this prior at an early stage of its training, makes the same mistakes, but more of them. Codes are
        drawn with a probability proportional to prior^(1 + guidance) / guide^guidance: further away from those mistakes
        than the prior got by training (autoguidance, Karras et al. 2024, arXiv:2406.02507, section 3). The first rows,
        which decide what kind of slice it will be, are not guided, so that samples stay as varied (guidance in an
        interval, Kynkäänniemi et al. 2024, arXiv:2404.07724). The nucleus remains that of the prior, so that no code is
        drawn only because the guide thinks even less of it.

        Each sample has its own random stream, seeded by (seed, its id), so it does not depend on the samples beside it.
        A code is drawn as the first of exponential clocks, whose rates are the probabilities, to ring. This is
        batch-invariant: unlike sampling from the inverse CDF, rounding in a cumulative sum cannot change the draw.

        Args:
            sample_ids: N integers.
            position: (N,) in [0, 1], NaN for unknown; its device computes.
            seed: Of all samples, in [0, 2^32).
            temperature: Divides the logits; at least MIN_TEMPERATURE.
            top_p: In (0, 1]. Nucleus sampling: keeps the fewest codes that together have at least this probability
                (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).
            guide: Of the same configuration; None for the prior's own probabilities.
            guidance: At least 0, which is as without a guide.
            progress: Called with the number of each row, in drawing order, as it begins.

        Returns:
            Codes (N, h, w) int64.

        Raises:
            ValueError: If temperature or top_p is out of range.
        """
        if temperature < MIN_TEMPERATURE or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature {temperature} must be at least {MIN_TEMPERATURE}, and top_p {top_p} in (0, 1]"
            )
        device = position.device
        streams = [torch.Generator(device).manual_seed(stream_seed(seed, sample_id)) for sample_id in sample_ids]
        noise = torch.empty(len(streams), self.columns, self.config.codebook_size, device=device)
        weight = torch.zeros((), device=device)  # of guidance in this row

        def start_row(row: int) -> None:
            progress(row)
            if row == int(UNGUIDED_SHARE * self.rows):
                weight.fill_(guidance)
            for own, stream in zip(noise, streams):
                own.uniform_(generator=stream)
            noise.clamp_(min=torch.finfo(noise.dtype).tiny)  # uniform_ draws 0 too, whose logarithm is infinite
            noise.log_().neg_()  # exponential noise

        def draw(column: int, logits: Tensor, guide_logits: Tensor | None = None) -> Tensor:
            own = guided = logits / temperature
            if guide_logits is not None:
                guided = (logits + weight * (logits - guide_logits)) / temperature
            return first_in_nucleus(guided, own, noise[:, column], top_p)

        return self.generate(position, start_row, draw, guide if guidance else None)

    @torch.inference_mode()
    def generate(
        self,
        position: Tensor,
        start_row: Callable[[int], None],
        draw: Callable[..., Tensor],
        guide: "GatedPixelCNN | None" = None,
    ) -> Tensor:
        """Return code grids (N, h, w), generated code by code.

        Computes what `forward` does, without dropout, and nothing twice (RowSampler). On a GPU a row is captured once
        as a CUDA graph and replayed: launching its small kernels one by one would take longer than running them.

        Args:
            position: (N,), as in `sample`.
            start_row: Called with the number of each row, in drawing order, before it is drawn.
            draw: Maps a column, this prior's logits (N, K) and, if there is a guide, its logits to codes (N,).
            guide: As in `sample`.
        """
        sampler = RowSampler([self] if guide is None else [self, guide], position, draw)
        rows = []
        with torch.cuda.device_of(position):  # does nothing on a CPU
            sample_row = sampler.capture_graph() if position.is_cuda else sampler.sample_row
            for row in range(self.rows):
                start_row(row)
                sample_row()
                rows.append(sampler.codes.clone())
        return self.in_place(torch.stack(rows, 1))


# ---------------------------------------------------------------- sampler


class RowSampler:
    """Incremental sampling, row by row, from one prior or from several that condition on the same codes.

    All state that passes from row to row, including the row's number, stays at fixed addresses, so that a captured row
    can be replayed.
    """

    def __init__(self, priors: Sequence[GatedPixelCNN], position: Tensor, draw: Callable[..., Tensor]):
        self.columns, self.draw = priors[0].columns, draw
        self.row = torch.zeros(1, dtype=torch.int64, device=position.device)
        self.codes = self.row.new_zeros(len(position), self.columns)
        self.priors = [CachedPrior(prior, position) for prior in priors]

    def sample_row(self) -> None:
        """Draw the next row of codes into `codes` (N, w)."""
        for prior in self.priors:
            prior.begin_row(self.row)
        for column in range(self.columns):
            codes = self.draw(column, *(prior.logits(column) for prior in self.priors))
            self.codes[:, column] = codes
            for prior in self.priors:
                prior.take(codes)
        for prior in self.priors:
            prior.end_row(self.codes)
        self.row += 1

    def capture_graph(self) -> Callable[[], None]:
        """Return `sample_row` as a captured CUDA graph: one launch per row instead of some two thousand."""
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            self.sample_row()  # libraries initialise themselves in a first call, which cannot be captured
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.sample_row()
        self.reset()
        return graph.replay

    def reset(self) -> None:
        """Go back to the first row."""
        self.row.zero_()
        for prior in self.priors:
            prior.reset()


class CachedPrior:
    """A prior that is asked for one code after another: the vertical stack runs once per row, the other once per code.

    Caches what later steps need: `dilation` rows of each vertical layer, one row of each horizontal layer (Ramachandran
    et al. 2017, arXiv:1704.06001). Memory grows with N, not with the grid squared.
    """

    place_embedding: Tensor  # (w, N, C), of the present row, like all below
    links: list[Tensor]  # (w, N, 2C) for each layer, from the vertical to the horizontal stack
    past_inputs: list[list[Tensor]]  # (N, C) for each layer and each column that has been drawn
    previous_code: Tensor  # (N, C), embedded

    def __init__(self, prior: GatedPixelCNN, position: Tensor):
        self.prior = prior
        self.layers = cast(list[GatedLayer], list(prior.layers))
        self.head = cast(nn.Conv2d, prior.head[1]), cast(nn.Conv2d, prior.head[3])
        self.matrices = [horizontal_matrices(layer) for layer in self.layers]
        self.vertical_matrices = [vertical_matrices(layer) for layer in self.layers]
        self.conditioning = prior.position_features(position)  # (N, C)
        n, c, columns = *self.conditioning.shape, prior.columns
        self.previous_row = self.conditioning.new_zeros(columns, n, c)  # embedded
        self.row_caches = [  # padded
            self.conditioning.new_zeros(layer.rows, columns + 2 * layer.columns, n, c) for layer in self.layers
        ]

    def begin_row(self, row: Tensor) -> None:
        """Begin a row, whose number is (1,)."""
        prior = self.prior
        place_embedding = prior.row_embedding.index_select(1, row) + prior.column_embedding  # (C, 1, w)
        self.place_embedding = place_embedding.permute(2, 1, 0) + self.conditioning
        self.links = self.vertical_row(self.previous_row + self.place_embedding, row)
        self.past_inputs = [[] for _ in self.layers]
        self.previous_code = torch.zeros_like(self.conditioning)

    def logits(self, column: int) -> Tensor:
        """Return the logits (N, K) of the next code of the row."""
        h = self.previous_code + self.place_embedding[column]
        for layer, link, inputs, (present, past, output) in zip(
            self.layers, self.links, self.past_inputs, self.matrices
        ):
            gates = link[column].addmm_(h, present)  # (N, 2C)
            if column >= layer.left:
                gates.addmm_(inputs[column - layer.left], past)
            inputs.append(h)
            h = torch.addmm(h, F.glu(gates, 1), output)
        first, last = self.head
        hidden = F.linear(h.relu(), first.weight[:, :, 0, 0], first.bias).relu()
        return F.linear(hidden, last.weight[:, :, 0, 0], last.bias)

    def take(self, codes: Tensor) -> None:
        """Take the codes (N,) that were drawn."""
        self.previous_code = self.prior.embedding(codes)

    def end_row(self, codes: Tensor) -> None:
        """End the row, whose codes are (N, w)."""
        self.previous_row.copy_(self.prior.embedding(codes).transpose(0, 1))

    def vertical_row(self, v: Tensor, row: Tensor) -> list[Tensor]:
        """Run the vertical stack on a row (w, N, C) of number (1,); return its links (w, N, 2C) for each layer."""
        columns, links = len(v), []
        for layer, cache, matrices in zip(self.layers, self.row_caches, self.vertical_matrices):
            oldest = row % layer.rows  # holds row - dilation, and gives way to this row
            rows = cache.index_select(0, oldest)[0], F.pad(v, (0, 0, 0, 0, layer.columns, layer.columns))
            cache.index_copy_(0, oldest, rows[1][None])
            taps = [part[tap * layer.columns :][:columns].flatten(0, 1) for part in rows for tap in range(3)]
            gates = torch.addmm(cast(Tensor, layer.vertical.bias), taps[0], matrices[0])  # (w * N, 2C)
            for tap, matrix in zip(taps[1:], matrices[1:]):
                gates.addmm_(tap, matrix)
            v = v + F.glu(gates.unflatten(0, (columns, -1)), 2)
            links.append(F.linear(v, layer.link.weight[:, :, 0, 0], layer.link.bias))
        return links

    def reset(self) -> None:
        """Forget all rows."""
        for state in (self.previous_row, *self.row_caches):
            state.zero_()


def horizontal_matrices(layer: GatedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return the horizontal stack's weights as matrices: present and past (C, 2C) each, output (C, C)."""
    past, present = layer.horizontal.weight[:, :, 0].unbind(2)
    return present.T.contiguous(), past.T.contiguous(), layer.output.weight[:, :, 0, 0].T.contiguous()


def vertical_matrices(layer: GatedLayer) -> Tensor:
    """Return the vertical stack's weights as matrices (6, C, 2C): of the row above from left to right, then its own."""
    return layer.vertical.weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def first_in_nucleus(guided: Tensor, logits: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """Return the codes (N,) that are drawn from `guided` logits (N, K), in the nucleus: of all codes if top_p is 1.

    A clock rings first, in noise / probability, with its share of all rates, if the noise (N, K) is exponential. The
    nucleus is the fewest codes of probability top_p by `logits` (N, K), with ties: a code is inside if the more likely
    ones together have a probability below top_p. Only the code that would be drawn is tested, so that nothing needs to
    be sorted.
    """
    speeds = guided.softmax(1) / noise
    if top_p == 1:
        return speeds.argmax(1)
    if logits.is_cuda:  # a captured graph has no loop that ends when a condition holds, and a GPU sorts fast
        return speeds.masked_fill(outside_nucleus(logits, top_p), -1).argmax(1)
    probabilities = logits.softmax(1)
    while True:
        drawn = speeds.argmax(1, keepdim=True)
        own = probabilities.gather(1, drawn)
        outside = (probabilities * (probabilities > own)).sum(1, keepdim=True) >= top_p
        if not outside.any():
            return drawn[:, 0]
        # With this code, all codes that are as likely or less likely lie outside.
        speeds = speeds.masked_fill(outside & (probabilities <= own), -1)


def outside_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return which of the codes (N, K) lie outside the nucleus, see `first_in_nucleus`."""
    ordered = logits.sort(1, descending=True).values
    probabilities = ordered.softmax(1)
    kept = (probabilities.cumsum(1) - probabilities < top_p).sum(1, keepdim=True)
    return logits < ordered.gather(1, kept - 1)


def stream_seed(seed: int, sample_id: int) -> int:
    """Return a 63-bit seed for one sample, well apart for neighbouring seeds and ids (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + sample_id * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> 30)) * multiplier % 2**64
    return (x ^ (x >> 31)) >> 1
