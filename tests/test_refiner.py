"""refiner.py: the network by its gradients and known velocities, the ODE solver against exact solutions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import refiner as refiner_module
from modules import AUGMENTATIONS, VQVAE, VQVAEConfig, stream_seed
from refiner import GRAIN, Conditioning, Refiner, RefinerConfig, RefinerNoise, from_roots, grain_strength, to_roots

SMALL = VQVAEConfig(
    downsampling=4, channels=16, residual_blocks=1, hidden_channels=8, codebook_size=20, embedding_dim=6
)
SMALL_REFINER = RefinerConfig(downsampling=4, codebook_size=20, channels=8, levels=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_refiner(velocity=None, std=1.0, **fields):
    """A refiner with random weights or, if given, a known velocity(x, t) with t (N, 1, 1, 1)."""
    refiner = Refiner(replace(SMALL_REFINER, **fields)).eval()
    for layer in refiner.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.reset_parameters()  # some start at 0
    refiner.residual_std.copy_(torch.as_tensor(std))
    if velocity:
        refiner.forward = lambda x, time, conditioning: velocity(x, time[:, None, None, None])
    return refiner


def zero_velocity(x, time):
    return torch.zeros_like(x)


def gaussian_velocity(x, time, std=1.0):
    """The velocity of Gaussian residuals of a standard deviation; to that of 1 the network adds its output."""
    return x * (std**2 * time - (1 - time)) / ((std * time) ** 2 + (1 - time) ** 2)


def noise_of(sample_ids, given, seed=0):
    """The noise that the refiner transports: its solver multiplies it by SOLVER_STD for that velocity, and no more."""
    std = refiner_module.SOLVER_STD
    refiner = small_refiner(lambda x, time: gaussian_velocity(x, time, std), std=0.1)
    return added(refiner.sample(sample_ids, *given, seed), given) / (0.1 * std)


def added(slices, given):
    """What a refiner added to the square roots of the slices that a VQ-VAE decodes."""
    codes, vqvae = given
    return to_roots(slices) - to_roots(vqvae.decode(codes))


def stream_noise(sample_id):
    """The noise (1, 16, 8) of a sample's own random stream."""
    stream = torch.Generator().manual_seed(stream_seed(refiner_module.SEED_OFFSET, sample_id))
    return torch.empty(1, 16, 8).normal_(generator=stream)


