"""modules.py: networks against brute force, causality by gradients, samplers against known distributions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import modules
from modules import (
    VQVAE,
    Codebook,
    GatedPixelCNN,
    PriorConfig,
    Refiner,
    RefinerConfig,
    RowSampler,
    VQVAEConfig,
    argmax_in_nucleus,
    dilations,
    outside_nucleus,
    stream_seed,
)

SMALL = VQVAEConfig(
    downsampling=4, channels=16, residual_blocks=1, hidden_channels=8, codebook_size=20, embedding_dim=6
)
SMALL_REFINER = RefinerConfig(
    downsampling=4, codebook_size=20, embedding_dim=6, channels=16, residual_blocks=2, hidden_channels=8
)
GRIDS = [(5, 3), (3, 9), (8, 4), (1, 6), (6, 1), (2, 2), (16, 8)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_prior(grid, **fields):
    return (
        GatedPixelCNN(PriorConfig(grid=grid, codebook_size=11, channels=20, head_channels=64, **fields)).double().eval()
    )


def small_refiner(velocity=None, std=1.0):
    """A refiner with random weights or, if given, a known velocity(x, t) with t (N, 1, 1, 1)."""
    refiner = Refiner(SMALL_REFINER).eval()
    refiner.pixels[-1].reset_parameters()  # they start at 0
    refiner.residual_std.copy_(torch.as_tensor(std))
    if velocity:
        refiner.forward = lambda x, time, conditioning: velocity(x, time[:, None, None, None])
    return refiner


def zero_velocity(x, time):
    return torch.zeros_like(x)


def gaussian_velocity(x, time):
    """The velocity of Gaussian residuals, to which the network adds its output."""
    return x * (2 * time - 1) / (time**2 + (1 - time) ** 2)


def some_codes(count, size=(16, 8)):
    """Codes drawn at random, and a VQ-VAE that decodes them."""
    return torch.randint(20, (count, size[0] // 4, size[1] // 4)), VQVAE(SMALL).eval()


def grey_codes(count, size=(16, 8)):
    """Codes drawn at random, and a VQ-VAE that decodes them to 0 everywhere."""
    codes, vqvae = some_codes(count, size)
    for parameter in vqvae.decoder[-2].parameters():
        torch.nn.init.zeros_(parameter)
    return codes, vqvae


# ---------------------------------------------------------------- codebook


def numpy_nearest(latents, embeddings):
    codes = []
    for latent in latents:
        codes.append(np.argmin([((latent - e) ** 2).sum() for e in embeddings]))
    return np.array(codes)


def test_nearest_embedding_equals_brute_force():
    codebook = Codebook(17, 5, decay=0.9, dead_threshold=0.3)
    latents = torch.randn(200, 5)
    expected = numpy_nearest(latents.numpy(), codebook.embeddings.numpy())
    assert (codebook.nearest(latents).numpy() == expected).all()


def test_nearest_embedding_does_not_depend_on_the_chunk_size(monkeypatch):
    codebook, latents = Codebook(17, 5, decay=0.9, dead_threshold=0.3), torch.randn(100, 5)
    whole = codebook.nearest(latents)
    monkeypatch.setattr("modules.CHUNK_LOGITS", 7 * 17)
    assert torch.equal(codebook.nearest(latents), whole)


def test_embeddings_are_the_ema_of_their_latents():
    """Against NumPy: counts and sums of the batch, averaged with decay 0.9. Every code has latents, so none is dead."""
    codebook = Codebook(6, 3, decay=0.9, dead_threshold=0.3)
    latents = codebook.embeddings.repeat(20, 1) + 0.01 * torch.randn(120, 3)
    before = codebook.embeddings.numpy().copy()
    codebook.train()(latents)
    codes = numpy_nearest(latents.numpy(), before)
    for k in range(6):
        mine = latents.numpy()[codes == k]
        count = 0.9 * 1 + 0.1 * len(mine)
        total = 0.9 * before[k] + 0.1 * mine.sum(0)
        np.testing.assert_allclose(codebook.embeddings[k].numpy(), total / count, rtol=1e-4, atol=1e-5)


def test_a_dead_code_is_replaced_by_a_latent_of_the_batch():
    codebook = Codebook(8, 4, decay=0.5, dead_threshold=0.3)
    codebook.embeddings[3] = 1000.0  # too far away to be nearest to a latent
    codebook.sums.copy_(codebook.embeddings)
    latents = torch.randn(64, 4)
    for _ in range(6):
        codebook.train()(latents)
    assert (codebook.embeddings[3] - latents).abs().sum(1).min() < 1
    assert 3 in codebook.nearest(latents)


def test_an_unused_embedding_stays_where_it_is_without_dead_code_replacement():
    codebook = Codebook(2, 4, decay=0.99, dead_threshold=0.0)
    codebook.embeddings[1] = 1000.0
    codebook.sums.copy_(codebook.embeddings)
    for _ in range(50):
        codebook.train()(torch.randn(64, 4))
    torch.testing.assert_close(codebook.embeddings[1], torch.full((4,), 1000.0))


def test_evaluation_leaves_the_codebook_unchanged():
    vqvae = VQVAE(SMALL).eval()
    before = {name: tensor.clone() for name, tensor in vqvae.codebook.state_dict().items()}
    slices = torch.rand(4, 1, 16, 8) * 2 - 1
    vqvae(slices)
    vqvae.train().encode(slices)  # encoding does not update the codebook, even in training mode
    for name, tensor in vqvae.codebook.state_dict().items():
        assert torch.equal(tensor, before[name])
    vqvae(slices)
    assert not torch.equal(vqvae.codebook.cluster_sizes, before["cluster_sizes"])


def test_kmeans_init_finds_separate_clusters():
    centres = 10 * torch.eye(5)
    latents = (centres[:, None] + 0.1 * torch.randn(5, 40, 5)).flatten(0, 1)
    codebook = Codebook(5, 5, decay=0.99, dead_threshold=0.3)
    codebook.kmeans_init(latents, iterations=20)
    assert codebook.decay == 0.99
    assert torch.cdist(centres, codebook.embeddings).min(1).values.max() < 0.5


# ---------------------------------------------------------------- VQ-VAE


@pytest.mark.parametrize("size", [(16, 8), (8, 24), (4, 4)])
def test_vqvae_shapes_and_ranges(size):
    vqvae = VQVAE(SMALL).eval()
    slices = torch.rand(3, 1, *size) * 2 - 1
    reconstructions, embedding_loss, codes = vqvae(slices)
    assert reconstructions.shape == slices.shape
    assert embedding_loss.shape == ()
    assert codes.shape == (3, size[0] // 4, size[1] // 4)
    assert torch.equal(vqvae.encode(slices), codes)
    decoded = vqvae.decode(codes)
    torch.testing.assert_close(decoded, reconstructions.clamp(-1, 1))
    assert decoded.abs().max() <= 1


def test_embed_and_decode_use_the_embedding_of_each_code():
    vqvae = VQVAE(SMALL).eval()
    codes = torch.randint(20, (3, 5, 2))
    embedded = vqvae.embed(codes)
    assert embedded.shape == (3, 6, 5, 2)
    for n, row, column in ((0, 0, 0), (1, 4, 1), (2, 3, 0)):
        assert torch.equal(embedded[n, :, row, column], vqvae.codebook.embeddings[codes[n, row, column]])
    with torch.no_grad():
        vqvae.decoder[-2].bias += 0.5  # so that there is something to clip
        decoded = vqvae.decoder(embedded)
    assert decoded.max() > 1
    assert torch.equal(vqvae.decode(codes), decoded.clamp(-1, 1))


def test_embedding_loss_is_the_commitment_term():
    """Equation 3 by hand: commitment_cost * mean |z - e|^2, with e the nearest embedding."""
    vqvae = VQVAE(SMALL).eval()
    slices = torch.rand(2, 1, 16, 8) * 2 - 1
    z = vqvae.encoder(slices).detach().permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    e = vqvae.codebook.embeddings.numpy()[numpy_nearest(z, vqvae.codebook.embeddings.numpy())]
    _, embedding_loss, _ = vqvae(slices)
    np.testing.assert_allclose(embedding_loss.item(), 0.25 * ((z - e) ** 2).mean(), rtol=1e-5)


def test_straight_through_gradient():
    """The encoder gets the decoder's gradient at the embeddings, plus that of the commitment term."""
    vqvae = VQVAE(SMALL).eval()
    slices = torch.rand(2, 1, 16, 8) * 2 - 1
    z = vqvae.encoder(slices).detach()
    vqvae.encoder = torch.nn.Identity()
    z.requires_grad_()
    reconstructions, embedding_loss, codes = vqvae(z)
    (gradient,) = torch.autograd.grad(F.mse_loss(reconstructions, slices) + embedding_loss, z)
    e = F.embedding(codes, vqvae.codebook.embeddings).permute(0, 3, 1, 2).requires_grad_()
    (at_e,) = torch.autograd.grad(F.mse_loss(vqvae.decoder(e), slices), e)
    torch.testing.assert_close(gradient, at_e + 2 * 0.25 * (z - e).detach() / z.numel())


