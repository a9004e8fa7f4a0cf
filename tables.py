"""The tables that evaluate.py prints: rows, columns and how to read them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anatomy import TAIL
from dataset import SPLIT_TITLES

COMPARISONS = {  # section of evaluation.json to what it compares
    "samples": "samples vs. held-out slices",
    "decoder_alone": "refined reconstructions of training slices vs. held-out slices (copying: of held-out slices)",
    "prior_alone": "samples vs. refined reconstructions of held-out slices; the column to judge copying by",
    "baseline": "training slices vs. held-out slices (copying: one half of the held-out cases vs. the other half)",
}


class TableRow(NamedTuple):
    """A row of the printed table, and of the report."""

    section: str  # of evaluation.json
    key: str  # in that section
    label: str
    format: str
    meaning: str  # what is measured, in plain words
    reading: str = ""  # which way is better

    @property
    def sentence(self) -> str:
        """Return what is measured and how to read it as one sentence."""
        return f"{self.meaning}; {self.reading}." if self.reading else f"{self.meaning}."

    def cell(self, results: Mapping[str, Any]) -> str:
        """Return the value in an object of evaluation.json as text: "" if it has none, "low-high" for an interval."""
        value = results[self.section].get(self.key, ())
        return "-".join(f"{part:{self.format}}" for part in np.atleast_1d(value))


NETWORK_ROWS = (
    TableRow(
        "reconstructions",
        "ssim",
        "SSIM, Gaussian window",
        ".3f",
        "How well reconstructions keep the structure of their slices",
        "higher is better, at most 1",
    ),
    TableRow(
        "reconstructions",
        "ssim_unit_range",
        "SSIM, [0, 1], 7x7 window",
        ".3f",
        "The same in another convention, that of most published figures",
        "scikit-image's default",
    ),
    TableRow(
        "reconstructions",
        "ms_ssim",
        "MS-SSIM",
        ".3f",
        "The same at several resolutions at once",
        "higher is better, at most 1",
    ),
    TableRow(
        "reconstructions",
        "psnr",
        "PSNR, dB",
        ".2f",
        "The range of grey levels beside the mean error of a pixel",
        "higher is better; of the error over all slices",
    ),
    TableRow(
        "reconstructions",
        "psnr_per_slice",
        "PSNR, dB, mean of slices",
        ".2f",
        "The same for each slice alone, then averaged",
        "higher is better",
    ),
    TableRow("reconstructions", "mse", "MSE", ".4f", "Mean squared error of a pixel, in [-1, 1]", "lower is better"),
    TableRow(
        "reconstructions",
        "bits_per_pixel",
        "code grid, bits per pixel",
        ".4f",
        "Bits that store the codes of a slice, beside 8 for a grey level",
        "fixed by the network",
    ),
    TableRow(
        "codes",
        "used",
        "share of codes used",
        ".3f",
        "Share of the codebook that occurs in these slices",
        "higher is better, at most 1",
    ),
    TableRow(
        "codes",
        "perplexity",
        "perplexity of codes",
        ".0f",
        "How many codes there would be if all were used equally",
        "higher is better, at most K",
    ),
    TableRow(
        "prior",
        "nats_per_code",
        "prior, nats per code",
        ".3f",
        "How badly the prior predicts the codes of slices",
        "lower is better; far lower in training: overfitted",
    ),
    TableRow("prior", "bits_per_code", "prior, bits per code", ".3f", "Nats divided by 0.693", "the same in bits"),
    TableRow(
        "prior",
        "bits_per_slice",
        "prior, bits per slice",
        ".0f",
        "Bits that the prior needs for a whole slice",
        "sum over the grid; should be below JPEG 2000",
    ),
    TableRow(
        "prior",
        "jpeg2000_bits_per_slice",
        "JPEG 2000, bits per slice",
        ".0f",
        "Bits that a general image format needs for a slice",
        "at the PSNR of the reconstructions",
    ),
)
SAMPLE_ROWS = (
    TableRow(
        "samples",
        "c2st_accuracy",
        "C2ST accuracy",
        ".3f",
        "How often a classifier tells samples from real slices",
        "0.5 is best, 1 is worst",
    ),
    TableRow(
        "samples", "c2st_interval", "  95 % interval", ".2f", "Where the accuracy would lie with other such patients"
    ),
    TableRow(
        "samples",
        "c2st_p_value",
        "  p-value, patients as units",
        ".4f",
        "How often real slices of other patients would be told apart as well",
        "below 0.01: told from real slices",
    ),
    TableRow(
        "samples",
        "coverage_by_patient",
        "coverage, by patient",
        ".3f",
        "Share of the real slices that a sample resembles as much as other patients do",
        "higher is better, at most 1",
    ),
    TableRow(
        "samples",
        "density_by_patient",
        "density, by patient",
        ".3f",
        "How many real slices a sample resembles as much as other patients do",
        "the baseline's is best",
    ),
    TableRow(
        "samples",
        "coverage",
        "coverage, as published",
        ".3f",
        "Coverage with neighbours of any patient",
        "the same, for independent slices",
    ),
    TableRow(
        "samples",
        "density",
        "density, as published",
        ".3f",
        "Density with neighbours of any patient",
        "the same, for independent slices",
    ),
    TableRow(
        "samples",
        "random_feature_frechet",
        "random-feature Frechet distance",
        ".1f",
        "How far both sets are apart as whole images",
        "lower is better; not FID",
    ),
    TableRow(
        "samples",
        "sliced_wasserstein",
        "sliced Wasserstein distance",
        ".3f",
        "How far both sets are apart in texture, from fine to coarse",
        "lower is better",
    ),
    TableRow(
        "samples",
        "ms_ssim_diversity",
        "MS-SSIM diversity",
        ".3f",
        "How much two samples differ on average",
        "the baseline's is best",
    ),
    TableRow(
        "samples",
        "duplicates",
        "duplicates",
        ".3f",
        "Share of samples that occur nearly twice",
        "more alike than any two patients; near the baseline's is best",
    ),
    TableRow(
        "copying",
        "min_distance",
        "distance to training, minimum",
        ".3f",
        "Difference of the sample nearest to a training slice, in grey levels from -1 to 1",
        "0 is a copy",
    ),
    TableRow("copying", "median_distance", "  median", ".3f", "The same for the sample in the middle"),
    TableRow(
        "copying",
        "memorisation_rate",
        "memorisation rate",
        ".3f",
        "Share of samples that are nearer to a training slice than every new patient's slice is",
        "closer than any held-out; 1 for copies",
    ),
    TableRow(
        "copying",
        "c_t",
        "data-copying C_T",
        ".1f",
        "Whether samples are nearer to training slices than new patients' slices are",
        "about 0; far below 0 for copies",
    ),
)
SLICE_ROWS = (
    TableRow(
        "slices",
        "copied",
        "called copies",
        ".3f",
        "Share of slices that match a training slice better than a new patient's would",
        "the expected share is best; nan is unknown",
    ),
    TableRow(
        "slices",
        "copied_expected",
        "  expected of new patients",
        ".3f",
        "Share of new patients' slices that is called by mistake",
        "at most this",
    ),
    TableRow(
        "slices",
        "tail_share",
        "incoherent anatomy",
        ".3f",
        "Share of slices whose parts fit together as badly as in the worst 2 % of unseen patients",
        f"{TAIL:g} is expected of new patients",
    ),
    TableRow(
        "slices",
        "tail_p_value",
        "  p-value",
        ".4f",
        "How often new patients would have as large a share",
        "below 0.01: more than new patients have",
    ),
)
MEMBERSHIP_ROWS = (
    TableRow(
        "attack",
        "auc",
        "AUC",
        ".3f",
        "How often the attack ranks a training slice above a held-out one",
        "0.5 gives nobody away, 1 everybody",
    ),
    TableRow(
        "attack",
        "auc_interval",
        "  95 % interval, by patient",
        ".2f",
        "Where the AUC would lie with other such patients",
    ),
    TableRow(
        "attack",
        "auc_by_patient",
        "AUC of patients' means",
        ".3f",
        "The same for all slices of a patient together",
        "0.5 gives nobody away, 1 everybody",
    ),
    TableRow(
        "attack",
        "auc_by_patient_interval",
        "  95 % interval, by patient",
        ".2f",
        "Where that AUC would lie with other such patients",
    ),
    TableRow(
        "attack",
        "tpr_at_1_percent_fpr",
        "found, 1 % wrongly accused",
        ".3f",
        "Share of training slices found if 1 % of the others are accused",
        "0.02 gives nobody away, with 100 slices",
    ),
)


def network_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that NETWORK_ROWS are read from, by the title of their column."""
    return {SPLIT_TITLES[results["settings"]["split"]]: results, "training": results["training"]}


