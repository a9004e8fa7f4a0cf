"""Small NIfTI files for the tests of dataset.py, files.py and nifti.py."""

import os
import zlib

import nibabel as nib
import numpy as np
import pytest

import decoding
from dataset import DataError, denormalize

AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.9, 0, 20], [0, 0, 3, 5], [0, 0, 0, 1.0]])


def picture(seed, shape=(8, 6)):
    """Return random pixels, float32 in [0, 100)."""
    return (np.random.default_rng(seed).random(shape) * 100).astype(np.float32)


def write(path, image=None, affine=AFFINE, kind=nib.Nifti1Image):
    """Write a slice, by default one that differs with its name, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = picture(zlib.crc32(os.fsencode(f"{path.parent.name}/{path.name}")))
    nib.save(kind(image, affine), path)
    return path


def write_volume(path, seed=0, shape=(8, 6, 5), affine=AFFINE, codes="RAS", kind=nib.Nifti1Image):
    """Write a volume of random voxels, stored in another order of axes than that of `shape`, and return its image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    turned = nib.Nifti1Image(picture(seed, shape), affine).as_reoriented(turn)
    stored = kind(np.asarray(turned.dataobj), turned.affine)
    nib.save(stored, path)
    return stored


def write_cases(folder, cases, slices=2, week=0, **options):
    """Write slices numbered from 0 for each case of one week."""
    for case in cases:
        for number in range(slices):
            write(folder / f"case_{case:03}_week_{week}_slice_{number}.nii", **options)


def write_splits(folder):
    """Write three training volumes, one for validation and one for testing."""
    for split, cases in (("train", (4, 5, 6)), ("validate", (36,)), ("test", (40,))):
        write_cases(folder / f"keras_slices_{split}", cases)


def cases_of(slices):
    """Return the cases that the file names begin with."""
    return {name.rpartition("/")[2][:8] for name in slices.names}


def values_of(slices):
    """Return the slices in the data's units."""
    return denormalize(slices.batch(range(len(slices)))[:, 0], slices.scales[:, None, None])


def volumes_of(slices):
    """Group the names of slices by scale, which tells volumes apart where their images differ."""
    names = {}
    for name, scale in zip(slices.names, slices.scales):
        names.setdefault(scale, set()).add(name)
    return sorted(map(sorted, names.values()))


def has_notice(loaded, *words):
    """Tell whether one of the notices contains all words."""
    return any(all(word in notice for word in words) for notice in loaded.notices)


def message(call, *arguments, **options):
    """Return the message of the DataError that a call raises."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def entries(cache):
    """Return what the cache contains, except its lock and listings."""
    return [path for path in cache.iterdir() if not path.name.startswith((".lock", "listing-"))]


def forbid_decoding(monkeypatch):
    """Make reading the pixels of a file fail."""

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "read_file", fail)


def changed(path, **fields):
    """Write a valid slice except for the given header fields."""
    write(path, picture(1))
    raw = path.read_bytes()
    header = nib.Nifti1Header(raw[:348], check=False)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.binaryblock + raw[348:])
    return path


def big_endian(image, affine):
    """Make a big-endian NIfTI image."""
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(image.dtype.newbyteorder(">"))
    return nib.Nifti1Image(image, affine, header)
