"""modules.py: networks against brute force, causality by gradients, samplers against known distributions."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modules
from modules import (
    VQVAE,
    Codebook,
    GatedPixelCNN,
    PriorConfig,
    PriorNoise,
    RowSampler,
    Share,
    VQVAEConfig,
    dilations,
    first_in_nucleus,
    outside_nucleus,
    stream_seed,
)

SMALL = VQVAEConfig(
    downsampling=4, channels=16, residual_blocks=1, hidden_channels=8, codebook_size=20, embedding_dim=6
)
GRIDS = [(5, 3), (3, 9), (8, 4), (1, 6), (6, 1), (2, 2), (16, 8)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_prior(grid, **fields):
    return (
        GatedPixelCNN(PriorConfig(grid=grid, codebook_size=11, channels=20, head_channels=64, **fields)).double().eval()
    )


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


def take_step(codebook, latents, share=None):
    codebook.ema_update(latents, codebook.nearest(latents), share)


def test_embeddings_are_the_ema_of_their_latents():
    """Against NumPy: counts and sums of the batch, averaged with decay 0.9. Every code has latents, so none is dead."""
    codebook = Codebook(6, 3, decay=0.9, dead_threshold=0.3)
    latents = codebook.embeddings.repeat(20, 1) + 0.01 * torch.randn(120, 3)
    before = codebook.embeddings.numpy().copy()
    take_step(codebook, latents)
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
        take_step(codebook, latents)
    assert (codebook.embeddings[3] - latents).abs().sum(1).min() < 1
    assert 3 in codebook.nearest(latents)


def test_an_unused_embedding_stays_where_it_is_without_dead_code_replacement():
    codebook = Codebook(2, 4, decay=0.99, dead_threshold=0.0)
    codebook.embeddings[1] = 1000.0
    codebook.sums.copy_(codebook.embeddings)
    for _ in range(50):
        take_step(codebook, torch.randn(64, 4))
    torch.testing.assert_close(codebook.embeddings[1], torch.full((4,), 1000.0))


@pytest.mark.parametrize("borders", [[0, 30, 64], [0, 1, 40, 64]])
def test_a_step_of_the_codebook_adds_up_the_shares_of_processes(borders):
    """Half of the codes are dead and take latents of any process."""
    codebook, latents, statistics = Codebook(8, 4, decay=0.5, dead_threshold=0.3), torch.randn(64, 4), []
    codebook.embeddings[::2] = 1000.0
    codebook.cluster_sizes[::2] = 1e-3

    def step(share, start, stop):
        copied = deepcopy(codebook)
        torch.manual_seed(0)
        take_step(copied, latents[start:stop], share)
        return copied.state_dict()

    for start, stop in zip(borders, borders[1:]):
        step(Share(start, 64, statistics.append), start, stop)
    shared = step(Share(0, 64, lambda own: own.copy_(sum(statistics))), 0, borders[1])
    whole = step(None, 0, 64)
    assert (whole["embeddings"] < 10).all()
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor)


def test_a_forward_pass_leaves_the_codebook_unchanged():
    vqvae = VQVAE(SMALL).train()
    before = {name: tensor.clone() for name, tensor in vqvae.codebook.state_dict().items()}
    vqvae(torch.rand(4, 1, 16, 8) * 2 - 1)
    for name, tensor in vqvae.codebook.state_dict().items():
        assert torch.equal(tensor, before[name])


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
    reconstructions, embedding_loss, codes, latents = vqvae(slices)
    assert reconstructions.shape == slices.shape
    assert embedding_loss.shape == ()
    assert codes.shape == latents.shape[:3] == (3, size[0] // 4, size[1] // 4)
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
    _, embedding_loss, *_ = vqvae(slices)
    np.testing.assert_allclose(embedding_loss.item(), 0.25 * ((z - e) ** 2).mean(), rtol=1e-5)


def test_straight_through_gradient():
    """The encoder gets the decoder's gradient at the embeddings, plus that of the commitment term."""
    vqvae = VQVAE(SMALL).eval()
    slices = torch.rand(2, 1, 16, 8) * 2 - 1
    z = vqvae.encoder(slices).detach()
    vqvae.encoder = torch.nn.Identity()
    z.requires_grad_()
    reconstructions, embedding_loss, codes, _ = vqvae(z)
    (gradient,) = torch.autograd.grad(F.mse_loss(reconstructions, slices) + embedding_loss, z)
    e = F.embedding(codes, vqvae.codebook.embeddings).permute(0, 3, 1, 2).requires_grad_()
    (at_e,) = torch.autograd.grad(F.mse_loss(vqvae.decoder(e), slices), e)
    torch.testing.assert_close(gradient, at_e + 2 * 0.25 * (z - e).detach() / z.numel())