def some_codes(count, size=(16, 8)):
    """Codes drawn at random, and a VQ-VAE that decodes them."""
    return torch.randint(20, (count, size[0] // 4, size[1] // 4)), VQVAE(SMALL).eval()


def grey_codes(count, size=(16, 8)):
    """Codes drawn at random, and a VQ-VAE that decodes them to 0 everywhere."""
    codes, vqvae = some_codes(count, size)
    for parameter in vqvae.decoder[-2].parameters():
        torch.nn.init.zeros_(parameter)
    return codes, vqvae


def test_fit_residuals_equals_brute_force():
    """Per code and pixel of its square, with 10 pseudo-observations of the mean; the first pixel has no residual."""
    std = 0.05 * torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 1, 2, 3)
    decoded, codes = torch.rand(30, 1, 8, 12) - 0.5, torch.randint(12, (30, 2, 3)) ** 2 // 12  # uneven frequencies
    slices = (decoded + std * torch.randn(30, 1, 8, 12)).clamp(-1, 1)
    refiner = small_refiner()
    refiner.fit_residuals(slices, decoded, codes)

    def root(value):
        return math.sqrt(value.item() + 1 + 2 / 255)

    squares = [[[] for _ in range(16)] for _ in range(20)]
    for n, row, column, i, j in np.ndindex(30, 2, 3, 4, 4):
        place = n, 0, 4 * row + i, 4 * column + j
        squares[codes[n, row, column]][4 * i + j].append((root(slices[place]) - root(decoded[place])) ** 2)
    counts = [len(square[0]) for square in squares]
    assert min(counts) == 0
    assert max(counts) > 30
    for pixel in range(16):
        mean = np.mean(sum((square[pixel] for square in squares), []))
        for code in range(20):
            own = squares[code][pixel]
            expected = max(1e-3, np.sqrt((sum(own) + 10 * mean) / (len(own) + 10)))
            assert refiner.residual_std[code, pixel].item() == pytest.approx(expected, rel=1e-5)
    assert (refiner.residual_std[:, 0] == 1e-3).all()
    assert (refiner.residual_std[:, 1:] > 0.01).all()


@pytest.mark.parametrize("level", [0, 1, 40, 255])
def test_roots_and_slices_are_inverse(level):
    """Of grey levels; roots outside the range are clipped."""
    slices = torch.full((1, 1, 2, 2), level / 127.5 - 1)
    roots = to_roots(slices)
    torch.testing.assert_close(roots, torch.full_like(roots, math.sqrt((level + 1) / 127.5)))
    torch.testing.assert_close(from_roots(roots), slices, rtol=0, atol=1e-6)
    assert (from_roots(roots - 2) == -1).all()
    assert (from_roots(roots + 2) == 1).all()


def test_grain_is_the_logarithm_of_the_noise():
    """The second number of all noise; the first of the weaker half, in the lowest fifth of its blocks."""
    noise = torch.randn(200, 1, 64, 64)
    half = torch.cat([noise[..., :32], 3 * noise[..., 32:]], 3)
    for scale in (0.1, 2.0):
        smooth, overall = grain_strength(scale * half).mean(0)
        assert smooth.item() == pytest.approx(math.log(scale), abs=0.12)
        assert overall.item() == pytest.approx(math.log(scale * math.sqrt(5)), abs=0.01)
    assert grain_strength(torch.zeros(2, 1, 9, 7)).isfinite().all()
    for smallest in ((2, 2), (3, 5)):
        assert grain_strength(torch.randn(2, 1, *smallest)).shape == (2, GRAIN)


def test_standard_grain_has_mean_0_and_covariance_1_over_the_training_slices():
    """Of slices whose noise differs in strength; equal slices have grain 0."""
    given = grey_codes(300, (32, 16))
    refiner, decoded = small_refiner(), torch.zeros(300, 1, 32, 16)
    slices = 0.02 * (1 + torch.rand(300, 1, 1, 1)) * torch.randn(300, 1, 32, 16)
    refiner.fit_residuals(slices, decoded, given[0])
    grains = refiner.standard_grain(slices, decoded, given[0])
    torch.testing.assert_close(grains.mean(0), torch.zeros(GRAIN), rtol=0, atol=1e-4)
    torch.testing.assert_close(grains.T.cov(correction=0), torch.eye(GRAIN), rtol=0, atol=0.02)
    refiner.fit_residuals(decoded, decoded, given[0])
    assert refiner.standard_grain(decoded, decoded, given[0]).abs().max() < 1e-3


def test_grain_of_a_slice_does_not_depend_on_its_brightness():
    """The same noise in intensities, with the standard deviations of its square roots in dark and in bright tissue."""
    noise, codes = 0.02 * torch.randn(2, 1, 16, 8), some_codes(2)[0]
    grains = []
    for grey in (-0.5, 0.5):
        decoded = torch.full_like(noise, grey)
        refiner = small_refiner(std=0.02 / (2 * math.sqrt(grey + 1 + 2 / 255)))
        grains.append(refiner.standard_grain(decoded + noise, decoded, codes))
    torch.testing.assert_close(grains[0], grains[1], rtol=0, atol=1e-3)


def test_refiner_is_told_the_grain():
    """In training that of the slice, in sampling one number of each kind drawn for each slice."""
    given, told = grey_codes(400), []
    refiner = small_refiner(lambda x, time: zero_velocity(x, time))
    refiner.forward = lambda x, time, given: (told.append(given.slice_wide[:, -GRAIN:]), zero_velocity(x, time))[1]
    slices = 0.1 * torch.randn(400, 1, 16, 8)
    refiner.loss(slices, *given)
    assert torch.equal(told.pop(), refiner.standard_grain(slices, torch.zeros_like(slices), given[0]))
    refiner.sample(range(400), *given)
    assert all(torch.equal(one, told[0]) for one in told)
    torch.testing.assert_close(told[0].T.cov(), torch.eye(GRAIN), rtol=0, atol=5 * 2**0.5 / 20)
    assert torch.equal(refiner.condition(given[0], slices).slice_wide, torch.zeros(400, 1 + AUGMENTATIONS + GRAIN))
    network = small_refiner()
    velocities = [
        network(slices, torch.rand(400).fill_(0.5), network.condition(given[0], slices, grain=grains))
        for grains in (torch.zeros(400, GRAIN), torch.ones(400, GRAIN))
    ]
    assert (velocities[0] - velocities[1]).abs().amax((1, 2, 3)).min() > 1e-4


def test_pixel_std_has_the_std_of_each_code_at_its_pixels():
    refiner, codes = small_refiner(std=torch.rand(20, 16)), torch.randint(20, (2, 3, 5))
    stds = refiner.pixel_std(codes)
    assert stds.shape == (2, 1, 12, 20)
    for n, row, column, i, j in np.ndindex(2, 3, 5, 4, 4):
        expected = refiner.residual_std[codes[n, row, column], 4 * i + j]
        assert stds[n, 0, 4 * row + i, 4 * column + j] == expected


@pytest.mark.parametrize("size", [(16, 8), (8, 24), (4, 4)])
def test_refiner_shapes_and_ranges(size):
    refiner, (codes, vqvae) = small_refiner(std=0.5), some_codes(3, size)
    velocities = refiner(torch.randn(3, 1, *size), torch.rand(3), refiner.condition(codes, vqvae.decode(codes)))
    loss = refiner.loss(torch.rand(3, 1, *size), codes, vqvae)
    slices = refiner.sample(range(3), codes, vqvae)
    assert velocities.shape == slices.shape == (3, 1, *size)
    assert loss.shape == ()
    assert loss > 0
    assert slices.abs().max() <= 1
    assert slices.std() > 0.1


def test_velocity_depends_on_noise_time_and_conditioning():
    """Changing any of the inputs changes the output for every slice: noise, time, and what codes and decoder say."""
    refiner, (codes, vqvae) = small_refiner(), grey_codes(3)
    x, time = torch.randn(3, 1, 16, 8), torch.tensor([0.1, 0.5, 0.9])

    def answer(x, time):
        return refiner(x, time, refiner.condition(codes, vqvae.decode(codes))) - gaussian_velocity(
            x, time[:, None, None, None]
        )

    answers = [answer(x, time), answer(x + 0.05, time), answer(x, time + 0.05)]
    for known in (refiner.residual_std, vqvae.decoder[-2].bias.data):
        known += 0.05
        answers.append(answer(x, time))
        known -= 0.05
    for other in answers[1:]:
        assert ((other - answers[0]).abs().amax((1, 2, 3)) > 1e-4).all()


def test_refiner_is_told_how_a_slice_was_augmented():
    """Also that it was, however little; without augmentation all parameters are 0."""
    refiner, (codes, vqvae) = small_refiner(), some_codes(3)
    x, time, decoded = torch.randn(3, 1, 16, 8), torch.rand(3), vqvae.decode(codes)

    def answer(augmentation):
        return refiner(x, time, refiner.condition(codes, decoded, augmentation))

    plain, augmented = answer(None), torch.zeros(3, AUGMENTATIONS)
    torch.testing.assert_close(answer(augmented), plain, rtol=0, atol=0)
    augmented[1, 2] = 1e-9
    differences = (answer(augmented) - plain).abs().amax((1, 2, 3))
    assert (differences > 1e-4).tolist() == [False, True, False]
    answers = [answer(augmented.index_fill(1, torch.tensor([i]), 1.0)) for i in range(AUGMENTATIONS)]
    assert (torch.cdist(torch.stack(answers).flatten(1), torch.stack(answers).flatten(1)) > 1e-3).sum() == 6 * 5


def test_refiner_starts_as_the_flow_of_gaussian_residuals():
    refiner, (codes, vqvae) = Refiner(SMALL_REFINER), some_codes(2)
    x, time = torch.randn(2, 1, 16, 8), torch.rand(2)
    velocity = refiner(x, time, refiner.condition(codes, vqvae.decode(codes)))
    torch.testing.assert_close(velocity, gaussian_velocity(x, time[:, None, None, None]))


@pytest.mark.parametrize("downsampling", [1, 2, 3, 8, 16])
def test_refiner_takes_codes_of_any_downsampling(downsampling):
    """The codes matter at every pixel."""
    vqvae = VQVAE(replace(SMALL, downsampling=downsampling)).eval()
    refiner = small_refiner(downsampling=downsampling, std=0.1)
    codes = torch.zeros(2, 96 // downsampling, 96 // downsampling, dtype=torch.int64)
    codes[1] = 1
    slices = refiner.sample([0, 0], codes, vqvae)
    assert slices.shape == (2, 1, 96, 96)
    assert ((slices[0] - slices[1]).abs() > 1e-6).float().mean() > 0.9


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (9, 7), (3, 1)])
def test_slices_of_any_size_are_padded_to_what_all_levels_need(size):
    """Padding repeats the edge: a slice that is padded by hand has the same velocity."""
    refiner, time = small_refiner(), torch.rand(2)
    rows, columns = size
    x, given = (
        torch.randn(2, 1, *size),
        Conditioning(torch.rand(2, 2, *size), torch.zeros(2, 1 + AUGMENTATIONS + GRAIN)),
    )
    answer = refiner(x, time, given)
    assert answer.shape == x.shape
    padding = 0, -columns % 4, 0, -rows % 4
    x, pictures = (F.pad(of, padding, mode="replicate") for of in (x, given.pictures))
    padded = refiner(x, time, given._replace(pictures=pictures))
    torch.testing.assert_close(answer, padded[..., :rows, :columns], rtol=0, atol=1e-6)


