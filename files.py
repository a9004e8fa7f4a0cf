"""Find the slices of a data folder, and read case, week, slice number, volume and split from their names.

Names of slices are relative to the data folder, with forward slashes. A pattern or a table of the user's may replace
what names are taken to say.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np

from containers import DICOM, ENDINGS, KINDS, PICTURES, parts_of, read_grid, without_ending
from geometry import resampled_size
from nifti import MAX_SIDE, DataError, describe_stats, open_regular
from volumes import affine_of_slices, plan_stack
from workers import map_threads

# Limits on a data folder, whoever made it. They bound memory and time.
MAX_FILES = 1_000_000  # slices per folder: HipMRI has 12,660; records of a million take a gigabyte
MAX_TABLE_BYTES = 1 << 28
MAX_FOLDERS = 100_000  # below the data folder: where there are more, a link may lead out of it, even to /

SPLIT_WORDS = {
    "train": ("train", "training", "tr", "imagestr"),
    "validate": ("validate", "validation", "valid", "val", "dev", "imagesval"),
    "test": ("test", "testing", "ts", "imagests"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
BESIDE_SPLIT = re.compile("keras|slices?|images?|imgs?|data|(data)?set|splits?|2d|mri?|t2w?|nii|nifti|hip(mri)?")
LABEL_WORD = re.compile(
    "labels?|labelmaps?|labels(tr|ts|val)|(prob)?masks?|(d|prob)?segs?|segmentations?|annotations?|contours?|delineations?"
    "|gt|groundtruth"
)
IMAGE_WORDS = {"mr", "mrs", "image", "images", "img"}  # beside "semantic": HipMRI's images are in semantic_MRs_anon

# A word starts where no letter precedes it, or at a capital after a small letter. Digits may follow directly.
START, SPACE, OTHERS = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))", r"[-_ .]*", "(?i:week|session|ses|visit|slice)"
CASE = re.compile(  # 004, A004 and 004b, up to the next word
    rf"{START}((?i:case|patient|subject|sub))(?:{SPACE}(?=[0-9])|[-_ .]+(?!{OTHERS}))"
    rf"([A-Za-z]*[0-9][0-9A-Za-z]*?)(?={OTHERS}{SPACE}[0-9]|[^0-9A-Za-z]|\Z)"
)
WEEK = re.compile(rf"{START}(?i:week|session|ses|visit){SPACE}([0-9]+)")
NUMBER = re.compile(rf"{START}(?i:slice){SPACE}([0-9]+)")
BIDS_SUBJECT = re.compile(rf"\A(sub)-(?!{OTHERS})([0-9A-Za-z]+)(?=_|\Z)")  # which may be letters alone
DIGITS = re.compile("[0-9]+")


class Identity(NamedTuple):
    """Case, week and slice number as a name gives them; None where it gives none."""

    case: str | None  # the patient, as case_004
    week: int | None
    number: int | None  # of the slice in its volume


class Reading(NamedTuple):
    """How files become slices, as the options of the same names say."""

    axis: int | None = None  # along which volumes are cut, as `volumes.plan_stack` takes it
    pattern: str | None = None  # regular expression with the named groups case and, if wanted, week and slice
    table: Path | None = None  # CSV file with the columns path, case and, if wanted, week, slice and split
    pixel_size: float | None = None  # in mm: slices are resampled to such squares
    crop: str = "centre"  # or "body": what crop and pad keep in the middle
    intensity: str = "percentile"  # or "zscore" or "window": which values become -1 and +1
    window: tuple[float, float] | None = None  # those values, for "window"

    @classmethod
    def of(cls, options: Any) -> Reading:
        """Return what options with attributes of the same names say."""
        return cls(*(getattr(options, name) for name in cls._fields))


class SliceFile(NamedTuple):
    """A slice that was found, before it is read."""

    path: str
    name: str  # below the folder of the splits, or of the slices, with forward slashes
    size: int  # bytes
    mtime_ns: int
    case: str | None
    week: int | None
    number: int | None  # of the slice in its volume
    volume: tuple[str, ...] = ()  # equal for slices that are scaled together
    split: str | None = None
    shape: tuple[int, int] | None = None  # (H, W); None where the header cannot be used
    axis: int | None = None  # of a volume file, along which its slices are stacked
    resampled: tuple[int, int] | None = None  # (H, W) after resampling; None where there is none


# ---------------------------------------------------------------- finding files


def find_slices(root: Path, times: dict[str, int] | None = None) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Find the slices at any depth below a folder, of the first kind of container that it contains.

    Args:
        root: The folder; hidden folders below it are skipped.
        times: As `walk_files` fills it.

    Returns:
        The path and the name of each slice, the names of label maps, and those of other kinds. Names are relative to
        `root`.

    Raises:
        DataError: If two slices get the same name, there are too many, or a folder cannot be read.
    """
    start = len(os.path.join(root, ""))
    kinds: list[dict[str, str]] = [{} for _ in KINDS]  # path by name
    label_maps: list[list[str]] = [[] for _ in KINDS]
    for entry in walk_files(root, times):
        path, name = entry.path, with_forward_slashes(entry.path[start:])
        if not is_slice(name):
            continue
        kind = next(i for i, endings in enumerate(KINDS) if name.lower().endswith(endings))
        if KINDS[kind] == DICOM:  # the folder is the volume
            path, folder = os.path.join(os.path.dirname(path), ""), name.rpartition("/")[0]
            name = f"{folder or os.path.basename(os.path.realpath(root))}.dcm"
        elif name.lower().endswith(".hdr") and not os.path.exists(parts_of(path)[1]):
            continue  # other programs also write .hdr files, but no .img beside them
        if is_label_map(name):
            label_maps[kind].append(name)
        elif kinds[kind].get(name, path) != path:
            both = f"{kinds[kind][name]} and {path}"
            raise DataError(f"{both} have the same name once backslashes are read as slashes: remove one of them")
        else:
            kinds[kind][name] = path
        if sum(map(len, kinds)) + sum(map(len, label_maps)) > MAX_FILES:
            raise DataError(f"{root} contains more than {MAX_FILES} slices, including label maps")
    chosen = next((i for i, found in enumerate(kinds) if found), 0)
    others = sorted(name for found in kinds[chosen + 1 :] for name in found)
    return [(path, name) for name, path in kinds[chosen].items()], sorted(set(label_maps[chosen])), others


