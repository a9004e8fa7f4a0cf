"""The model card of a run: what was measured, what may be concluded from it, and the questions that only people answer.

`evaluate.py` writes RUN/MODEL_CARD.md from docs/MODEL_CARD_TEMPLATE.md. Later evaluations replace the measured part,
between two markers, and leave what people wrote. The measured part holds no path and no name of a data file.
"""

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints import read_bytes
from config import FREE_OPTIONS, RunConfig, TrainConfig, configure, item_types
from console import printable
from dataset import SPLIT_TITLES
from files import counted
from membership import MIN_PATIENTS, chance_rate

TEMPLATE = Path(__file__).resolve().parent / "docs" / "MODEL_CARD_TEMPLATE.md"
METADATA_END = "\n---\n\n"  # and the next: what export.py puts around a card
FILES_HEADING = "\n## Files\n"
BEGIN, END = "<!-- measured by evaluate.py: begin -->", "<!-- measured by evaluate.py: end -->"
MAX_CARD = 1 << 20  # bytes of a model card that is read
FEW_PATIENTS = 10  # held out; with fewer, metrics of samples vary too much to judge by
MAX_C2ST = 0.75  # accuracy above which samples are easily told from real slices
MAX_MEMORISED = 0.05  # share of samples closer to a training slice than any reconstruction of a held-out slice
MAX_P_VALUE = 0.01  # of the share of samples with incoherent anatomy
OVERFITTED = 0.1  # share of bits per code that held-out slices need more than training slices
SAMPLES_ATTACK, GUIDE_ATTACK = "samples", "guide"  # of evaluation.json; all but the first need the weights
CONCLUSIONS, GUIDE_ROW = "## Conclusions from these measurements", f"| membership inference, {GUIDE_ATTACK} |"

# What stands for texts of the user's choosing, such as paths, where they are left out: they may name patients.
PLACEHOLDERS: dict[str, Any] = {
    name: kind(name.upper())
    for name, field in TrainConfig.model_fields.items()
    if (kind := item_types(field)[0][0]) in (str, Path) and name not in ("preset", "device")
}
PLACEHOLDERS["pattern"] = "(?P<case>PATTERN)"  # valid, and matches no file


def redact(config: RunConfig) -> RunConfig:
    """Return a config with placeholders for given texts, and a command line that is rebuilt from its options."""
    fields, given = TrainConfig.model_fields, config.options
    removed = {name: text for name, text in PLACEHOLDERS.items() if getattr(given, name) != fields[name].default}
    options = given.model_copy(update=removed)
    command = ["python", "train.py", "--preset", options.preset]
    if options.slice_size:
        command += ["--slice-size", *map(str, options.slice_size)]
    for name, value in changed_options(options).items():
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    command += ["--table", "TABLE"] if options.table else []
    command += [] if options.data == "phantom" else ["--data", "DATA"]
    return config.model_copy(update={"options": options, "command": [*command, "--run", "RUN"]})


def read_card(run: Path) -> str:
    """Return the model card of a run or an export, or the template if it has none. Raises OSError or ValueError."""
    own, exported = run / "MODEL_CARD.md", run / "README.md"
    if not own.exists() and exported.exists():
        text = read_bytes(exported, MAX_CARD).decode()
        if BEGIN in text:
            return text.partition(METADATA_END)[2].rpartition(FILES_HEADING)[0]
    return read_bytes(own if own.exists() else TEMPLATE, MAX_CARD).decode()


def fill_card(card: str, config: RunConfig, results: Mapping[str, Any] | None) -> str:
    """Return a card whose measured part is that of an evaluation.

    Args:
        card: The template, or a card that was written before.
        config: Of the run.
        results: The content of evaluation.json, NaN for null; None if the run was not evaluated.

    Raises:
        ValueError: The card lacks the markers of the measured part.
    """
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it lacks the lines {BEGIN} and {END}")
    return "\n".join([before + begin, *measured_part(redact(config), results), end + after])


