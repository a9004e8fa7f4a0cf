"""Every option and hyper-parameter of a training: its type, range, unit and meaning; the presets; and config.json.

`TrainConfig` alone declares them. The command line of train.py, its help, the options in config.json, their strict
reading, the ranges of what a weights file may claim, and what must not change when a run is resumed all derive from it:
a new option is a new field.
"""

import json
import math
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import numpy as np
from annotated_types import Ge, Gt, Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from console import RunError, nonempty, number

MOST_UPDATES = 10_000_000  # the losses since the last of 250 log lines are kept in memory
MAX_SEED = 2**32 - 1
MAX_BATCH_SIZE = 65_536  # 8 GB of slices of 256x128

Updates = Annotated[int, Ge(1), Le(MOST_UPDATES)]
Width = Annotated[int, Ge(1), Le(65_536)]
Layers = Annotated[int, Ge(1), Le(100)]
Rate = Annotated[float, Gt(0), Le(10)]
Decay = Annotated[float, Ge(0), Le(1)]
SMALLEST_SIDE = 8  # pixels; SSIM's window of 11 is padded by reflection, which needs 6
Side = Annotated[int, Ge(SMALLEST_SIDE), Le(2048)]  # the longest side that nifti.py reads
# JSON has neither tuples nor paths: these two types are made of lists and strings.
Pair = Annotated[tuple[Side, Side], Strict(False)]
FilePath = Annotated[Path, Strict(False)]
Value = Annotated[float, Ge(-1e9), Le(1e9)]  # of a pixel, in the data's units
Interval = Annotated[tuple[Value, Value], Strict(False)]


class StrictModel(BaseModel):
    """A model that refuses unknown fields, other types, NaN and infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Any) -> Model:
    """Make a model of plain values, which need not be trusted.

    Raises:
        ValueError: Naming the first field that is unknown, missing, of another type or out of range.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        raise ValueError(f"{name:.60} is unknown to this version")
    if first["type"] == "missing":
        raise ValueError(f"{name} is missing")
    if first["type"] == "value_error":
        raise ValueError(f"{name} {first['msg'].removeprefix('Value error, ')}".strip())
    raise ValueError(f"{name or 'it':.60} cannot be {first['input']!r:.60}")


def parse_json(model: type[Model], content: str | bytes) -> Model:
    """Make a model of JSON. Raises ValueError as `validate` does, and if the content is not JSON."""
    try:
        return validate(model, json.loads(content))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def option(group: str, default: Any, meaning: str, free: bool = False) -> Any:
    """Declare a field.

    Args:
        group: Its heading in the help.
        default: Its value if it is not given.
        meaning: Its help text, without range and default.
        free: Whether a resumed run may have another value.
    """
    return Field(default, description=meaning, json_schema_extra={"group": group, "free": free})


