"""Helpers for tests of complete trainings: command lines, the log, stops at given updates, comparison of runs."""

import json
import os

import torch
from safetensors.torch import load_file

import trainer
from checkpoints import CheckpointHeader, load_tensors

WEIGHTS = ("vqvae.safetensors", "prior.safetensors", "guide.safetensors", "refiner.safetensors")
UPDATES = {"vqvae": 12, "prior": 9, "refiner": 6}  # of the tiny preset


def arguments(**options):
    texts = []
    for name, value in options.items():
        texts += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return texts


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def select(lines, stage, split):
    return [line for line in lines if (line["stage"], line["split"]) == (stage, split)]


def checkpoint_header(run):
    return load_tensors(run / "checkpoint.safetensors", CheckpointHeader)[0]


def same_weights(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def assert_same_run(run, other):
    for name in WEIGHTS:
        here, there = load_file(run / name), load_file(other / name)
        assert here.keys() == there.keys()
        for key in here:
            assert torch.equal(here[key], there[key]), key
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def at_updates(monkeypatch, hooks):
    """Call each hook once, at the start of its (stage, update)."""
    real = trainer.seed_update

    def seed_update(seed, stage, update):
        real(seed, stage, update)
        if (stage, update) in hooks:
            hooks.pop((stage, update))()

    monkeypatch.setattr(trainer, "seed_update", seed_update)


def send(kind):
    return lambda: os.kill(os.getpid(), kind)
