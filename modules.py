"""The networks: encoder, codebook, decoder, VQ-VAE; gated PixelCNN and its sampler; what gives slices their detail.

Shapes: slices (N, 1, H, W) in [-1, 1], codes (N, h, w) int64 in [0, K), with h = H / downsampling and
w = W / downsampling. PyTorch only: no files, no printing.

    vqvae = VQVAE(VQVAEConfig())
    codes = vqvae.encode(slices)
    prior = GatedPixelCNN(PriorConfig(grid=codes.shape[1:]))
    new_codes = prior.sample(range(16), torch.full((16,), 0.5), seed=0)
    new_slices = Detail(DetailConfig()).sample(range(16), new_codes, vqvae, seed=0)

van den Oord et al. 2017, Neural Discrete Representation Learning, arXiv:1711.00937 (VQ-VAE)
van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv:1606.05328 (gated PixelCNN)
Lipman et al. 2023, Flow Matching for Generative Modeling, arXiv:2210.02747 (detail)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CELLS, GPU_CELLS = 2**21, 2**26  # scores (rows x K) computed at once: in a CPU's caches; in 256 MB of a GPU
PART_CODES = 8192  # that a network is given at once on a CPU, where what it computes then stays in the caches
COLDEST = 1e-6  # temperature: logits divided by less are no numbers in the end
VARIATIONS = 6  # numbers that say how a slice was augmented
NOT_CODES = 2**32  # added to a seed, which is smaller: random streams that are not those of the codes


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a VQ-VAE. A code stands for a square of `downsampling` x `downsampling` pixels."""

    downsampling: int = 4
    channels: int = 128
    blocks: int = 2
    hidden: int = 64
    codes: int = 512
    code_dim: int = 64
    commitment: float = 0.25
    decay: float = 0.99


@dataclass(frozen=True)
class PriorConfig:
    """Shape of a gated PixelCNN over code grids of `grid` = (rows, columns)."""

    grid: tuple[int, int] = (64, 32)
    codes: int = 512
    channels: int = 64
    cycles: int = 2
    head: int = 256
    dropout: float = 0.1
    position_waves: int = 4


@dataclass(frozen=True)
class DetailConfig:
    """Shape of a detail network; `downsampling`, `codes` and `code_dim` are those of the VQ-VAE.

    Of the layers on pixels the first takes `features` channels, x and what is decoded, and gives `fine` channels.
    """

    downsampling: int = 4
    codes: int = 512
    code_dim: int = 64
    channels: int = 128
    blocks: int = 4
    hidden: int = 64
    features: int = 14
    fine: int = 32
    time_waves: int = 8


