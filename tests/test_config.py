"""config.py: the options of a training, on the command line, in the help and in config.json."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

import checkpoints
import config
import train
from config import FREE_OPTIONS, PRESETS, TrainConfig, configure, parse_json, validate
from console import RunError
from modules import PriorConfig, VQVAEConfig
from refiner import RefinerConfig

FIELDS = list(TrainConfig.model_fields)
RECORDED = [name for name in FIELDS if name not in FREE_OPTIONS and name != "preset"]
DEFAULTS = TrainConfig().model_dump(mode="json")


TEXTS = ("init", "pattern")
OTHER_VALUES = {
    "axis": (["1"], 1),
    "pixel_size": (["0.8"], 0.8),
    "crop": (["body"], "body"),
    "intensity": (["zscore"], "zscore"),
    "window": (["-160", "240.5", "--intensity", "window"], [-160, 240.5]),
}


def flag(name):
    return f"--{name.replace('_', '-')}"


def another_value(name):
    """A value in range that is not the default, as text on the command line and as config.json has it."""
    default = DEFAULTS[name]
    if name in TEXTS:
        return ["other"], "other"
    if name == "slice_size" or isinstance(default, list):
        return ["48", "24"], [48, 24]
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    value = default + 1 if isinstance(default, int) else round(default * 0.5 + 0.001, 6)
    return [str(value)], value


def test_only_options_that_change_no_result_may_differ_on_resuming():
    expected = {"run", "images", "device", "data", "table", "recheck", "checkpoint_every", "allow_changed_data"}
    expected |= {"accumulate"}
    assert expected == FREE_OPTIONS


@pytest.mark.parametrize("name", RECORDED)
def test_each_hyper_parameter_is_recorded_and_must_not_change_on_resuming(name):
    text, value = another_value(name)
    options = train.parse_options([flag(name), *text])
    recorded = options.model_dump(mode="json")
    assert recorded[name] == value
    assert {key for key in recorded if recorded[key] != DEFAULTS[key]} == {name} | {"intensity"} & {
        part[2:] for part in text
    }
    assert parse_json(TrainConfig, json.dumps(recorded)) == options
    with pytest.raises(RunError, match=rf"{flag(name)} was .*, is "):
        checkpoints.check_same_options(Path("run"), TrainConfig(), options)


@pytest.mark.parametrize("name", RECORDED)
def test_each_hyper_parameter_of_config_json_is_checked_against_its_range(name):
    for value in (-1, 1e12, *([] if name in TEXTS else ["1"]), True, [1, 2, 3], {}):
        with pytest.raises(ValueError, match=rf"{name}(\.[012])? (cannot be|is missing|is unknown)"):
            validate(TrainConfig, DEFAULTS | {name: value})


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.parse_options(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in TrainConfig.model_fields.items():
        assert flag(name) in shown
        assert " ".join(field.description.split()) in shown
    assert "default: full 8, demo 4" in shown
    assert "above 0 to 10; default: 0.006" in shown
    assert "above 0 to 10; default: full 0.008, demo 0.012" in shown


def test_options_override_the_preset_and_the_preset_the_defaults():
    assert configure({}) == TrainConfig()
    demo = configure({"preset": "demo", "prior_updates": 7})
    assert (demo.prior_updates, demo.downsampling, demo.channels) == (7, 4, 128)
    for name in ("full", "demo"):  # other tests add their own presets
        chosen = PRESETS[name]
        assert {key: getattr(configure({"preset": name}), key) for key in chosen} == chosen
        assert all(getattr(TrainConfig(), key) != value for key, value in chosen.items())  # only what differs


def test_train_config_is_immutable_and_refuses_unknown_options():
    with pytest.raises(ValidationError):
        TrainConfig().updates = 7
    with pytest.raises(RunError, match="colour is unknown"):
        configure({"colour": "blue"})


@pytest.mark.parametrize(
    "options",
    [
        {"intensity": "window"},
        {"window": (0, 1)},
        {"intensity": "zscore", "window": (0, 1)},
        {"intensity": "window", "window": (5, 5)},
        {"intensity": "window", "window": (1e9 - 1, 1e9)},  # equal in float32
    ],
)
def test_a_window_needs_its_intensity_and_two_limits_in_order(options, error_line):
    message = "--intensity window needs --window LOW HIGH, LOW below HIGH, and --window needs it"
    with pytest.raises(RunError, match=message):
        configure(options)
    given = [text for name, value in options.items() for text in (flag(name), *str(value).strip("()").split(", "))]
    assert message in error_line("train.py", given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"it cannot be \[\]"),
        (DEFAULTS | {"colour": "blue"}, "colour is unknown to this version"),
        (DEFAULTS | {"prior_learning_rate": float("nan")}, "prior_learning_rate cannot be nan"),
        (DEFAULTS | {"learning_rate": 10**400}, "learning_rate cannot be 1000"),
        (DEFAULTS | {"slice_size": [64]}, "slice_size.1 is missing"),
    ],
)
def test_invalid_options_of_config_json_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig, values)


def test_network_configs_are_taken_from_the_options():
    options = train.parse_options(["--prior-channels", "24", "--codebook-size", "9", "--refiner-channels", "7"])
    shape = config.network_config(PriorConfig, options, "prior_", grid=(2, 3), codebook_size=9, left_right=0)
    assert (shape.channels, shape.codebook_size, shape.dilation_cycles) == (24, 9, 2)
    assert config.network_config(VQVAEConfig, options).codebook_size == 9


def test_the_defaults_of_the_networks_are_those_of_the_options():
    options = TrainConfig()
    shared = {name: getattr(options, name) for name in ("downsampling", "codebook_size")}
    assert config.network_config(VQVAEConfig, options) == VQVAEConfig()
    given = {"grid": (32, 16), "codebook_size": options.codebook_size, "left_right": 0}
    assert config.network_config(PriorConfig, options, "prior_", **given) == PriorConfig()
    assert config.network_config(RefinerConfig, options, "refiner_", **shared) == RefinerConfig()


@pytest.mark.parametrize(("kind", "prefix"), [(VQVAEConfig, ""), (PriorConfig, "prior_"), (RefinerConfig, "refiner_")])
def test_network_configs_of_weights_files_are_checked_against_the_ranges(kind, prefix):
    model, values = config.network_model(kind, prefix), json.loads(json.dumps(asdict(kind())))
    assert kind(**validate(model, values).model_dump()) == kind()
    for name in values:
        for value in (-1, 1e12, "1", True, None):
            with pytest.raises(ValueError, match=rf"{name} cannot be "):
                validate(model, values | {name: value})
        with pytest.raises(ValueError, match=f"{name} is missing"):
            validate(model, {key: values[key] for key in values if key != name})
