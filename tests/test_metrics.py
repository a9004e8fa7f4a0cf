"""Metrics against brute-force implementations in NumPy and values derived by hand."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
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
    measured = reconstruction_metrics()
    for reconstructions, slices in pairs:
        measured.update(reconstructions, slices)
    return {name: value.item() for name, value in measured.compute().items()}


def gaussian_window():
    distance = np.arange(WINDOW) - WINDOW // 2
    line = np.exp(-(distance**2) / (2 * SIGMA**2))
    return np.outer(line, line) / line.sum() ** 2


def numpy_ssim(x, y):
    """SSIM of two images, window by window; a window at every pixel, the border padded by reflection."""
    window, (height, width) = gaussian_window(), x.shape
    x, y = (np.pad(image.astype(np.float64), WINDOW // 2, mode="reflect") for image in (x, y))
    values = []
    for top in range(height):
        for left in range(width):
            a, b = (image[top : top + WINDOW, left : left + WINDOW] for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
            values.append(luminance * (2 * covariance + C2) / (var_a + var_b + C2))
    return np.mean(values)


# ---------------------------------------------------------------- reconstructions


@pytest.mark.parametrize("size", [(24, 12), (13, 21)])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_ssim_equals_brute_force(size, noise):
    reconstructions, slices = random_pair(3, *size, noise)
    expected = np.mean([numpy_ssim(x[0].numpy(), y[0].numpy()) for x, y in zip(reconstructions, slices)])
    assert measure((reconstructions, slices))["ssim"] == pytest.approx(expected, abs=1e-4)


def test_psnr_uses_the_error_over_all_slices():
    reconstructions, slices = random_pair(3, 24, 12)
    reconstructions[0] = slices[0]  # a mean of three PSNRs would be infinite
    mse = ((reconstructions - slices).double().numpy() ** 2).mean()
    assert measure((reconstructions, slices))["psnr"] == pytest.approx(10 * math.log10(2**2 / mse), abs=1e-4)


def test_ssim_of_equal_slices_is_1():
    _, slices = random_pair(2, 24, 12)
    assert measure((slices, slices))["ssim"] == pytest.approx(1, abs=1e-6)


def test_reconstruction_metrics_do_not_depend_on_the_batch_size():
    reconstructions, slices = random_pair(7, 20, 12)
    reconstructions[:1] = slices[:1]
    expected = measure((reconstructions, slices))
    parts = measure(*zip(reconstructions.split([1, 4, 2]), slices.split([1, 4, 2])))
    assert parts == pytest.approx(expected, abs=1e-5)
    each = [measure((x, y))["ssim"] for x, y in zip(reconstructions.split(1), slices.split(1))]
    assert expected["ssim"] == pytest.approx(np.mean(each), abs=1e-5)


def test_data_range_does_not_depend_on_the_batch():
    """A low-contrast pair has the same SSIM alone and in a batch with a pair that spans [-1, 1]."""
    assert DATA_RANGE == (-1, 1)
    full, low = random_pair(1, 20, 12), [0.05 * x for x in random_pair(1, 20, 12)]
    alone, together = measure(low), measure(tuple(torch.cat(pair) for pair in zip(full, low)))
    assert together["ssim"] == pytest.approx((alone["ssim"] + measure(full)["ssim"]) / 2, abs=1e-5)
    mse = (low[0] - low[1]).square().mean().item()
    assert alone["psnr"] == pytest.approx(10 * math.log10(4 / mse), abs=1e-3)


def test_reconstruction_metrics_clip_to_the_data_range():
    reconstructions, slices = random_pair(2, 20, 12)
    reconstructions, slices = 3 * reconstructions, 2 * slices
    expected = measure((reconstructions.clamp(-1, 1), slices.clamp(-1, 1)))
    assert measure((reconstructions, slices)) == pytest.approx(expected, abs=1e-6)
    white = torch.ones(1, 1, 20, 12)
    assert measure((5 * white, white))["ssim"] == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- codes


def test_code_counts_are_the_histogram_of_the_codes():
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
def test_codebook_use_and_perplexity(counts, share, perplexity):
    assert codebook_use(torch.tensor(counts)) == pytest.approx((share, perplexity), rel=1e-12)


def test_codebook_use_without_codes_is_an_error():
    with pytest.raises(ValueError, match="no codes were counted"):
        codebook_use(torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("grid", "codes", "size", "expected"),
    [((64, 32), 512, (256, 128), 9 / 16), ((4, 4), 2, (8, 8), 1 / 4), ((2, 3), 256, (2, 3), 8)],
)
def test_bits_per_pixel_of_a_code_grid(grid, codes, size, expected):
    assert metrics.bits_per_pixel(grid, codes, size) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- all reconstruction metrics


@pytest.mark.parametrize(
    ("size", "scales"), [((256, 128), 4), ((128, 64), 3), ((64, 32), 2), ((32, 16), 1), ((176, 200), 5), ((11, 99), 1)]
)
def test_ms_ssim_uses_as_many_scales_as_fit(size, scales):
    weights = metrics.ms_ssim_weights(size)
    assert len(weights) == scales
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    paper = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    assert np.ptp(np.array(weights) / paper[:scales]) == pytest.approx(0, abs=1e-12)
    pair = random_pair(1, *size)
    values = metrics.all_reconstruction_metrics(size)(*pair)
    assert values.keys() == {"ssim", "ssim_unit_range", "ms_ssim", "psnr", "psnr_per_slice", "mse"}
    assert 0 < values["ms_ssim"] < 1  # no scale is empty
    assert metrics.all_reconstruction_metrics(size)(pair[1], pair[1])["ms_ssim"] == pytest.approx(1, abs=1e-5)


def test_all_reconstruction_metrics_equal_their_definitions():
    reconstructions, slices = random_pair(7, 32, 16)
    measured = metrics.all_reconstruction_metrics((32, 16))
    for pair in zip(reconstructions.split(3), slices.split(3)):
        measured.update(*pair)
    values = {name: value.item() for name, value in measured.compute().items()}
    assert {name: values[name] for name in ("ssim", "psnr")} == pytest.approx(
        measure((reconstructions, slices)), abs=1e-5
    )
    assert values["ms_ssim"] == pytest.approx(values["ssim"], abs=1e-5)  # one scale
    assert values["mse"] == pytest.approx(((reconstructions - slices).double() ** 2).mean().item(), rel=1e-5)
    assert values["psnr"] == pytest.approx(10 * math.log10(4 / values["mse"]), abs=1e-3)


def test_psnr_per_slice_is_the_mean_of_the_slices():
    reconstructions, slices = random_pair(6, 32, 16)
    reconstructions[0] = slices[0] + 0.01  # 20 dB better than the others: the pooled PSNR hardly changes
    values = metrics.all_reconstruction_metrics((32, 16))(reconstructions, slices)
    errors = (reconstructions.clamp(-1, 1) - slices.clamp(-1, 1)).double().square().mean((1, 2, 3))
    assert values["psnr_per_slice"].item() == pytest.approx((10 * (4 / errors).log10()).mean().item(), abs=1e-3)
    assert values["psnr_per_slice"] > values["psnr"] + 1


def test_unit_range_ssim_equals_brute_force():
    """Window by window with NumPy: values in [0, 1], sample covariance, only windows inside the slice."""
    pairs = [part.numpy()[:, 0] for part in random_pair(3, 16, 12)]
    expected = []
    for x, y in zip(*((part.astype(float).clip(-1, 1) + 1) / 2 for part in pairs)):
        for row, column in np.ndindex(16 - 6, 12 - 6):
            a, b = (part[row : row + 7, column : column + 7].ravel() for part in (x, y))
            (var_a, cov), (_, var_b) = np.cov(a, b)
            ssim = (2 * a.mean() * b.mean() + 1e-4) * (2 * cov + 9e-4)
            expected.append(ssim / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
    measured = metrics.UnitRangeSSIM()
    for part in zip(*(torch.from_numpy(part)[:, None].split(2) for part in pairs)):
        measured.update(*part)
    assert measured.compute().item() == pytest.approx(np.mean(expected), abs=1e-9)


def test_rounding_to_grey_levels_keeps_real_slices():
    slices = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    assert torch.equal(metrics.round_to_grey_levels(slices), slices)
    noisy = slices + (torch.rand(slices.shape) - 0.5) * 0.99 / 127.5
    torch.testing.assert_close(metrics.round_to_grey_levels(noisy), slices, rtol=0, atol=1e-6)
    assert metrics.round_to_grey_levels(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]


# ---------------------------------------------------------------- JPEG 2000


def smooth_slices(count, height, width):
    """Low-pass noise with a little white noise."""
    coarse = torch.nn.functional.interpolate(
        torch.rand(count, 1, height // 8, width // 8), (height, width), mode="bicubic"
    )
    return (2 * coarse - 1 + 0.05 * torch.randn(count, 1, height, width)).clamp(-1, 1)


def test_jpeg2000_uses_the_resolutions_that_need_fewest_bits():
    images = metrics.to_grey_levels(smooth_slices(8, 128, 64))[:, 0].numpy()
    rates = [metrics.bits_at_psnr(images, 25.0, resolutions) for resolutions in metrics.RESOLUTIONS]
    slices = torch.from_numpy(images)[:, None] / 127.5 - 1
    assert metrics.jpeg2000_bits_per_slice(slices, 25.0) == min(rates) < max(rates)


@pytest.mark.parametrize(("psnr", "resolutions"), [(22.0, 4), (35.0, 4), (22.0, 6)])
def test_jpeg2000_rate_belongs_to_the_requested_psnr(psnr, resolutions):
    """The rate lies between the rates at 0.5 dB less and at 0.5 dB more, measured independently with Pillow."""
    slices = smooth_slices(6, 64, 48)
    images = metrics.to_grey_levels(slices)[:, 0].numpy()
    rates = {}
    for quality in np.arange(psnr - 4, psnr + 4, 0.25):
        streams = [io.BytesIO() for _ in images]
        for image, stream in zip(images, streams):
            options = {"irreversible": True, "quality_mode": "dB", "quality_layers": [float(quality)], "no_jp2": True}
            Image.fromarray(image).save(stream, format="JPEG2000", num_resolutions=resolutions, **options)
        mse = np.mean([(np.asarray(Image.open(s), float) - p) ** 2 for s, p in zip(streams, images)])
        headers = [stream.getvalue().index(b"\xff\x93") + 4 for stream in streams]
        sizes = [len(stream.getvalue()) - header for stream, header in zip(streams, headers)]
        rates[10 * math.log10(255**2 / mse)] = 8 * np.mean(sizes)
    below = max(rate for reached, rate in rates.items() if reached < psnr - 0.5)
    above = min(rate for reached, rate in rates.items() if reached > psnr + 0.5)
    assert below < metrics.bits_at_psnr(images, psnr, resolutions) < above


def test_jpeg2000_rate_without_headers_is_near_0_for_constant_slices():
    flat = torch.full((3, 1, 64, 32), -1.0)
    assert metrics.jpeg2000_bits_per_slice(flat, 30) <= 128  # a few empty packets
    assert metrics.jpeg2000_bits_per_slice(2 * torch.rand(3, 1, 64, 32) - 1, 30) > 64 * 32


# ---------------------------------------------------------------- patches


def test_laplacian_pyramid_reconstructs_the_slices():
    slices = torch.rand(2, 1, 72, 40)
    levels = metrics.laplacian_pyramid(slices)
    assert [tuple(level.shape[2:]) for level in levels] == [(72, 40), (36, 20)]
    line = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(line, line)[None, None]
    torch.testing.assert_close(levels[0] + metrics.upsample(levels[1], slices.shape, kernel), slices)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [((128, 64), [(128, 64), (64, 32), (32, 16)]), ((32, 16), [(32, 16)]), ((70, 33), [(70, 33), (35, 17)])],
)
def test_laplacian_pyramid_ends_at_16_pixels_and_is_0_for_constant_slices(size, sizes):
    *band_pass, low_pass = levels = metrics.laplacian_pyramid(torch.full((1, 1, *size), 0.3))
    assert [tuple(level.shape[2:]) for level in levels] == sizes
    torch.testing.assert_close(low_pass, torch.full_like(low_pass, 0.3))
    for level in band_pass:
        torch.testing.assert_close(level, torch.zeros_like(level))


@pytest.fixture
def few_patches(monkeypatch):
    monkeypatch.setattr(metrics, "PATCHES", 1024)


def test_sliced_wasserstein_of_equal_sets_is_0(few_patches):
    slices = torch.rand(5, 1, 64, 32)
    assert metrics.sliced_wasserstein(slices, slices) == {"64x32": 0, "32x16": 0}


def test_sliced_wasserstein_of_a_brightness_offset_is_the_analytic_one(few_patches):
    """An offset c moves each of the 49 pixels of a patch by c / std in the low-pass level, and a projection by c / std
    times the sum of its direction. For directions uniform on the sphere in n dimensions, the mean absolute sum is
    sqrt(n) G(n/2) / (sqrt(pi) G((n+1)/2)) = 0.80, with a standard error of 0.027 over 512 directions; five of them are
    allowed (false alarms: 6e-7). The standard deviation of sampled patches is within a few per cent of that of all."""
    slices = 0.5 * torch.randn(20, 1, 64, 32)
    distances = metrics.sliced_wasserstein(slices + 0.1, slices)
    assert distances["64x32"] == pytest.approx(0, abs=1e-5)
    last = metrics.laplacian_pyramid(slices)[-1]
    mean = 7 * math.gamma(24.5) / (math.sqrt(math.pi) * math.gamma(25))
    assert distances["32x16"] * last.std().item() / 0.1 == pytest.approx(mean, abs=5 * 0.027 + 0.04)


def test_sliced_wasserstein_has_the_units_of_the_reference(few_patches):
    """Swapping the sets halves the distance if the new reference has twice the contrast."""
    slices = torch.randn(20, 1, 64, 32)
    one, other = metrics.sliced_wasserstein(2 * slices, slices), metrics.sliced_wasserstein(slices, 2 * slices)
    assert one == pytest.approx({level: 2 * distance for level, distance in other.items()}, rel=1e-4)


def test_sliced_wasserstein_detects_blur_at_full_resolution(few_patches):
    slices = torch.randn(20, 1, 64, 32)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(slices, (1, 1, 1, 1), mode="reflect"), 3, 1)
    distances = metrics.sliced_wasserstein(blurred, slices)
    baseline = metrics.sliced_wasserstein(torch.randn(20, 1, 64, 32), slices)
    assert distances["64x32"] > 5 * baseline["64x32"]
    assert distances["64x32"] > distances["32x16"]


# ---------------------------------------------------------------- random features


def test_random_features_are_standardised_and_depend_on_neither_batch_nor_random_state():
    training, slices = torch.rand(70, 1, 32, 16), torch.rand(3, 1, 32, 16)
    state = torch.get_rng_state()
    features = metrics.RandomFeatures(training)
    made = features(training)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.shape == (70, 64)
    torch.testing.assert_close(made.mean(0), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(made.std(0), torch.ones(64), atol=1e-3, rtol=0)
    again = metrics.RandomFeatures(training)(torch.cat([slices, training]))
    torch.testing.assert_close(again[3:], made, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again[:3], features(slices), atol=1e-3, rtol=1e-3)


def gaussian(count, mean, std):
    """Features whose sample mean and diagonal sample covariance are exact."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_random_feature_frechet_of_known_moments():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    one, other = gaussian(50, [0, 1, 2], [1, 2, 3]), gaussian(40, [1, 1, 0], [2, 2, 0.5])
    assert metrics.random_feature_frechet(one, other) == pytest.approx(1 + 4 + 1 + 2.5**2, rel=1e-9)
    assert metrics.random_feature_frechet(one, one.flip(0)) == pytest.approx(0, abs=1e-9)


