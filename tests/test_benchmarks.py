"""benchmarks/: the reference networks, and what the benchmarks print."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import commands
import equal_time
import growth
import network_c2st
import new_patients
import noise_floor
import peers
import sampling
import scaling
import table
import training
from reference import PaperPixelCNN, TextbookVQVAE, nats_per_code, sample_by_full_forwards

import phantom
from console import RunError
from dataset import load_dataset
from files import Reading
from modules import GatedPixelCNN, PriorConfig
from predict import Samples


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_textbook_vqvae_has_the_shapes_and_size_of_the_paper():
    model = TextbookVQVAE()
    slices = torch.rand(2, 1, 32, 16) * 2 - 1
    reconstructions, loss, codes = model(slices)
    assert reconstructions.shape == slices.shape
    assert codes.shape == (2, 8, 4)
    assert codes.max() < 512
    (loss + reconstructions.square().mean()).backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0  # straight-through
    assert 0.5e6 < parameters(model) < 0.8e6


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (3, 0), (4, 2)])
def test_the_papers_pixelcnn_is_causal(place):
    model = PaperPixelCNN(codes=7, channels=4, layers=5).double()
    codes = torch.randint(7, (1, 6, 5))
    x = model.embedding(codes).detach().requires_grad_()
    model.embedding.forward = lambda _: x
    row, column = place
    logits = model(codes)[0, :, row, column]
    influence = torch.autograd.grad(logits.square().sum(), x)[0].abs().sum(-1).flatten()
    before = 5 * row + column
    assert (influence[before:] == 0).all()
    if before:
        assert influence[before - 1] > 0 or column == 0
        assert influence.sum() > 0


def test_sampling_by_full_forwards_draws_the_given_codes():
    model = PaperPixelCNN(codes=7, channels=4, layers=2).eval()
    codes = torch.full((3, 2, 4), 99) % 7
    torch.manual_seed(0)
    sampled = sample_by_full_forwards(model, codes.clone(), [(0, 0), (1, 3)])
    kept = torch.ones(2, 4, dtype=bool)
    kept[0, 0] = kept[1, 3] = False
    assert torch.equal(sampled[:, kept], codes[:, kept])
    assert sampled.min() >= 0
    assert sampled.max() < 7


@pytest.fixture
def lines(monkeypatch, capsys):
    """Run a benchmark; return its JSON lines by name, and the summary."""

    def run(benchmark, *given):
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, given)])
        capsys.readouterr()
        benchmark.main()
        *printed, sentence = capsys.readouterr().out.splitlines()
        return {line["name"]: line for line in map(json.loads, printed)}, sentence

    return run


def names_of(script):
    """Return the names of the JSON lines that the table takes from a script, without optional ones."""
    return {name for row in table.ROWS[script] for name in (*row.ours, row.ratio) if name}


def test_updates_of_every_network_are_timed(lines, monkeypatch):
    for name, value in {"BATCH": 2, "SIZE": (32, 16), "GRID": (8, 4)}.items():
        monkeypatch.setattr(training, name, value)
    printed, sentence = lines(training, "--rounds", 1, "--codes", 16, "--device", "cpu")
    assert names_of("training.py") <= printed.keys()
    for network in ("vqvae", "prior", "refiner"):
        line = printed[f"{network}_update_seconds"]
        assert 0 < line["value"] < 60
        assert line["codes"] == 16
        assert f"an update of the {network} takes {line['value']:.4g} s" in sentence
    for network in ("vqvae", "prior"):
        ours, theirs = (printed[f"{network}_update_seconds{whose}"]["value"] for whose in ("", "_reference"))
        assert printed[f"{network}_update_speedup"]["value"] == pytest.approx(theirs / ours, rel=1e-2)


def test_sampling_is_timed_against_a_full_forward_per_code(lines, monkeypatch):
    """Grids of 32 codes; one of the 32 full forward passes is timed."""
    for name, value in {"BATCH": 2, "GRID": (8, 4), "PLACES": [(2, 2)], "SLICES": {"cpu": 2}}.items():
        monkeypatch.setattr(sampling, name, value)
    monkeypatch.setitem(sampling.predict.BATCH_SIZES, "cpu", 3)
    printed, sentence = lines(sampling, "--rounds", 1, "--codes", 16, "--device", "cpu")
    assert names_of("sampling.py") <= printed.keys()
    values = {name: line["value"] for name, line in printed.items()}
    assert min(values.values()) > 0
    forwards = values["sampling_by_full_forwards_seconds"]
    assert values["sampling_speedup"] == pytest.approx(forwards / values["sampling_seconds"], rel=1e-2)
    assert values["sampling_over_one_forward"] == pytest.approx(values["sampling_seconds"] / (forwards / 32), rel=1e-2)
    assert values["decoding_seconds"] < values["refiner_seconds"]
    assert "2 refined slices" in sentence


def test_noise_free_slices_have_a_higher_ssim_than_second_exposures(lines):
    printed, sentence = lines(noise_floor, "--cases", 2, "--size", 64, 32)
    noisy, clean = (printed[name]["value"] for name in ("ssim_of_two_exposures", "ssim_without_noise"))
    assert 0.5 < noisy < clean < 1
    assert f"{noisy:.3f}" in sentence
    assert f"{clean:.3f}" in sentence
    other, _ = lines(noise_floor, "--cases", 1, "--size", 64, 32, "--seed", 1)
    assert other["ssim_without_noise"]["value"] != clean


def test_equal_time_reports_bits_per_code_of_all_priors(lines, trained):
    """In a second or two the priors learn little more than the frequencies of the 16 codes."""
    printed, sentence = lines(equal_time, "--run", trained.run, "--minutes", 0.02, "--device", "cpu")
    assert printed.keys() == {f"equal_time_bits_{name}" for name in ("ours", "reference", "public")}
    for line in printed.values():
        assert math.log2(16) - 1.5 < line["value"] < math.log2(16) + 0.1
        assert line["updates"] >= 1
        assert line["split"] == "test"
        assert f"after {line['updates']}" in sentence


def test_nats_per_code_equals_the_nll_of_our_prior():
    prior = GatedPixelCNN(PriorConfig(grid=(4, 3), codebook_size=7, channels=8, head_channels=8)).eval()
    codes, positions = torch.randint(7, (5, 4, 3)), torch.rand(5)
    assert nats_per_code(prior(codes, positions), codes).item() == pytest.approx(prior.nll(codes, positions).item())


def test_slow_and_fast_priors_get_equal_time():
    class Clocked:
        def __init__(self, cost, batch):
            self.batch, self.cost, self.seconds, self.updates, self.validation_bits, self.shares = (
                batch,
                cost,
                0.0,
                0,
                [],
                [],
            )

        def train_update(self, codes, positions, share):
            assert len(codes) == len(positions) == self.batch
            self.shares.append(share)
            self.seconds, self.updates = self.seconds + self.cost, self.updates + 1

        def validate(self, codes, positions):
            assert len(codes) == len(positions) == 3
            self.validation_bits.append(self.seconds)

    fast, slow = contenders = [Clocked(1 / 64, 8), Clocked(1 / 16, 32)]
    equal_time.train_in_turns(contenders, (torch.zeros(40),) * 2, (torch.zeros(3),) * 2, 5.0, seed=0)
    assert (fast.updates, slow.updates) == (320, 80)
    for one in contenders:
        assert one.validation_bits == pytest.approx([0.5 * (n + 1) for n in range(equal_time.VALIDATIONS)])
        assert one.shares == pytest.approx([n / one.updates for n in range(one.updates)])


@pytest.mark.parametrize("max_norm, moved", [(None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_optimiser_step_clips_the_gradient_norm(max_norm, moved):
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    peers.optimiser_step(torch.optim.SGD(weights, lr=1.0), [-3 * weights[0], -4 * weights[1]], max_norm)
    assert [weight.item() for weight in weights] == pytest.approx(moved)


def blurred_noise(count):
    """Smooth random slices (count, 1, 32, 16) in about [-1, 1]."""
    return 3 * torch.nn.functional.avg_pool2d(torch.randn(count, 1, 36, 20), 5, stride=1)


def test_networks_tell_different_distributions_apart_and_equal_ones_not(monkeypatch):
    """By Hoeffding's inequality, 200 trials of mean 1/2 deviate by more than 0.16 with a probability of 7e-5. With 30
    slices in one set and 100 in the other, 30 of each are tested."""
    monkeypatch.setattr(network_c2st, "UPDATES", 60)
    torch.manual_seed(0)
    slices = blurred_noise(200)
    correct, trials = network_c2st.network_c2st(slices[:100], range(100), slices[100:], range(100))
    assert trials == 200
    assert abs(correct / trials - 0.5) < 0.16
    changed = slices[:100] + 0.3 * torch.randn(100, 1, 32, 16)
    correct, trials = network_c2st.network_c2st(changed, range(100), slices[100:130], ["a"] * 10 + ["b"] * 20)
    assert trials == 2 * 30
    assert correct >= 57


@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"), [(5, 10, 0.2366, 0.7634), (0, 10, 0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval_equals_published_values(correct, trials, low, high):
    """Newcombe 1998, Stat. Med. 17:857, table I, method 3."""
    assert network_c2st.wilson_interval(correct, trials) == pytest.approx((low, high), abs=1e-4)


def test_network_c2st_reports_all_comparisons(lines, trained, monkeypatch):
    monkeypatch.setattr(network_c2st, "UPDATES", 2)
    monkeypatch.setattr(network_c2st, "CLASSIFIERS_PER_FOLD", 1)
    printed, sentence = lines(network_c2st, "--run", trained.run, "--num", 4, "--device", "cpu")
    assert list(printed) == [f"network_c2st_{of}" for of in ("samples", "decoder_alone", "prior_alone", "baseline")]
    for line in printed.values():
        low, high = line["interval"]
        assert low <= line["value"] <= high
    assert f"{printed['network_c2st_samples']['value']:.2f}" in sentence


def test_new_patients_are_those_that_the_loader_reads(tmp_path, cache):
    phantom.write_phantom(tmp_path / "data", cases=(1, 1, 1), size=(64, 32), workers=1)
    train = load_dataset(str(tmp_path / "data"), None, (8, 8), 0).train
    drawn = new_patients.draw_patients(range(1, 2), (64, 32), Reading())
    numbers = new_patients.slice_numbers(1)
    assert drawn[0].equal(train.batch(numbers))
    assert train.positions[numbers] == pytest.approx(new_patients.POSITIONS[numbers].numpy())


def test_new_patients_are_compared_and_attacked_beside_training_patients(lines, trained, monkeypatch):
    count, attacked = 4, 3  # there are three training patients
    monkeypatch.setattr(new_patients, "data_options", lambda *_: SimpleNamespace(on_phantom=True))
    printed, sentence = lines(new_patients, "--run", trained.run, "--num", count, "--device", "cpu")
    for name in ("samples", "perfect"):
        accuracy, p_value, duplicates = (
            printed[f"new_patients_{metric}_{name}"] for metric in ("c2st", "c2st_p_value", "duplicates")
        )
        assert accuracy["patients"] == count
        assert len(accuracy["sets"]) == len(p_value["sets"]) == len(duplicates["sets"]) == new_patients.SETS
        assert accuracy["value"] == pytest.approx(sum(accuracy["sets"]) / new_patients.SETS, abs=1e-4)
        assert f"{accuracy['value']:.2f}" in sentence
    aucs = {name: line for name, line in printed.items() if "auc" in name}
    assert {"new_patients_auc_likelihood", "new_patients_auc_guide", "new_patients_auc_refiner"} <= aucs.keys()
    for line in aucs.values():
        assert (line["patients"], line["slices"]) == (attacked, attacked * new_patients.SLICES)
        assert line["interval"] == [0, 1]  # of so few patients
    assert f"AUC {max(line['value'] for line in aucs.values()):.2f} (" in sentence
    found = printed["new_patients_found_likelihood"]
    assert 0 <= found["value"] <= 1
    assert found["chance"] == pytest.approx(1 / (attacked * new_patients.SLICES + 1))


def test_patients_can_only_be_drawn_for_runs_on_the_phantom(trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["new_patients.py", "--run", str(trained.run), "--device", "cpu"])
    with pytest.raises(RunError, match="was not trained on the embedded phantom"):
        new_patients.main()


def test_reconstructions_of_new_patients_share_no_noise(trained, monkeypatch):
    """All sets have sample ids of their own: equal noise would make reconstructions alike."""
    drawn = []

    def refine(options, networks, ids, codes, device):
        drawn.extend(ids)
        return torch.zeros(len(codes), 1, 64, 32)

    monkeypatch.setattr(new_patients, "refine", refine)
    monkeypatch.setattr(new_patients, "encode", lambda vqvae, slices: slices)
    monkeypatch.setattr(
        new_patients, "draw_samples", lambda *given: Samples(torch.zeros(2, 1, 64, 32), *[torch.zeros(2)] * 2, (0, 0))
    )
    monkeypatch.setattr(new_patients, "draw_positions", lambda *given: torch.zeros(2))
    config = SimpleNamespace(positions=None)
    train = load_dataset(str(trained.data), None, (8, 8), 0).train
    new = torch.rand(2 * (1 + new_patients.SETS), new_patients.SLICES, 1, 64, 32)
    new_patients.compare(SimpleNamespace(vqvae=None), train, new, config, SimpleNamespace(seed=0))
    assert len(drawn) == len(set(drawn)) == 2 + 2 * new_patients.SLICES + 2 * new_patients.SETS


@pytest.mark.slow
def test_whole_commands_are_timed(trained, monkeypatch, capsys):
    given = ["--run", str(trained.run), "--nums", "2", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["commands.py", *given])
    monkeypatch.setenv("PROSTATEVQ_CACHE", "")  # main changes it: it is restored
    commands.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sampling = "predict.py --num 2"
    helps = [f"{name}.py --help" for name in ("train", "predict", "evaluate")]
    assert [line["name"] for line in lines] == [*helps, sampling, f"{sampling}, peak memory"]
    *seconds, peak = (line["value"] for line in lines)
    assert all(0.1 < value < 600 for value in seconds)
    assert 100 < peak < 4000


def test_a_command_that_fails_ends_the_benchmark(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as raised:
        commands.run_command("predict.py", "--run", tmp_path / "none")
    assert raised.value.returncode == 2
    assert "error:" in raised.value.stderr


def test_processes_report_the_seconds_of_updates(slices_folder, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SIZE", (64, 32))
    scaling.measure(str(slices_folder), "cpu", 1)
    found = json.loads(capsys.readouterr().out)
    for stage in ("vqvae", "prior", "refiner"):
        assert found[f"{stage}_update"] > 0
        assert found[f"{stage}_exchange"] == 0  # one process has nobody to exchange with
    assert "CPU cores" in found["machine"]


def test_scaling_reports_medians_for_each_number_of_processes(monkeypatch, capsys):
    """Three rounds in which one process needs 3, 1 and 2 seconds, and two processes half of that."""
    monkeypatch.setattr(sys, "argv", ["scaling", "--processes", "1", "2"])
    monkeypatch.setattr(scaling.phantom, "write_phantom", lambda *_, **__: None)
    seconds = iter([3, 1.5, 1, 0.5, 2, 1])
    monkeypatch.setattr(scaling, "run", lambda *_: {"machine": "a machine", "prior_update": next(seconds)})
    scaling.main()
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [("prior_update_seconds", 1, 2), ("prior_update_seconds", 2, 1)]
    assert [(line["name"], line["processes"], line["value"]) for line in printed] == expected


def test_table_has_every_row_and_the_alternatives_that_were_measured(monkeypatch, tmp_path, capsys):
    def run_benchmark(script):
        for name in sorted(names_of(script)):
            unit = "times" if name.endswith("speedup") else "s"
            yield {"name": name, "value": 1234.4 if "1000" in name else 0.5, "unit": unit, "machine": "a machine"}
        if script == "training.py":
            yield {"name": "vqvae_update_seconds_reference", "value": 2.25, "unit": "s"}

    monkeypatch.setattr(table, "run_benchmark", run_benchmark)
    monkeypatch.setattr(sys, "argv", ["table.py", "--out", str(tmp_path / "runs" / "bench.md")])
    table.main()
    heading, _, *rows = (tmp_path / "runs" / "bench.md").read_text().splitlines()
    assert heading.startswith("a machine, PyTorch 2")
    assert len(rows) == 2 + sum(map(len, table.ROWS.values()))
    assert {row.count("|") for row in rows} == {5}
    assert rows[2] == "| `predict.py --num 1000`, files written; peak memory | 1234 s, 1234 s |  |  |"
    assert "| one update of the VQ-VAE | 0.5 s | 2.25 s (textbook) | 0.5 |" in rows
    printed = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {name for script in table.ROWS for name in names_of(script)} < set(printed)


def test_growth_is_measured_and_drawn(monkeypatch, tmp_path, capsys):
    """With commands that take 2 s and 0.1 s a sample, and networks of the full preset on tiny slices."""
    monkeypatch.setattr(growth, "LINKS", (60, 80))
    monkeypatch.setattr(growth, "SIZES", ((32, 16), (64, 32)))
    monkeypatch.setattr(growth, "SAMPLES", 2)
    monkeypatch.setattr(growth, "train_briefly", lambda folder, device: folder)
    monkeypatch.setattr(growth, "sample", lambda run, num, device: (2 + 0.1 * num, 500))
    monkeypatch.setenv("PROSTATEVQ_CACHE", "")  # main changes it: it is restored
    figure = tmp_path / "growth.png"
    given = ["--nums", "10", "100", "--rounds", "1", "--device", "cpu", "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["growth.py", *given])
    growth.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    per_sample = {line["samples"]: line["value"] for line in lines if line["name"] == "predict_seconds_per_sample"}
    assert per_sample == {10: 0.3, 100: 0.12}
    for stage in ("vqvae", "prior", "refiner"):
        updates = [line for line in lines if line["name"] == f"{stage}_update_seconds"]
        assert [line.get("slices") for line in updates] == [60, 80, None, None]
        assert [line["slice_size"] for line in updates] == [[32, 32], [32, 32], [32, 16], [64, 32]]
        assert all(0 < line["value"] < 60 for line in updates)
    sizes = [line["slice_size"] for line in lines if line["name"] == "seconds_per_sample"]
    assert sizes == [[32, 16], [64, 32]]
    assert figure.read_bytes().startswith(b"\x89PNG")
