"""The record that every dataset shares: what stands in an example and how its text is packed.

The format is described in docs/formats_dataset.md.
"""

import dataclasses
import hashlib
import json

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One clip of a dataset; sizes are as displayed, after rotation and pixel aspect."""

    id: str
    video_bytes: bytes  # an encoded container, for decode.decode_video
    captions: tuple[str, ...]  # short to long; at least one
    metadata: dict
    num_frames: int
    height: int
    width: int
    fps: float
    digest: str  # sha256 of video_bytes, in hex


def record_features():
    """The TFDS features of a record; none of them needs TensorFlow."""
    import tensorflow_datasets as tfds  # slow to import, and only builders need it

    return tfds.features.FeaturesDict({
        "id": tfds.features.Text(),
        "video": tfds.features.Tensor(shape=(), dtype=np.object_),
        "captions": tfds.features.Text(),
        "metadata": tfds.features.Text(),
        "num_frames": np.int32,
        "height": np.int32,
        "width": np.int32,
        "fps": np.float32,
        "digest": tfds.features.Text(),
    })


def make_example(id: str, video_bytes: bytes, captions, metadata: dict, *, num_frames: int,
                 height: int, width: int, fps: float) -> dict:
    """What a builder yields for one clip. captions: strings, short to long."""
    captions = list(captions)
    assert captions and all(isinstance(caption, str) for caption in captions), captions
    return {
        "id": id,
        "video": video_bytes,
        "captions": json.dumps(captions, ensure_ascii=False),
        "metadata": json.dumps(metadata, ensure_ascii=False, sort_keys=True),
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": fps,
        "digest": content_digest(video_bytes),
    }


def read_example(example) -> Record:
    """The Record of an example as TFDS reads it back; raises ValueError or KeyError on damage."""
    captions = tuple(json.loads(_text(example["captions"])))
    return Record(
        id=_text(example["id"]), video_bytes=bytes(example["video"]), captions=captions,
        metadata=json.loads(_text(example["metadata"])), num_frames=int(example["num_frames"]),
        height=int(example["height"]), width=int(example["width"]), fps=float(example["fps"]),
        digest=_text(example["digest"]),
    )


def content_digest(video_bytes: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(video_bytes).hexdigest()


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