def search_folder(folder: Path, pattern: str | None, times: dict[str, int]) -> tuple[Path, list[SliceFile], list[str]]:
    """Return the folder that holds the splits or slices, a record of each file, and notices on those left out.

    `times` are filled as by `walk_files`.
    """
    if os.path.isdir(folder / "keras_slices_data"):
        folder = folder / "keras_slices_data"
    found, label_maps, other_kinds = find_slices(folder, times)
    if not found:
        raise no_slices_error(str(folder), label_maps)
    identities: dict[str, Identity] = {}
    notices = other_kind_notices(other_kinds)
    if found[0][1].lower().endswith(PICTURES):
        assumed = "1 mm is assumed, the front on top, and the patient's left at the right"
        notices.append(f"warning: pictures tell neither the size of a pixel nor the side: {assumed}")
    if pattern:
        found, identities, others = match_names(found, compile_pattern(pattern))
        notices += others
    below = path_to_splits([name for _, name in found])
    found = [(path, name.removeprefix(below)) for path, name in found if name.startswith(below)]
    label_maps = [name.removeprefix(below) for name in label_maps if name.startswith(below)]
    files = describe_files(found, (lambda name: identities[below + name]) if pattern else identify)
    return folder / below, files, notices + label_map_notices(label_maps)


def walk_files(root: Path, times: dict[str, int] | None = None) -> Iterator[os.DirEntry]:
    """Yield everything but folders, at any depth below `root`, except in hidden folders.

    In `times`, the modification time of each folder, in ns, is entered before the folder is read.
    """
    folders, seen = [str(root)], set()
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:  # a link to a folder above would make this loop endless
            continue
        seen.add(os.path.realpath(folder))
        if len(seen) > MAX_FOLDERS:
            raise DataError(f"{root} contains more than {MAX_FOLDERS} folders")
        try:
            if times is not None:
                times[folder] = os.stat(folder).st_mtime_ns
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not is_folder(entry):
                        yield entry
                    elif not entry.name.startswith("."):
                        folders.append(entry.path)
        except OSError as error:
            raise DataError(f"cannot read folder {folder}: {error.strerror}") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def describe_files(found: list[tuple[str, str]], identify_name: Callable[[str], Identity]) -> list[SliceFile]:
    """Make a record of each (path, name), or raise DataError listing those that are not regular files.

    Args:
        found: Paths and names.
        identify_name: Returns what a name says, as `identify` does.
    """
    files, bad = [], []
    for path, name in found:
        try:
            stats = [os.stat(part) for part in parts_of(path)]
        except (OSError, DataError) as error:
            bad.append((name, getattr(error, "strerror", None) or str(error)))
            continue
        if not all(S_ISREG(stat.st_mode) for stat in stats):  # a pipe could block for ever; a device may have no end
            bad.append((name, "not a regular file"))
        elif not all(stat.st_size for stat in stats):
            bad.append((name, "empty"))
        size, mtime_ns = describe_stats(stats)
        files.append(SliceFile(path, name, size, mtime_ns, *identify_name(name)))
    refuse_files(bad, len(found))
    return files