def group_and_free(field: FieldInfo) -> tuple[str, bool]:
    """Return a field's heading in the help, and whether a resumed run may have another value."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)  # as `option` made it
    return str(extra["group"]), bool(extra["free"])


RUN, DATA, VQVAE, PRIOR, REFINER, OPTIMISER = "run", "data", "VQ-VAE", "prior", "refiner", "optimiser"


class TrainConfig(StrictModel):
    """The options of train.py. The defaults are those of --preset full."""

    run: FilePath = option(RUN, Path("runs/default"), "run directory", free=True)
    images: FilePath = option(RUN, Path("images"), "folder of figures", free=True)
    preset: str = option(
        RUN, "full", "full: the recipe of docs/method.md; demo: smaller networks and phantom, in minutes"
    )
    device: str = option(RUN, "auto", "cpu, cuda, cuda:1 ...; auto takes a GPU if there is one", free=True)
    seed: Annotated[int, Ge(0), Le(MAX_SEED)] = option(RUN, 0, "random seed")
    init: FilePath | None = option(
        RUN, None, "run directory whose weights training starts from, with networks of the same shape"
    )
    checkpoint_every: Updates | None = option(
        RUN, None, "updates between checkpoints; without it one per minute. A stop signal writes one too", free=True
    )
    allow_changed_data: bool = option(
        RUN, False, "resume although files of the data were added, removed or altered since the run began", free=True
    )

    data: str = option(
        DATA, "phantom", "folder of slices or volumes, as docs/data.md says, or 'phantom', the embedded data", free=True
    )
    slice_size: Pair | None = option(
        DATA,
        None,
        "pixels along a slice's first and second axis, in axial slices left-right and front-back, to which slices are "
        "cropped or padded; without it the most common size",
    )
    phantom_size: Pair = option(DATA, (256, 128), "slice size of the phantom, where --slice-size is not given")
    axis: Annotated[int, Ge(0), Le(2)] | None = option(
        DATA,
        None,
        "cut volumes into sagittal (0), coronal (1) or axial (2) slices; without it across their largest voxel spacing",
    )
    pattern: str | None = option(
        DATA,
        None,
        "regular expression that finds (?P<case>...) and, if wanted, (?P<week>...) and (?P<slice>...) in the path of a "
        "file; files that it does not match are left out",
    )
    table: FilePath | None = option(
        DATA,
        None,
        "CSV file that lists the files to read, with the columns path and case, and, if wanted, week, slice and split",
        free=True,
    )
    pixel_size: Annotated[float, Ge(0.01), Le(100)] | None = option(
        DATA, None, "resample slices to square pixels of so many mm; without it slices stay as they are"
    )
    crop: Literal["centre", "body"] = option(
        DATA, "centre", "what stays in the middle when slices are cropped or padded: their own centre, or the body's"
    )
    intensity: Literal["percentile", "zscore", "window"] = option(
        DATA,
        "percentile",
        "values that become black and white: 0 and the 99.5th percentile of a volume, three standard deviations below "
        "and above the mean of its body, or those of --window",
    )
    window: Interval | None = option(DATA, None, "values that become black and white, with --intensity window")
    recheck: bool = option(
        DATA,
        False,
        "look at every file of the data; without it at 20,000 of them and at all folders, once the cache is filled",
        free=True,
    )
    batch_size: Annotated[int, Ge(1), Le(MAX_BATCH_SIZE)] = option(DATA, 32, "slices per update of the VQ-VAE")
    batch_divisor: Annotated[int, Ge(1), Le(MAX_BATCH_SIZE)] = option(
        DATA,
        4,
        "prior and refiner take --batch-size / this, rounded up: more, smaller updates in the same time",
    )
    accumulate: Annotated[int, Ge(1), Le(MAX_BATCH_SIZE)] = option(
        DATA,
        1,
        "parts in which the slices of an update are computed, where a GPU's memory is too small for all at once; the "
        "update stays the same",
        free=True,
    )
    augmentation: Annotated[float, Ge(0), Le(4)] = option(
        DATA, 1.0, "strength of the augmentation for prior and refiner: rotation, scaling, shift, gamma. 0 is none"
    )

    updates: Updates = option(VQVAE, 5000, "updates of the VQ-VAE")
    learning_rate: Rate = option(VQVAE, 4e-3, "peak learning rate")
    encoder_warmup: Annotated[int, Ge(0), Le(MOST_UPDATES)] = option(
        VQVAE, 100, "updates without quantisation before k-means starts the codebook; at most a sixth of --updates"
    )
    kmeans_slices: Annotated[int, Ge(1), Le(100_000)] = option(VQVAE, 128, "slices whose latents start the codebook")
    downsampling: Annotated[int, Ge(1), Le(64)] = option(
        VQVAE, 8, "side in pixels of the square that one code stands for"
    )
    channels: Width = option(VQVAE, 128, "width of encoder and decoder")
    residual_blocks: Layers = option(VQVAE, 2, "residual blocks of each")
    hidden_channels: Width = option(VQVAE, 64, "width inside a residual block")
    codebook_size: Width = option(VQVAE, 512, "K, the number of embeddings")
    embedding_dim: Width = option(VQVAE, 64, "D, the length of an embedding")
    commitment_cost: Annotated[float, Ge(0), Le(100)] = option(
        VQVAE, 0.25, "weight of the commitment term, which the embedding loss is"
    )
    codebook_decay: Decay = option(VQVAE, 0.99, "decay of the codebook's EMA per update")
    dead_code_threshold: Annotated[float, Ge(0), Le(1)] = option(
        VQVAE, 0.3, "codes used less than this share of the mean are replaced; 0 replaces none"
    )

    prior_updates: Updates = option(PRIOR, 10_000, "updates of the prior")
    prior_learning_rate: Rate = option(PRIOR, 8e-3, "peak learning rate")
    prior_channels: Width = option(PRIOR, 64, "width of both stacks")
    prior_dilation_cycles: Layers = option(
        PRIOR, 2, "cycles through the dilations; the receptive field of each covers the grid"
    )
    prior_head_channels: Width = option(PRIOR, 256, "width of the layer before the logits")
    prior_dropout: Annotated[float, Ge(0), Le(0.99)] = option(PRIOR, 0.1, "share of channels dropped")
    prior_code_noise: Annotated[float, Ge(0), Le(1)] = option(
        PRIOR, 0.1, "largest share of the previous codes of a slice that are replaced at random in training"
    )
    prior_position_frequencies: Layers = option(PRIOR, 4, "Fourier features of the slice position")

    refiner_updates: Updates = option(
        REFINER, 10_000, "updates of the refiner; by default no more than show it as many slices as the VQ-VAE sees"
    )
    refiner_learning_rate: Rate = option(REFINER, 6e-3, "peak learning rate")
    refiner_channels: Width = option(REFINER, 16, "width of the layers on pixels, which doubles from level to level")
    refiner_levels: Annotated[int, Ge(1), Le(8)] = option(
        REFINER, 4, "levels of the U-Net; each has half the rows and columns of the one before"
    )
    refiner_time_frequencies: Layers = option(REFINER, 8, "Fourier features of the flow's time")
    refiner_ode_steps: Layers = option(REFINER, 4, "steps of the ODE solver per sample, each one pass")
    std_slices: Annotated[int, Ge(1), Le(100_000)] = option(
        REFINER, 256, "slices from which the standard deviation of residuals is estimated"
    )

    adam_beta1: Annotated[float, Ge(0), Le(0.9999)] = option(OPTIMISER, 0.9, "Adam's decay of the first moment")
    adam_beta2: Annotated[float, Ge(0), Le(0.9999)] = option(OPTIMISER, 0.99, "Adam's decay of the second moment")
    weight_decay: Annotated[float, Ge(0), Le(100)] = option(
        OPTIMISER, 0.3, "times the learning rate: the share by which weights shrink per update"
    )
    warmup_updates: Annotated[int, Ge(1), Le(MOST_UPDATES)] = option(
        OPTIMISER, 50, "updates of linear warm-up; the rate then falls to 0 along a cosine"
    )
    gradient_clip: Annotated[float, Gt(0), Le(1e9)] = option(
        OPTIMISER, 1.0, "gradient clipping: the largest norm of a gradient"
    )
    ema_decay: Decay = option(OPTIMISER, 0.99, "decay per update of the EMA of the prior's and the refiner's weights")
    patience: Annotated[int, Ge(0), Le(MOST_UPDATES)] = option(
        OPTIMISER, 0, "validations, 10 per stage, without a lower loss after which the stage ends; 0 ends none"
    )

    @property
    def small_batch_size(self) -> int:
        """Return the slices per update of the prior and the refiner."""
        return -(-self.batch_size // self.batch_divisor)

    @property
    def on_phantom(self) -> bool:
        """Return whether the slices are the phantom's: beside a table, "phantom" stands for the table's folder."""
        return self.data == "phantom" and not self.table

    @model_validator(mode="after")
    def check_window(self) -> "TrainConfig":
        low, high = self.window or (0, 1)
        if (self.intensity == "window") != (self.window is not None) or np.float32(low) >= np.float32(high):
            raise ValueError("--intensity window needs --window LOW HIGH, LOW below HIGH, and --window needs it")
        return self


# What differs from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "demo": {
        "phantom_size": (128, 64),
        "augmentation": 0.0,
        "updates": 420,
        "learning_rate": 8e-3,
        "encoder_warmup": 50,
        "downsampling": 4,
        "prior_updates": 800,
        "prior_learning_rate": 12e-3,
        "prior_dilation_cycles": 1,
        "refiner_updates": 700,
    },
}
FREE_OPTIONS = {name for name, field in TrainConfig.model_fields.items() if group_and_free(field)[1]}


def configure(given: Mapping[str, Any]) -> TrainConfig:
    """Return the preset that is asked for with the options that are given. Raises RunError if they do not fit."""
    chosen = PRESETS[given.get("preset", "full")]
    try:
        config = validate(TrainConfig, {**chosen, **given})
    except ValueError as error:  # of options that do not fit each other: each alone was checked by the parser
        raise RunError(str(error)) from None
    if "refiner_updates" in given:
        return config
    most = config.batch_divisor * config.updates  # the refiner then sees as many slices as the VQ-VAE
    return config.model_copy(update={"refiner_updates": min(most, config.refiner_updates)})


# ---------------------------------------------------------------- networks


def network_config(kind: type, options: TrainConfig, prefix: str = "", **given: Any) -> Any:
    """Return a network's config: each field is given, or is the option of that name with a prefix."""
    chosen = {field.name: getattr(options, prefix + field.name) for field in fields(kind) if field.name not in given}
    return kind(**chosen, **given)


