"""The optimiser of all three networks: Muon for kernels of convolutions, Adam for all other weights."""

from typing import cast

import torch
from torch import Tensor, nn

from utils import autocast

MOMENTUM = 0.95
# Coefficients of x, x^3 and x^5 of polynomials that, one after the other, bring all of [0.01, 1] within 0.27 of 1. Each
# comes as near to 1 as any can on the range that those before leave (Amsel et al. 2025, arXiv:2505.16932, theorem 4.1).
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
MARGIN = 1.02  # above 1 the polynomials rise steeply, and bfloat16 is off by up to 0.004
ADAM_RMS = 0.2  # of an element of Adam's usual steps, relative to the learning rate


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns) with the same singular vectors, and singular values near 1.

    Polynomials of a matrix bring those above a hundredth of its norm to 0.7 to 1.3; smaller ones may stay smaller. They
    are computed in bfloat16 where the processor does so natively.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-12)
    with autocast(x.device):
        if torch.is_autocast_enabled(x.device.type):  # else each product would cast it anew
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for a, b, c in POLYNOMIALS:
            squared = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(squared, squared, squared, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype, memory_format=torch.contiguous_format)


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
            # Columns in the order of memory, which is that of channels-last kernels: nothing is moved on the way.
            directions = orthogonalise(torch.stack([one.permute(0, 2, 3, 1).flatten(1) for one in ahead]))
            length = ADAM_RMS * max(directions.shape[1:]) ** 0.5
            torch._foreach_mul_(kernels, 1 - rate * decay)
            outputs, inputs, height, width = shape
            steps = directions.view(-1, outputs, height, width, inputs).permute(0, 1, 4, 2, 3)
            torch._foreach_add_(kernels, list(steps), alpha=-rate * length)