def find_volumes(files: list[SliceFile], reading: Reading, workers: int) -> list[SliceFile]:
    """Read the headers of files; return a record with its shape for each slice, of which a volume has several.

    Args:
        files: As `describe_files` returns them. A bad header is left to the reader of the pixels, which gives reasons.
        reading: How volumes are cut, and slices resampled.
        workers: Threads.

    Raises:
        DataError: If there are too many slices, two get the same name, or one would be resampled to too many pixels, or
            to none.
    """
    grids = map_threads(read_grid, [file.path for file in files], workers)
    found: list[SliceFile] = []
    bad: list[tuple[str, str]] = []
    for file, grid in zip(files, grids):
        if grid is None:
            found.append(file)
        elif len(grid[0]) == 2:
            found.append(with_size(file, (grid[0][0], grid[0][1]), grid[1], reading.pixel_size))
        else:
            found += slices_of_volume(file, *grid, reading)
        if len(found) > MAX_FILES:
            raise DataError(f"{file.name}: with this volume there are more than {MAX_FILES} slices")
        size = found[-1].resampled
        if size and not 1 <= min(size) <= max(size) <= MAX_SIDE:
            made = f"would have {size[0]}x{size[1]} pixels of --pixel-size {reading.pixel_size:g}"
            bad.append((file.name, f"{made}: each side must be 1 to {MAX_SIDE} pixels"))
    refuse_files(bad, len(files))
    if len(found) > len(files):
        refuse_shared_names(found)
    return found


def with_size(file: SliceFile, size: tuple[int, int], affine: np.ndarray, pixel_size: float | None) -> SliceFile:
    """Add the size (H, W) of a slice as stored, and after resampling, to its record."""
    return file._replace(shape=size, resampled=resampled_size(size, affine, pixel_size) if pixel_size else None)


def slices_of_volume(
    file: SliceFile, shape: tuple[int, ...], affine: np.ndarray, reading: Reading
) -> Iterator[SliceFile]:
    """Yield a record for each slice of a volume file, named like a file of its own."""
    stack = plan_stack(shape, affine, reading.axis)
    file = with_size(file, stack.size, affine_of_slices(shape, affine, stack.axis), reading.pixel_size)
    folder, slash, base = file.name.rpartition("/")
    stem = without_ending(base)
    case = file.case or f"{folder}{slash}{stem}"
    volume = (folder, file.case or "", "" if file.week is None else f"{file.week:03}", base)
    for index in range(stack.slices):
        name = f"{folder}{slash}{stem}_slice_{index:03}{base[len(stem) :]}"
        yield file._replace(name=name, case=case, number=index, volume=volume, axis=stack.axis)


def file_name(file: SliceFile) -> str:
    """Return the name of the file that holds a slice, below the same folder as the slice's own name."""
    return file.name if file.axis is None else "/".join(filter(None, (file.volume[0], file.volume[-1])))


def refuse_shared_names(files: list[SliceFile]) -> None:
    """Raise DataError if a slice of a volume is named like another slice."""
    paths: dict[str, str] = {}
    for file in files:
        other = paths.setdefault(file.name, file.path)
        if other != file.path:
            raise DataError(f"{other} and {file.path} both contain a slice called {file.name}: remove one of them")


