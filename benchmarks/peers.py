"""The alternatives in requirements-bench.txt, where they are installed: pythae and MONAI, as their users run them.

Each is wrapped in a function to be timed. What they sample is timed by single steps, which the callers multiply up:
neither keeps anything from one code to the next.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch

DIM = 64


def vqvae_updates(slices: torch.Tensor, codes: int) -> dict[str, Callable[[], object]]:
    """One update of each on slices (N, 1, H, W), pythae's with K codes, with Adam, in float32."""
    updates = {}
    if find_spec("pythae"):
        updates["pythae"] = pythae_update(slices, codes)
    if find_spec("monai"):
        updates["monai"] = monai_update(slices)
    return updates


def pythae_update(slices: torch.Tensor, codes: int) -> Callable[[], object]:
    """pythae's VQ-VAE with the residual networks of its CIFAR example: a 64x32 grid for 256x128 slices."""
    from pythae.models import VQVAE, VQVAEConfig
    from pythae.models.nn.benchmarks.cifar import Decoder_ResNet_VQVAE_CIFAR, Encoder_ResNet_VQVAE_CIFAR

    # The example's networks have three channels built in: grey slices are given three times.
    config = VQVAEConfig(input_dim=(3, *slices.shape[2:]), latent_dim=DIM, num_embeddings=codes)
    model = VQVAE(config, Encoder_ResNet_VQVAE_CIFAR(config), Decoder_ResNet_VQVAE_CIFAR(config)).to(slices.device)
    optimiser = torch.optim.Adam(model.parameters())
    inputs = {"data": slices.expand(-1, 3, -1, -1)}
    return lambda: descend(optimiser, [model(inputs).loss])


def monai_update(slices: torch.Tensor) -> Callable[[], object]:
    """MONAI's VQ-VAE as it comes: 7 million parameters, a 32x16 grid for 256x128 slices."""
    from monai.networks.nets import VQVAE

    model = VQVAE(spatial_dims=2, in_channels=1, out_channels=1).to(slices.device)
    optimiser = torch.optim.Adam(model.parameters())

    def update() -> None:
        reconstructions, quantisation_loss = model(slices)
        descend(optimiser, [torch.nn.functional.mse_loss(reconstructions, slices) + quantisation_loss])

    return update


def descend(optimiser: torch.optim.Optimizer, losses: Iterable[torch.Tensor], max_norm: float | None = None) -> None:
    """Backward and step; with max_norm a longer gradient is cut to it, as train.py does."""
    optimiser.zero_grad()
    for loss in losses:
        loss.backward()
    if max_norm:
        weights = (weight for group in optimiser.param_groups for weight in group["params"])
        torch.nn.utils.clip_grad_norm_(weights, max_norm)
    optimiser.step()


def sampling_steps(grid: tuple[int, int], size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What each computes for one code of one grid, K = `size`; MONAI's transformer for a code in the middle."""
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
    """MONAI's Dataset of slices: what its item `i` takes. None where MONAI is not installed."""
    if not find_spec("monai"):
        return None
    from monai.data import Dataset
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, ScaleIntensity

    return Dataset(paths, Compose([LoadImage(), EnsureChannelFirst(), ScaleIntensity()])).__getitem__