def test_without_quantisation_latents_reach_the_decoder():
    vqvae = VQVAE(SMALL).train()
    slices = torch.rand(2, 1, 16, 8) * 2 - 1
    reconstructions, embedding_loss, *_ = vqvae(slices, quantise=False)
    torch.testing.assert_close(reconstructions, vqvae.decoder(vqvae.encoder(slices)))
    assert embedding_loss == 0


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


def influences(prior, codes, places):
    """For each place (row, column), the gradient's size of its logits in the embedding of every code (h, w)."""
    inputs = []

    def detach(layer, given, output):
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    prior.embedding.register_forward_hook(detach)
    logits = prior(codes, torch.rand(len(codes)))
    for row, column in places:
        own = logits[0, :, row, column].square().sum()
        (gradient,) = torch.autograd.grad(own, inputs, retain_graph=True, materialize_grads=True)
        yield prior.in_place(gradient.abs().sum(-1))[0]


def numbered(grid, left_right):
    """The number of each code (h, w) in the order of drawing: rows from the midline outward, in pairs."""
    rows, columns = grid if left_right == 0 else grid[::-1]
    above, below = (rows - 1) // 2, rows // 2  # the same row if their number is odd
    order = [above, below] if above < below else [above]
    while above > 0:
        above, below = above - 1, below + 1
        order += [above, below]
    numbers = np.zeros((rows, columns), dtype=int)
    numbers[order] = np.arange(rows * columns).reshape(rows, columns)
    return torch.from_numpy(numbers if left_right == 0 else numbers.T)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("left_right", [0, 1])
@pytest.mark.parametrize("cycles", [1, 2])
def test_prior_is_causal_without_a_blind_spot(grid, left_right, cycles):
    """A logit depends on every earlier code (no blind spot, whole grid as receptive field), on no later one."""
    prior = small_prior(grid, left_right=left_right, dilation_cycles=cycles)
    numbers, places = numbered(grid, left_right), list(np.ndindex(grid))
    assert sorted(numbers.flatten().tolist()) == list(range(len(places)))
    for place, influence in zip(places, influences(prior, torch.randint(11, (1, *grid)), places)):
        assert torch.equal(influence > 0, numbers < numbers[place]), place


def test_prior_is_causal_on_the_published_grid():
    """The same at the corners and the centre of a grid of 64x32 codes."""
    shape = PriorConfig(grid=(64, 32), channels=8, codebook_size=11, head_channels=16, dilation_cycles=1)
    prior, numbers = GatedPixelCNN(shape).double().eval(), numbered((64, 32), 0)
    places = [(63, 31), (63, 0), (0, 31), (0, 0), (32, 16), (31, 16), (1, 0), (1, 31)]
    for place, influence in zip(places, influences(prior, torch.randint(11, (1, 64, 32)), places)):
        assert torch.equal(influence > 0, numbers < numbers[place]), place


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("left_right", [0, 1])
def test_rows_are_drawn_from_the_midline_outward(grid, left_right):
    prior = small_prior(grid, left_right=left_right)
    numbers = numbered(grid, left_right)
    ordered = prior.in_order(numbers)
    assert torch.equal(ordered, torch.arange(math.prod(grid)).view(prior.rows, prior.columns))
    assert torch.equal(prior.in_place(ordered), numbers)


