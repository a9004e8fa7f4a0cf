"""Assign slices to training, validation and test: by a table, by the names of folders, or by case."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from containers import read_image
from files import (
    Reading,
    SliceFile,
    abbreviate,
    assign_volumes,
    counted,
    file_name,
    find_volumes,
    likely_split_of,
    name_notices,
    read_table,
    refuse_files,
    search_folder,
    sort_key,
    split_of,
    splits_of_folders,
)
from nifti import DataError

SPLITS = ("train", "validate", "test")
SPLIT_TITLES = {"train": "training", "validate": "validation", "test": "test"}


class FoundData(NamedTuple):
    """What a data folder contains, before its pixels are read."""

    folder: Path  # of the splits, or of the slices
    files: list[SliceFile]  # sorted by split
    notices: list[str]
    times: dict[str, int]  # modification time in ns of each folder that was searched


def find_data(folder: Path, seed: int, workers: int, reading: Reading) -> FoundData:
    """Find the slices of a folder and assign them to splits, as `load_dataset` does."""
    if not os.path.exists(folder):
        raise DataError(f"no such folder: {folder}")
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is a file: give the folder that contains the slices")
    notices: list[str] = []
    times: dict[str, int] = {}
    if reading.table:
        files = read_table(reading.table, folder)
        times = {place: os.stat(place).st_mtime_ns for place in {os.path.dirname(file.path) or "." for file in files}}
    else:
        folder, files, notices = search_folder(folder, reading.pattern, times)
    files = assign_volumes(find_volumes(files, reading, workers))
    files, more = assign_splits(sorted(files, key=sort_key), folder, seed)
    return FoundData(folder, files, more + notices + name_notices(files), times)


def assign_splits(files: list[SliceFile], folder: Path, seed: int) -> tuple[list[SliceFile], list[str]]:
    """Assign files to splits: as a table says, by folder where folders are named like splits, or else by case.

    Returns:
        The files, sorted by split, and notices on how they were split.
    """
    folders = {} if any(file.split for file in files) else splits_of_folders([file.name for file in files])
    split_of_file = [file.split or folders.get(file.name.partition("/")[0]) for file in files]
    inside = [file._replace(split=split) for file, split in zip(files, split_of_file) if split]
    notices = [] if inside and not folders else split_folder_notices(inside or files, folders)
    if not inside:
        drawn, more = split_by_case(files, SPLITS, seed)
        return drawn, notices + more
    if len(inside) < len(files):
        outside = len({file.path for file in files} - {file.path for file in inside})
        notices.append(f"ignored {counted(outside, 'file')} outside the split folders of {folder}")
    splits = {split: [file for file in inside if file.split == split] for split in SPLITS}
    if not splits["train"]:
        likely = sorted(
            top for top in {file.name.partition("/")[0] for file in files} if likely_split_of(top) == "train"
        )
        hint = f"; is it {likely[0]}? name it train" if likely else ""
        raise DataError(f"no training slices in {folder}: put them into keras_slices_train or train{hint}")
    if not splits["validate"]:
        drawn, more = split_by_case(splits["train"], SPLITS[:2], seed)
        splits |= {split: [file for file in drawn if file.split == split] for split in SPLITS[:2]}
        notices += ["no validation slices: some of the training slices are used for validation", *more]
    for one, other in combinations(SPLITS, 2):
        shared = {file.case for file in splits[one] if file.case} & {file.case for file in splits[other]}
        if shared:
            listed = abbreviate(sorted(shared), 10)
            notices.append(f"warning: data leak between splits: {one} and {other} share {listed}")
    return [file for split in SPLITS for file in splits[split]], notices


def split_by_case(files: list[SliceFile], parts: Sequence[str], seed: int) -> tuple[list[SliceFile], list[str]]:
    """Draw whole cases for validation and test, about 5 % each, or single files where names give no case.

    Returns:
        The files, sorted by split, and notices on how they were split.
    """
    notices = []
    groups = [file.case or file.name for file in files]
    unnamed = sum(file.case is None for file in files)
    if unnamed:
        notices.append(f"warning: {counted(unnamed, 'file name')} without a case: a patient may be in several splits")
    elif len(set(groups)) == 1:
        notices.append(f"warning: all slices are of {groups[0]}: every split contains the same patient")
        groups = [file_name(file) for file in files]
        groups = groups if len(set(groups)) > 1 else [file.name for file in files]
    names = sorted(set(groups))
    if len(names) < 2:
        try:
            read_image(files[0].path, files[0].size, files[0].mtime_ns)
        except DataError as error:
            refuse_files([(files[0].name, str(error))], 1)
        raise DataError(f"only one slice, {files[0].name}: training and validation need at least one each")
    order = np.random.default_rng(seed).permutation(len(names))
    share = max(1, round(0.05 * len(names)))
    drawn: dict[str, str] = {}
    for number, part in enumerate(parts[1:]):
        if len(names) >= number + 2:
            drawn.update((names[i], part) for i in order[number * share : (number + 1) * share])
    assigned = [file._replace(split=drawn.get(group, "train")) for file, group in zip(files, groups)]
    assigned.sort(key=lambda file: SPLITS.index(file.split))
    counts = Counter(file.split for file in assigned)
    listed = ", ".join(f"{counts[part]} {part}" for part in parts)
    return assigned, [*notices, f"split by {'file' if notices else 'case'} with seed {seed}: {listed} slices"]


def split_folder_notices(files: list[SliceFile], used: dict[str, str]) -> list[str]:
    """Report folders used as splits with names that only resemble one, and folders named like splits but not used."""
    guessed = sorted(f"{folder} as {split}" for folder, split in used.items() if not split_of(folder))
    notices = [f"splits by the names of folders: {abbreviate(guessed, 4)}"] if guessed else []
    unused = set()
    for folders in {tuple(file.name.split("/")[:-1]) for file in files}:
        unused |= {
            "/".join(folders[: depth + 1])
            for depth, folder in enumerate(folders)
            if likely_split_of(folder) not in (None, used.get(folders[0]))
        }
    if unused:
        listed = abbreviate(sorted(unused), 4)
        advice = "point --data at the folder that contains the splits, or name them train, validate and test"
        notices.append(f"warning: folders named like splits are not used as splits ({listed}): {advice}")
    return notices