def test_velocity_shifts_with_the_slice():
    """By the step of the coarsest level; a shift by one pixel moves what the finest level draws."""
    refiner, time = small_refiner(), torch.rand(2)
    x, pictures = torch.randn(2, 1, 96, 96), torch.rand(2, 2, 96, 96)

    def answer(rows, columns):
        given = Conditioning(pictures.roll((rows, columns), (2, 3)), torch.zeros(2, 1 + AUGMENTATIONS + GRAIN))
        moved_back = refiner(x.roll((rows, columns), (2, 3)), time, given).roll((-rows, -columns), (2, 3))
        return moved_back[..., 42:-42, 42:-42]  # away from the edges, which do not move

    torch.testing.assert_close(answer(4, -8), answer(0, 0), rtol=0, atol=1e-5)
    assert (answer(1, 0) - answer(0, 0)).abs().max() > 1e-4
    for grow in refiner.grow:
        torch.nn.init.zeros_(grow.weight)  # cuts off all levels but the finest
    torch.testing.assert_close(answer(1, 3), answer(0, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("levels", "least", "most"), [(1, 6, 6), (3, 24, 33)])
def test_velocity_sees_as_far_as_the_coarsest_level(levels, least, most):
    """One level has six convolutions of 3x3; with three levels they reach 6 + 8 + 16 pixels, up to rounding to 4."""
    refiner, time = small_refiner(levels=levels), torch.rand(1)
    x, given = (
        torch.randn(1, 1, 80, 80),
        Conditioning(torch.rand(1, 2, 80, 80), torch.zeros(1, 1 + AUGMENTATIONS + GRAIN)),
    )
    changed = x.clone()
    changed[..., 40, 40] += 1
    felt = (refiner(changed, time, given) != refiner(x, time, given))[0, 0].nonzero() - 40
    assert least <= felt.abs().max() <= most


def test_flow_loss_of_gaussian_residuals_is_the_analytic_one():
    """For Gaussian residuals, the variance of x_1 - x_0 given x is 1 / (t^2 + (1 - t)^2).

    Integrated over logit-normal times that is 1.741; 5 standard deviations of 4000 times and 256,000 squares are 0.03.
    """
    logits = np.linspace(-12, 12, 2401)
    t, density = 1 / (1 + np.exp(-logits)), np.exp(-(logits**2) / 2) / np.sqrt(2 * np.pi)
    expected = 0.01 * (density / (t**2 + (1 - t) ** 2)).sum()
    refiner, (codes, vqvae) = Refiner(SMALL_REFINER), some_codes(4000, (8, 8))
    refiner.residual_std.copy_(0.01 + 0.05 * torch.rand(20, 16))
    slices = from_roots(to_roots(vqvae.decode(codes)) + refiner.pixel_std(codes) * torch.randn(4000, 1, 8, 8))
    assert expected == pytest.approx(1.741, abs=1e-3)
    assert refiner.loss(slices, codes, vqvae).item() == pytest.approx(expected, abs=0.03)


def test_flow_loss_of_the_exact_velocity_is_0():
    """If each slice's residual is known, the velocity is (residual / std - x) / (1 - t)."""
    residual, (codes, vqvae) = 0.05 * torch.randn(40, 1, 16, 8), some_codes(40)
    refiner = small_refiner(std=0.1 + torch.rand(20, 16))
    slices = from_roots(to_roots(vqvae.decode(codes)) + residual)
    scaled = residual / refiner.pixel_std(codes)
    refiner.forward = lambda x, time, conditioning: (scaled - x) / (1 - time[:, None, None, None])
    assert refiner.loss(slices, codes, vqvae) < 1e-6
    refiner.forward = lambda x, time, conditioning: scaled - x
    assert refiner.loss(slices, codes, vqvae) > 0.1


def test_training_times_are_logit_normal():
    """Mean and shares of 4000 logits are those of a normal distribution within 5 standard deviations."""
    times = []
    refiner = small_refiner(lambda x, time: (times.append(time), zero_velocity(x, time))[1])
    refiner.loss(torch.zeros(4000, 1, 4, 4), *grey_codes(4000, (4, 4)))
    logits = times[0].flatten().logit()
    assert logits.mean().abs() < 5 / 4000**0.5
    for limit, share in ((-1.0, 0.1587), (0.4307, 0.6667), (2.0, 0.9772)):
        assert abs((logits < limit).float().mean() - share) < 5 * (share * (1 - share) / 4000) ** 0.5


def test_initial_noise_is_white():
    """5 standard deviations of the mean and the variance of 16,384 pixels."""
    noise = noise_of(range(128), grey_codes(128))
    assert noise.mean().abs() < 5 / 128
    assert abs(noise.var() - 1) < 5 * 2**0.5 / 128
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.5


def solve_scalar(velocity, start, steps):
    """Integrate dx/dt = velocity(x, t) from 0 to 1 with the two-step Adams-Bashforth method on x / s(t).

    The slope of each step is the mean, over the step, of the line through the present slope and the one before.
    """
    y, earlier, std = start, [], refiner_module.SOLVER_STD
    times = refiner_module.solver_times(steps)
    for t, end in zip(times, times[1:]):
        s = math.sqrt((std * t) ** 2 + (1 - t) ** 2)
        earlier.append((t, (velocity(s * y, t) - gaussian_velocity(s * y, t, std)) / s))
        line = np.polyfit(*zip(*earlier[-2:]), min(len(earlier), 2) - 1)
        y += (end - t) * np.polyval(line, (t + end) / 2)
    return std * y


@pytest.mark.parametrize("velocity", [lambda x, t: 0 * x, lambda x, t: x, lambda x, t: x * t - 0.5 * x])
def test_ode_solver_takes_the_steps_of_the_scalar_one(velocity):
    """With 24 steps, also within 1 % of the exact solution."""
    steps = RefinerConfig().ode_steps
    refiner, given = small_refiner(velocity, std=0.02), grey_codes(3)
    factor = solve_scalar(velocity, 1.0, steps)
    expected = factor * 0.02 * noise_of(range(3), given)
    torch.testing.assert_close(added(refiner.sample(range(3), *given), given), expected, rtol=0, atol=2e-7)
    exact = np.exp(np.mean([velocity(1.0, (i + 0.5) / 1000) for i in range(1000)]))
    assert solve_scalar(velocity, 1.0, 24) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_gaussian_rate_is_the_slope_of_the_spread(std):
    time = torch.linspace(0, 1, 10001, dtype=torch.float64)
    slope = refiner_module.spread(time, std).log().diff() * 10000
    middle = (time[1:] + time[:-1]) / 2
    torch.testing.assert_close(slope, refiner_module.gaussian_rate(middle, std), atol=1e-5, rtol=0)


def test_the_flow_of_gaussian_residuals_of_the_solver_std_is_integrated_exactly():
    """Each noise ends where it began, times the standard deviation."""
    for own, noise in zip(range(64), noise_of(range(64), grey_codes(64))):
        torch.testing.assert_close(noise, stream_noise(own), rtol=0, atol=1e-5)


def test_an_untrained_refiner_adds_noise_of_the_residual_std():
    """Its velocity is that of Gaussian residuals, which the default steps lengthen a little."""
    codes, vqvae = some_codes(64)
    roots, untrained = to_roots(vqvae.decode(codes)), Refiner(SMALL_REFINER)
    untrained.residual_std.copy_(0.02 + 0.05 * torch.rand(20, 16))
    factor = solve_scalar(gaussian_velocity, 1.0, RefinerConfig().ode_steps)
    assert factor == pytest.approx(1, abs=0.05)
    for own, drawn in zip(range(64), untrained.sample(range(64), codes, vqvae)):
        expected = roots[own] + untrained.pixel_std(codes)[own] * factor * stream_noise(own)
        torch.testing.assert_close(drawn, from_roots(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0])
def test_the_default_steps_keep_residuals_weaker_than_their_code_s(std):
    """In smooth places: a solver that is exact for a standard deviation of 1 leaves 70 % of 0.3."""
    factor = solve_scalar(lambda x, t: gaussian_velocity(x, t, std), 1.0, RefinerConfig().ode_steps)
    assert factor == pytest.approx(std, rel=0.13)


def test_each_step_of_the_solver_is_one_pass_at_its_beginning():
    times = []
    small_refiner(lambda x, time: (times.append(time.unique().item()), zero_velocity(x, time))[1]).sample(
        range(2), *grey_codes(2)
    )
    np.testing.assert_allclose(times, refiner_module.solver_times(RefinerConfig().ode_steps)[:-1], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 100])
