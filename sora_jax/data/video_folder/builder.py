"""The TFDS builder of a checked folder: encoded bytes, captions and facts into ArrayRecord."""

import dataclasses
import pathlib

import tensorflow_datasets as tfds

from sora_jax.core.errors import UserError
from sora_jax.data.open_video import DecodeError, open_regular
from sora_jax.data.records import content_digest, make_example, record_features
from sora_jax.data.video_folder.captions import Entry
from sora_jax.data.video_folder.check import Checked

SHARD_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip that is kept, with its split."""

    entry: Entry
    checked: Checked
    split: str


class VideoFolder(tfds.core.ShardBasedBuilder):
    """Videos of a user's folder, as described in docs/formats_dataset.md."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder, clips: list[Clip], **kwargs):
        self._folder, self._clips = pathlib.Path(folder), clips
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=record_features(), description=self.__doc__,
            disable_shuffling=True)

    def _shard_iterators_per_split(self, dl_manager):
        splits = {}
        for split in ("train", "held_out"):
            clips = [clip for clip in self._clips if clip.split == split]
            if clips:
                splits[split] = [_ShardIterator(self._folder, part) for part in _shards(clips)]
        return splits


def _shards(clips) -> list[list[Clip]]:
    """Consecutive runs of clips of about SHARD_BYTES each."""
    shards, size = [[]], 0
    for clip in clips:
        if shards[-1] and size + clip.checked.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(clip)
        size += clip.checked.num_bytes
    return shards


class _ShardIterator:
    """Callable that yields a shard's (key, example) pairs, reading each file only then."""

    def __init__(self, folder, clips):
        self._folder, self._clips = folder, clips

    def __call__(self):
        for clip in self._clips:
            entry, checked = clip.entry, clip.checked
            path = self._folder / entry.file_name
            try:
                with open_regular(path) as file:
                    data = file.read()
            except DecodeError as error:
                raise UserError(f"{error} (it was there when it was checked)") from error
            if content_digest(data) != checked.digest:
                raise UserError(f"{path} changed while the folder was prepared; run it again")
            facts = {"codec": checked.codec, "changes": list(checked.changes),
                     "notes": list(checked.notes), "columns": entry.metadata}
            yield entry.file_name, make_example(
                entry.file_name, data, entry.captions, facts, num_frames=checked.num_frames,
                height=checked.height, width=checked.width, fps=checked.fps)
