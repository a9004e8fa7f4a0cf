"""The tables that evaluate.py prints: rows, columns and how to read them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anatomy import TAIL
from dataset import SPLIT_TITLES

COMPARISONS = ("samples", "decoder_alone", "prior_alone", "baseline")
LEGEND = """
samples        samples vs. held-out slices
decoder alone  refined reconstructions of training slices vs. held-out slices (copying: of held-out slices)
prior alone    samples vs. refined reconstructions of held-out slices; the column to judge copying by
baseline       training slices vs. held-out slices (copying: one half of the held-out cases vs. the other half)
"""


class TableRow(NamedTuple):
    """A row of the printed table."""

    section: str  # of evaluation.json
    key: str  # in that section
    label: str
    format: str
    reading: str = ""  # which way is better


NETWORK_ROWS = (
    TableRow("reconstructions", "ssim", "SSIM, Gaussian window", ".3f", "higher is better, at most 1"),
    TableRow("reconstructions", "ssim_unit_range", "SSIM, [0, 1], 7x7 window", ".3f", "scikit-image's default"),
    TableRow("reconstructions", "ms_ssim", "MS-SSIM", ".3f", "higher is better, at most 1"),
    TableRow("reconstructions", "psnr", "PSNR, dB", ".2f", "higher is better; of the error over all slices"),
    TableRow("reconstructions", "psnr_per_slice", "PSNR, dB, mean of slices", ".2f", "higher is better"),
    TableRow("reconstructions", "mse", "MSE", ".4f", "lower is better"),
    TableRow("reconstructions", "bits_per_pixel", "code grid, bits per pixel", ".4f", "fixed by the network"),
    TableRow("codes", "used", "share of codes used", ".3f", "higher is better, at most 1"),
    TableRow("codes", "perplexity", "perplexity of codes", ".0f", "higher is better, at most K"),
    TableRow(
        "prior", "nats_per_code", "prior, nats per code", ".3f", "lower is better; far lower in training: overfitted"
    ),
    TableRow("prior", "bits_per_code", "prior, bits per code", ".3f", "the same in bits"),
    TableRow("prior", "bits_per_slice", "prior, bits per slice", ".0f", "sum over the grid; should be below JPEG 2000"),
    TableRow(
        "prior", "jpeg2000_bits_per_slice", "JPEG 2000, bits per slice", ".0f", "at the PSNR of the reconstructions"
    ),
)
SAMPLE_ROWS = (
    TableRow("samples", "c2st_accuracy", "C2ST accuracy", ".3f", "0.5 is best, 1 is worst"),
    TableRow("samples", "c2st_interval", "  95 % interval", ".2f"),
    TableRow("samples", "c2st_p_value", "  p-value, patients as units", ".4f", "below 0.01: told from real slices"),
    TableRow("samples", "coverage_by_patient", "coverage, by patient", ".3f", "higher is better, at most 1"),
    TableRow("samples", "density_by_patient", "density, by patient", ".3f", "the baseline's is best"),
    TableRow("samples", "coverage", "coverage, as published", ".3f", "the same, for independent slices"),
    TableRow("samples", "density", "density, as published", ".3f", "the same, for independent slices"),
    TableRow("samples", "random_feature_frechet", "random-feature Frechet distance", ".1f", "lower is better; not FID"),
    TableRow("samples", "sliced_wasserstein", "sliced Wasserstein distance", ".3f", "lower is better"),
    TableRow("samples", "ms_ssim_diversity", "MS-SSIM diversity", ".3f", "the baseline's is best"),
    TableRow("samples", "duplicates", "duplicates", ".3f", "more alike than any two patients; 0 is best"),
    TableRow("copying", "min_distance", "distance to training, minimum", ".3f", "0 is a copy"),
    TableRow("copying", "median_distance", "  median", ".3f"),
    TableRow("copying", "memorisation_rate", "memorisation rate", ".3f", "closer than any held-out; 1 for copies"),
    TableRow("copying", "c_t", "data-copying C_T", ".1f", "about 0; far below 0 for copies"),
)
SLICE_ROWS = (
    TableRow("slices", "copied", "called copies", ".3f", "the expected share is best; nan is unknown"),
    TableRow("slices", "copied_expected", "  expected of new patients", ".3f", "at most"),
    TableRow("slices", "tail_share", "incoherent anatomy", ".3f", f"{TAIL:g} is expected of new patients"),
    TableRow("slices", "tail_p_value", "  p-value", ".4f", "below 0.01: more than new patients have"),
)
MEMBERSHIP_ROWS = (
    TableRow("attack", "auc", "AUC", ".3f", "0.5 gives nobody away, 1 everybody"),
    TableRow("attack", "auc_interval", "  95 % interval, by patient", ".2f"),
    TableRow("attack", "auc_by_patient", "AUC of patients' means", ".3f", "0.5 gives nobody away, 1 everybody"),
    TableRow("attack", "auc_by_patient_interval", "  95 % interval, by patient", ".2f"),
    TableRow("attack", "tpr_at_1_percent_fpr", "found, 1 % wrongly accused", ".3f", "0.01 gives nobody away"),
    TableRow("attack", "tpr_at_0.1_percent_fpr", "found, 0.1 % wrongly accused", ".3f", "0.001 gives nobody away"),
)


def print_table(results: Mapping[str, Any]) -> None:
    """Print the metrics of the networks, then those of samples for each comparison."""
    settings = results["settings"]
    split = SPLIT_TITLES[settings["split"]]
    print(f"\n{settings['heldout_slices']} {split} slices (cases: {settings['heldout_cases']})")
    print_rows(NETWORK_ROWS, {split: results, "training": results["training"]})
    fewer = settings["samples_compared"] < settings["samples"]
    note = f"; only the rows on copying use more than the first {settings['samples_compared']}" if fewer else ""
    print(f"\n{settings['samples']} samples{note}")
    columns = {name.replace("_", " "): results[name] for name in COMPARISONS[1:]}
    print_rows(SAMPLE_ROWS, {"samples": results} | columns)
    print(LEGEND)
    print("single slices")
    print_rows(
        SLICE_ROWS,
        {
            name.removesuffix("_slices").replace("reconstructions", "reconstructed"): {"slices": own}
            for name, own in results["slices"].items()
        },
    )
    print()
    membership = results["membership"]
    print(
        f"membership inference: {membership['slices']} training slices of {membership['patients']} patients, "
        f"and as many {split} slices"
    )
    print_rows(
        MEMBERSHIP_ROWS,
        {name.replace("_", "-"): {"attack": values} for name, values in membership["attacks"].items()},
    )


def print_rows(rows: Sequence[TableRow], columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of a table whose columns are objects of evaluation.json."""
    print(f"{'':32}" + "".join(f"{title:>15}" for title in columns))
    for row in rows:
        values = (column[row.section].get(row.key, ()) for column in columns.values())
        cells = ("-".join(f"{part:{row.format}}" for part in np.atleast_1d(value)) for value in values)
        print(f"{row.label:32}" + "".join(f"{cell:>15}" for cell in cells) + f"   {row.reading}".rstrip())