def refuse_files(bad: list[tuple[str, str]], count: int) -> None:
    """Raise DataError listing the first ten bad files of `count` with their reasons, if there are any."""
    if bad:
        listed = abbreviate([f"{name}: {reason}" for name, reason in sorted(bad)], 10, "; ")
        raise DataError(f"{len(bad)} of {counted(count, 'file')} cannot be used: {listed}")


def no_slices_error(where: str, label_maps: list[str]) -> DataError:
    """Make the error for a place without slices, which mentions the label maps in it."""
    reason = f": no file ends in {' '.join(ENDINGS)}"
    if label_maps:
        ignored = f"{counted(len(label_maps), 'file')} named like label maps ({abbreviate(sorted(label_maps), 1)})"
        reason = f": ignored {ignored}; names above the given folder do not count"
    return DataError(f"no slices or volumes in {where}{reason}")


def other_kind_notices(names: list[str]) -> list[str]:
    """Report the files that were left out because the folder holds files of an earlier one of KINDS."""
    unread = f"{counted(len(names), 'file')} of other kinds not read ({abbreviate(names, 2)})"
    return [f"{unread}: all slices of a folder have one kind of container"] if names else []


def label_map_notices(names: list[str]) -> list[str]:
    """Report the label maps that were left out."""
    return [f"ignored {counted(len(names), 'label map')} ({abbreviate(sorted(names), 1)})"] if names else []


def name_notices(files: list[SliceFile]) -> list[str]:
    """Report cases and slice numbers that names do not give, and slice numbers that occur twice."""
    seen: set[tuple] = set()
    repeated = []
    for file in files:
        if file.number is not None and (file.volume, file.number) in seen:
            repeated.append(file.name)
        seen.add((file.volume, file.number))
    unnamed = sum(file.case is None for file in files)
    alone = {file_name(file) for file in files if file.axis is not None and not file.volume[1]}
    unnumbered = sum(file.case is not None and file.number is None for file in files)
    example = "(expected as in case_004_week_0_slice_12.nii.gz)"
    notices = []
    if repeated:
        numbers = f"{counted(len(repeated), 'repeated slice number')} within one case, week and folder"
        notices.append(f"warning: {numbers} ({abbreviate(repeated, 2)}): all these slices are scaled as one volume")
    if unnamed:
        unknown = "such slices are scaled individually, and their patient and position are unknown"
        notices.append(f"{counted(unnamed, 'file name')} without a case {example}: {unknown}")
    if alone:
        volumes = f"{counted(len(alone), 'volume')} without a case in the name ({abbreviate(sorted(alone), 1)})"
        notices.append(f"{volumes}: each is taken for a patient of its own; --pattern can find patients in paths")
    if unnumbered:
        unknown = "the positions of such slices are unknown"
        notices.append(f"{counted(unnumbered, 'file name')} without a slice number {example}: {unknown}")
    return notices


def abbreviate(items: list[str], most: int, separator: str = ", ") -> str:
    """Join the first items and count the rest, as in "a, b and 3 more"."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + rest


def counted(count: int, noun: str) -> str:
    """Write a number with its noun: 1 slice, 2 slices."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---------------------------------------------------------------- names: slices and label maps


def with_forward_slashes(name: str) -> str:
    """Replace backslashes by slashes: zip files made on Windows leave backslashes in the names that they unpack to."""
    if "\\" not in name:
        return name
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def is_slice(name: str) -> bool:
    """Return whether a name is that of an image, of a pair the header, unless it is hidden (macOS: ._*.nii)."""
    return name.lower().endswith(ENDINGS) and "/." not in f"/{name}"


def is_label_map(name: str) -> bool:
    """Recognise a label map by the names of its file and of the folders above it."""
    folder, _, base = name.rpartition("/")
    return folder_says_label_map(folder) or file_says_label_map(DIGITS.sub("0", base))


@lru_cache(maxsize=4096)  # each folder is asked for once per file
def folder_says_label_map(folder: str) -> bool:
    """Recognise a path with a folder of label maps in it."""
    names = [split_words(part) for part in folder.split("/")]
    return any(has_label_word(words) or "semantic" in words and IMAGE_WORDS.isdisjoint(words) for words in names)


