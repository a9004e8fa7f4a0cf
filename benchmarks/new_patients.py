"""Attacks on a run of the phantom, C2ST accuracy and duplicates of its samples, with hundreds of new patients.

The embedded data have ten patients per split: by so few, the AUC of an attack is known to 0.15, and which ten they are
moves the C2ST accuracy of any samples by 0.05. But the phantom has as many patients as one draws.

    python benchmarks/new_patients.py --run runs/phantom [--num N] [other options of evaluate.py]

Draws N patients (200), whose refined reconstructions samples are compared with, and N more, whose refined
reconstructions play perfect samples: their values are those of a perfect prior. All attacks are tried on as many
training patients as new ones.
"""

from functools import partial

import numpy as np
import torch
from common import machine, report
from torch import Tensor

from augmentation import augment
from c2st import c2st
from checkpoints import read_config
from comparison import SliceSet
from copying import duplicate_rate
from dataset import Slices
from decoding import scale_volume
from evaluate import parse_options, reconstruct_all, training_data
from files import Reading
from membership import attack_metrics, attack_scores, nearest_positions, slices_of_patients
from metrics import round_to_grey_levels
from nifti import RawImage
from phantom import affine, draw_volume
from predict import Networks, draw_positions, draw_samples, load_networks, load_vqvae, sampling_device, set_guidance
from utils import autocast
from workers import process_pool, usable_cores

NUM = 200  # new patients to compare with, and as many more
FIRST_CASE = 141  # of them: the embedded data end with 140
HEIGHTS = torch.linspace(0, 1, 20)  # of a patient's slices
SLICES = 4  # that are used of each patient
SETS = 3  # of samples, and of perfect ones


def heights(case: int) -> list[int]:
    """Return the numbers of the slices that are used of a new patient, in random order."""
    return np.random.default_rng(case).permutation(len(HEIGHTS))[:SLICES].tolist()


def draw_patient(size: tuple[int, int], case: int) -> np.ndarray:
    """Return slices (SLICES, H, W) uint8 of a new patient, scaled as the loader does."""
    images, _ = draw_volume(0, case, slices=len(HEIGHTS), size=size)
    volume = {number: RawImage(image, affine(size, number), "") for number, image in enumerate(images)}
    pixels = scale_volume(volume, size, Reading()).pixels
    return np.stack([pixels[number] for number in heights(case)])


def draw_patients(cases: range, size: tuple[int, int]) -> Tensor:
    """Return slices (patients, SLICES, 1, H, W) in [-1, 1] of new patients."""
    with process_pool(usable_cores()) as pool:
        pixels = np.stack(list(pool.map(partial(draw_patient, size), cases)))
    return torch.from_numpy(pixels)[:, :, None] / 127.5 - 1


def attack(networks: Networks, train: Slices, new: Tensor, positions: Tensor, codes: Tensor) -> dict[str, dict]:
    """Return the success of each attack on the training patients, beside as many new ones.

    Args:
        networks: The networks of the run.
        train: Its training slices.
        new: Slices (patients, SLICES, 1, H, W) of new patients.
        positions: Their positions (patients, SLICES).
        codes: Of samples, of any shape.
    """
    known = slices_of_patients(train.cases)[: len(new)]
    chosen = [nearest_positions(at, train.positions, own) for at, own in zip(positions.numpy(), known)]
    members, count = np.concatenate(chosen), len(known)
    slices = torch.cat([train.batch(members).to(new.device), new[:count].flatten(0, 1)])
    at = torch.cat([torch.from_numpy(train.positions[members]), positions[:count].flatten()]).to(new.device)
    with autocast(new.device):
        scores = attack_scores(slices, at, *networks, augment, codes)
    return {name: attack_metrics(*own.cpu().view(2, count, SLICES)) for name, own in scores.items()}


def main() -> None:
    """Run the benchmark: print JSON lines."""
    options = parse_options(None)
    device = sampling_device(options)
    config = read_config(options.run)
    networks = load_networks(options.run, config, load_vqvae(options.run, config, device), device)
    set_guidance(options, networks)
    train = training_data(options, config).train
    count = options.num or NUM
    cases = range(FIRST_CASE, FIRST_CASE + 2 * count)
    height, width = config.slice_size
    new = draw_patients(cases, (height, width)).to(device)
    positions = HEIGHTS[torch.tensor([heights(case) for case in cases])]

    def refined(slices: Tensor, patients: list) -> SliceSet:
        return reconstruct_all(networks, SliceSet(slices, patients), options)[2]

    chosen = np.random.default_rng(0).permutation(len(train))[:count]
    examples = refined(train.batch(chosen).to(device), [train.cases[i] for i in chosen])
    reference = refined(new[:count, :2].flatten(0, 1), [case for case in cases[:count] for _ in range(2)])
    found: dict[str, list[float]] = {}
    for number in range(SETS):
        ids = range(number * count, (number + 1) * count)
        drawn = draw_samples(options, networks, ids, draw_positions(ids, options.seed, config.positions), device)
        samples = SliceSet(round_to_grey_levels(drawn.slices.to(device)), ids)
        perfect = refined(new[count:, number], list(cases[count:]))
        for name, own in (("samples", samples), ("perfect", perfect)):
            found.setdefault(f"c2st_{name}", []).append(c2st(*own, *reference, *examples).accuracy)
            found.setdefault(f"duplicates_{name}", []).append(duplicate_rate(*own, *reference))
    settings = {"run": str(options.run), "patients": count, "guidance": options.guidance, "machine": machine(device)}
    means = {name: float(np.mean(values)) for name, values in found.items()}
    for name, values in found.items():
        report(f"new_patients_{name}", means[name], "", **settings, sets=values)
    attacks = attack(networks, train, new[:count], positions[:count], drawn.codes)
    for name, success in attacks.items():
        report(f"new_patients_auc_{name}", success["auc"], "", **settings, interval=success["auc_interval"])
        report(f"new_patients_found_{name}", success["tpr_at_1_percent_fpr"], "", **settings)
    accuracies = f"samples {means['c2st_samples']:.2f}, perfect ones {means['c2st_perfect']:.2f}"
    strongest = max(attacks, key=lambda name: attacks[name]["auc"])
    print(f"C2ST accuracy: {accuracies}; highest AUC {attacks[strongest]['auc']:.2f} ({strongest}).")


if __name__ == "__main__":
    main()
