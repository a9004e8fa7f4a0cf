"""samples.py: the folder of samples in each format, filled in batches, in parts and again, without networks."""

import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import samples
from config import Intensity
from console import RunError
from samples import FORMATS, open_folder

SETTINGS = {"seed": 0}


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(samples, "SHARD", 4)


@pytest.fixture
def config(run_config):
    """A run whose black is -100 and whose white is 700."""
    intensity = Intensity(percentile=None, scale=700.0, low=-100.0)
    return run_config(downsampling=4).model_copy(update={"intensity": intensity})


def sample(n):
    """Slice, codes and position of sample n."""
    rng = np.random.default_rng(n)
    position = np.float32(np.nan if n % 3 == 0 else rng.random())
    return np.tanh(rng.normal(0, 1, (64, 32))).astype(np.float32), rng.integers(0, 999, (16, 8)), position


def fill(folder, config, ending, numbers, shared=False, batch=3, settings=SETTINGS):
    """Write the missing samples, and return their numbers."""
    opened = open_folder(ending, folder, numbers, shared, settings, config)
    missing = opened.missing()
    for start in range(0, len(missing), batch):
        ids = missing[start : start + batch]
        for write in opened.add(ids, *map(np.stack, zip(*map(sample, ids)))):
            write()
    return missing


def content(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def opened_and_drawn(ending, folder, config, numbers, shared, settings):
    """A folder that was opened, and a call that adds its samples."""
    opened = open_folder(ending, folder, numbers, shared, settings, config)

    def add():
        return opened.add(numbers, *map(np.stack, zip(*map(sample, numbers))))

    return opened, add


@pytest.mark.parametrize("ending", FORMATS)
def test_parts_that_begin_together_fill_one_folder(tmp_path, config, ending):
    """Each has drawn its first batch before any has written: the settings are the same for all."""
    parts = [opened_and_drawn(ending, tmp_path, config, range(n, n + 4), True, SETTINGS) for n in (0, 4, 8)]
    for _, add in parts:
        for write in add():
            write()
    assert open_folder(ending, tmp_path, range(4, 8), True, SETTINGS, config).missing() == []
    _, add = opened_and_drawn(ending, tmp_path, config, range(12, 16), True, {"seed": 1})
    with pytest.raises(RunError, match="holds samples of other settings"):
        add()


@pytest.mark.parametrize("ending", FORMATS)
def test_two_calls_with_other_settings_do_not_mix_their_samples(tmp_path, config, ending):
    """The second one replaces the samples of the first, which stops before it writes another."""
    (_, first), (_, second) = (
        opened_and_drawn(ending, tmp_path, config, range(4), False, {"seed": seed}) for seed in (0, 1)
    )
    *done, late = first()
    for write in done:
        write()
    for write in second():
        write()
    expected = content(tmp_path)
    with pytest.raises(RunError, match="is now filled with samples of other settings"):
        late()
    assert content(tmp_path) == expected
    assert open_folder(ending, tmp_path, range(4), False, {"seed": 1}, config).missing() == []


@pytest.mark.parametrize("ending", ["nii.gz", "png"])
def test_a_damaged_sample_is_named(tmp_path, config, ending):
    fill(tmp_path, config, ending, range(3))
    damaged = tmp_path / f"sample_000001.{ending}"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(RunError, match=rf"sample_000001\.{ending} .*: remove it, and run the same command again"):
        open_folder(ending, tmp_path, range(3), False, SETTINGS, config).read(range(3))


@pytest.mark.parametrize("ending", FORMATS)
def test_samples_read_back(tmp_path, config, ending):
    assert fill(tmp_path, config, ending, range(10)) == list(range(10))
    opened = open_folder(ending, tmp_path, range(10), False, SETTINGS, config)
    assert opened.missing() == []
    expected = np.stack([sample(n)[0] for n in range(10)])
    np.testing.assert_allclose(opened.read(range(10)), expected, atol=1e-4)
    np.testing.assert_allclose(opened.read([2, 7]), expected[[2, 7]], atol=1e-4)


def test_nifti_has_the_units_and_the_affine_of_the_data(tmp_path, config):
    fill(tmp_path, config, "nii.gz", range(2))
    image = nib.load(tmp_path / "sample_000001.nii.gz")
    np.testing.assert_allclose(image.get_fdata()[..., 0], (sample(1)[0] + 1) / 2 * 800 - 100, atol=1e-2)
    np.testing.assert_allclose(image.affine, config.affine)
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), [sample(n)[1] for n in range(2)])