def test_without_quantisation_latents_reach_the_decoder():
    vqvae = VQVAE(SMALL).train()
    before = vqvae.codebook.cluster_sizes.clone()
    slices = torch.rand(2, 1, 16, 8) * 2 - 1
    reconstructions, embedding_loss, _ = vqvae(slices, quantise=False)
    torch.testing.assert_close(reconstructions, vqvae.decoder(vqvae.encoder(slices)))
    assert embedding_loss == 0
    assert torch.equal(vqvae.codebook.cluster_sizes, before)


def test_residual_blocks_share_no_weights():
    vqvae = VQVAE(replace(SMALL, residual_blocks=3))
    pointers = [p.data_ptr() for p in vqvae.parameters()]
    assert len(set(pointers)) == len(pointers)


# ---------------------------------------------------------------- prior


@pytest.mark.parametrize("distance", range(65))
def test_dilations_add_up_to_every_distance(distance):
    sums = {0}
    for step in dilations(distance):
        sums |= {total + step for total in sums}
    assert sums == set(range(distance + 1))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cycles", [1, 2])
def test_prior_is_causal_without_a_blind_spot(grid, cycles):
    """A logit depends on every earlier code (no blind spot, whole grid as receptive field), on no later one."""
    prior = small_prior(grid, dilation_cycles=cycles)
    rows, columns = grid
    codes = torch.randint(11, (1, *grid))
    x = prior.embedding(codes).detach().requires_grad_()
    prior.embedding.register_forward_hook(lambda *_: x)
    logits = prior(codes, torch.rand(1))
    for position in range(rows * columns):
        r, c = divmod(position, columns)
        (gradient,) = torch.autograd.grad(logits[0, :, r, c].square().sum(), x, retain_graph=True, allow_unused=True)
        influence = gradient.abs().sum(-1).flatten()
        assert (influence[:position] > 0).all(), (r, c)
        assert (influence[position:] == 0).all(), (r, c)