def sample_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that SAMPLE_ROWS are read from, by the title of their column."""
    return {name.replace("_", " "): results if name == "samples" else results[name] for name in COMPARISONS}


def slice_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that SLICE_ROWS are read from, by the title of their column."""
    return {
        name.removesuffix("_slices").replace("reconstructions", "reconstructed").replace("heldout", "held-out"): {
            "slices": own
        }
        for name, own in results["slices"].items()
    }


def membership_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that MEMBERSHIP_ROWS are read from, by the title of their column."""
    return {name.replace("_", "-"): {"attack": own} for name, own in results["membership"]["attacks"].items()}


def describe_samples(settings: Mapping[str, Any]) -> str:
    """Say how many samples there are, and how many of them are compared."""
    fewer = settings["samples_compared"] < settings["samples"]
    note = f"; only the rows on copying use more than the first {settings['samples_compared']}" if fewer else ""
    return f"{settings['samples']} samples{note}"


def describe_attacked(results: Mapping[str, Any]) -> str:
    """Say which slices membership inference had to tell apart."""
    membership, split = results["membership"], SPLIT_TITLES[results["settings"]["split"]]
    return f"{membership['slices']} training slices of {membership['patients']} patients, and as many {split} slices"


def print_table(results: Mapping[str, Any]) -> None:
    """Print the metrics of the networks, then those of samples for each comparison."""
    settings = results["settings"]
    print(
        f"\n{settings['heldout_slices']} {SPLIT_TITLES[settings['split']]} slices (cases: {settings['heldout_cases']})"
    )
    print_rows(NETWORK_ROWS, network_columns(results))
    print(f"\n{describe_samples(settings)}")
    print_rows(SAMPLE_ROWS, sample_columns(results))
    print()
    for name, compared in COMPARISONS.items():
        print(f"{name.replace('_', ' '):15}{compared}")
    print("\nsingle slices")
    print_rows(SLICE_ROWS, slice_columns(results))
    print(f"\nmembership inference: {describe_attacked(results)}")
    print_rows(MEMBERSHIP_ROWS, membership_columns(results))


def print_rows(rows: Sequence[TableRow], columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Print rows of a table whose columns are objects of evaluation.json."""
    print(f"{'':32}" + "".join(f"{title:>15}" for title in columns))
    for row in rows:
        cells = "".join(f"{row.cell(column):>15}" for column in columns.values())
        print(f"{row.label:32}{cells}   {row.reading}".rstrip())


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