FAULT_COLUMNS = (
    ("c2st_accuracy", "C2ST", ".2f"),
    ("c2st_p_value", "p", ".4f"),
    ("coverage_by_patient", "coverage", ".2f"),
    ("density_by_patient", "density", ".2f"),
    ("random_feature_frechet", "Frechet", ".1f"),
    ("sliced_wasserstein", "Wasserstein", ".3f"),
    ("ms_ssim_diversity", "diversity", ".3f"),
    ("duplicates", "duplicates", ".2f"),
    ("coherence_auc", "coherence", ".2f"),
    ("tail_share", "incoherent", ".3f"),
    ("tail_p_value", "p", ".4f"),
    ("smallest_share", "smallest", ".0%"),
)
COPY_COLUMNS = (
    ("copied", "called", ".2f"),
    ("named", "named", ".2f"),
    ("memorisation_rate", "memorised", ".2f"),
    ("c_t", "C_T", ".1f"),
)
SELF_TEST_LEGEND = """
*           the figure sees the fault: p below 0.01; other figures: moved, beside the slices without a fault, by more
            than they spread over random divisions of the held-out patients in halves
coherence   area under the ROC curve of the slices' coherence: 0.5 as real slices, 1 always below them
incoherent  share of slices below the 2 % quantile of unseen patients
smallest    share of faulty slices that the test of anatomy calls in 9 of 10 draws at p below 0.01; - if not even all
called      share called copies; of new patients (none) at most {rate:.3f} is expected
named       share whose training slice is named
"""


def print_self_test(results: Mapping[str, Any]) -> None:
    """Print what each figure makes of each planted fault, and of each kind of copy."""
    settings = results["settings"]
    print(
        f"\nfaults planted in {settings['slices']} held-out slices of {settings['cases']} patients, beside "
        f"{settings['reference_slices']} of {settings['reference_cases']}"
    )
    print_grid(FAULT_COLUMNS, results["faults"])
    print(f"\ncopies of {settings['copied_slices']} training slices")
    print_grid(COPY_COLUMNS, results["copies"])
    print(SELF_TEST_LEGEND.format(rate=settings["copied_expected"]))


def print_grid(columns: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print one line per row; a figure that is among the row's `seen` has a star."""
    print(f"{'':32}" + "".join(f"{title:>12} " for _, title, _ in columns))
    for name, row in rows.items():
        line = f"{name:32}"
        for key, _, form in columns:
            value = row.get(key)
            line += f"{'-' if value is None else format(value, form):>12}{'*' if key in row.get('seen', ()) else ' '}"
        print(line.rstrip())