def test_prior_is_causal_on_the_grid_of_the_full_preset():
    """The same at the corners and the centre of the grid that --preset full trains on."""
    prior = (
        GatedPixelCNN(PriorConfig(channels=8, codebook_size=11, head_channels=16, dilation_cycles=1)).double().eval()
    )
    x = prior.embedding(torch.randint(11, (1, 64, 32))).detach().requires_grad_()
    prior.embedding.register_forward_hook(lambda *_: x)
    logits = prior(torch.zeros(1, 64, 32, dtype=torch.int64), torch.rand(1))
    for r, c in ((63, 31), (63, 0), (0, 31), (32, 16), (1, 0), (1, 31)):
        (gradient,) = torch.autograd.grad(logits[0, :, r, c].square().sum(), x, retain_graph=True)
        influence = gradient.abs().sum(-1).flatten()
        assert (influence[: 32 * r + c] > 0).all(), (r, c)
        assert (influence[32 * r + c :] == 0).all(), (r, c)


def cached_logits(prior, codes, position):
    """The logits of cached sampling, forced to draw the given codes."""
    given = codes[:, 0].clone()
    logits = torch.empty(*given.shape, prior.config.codebook_size, dtype=prior.row_embedding.dtype, device=codes.device)
    rows = []

    def begin(row):
        rows.append(logits.clone())
        given.copy_(codes[:, row])

    def draw(step, column):
        logits[:, column] = step
        return given[:, column]

    assert torch.equal(prior.generate(position, begin, draw), codes)
    return torch.stack([*rows[1:], logits], 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 3])
def test_cached_sampling_equals_the_full_forward(grid, count):
    prior = small_prior(grid)
    codes, position = torch.randint(11, (count, *grid)), torch.rand(count)
    torch.testing.assert_close(cached_logits(prior, codes, position), prior(codes, position), rtol=0, atol=1e-10)