def cached_logits(prior, codes, position, guide=None):
    """The logits of cached sampling, forced to draw the given codes: the prior's, or those of its guide."""
    ordered = prior.in_order(codes)
    given = ordered[:, 0].clone()
    logits = torch.empty(*given.shape, prior.config.codebook_size, dtype=prior.row_embedding.dtype, device=codes.device)
    rows = []

    def begin(row):
        rows.append(logits.clone())
        given.copy_(ordered[:, row])

    def draw(column, *steps):
        assert len(steps) == (1 if guide is None else 2)
        logits[:, column] = steps[-1]
        return given[:, column]

    assert torch.equal(prior.generate(position, begin, draw, guide), codes)
    return prior.in_place(torch.stack([*rows[1:], logits], 1).permute(0, 3, 1, 2))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("left_right", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_cached_sampling_equals_the_full_forward(grid, left_right, count):
    prior = small_prior(grid, left_right=left_right)
    codes, position = torch.randint(11, (count, *grid)), torch.rand(count)
    torch.testing.assert_close(cached_logits(prior, codes, position), prior(codes, position), rtol=0, atol=1e-10)


def test_cached_sampling_of_a_guide_equals_its_full_forward():
    prior, guide = small_prior((9, 7)), small_prior((9, 7))
    codes, position = torch.randint(11, (3, 9, 7)), torch.rand(3)
    logits = cached_logits(prior, codes, position, guide)
    torch.testing.assert_close(logits, guide(codes, position), rtol=0, atol=1e-10)
    assert not torch.allclose(logits, prior(codes, position))


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
    priors = [prior, small_prior((9, 7))]
    sampler = RowSampler(priors, torch.rand(3), lambda column, own, guide: (2 * own - guide).argmax(1))
    runs = []
    with torch.inference_mode():
        for _ in range(2):
            rows = []
            for _ in range(prior.rows):
                sampler.sample_row()
                rows.append(sampler.codes.clone())
            runs.append(torch.stack(rows, 1))
            sampler.reset()
    assert torch.equal(*runs)
    assert len(runs[0].unique()) > 1


def test_previous_codes_are_replaced_at_random_in_training():
    """A share uniform up to 0.6; a seventh of the new codes are the old one. 5 standard deviations of 4000 slices."""
    prior, codes = GatedPixelCNN(PriorConfig(grid=(5, 5), codebook_size=7, code_noise=0.6)), torch.full((4000, 5, 5), 3)
    noise = prior.draw_noise(4000)
    replaced = torch.where(noise.replaced, noise.wrong_codes, codes)
    counts = replaced.flatten().bincount(minlength=7)
    others = counts[torch.arange(7) != 3]
    assert abs((replaced != 3).float().mean() - 0.3 * 6 / 7) < 5 * 0.6 / 12**0.5 / 4000**0.5
    assert (others - others.float().mean()).abs().max() < 5 * others.float().mean().sqrt()
    shares = (replaced != 3).float().mean((1, 2))
    assert shares.std() > 0.12  # of the same share everywhere: 0.09
    assert (codes == 3).all()


def test_dropout_scales_whole_channels():
    """5 standard deviations of 300 x 12 x 8 channels, of which a quarter are dropped."""
    prior = small_prior((6, 4), dropout=0.25)
    masks = prior.draw_noise(300).dropout
    assert masks.shape == (300, len(prior.layers), prior.config.channels)
    assert set(masks.unique().tolist()) == {0, torch.tensor(1 / 0.75).item()}
    assert abs((masks == 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / masks.numel()) ** 0.5
    assert (small_prior((6, 4), dropout=0.0).draw_noise(2).dropout == 1).all()


def test_code_noise_changes_training_alone():
    """And what a code is predicted from, not the code: with all replaced, the loss is that of other inputs."""
    prior, position = small_prior((6, 4), code_noise=1.0, dropout=0.0), torch.rand(4)
    codes = torch.randint(11, (4, 6, 4))
    before = prior.code_nll(codes, position)
    assert torch.equal(prior.code_nll(codes, position), before)
    prior.train()
    assert prior.code_nll(codes, position).shape == before.shape
    assert (prior.code_nll(codes, position) != before).float().mean() > 0.5
    assert torch.equal(prior.code_nll(codes, position)[:, 2, 0], before[:, 2, 0])  # it has no previous codes


def test_prior_is_told_which_share_is_replaced():
    """Told of a share by codes that are replaced by themselves; without it, nothing differs from sampling."""
    prior, position, codes = small_prior((6, 4), code_noise=0.5), torch.rand(2), torch.randint(11, (2, 6, 4))
    torch.nn.init.normal_(prior.replaced_share.weight)
    none = PriorNoise(torch.zeros(2, 6, 4, dtype=torch.bool), codes, torch.ones(2, len(prior.layers), 20).double())
    quarter = none._replace(replaced=torch.arange(4).expand(2, 6, 4) == 1)
    told = [prior.features(codes, position, None, noise) for noise in (None, none, quarter)]
    assert torch.equal(told[0], told[1])
    prior.position_features = lambda own: (
        GatedPixelCNN.position_features(prior, own) + prior.replaced_share.weight[:, 0] / 2
    )
    assert torch.equal(prior.features(codes, position, None), told[2])
    assert not torch.equal(told[0], told[2])


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
    """It starts without any influence."""
    prior = small_prior((4, 3))
    codes, position = torch.randint(11, (1, 4, 3)), torch.tensor([0.5])
    plain = prior(codes, position)
    assert torch.equal(prior(codes, position, torch.ones(1, 6, dtype=torch.float64)), plain)
    prior.augmentation.reset_parameters()
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
    between = (weight[1:150] - weight[:149]).norm(dim=1)
    assert 0.8 < weight.std() < 1.2
    assert (weight[150:] - weight[:150]).norm(dim=1).max() < 0.05 * between.mean()


@pytest.mark.parametrize(
    "batches", [[range(6)], [range(2), range(2, 6)], [[i] for i in range(6)], [[5, 4, 3, 2, 1, 0]]]
)
def test_sample_n_does_not_depend_on_its_batch(batches):
    prior, guide, position = small_prior((8, 5)), small_prior((8, 5)), torch.rand(6)
    expected = dict(enumerate(prior.sample(range(6), position, seed=3, guide=guide)))
    for numbers in batches:
        for n, grid in zip(numbers, prior.sample(numbers, position[list(numbers)], seed=3, guide=guide)):
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
    noise = -torch.rand(500, 40).log()
    speeds = logits.softmax(1) / noise
    expected = speeds.masked_fill(outside_nucleus(logits, top_p), 0).argmax(1)
    assert torch.equal(first_in_nucleus(logits, logits, noise, top_p), expected)
    assert torch.equal(first_in_nucleus(logits, logits, noise, 1.0), speeds.argmax(1))


def test_drawn_codes_have_the_probabilities_of_the_nucleus():
    """Codes of probability 0.5, 0.3, 0.15 and 0.05: top_p 0.9 keeps three; 5 standard deviations of 20,000 draws."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = -torch.rand(20_000, 4).log()
    logits = probabilities.log().expand(20_000, 4)
    drawn = first_in_nucleus(logits, logits, noise, 0.9).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(("guidance", "top_p"), [(1.0, 1.0), (0.5, 0.9), (2.0, 0.6)])
def test_guided_codes_have_the_probabilities_of_the_formula(guidance, top_p):
    """One code, 4000 draws: p^(1 + w) / q^w within the nucleus of p, each count within 5 standard deviations."""
    prior, guide, position = small_prior((1, 1)), small_prior((1, 1)), torch.zeros(1)
    own, weak = (of(torch.zeros(1, 1, 1, dtype=torch.int64), position).flatten().detach() for of in (prior, guide))
    weights = own.softmax(0) ** (1 + guidance) / weak.softmax(0) ** guidance
    p = weights.masked_fill(outside_nucleus(own[None], top_p)[0], 0)
    p = p / p.sum()
    settings = {"top_p": top_p, "guide": guide, "guidance": guidance}
    counts = torch.bincount(prior.sample(range(4000), torch.zeros(4000), **settings).flatten(), minlength=11)
    assert ((counts - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)).sqrt()).all()
    assert (p - own.softmax(0)).abs().max() > 0.02


def test_the_first_rows_are_not_guided():
    """An eighth of 16 rows; the guided ones differ although their noise is the same."""
    prior, guide, position = small_prior((16, 5)), small_prior((16, 5)), torch.rand(20)
    plain, guided = (prior.sample(range(20), position, guide=of) for of in (None, guide))
    differ = (prior.in_order(plain) != prior.in_order(guided)).any(2).sum(0)
    assert (differ[:2] == 0).all()
    assert differ[2] > 0


def test_a_guide_of_no_weight_or_equal_to_the_prior_changes_nothing():
    prior, guide, position = small_prior((8, 5)), small_prior((8, 5)), torch.rand(3)
    expected = prior.sample(range(3), position, top_p=0.9)
    for unguided in ({"guide": guide, "guidance": 0}, {"guide": prior}):
        assert torch.equal(prior.sample(range(3), position, top_p=0.9, **unguided), expected)
    assert not torch.equal(prior.sample(range(3), position, top_p=0.9, guide=guide), expected)
