"""weights/phantom: the committed weights load, sample as when they were committed, and fit their options.

The reference is two samples, written by

    python predict.py --run weights/phantom --num 2 --batch-size 2 --device cpu --out weights/phantom/reference
"""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from trainings import WEIGHTS, arguments

import predict
from checkpoints import read_config
from config import network_config
from modules import PriorConfig, VQVAEConfig
from refiner import RefinerConfig

RUN = ROOT / "weights" / "phantom"
REFERENCE = RUN / "reference"
MOST_BYTES = 8e6
TOLERANCE = 0.005  # root mean square difference of slices in [-1, 1]: refining in bfloat16 takes 0.001

pytestmark = pytest.mark.skipif(not (RUN / "config.json").exists(), reason="there are no weights in weights/phantom")


def slices_of(folder):
    """Samples (N, H, W) in [-1, 1]."""
    images = [nib.load(path).get_fdata() for path in sorted(folder.glob("sample_*.nii.gz"))]
    return np.stack(images) / read_config(RUN).intensity.scale * 2 - 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    given = {"run": RUN, "num": 2, "batch_size": 2, "device": "cpu", "out": folder, "images": folder}
    predict.main(arguments(**given))
    torch.set_num_threads(threads)
    return folder


def test_the_weights_are_a_small_export_with_a_complete_card():
    files = [path for path in RUN.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"README.md", "config.json", *WEIGHTS} - {"guide.safetensors"}
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    card = (RUN / "README.md").read_text(encoding="utf-8")
    assert "license: mit\n" in card and "| command | python train.py --preset " in card
    assert "NAME OF THE RUN" not in card
    assert not re.search(r"(?<!\*)\*[^*\n]", card), "a question of the card is not answered"
    assert read_config(RUN).options.on_phantom


def test_the_networks_fit_the_options():
    """So that a training with these options can start from them."""
    config, device = read_config(RUN), torch.device("cpu")
    vqvae, prior, guide, refiner = predict.load_networks(RUN, config, device)
    assert guide is None
    options = config.options
    grid = {"grid": tuple(side // options.downsampling for side in config.slice_size)}
    codes = {name: getattr(options, name) for name in ("downsampling", "codebook_size")}
    placed = grid | {"codebook_size": options.codebook_size, "left_right": prior.config.left_right}
    assert vqvae.config == network_config(VQVAEConfig, options)
    assert prior.config == network_config(PriorConfig, options, "prior_", **placed)
    assert refiner.config == network_config(RefinerConfig, options, "refiner_", **codes)


def test_the_weights_give_the_reference_samples(drawn):
    """Rounding on another processor may draw another code, after which the rest of a sample differs: so one may."""
    settings, expected = (json.loads((folder / "samples.json").read_text()) for folder in (drawn, REFERENCE))
    for own in (settings, expected):
        del own["torch"]
    assert settings == expected, "the reference is of other weights: write it again"
    codes, references = (np.load(folder / "codes.npy") for folder in (drawn, REFERENCE))
    same = (codes == references).all((1, 2))
    assert same.any()
    differences = np.square(slices_of(drawn) - slices_of(REFERENCE))[same]
    assert np.sqrt(differences.mean((1, 2))).max() < TOLERANCE
    assert slices_of(REFERENCE).std() > 0.1