def test_cached_sampling_equals_the_full_forward_in_float32():
    prior = GatedPixelCNN(PriorConfig(grid=(64, 32))).eval()
    codes, position = torch.randint(512, (2, 64, 32)), torch.tensor([0.2, torch.nan])
    with torch.inference_mode():
        torch.testing.assert_close(cached_logits(prior, codes, position), prior(codes, position), rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_cuda_graph_sampling_equals_the_full_forward():
    prior = small_prior((9, 7)).cuda()
    codes, position = torch.randint(11, (3, 9, 7), device="cuda"), torch.rand(3, device="cuda")
    torch.testing.assert_close(cached_logits(prior, codes, position), prior(codes, position), rtol=0, atol=1e-10)


def test_sampler_reset_clears_all_caches():
    """Capturing a CUDA graph runs a row before the first one."""
    prior = small_prior((9, 7))
    sampler = RowSampler(prior, torch.rand(3), lambda logits, column: logits.argmax(1))
    runs = []
    with torch.inference_mode():
        for _ in range(2):
            rows = []
            for _ in range(9):
                sampler.sample_row()
                rows.append(sampler.codes.clone())
            runs.append(torch.stack(rows, 1))
            sampler.reset()
    assert torch.equal(*runs)
    assert len(runs[0].unique()) > 1


def test_dropout_is_off_while_sampling():
    prior, position = small_prior((6, 4), dropout=0.5), torch.rand(4)
    expected = prior.sample(range(4), position)
    assert torch.equal(prior.train().sample(range(4), position), expected)
    assert prior.training


@pytest.mark.parametrize("chunk_logits", [1, 11 * 20, 10**6])
def test_nll_and_its_gradient_equal_cross_entropy_of_the_logits(monkeypatch, chunk_logits):
    """Against NumPy, code by code, and against PyTorch's gradient, for any chunk size."""
    monkeypatch.setattr(modules, "CHUNK_LOGITS", chunk_logits)
    prior, codes = small_prior((5, 3)), torch.randint(11, (3, 5, 3))
    given = codes, torch.rand(3), torch.randn(3, 6, dtype=torch.float64)
    logits = prior(*given)
    odds = logits.detach().exp().numpy()
    probabilities = [odds[n, codes[n, i, j], i, j] / odds[n, :, i, j].sum() for n, i, j in np.ndindex(3, 5, 3)]
    nats = prior.nll(*given)
    assert nats.item() == pytest.approx(-np.log(probabilities).mean(), rel=1e-12)
    with torch.no_grad():
        assert prior.nll(*given) == nats
    weights = [*prior.layers.parameters(), *prior.head.parameters()]
    expected = torch.autograd.grad(3 * F.cross_entropy(logits, codes), weights, allow_unused=True)
    for gradient, wanted in zip(torch.autograd.grad(3 * nats, weights, allow_unused=True), expected):
        assert (gradient is None) == (wanted is None)
        assert gradient is None or torch.allclose(gradient, wanted, rtol=0, atol=1e-12)


def test_nll_in_bfloat16_is_close_to_float32():
    prior, codes, position = small_prior((8, 4)).float(), torch.randint(11, (6, 8, 4)), torch.rand(6)
    plain = prior.nll(codes, position)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = prior.nll(codes, position)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(plain.item(), rel=0.01)
    ours, expected = (torch.autograd.grad(of, list(prior.head.parameters())) for of in (rounded, plain))
    for gradient, wanted in zip(ours, expected):
        assert F.cosine_similarity(gradient.flatten(), wanted.flatten(), 0) > 0.99


def test_slice_position_conditions_every_logit():
    prior = small_prior((4, 3))
    codes = torch.randint(11, (1, 4, 3))
    logits = [prior(codes, torch.tensor([position])) for position in (0.0, 0.5, 1.0, torch.nan)]
    for i, one in enumerate(logits):
        assert one.isfinite().all()
        for other in logits[:i]:
            assert ((one - other).abs().amax(1) > 0).all()


def test_augmentation_conditions_every_logit_and_0_is_not_augmented():
    prior = small_prior((4, 3))
    codes, position = torch.randint(11, (1, 4, 3)), torch.tensor([0.5])
    plain = prior(codes, position)
    assert torch.equal(prior(codes, position, torch.zeros(1, 6, dtype=torch.float64)), plain)
    for augmentation in torch.eye(6, dtype=torch.float64):
        assert ((prior(codes, position, augmentation[None]) - plain).abs().amax(1) > 0).all()


def test_an_unknown_slice_position_adds_no_conditioning():
    prior = small_prior((4, 3))
    assert (prior.position_features(torch.tensor([torch.nan])) == 0).all()
    assert (prior.position_features(torch.tensor([0.5])) != 0).any()


@pytest.mark.parametrize("dim", [5, 8, 12])
def test_init_embedding_keeps_distances_of_the_codebook(dim):
    """Distances between the prior's embeddings are those between the codebook's, up to a random projection."""
    prior = GatedPixelCNN(PriorConfig(grid=(4, 3), codebook_size=300, channels=8)).double()
    embeddings = 7 + 3 * torch.randn(300, dim, dtype=torch.float64)
    embeddings[150:] = embeddings[:150] + 0.01
    prior.init_embedding(embeddings)
    weight = prior.embedding.weight.detach()
    if dim == prior.config.channels:
        between = torch.nn.PairwiseDistance(eps=0)
        expected = between(embeddings[:150], embeddings[1:151]) / embeddings.std()
        torch.testing.assert_close(between(weight[:150], weight[1:151]), expected)
    assert 0.8 < weight.std() < 1.2
    assert (weight[150:] - weight[:150]).norm(dim=1).max() < 0.05 * (weight[1:150] - weight[:149]).norm(dim=1).mean()


@pytest.mark.parametrize(
    "batches", [[range(6)], [range(2), range(2, 6)], [[i] for i in range(6)], [[5, 4, 3, 2, 1, 0]]]
)
def test_sample_n_does_not_depend_on_its_batch(batches):
    prior, position = small_prior((8, 5)), torch.rand(6)
    expected = dict(enumerate(prior.sample(range(6), position, seed=3)))
    for numbers in batches:
        for n, grid in zip(numbers, prior.sample(numbers, position[list(numbers)], seed=3)):
            assert torch.equal(grid, expected[n])


def test_samples_differ_by_id_and_by_seed():
    prior = small_prior((8, 5))
    grids = torch.cat([prior.sample(range(3), torch.zeros(3), seed=seed) for seed in (0, 1)])
    assert len(torch.unique(grids.flatten(1), dim=0)) == 6
    assert len({stream_seed(seed, number) for seed in range(100) for number in range(100)}) == 10_000


def test_sampled_codes_have_the_frequencies_of_the_softmax():
    """One code with known logits, 4000 draws: each count is within 5 standard deviations.

    The chance of a false alarm is 11 * 6e-7 for a correct sampler, over all seeds; this one is fixed.
    """
    prior = small_prior((1, 1))
    p = prior(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1)).softmax(1).flatten().detach()
    counts = torch.bincount(prior.sample(range(4000), torch.zeros(4000)).flatten(), minlength=11)
    assert ((counts - 4000 * p).abs() < 5 * (4000 * p * (1 - p)).sqrt()).all()