@lru_cache(maxsize=4096)  # files differ in their numbers, which the caller sets to 0
def file_says_label_map(base: str) -> bool:
    """Recognise a label map by its own file name."""
    words = split_words(base)
    return has_label_word(words) or "semantic" in words


def has_label_word(words: list[str]) -> bool:
    """Find a word for label map, with or without a number, as in mask1."""
    bare = {word.strip("0123456789") for word in words}
    return any(map(LABEL_WORD.fullmatch, bare)) or {"ground", "truth"} <= bare


def split_words(name: str) -> list[str]:
    """Split a name into lower-case words at separators and at capitals that start a word."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[0-9])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


# ---------------------------------------------------------------- names: splits


@lru_cache(maxsize=4096)
def split_of(folder: str) -> str | None:
    """Return the split that a folder's name stands for, or None.

    Exactly one of its words names a split, and all others are common beside such a word.
    """
    words = split_words(folder)
    splits = [SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD]
    others = (word for word in words if word not in SPLIT_OF_WORD)
    return splits[0] if len(splits) == 1 and all(map(BESIDE_SPLIT.fullmatch, others)) else None


@lru_cache(maxsize=4096)
def likely_split_of(folder: str) -> str | None:
    """Return the split that a folder's name may stand for, whatever its other words, as in fold0_train, or None."""
    splits = [SPLIT_OF_WORD[word] for word in split_words(folder) if word in SPLIT_OF_WORD and len(word) > 2]
    return split_of(folder) or (splits[0] if len(splits) == 1 else None)


def splits_of_folders(names: list[str]) -> dict[str, str]:
    """Return the splits that the first folders of slices' names stand for.

    If every slice lies in a folder that is likely a split, and these include training and another split, they are the
    splits. Otherwise only unmistakable names count: test_retest beside baseline is no split.
    """
    tops = {top if slash else "" for top, slash, _ in (name.partition("/") for name in names)}
    likely = {top: split for top in tops if (split := likely_split_of(top))}
    if len(likely) == len(tops) and "train" in likely.values() and len(set(likely.values())) > 1:
        return likely
    return {top: split for top in tops if (split := split_of(top))}


@lru_cache(maxsize=4096)
def splits_in_path(folder: str) -> tuple[str, ...]:
    """Return the splits that the folders of a path may stand for, from the top down."""
    return tuple(filter(None, map(likely_split_of, folder.split("/"))))


def path_to_splits(names: list[str]) -> str:
    """Return the path down to the folder that holds the splits, or several folders or files.

    It descends through a folder that is alone, unless that is a split or a patient, and through keras_slices_data. It
    is empty or ends in a slash.
    """
    below = ""
    while True:
        inside = [name.removeprefix(below).partition("/") for name in names if name.startswith(below)]
        folders = {top for top, slash, _ in inside if slash}
        lone = next(iter(folders)) if len(folders) == 1 and all(slash for _, slash, _ in inside) else None
        if "keras_slices_data" in folders:
            below += "keras_slices_data/"
        elif lone and not split_of(lone) and not parse_name(lone).case:
            below += f"{lone}/"
        else:
            return below


# ---------------------------------------------------------------- names: case, week and slice number


def identify(name: str) -> Identity:
    """Return case, week and slice number of a slice.

    Fields that the file's name lacks come from its folders, the deepest one first. Without a case there is no slice
    number, because slices of several patients would share it.
    """
    folder, _, base = name.rpartition("/")
    own, above = parse_name(base), parse_folders(folder)
    case = above.case if own.case is None else own.case
    week = above.week if own.week is None else own.week
    number = above.number if own.number is None else own.number
    return Identity(case, week, number if case else None)


@lru_cache(maxsize=4096)
def parse_folders(folder: str) -> Identity:
    """Return each of case, week and slice number from the deepest folder of a path that gives it."""
    identities = [parse_name(part) for part in reversed(folder.split("/"))]
    return Identity(*(next((value for value in values if value is not None), None) for values in zip(*identities)))


def parse_name(part: str) -> Identity:
    """Return case, week and slice number from the name of one file or folder.

    Numbers are compared by value: case_4 is case_004.
    """
    case, week, number = CASE.search(part) or BIDS_SUBJECT.search(part), WEEK.search(part), NUMBER.search(part)
    patient = sys.intern(f"{case[1].lower()}_{DIGITS.sub(pad_number, case[2].lower())}") if case else None
    return Identity(patient, int(week[1]) if week else None, int(number[1]) if number else None)