class ResidualBlock(nn.Module):
    """Pre-activation residual block: 3x3 to `hidden` channels, 1x1 back."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.narrow = nn.Conv2d(channels, hidden, 3, padding=1)
        self.widen = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.widen(F.relu(self.narrow(F.relu(x))))


def encoder(config: VQVAEConfig) -> nn.Sequential:
    """Slices (N, 1, H, W) to vectors (N, D, h, w).

    The stem moves each square of pixels into channels (space-to-depth) instead of striding over the full
    resolution: all convolutions then run on the code grid, where they are dense and fast.
    """
    s, c = config.downsampling, config.channels
    return nn.Sequential(
        nn.PixelUnshuffle(s),  # (N, s*s, h, w)
        nn.Conv2d(s * s, c, 3, padding=1),
        *(ResidualBlock(c, config.hidden) for _ in range(config.blocks)),
        nn.ReLU(),
        nn.Conv2d(c, config.code_dim, 1),
    )


def decoder(config: VQVAEConfig) -> nn.Sequential:
    """Vectors (N, D, h, w) to slices (N, 1, H, W): the encoder mirrored."""
    s, c = config.downsampling, config.channels
    return nn.Sequential(
        nn.Conv2d(config.code_dim, c, 3, padding=1),
        *(ResidualBlock(c, config.hidden) for _ in range(config.blocks)),
        nn.ReLU(),
        nn.Conv2d(c, s * s, 3, padding=1),
        nn.PixelShuffle(s),
    )


def rows_at_once(rows: Tensor, size: int) -> int:
    """How many rows have their scores for `size` codes computed at once."""
    return max(1, (GPU_CELLS if rows.is_cuda else CELLS) // size)


class Codebook(nn.Module):
    """K vectors of D numbers; a vector is replaced by the nearest of them (arXiv:1711.00937, eq. 1 and 2).

    The quantised axis is the last: for vectors (..., D) = (65536, 64) and K = 512 the codes are (65536,).
    The codes follow the vectors by an exponential moving average (there, appendix A.1), in training mode
    only. Counts and sums start together, so an unused code keeps its place instead of being divided by
    nothing; one whose use falls under REVIVE of the mean is put onto a vector of the batch.
    """

    REVIVE = 0.3

    def __init__(self, codes: int, dim: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("embeddings", torch.randn(codes, dim))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.embeddings.clone())

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes (M,) of vectors (M, D). argmin |v - e|^2 = argmax (v.e - |e|^2 / 2)."""
        half_norms = -0.5 * self.embeddings.square().sum(1)
        parts = vectors.split(rows_at_once(vectors, len(self.embeddings)))
        scores = (torch.addmm(half_norms, part, self.embeddings.T) for part in parts)
        return torch.cat([part.argmax(1) for part in scores])

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (M, D) to the embeddings that replace them (M, D) and their codes (M,)."""
        codes = self.nearest(vectors)
        embeddings = F.embedding(codes, self.embeddings)
        if self.training:
            self.follow(vectors, codes)
        return embeddings, codes

    def follow(self, vectors: Tensor, codes: Tensor) -> None:
        """One step of the moving average, then the revival of codes hardly used."""
        ones = torch.ones(len(codes), device=codes.device)
        counts = torch.zeros_like(self.counts).index_add_(0, codes, ones)  # bincount would make the host wait for a GPU
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        mean = self.counts.mean()
        dead = self.counts < self.REVIVE * mean
        # A revived code starts at the mean count: it has over 100 updates to find its use.
        drawn = vectors[torch.randint(len(vectors), self.counts.shape, device=vectors.device)]
        self.counts.copy_(torch.where(dead, mean, self.counts))
        self.sums.copy_(torch.where(dead[:, None], mean * drawn, self.sums))
        self.embeddings.copy_(self.sums / self.counts[:, None])

    @torch.no_grad()
    def fit(self, vectors: Tensor, iterations: int = 10) -> None:
        """Put the codes where the vectors (M, D) are: k-means from vectors drawn at random."""
        self.embeddings.copy_(vectors[torch.randint(len(vectors), self.counts.shape, device=vectors.device)])
        decay, self.decay = self.decay, 0.0
        for _ in range(iterations):
            self.follow(vectors, self.nearest(vectors))
        self.decay = decay


class VQVAE(nn.Module):
    """Encoder, codebook, decoder (arXiv:1711.00937, section 3)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.codebook = Codebook(config.codes, config.code_dim, config.decay)
        self.decoder = decoder(config)

    def forward(self, slices: Tensor, quantise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Slices (N, 1, H, W) to reconstructions (N, 1, H, W), embedding loss () and codes (N, h, w).

        The embedding loss is the commitment term of eq. 3, commitment * |z - sg[e]|^2, a mean over vectors
        and dimensions: eq. 3's codebook term |sg[z] - e|^2 is minimised by the moving average instead.
        With quantise=False the vectors pass as they are, for warming up the encoder; the loss is then 0.
        """
        z = self.vectors(slices)  # (N, h, w, D)
        if not quantise:
            codes = torch.zeros(z.shape[:3], dtype=torch.int64, device=z.device)
            return self.decoder(z.permute(0, 3, 1, 2)).float(), z.new_zeros(()), codes
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            embeddings, codes = self.codebook(z.detach().flatten(0, 2))
        e = embeddings.view_as(z)
        embedding_loss = self.config.commitment * F.mse_loss(z, e)
        straight_through = z + (e - z).detach()  # value of e, gradient of z
        return self.decoder(straight_through.permute(0, 3, 1, 2)).float(), embedding_loss, codes.view(z.shape[:3])

    def vectors(self, slices: Tensor) -> Tensor:
        """Slices (N, 1, H, W) to the encoder's vectors (N, h, w, D), float32."""
        return self.encoder(slices).float().permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, slices: Tensor) -> Tensor:
        """Slices (N, 1, H, W) in [-1, 1] to codes (N, h, w). Moves no code, in training mode neither."""
        vectors = self.vectors(slices)
        with torch.autocast(vectors.device.type, enabled=False):
            return self.codebook.nearest(vectors.flatten(0, 2)).view(vectors.shape[:3])

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) to the vectors that they stand for (N, D, h, w)."""
        return F.embedding(codes, self.codebook.embeddings).permute(0, 3, 1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) to slices (N, 1, H, W), clipped to [-1, 1]: the mean of those with these codes, so smooth."""
        return self.decoder(self.embed(codes)).float().clamp(-1, 1)