def test_uniform_noise_of_0_draws_from_the_nucleus(monkeypatch):
    """uniform_ draws 0 once in 2**24 numbers. If the nucleus is a single code, that code is drawn nevertheless."""
    prior, position = small_prior((4, 3)), torch.zeros(3)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda noise, generator: noise.zero_())
    greedy = prior.sample(range(3), position, top_p=1e-6)
    assert (greedy != 0).any()
    assert torch.equal(greedy, prior.sample(range(3), position, temperature=1e-6))


def test_low_temperature_and_low_top_p_draw_the_mode():
    prior, position = small_prior((4, 3)), torch.zeros(3)
    greedy = prior.sample(range(3), position, temperature=1e-6)
    assert (greedy == greedy[0]).all()
    assert torch.equal(prior.sample(range(3), position, top_p=1e-6), greedy)
    for bad in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="at least 1e-06"):
            prior.sample(range(3), position, **bad)


def test_nucleus_is_the_fewest_codes_of_probability_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25, 0.25, 0.25, 0.25]]).log()
    expected = [[False, False, True, True], [True, True, False, False], [False] * 4]
    assert outside_nucleus(logits, 0.75).tolist() == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.995])
def test_drawn_code_is_the_best_of_the_nucleus(top_p):
    """Without sorting, as with it; ties included."""
    logits = (3 * torch.randn(500, 40)).round(decimals=1)
    noise = -torch.log(-torch.log(torch.rand(500, 40)))
    expected = (logits - noise).masked_fill(outside_nucleus(logits, top_p), -torch.inf).argmax(1)
    assert torch.equal(argmax_in_nucleus(logits, noise, top_p), expected)
    assert torch.equal(argmax_in_nucleus(logits, noise, 1.0), (logits - noise).argmax(1))