def test_random_feature_frechet_equals_the_eigenvalue_formula():
    """For covariances that do not commute, and for fewer features than dimensions."""
    for count in (60, 4):
        one, other = torch.randn(count, 6) @ torch.randn(6, 6), torch.randn(30, 6) @ torch.randn(6, 6)
        c1, c2 = (np.cov(x.double().numpy().T) for x in (one, other))
        roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(min=0)).sum()
        means = (one.double().mean(0) - other.double().mean(0)).square().sum().item()
        expected = means + np.trace(c1) + np.trace(c2) - 2 * roots
        assert metrics.random_feature_frechet(one, other) == pytest.approx(expected, rel=1e-5)


def brute_force_density_and_coverage(features, reference, cases, k):
    """Density and coverage, ball by ball and feature by feature."""
    hits = np.zeros((len(reference), len(features)))
    for i, x in enumerate(reference):
        others = sorted(np.linalg.norm(x - y) for j, y in enumerate(reference) if cases[j] != cases[i])
        for j, y in enumerate(features):
            hits[i, j] = np.linalg.norm(x - y) < others[k - 1]
    return hits.sum() / (k * len(features)), hits.any(1).mean()


@pytest.mark.parametrize(("cases", "k"), [(None, 5), ([0] * 24, 5), ([0, 1, 2, 3] * 6, 5), ([0] * 22 + [1] * 2, 2)])
def test_density_and_coverage_equal_brute_force(cases, k):
    reference, features = torch.randn(24, 3), 0.8 * torch.randn(17, 3) + 0.2
    groups = range(24) if cases is None or len(set(cases)) == 1 else cases
    expected = brute_force_density_and_coverage(features.numpy(), reference.numpy(), groups, k)
    assert 0 < expected[1] < 1
    assert metrics.density_and_coverage(features, reference, cases) == pytest.approx(expected, abs=1e-6)


