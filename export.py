"""Export what sampling needs of a run, to be shared.

    python checkpoints.py export runs/default shared/default --half

Writes a folder in the layout of a model hub: config.json, the weights as safetensors, and README.md, the model card.
It holds no path, no name of a data file and no other text of a user, but for what people wrote in RUN/MODEL_CARD.md.
`predict.py --run`, `evaluate.py --run` and `train.py --init` take it like a run directory.
"""

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from checkpoints import export_weights, read_bytes, read_config, write_config
from config import RunConfig
from console import Parser, RunError, nonempty, say, summarise
from model_card import CONCLUSIONS, FILES_HEADING, GUIDE_ROW, METADATA_END, fill_card, read_card, redact
from predict import Networks, load_networks, warn_if_incomplete
from utils import flush, make_folder, write_file, writing

MAX_EVALUATION = 1 << 24  # bytes of evaluation.json: 0.1 MB is usual

# What a hub reads of a card. The licence of a model of patients is for people to add.
METADATA = (
    """\
---
{licence}library_name: prostatevq
pipeline_tag: unconditional-image-generation
tags:
- vq-vae
- pixelcnn
- flow-matching
- medical-imaging
- mri
- prostate"""
    + METADATA_END
)
FILES = f"""{FILES_HEADING}
| file | content |
|---|---|
| `config.json` | options, slice size, intensity scale, voxel grid, positions |
{{rows}}

{{precision}} Paths, names of files and other texts of the options were left out.

```sh
python predict.py --run FOLDER --num 64        # new slices; FOLDER holds these files
python train.py --init FOLDER --run RUN        # starts from these weights, with the options of the command above
```
"""


class ExportOptions(Namespace):
    """Options of `checkpoints.py export`."""

    run: Path
    out: Path
    half: bool


def parse_options(arguments: Sequence[str] | None) -> ExportOptions:
    """Parse the command line."""
    parser = Parser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", type=nonempty(Path), metavar="RUN", help="run directory")
    parser.add_argument("out", type=nonempty(Path), metavar="OUT", help="folder to be made, or an empty one")
    parser.add_argument(
        "--half", action="store_true", help="round weights to float16: half the size, and nearly the same samples"
    )
    return parser.parse_args(arguments, ExportOptions())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder that becomes `path` once it is filled: all of it or nothing.

    Raises:
        RunError: `path` exists and is no empty folder, is the current one, or cannot be written.
    """
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists and is not empty: choose another folder")
    if path == Path.cwd():
        raise RunError(f"{path} is the current folder, which is to be replaced: choose another folder")
    make_folder(path.parent)
    with (
        writing(path),
        TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as partial,
    ):
        new = Path(partial, "new")
        new.mkdir()
        yield new
        new.rename(path)
        flush(path.parent)


def read_evaluation(run: Path) -> Any:
    """Return the content of a run's evaluation.json, NaN for null; None if there is none. Raises RunError."""

    def with_nan(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: with_nan(of) for name, of in part.items()}
        return math.nan if part is None else part

    path = run / "evaluation.json"
    try:
        return with_nan(json.loads(read_bytes(path, MAX_EVALUATION)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be used: {summarise(error)}: run evaluate.py again") from None


def write_card(path: Path, run: Path, config: RunConfig, networks: Networks, half: bool) -> None:
    """Write the model card of an export: that of the run, or the template, with the measured part filled in.

    Raises:
        RunError: The run's MODEL_CARD.md or evaluation.json cannot be used, or the card cannot be written.
    """
    results, own = read_evaluation(run), run / "MODEL_CARD.md"
    try:
        card = read_card(run)
        if results or CONCLUSIONS not in card:  # the card of an export keeps what was measured of its run
            card = fill_card(card, config, results)
    except (OSError, ValueError, LookupError, TypeError) as error:  # evaluation.json may be of another version
        raise RunError(f"{own} cannot be filled in from evaluation.json ({summarise(error)}): mend it") from None
    if CONCLUSIONS in card and (GUIDE_ROW in card) != (networks.guide is not None):
        how = "without" if networks.guide else "with"
        raise RunError(f"{run} was evaluated {how} guide.safetensors: run evaluate.py again")
    rows = [f"| `{name}.safetensors` | weights: {describe(network)} |" for name, network in present(networks)]
    precision = "Matrices and kernels are stored in float16 and computed with in float32." if half else "In float32."
    licence = "license: mit\n" if config.options.on_phantom else ""
    text = METADATA.format(licence=licence) + card + FILES.format(rows="\n".join(rows), precision=precision)
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def present(networks: Networks) -> list[tuple[str, nn.Module]]:
    """Return the names of the networks that are there, and the networks."""
    return [(name, network) for name, network in networks._asdict().items() if network]


def describe(network: nn.Module) -> str:
    """Return how many parameters a network has."""
    return f"{sum(weight.numel() for weight in network.parameters()):,} parameters"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python checkpoints.py`."""
    options = parse_options(arguments)
    with new_folder(options.out.resolve()) as folder:  # a link cannot be renamed over
        config, device = read_config(options.run), torch.device("cpu")
        networks = load_networks(options.run, config, device)
        warn_if_incomplete(options.run)
        for name, network in present(networks):
            export_weights(folder / f"{name}.safetensors", network, options.half)
        write_card(folder / "README.md", options.run, config, networks, options.half)
        write_config(folder, redact(config))
    size = sum(file.stat().st_size for file in options.out.iterdir())
    say(f"{options.out}: {size / 1e6:.1f} MB; read its README.md, and fill in what is in italics, before you share it")