def test_drawn_codes_have_the_probabilities_of_the_nucleus():
    """Codes of probability 0.5, 0.3, 0.15 and 0.05: top_p 0.9 keeps three; 5 standard deviations of 20,000 draws."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = torch.rand(20_000, 4).log().neg().log()
    drawn = argmax_in_nucleus(probabilities.log().expand(20_000, 4), noise, 0.9).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


# ---------------------------------------------------------------- refiner


def test_fit_residual_std_equals_brute_force():
    """Per code and pixel of its square, with 10 pseudo-observations of the mean; the first pixel has no residual."""
    std = 0.05 * torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 1, 2, 3)
    decoded, codes = torch.rand(30, 1, 8, 12) - 0.5, torch.randint(12, (30, 2, 3)) ** 2 // 12  # uneven frequencies
    slices = decoded + std * torch.randn(30, 1, 8, 12)
    refiner = small_refiner()
    refiner.fit_residual_std(slices, decoded, codes)
    squares = [[[] for _ in range(16)] for _ in range(20)]
    for n, row, column, i, j in np.ndindex(30, 2, 3, 4, 4):
        place = n, 0, 4 * row + i, 4 * column + j
        squares[codes[n, row, column]][4 * i + j].append((slices[place] - decoded[place]).item() ** 2)
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
    velocities = refiner(torch.randn(3, 1, *size), torch.rand(3), refiner.condition(codes, vqvae.decode(codes), vqvae))
    loss = refiner.loss(torch.rand(3, 1, *size), codes, vqvae)
    slices = refiner.sample(range(3), codes, vqvae)
    assert velocities.shape == slices.shape == (3, 1, *size)
    assert loss.shape == ()
    assert loss > 0
    assert slices.abs().max() <= 1
    assert slices.std() > 0.1


def test_velocity_depends_on_noise_time_and_conditioning():
    """Changing any of the five inputs changes the output for every slice."""
    refiner, (codes, vqvae) = small_refiner(), grey_codes(3)
    x, time = torch.randn(3, 1, 16, 8), torch.tensor([0.1, 0.5, 0.9])

    def answer(x, time):
        return refiner(x, time, refiner.condition(codes, vqvae.decode(codes), vqvae)) - gaussian_velocity(
            x, time[:, None, None, None]
        )

    answers = [answer(x, time), answer(x + 0.05, time), answer(x, time + 0.05)]
    for known in (refiner.residual_std, vqvae.decoder[-2].bias.data, vqvae.codebook.embeddings):
        known += 0.05
        answers.append(answer(x, time))
        known -= 0.05
    for other in answers[1:]:
        assert ((other - answers[0]).abs().amax((1, 2, 3)) > 1e-4).all()


def test_velocity_at_a_pixel_depends_on_its_own_square():
    """With 1x1 kernels, squares of pixels become channels and squares again, so nothing leaves its square."""
    refiner, (codes, vqvae) = small_refiner(std=torch.rand(20, 16)), some_codes(1)
    for convolution in (m for m in refiner.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)):
        centre = convolution.weight.detach()[:, :, 1:2, 1:2].clone()
        convolution.weight.data.zero_()[:, :, 1:2, 1:2] = centre
    x, time, decoded = torch.randn(1, 1, 16, 8), torch.rand(1), torch.rand(1, 1, 16, 8)
    vqvae.decode = lambda _: decoded
    before = refiner(x, time, refiner.condition(codes, vqvae.decode(codes), vqvae))
    for of, place in ((x, (0, 0, 9, 6)), (decoded, (0, 0, 9, 6)), (codes, (0, 2, 1))):
        of[place] += 1 if of[place] < 19 else -1  # in the square of rows 8 to 11, columns 4 to 7
        after = refiner(x, time, refiner.condition(codes, vqvae.decode(codes), vqvae))
        changed = (after != before)[0, 0]
        assert changed[8:12, 4:].any()
        assert not changed[:8].any()
        assert not changed[12:].any()
        assert not changed[:, :4].any()
        before = after


def test_pixel_layers_are_shift_equivariant():
    """Without features of the code grid, shifting noise and decoded slices by pixels shifts the output."""
    refiner, time = small_refiner(), torch.rand(2)
    refiner.to_pixels.weight.data.zero_()
    refiner.to_pixels.bias.data.fill_(0.1)
    x, decoded, features = torch.randn(2, 1, 24, 16), torch.rand(2, 1, 24, 16), torch.zeros(2, 16, 6, 4)
    answer = refiner(x, time, (features, decoded))
    for rows, columns in ((1, 0), (0, 3), (2, 1)):
        moved = refiner(x.roll((rows, columns), (2, 3)), time, (features, decoded.roll((rows, columns), (2, 3))))
        expected = answer.roll((rows, columns), (2, 3))
        torch.testing.assert_close(moved[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], rtol=0, atol=1e-5)
    change = torch.zeros_like(x)
    change[:, :, 12, 8] = 0.1
    for other in (refiner(x + change, time, (features, decoded)), refiner(x, time, (features, decoded + change))):
        assert ((other - answer)[:, 0, 11, 7].abs() > 1e-5).all()  # beside it, where the analytic part changes nothing


def test_flow_loss_of_gaussian_residuals_is_the_analytic_one():
    """For Gaussian residuals, the variance of x_1 - x_0 given x is 1 / (t^2 + (1 - t)^2).

    Integrated over logit-normal times that is 1.741; 5 standard deviations of 4000 times and 256,000 squares are 0.03.
    """
    logits = np.linspace(-12, 12, 2401)
    t, density = 1 / (1 + np.exp(-logits)), np.exp(-(logits**2) / 2) / np.sqrt(2 * np.pi)
    expected = 0.01 * (density / (t**2 + (1 - t) ** 2)).sum()
    refiner, (codes, vqvae) = Refiner(SMALL_REFINER), some_codes(4000, (8, 8))
    refiner.residual_std.copy_(0.02 + 0.3 * torch.rand(20, 16))
    slices = vqvae.decode(codes) + refiner.pixel_std(codes) * torch.randn(4000, 1, 8, 8)
    assert expected == pytest.approx(1.741, abs=1e-3)
    assert refiner.loss(slices, codes, vqvae).item() == pytest.approx(expected, abs=0.03)


def test_flow_loss_of_the_exact_velocity_is_0():
    """If each slice's residual is known, the velocity is (residual / std - x) / (1 - t)."""
    residual, (codes, vqvae) = torch.randn(40, 1, 16, 8), some_codes(40)
    refiner = small_refiner(std=0.1 + torch.rand(20, 16))
    slices, scaled = vqvae.decode(codes) + residual, residual / refiner.pixel_std(codes)
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