def dilations(reach: int) -> list[int]:
    """Powers of two, the last one shortened, that add up to `reach`: every smaller distance is then a sum of some.

    >>> dilations(30)
    [1, 2, 4, 8, 15]
    """
    steps = []
    while sum(steps) < reach:
        steps.append(min(2 ** len(steps), reach - sum(steps)))
    return steps


def gated(gates: Tensor) -> Tensor:
    """a * sigmoid(b) for gates [a, b] (N, 2C, h, w). F.glu is the same, but slow backward on channels-last grids."""
    a, b = gates.chunk(2, 1)
    return a * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks (arXiv:1606.05328, figure 2), with dilated kernels.

        vertical, at row r        horizontal, at column c
        r-dv  x . x . x           x . o
              . . . . .           |   |
        r     x . o . x        c-dh   c

    The inputs of both stacks are shifted by one (GatedPixelCNN.hidden), so that the taps at r and c are
    already in the past. Gates are a * sigmoid(b) (Dauphin et al. 2017, arXiv:1612.08083, eq. 1) where the
    paper has tanh(a) * sigmoid(b): a cheaper one, whose gradient does not vanish where a is large.
    """

    def __init__(self, channels: int, rows: int, columns: int, left: int, dropout: float):
        super().__init__()
        self.rows, self.columns, self.left = rows, columns, left
        self.vertical = nn.Conv2d(channels, 2 * channels, (2, 3), dilation=(rows, columns))
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, 2), dilation=(1, left), bias=False)
        self.output = nn.Conv2d(channels, channels, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)  # whole channels: a mask a channel costs next to nothing

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks (N, C, h, w) to both stacks."""
        v = v + gated(self.vertical(F.pad(v, (self.columns, self.columns, self.rows, 0))))
        gates = self.horizontal(F.pad(h, (self.left, 0, 0, 0))) + self.link(v)  # (N, 2C, h, w)
        return v, h + self.output(self.dropout(gated(gates)))


