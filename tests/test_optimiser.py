"""optimiser.py: Muon's steps, and Adam's for the weights that are no kernels."""

import pytest
import torch

from optimiser import ADAM_RMS, MOMENTUM, POLYNOMIALS, Muon, orthogonalise


@pytest.mark.parametrize("rows, columns", [(16, 144), (64, 64), (96, 32), (1, 9)])
def test_singular_vectors_are_kept_and_singular_values_become_equal(rows, columns, monkeypatch):
    monkeypatch.setattr("optimiser.autocast", lambda device: torch.autocast(device.type, enabled=False))
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns, dtype=torch.float64)
    u, before, vh = torch.linalg.svd(matrices, full_matrices=False)
    after = u.mT @ orthogonalise(matrices) @ vh.mT
    values = after.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(after, torch.diag_embed(values))
    clear = before > 0.01 * matrices.norm(dim=(1, 2))[:, None]
    assert clear.any() and values[clear].min() > 0.72 and values[clear].max() < 1.28


def test_each_polynomial_is_nearest_to_1_on_the_range_that_those_before_leave():
    """By Chebyshev's theorem a polynomial of three terms is, if its error is largest at four places in turn."""
    low, high = 0.01, 1.0
    for a, b, c in POLYNOMIALS:
        x = torch.linspace(low, high, 100_001, dtype=torch.float64)
        values = a * x + b * x**3 + c * x**5
        turns = (values.diff().sign().diff() != 0).nonzero().flatten() + 1
        errors = values[[0, *turns.tolist(), -1]] - 1
        torch.testing.assert_close(errors * torch.tensor([-1, 1, -1, 1]), errors[1].expand(4), rtol=4e-3, atol=0)
        low, high = values.min().item(), values.max().item()
    assert (low, high) == (pytest.approx(0.73, abs=0.005), pytest.approx(1.27, abs=0.005))


def test_rounding_in_bfloat16_keeps_a_matrix_of_one_row_in_range():
    torch.manual_seed(0)
    rows = torch.randn(1000, 1, 144)
    norms = orthogonalise(rows).norm(dim=(1, 2))
    assert norms.min() > 0.72 and norms.max() < 1.28


def test_matrices_of_zeros_stay_zero():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


class Layers(torch.nn.Module):
    """Two convolutions whose kernels have the same shape, one of another shape, and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.same = (torch.nn.Conv2d(4, 6, 3) for _ in range(2))
        self.other = torch.nn.Conv2d(8, 4, 1)
        self.linear = torch.nn.Linear(3, 2)


def set_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def set_rate(optimiser, rate):
    for group in optimiser.param_groups:
        group["lr"] = rate


def test_kernels_step_along_the_orthogonalised_momentum_and_shrink():
    network = Layers()
    optimiser = Muon(network, (0.9, 0.99), weight_decay=0.3)
    set_rate(optimiser, 0.01)
    kernels = [layer.weight for layer in (network.one, network.same, network.other)]
    momenta = [torch.zeros_like(kernel) for kernel in kernels]
    for update in range(3):
        set_gradients(network, update)
        expected = []
        for number, kernel in enumerate(kernels):
            momenta[number] = MOMENTUM * momenta[number] + (1 - MOMENTUM) * kernel.grad
            ahead = MOMENTUM * momenta[number] + (1 - MOMENTUM) * kernel.grad
            step = orthogonalise(ahead.flatten(1)[None]).view_as(kernel)  # columns in another order
            length = ADAM_RMS * max(kernel.flatten(1).shape) ** 0.5
            expected.append((kernel * (1 - 0.003) - 0.01 * length * step).detach())
        optimiser.step()
        for kernel, value in zip(kernels, expected):
            torch.testing.assert_close(kernel.detach(), value, atol=1e-4, rtol=0)  # of steps of 0.002: bfloat16


def test_steps_of_kernels_are_as_long_as_adams_whatever_their_shape():
    network = Layers()
    optimiser = Muon(network, (0.9, 0.99), weight_decay=0.0)
    set_rate(optimiser, 0.01)
    set_gradients(network, 0)
    for layer in (network.one, network.other):
        before = layer.weight.clone().detach()
        optimiser.step()
        rms = (layer.weight.detach() - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.01 * ADAM_RMS, rel=0.2)


def test_other_weights_are_adams():
    network, same = Layers(), Layers()
    optimiser = Muon(network, (0.9, 0.99), weight_decay=0.3)
    others = [weight for weight in same.parameters() if weight.ndim != 4]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.3, fused=True)
    set_rate(optimiser, 0.01)
    set_rate(adam, 0.01)
    for update in range(3):
        set_gradients(network, update)
        set_gradients(same, update)
        optimiser.step()
        adam.step()
    for weight, value in zip(network.parameters(), same.parameters()):
        assert weight.ndim == 4 or torch.equal(weight, value)


def test_gradients_of_all_weights_are_cleared():
    network = Layers()
    optimiser = Muon(network, (0.9, 0.99), weight_decay=0.3)
    set_gradients(network, 0)
    optimiser.zero_grad()
    assert all(weight.grad is None for weight in network.parameters())


def test_a_network_may_have_no_kernels():
    layer = torch.nn.Linear(2, 1)
    optimiser = Muon(layer, (0.9, 0.99), weight_decay=0.0)
    before = layer.weight.clone()
    layer(torch.ones(2)).sum().backward()
    optimiser.step()
    assert (layer.weight < before).all()