def test_initial_noise_is_white_with_the_residual_std():
    """5 standard deviations of the mean and the variance of 16,384 pixels."""
    noise = small_refiner(gaussian_velocity, std=0.1).sample(range(128), *grey_codes(128))
    assert noise.mean().abs() < 0.1 * 5 / 128
    assert abs(noise.var() / 0.01 - 1) < 5 * 2**0.5 / 128
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.5


def solve_scalar(velocity, start, steps):
    """Integrate dx/dt = velocity(x, t) from 0 to 1 with the two-step Adams-Bashforth method on x / s(t)."""
    y, before = start, None
    for step in range(steps):
        t = step / steps
        s = math.sqrt(t**2 + (1 - t) ** 2)
        slope = (velocity(s * y, t) - (2 * t - 1) / s**2 * s * y) / s
        y += (slope if before is None else (3 * slope - before) / 2) / steps
        before = slope
    return y


@pytest.mark.parametrize("velocity", [lambda x, t: 0 * x, lambda x, t: x, lambda x, t: x * t - 0.5 * x])
def test_ode_solver_takes_the_steps_of_the_scalar_one(velocity):
    """Also within 6 % of the exact solution."""
    steps = RefinerConfig().ode_steps
    refiner = small_refiner(velocity, std=0.1)
    start, given = small_refiner(gaussian_velocity, std=0.1), grey_codes(3)
    factor = solve_scalar(velocity, 1.0, steps)
    expected = factor * start.sample(range(3), *given)
    torch.testing.assert_close(refiner.sample(range(3), *given), expected, rtol=0, atol=1e-6)
    exact = np.exp(np.mean([velocity(1.0, (i + 0.5) / 1000) for i in range(1000)]))
    assert factor == pytest.approx(exact, rel=0.06)


def test_the_flow_of_gaussian_residuals_is_integrated_exactly():
    """Each noise ends where it began, as the spread of x does: 1 at both ends."""
    time = torch.linspace(0, 1, 1001, dtype=torch.float64)
    slope = modules.spread(time).log().diff() * 1000
    torch.testing.assert_close(slope, modules.gaussian_rate((time[1:] + time[:-1]) / 2), atol=1e-5, rtol=0)
    codes, vqvae = some_codes(64)
    decoded, untrained = vqvae.decode(codes), Refiner(SMALL_REFINER)
    untrained.residual_std.copy_(0.02 + 0.05 * torch.rand(20, 16))
    for own, drawn in zip(range(64), untrained.sample(range(64), codes, vqvae)):
        stream = torch.Generator().manual_seed(stream_seed(modules.REFINER_SEED_OFFSET, own))
        noise = torch.empty(1, 16, 8).normal_(generator=stream)
        expected = decoded[own] + untrained.pixel_std(codes)[own] * noise
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


