"""Metrics against NumPy twins and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from metrics import DATA_RANGE, code_counts, codebook_use, reconstruction_metrics

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # (K * data range)^2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_pair(count, height, width, noise=0.3):
    slices = torch.rand(count, 1, height, width) * 2 - 1
    return (slices + noise * torch.randn_like(slices)).clamp(-1, 1), slices


def measure(*pairs):
    metrics = reconstruction_metrics()
    for reconstructions, slices in pairs:
        metrics.update(reconstructions, slices)
    return {name: value.item() for name, value in metrics.compute().items()}


def gaussian_window():
    distance = np.arange(WINDOW) - WINDOW // 2
    line = np.exp(-(distance**2) / (2 * SIGMA**2))
    return np.outer(line, line) / line.sum() ** 2


def numpy_ssim(x, y):
    """SSIM of two pictures, window by window; a window at every pixel, pixels beyond the border mirrored."""
    window, (height, width) = gaussian_window(), x.shape
    x, y = (np.pad(picture.astype(np.float64), WINDOW // 2, mode="reflect") for picture in (x, y))
    values = []
    for top in range(height):
        for left in range(width):
            a, b = (picture[top : top + WINDOW, left : left + WINDOW] for picture in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
            values.append(luminance * (2 * covariance + C2) / (var_a + var_b + C2))
    return np.mean(values)


# ---------------------------------------------------------------- reconstructions


@pytest.mark.parametrize("size", [(24, 12), (13, 21)])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_ssim_is_the_brute_force_one(size, noise):
    reconstructions, slices = random_pair(3, *size, noise)
    expected = np.mean([numpy_ssim(x[0].numpy(), y[0].numpy()) for x, y in zip(reconstructions, slices)])
    assert measure((reconstructions, slices))["ssim"] == pytest.approx(expected, abs=1e-4)


def test_psnr_is_that_of_the_error_over_all_slices():
    reconstructions, slices = random_pair(3, 24, 12)
    reconstructions[0] = slices[0]  # a mean of three PSNRs would be infinite
    mse = ((reconstructions - slices).double().numpy() ** 2).mean()
    assert measure((reconstructions, slices))["psnr"] == pytest.approx(10 * math.log10(2**2 / mse), abs=1e-4)


def test_the_same_slices_have_ssim_1():
    _, slices = random_pair(2, 24, 12)
    assert measure((slices, slices))["ssim"] == pytest.approx(1, abs=1e-6)


def test_batches_of_unequal_size_give_what_one_batch_gives():
    reconstructions, slices = random_pair(7, 20, 12)
    reconstructions[:1] = slices[:1]
    whole = measure((reconstructions, slices))
    parts = measure(*zip(reconstructions.split([1, 4, 2]), slices.split([1, 4, 2])))
    assert parts == pytest.approx(whole, abs=1e-5)
    each = [measure((x, y))["ssim"] for x, y in zip(reconstructions.split(1), slices.split(1))]
    assert whole["ssim"] == pytest.approx(np.mean(each), abs=1e-5)


def test_the_range_does_not_follow_the_batch():
    """A pair of low contrast scores the same alone and beside one that spans [-1, 1]."""
    assert DATA_RANGE == (-1, 1)
    wide, low = random_pair(1, 20, 12), [0.05 * x for x in random_pair(1, 20, 12)]
    alone, beside = measure(low), measure(tuple(torch.cat(pair) for pair in zip(wide, low)))
    assert beside["ssim"] == pytest.approx((alone["ssim"] + measure(wide)["ssim"]) / 2, abs=1e-5)
    mse = (low[0] - low[1]).square().mean().item()
    assert alone["psnr"] == pytest.approx(10 * math.log10(4 / mse), abs=1e-3)


def test_values_beyond_the_range_are_clipped():
    reconstructions, slices = random_pair(2, 20, 12)
    reconstructions, slices = 3 * reconstructions, 2 * slices
    expected = measure((reconstructions.clamp(-1, 1), slices.clamp(-1, 1)))
    assert measure((reconstructions, slices)) == pytest.approx(expected, abs=1e-6)
    white = torch.ones(1, 1, 20, 12)
    assert measure((5 * white, white))["ssim"] == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- codes


def test_code_counts():
    codes = torch.tensor([[[0, 3], [3, 1]], [[3, 0], [0, 3]]])
    counts = code_counts(codes, 6)
    assert counts.tolist() == [3, 1, 0, 4, 0, 0]
    assert counts.dtype == torch.int64


def test_code_counts_of_batches_add_up():
    codes = torch.randint(9, (5, 4, 3))
    assert torch.equal(sum(code_counts(part, 9) for part in codes.split(2)), code_counts(codes, 9))


@pytest.mark.parametrize(
    ("counts", "share", "perplexity"),
    [
        ([7, 7, 7, 7], 1.0, 4.0),
        ([0, 12, 0, 0], 0.25, 1.0),
        ([5, 0, 5, 0], 0.5, 2.0),
        # entropy 1/2 ln 2 + 2/4 ln 4 = 1.5 ln 2
        ([2, 1, 1, 0, 0, 0], 0.5, 2**1.5),
        ([2**40, 2**40], 1.0, 2.0),
    ],
)
def test_codebook_use(counts, share, perplexity):
    assert codebook_use(torch.tensor(counts)) == pytest.approx((share, perplexity), rel=1e-12)


def test_codebook_use_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no codes were counted"):
        codebook_use(torch.zeros(4, dtype=torch.int64))
