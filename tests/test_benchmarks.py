"""The networks that ours are compared with are what they are said to be."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from reference import PaperPixelCNN, TextbookVQVAE, sample_by_full_forwards


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_textbook_vqvae_has_the_papers_shape():
    model = TextbookVQVAE()
    slices = torch.rand(2, 1, 32, 16) * 2 - 1
    reconstructions, loss, codes = model(slices)
    assert reconstructions.shape == slices.shape
    assert codes.shape == (2, 8, 4)
    assert codes.max() < 512
    (loss + reconstructions.square().mean()).backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0  # through the codes, straight
    assert 0.5e6 < parameters(model) < 0.8e6


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (3, 0), (4, 2)])
def test_the_papers_prior_sees_the_past_and_nothing_else(place):
    model = PaperPixelCNN(codes=7, channels=4, layers=5).double()
    codes = torch.randint(7, (1, 6, 5))
    x = model.embedding(codes).detach().requires_grad_()
    model.embedding.forward = lambda _: x
    row, column = place
    logits = model(codes)[0, :, row, column]
    influence = torch.autograd.grad(logits.square().sum(), x)[0].abs().sum(-1).flatten()
    before = 5 * row + column
    assert (influence[before:] == 0).all()
    if before:
        assert influence[before - 1] > 0 or column == 0
        assert influence.sum() > 0


def test_full_forwards_fill_the_given_places():
    model = PaperPixelCNN(codes=7, channels=4, layers=2).eval()
    codes = torch.full((3, 2, 4), 99) % 7
    torch.manual_seed(0)
    sampled = sample_by_full_forwards(model, codes.clone(), [(0, 0), (1, 3)])
    kept = torch.ones(2, 4, dtype=bool)
    kept[0, 0] = kept[1, 3] = False
    assert torch.equal(sampled[:, kept], codes[:, kept])
    assert sampled.min() >= 0
    assert sampled.max() < 7