def test_ode_steps_are_even_and_each_is_one_pass():
    times = []
    small_refiner(lambda x, time: (times.append(time.unique().item()), zero_velocity(x, time))[1]).sample(
        range(2), *grey_codes(2)
    )
    np.testing.assert_allclose(times, np.arange(RefinerConfig().ode_steps) / RefinerConfig().ode_steps, atol=1e-6)


@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_sampling_a_known_residual_adds_it(contrast):
    """The velocity towards one slice is (x_1 - x) / (1 - t): the noise ends there, all but 1 % of it."""
    residual, (codes, vqvae) = contrast * (torch.rand(3, 1, 16, 8) - 0.5), some_codes(3)
    refiner = small_refiner(lambda x, time: (residual / 0.2 - x) / (1 - time), std=0.2)
    left = refiner.sample(range(3), codes, vqvae) - vqvae.decode(codes) - residual
    assert left.square().mean().sqrt() < 0.01 * 0.2


def test_sampling_a_normal_distribution_has_its_mean_and_variance():
    """For x_1 of N(m, s^2) the velocity is the mean of x_1 - x_0 given x, and takes x_0 to m + s x_0.

    Eight steps come within 3 % of s; Euler steps would miss it by 17 %.
    """
    m, s = 0.7, 0.5

    def velocity(x, time):
        return m + (time * s**2 - (1 - time)) / ((1 - time) ** 2 + (time * s) ** 2) * (x - time * m)

    given = grey_codes(64)
    start = small_refiner(gaussian_velocity, std=0.1).sample(range(64), *given)
    end = small_refiner(velocity, std=0.1).sample(range(64), *given)
    assert (end - 0.1 * m - s * start).square().mean().sqrt() < 0.03 * s * start.std()


def test_residual_std_scales_the_residual():
    given, std = grey_codes(3), 0.01 + 0.05 * torch.rand(20, 16)
    added = [small_refiner(lambda x, time: x.sin(), scale).sample(range(3), *given) for scale in (0.02, std)]
    torch.testing.assert_close(added[1] / small_refiner(std=std).pixel_std(given[0]), added[0] / 0.02)
    assert added[0].std() > 0.01


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
        noise = small_refiner(gaussian_velocity, std=0.1).sample([number], *given, seed) / 0.1
        generator = torch.Generator().manual_seed(stream_seed(seed, number))
        of_codes = torch.empty_like(noise).normal_(generator=generator)
        assert (noise - of_codes).abs().mean() > 0.5
    assert config.MAX_SEED < modules.REFINER_SEED_OFFSET


def test_refiner_learns_a_bimodal_distribution():
    """Slices are 0.3 lighter or darker than the decoded ones, at random: samples are one or the other."""
    refiner = Refiner(replace(SMALL_REFINER, channels=32, residual_blocks=1, hidden_channels=32))
    refiner.residual_std.fill_(0.3)
    optimiser = torch.optim.Adam(refiner.parameters(), lr=5e-3)
    codes, vqvae = grey_codes(128, (8, 8))
    for _ in range(300):
        signs = torch.randint(2, (128, 1, 1, 1)) * 2.0 - 1
        optimiser.zero_grad()
        refiner.loss(0.3 * signs.expand(128, 1, 8, 8), codes, vqvae).backward()
        optimiser.step()
    levels = refiner.sample(range(128), codes, vqvae).mean((1, 2, 3))
    assert ((levels.abs() - 0.3).abs() < 0.1).float().mean() > 0.9
    assert 0.25 < (levels > 0).float().mean() < 0.75


def test_noise_scale_scales_the_initial_noise():
    """An untrained refiner returns its noise, scaled by residual_std."""
    vqvae, refiner = (
        VQVAE(SMALL).eval(),
        Refiner(RefinerConfig(codebook_size=20, embedding_dim=6, channels=8, residual_blocks=1, hidden_channels=8)),
    )
    codes = torch.randint(20, (2, 3, 5))
    refiner.residual_std.fill_(0.01)
    decoded = vqvae.decode(codes)
    full, half, none = (refiner.sample([0, 1], codes, vqvae, noise_scale=scale) - decoded for scale in (1, 0.5, 0))
    assert torch.equal(none, torch.zeros_like(none))
    assert full.std() > 0.005
    torch.testing.assert_close(half, full / 2, rtol=0, atol=1e-6)
