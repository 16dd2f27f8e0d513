"""The files that a path on the command line stands for: their forms, and their splits.

A folder may be a plain one, a clone of a hub data set, or what `save_to_disk` of the library
datasets wrote.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastprune.errors import InputError
from fastprune.readers import read_json

FORMS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".npy": "tokens",
    ".bin": "tokens",
}
"""What a file is read as, by its suffix, in capitals or not."""
PACKED = ".gz"
"""May follow the suffix of a file of text."""
BINARY = ("parquet", "arrow", "tokens")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files of a data set's folder that describe it."""
SAVED = "state.json"
"""Beside an `ABOUT` file: lists the files that `save_to_disk` wrote."""
MAX_FILES = 10**6
"""Files of any kind in a folder of data: more are a whole disk."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The words in the names of files and folders that say to which split they belong."""
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


def form_of(path: Path) -> str | None:
    """What `path` is read as, by its name: a value of FORMS; None where the name does not say."""
    name = path.name.lower()
    plain = Path(name.removesuffix(PACKED))
    form = FORMS.get(plain.suffix)
    return None if form in BINARY and plain.name != name else form


def is_packed(path: Path) -> bool:
    """Whether the name of `path` says that it is compressed by gzip."""
    return path.name.lower().endswith(PACKED)


def checked_form(path: Path) -> str:
    """What `path`, which was named itself, is read as; a file without a suffix as text.

    Raises InputError for a suffix that does not say.
    """
    if form := form_of(path):
        return form
    if not path.suffix:
        return "text"
    raise InputError(
        f"{path}: files of kind '{path.suffix}' are not read; give one of {' '.join(FORMS)} (text "
        f"may be compressed, as in .jsonl{PACKED}), or rename a plain text to .txt"
    )


def folder_files(folder: Path) -> list[Path]:
    """The files of data in `folder` and the folders in it, sorted.

    Hidden ones are left out; files of token ids count where there are no others. Raises InputError
    for a folder without any, and for one with more than `MAX_FILES` files of any kind.
    """
    found = [file for file in _visible(folder) if _is_data(file) and file.is_file()]
    if not found:
        raise InputError(f"{folder}: no {' '.join(FORMS)} files in this folder")
    texts = [file for file in found if form_of(file) != "tokens"]
    return sorted(texts or found)  # token ids beside texts are most likely made of them


def split_of(name: str) -> str:
    """The split that the words of `name`, a path or a key, speak of; empty where of none.

    Of several it is train, or else the last.
    """
    found = [SPLITS[word] for word in SPLIT.findall(name.lower())]
    return "train" if "train" in found else next(reversed(found), "")


def without_held_out(folder: Path, files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The `files` of `folder` to train on, and those of other splits.

    Where none is of the split train, all are to train on.
    """
    files = list(files)
    splits = {file: split_of(str(file.relative_to(folder))) for file in files}
    if "train" not in splits.values():
        return files, []
    kept = [file for file in files if splits[file] in ("train", "")]
    return kept, [file for file in files if file not in kept]


def _visible(folder: Path) -> Iterator[Path]:
    """The files in `folder` and the folders in it whose names begin with no dot."""
    count = 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += len(names)
        if count > MAX_FILES:
            raise InputError(
                f"{folder}: more than {MAX_FILES:,} files in this folder; name the folder that "
                "holds the data alone"
            )
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _is_data(file: Path) -> bool:
    if form_of(file) is None or file.name in ABOUT:
        return False
    described = any(file.with_name(name).is_file() for name in ABOUT)
    if file.name == SAVED:
        return not described
    state = file.with_name(SAVED)
    if form_of(file) != "arrow" or not described or not state.is_file():
        return True
    return file.name in _saved_files(state)  # others are the library's own caches


def _saved_files(state: Path) -> list[str]:
    try:
        content = read_json(state)
        return [entry["filename"] for entry in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{state}: damaged; save the data set again, or name its .arrow files"
        ) from error