class LinearCrossEntropy(torch.autograd.Function):
    """A linear layer and the sum of its cross-entropy, which finds the gradient along with the value.

    Some rows' logits at a time turn into their gradient where they lie: none are kept, and none computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, learning: bool) -> Tensor:
        """Nats () of x (M, C), weight (K, C), bias (K,), codes (M,); without a gradient where not `learning`."""
        w, nats = weight.to(x.dtype), bias.new_zeros(())
        of_x, of_weight, of_bias = [], torch.zeros_like(weight), torch.zeros_like(bias)
        rows = rows_at_once(x, len(bias))
        for part, chosen in zip(x.split(rows), codes[:, None].split(rows)):
            logits = torch.mm(part, w.T).to(bias.dtype).add_(bias)
            whole = logits.logsumexp(1, keepdim=True)
            nats += (whole - logits.gather(1, chosen)).sum()
            if not learning:
                continue
            slope = logits.sub_(whole).exp_().scatter_add_(1, chosen, -torch.ones_like(whole))  # softmax less one-hot
            of_bias += slope.sum(0)
            slope = slope.to(x.dtype)
            of_weight += torch.mm(slope.T, part)
            of_x.append(torch.mm(slope, w))
        if learning:
            ctx.save_for_backward(torch.cat(of_x), of_weight, of_bias)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        return *(gradient * scale for gradient in ctx.saved_tensors), None, None


class GatedPixelCNN(nn.Module):
    """p(codes) = product over the grid, row by row, of p(code | codes before it) (arXiv:1606.05328).

    The vertical stack sees all rows above, the horizontal stack the codes to the left in its own row: no
    blind spot (there, section 2.2). Dilations double from layer to layer, so that each cycle through them
    reaches every earlier code of the grid. Both stacks are told where they are: the row and the column of the
    code, and the slice's position in its volume, from 0 (lowest) to 1, or NaN where it is not known. In training
    they are also told how the slice was augmented, so that samples, of which nothing is told, look like slices that
    were not (Karras et al. 2022, arXiv:2206.00364, appendix F.2).
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid
        c = config.channels
        self.embedding = nn.Embedding(config.codes, c)
        self.row = nn.Parameter(0.1 * torch.randn(c, rows, 1))
        self.column = nn.Parameter(0.1 * torch.randn(c, 1, columns))
        self.position = nn.Linear(1 + 2 * config.position_waves, c, bias=False)
        self.variation = nn.Linear(VARIATIONS, c, bias=False)
        # The shift of the inputs is the first step up and the first step left.
        up, left, aside = dilations(rows - 2), dilations(columns - 2), dilations(columns - 1)
        depth = max(len(up), len(left), len(aside), 1)
        up, left, aside = (steps + [1] * (depth - len(steps)) for steps in (up, left, aside))
        self.layers = nn.ModuleList(
            GatedLayer(c, *steps, config.dropout) for steps in list(zip(up, aside, left)) * config.cycles
        )
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c, config.head, 1), nn.ReLU(), nn.Conv2d(config.head, config.codes, 1)
        )

    @torch.no_grad()
    def know_codes(self, embeddings: Tensor) -> None:
        """Start the embedding of codes at a codebook's vectors (K, D), scaled to variance 1.

        Codes that decode to like pixels are then alike from the first update on; without it a prior has to
        find that out from how often they stand side by side, for which a few dozen patients do not suffice.
        """
        spread = (embeddings - embeddings.mean(0)) / embeddings.std()
        d, c = embeddings.shape[1], self.config.channels
        turn = torch.eye(d) if d == c else torch.randn(d, c) / d**0.5
        self.embedding.weight.copy_(spread @ turn.to(spread))

    def position_features(self, position: Tensor) -> Tensor:
        """What both stacks are told of the slices' positions (N,): (N, C)."""
        waves = position[:, None] * torch.arange(1, self.config.position_waves + 1, device=position.device) * torch.pi
        known = torch.cat([torch.ones_like(position)[:, None], waves.sin(), waves.cos()], 1)
        features = known.where(position[:, None].isfinite(), 0)  # where it is not known nothing is added
        return self.position(features.to(self.row.dtype))

    def forward(self, codes: Tensor, position: Tensor, variation: Tensor | None = None) -> Tensor:
        """Codes (N, h, w), positions (N,) to logits (N, K, h, w); those at a place depend on earlier codes alone.

        variation: (N, VARIATIONS), how the slices were augmented, of mean 0; None where they were not.
        """
        return self.head[-1](self.hidden(codes, position, variation))

    def nats(self, codes: Tensor, position: Tensor, variation: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood () in nats a code, of what `forward` takes: the loss in training."""
        rows = self.hidden(codes, position, variation).permute(0, 2, 3, 1).flatten(0, 2)
        output = self.head[-1]
        given = rows, output.weight[:, :, 0, 0], output.bias, codes.flatten(), torch.is_grad_enabled()
        return LinearCrossEntropy.apply(*given) / codes.numel()

    def hidden(self, codes: Tensor, position: Tensor, variation: Tensor | None) -> Tensor:
        """What the last layer makes logits of (N, head, h, w)."""
        x = self.embedding(codes).permute(0, 3, 1, 2)  # (N, C, h, w)
        told = self.position_features(position)  # (N, C)
        if variation is not None:
            told = told + self.variation(variation)
        place = self.row + self.column + told[:, :, None, None]  # (N, C, h, w)
        if torch.is_autocast_enabled(x.device.type):  # else the stacks stay float32, and each layer casts them anew
            x, place = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, place))
        v = F.pad(x, (0, 0, 1, 0))[:, :, :-1] + place  # row r holds row r-1
        h = F.pad(x, (1, 0, 0, 0))[..., :-1] + place  # column c holds column c-1
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head[:-1](h)

    @torch.inference_mode()
    def sample(
        self,
        numbers: Sequence[int],
        position: Tensor,
        seed: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        progress: Callable[[int], None] = lambda row: None,
    ) -> Tensor:
        """New code grids (N, h, w), one for each of N sample numbers and their positions (N,).

        Each sample draws from its own random stream, seeded by (seed, its number), so it does not depend on
        the samples beside it. Codes are drawn by the Gumbel-max rule, which changes a code only where two
        logits tie to rounding error: a sum over a cumulative distribution would not be as steadfast when
        another batch size sums in another order. `progress(row)` is called as each row begins.

        temperature: COLDEST at least; divides the logits. top_p: in (0, 1]; keeps the fewest codes that together
        have at least this probability (Holtzman et al. 2020, arXiv:1904.09751, section 3.1).
        """
        if temperature < COLDEST or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} must be at least {COLDEST}, and top_p {top_p} in (0, 1]")
        _, columns = self.config.grid
        device = position.device
        streams = [torch.Generator(device).manual_seed(stream_seed(seed, number)) for number in numbers]
        gumbel = torch.empty(len(streams), columns, self.config.codes, device=device)

        def begin(row: int) -> None:
            progress(row)
            for noise, stream in zip(gumbel, streams):
                noise.uniform_(generator=stream)
            gumbel.clamp_(min=torch.finfo(gumbel.dtype).tiny)  # 0 is drawn too, and its score would be no number
            gumbel.log_().neg_().log_()  # less its sign

        def draw(logits: Tensor, column: int) -> Tensor:
            return (keep_top(logits / temperature, top_p) - gumbel[:, column]).argmax(1)

        return self.generate(position, begin, draw)

    @torch.inference_mode()
    def generate(self, position: Tensor, begin: Callable[[int], None], draw: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Code grids (N, h, w) for positions (N,), code by code: draw(logits (N, K), column) gives codes (N,).

        Does what `forward` does, without dropout, and computes nothing twice (RowMaker). begin(row) is called
        before each row. On a GPU a row is recorded once and replayed, `draw` with it: launching its small
        steps one by one would take longer than computing them.
        """
        maker = RowMaker(self, position, draw)
        grid = []
        with torch.cuda.device_of(position):  # does nothing on a CPU
            make_row = maker.recorded() if position.is_cuda else maker.make_row
            for row in range(self.config.grid[0]):
                begin(row)
                make_row()
                grid.append(maker.codes.clone())
        return torch.stack(grid, 1)


class RowMaker:
    """Makes code grids row by row: the vertical stack is computed once a row, the horizontal stack once a code.

    What later steps need is kept: `dilation` rows of each vertical layer, one row of each horizontal layer.
    Memory grows with N, not with the grid squared. What goes from row to row stays at the same addresses, the
    row's number among it, so that a recorded row can be replayed.
    """

    def __init__(self, prior: GatedPixelCNN, position: Tensor, draw: Callable[[Tensor, int], Tensor]):
        self.prior, self.draw = prior, draw
        self.weights = [step_weights(layer) for layer in prior.layers]
        self.told = prior.position_features(position)  # (N, C)
        n, c, columns = *self.told.shape, prior.config.grid[1]
        self.row = torch.zeros(1, dtype=torch.int64, device=position.device)
        self.codes = self.row.new_zeros(n, columns)
        self.above = self.told.new_zeros(n, c, columns)  # the row above, embedded
        self.kept = [self.told.new_zeros(layer.rows, n, c, columns) for layer in prior.layers]

    def make_row(self) -> None:
        """The next row of codes, into `codes` (N, w)."""
        prior = self.prior
        first, last = prior.head[1], prior.head[3]
        here = prior.row.index_select(1, self.row) + prior.column  # (C, 1, w)
        place = here.permute(2, 1, 0) + self.told  # (w, N, C)
        links = self.vertical_row(self.above + place.permute(1, 2, 0))
        left = [[] for _ in prior.layers]
        x = self.told.new_zeros(self.told.shape)
        for column in range(prior.config.grid[1]):
            h = x + place[column]
            for layer, link, past, (now, before, output) in zip(prior.layers, links, left, self.weights):
                gates = torch.addmm(link[column], h, now)  # (N, 2C)
                if column >= layer.left:
                    gates.addmm_(past[column - layer.left], before)
                past.append(h)
                h = torch.addmm(h, F.glu(gates, 1), output)
            hidden = F.linear(h.relu(), first.weight[:, :, 0, 0], first.bias).relu()
            codes = self.draw(F.linear(hidden, last.weight[:, :, 0, 0], last.bias), column)
            self.codes[:, column] = codes
            x = prior.embedding(codes)
        self.above.copy_(prior.embedding(self.codes).transpose(1, 2))
        self.row += 1

    def vertical_row(self, v: Tensor) -> list[Tensor]:
        """The vertical stack on one row (N, C, w); its links to the horizontal stack, each (w, N, 2C)."""
        links = []
        for layer, kept in zip(self.prior.layers, self.kept):
            oldest = self.row % layer.rows  # where row - dilation lies, and this one takes its place
            pair = torch.stack([kept.index_select(0, oldest)[0], v], 2)  # (N, C, 2, w)
            kept.index_copy_(0, oldest, v[None])
            conv = layer.vertical
            gates = F.conv2d(pair, conv.weight, conv.bias, padding=(0, layer.columns), dilation=(1, layer.columns))
            v = v + F.glu(gates[:, :, 0], 1)
            links.append(F.linear(v.permute(2, 0, 1), layer.link.weight[:, :, 0, 0], layer.link.bias))
        return links

    def recorded(self) -> Callable[[], None]:
        """`make_row` recorded as a CUDA graph: one launch a row instead of some two thousand."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.make_row()  # libraries set themselves up in a first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.make_row()
        self.rewind()
        return graph.replay

    def rewind(self) -> None:
        """Back to the first row."""
        for state in (self.row, self.above, *self.kept):
            state.zero_()


def step_weights(layer: GatedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """The horizontal stack's weights as matrices: of the present (C, 2C), of the past (C, 2C), output (C, C)."""
    past, present = layer.horizontal.weight[:, :, 0].unbind(2)
    return present.T.contiguous(), past.T.contiguous(), layer.output.weight[:, :, 0, 0].T.contiguous()


def keep_top(logits: Tensor, top_p: float) -> Tensor:
    """Logits (N, K) with minus infinity outside the fewest codes whose probability is at least top_p, ties kept."""
    if top_p == 1:
        return logits
    ordered = logits.sort(1, descending=True).values
    probabilities = ordered.softmax(1)
    kept = (probabilities.cumsum(1) - probabilities < top_p).sum(1, keepdim=True)  # what stands before is not enough
    return logits.masked_fill(logits < ordered.gather(1, kept - 1), -torch.inf)


class Detail(nn.Module):
    """p(slice | codes): what a code grid leaves open, drawn at random; by flow matching (arXiv:2210.02747).

    The decoder answers with the mean of all slices that have these codes, which is smoother than any of them. The
    difference x_1 = (slice - decoded) / spread is drawn anew here: noise x_0 is moved along dx/dt = v(x, t) from t = 0
    to 1. The network learns v as x_1 - x_0 at x = (1 - t) x_0 + t x_1 (there, eq. 23, with sigma_min = 0).

    The spread is that of each pixel of a code's square in the training slices. So x_1 has variance 1 everywhere, in air
    as in muscle, and what is left to be learnt is its shape: were it normal noise, v would be c(t) x with
    c = (2t - 1) / (t^2 + (1 - t)^2), to which the network adds. Squares of pixels are moved into channels, as in the
    encoder, and most convolutions run on the code grid; the last ones, of `fine` channels, run on pixels, since grain
    is the same wherever in a square it lies.
    """

    STEPS = 8
    RARE = 10  # a code seen less often has the spread of all codes rather than its own

    def __init__(self, config: DetailConfig):
        super().__init__()
        self.config = config
        square, c = config.downsampling**2, config.channels
        self.register_buffer("spread", torch.ones(config.codes, square))
        self.stem = nn.Conv2d(square, c, 3, padding=1)
        self.context = nn.Conv2d(2 * square + config.code_dim, c, 3, padding=1, bias=False)
        self.time = nn.Linear(1 + 2 * config.time_waves, 2 * config.blocks * c)
        self.blocks = nn.ModuleList(ResidualBlock(c, config.hidden) for _ in range(config.blocks))
        self.to_pixels = nn.Conv2d(c, square * config.features, 1)
        self.pixels = nn.Sequential(
            nn.Conv2d(config.features + 2, config.fine, 3, padding=1),
            nn.ReLU(inplace=True),  # on pixels memory counts
            nn.Conv2d(config.fine, config.fine, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(config.fine, 1, 3, padding=1),
        )
        nn.init.zeros_(self.pixels[-1].weight)
        nn.init.zeros_(self.pixels[-1].bias)

    @torch.no_grad()
    def measure(self, slices: Tensor, decoded: Tensor, codes: Tensor) -> None:
        """Set the spread from training slices, what they are decoded to (N, 1, H, W), and their codes (N, h, w)."""
        squares = F.pixel_unshuffle((slices - decoded).square(), self.config.downsampling)  # (N, s*s, h, w)
        squares = squares.permute(0, 2, 3, 1).flatten(0, 2)
        sums = torch.zeros_like(self.spread).index_add_(0, codes.flatten(), squares)
        counts = torch.bincount(codes.flatten(), minlength=len(sums))[:, None]
        means = (sums + self.RARE * squares.mean(0)) / (counts + self.RARE)
        self.spread.copy_(means.sqrt().clamp(min=1e-3))  # half a grey level of 256 is 4e-3

    def spreads(self, codes: Tensor) -> Tensor:
        """The spread of each pixel (N, 1, H, W) of codes (N, h, w)."""
        return F.pixel_shuffle(F.embedding(codes, self.spread).permute(0, 3, 1, 2), self.config.downsampling)

    def told(self, codes: Tensor, decoded: Tensor, vqvae: VQVAE) -> tuple[Tensor, Tensor]:
        """What the network is told, whatever the time, of codes (N, h, w): of their squares (N, C, h, w), and what
        they are decoded to (N, 1, H, W)."""
        pictures = decoded, self.spreads(codes).log() / 2  # both about in [-2, 1]
        squares = [F.pixel_unshuffle(picture, self.config.downsampling) for picture in pictures]
        return self.context(torch.cat([*squares, vqvae.embed(codes)], 1)), decoded

    def forward(self, x: Tensor, time: Tensor, told: tuple[Tensor, Tensor]) -> Tensor:
        """Velocities (N, 1, H, W) at x (N, 1, H, W) and times (N,) in [0, 1]; `told` as above."""
        side, (of_squares, decoded) = self.config.downsampling, told
        waves = time[:, None] * torch.arange(1, self.config.time_waves + 1, device=time.device) * torch.pi
        of_time = self.time(torch.cat([time[:, None], waves.sin(), waves.cos()], 1))[:, :, None, None]
        h = self.stem(F.pixel_unshuffle(x, side)) + of_squares
        for block, change in zip(self.blocks, of_time.to(h.dtype).chunk(self.config.blocks, 1)):
            scale, shift = change.chunk(2, 1)
            h = block(h + h * scale + shift)
        pixels = F.pixel_shuffle(F.relu(self.to_pixels(F.relu(h))), side)
        pixels = torch.cat([pixels, x.to(pixels.dtype), decoded.to(pixels.dtype)], 1)
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # shuffling loses it, without it all is slow
        t = time[:, None, None, None]
        return self.pixels(pixels).float() + x * (2 * t - 1) / (t**2 + (1 - t) ** 2)

    def loss(self, slices: Tensor, codes: Tensor, vqvae: VQVAE) -> Tensor:
        """Mean squared error of the velocity at random places of the way (); 1.74 where only the spread is known.

        Times are logit-normal: the middle of the way is the hardest (Esser et al. 2024, arXiv:2403.03206, section 3.1).
        """
        decoded = vqvae.decode(codes)
        difference = (slices - decoded) / self.spreads(codes)
        noise = torch.randn_like(difference)
        time = torch.randn(len(slices), device=slices.device).sigmoid()
        x = torch.lerp(noise, difference, time[:, None, None, None])
        return F.mse_loss(self(x, time, self.told(codes, decoded, vqvae)), difference - noise)

    @torch.no_grad()
    def sample(
        self, numbers: Sequence[int], codes: Tensor, vqvae: VQVAE, seed: int = 0, strength: float = 1.0
    ) -> Tensor:
        """Slices (N, 1, H, W) in [-1, 1] of codes (N, h, w), their detail drawn for N sample numbers.

        Each has its own random stream, as in `GatedPixelCNN.sample`. The way is gone in STEPS steps of Heun's method
        (Karras et al. 2022, arXiv:2206.00364, algorithm 1), the last of them Euler's. strength, in [0, 1], scales the
        noise where it begins: below 1 detail is the likelier one and has less grain, at 0 nothing is random.
        """
        decoded = vqvae.decode(codes)
        told = self.told(codes, decoded, vqvae)
        x = torch.empty_like(decoded)
        for noise, number in zip(x, numbers):
            noise.normal_(generator=torch.Generator(x.device).manual_seed(stream_seed(seed + NOT_CODES, number)))
        x *= strength
        times = torch.linspace(0, 1, self.STEPS + 1, device=x.device)
        for step, (time, after) in enumerate(zip(times, times[1:]), 1):
            velocity = self(x, time.expand(len(x)), told)
            if step < self.STEPS:
                there = self(x + (after - time) * velocity, after.expand(len(x)), told)
                velocity = (velocity + there) / 2
            x = x + (after - time) * velocity
        return (decoded + self.spreads(codes) * x).clamp(-1, 1)


def stream_seed(seed: int, number: int) -> int:
    """A 63-bit seed for one sample, well apart for neighbouring seeds and numbers (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> 30)) * multiplier % 2**64
    return (x ^ (x >> 31)) >> 1
