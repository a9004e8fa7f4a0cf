"""The three networks of a training's options, with random weights or to start from those of another run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from checkpoints import check_tensors, load_weights
from config import TrainConfig, network_config
from console import RunError
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from refiner import Refiner, RefinerConfig


def make_vqvae(options: TrainConfig) -> VQVAE:
    """Return a VQ-VAE of these options, with random weights."""
    return VQVAE(network_config(VQVAEConfig, options))


def make_prior(options: TrainConfig, slice_size: Sequence[int], left_right: int | None) -> GatedPixelCNN:
    """Return a prior for slices (N, 1, H, W) of a size, of which axis 2, 3 or an unknown one runs left-right."""
    shape = {
        "grid": tuple(side // options.downsampling for side in slice_size),
        "codebook_size": options.codebook_size,
        "left_right": 1 if left_right == 3 else 0,  # where it is unknown, any midline will do
    }
    return GatedPixelCNN(network_config(PriorConfig, options, "prior_", **shape))


def make_refiner(options: TrainConfig) -> Refiner:
    """Return a refiner for slices that a VQ-VAE of these options decodes."""
    shared = {name: getattr(options, name) for name in ("downsampling", "codebook_size")}
    return Refiner(network_config(RefinerConfig, options, "refiner_", **shared))


def read_init(run: Path, stage: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a network of a stage would start from with `--init run`.

    Raises:
        RunError: There are none, or they do not fit the network.
    """
    path, prefix = run / f"{stage}.safetensors", "" if stage == "vqvae" else f"{stage}_"  # of its options
    given = load_weights(path, type(model), type(cast(Any, model).config), prefix).state_dict()
    try:
        check_tensors(model.state_dict(), given)
    except ValueError as error:
        raise RunError(
            f"{path} does not fit these options: {error}; give those of its run, or leave out --init"
        ) from None
    return given


def check_init(init: Path, options: TrainConfig, slice_size: Sequence[int], left_right: int | None) -> None:
    """Raise RunError unless a training can start from the weights of a run: at once, and not after the first stage."""
    if not init.is_dir():
        raise RunError(f"--init {init} is not a run directory")
    networks = {
        "vqvae": make_vqvae(options),
        "prior": make_prior(options, slice_size, left_right),
        "refiner": make_refiner(options),
    }
    for stage, network in networks.items():
        read_init(init, stage, network)
