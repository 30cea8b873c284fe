"""Which files of a folder are clips, and what their captions and splits are.

A folder holds metadata.csv or metadata.jsonl (`file_name` and caption columns), or a name.txt
beside every name.mp4, each line of it one caption. Nothing is decoded here.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import stat

from sora_jax.core.errors import UserError

VIDEO_ENDINGS = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".flv", ".3gp",
    ".ts", ".mts", ".m2ts", ".wmv", ".ogv", ".h264", ".h265", ".nut", ".y4m",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
CAPTION_NAMES = {"caption", "captions", "text", "prompt", "description"}
SPLITS = {"train": "train", "training": "train", "held_out": "held_out", "test": "held_out",
          "validation": "held_out", "val": "held_out", "eval": "held_out"}
BY_HASH = "the split column holds out no clip, so clips are held out by their hash"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A clip of the folder as its owner describes it."""

    file_name: str  # relative to the folder, with "/"
    captions: tuple[str, ...]
    split: str | None = None  # "train" or "held_out"; None leaves it to the hash
    metadata: dict = dataclasses.field(default_factory=dict)  # the other columns


@dataclasses.dataclass(frozen=True)
class Folder:
    """The clips of a folder, what was left out with the reason, and remarks on the whole."""

    entries: tuple[Entry, ...]
    refused: tuple[tuple[str, str], ...]  # (file name, reason)
    remarks: tuple[str, ...]


def read_folder(folder, caption_columns: tuple[str, ...] = ()) -> Folder:
    """Describes the clips of a folder, sorted by file name.

    caption_columns: the columns that hold captions, short to long; () takes every column named
    caption, captions, text, prompt, description or ...caption. Raises UserError where the folder
    is absent or holds no video, the metadata cannot be read, or no clip has a caption.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that holds the videos")
    videos = _videos(folder)
    given = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(given) > 1:
        raise UserError(f"{folder} holds both {' and '.join(METADATA_FILES)}; keep one of them")
    if not videos and not given:
        raise UserError(f"{folder} holds no video (looked for {', '.join(sorted(VIDEO_ENDINGS))})")
    if given:
        found = _from_rows(folder, given[0], _rows(given[0]), videos, caption_columns)
    else:
        found = _from_text_files(folder, videos)
    if not found.entries:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.refused[:3])
        raise UserError(f"no clip of {folder} can be used ({reasons or 'its metadata is empty'})")
    return found


def _videos(folder) -> list[str]:
    """Names of all video files below the folder; hidden files and directories are passed over."""
    names = []
    for directory, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        names += [
            (pathlib.Path(directory) / name).relative_to(folder).as_posix() for name in files
            if not name.startswith(".") and pathlib.Path(name).suffix.lower() in VIDEO_ENDINGS
        ]
    return sorted(names)


def _text(path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") \
            from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _rows(path):
    """(line number, mapping) of every row of a metadata file."""
    text = _text(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} should be a JSON object")
            yield number, row
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path} line {reader.line_num} has more columns than the header; "
                                "put quotes around texts with commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV ({error})") from error


def _from_rows(folder, path, rows, videos, caption_columns):
    entries, refused, seen = [], [], set()
    rows = list(rows)
    present = {key for _, row in rows for key in row}
    if rows and "file_name" not in present:
        raise UserError(f"{path} has no column file_name (it has: {', '.join(sorted(present))})")
    columns = _caption_columns(path, rows, present, caption_columns)
    for number, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            refused.append((f"{path.name} line {number}", "has no file_name"))
            continue
        name = pathlib.PurePosixPath(name.strip().replace("\\", "/")).as_posix()
        captions = _captions(row, columns)
        reason = _name_problem(folder, name)
        if name in seen:
            reason = f"named again in {path.name} line {number}; the first row counts"
        elif reason is None and not captions:
            reason = f"has no caption in {', '.join(columns)} ({path.name} line {number})"
        seen.add(name)
        if reason is not None:
            refused.append((name, reason))
            continue
        rest = {key: value for key, value in row.items()
                if key not in (*columns, "file_name", "split")}
        entries.append(Entry(name, captions, _split(path, number, row.get("split")), rest))
    refused += [(name, f"not named in {path.name}") for name in videos if name not in seen]
    remarks = [f"captions are read from {path.name}: {', '.join(columns)}"] if rows else []
    if entries and all(entry.split == "train" for entry in entries):
        entries = [dataclasses.replace(entry, split=None) for entry in entries]
        remarks.append(BY_HASH)
    return Folder(tuple(sorted(entries, key=lambda e: e.file_name)), tuple(refused),
                  tuple(remarks))


def _caption_columns(path, rows, present, asked):
    if asked:
        absent = [name for name in asked if name not in present]
        if absent and rows:
            raise UserError(f"{path} has no column {', '.join(absent)} "
                            f"(it has: {', '.join(sorted(present))})")
        return tuple(asked)
    order = dict.fromkeys(key for _, row in rows for key in row)
    columns = tuple(key for key in order if key.lower() in CAPTION_NAMES
                    or key.lower().endswith("_caption"))
    if rows and not columns:
        raise UserError(
            f"{path} has no caption column (it has: {', '.join(order)}); name one caption or "
            "..._caption, or say which columns are captions")
    return columns


def _captions(row, columns) -> tuple[str, ...]:
    captions = []
    for column in columns:
        value = row.get(column)
        for caption in value if isinstance(value, list) else [value]:
            if isinstance(caption, str) and caption.strip():
                captions.append(" ".join(caption.split()))
    return tuple(dict.fromkeys(captions))


def _split(path, number, value):
    if value is None or not str(value).strip():
        return None
    split = SPLITS.get(str(value).strip().lower())
    if split is None:
        raise UserError(f"{path} line {number} has split {value!r} "
                        f"(allowed: {', '.join(SPLITS)}, or nothing)")
    return split


def _name_problem(folder, name):
    parts = pathlib.PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        return "lies outside the folder"
    try:
        mode = (folder / name).stat().st_mode
    except OSError:
        return "there is no such file"
    return None if stat.S_ISREG(mode) else "is not a regular file"


def _from_text_files(folder, videos):
    entries, refused = [], []
    for name in videos:
        path = (folder / name).with_suffix(".txt")
        reason = _name_problem(folder, name)
        if reason is None and not path.is_file():
            reason = f"has no caption (no {path.name} beside it, and no metadata file)"
        if reason is None:
            lines = [" ".join(line.split()) for line in _text(path).splitlines()]
            captions = tuple(dict.fromkeys(line for line in lines if line))
            reason = None if captions else f"its {path.name} is empty"
        if reason is None:
            entries.append(Entry(name, captions))
        else:
            refused.append((name, reason))
    return Folder(tuple(entries), tuple(refused), ("captions are read from .txt files",))