def measured_part(config: RunConfig, results: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of the measured part."""
    yield "\n## Run\n\n| | |\n|---|---|"
    for name, value in describe_run(config, results).items():
        yield f"| {name} | {escape(value)} |"
    yield "\n## Measured\n"
    if results is None:
        yield "The run was not evaluated.\n"
        return
    settings = results["settings"]
    held_out = f"{settings['heldout_slices']} {SPLIT_TITLES[settings['split']]} slices"
    yield (
        f"On {held_out} of {settings['heldout_cases']} patients and {settings['samples']} samples (`evaluation.json`; "
        "definitions in docs/evaluation.md).\n"
    )
    yield "| metric | value | baseline or reference |\n|---|---|---|"
    for row in describe_metrics(results):
        yield f"| {' | '.join(row)} |"
    yield f"\n{CONCLUSIONS}\n"
    for heading, text in (*quality_warnings(results), *judgements(results)):
        yield f"- **{heading}.** {text}"


def escape(value: object) -> str:
    """Make a value safe for a cell of a table: names may hold any character."""
    return printable(str(value)).replace("|", "\\|").replace("<", "&lt;")


def describe_run(config: RunConfig, results: Mapping[str, Any] | None) -> dict[str, object]:
    """Return what config.json says of the run, by its name in the card."""
    changed = [f"{name} {value}" for name, value in changed_options(config.options).items()]
    facts: dict[str, object] = {
        "command": shlex.join(config.command),
        "preset; options that differ from it": f"{config.options.preset}; {', '.join(changed) or 'none'}",
        "git revision": config.git_revision or "unknown",
        "library versions": ", ".join(f"{name} {version}" for name, version in config.libraries.items()),
        "slice size; fingerprint of the data": f"{'x'.join(map(str, config.slice_size))}; {config.fingerprint}",
    }
    if results:
        settings = results["settings"]
        facts["training slices, patients"] = f"{settings['training_slices']}, {settings['training_cases']}"
        facts["slices evaluated; searched for copies"] = (
            f"{settings['heldout_slices']} of {settings['heldout_slices_in_all']} held-out ones; "
            f"{settings['training_slices_searched']} of {settings['training_slices']} training ones"
        )
    return facts


def changed_options(options: TrainConfig) -> dict[str, Any]:
    """Return the options that differ from their preset, without those that may change when a run is resumed."""
    given, preset = (own.model_dump(mode="json") for own in (options, configure({"preset": options.preset})))
    recorded = [name for name in given if name not in (*FREE_OPTIONS, "slice_size")]
    return {name: given[name] for name in recorded if given[name] != preset[name]}


def describe_metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the table: metric, value, baseline or reference."""
    reconstructions, prior, baseline = results["reconstructions"], results["prior"], results["baseline"]
    yield "SSIM of reconstructions, Gaussian window", f"{reconstructions['ssim']:.3f}", "at most 1"
    yield "PSNR of reconstructions", f"{reconstructions['psnr']:.2f} dB", ""
    yield (
        "perplexity of codes",
        f"{results['codes']['perplexity']:.0f}",
        f"{results['codes']['used']:.0%} of codes used",
    )
    training_bits = results["training"]["prior"]["bits_per_code"]
    yield "bits per code", f"{prior['bits_per_code']:.2f}", f"training slices {training_bits:.2f}"
    for key, name in (
        ("c2st_accuracy", "C2ST accuracy"),
        ("coverage_by_patient", "coverage, by patient"),
        ("ms_ssim_diversity", "MS-SSIM diversity"),
    ):
        yield name, f"{results['samples'][key]:.2f}", f"real vs. real {baseline['samples'][key]:.2f}"
    memorised = results["prior_alone"]["copying"]["memorisation_rate"]
    yield (
        "memorisation rate, prior alone",
        f"{memorised:.1%}",
        f"real vs. real {baseline['copying']['memorisation_rate']:.1%}",
    )
    samples, held_out = results["slices"]["samples"], results["slices"]["heldout_slices"]
    called, expected = "unknown", "fewer than two training patients are known"
    if not math.isnan(samples["copied"]):
        called = f"{samples['copied']:.1%}"
        expected = f"held-out slices {held_out['copied']:.1%}, new patients at most {samples['copied_expected']:.1%}"
    yield "samples called copies of a training slice", called, expected
    reference = f"held-out slices {held_out['tail_share']:.1%} (p = {samples['tail_p_value']:.4f})"
    yield "samples with incoherent anatomy", f"{samples['tail_share']:.1%}", reference
    by_height = [share for share in results["incoherent_by_height"].values() if not math.isnan(share)]
    if len(by_height) == 3:
        thirds = "in the lowest, the middle and the highest third of the heights"
        yield "samples with incoherent anatomy, by height", ", ".join(f"{share:.1%}" for share in by_height), thirds
    for name, attack in results["membership"]["attacks"].items():
        low, high = attack["auc_interval"]
        found = f"{attack['tpr_at_1_percent_fpr']:.0%} found at 1 % wrongly accused"
        value = f"AUC {attack['auc']:.2f} ({low:.2f} to {high:.2f}); {found}"
        chance = chance_rate(results["membership"]["slices"])
        yield f"membership inference, {name.replace('_', '-')}", value, f"0.50; {chance:.0%}"


def quality_warnings(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what speaks against relying on the figures or on the samples: a heading, and text with `code`."""
    if results["settings"]["heldout_cases"] < FEW_PATIENTS:
        yield (
            "Few patients",
            f"Only {counted(results['settings']['heldout_cases'], 'patient')} held out: metrics of samples and of "
            "membership vary widely.",
        )
    accuracy = results["samples"]["c2st_accuracy"]
    if accuracy > MAX_C2ST:
        yield "Quality", f"A classifier tells {accuracy:.0%} of samples and real slices apart (chance: 50 %)."
    samples = results["slices"]["samples"]
    if samples["tail_p_value"] < MAX_P_VALUE:
        yield (
            "Anatomy",
            f"{samples['tail_share']:.1%} of the samples have anatomy that hardly any patient has "
            f"(p = {samples['tail_p_value']:.4f}): see `outliers.png`.",
        )
    more = results["prior"]["bits_per_code"] / results["training"]["prior"]["bits_per_code"] - 1
    if more > OVERFITTED:
        yield "Overfitting", f"The prior needs {more:.0%} more bits for held-out slices than for training slices."


def judgements(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what may be concluded about sharing: a heading, and text with `code`."""
    yield "Samples", judge_samples(results)
    yield "Weights", judge_weights(results)
    yield (
        "Not tested",
        "Attacks with reference models, copies of parts smaller than an organ, and anatomy as an expert sees it. No "
        "measurement is a proof of privacy.",
    )


def judge_samples(results: Mapping[str, Any]) -> str:
    """Say what the evidence is against sharing samples."""
    memorised = results["prior_alone"]["copying"]["memorisation_rate"]
    attack = results["membership"]["attacks"][SAMPLES_ATTACK]
    found = []
    own, reconstructions = results["slices"]["samples"], results["slices"]["reconstructions"]
    if own["copied"] > max(own["copied_expected"], reconstructions["copied"]):
        found.append(f"{own['copied']:.1%} of them are called copies of a training slice (`called_copies`)")
    if memorised > MAX_MEMORISED:
        found.append(f"{memorised:.0%} of them are closer to a training slice than any held-out reconstruction is")
    if attack["auc_interval"][0] > 0.5:
        found.append(f"training slices can be told from held-out ones by them (AUC {attack['auc']:.2f})")
    if found:
        return f"Do not share: {'; '.join(found)}."
    if math.isnan(own["copied"]):
        return (
            "Copies cannot be called, as fewer than two training patients are known. Do not share any before you have "
            "compared them with the training slices."
        )
    return "These tests found no copy and no sign of membership. Look at `copying.png` before you share any."


def judge_weights(results: Mapping[str, Any]) -> str:
    """Say what the evidence is against sharing weights."""
    attacks = {name: of for name, of in results["membership"]["attacks"].items() if name != SAMPLES_ATTACK}
    intervals = ("auc_interval", "auc_by_patient_interval")
    leaks = [name for name, of in attacks.items() if max(of[interval][0] for interval in intervals) > 0.5]
    if leaks:
        best = max(leaks, key=lambda name: attacks[name]["auc"])
        text = (
            "Do not share: they give training patients away. The best attack tried "
            f"({best.replace('_', '-')}) has an AUC of {attacks[best]['auc']:.2f}, by patient "
            f"{attacks[best]['auc_by_patient']:.2f}, where 0.5 gives nobody away."
        )
        if leaks != [GUIDE_ATTACK]:
            return text
        return f"{text} No other attack works: delete `guide.safetensors` from a copy, and evaluate that."
    patients = results["membership"]["patients"]
    if patients < MIN_PATIENTS:
        return (
            f"Do not share: {counted(patients, 'patient')} held out {'is' if patients == 1 else 'are'} too few to tell."
        )
    return (
        "The attacks tried do not tell training slices from held-out ones. Stronger ones may: weights also allow "
        "unlimited sampling."
    )
