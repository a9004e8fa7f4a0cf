"""The optimiser of all three networks: Muon for kernels of convolutions, Adam for all other weights."""

from typing import cast

import torch
from torch import Tensor, nn

from utils import autocast

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic polynomial
NEWTON_SCHULZ_STEPS = 5
ADAM_RMS = 0.2  # of an element of Adam's usual steps, relative to the learning rate


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns) with the same singular vectors, and singular values near 1.

    A Newton-Schulz iteration brings those above a hundredth of the matrix's norm to 0.7 to 1.2; smaller ones may stay
    smaller. It is computed in bfloat16 where the processor does so natively.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    with autocast(x.device):
        for _ in range(NEWTON_SCHULZ_STEPS):
            squared = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices)


class Muon(torch.optim.Optimizer):
    """Muon for kernels, Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2) for the other weights.

    Muon steps along the orthogonalised momentum of a kernel (out, in, height, width), taken as a matrix (out, in *
    height * width): whatever is weak in the gradient is learned as fast as what is strong (Jordan et al. 2024, Muon: An
    optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/). Its steps are as long
    as Adam's, so that both take the same learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982, eq. 4).

    Args:
        network: Whose weights are learned.
        betas: Adam's.
        weight_decay: Of both, relative to the learning rate.
    """

    def __init__(self, network: nn.Module, betas: tuple[float, float], weight_decay: float):
        kernels = [weight for weight in network.parameters() if weight.ndim == 4]
        others = [weight for weight in network.parameters() if weight.ndim != 4]
        super().__init__([{"params": kernels}], {"lr": 1e-3, "weight_decay": weight_decay})
        self.adam = torch.optim.AdamW([{"params": others}], betas=betas, weight_decay=weight_decay, fused=True)
        self.param_groups += self.adam.param_groups
        self.adam.state = self.state
        # Made here and not at the first step, because a checkpoint is restored before.
        for weight in kernels:
            self.state[weight] = {"momentum": torch.zeros_like(weight)}
        for weight in others:
            self.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self.by_shape: dict[torch.Size, list[Tensor]] = {}  # computed together: single ones are small
        for weight in kernels:
            self.by_shape.setdefault(weight.shape, []).append(weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step."""
        self.adam.step()
        rate, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for shape, kernels in self.by_shape.items():
            gradients = [cast(Tensor, kernel.grad) for kernel in kernels]
            momenta = [self.state[kernel]["momentum"] for kernel in kernels]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's momentum
            directions = orthogonalise(torch.stack([one.flatten(1) for one in ahead]))
            length = ADAM_RMS * max(directions.shape[1:]) ** 0.5
            torch._foreach_mul_(kernels, 1 - rate * decay)
            torch._foreach_add_(kernels, [one.view(shape) for one in directions], alpha=-rate * length)
