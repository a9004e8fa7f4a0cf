"""Run the benchmarks of what a user waits for: print their JSON lines, and write the table of docs/results.md.

python benchmarks/table.py [--out runs/bench.md]
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import run_benchmark

import predict
from utils import make_folder


class Row(NamedTuple):
    """A row of the table. Values are given by the names of their JSON lines."""

    title: str
    ours: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()  # of alternatives: value and name; those not measured are left out
    ratio: str = ""


ROWS = {  # by the script that measures them
    "commands.py": (
        Row(
            "`predict.py --num 1000`, files written; peak memory",
            ("predict.py --num 1000", "predict.py --num 1000, peak memory"),
        ),
        Row(
            "`predict.py --num 1`, from the shell to the file; peak memory",
            ("predict.py --num 1", "predict.py --num 1, peak memory"),
        ),
        *(Row(f"`{name} --help`", (f"{name} --help",)) for name in ("train.py", "predict.py", "evaluate.py")),
    ),
    "sampling.py": (
        Row(
            "refiner of the full preset, per slice, including decoding",
            ("full_refiner_passes", "full_refiner_seconds_per_slice"),
        ),
        Row(
            f"guided sampling of {predict.BATCH_SIZES['cpu']} code grids of the full preset over one forward pass "
            "of prior and guide over them",
            ratio="full_sampling_over_one_forward",
        ),
        Row("sampling 32 code grids over one forward pass over them", ratio="sampling_over_one_forward"),
        Row("sampling 32 code grids with guidance over without", ratio="guided_over_unguided_sampling"),
        Row(
            f"sampling 32 code grids with top-p {predict.TOP_P:g} over sampling them from all codes",
            ratio="top_p_over_all_codes",
        ),
        Row(
            f"sampling 32 code grids with top-p {predict.TOP_P:g}",
            ("sampling_seconds",),
            (("sampling_by_full_forwards_seconds", "one full forward pass per code, from 2 of 2048"),),
            "sampling_speedup",
        ),
        Row(
            f"sampling 1 code grid with top-p {predict.TOP_P:g}",
            ("sampling_one_grid_seconds",),
            (
                ("sampling_one_grid_seconds_pythae", "pythae, from 1 of 2048 steps"),
                ("sampling_one_grid_seconds_monai", "MONAI, likewise"),
            ),
        ),
        Row("decoding 32 code grids", ("decoding_seconds",)),
        Row("decoding and refining 32 code grids, in batches of 4 as in `predict.py`", ("refiner_seconds",)),
        Row("decoding and refining 32 code grids at once", ("refiner_at_once_seconds",)),
        Row("128 slices as in `predict.py`: codes, decoding, refining", ("sampled_and_decoded_seconds",)),
    ),
    "training.py": (
        Row(
            "one update of the VQ-VAE",
            ("vqvae_update_seconds",),
            (
                ("vqvae_update_seconds_reference", "textbook"),
                ("vqvae_update_seconds_pythae", "pythae"),
                ("vqvae_update_seconds_monai", "MONAI, its defaults, 7 M parameters"),
            ),
            "vqvae_update_speedup",
        ),
        Row(
            "one update of the prior",
            ("prior_update_seconds",),
            (("prior_update_seconds_reference", "textbook"),),
            "prior_update_speedup",
        ),
        Row("one update of the refiner, including encoding and decoding its slices", ("refiner_update_seconds",)),
    ),
    "loading.py": (
        Row(
            "first pass over 2000 `.nii.gz` slices, 2 threads",
            ("first_pass_slices_per_second",),
            (("nibabel_slices_per_second", "nibabel"), ("monai_slices_per_second", "MONAI")),
            "first_pass_speedup",
        ),
        Row(
            "first pass over 12,660 slices, as many as HipMRI has; peak memory",
            ("first_pass_whole_seconds", "first_pass_peak_megabytes"),
        ),
        Row("reopening their cache, to the first batch", ("cache_open_seconds", "cache_open_megabytes")),
    ),
}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return JSON lines, by name, as a table in Markdown."""

    def value(name: str) -> str:
        number, unit = found[name]["value"], found[name]["unit"]
        return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"

    lines = ["| | ours | alternative | ratio |", "|---|---|---|---|"]
    for row in (row for rows in ROWS.values() for row in rows):
        ours = ", ".join(map(value, row.ours))
        others = "; ".join(f"{value(name)} ({label})" for name, label in row.others if name in found)
        ratio = value(row.ratio).removesuffix(" times") if row.ratio else ""
        lines.append(f"| {row.title} | {ours} | {others} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmarks: print JSON lines, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench.md"), help="table (default: %(default)s)")
    options = parser.parse_args()
    make_folder(options.out.parent)
    found, start = {}, time.monotonic()
    for script in ROWS:
        for line in run_benchmark(script):
            print(json.dumps(line), flush=True)
            found[line["name"]] = line
    machine = next(iter(found.values()))["machine"]
    heading = f"{machine}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {time.monotonic() - start:.0f} s"
    options.out.write_text(f"{heading}\n\n{table(found)}\n")
    print(f"{options.out}: {heading}")


if __name__ == "__main__":
    main()