@cache
def network_model(kind: type, prefix: str = "") -> type[StrictModel]:
    """Return the strict model of a network's config, with the ranges of the options that its fields come from."""
    options, annotated = TrainConfig.model_fields, cast(Any, Annotated)  # whose arguments are dynamic here
    types: dict[str, Any] = {
        "grid": Annotated[tuple[Width, Width], Strict(False)],
        "left_right": Annotated[int, Ge(0), Le(1)],
    }
    for name in (field.name for field in fields(kind) if field.name not in types):
        field = options[prefix + name] if prefix + name in options else options[name]
        parts = (field.annotation, *field.metadata)
        types[name] = annotated[parts]
    return create_model(
        kind.__name__, __base__=StrictModel, **{field.name: types[field.name] for field in fields(kind)}
    )


# ---------------------------------------------------------------- config.json

FORMAT = 8  # of a run directory; increment it when this version and an older one would misread each other's files
FLOAT32 = np.finfo(np.float32)
Text = Annotated[str, MaxLen(4096)]
Row = Annotated[tuple[float, float, float, float], Strict(False)]


def check_format(values: Any) -> Any:
    """Return the content of a run's file if it has this version's format. Files of format 1 do not state it.

    Raises:
        ValueError: Naming both formats; without this check, the error would name the first unknown field.
    """
    given = values.get("format", 1) if isinstance(values, dict) else FORMAT
    if type(given) is int and given != FORMAT:
        age = "a newer" if given > FORMAT else "an older"
        raise ValueError(f"it is of run format {str(given):.20}, of {age} version than this one, which reads {FORMAT}")
    return values