def test_steps_of_the_solver_go_from_0_to_1_and_are_shorter_at_both_ends(steps):
    times = np.array(refiner_module.solver_times(steps))
    assert len(times) == steps + 1
    np.testing.assert_allclose(times + times[::-1], 1, atol=1e-12)
    lengths = np.diff(times)
    assert times[0] == 0 and (lengths > 0).all()
    assert steps < 3 or lengths[0] < 0.9 * lengths[steps // 2]


@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_sampling_a_known_residual_adds_it(contrast):
    """The velocity towards one slice is (x_1 - x) / (1 - t): eight steps take all but 1 % of the noise there."""
    residual, (codes, vqvae) = contrast * (torch.rand(3, 1, 16, 8) - 0.5), some_codes(3)
    refiner = small_refiner(lambda x, time: (residual / 0.2 - x) / (1 - time), std=0.2, ode_steps=8)
    left = added(refiner.sample(range(3), codes, vqvae), (codes, vqvae)) - residual
    assert left.square().mean().sqrt() < 0.01 * 0.2


def test_sampling_a_normal_distribution_has_its_mean_and_variance():
    """For x_1 of N(m, s^2) the velocity is the mean of x_1 - x_0 given x, and takes x_0 to m + s x_0.

    Sixteen steps come within 3 % of s.
    """
    m, s = 0.7, 0.5

    def velocity(x, time):
        return m + (time * s**2 - (1 - time)) / ((1 - time) ** 2 + (time * s) ** 2) * (x - time * m)

    given = grey_codes(64)
    start = 0.1 * noise_of(range(64), given)
    end = added(small_refiner(velocity, std=0.1, ode_steps=16).sample(range(64), *given), given)
    assert (end - 0.1 * m - s * start).square().mean().sqrt() < 0.03 * s * start.std()


def test_residual_std_scales_the_residual():
    given, std = grey_codes(3), 0.05 + 0.05 * torch.rand(20, 16)
    drawn = [small_refiner(lambda x, time: x.sin(), scale).sample(range(3), *given) for scale in (0.1, std)]
    first, second = (added(slices, given) for slices in drawn)
    torch.testing.assert_close(second / small_refiner(std=std).pixel_std(given[0]), first / 0.1)
    assert first.std() > 0.01


def test_refined_slices_are_clipped():
    slices = small_refiner(std=5.0).sample(range(2), *some_codes(2))
    assert slices.min() == -1
    assert slices.max() == 1


@pytest.mark.parametrize(
    "batches", [[range(6)], [range(2), range(2, 6)], [[i] for i in range(6)], [[5, 4, 3, 2, 1, 0]]]
)
def test_refined_sample_n_does_not_depend_on_its_batch(batches):
    refiner, (codes, vqvae) = small_refiner(std=0.1), some_codes(6)
    expected = refiner.sample(range(6), codes, vqvae, seed=3)
    for numbers in batches:
        drawn = refiner.sample(numbers, codes[list(numbers)], vqvae, seed=3)
        torch.testing.assert_close(drawn, expected[list(numbers)], rtol=0, atol=1e-5)


def test_refined_samples_differ_by_id_and_by_seed():
    """For the same codes; independent slices differ by sqrt(2) standard deviations."""
    refiner, given = small_refiner(std=0.1), grey_codes(1)
    drawn = torch.cat([refiner.sample([n], *given, seed) for seed in (0, 1, 2**32 - 1) for n in range(3)])
    distances = torch.cdist(drawn.flatten(1), drawn.flatten(1)) / drawn.std() / 128**0.5
    assert (distances.fill_diagonal_(torch.inf) > 1).all()


def test_refiner_and_prior_have_different_random_streams():
    """The prior's stream of the same seed and id is not reused, nor that of any other valid seed."""
    given = grey_codes(1)
    for seed, number in ((0, 0), (3, 7), (2**32 - 1, 5)):
        noise = noise_of([number], given, seed)
        generator = torch.Generator().manual_seed(stream_seed(seed, number))
        of_codes = torch.empty_like(noise).normal_(generator=generator)
        assert (noise - of_codes).abs().mean() > 0.5
    assert config.MAX_SEED < refiner_module.SEED_OFFSET


def test_refiner_learns_a_bimodal_distribution():
    """Slices are 0.3 lighter or darker than the decoded ones: samples are one or the other.

    Training cases come in pairs of opposite signs, so that neither is learned better by chance.
    """
    refiner = Refiner(replace(SMALL_REFINER, channels=16))
    optimiser = torch.optim.Adam(refiner.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 300)
    codes, vqvae = grey_codes(128, (8, 8))
    signs = (torch.arange(64) % 2 * 2.0 - 1).view(64, 1, 1, 1).expand(64, 1, 8, 8)
    slices = 0.3 * torch.cat([signs, -signs]) + 0.01 * torch.randn(128, 1, 8, 8)
    refiner.fit_residuals(slices, torch.zeros_like(slices), codes)
    for _ in range(300):
        start, time = refiner.draw_noise((64, 1, 8, 8))
        noise = RefinerNoise(torch.cat([start, -start]), time.repeat(2))
        optimiser.zero_grad()
        refiner.loss(slices, codes, vqvae, noise=noise).backward()
        optimiser.step()
        schedule.step()
    levels = refiner.sample(range(128), codes, vqvae).mean((1, 2, 3))
    assert ((levels.abs() - 0.3).abs() < 0.1).float().mean() > 0.9
    assert 0.25 < (levels > 0).float().mean() < 0.75


def test_noise_scale_scales_the_initial_noise():
    """What an untrained refiner adds is its noise, scaled by residual_std, and linear in it."""
    given, refiner = some_codes(2, (12, 20)), Refiner(SMALL_REFINER)
    refiner.residual_std.fill_(0.01)
    drawn = [refiner.sample([0, 1], *given, noise_scale=scale) for scale in (1, 0.5, 0)]
    full, half, _ = (added(slices, given) for slices in drawn)
    assert torch.equal(drawn[2], from_roots(to_roots(given[1].decode(given[0]))))
    assert full.std() > 0.005
    torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-6)


def test_progress_sees_the_slices_that_each_step_predicts():
    """For the flow that the solver integrates exactly, where x = spread(t) y and y stays the same."""
    (codes, vqvae), std, seen = grey_codes(2), refiner_module.SOLVER_STD, []
    refiner = small_refiner(lambda x, time: gaussian_velocity(x, time, std), std=0.1)
    drawn = refiner.sample(range(2), codes, vqvae, seed=3, progress=seen.append)
    assert torch.equal(drawn, refiner.sample(range(2), codes, vqvae, seed=3))
    assert len(seen) == refiner.config.ode_steps
    # At t = 0 the velocity is -x, which ends at 0.
    torch.testing.assert_close(seen[0], torch.zeros_like(drawn), rtol=0, atol=1e-6)
    t = 1 / 2
    share = ((std * t) ** 2 + (1 - t) ** 2) ** 0.5 * (1 + (1 - t) * gaussian_velocity(1.0, t, std)) / std
    predicted, drawn = (added(slices, (codes, vqvae)) for slices in (seen[refiner.config.ode_steps // 2], drawn))
    torch.testing.assert_close(predicted, share * drawn, atol=1e-6, rtol=1e-4)
