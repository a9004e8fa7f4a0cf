"""C2ST accuracy of a small convolutional network, on samples, refined reconstructions and training slices.

evaluate.py uses a linear classifier, which sees more and takes a hundredth of the time. A network's accuracy is what
most publications report, and shows how visible differences are rather than whether there are any.

    python benchmarks/network_c2st.py --run runs/default [any option of evaluate.py]
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from common import machine, report
from torch import Tensor, nn

from checkpoints import read_config
from comparison import SliceSet
from evaluate import parse_options, reconstruct_all, select, training_data
from metrics import BATCH_SIZE, round_to_grey_levels, two_fold_split
from predict import DEFAULT_NUM, draw_positions, draw_samples, load_networks, sampling_device, set_guidance

UPDATES = 300
CLASSIFIERS_PER_FOLD = 3  # accuracy varies by up to 0.17 with the initialisation


def network_c2st(
    slices: Tensor, cases: Sequence[Hashable], reference: Tensor, reference_cases: Sequence[Hashable]
) -> tuple[float, int]:
    """Run a classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545, section 3).

    Cross-validates in two folds of patients: a network learns to tell the two sets apart on one fold and is tested on
    the other, on as many slices of each set.

    Args:
        slices: (N, 1, H, W).
        cases: Their patients (N).
        reference: (M, 1, H, W).
        reference_cases: Their patients (M).

    Returns:
        The number of correctly classified slices, a mean over CLASSIFIERS_PER_FOLD networks that differ in
        initialisation and batches, and the number of trials. Chance level is one half.
    """
    own_folds, reference_folds = (
        torch.from_numpy(two_fold_split(groups)).to(slices.device) for groups in (cases, reference_cases)
    )
    correct = trials = 0
    for fold in (False, True):
        random = torch.Generator().manual_seed(2)
        held_out = [slices[own_folds != fold], reference[reference_folds != fold]]
        count = min(map(len, held_out))
        tested = [own[torch.randperm(len(own), generator=random)[:count].to(slices.device)] for own in held_out]
        for seed in range(CLASSIFIERS_PER_FOLD):
            network = train_classifier(slices[own_folds == fold], reference[reference_folds == fold], seed)
            for label, own in enumerate(tested):
                with torch.no_grad():
                    predicted = torch.cat([network(batch) for batch in own.split(BATCH_SIZE)]) > 0
                correct += int((predicted == (label == 1)).sum())
        trials += 2 * count
    return correct / CLASSIFIERS_PER_FOLD, trials


def train_classifier(first: Tensor, second: Tensor, seed: int, batch_size: int = 32) -> nn.Module:
    """Train a network to tell two sets of slices (N, 1, H, W) apart; its logits (n, 1) are positive for the second.

    Half of a batch comes from each set.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_classifier(min(first.shape[2:]))
    # PyTorch's annotations lack the argument.
    network.to(first.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters())
    labels = torch.arange(2, device=first.device).repeat_interleave(batch_size // 2)[:, None].float()
    for update in range(UPDATES):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (update + 1) / 20, 1 - update / UPDATES)
        batch = [
            own[torch.randint(len(own), (batch_size // 2,), generator=random).to(own.device)] for own in (first, second)
        ]
        shifts = torch.randint(-4, 5, (2,), generator=random).tolist()
        logits = network(torch.cat(batch).roll(shifts, (2, 3)).contiguous(memory_format=torch.channels_last))
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        optimiser.step()
    return network.eval()


def build_classifier(side: int) -> nn.Sequential:
    """Return a CNN: convolutions of stride 2 until the smaller side, of `side` pixels, has 4; then mean pooling."""
    channels = (1, 16, 32, 64, 64, 64)[: max(2, math.ceil(math.log2(side / 4)) + 1)]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(channels, channels[1:]):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 1))


def wilson_interval(correct: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of the share correct / trials of independent ones (Wilson 1927, JASA 22:209)."""
    z = 1.959964
    share, denominator = correct / trials, 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / denominator
    margin = z / denominator * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return centre - margin, centre + margin


def main() -> None:
    """Run the benchmark: print JSON lines."""
    options = parse_options(None)
    device = sampling_device(options)
    config = read_config(options.run)
    networks = load_networks(options.run, config, device)
    set_guidance(options, networks)
    data = training_data(options, config)
    held_out = getattr(data, options.split)
    count = options.num or max(DEFAULT_NUM, len(held_out))
    positions = draw_positions(range(count), options.seed, config.positions)
    drawn = draw_samples(options, networks, range(count), positions, device)
    samples = SliceSet(round_to_grey_levels(drawn.slices.to(device)), range(count))
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.train))[:count])
    real, training = select(held_out, np.arange(len(held_out)), device), select(data.train, chosen, device)
    refined, training_refined = (reconstruct_all(networks, own, options)[2] for own in (real, training))
    settings = {"run": str(options.run), "split": options.split, "machine": machine(device)}
    accuracies = []
    for name, own, reference in (
        ("samples", samples, real),
        ("decoder_alone", training_refined, real),
        ("prior_alone", samples, refined),
        ("baseline", training, real),
    ):
        correct, trials = network_c2st(*own, *reference)
        accuracies.append(correct / trials)
        report(f"network_c2st_{name}", accuracies[-1], "", **settings, interval=wilson_interval(correct, trials))
    print(f"A network tells {accuracies[0]:.2f} of {count} samples and {len(held_out)} real slices apart.")


if __name__ == "__main__":
    main()
