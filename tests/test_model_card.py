"""model_card.py: what is filled in, what people wrote, and when the card speaks against sharing."""

import copy
import math
import shlex

import pytest

import model_card
from config import RunConfig

ATTACK = {
    "auc": 0.5,
    "auc_interval": (0.4, 0.6),
    "auc_by_patient": 0.5,
    "auc_by_patient_interval": (0.3, 0.7),
    "tpr_at_1_percent_fpr": 0.01,
}
SETTINGS = {"split": "test", "heldout_slices": 200, "heldout_slices_in_all": 200, "heldout_cases": 10, "samples": 200}
SAMPLES = {"c2st_accuracy": 0.6, "coverage_by_patient": 0.9, "ms_ssim_diversity": 0.65}
COPYING = {"memorisation_rate": 0.01, "c_t": 0.1}
JUDGED = {"copied": 0.0, "copied_expected": 0.01, "tail_share": 0.02, "tail_p_value": 0.4}
RESULTS = {
    "settings": SETTINGS | {"training_slices": 2400, "training_slices_searched": 2400, "training_cases": 120},
    "reconstructions": {"ssim": 0.9, "psnr": 27.0},
    "codes": {"perplexity": 400.0, "used": 1.0},
    "prior": {"bits_per_code": 4.0},
    "training": {"prior": {"bits_per_code": 3.9}},
    "samples": SAMPLES,
    "prior_alone": {"samples": SAMPLES, "copying": COPYING},
    "baseline": {"samples": SAMPLES, "copying": COPYING},
    "slices": dict.fromkeys(("samples", "reconstructions", "heldout_slices"), JUDGED),
    "incoherent_by_height": {"low": 0.0625, "middle": 0.0, "high": 0.25},
    "membership": {
        "patients": 10,
        "slices": 100,
        "attacks": {"likelihood": ATTACK, "guide": ATTACK, "neighbourhood": ATTACK, "samples": ATTACK},
    },
}


def with_value(value, *place):
    """The results with another value at a place."""
    results = copy.deepcopy(RESULTS)
    part = results
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return results


def fill(run_config, results=RESULTS, card=None, **options) -> str:
    return model_card.fill_card(card or model_card.TEMPLATE.read_text(), run_config(**options), results)


def test_the_card_has_the_run_the_figures_and_the_questions(run_config):
    card = fill(run_config, seed=7, learning_rate=2e-3, slice_size=[64, 32])
    for part in (
        "| preset; options that differ from it | full; seed 7, learning_rate 0.002 |",
        "| training slices, patients | 2400, 120 |",
        "| bits per code | 4.00 | training slices 3.90 |",
        "| membership inference, neighbourhood | AUC 0.50 (0.40 to 0.60); 1% found at 1 % wrongly accused |",
        "**Not tested.** Attacks with reference models",
        "## Training data",
        "ethics approval, consent",
        "## What may be shared",
    ):
        assert part in card
    assert card.count(model_card.BEGIN) == card.count(model_card.END) == 1


def test_incoherent_anatomy_is_given_by_height_where_each_third_has_samples(run_config):
    assert "| samples with incoherent anatomy, by height | 6.2%, 0.0%, 25.0% | in the lowest" in fill(run_config)
    assert "by height" not in fill(run_config, with_value(math.nan, "incoherent_by_height", "low"))


def test_a_later_evaluation_keeps_what_people_wrote(run_config):
    first = fill(run_config).replace("NAME OF THE RUN", "our run").replace("*...*", "seen by A. B.")
    second = fill(run_config, with_value(0.31, "reconstructions", "ssim"), first)
    assert "our run" in second
    assert "seen by A. B." in second
    assert "0.310" in second
    assert "0.900" not in second
    assert fill(run_config, RESULTS, second) == first


