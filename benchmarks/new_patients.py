"""Compare samples of a run on the phantom with hundreds of new patients, and attack its weights beside them.

The embedded data have ten patients per split: by so few, the AUC of an attack is known to 0.15, and which ten they are
moves the C2ST accuracy of any samples by 0.05. But the phantom has as many patients as one draws.

    python benchmarks/new_patients.py --run runs/phantom [--num N] [other options of evaluate.py]

Draws N new patients (--num, 200), SLICES of each. Their refined reconstructions are compared with SETS sets of N
samples, and with as many sets of perfect samples: refined reconstructions of one slice each of N further patients,
which a perfect prior would equal. Attacks on the weights compare slices of training patients, at most N, with slices of
as many new ones at the same positions.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from common import machine, report
from torch import Tensor

from augmentation import augment
from c2st import c2st
from checkpoints import read_config
from comparison import SliceSet
from config import RunConfig
from console import RunError, run_command
from copying import duplicate_rate
from dataset import Slices, to_float
from decoding import scale_volume
from evaluate import EvaluateOptions, data_options, parse_options, training_data
from files import Reading
from membership import attack_metrics, attack_scores, chance_rate, encode, nearest_positions, slices_of_patients
from metrics import round_to_grey_levels
from nifti import RawImage
from phantom import affine, draw_volume
from predict import (
    MAX_NUM,
    Networks,
    SamplingOptions,
    draw_positions,
    draw_samples,
    load_networks,
    refine,
    sampling_device,
    set_guidance,
)
from utils import autocast
from workers import process_pool, usable_cores

NUM = 200
FIRST_CASE = 141  # of the new patients: the embedded data end with 140
POSITIONS = torch.linspace(0, 1, 20)  # of a patient's slices
SLICES = 4  # of each new patient
SETS = 3  # of samples, and of perfect ones


def slice_numbers(case: int) -> list[int]:
    """Return which SLICES of a new patient are used, in random order."""
    return np.random.default_rng(case).permutation(len(POSITIONS))[:SLICES].tolist()


def draw_patient(size: tuple[int, int], reading: Reading, case: int) -> np.ndarray:
    """Return slices (SLICES, H, W) uint8 of a new patient, scaled as the loader does."""
    images, _ = draw_volume(0, case, slices=len(POSITIONS), size=size)
    volume = {number: RawImage(image, affine(size, number), "") for number, image in enumerate(images)}
    pixels = scale_volume(volume, size, reading).pixels
    return np.stack([pixels[number] for number in slice_numbers(case)])


def draw_patients(cases: Iterable[int], size: tuple[int, int], reading: Reading) -> Tensor:
    """Return slices (patients, SLICES, 1, H, W) in [-1, 1] of new patients."""
    with process_pool(usable_cores()) as pool:
        patients = list(pool.map(partial(draw_patient, size, reading), cases))
    return torch.stack([to_float(torch.from_numpy(pixels)) for pixels in patients])


def reconstruct(networks: Networks, slices: Tensor, first: int, options: SamplingOptions) -> Tensor:
    """Return refined reconstructions of slices (N, 1, H, W).

    Their noise is that of N sample ids from MAX_NUM + `first` on, so that no two sets of slices share it.
    """
    ids = range(MAX_NUM + first, MAX_NUM + first + len(slices))
    refined = refine(options, networks, ids, encode(networks.vqvae, slices), slices.device)
    return round_to_grey_levels(refined.to(slices.device))


def attack(networks: Networks, train: Slices, new: Tensor, positions: Tensor, codes: Tensor) -> dict[str, dict]:
    """Return the success of each attack on training patients, beside as many new ones.

    Args:
        networks: The networks of the run.
        train: Its training slices.
        new: Slices (patients, SLICES, 1, H, W) of as many new patients as are attacked.
        positions: Their positions (patients, SLICES).
        codes: Of samples, of any shape.
    """
    known = slices_of_patients(train.cases)[: len(new)]
    members = np.concatenate([nearest_positions(at, train.positions, own) for at, own in zip(positions.numpy(), known)])
    slices = torch.cat([train.batch(members).to(new.device), new.flatten(0, 1)])
    at = torch.cat([torch.from_numpy(train.positions[members]), positions.flatten()]).to(new.device)
    with autocast(new.device):
        scores = attack_scores(slices, at, *networks, augment, codes)
    return {name: attack_metrics(*own.cpu().view(2, *positions.shape)) for name, own in scores.items()}


def compare(
    networks: Networks, train: Slices, new: Tensor, config: RunConfig, options: EvaluateOptions
) -> tuple[dict[str, list[float]], Tensor]:
    """Compare sets of samples, and of perfect samples, with new patients.

    Args:
        networks: The networks of the run.
        train: Its training slices.
        new: Slices (patients, SLICES, 1, H, W) of 1 + SETS groups of new patients: those that all sets are compared
            with, and those of each set of perfect samples.
        config: Of the run.
        options: Of sampling.

    Returns:
        Of each set its C2ST accuracy, the p-value of this test, and the share of duplicates; the samples' codes.
    """
    count = len(new) // (1 + SETS)
    chosen = np.random.default_rng(0).permutation(len(train))[:count]
    examples = reconstruct(networks, train.batch(chosen).to(new.device), 0, options)
    known = SliceSet(examples, [train.cases[i] for i in chosen])
    reference = reconstruct(networks, new[:count].flatten(0, 1), count, options)
    compared = SliceSet(reference, np.repeat(range(count), SLICES).tolist())
    as_many = SliceSet(reference[::SLICES], range(count))  # the largest resemblance grows with the number of slices
    found: dict[str, list[float]] = {}
    codes = []
    for number in range(SETS):
        ids = range(number * count, (number + 1) * count)
        drawn = draw_samples(options, networks, ids, draw_positions(ids, options.seed, config.positions), new.device)
        codes.append(drawn.codes)
        group = new[(number + 1) * count : (number + 2) * count, 0]
        perfect = reconstruct(networks, group, (number + 1 + SLICES) * count, options)
        samples = round_to_grey_levels(drawn.slices.to(new.device))
        for name, slices in (("samples", samples), ("perfect", perfect)):
            own = SliceSet(slices, range(count, 2 * count))
            test = c2st(*own, *compared, *known)
            found.setdefault(f"c2st_{name}", []).append(test.accuracy)
            found.setdefault(f"c2st_p_value_{name}", []).append(test.p_value)
            found.setdefault(f"duplicates_{name}", []).append(duplicate_rate(*own, *as_many))
    return found, torch.cat(codes)


def main() -> None:
    """Run the benchmark: print JSON lines.

    Raises:
        RunError: The run is not on the phantom, or cannot be used.
    """
    options = parse_options(None)
    device = sampling_device(options)
    config = read_config(options.run)
    if not data_options(options, config).on_phantom:
        raise RunError(f"{options.run} was not trained on the embedded phantom, of which new patients can be drawn")
    networks = load_networks(options.run, config, device)
    set_guidance(options, networks)
    train = training_data(options, config).train
    count = options.num or NUM
    cases = range(FIRST_CASE, FIRST_CASE + (1 + SETS) * count)
    height, width = config.slice_size
    new = draw_patients(cases, (height, width), Reading.of(config.options)).to(device)
    settings = {"run": str(options.run), "guidance": options.guidance, "machine": machine(device)}
    found, codes = compare(networks, train, new, config, options)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    for name, values in found.items():
        report(f"new_patients_{name}", means[name], "", **settings, patients=count, sets=values)
    attacked = min(count, len(slices_of_patients(train.cases)))
    positions = POSITIONS[torch.tensor([slice_numbers(case) for case in cases[:attacked]])]
    attacks = attack(networks, train, new[:attacked], positions, codes)
    settings |= {"patients": attacked, "slices": attacked * SLICES}
    chance = chance_rate(attacked * SLICES)
    for name, success in attacks.items():
        report(f"new_patients_auc_{name}", success["auc"], "", **settings, interval=success["auc_interval"])
        report(f"new_patients_found_{name}", success["tpr_at_1_percent_fpr"], "", **settings, chance=chance)
    accuracies = f"samples {means['c2st_samples']:.2f}, perfect ones {means['c2st_perfect']:.2f}"
    strongest = max(attacks, key=lambda name: attacks[name]["auc"])
    print(f"C2ST accuracy: {accuracies}; highest AUC {attacks[strongest]['auc']:.2f} ({strongest}).")


if __name__ == "__main__":
    run_command(main)