def pad_number(digits: re.Match[str]) -> str:
    """Write a number with at least three digits."""
    return f"{int(digits[0]):03}"


# ---------------------------------------------------------------- names: a pattern or a table of the user's


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern, or raise DataError if it is no regular expression or lacks the group `case`."""
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"--pattern {pattern} is no regular expression: {error}") from None
    groups = expression.groupindex.keys()
    if "case" not in groups or not groups <= {"case", "week", "slice"}:
        raise DataError(f"--pattern {pattern} needs a group (?P<case>...); (?P<week>...) and (?P<slice>...) may follow")
    return expression


def identify_by_pattern(expression: re.Pattern[str], name: str) -> Identity | None:
    """Return what a pattern finds in a name, or None if it does not match. Raises DataError."""
    match = expression.search(name)
    return make_identity(name, match.groupdict()) if match else None


def make_identity(name: str, fields: dict[str, str | None]) -> Identity:
    """Make an identity of the texts of case, week and slice. Raises DataError if a number is none."""
    numbers = []
    for field in ("week", "slice"):
        text = (fields.get(field) or "").strip().removesuffix(".0")  # pandas writes 3.0 beside missing numbers
        if text and not re.fullmatch("[0-9]{1,9}", text):
            raise DataError(f"{name}: its {field} is {text:.20}, where a whole number is needed")
        numbers.append(int(text) if text else None)
    return Identity((fields["case"] or "").strip() or None, *numbers)


def match_names(
    found: list[tuple[str, str]], expression: re.Pattern[str]
) -> tuple[list[tuple[str, str]], dict[str, Identity], list[str]]:
    """Apply a pattern to the names of files.

    Returns:
        The (path, name) of those that match, what the pattern finds in them, and a notice that names the others.

    Raises:
        DataError: If no name matches, or a week or slice is no number.
    """
    matches = {name: identity for _, name in found if (identity := identify_by_pattern(expression, name))}
    others = sorted(name for _, name in found if name not in matches)
    listed = f"--pattern {expression.pattern} does not match {counted(len(others), 'file')} ({abbreviate(others, 3)})"
    if not matches:
        raise DataError(listed)
    notices = [f"warning: {listed}: not read"] if others else []
    return [(path, name) for path, name in found if name in matches], matches, notices


def read_table(table: Path, folder: Path) -> list[SliceFile]:
    """Make a record of each file that a table lists.

    Args:
        table: CSV file with a header, separated by commas, semicolons or tabs, in UTF-8.
        folder: Where paths start that do not exist below the table's own folder.

    Raises:
        DataError: If the table or a file cannot be used; the message names the row.
    """
    rows = table_rows(table)
    found: dict[str, str] = {}  # path by name
    identities, splits = {}, {}
    for number, row in enumerate(rows, 2):
        place = f"{table}, row {number}"
        path = with_forward_slashes((row["path"] or "").strip())
        if not path or "\0" in path:
            raise DataError(f"{place}: it has no path")
        name = PurePosixPath(path).as_posix()  # of ./a and a//b, which are a and a/b
        if name in found:
            raise DataError(f"{place}: {name} is listed twice")
        if not name.lower().endswith(ENDINGS):
            raise DataError(f"{place}: {name} is none of {' '.join(ENDINGS)}")
        places = table.parent / name, folder / name
        found[name] = str(next(filter(os.path.exists, places), places[0]))
        identities[name] = make_identity(place, row)
        splits[name] = split_of((row.get("split") or "").strip())
        if "split" in row and not splits[name]:
            raise DataError(f"{place}: its split is {row['split'] or 'empty'}, not train, validate or test")
    if any(splits.values()) and "train" not in splits.values():
        raise DataError(f"{table} has no row with split train")
    files = describe_files([(path, name) for name, path in found.items()], identities.__getitem__)
    return [file._replace(split=splits[file.name]) for file in files]


def table_rows(table: Path) -> list[dict[str, str | None]]:
    """Read the rows of a table, or raise DataError."""
    try:
        with open_regular(table) as file:
            content = file.read(MAX_TABLE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"--table {table} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise DataError(f"--table {table} is no CSV file in UTF-8: save it as such") from None
    header = text.partition("\n")[0]
    try:
        delimiter = max(",;\t", key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        reader.fieldnames = [title.strip().lower() for title in reader.fieldnames or ()]
        rows = [row for row, _ in zip(reader, range(MAX_FILES + 1)) if any(row.values())]  # spreadsheets add empty ones
    except csv.Error as error:
        raise DataError(f"--table {table} is no CSV file: {error}") from None
    if len(content) > MAX_TABLE_BYTES or len(rows) > MAX_FILES:
        raise DataError(f"--table {table} has more than {MAX_FILES} rows or {MAX_TABLE_BYTES} bytes")
    if not {"path", "case"} <= set(reader.fieldnames or ()):
        raise DataError(
            f"--table {table} needs the columns path and case, and may have week, slice and split; it has "
            f"{abbreviate(list(reader.fieldnames or ()), 5) or 'none'}"
        )
    if any(count > 1 for title, count in Counter(reader.fieldnames).items() if title):
        raise DataError(f"--table {table} has two columns of one name: {abbreviate(reader.fieldnames, 5)}")
    if not rows:
        raise DataError(f"--table {table} lists no files")
    return rows


# ---------------------------------------------------------------- volumes


def assign_volumes(files: list[SliceFile]) -> list[SliceFile]:
    """Set the volume of each 2D file: the slices of one case and week of a split, even from several folders.

    Where these repeat a slice number, or several folders contain slices without a number, the folders are different
    series, and each is a volume. A slice without a case is a volume of its own.
    """
    groups: dict[tuple, list[tuple[int, str]]] = {}
    for row, file in enumerate(files):
        if file.axis is not None:
            continue
        folder, _, base = file.name.rpartition("/")
        series = series_folder(folder, base)
        groups.setdefault((splits_in_path(folder), file.case, file.week), []).append((row, series))
    volumes = [file.volume for file in files]
    kept: dict[tuple[str, ...], tuple[str, ...]] = {}  # one object for each volume: a million would fill memory
    for (_, case, week), group in groups.items():
        numbers = [files[row].number for row, _ in group if files[row].number is not None]
        unnumbered = {series for row, series in group if files[row].number is None}
        one_series = len(set(numbers)) == len(numbers) and len(unnumbered) < 2
        first = min(series for _, series in group)
        for row, series in group:
            alone = (series, files[row].name.rpartition("/")[2], files[row].name)
            shared = (first if one_series else series, case, "" if week is None else f"{week:03}")
            volumes[row] = kept.setdefault(shared, shared) if case else alone
    return [file._replace(volume=volume) for file, volume in zip(files, volumes)]


def series_folder(folder: str, base: str) -> str:
    """Return the folder of a slice's series, without folders that contain this slice alone.

    Windows unpacks x.nii.gz to x.nii/x.nii.
    """
    series = without_slice_folders(folder)
    stem = lower_stem(base)
    if stem not in series.lower():
        return series
    return "/".join(part for part in series.split("/") if lower_stem(part) != stem)


@lru_cache(maxsize=4096)
def without_slice_folders(folder: str) -> str:
    """Drop the folders of a path whose names give a slice number."""
    return "/".join(part for part in folder.split("/") if parse_name(part).number is None)


def lower_stem(name: str) -> str:
    """Return a file's name in lower case and without its ending."""
    return without_ending(name).lower()


def sort_key(file: SliceFile) -> tuple:
    """Return a key that sorts files by folder, case, week, slice number and name."""
    return file.volume, file.number or 0, file.name


def positions_of(files: list[SliceFile]) -> np.ndarray:
    """Return each slice's position: its rank in its volume, 0 lowest, 1 highest; 0.5 if alone, NaN if unknown."""
    numbers: dict[tuple[str, ...], set[int]] = {}
    for file in files:
        if file.number is not None:
            numbers.setdefault(file.volume, set()).add(file.number)
    positions: dict[tuple[tuple[str, ...], int | None], float] = {
        (volume, number): rank / (len(found) - 1) if len(found) > 1 else 0.5
        for volume, found in numbers.items()
        for rank, number in enumerate(sorted(found))
    }
    return np.array([positions.get((file.volume, file.number), np.nan) for file in files], np.float32)
