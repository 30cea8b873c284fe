"""A folder of videos -> a dataset directory, which appears whole or not at all."""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile

from sora_jax.core.disk import reports_full_disk
from sora_jax.core.errors import UserError
from sora_jax.data.open_video import DecodeError, open_regular
from sora_jax.data.video_folder.captions import BY_HASH, Entry, Folder, read_folder
from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.data.video_folder.report import make_report, report_text
from sora_jax.data.video_folder.worker import check_files

FORMAT_VERSION = 1
"""Part of the key of a dataset: raise it when the checks or the records change."""


def prepare(folder, data_dir, options: FolderOptions = FolderOptions(), seed: int = 0) -> str:
    """The directory of the folder's dataset below data_dir, for `sources.open_source`.

    seed: of the choice of held-out clips.

    A dataset of the same files, captions and options is used again; another one never replaces
    it. report.json and report.txt beside the shards say what became of every file. Raises
    UserError where the folder holds no usable clip or the dataset cannot be written.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    found = read_folder(folder, options.caption_columns)
    found, digests = _without_repeats(folder, found)
    key = _key(found, digests, options, seed)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.name).strip("._") or "videos"
    target = pathlib.Path(data_dir).expanduser() / f"{name}-{key}"
    if (target / "dataset_info.json").is_file():
        logging.info("video folder %s: dataset %s is up to date", folder, target)
        return str(target)
    results = check_files(folder, [entry.file_name for entry in found.entries], options,
                          _progress(len(found.entries)))
    kept = [entry for entry in found.entries if not isinstance(results[entry.file_name], str)]
    if every := options.held_out_every:
        splits = _splits_by_place(kept, every)
        remark = (f"clips {every}, {2 * every}, ... by file name are held out (held_out_every = "
                  f"{every}), whatever a split column says")
        remarks = [x for x in found.remarks if x != BY_HASH]
        found = dataclasses.replace(found, remarks=(*remarks, remark))
    else:
        splits = _splits(kept, digests, options.held_out_share, seed)
    report = make_report(folder, found, results, splits)
    if not kept:
        logging.warning("%s", report_text(report))
        refused = report["refused"]
        shown = "; ".join(f"{item['file_name']}: {item['reason']}" for item in refused[:3])
        raise UserError(f"none of the {len(refused)} files of {folder} can be used "
                        f"({shown}{'; ...' if len(refused) > 3 else ''})")
    _write(folder, target, kept, results, splits, report)
    logging.info("%s", report_text(report))
    return str(target)


def _progress(total):
    def on_done(done):
        if done % 100 == 0 or done == total:
            logging.info("video folder: %d of %d files checked", done, total)
    return on_done


def _without_repeats(folder, found: Folder):
    """The folder without files of the same bytes as an earlier one, and digests by file name."""
    digests, first, entries, refused = {}, {}, [], list(found.refused)
    for entry in found.entries:
        digest = hashlib.sha256()
        try:
            with open_regular(folder / entry.file_name) as file:
                while piece := file.read(2**20):
                    digest.update(piece)
        except DecodeError:  # it is told by the check, which opens it again
            digest.update(entry.file_name.encode())
        except OSError as error:
            refused.append((entry.file_name, f"cannot be read ({error.strerror})"))
            continue
        digest = digest.hexdigest()
        if digest in first:
            refused.append((entry.file_name, f"has the same content as {first[digest]}"))
            continue
        first[digest], digests[entry.file_name] = entry.file_name, digest
        entries.append(entry)
    return dataclasses.replace(found, entries=tuple(entries), refused=tuple(refused)), digests


def _key(found, digests, options, seed) -> str:
    facts = {
        "version": FORMAT_VERSION,
        "entries": [[digests[e.file_name], dataclasses.asdict(e)] for e in found.entries],
        "refused": found.refused,
        "options": options.identity(),
        "seed": seed,
    }
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _splits(kept: list[Entry], digests, share, seed) -> dict[str, str]:
    """{file name: split}; a clip without one is held out by its rank in a hash of seed and bytes.

    So the order and the names of the files do not matter, and a new clip moves one other at most.
    """
    def rank(entry):
        return hashlib.sha256(f"{seed} {digests[entry.file_name]}".encode()).hexdigest()

    splits = {entry.file_name: entry.split for entry in kept}
    free = sorted((entry for entry in kept if entry.split is None), key=rank)
    num_held_out = 0 if not share or len(kept) < 2 else max(1, round(share * len(free)))
    if "held_out" in splits.values():
        num_held_out = round(share * len(free))
    for place, entry in enumerate(free):
        splits[entry.file_name] = "held_out" if place < num_held_out else "train"
    if kept and "train" not in splits.values():
        raise UserError("every usable clip is held out, none is left for training; change the "
                        "split column or held_out_share")
    return splits


def _splits_by_place(kept: list[Entry], every: int) -> dict[str, str]:
    """{file name: split}: usable clip `every`, 2 * every, ... in the order of names is held out."""
    if len(kept) < every and kept:
        raise UserError(f"held_out_every = {every} holds out none of {len(kept)} usable clips; "
                        "lower it, or set it to 0 and use a split column or held_out_share")
    return {entry.file_name: "train" if place % every else "held_out"
            for place, entry in enumerate(kept, 1)}


def _write(folder, target, kept, results, splits, report):
    """Builds beside the target and renames; a directory that is there is complete."""
    from sora_jax.data.video_folder.builder import Clip, VideoFolder

    clips = [Clip(e, results[e.file_name], splits[e.file_name]) for e in kept]
    temporary = None
    try:
        with reports_full_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target.parent, sum(clip.checked.num_bytes for clip in clips))
            temporary = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
            builder = VideoFolder(folder=folder, clips=clips, data_dir=temporary,
                                  file_format="array_record")
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its own progress
                builder.download_and_prepare()
            built = pathlib.Path(builder.data_dir)
            (built / "report.json").write_text(
                json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (built / "report.txt").write_text(report_text(report) + "\n", encoding="utf-8")
            try:
                os.rename(built, target)
            except OSError:
                if not (target / "dataset_info.json").is_file():  # else another one was faster
                    raise
    except OSError as error:
        raise UserError(f"the dataset {target} cannot be written ({error.strerror or error}); "
                        "choose another directory") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_space(directory, num_bytes):
    needed, free = int(num_bytes * 1.05) + 2**20, shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(f"{directory} has {free} bytes free, the dataset needs about {needed}; "
                        "free some or choose another directory")
