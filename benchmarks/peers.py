"""The alternatives in requirements-bench.txt, if they are installed: pythae and MONAI, as their users run them.

Each is wrapped in a function to be timed. Sampling is timed by single steps, from which the callers extrapolate:
neither caches anything from one code to the next.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

DIM = 64


def vqvae_updates(slices: torch.Tensor, codes: int) -> dict[str, Callable[[], object]]:
    """Return one update of each VQ-VAE on slices (N, 1, H, W), pythae's with K codes, with Adam, in float32."""
    updates = {}
    if find_spec("pythae"):
        updates["pythae"] = pythae_update(slices, codes)
    if find_spec("monai"):
        updates["monai"] = monai_update(slices)
    return updates


def pythae_update(slices: torch.Tensor, codes: int) -> Callable[[], object]:
    """Return an update of pythae's VQ-VAE with the networks of its CIFAR example: 64x32 codes for 256x128 slices."""
    from pythae.models import VQVAE, VQVAEConfig
    from pythae.models.nn.benchmarks.cifar import Decoder_ResNet_VQVAE_CIFAR, Encoder_ResNet_VQVAE_CIFAR

    # The example's networks require three channels: grey slices are repeated.
    config = VQVAEConfig(input_dim=(3, *slices.shape[2:]), latent_dim=DIM, num_embeddings=codes)
    model = VQVAE(config, Encoder_ResNet_VQVAE_CIFAR(config), Decoder_ResNet_VQVAE_CIFAR(config)).to(slices.device)
    optimiser = torch.optim.Adam(model.parameters())
    inputs = {"data": slices.expand(-1, 3, -1, -1)}
    return lambda: optimiser_step(optimiser, [model(inputs).loss])


def monai_update(slices: torch.Tensor) -> Callable[[], object]:
    """Return an update of MONAI's VQ-VAE with its defaults: 7 million parameters, 32x16 codes for 256x128 slices."""
    from monai.networks.nets import VQVAE

    model = VQVAE(spatial_dims=2, in_channels=1, out_channels=1).to(slices.device)
    optimiser = torch.optim.Adam(model.parameters())

    def update() -> None:
        reconstructions, quantisation_loss = model(slices)
        optimiser_step(optimiser, [torch.nn.functional.mse_loss(reconstructions, slices) + quantisation_loss])

    return update


def optimiser_step(
    optimiser: torch.optim.Optimizer, losses: Iterable[torch.Tensor], max_norm: float | None = None
) -> None:
    """Run backward, gradient clipping to `max_norm` if it is given, as train.py does, and a step of the optimiser."""
    optimiser.zero_grad()
    for loss in losses:
        loss.backward()
    if max_norm:
        weights = (weight for group in optimiser.param_groups for weight in group["params"])
        torch.nn.utils.clip_grad_norm_(weights, max_norm)
    optimiser.step()


def sampling_steps(grid: tuple[int, int], size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what each computes to draw one code of one grid, K = `size`; in MONAI's transformer, a code halfway."""
    steps = {}
    if find_spec("pythae"):
        from pythae.models.normalizing_flows.pixelcnn import PixelCNN, PixelCNNConfig

        pixelcnn = PixelCNN(PixelCNNConfig(input_dim=(1, *grid), n_embeddings=size)).to(device).eval()
        codes = torch.randint(size, (1, 1, *grid), device=device).float()
        steps["pythae"] = torch.no_grad()(lambda: pixelcnn({"data": codes}))
    if find_spec("monai"):
        from monai.networks.nets import DecoderOnlyTransformer

        length = grid[0] * grid[1]
        transformer = DecoderOnlyTransformer(
            size + 1, length, attn_layers_dim=96, attn_layers_depth=8, attn_layers_heads=4
        )
        transformer = transformer.to(device).eval()
        half = torch.randint(size, (1, length // 2), device=device)
        steps["monai"] = torch.no_grad()(lambda: transformer(half))
    return steps


def monai_slices(paths: list[Path]) -> Callable[[int], object] | None:
    """Return a function that loads slice `i` through MONAI's Dataset; None if MONAI is not installed."""
    if not find_spec("monai"):
        return None
    from monai.data import Dataset
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, ScaleIntensity

    return Dataset(paths, Compose([LoadImage(), EnsureChannelFirst(), ScaleIntensity()])).__getitem__