def test_a_card_without_markers_is_refused(run_config):
    with pytest.raises(ValueError, match="lacks the lines"):
        fill(run_config, card="# mine")


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (with_value(0.2, "prior_alone", "copying", "memorisation_rate"), "**Samples.** Do not share: 20% of them"),
        (
            with_value(ATTACK | {"auc": 0.7, "auc_interval": (0.6, 0.8)}, "membership", "attacks", "samples"),
            "**Samples.** Do not share: training slices can be told",
        ),
        (
            with_value(ATTACK | {"auc": 0.8, "auc_interval": (0.7, 0.9)}, "membership", "attacks", "neighbourhood"),
            "**Weights.** Do not share: they give training patients away. The best attack tried (neighbourhood)",
        ),
        (
            with_value(
                ATTACK | {"auc": 0.49, "auc_interval": (0.46, 0.52), "auc_by_patient_interval": (0.51, 0.9)},
                "membership",
                "attacks",
                "likelihood",
            ),
            "**Weights.** Do not share: they give training patients away. The best attack tried (likelihood)",
        ),
        (
            with_value(ATTACK | {"auc": 0.8, "auc_interval": (0.7, 0.9)}, "membership", "attacks", "guide"),
            "where 0.5 gives nobody away. No other attack works: delete `guide.safetensors` from a copy",
        ),
        (
            with_value(3, "membership", "patients"),
            "**Weights.** Do not share: 3 patients held out are too few to tell.",
        ),
        (
            with_value(1, "membership", "patients"),
            "**Weights.** Do not share: 1 patient held out is too few to tell.",
        ),
        (with_value(1, "settings", "heldout_cases"), "**Few patients.** Only 1 patient held out: metrics"),
        (
            with_value(JUDGED | {"copied": 0.03}, "slices", "samples"),
            "**Samples.** Do not share: 3.0% of them are called copies",
        ),
        (
            with_value(JUDGED | {"copied": math.nan, "copied_expected": math.nan}, "slices", "samples"),
            "**Samples.** Copies cannot be called, as fewer than two training patients are known.",
        ),
        (
            with_value(JUDGED | {"copied": math.nan, "copied_expected": math.nan}, "slices", "samples"),
            "| samples called copies of a training slice | unknown | fewer than two training patients are known |",
        ),
        (
            with_value(JUDGED | {"tail_share": 0.1, "tail_p_value": 0.001}, "slices", "samples"),
            "**Anatomy.** 10.0% of the samples have anatomy that hardly any patient has (p = 0.0010)",
        ),
        (with_value(0.99, "samples", "c2st_accuracy"), "**Quality.** A classifier tells 99% of"),
        (with_value(5.0, "prior", "bits_per_code"), "**Overfitting.** The prior needs 28% more bits"),
        (with_value(2, "settings", "heldout_cases"), "**Few patients.** Only 2 patients"),
    ],
)
def test_bad_figures_are_said_plainly(run_config, results, sentence):
    assert sentence not in fill(run_config)
    assert sentence in fill(run_config, results)


def test_values_cannot_break_the_table(run_config):
    config = run_config().model_copy(update={"git_revision": "a|b <b> \n# heading"})
    assert isinstance(config, RunConfig)
    card = model_card.fill_card(model_card.TEMPLATE.read_text(), config, RESULTS)
    (line,) = (line for line in card.splitlines() if line.startswith("| git revision |"))
    assert line == "| git revision | a\\|b &lt;b> \\n# heading |"


def test_texts_of_the_user_are_left_out_of_the_config_and_the_card(run_config):
    """All of them: options with a text or a path, but for the preset and the device, whose texts are ours."""
    texts = ("run", "images", "init", "data", "pattern", "table")
    assert model_card.PLACEHOLDERS.keys() == set(texts)
    config = run_config(**dict.fromkeys(texts, "secret"), seed=3)
    config = config.model_copy(update={"command": ["/secret/train.py", "--run", "secret"]})
    redacted = model_card.redact(config)
    assert "secret" not in redacted.model_dump_json()
    command = (
        "python train.py --preset full --seed 3 --init INIT --pattern '(?P<case>PATTERN)' --table TABLE --data DATA"
    )
    assert shlex.join(redacted.command) == f"{command} --run RUN"
    for name in config.options.model_dump().keys() - set(texts):
        assert getattr(redacted.options, name) == getattr(config.options, name)
    card = model_card.fill_card(model_card.TEMPLATE.read_text(), config, RESULTS)
    assert "secret" not in card
    assert f"| command | {command.replace('<', '&lt;')} --run RUN |" in card


def test_texts_that_were_not_given_stay(run_config):
    config = run_config(data="phantom", run="runs/default", images="images")
    assert model_card.redact(config).options == config.options


def test_a_run_that_was_not_evaluated_has_a_card(run_config):
    card = fill(run_config, None)
    assert "## Run" in card and "The run was not evaluated." in card
    assert "## Conclusions" not in card