class Intensity(StrictModel):
    """How pixels become values in [-1, 1]."""

    percentile: Annotated[float, Ge(0), Le(100)] | None = Field(
        description="of a volume's pixels: the value that becomes 1; null with another --intensity"
    )
    scale: Annotated[float, Ge(float(FLOAT32.min)), Le(float(FLOAT32.max))] = Field(
        description="median of the volumes' values that become 1; samples are written with it"
    )
    low: Annotated[float, Ge(float(FLOAT32.min)), Le(float(FLOAT32.max))] = Field(
        0.0, description="median of the volumes' values that become -1"
    )

    @model_validator(mode="after")
    def check_limits(self) -> "Intensity":
        low, high = (float(np.float32(value)) for value in (self.low, self.scale))
        if not FLOAT32.tiny <= high - low <= FLOAT32.max:
            raise ValueError(f"cannot have scale {self.scale} and low {self.low}")
        return self


class Positions(StrictModel):
    """The positions of the training slices in their volumes, from which sampling draws."""

    quantiles: Annotated[list[Annotated[float, Ge(0), Le(1)]], MaxLen(101)] = Field(
        description="101 quantiles of the known positions; empty if none is known"
    )
    unknown: Annotated[float, Ge(0), Le(1)] = Field(description="share of slices whose position is unknown")

    @model_validator(mode="after")
    def check_quantiles(self) -> "Positions":
        if len(self.quantiles) != 101 and (self.quantiles or self.unknown < 1):
            raise ValueError(f"has {len(self.quantiles)} quantiles, not 101")
        return self