def test_density_and_coverage_of_equal_disjoint_and_collapsed_sets():
    """A set covers itself, and its features lie in k = 5 balls on average: their own and those of four others."""
    reference = torch.randn(30, 4)
    assert metrics.density_and_coverage(reference, reference) == pytest.approx((1, 1), abs=1e-6)
    assert metrics.density_and_coverage(reference + 100, reference) == (0, 0)
    density, coverage = metrics.density_and_coverage(reference[:1].repeat(30, 1), reference)
    assert coverage < 0.5 < density


def test_coverage_uses_neighbours_of_other_patients():
    """With clustered patients, slices of new patients are covered only if the balls reach to other patients."""
    random = torch.Generator().manual_seed(3)
    patients = torch.randn(20, 4, generator=random)
    slices = (patients[:, None] + 1e-3 * torch.randn(20, 8, 4, generator=random)).flatten(0, 1)
    cases = [patient for patient in range(20) for _ in range(8)]
    others = torch.randn(20, 4, generator=random)
    assert metrics.density_and_coverage(others, slices)[1] == 0
    assert metrics.density_and_coverage(others, slices, cases)[1] > 0.5


def test_ms_ssim_diversity_of_equal_slices_a_pair_and_noise():
    slice_ = smooth_slices(1, 32, 16)
    assert metrics.ms_ssim_diversity(slice_.repeat(6, 1, 1, 1)) == pytest.approx(0, abs=1e-5)
    pair = smooth_slices(2, 64, 32)
    ms_ssim = metrics.all_reconstruction_metrics((64, 32))(pair[:1], pair[1:])["ms_ssim"].item()
    assert metrics.ms_ssim_diversity(pair) == pytest.approx(1 - ms_ssim, abs=1e-5)
    assert metrics.ms_ssim_diversity(2 * torch.rand(6, 1, 32, 16) - 1) > 0.9


# ---------------------------------------------------------------- folds of patients


def test_groups_are_numbered_as_they_first_occur():
    assert metrics.number_groups(["b", None, "a", "b", None]).tolist() == [0, 1, 2, 0, 1]


def test_two_fold_split_keeps_patients_together():
    cases = ["a"] * 7 + ["b"] * 3 + ["c"] * 5 + ["d"] * 1
    folds = metrics.two_fold_split(cases)
    assert {case: {*folds[np.array(cases) == case].tolist()} for case in "abcd"} == {
        "a": {False},
        "b": {True},
        "c": {True},
        "d": {False},
    }
    assert metrics.two_fold_split(range(10)).sum() == 5


def test_two_fold_split_of_one_patient_alternates_quarters():
    assert metrics.two_fold_split(["a"] * 12).tolist() == ([False] * 3 + [True] * 3) * 2
    for count in (2, 3, 4):
        assert metrics.two_fold_split([None] * count).tolist() == [False, True, False, True][:count]