def test_png_has_16_bits_and_is_shown_as_figures_show_slices(tmp_path, config):
    fill(tmp_path, config, "png", range(2))
    assert sorted(content(tmp_path)) == ["codes.npy", "sample_000000.png", "sample_000001.png", "samples.json"]
    with Image.open(tmp_path / "sample_000001.png") as picture:
        assert picture.mode == "I;16" and picture.size == (64, 32)
        grey = np.asarray(picture)
    np.testing.assert_allclose(grey, (sample(1)[0].T + 1) / 2 * 65535, atol=1)


def test_shards_hold_slices_codes_positions_and_numbers(tmp_path, config):
    fill(tmp_path, config, "npz", range(10))
    assert sorted(content(tmp_path)) == ["samples.json", *(f"samples_{n:06d}.npz" for n in (0, 4, 8))]
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        slices, codes, positions = (np.stack(part) for part in zip(*map(sample, range(start, stop))))
        with np.load(tmp_path / f"samples_{start:06d}.npz") as arrays:
            assert sorted(arrays) == ["codes", "numbers", "positions", "slices"]
            assert [arrays[name].dtype for name in sorted(arrays)] == [np.uint16, np.int64, np.float32, np.float32]
            np.testing.assert_allclose(arrays["slices"], (slices + 1) / 2 * 800 - 100, atol=1e-2)
            np.testing.assert_array_equal(arrays["codes"], codes)
            np.testing.assert_array_equal(arrays["positions"], positions)
            assert arrays["numbers"].tolist() == list(range(start, stop))


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_files_do_not_depend_on_batches_or_parts(tmp_path, config, ending, batch):
    fill(tmp_path / "whole", config, ending, range(11))
    for first, stop in ((8, 11), (0, 8)):
        fill(tmp_path / "parts", config, ending, range(first, stop), shared=True, batch=batch)
    pattern = "sample*"
    assert content(tmp_path / "parts", pattern) == content(tmp_path / "whole", pattern)
    assert len(content(tmp_path / "whole", pattern)) == {"npz": 3}.get(ending, 11) + 1


@pytest.mark.parametrize("ending", FORMATS)
def test_missing_damaged_and_further_samples_are_drawn(tmp_path, config, ending):
    fill(tmp_path, config, ending, range(6))
    before = content(tmp_path)
    (tmp_path / ("samples_000000.npz" if ending == "npz" else f"sample_000002.{ending}")).unlink()
    assert fill(tmp_path, config, ending, range(6)) == ([0, 1, 2, 3] if ending == "npz" else [2])
    assert content(tmp_path) == before
    assert fill(tmp_path, config, ending, range(2)) == []
    further = fill(tmp_path, config, ending, range(9))
    assert further == ([4, 5, 6, 7, 8] if ending == "npz" else [6, 7, 8])  # shards are drawn as a whole
    fill(tmp_path / "other", config, ending, range(9))
    assert content(tmp_path, "sample*.*") == content(tmp_path / "other", "sample*.*")


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_damaged_shards_are_drawn_again(tmp_path, config, damage):
    fill(tmp_path, config, "npz", range(8))
    before, path = content(tmp_path), tmp_path / "samples_000004.npz"
    path.write_bytes(before[path.name][:700] if damage is None else damage)
    assert fill(tmp_path, config, "npz", range(8)) == [4, 5, 6, 7]
    assert content(tmp_path) == before


def test_formats_stay_beside_each_other_and_other_settings_replace_all(tmp_path, config, capsys):
    for ending in FORMATS:
        assert fill(tmp_path, config, ending, range(5)) == list(range(5))
    assert len(content(tmp_path)) == 5 + 5 + 2 + 2
    assert capsys.readouterr().out == ""
    (tmp_path / "samples_000000.npz.0a1b2c3d.part").touch()  # of a killed process
    (tmp_path / "sample.png").touch()
    with pytest.raises(RunError, match="samples of other settings"):
        fill(tmp_path, config, "npz", range(4, 8), shared=True, settings={"seed": 1})
    fill(tmp_path, config, "png", range(1), settings={"seed": 1})
    assert sorted(content(tmp_path)) == ["codes.npy", "sample.png", "sample_000000.png", "samples.json"]
    assert "held 15 files of an earlier call: replaced" in capsys.readouterr().out


def test_a_part_begins_with_a_shard(tmp_path, config):
    with pytest.raises(RunError, match="--first 6 begins within a shard: --format npz needs a multiple of 4"):
        open_folder("npz", tmp_path, range(6, 9), True, SETTINGS, config)


@pytest.mark.parametrize("ending", FORMATS)
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, config, ending):
    peaks = []
    for count in (40, 200):
        tracemalloc.start()
        fill(tmp_path / str(count), config, ending, range(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000  # bytes; 160 more slices have 1.3 million