class RunConfig(StrictModel):
    """The content of config.json: what a run was made with and what sampling needs of its data."""

    format: int = FORMAT
    options: TrainConfig
    slice_size: Annotated[tuple[Width, Width], Strict(False)] = Field(description="rows and columns in pixels")
    intensity: Intensity
    affine: Annotated[tuple[Row, Row, Row, Row], Strict(False)] = Field(description="of training slices, in mm")
    positions: Positions
    fingerprint: Text = Field(description="hash of the data's names and content")
    libraries: dict[str, Text] = Field(description="versions, by name")
    command: list[str] = Field(description="the command line that began the run")
    git_revision: Text | None = Field(description="of the code, `-dirty` if it was changed; null outside a repository")

    @model_validator(mode="before")
    @classmethod
    def check_format(cls, values: Any) -> Any:
        return check_format(values)

    @model_validator(mode="after")
    def check_affine(self) -> "RunConfig":
        rows, columns, through = np.array(self.affine)[:3, :3].T
        largest, area = np.abs(self.affine).max(), np.linalg.norm(np.cross(rows, columns))
        if largest > 1e13 or area < 1e-12 or np.linalg.norm(through) < 1e-6:
            raise ValueError("affine is no voxel grid")
        return self


# ---------------------------------------------------------------- command line


def add_options(parser: ArgumentParser) -> None:
    """Give a parser one option per field, in groups. Options that are not given are not set (see `configure`)."""
    groups: dict[str, Any] = {}
    for name, field in TrainConfig.model_fields.items():
        heading, _ = group_and_free(field)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        add_option(groups[heading], name, field)


def add_option(group: Any, name: str, field: FieldInfo) -> Action:
    """Add the option of one field: argparse checks type and range, the help gives the meaning and the defaults."""
    flag, items = f"--{name.replace('_', '-')}", item_types(field)
    kind, limits = items[0]
    meaning = f"{field.description} ({describe_range(limits)}{describe_default(name, field)})"
    how: dict[str, Any] = {"default": SUPPRESS, "help": meaning}
    if name == "preset":
        return group.add_argument(flag, choices=PRESETS, **how)
    if get_origin(kind) is Literal:
        return group.add_argument(flag, choices=get_args(kind), **how)
    if kind is bool:
        return group.add_argument(flag, action="store_true", **how)
    parse = number(kind, *limits) if kind in (int, float) else nonempty(kind)
    if len(items) == 2:
        names = ("H", "W") if kind is int else ("LOW", "HIGH")
        return group.add_argument(flag, nargs=2, metavar=names, type=parse, action=PairAction, **how)
    return group.add_argument(flag, metavar={int: "N", float: "X"}.get(kind, flag[2:].upper()), type=parse, **how)


class PairAction(Action):
    """Keep two values as a tuple."""

    def __call__(self, parser: ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def item_types(field: FieldInfo) -> list[tuple[type, tuple[float, float, bool]]]:
    """Return the type of a field, or of both items of a pair, each with its limits (low, high, low is excluded)."""
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]  # the other is None
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) is tuple:
        kind = get_args(kind)[0]
    items = get_args(kind) if get_origin(kind) is tuple else (kind,)
    parts = (get_args(item) if get_origin(item) is Annotated else (item, *field.metadata) for item in items)
    return [split_limits(*part) for part in parts]


def split_limits(kind: type, *metadata: Any) -> tuple[type, tuple[float, float, bool]]:
    """Return a type and its limits as `console.number` takes them."""
    limits = [asdict(part) for part in metadata if isinstance(part, Ge | Gt | Le)]
    bounds = {name: value for limit in limits for name, value in limit.items()}  # of ge, gt and le
    low = bounds.get("gt", bounds.get("ge", -math.inf))
    return kind, (low, bounds.get("le", math.inf), "gt" in bounds)


def describe_range(limits: tuple[float, float, bool]) -> str:
    """Return a field's range in words, or "" if it has none."""
    low, high, above = limits
    return "" if high == math.inf else f"{'above ' if above else ''}{low:.10g} to {high:.10g}; "


def describe_default(name: str, field: FieldInfo) -> str:
    """Return a field's default in words, for each preset if they differ."""
    if field.default is None or isinstance(field.default, bool):
        return "default: no"
    values = {preset: chosen.get(name, field.default) for preset, chosen in PRESETS.items()}
    if len(set(values.values())) == 1:
        return f"default: {in_words(field.default)}"
    return "default: " + ", ".join(f"{preset} {in_words(value)}" for preset, value in values.items())


def in_words(value: Any) -> str:
    """Return a value as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
