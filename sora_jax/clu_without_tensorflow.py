"""TensorBoard event files for clu.metric_writers, without TensorFlow.

Each event is in the file when write_* returns. (tensorboard's EventFileWriter has a thread that
dies on a full disk, and then the next write blocks for ever.)

clu needs TensorFlow for this one module alone. Importing this file puts it in the place of
`clu.metric_writers.summary_writer`, which must happen before clu.metric_writers is imported:

    from sora_jax.clu_without_tensorflow import metric_writers
"""

import importlib
import io
import os
import socket
import sys
import time

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

_NUM_BUCKETS = 30


class SummaryWriter:
    """Writes one event file into a directory; the methods are those of clu's MetricWriter."""

    def __init__(self, logdir: str):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        os.makedirs(logdir, exist_ok=True)
        number = len(os.listdir(logdir))  # two writers of one process within a second
        self._file = open(os.path.join(logdir, f"{name}.{number}"), "ab")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def _write(self, **fields):
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._file.flush()

    def _add(self, step, *values):
        self._write(step=int(step), summary=summary_pb2.Summary(value=values))

    def start_at(self, step: int):
        """Makes TensorBoard forget what earlier files of the directory say from `step` on."""
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=int(step), session_log=log)

    def write_scalars(self, step, scalars):
        self._add(step, *(
            summary_pb2.Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in scalars.items()
        ))

    def write_images(self, step, images):
        """Images are HWC or NHWC with 1, 3 or 4 channels; uint8, or floats in [0, 1]."""
        for tag, image in images.items():
            image = np.asarray(image)
            for i, image_HWC in enumerate(image[None] if image.ndim == 3 else image):
                name = tag if i == 0 else f"{tag}/{i}"
                self._add(step, summary_pb2.Summary.Value(tag=name, image=_image(image_HWC)))

    def write_texts(self, step, texts):
        for tag, text in texts.items():
            self._add(step, summary_pb2.Summary.Value(
                tag=tag,
                metadata=text_metadata.create_summary_metadata(display_name="", description=""),
                tensor=tensor_util.make_tensor_proto(np.array([text.encode()], object)),
            ))

    def write_histograms(self, step, arrays, num_buckets=None):
        for tag, values in arrays.items():
            buckets = (num_buckets or {}).get(tag) or _NUM_BUCKETS
            self._add(step, summary_pb2.Summary.Value(tag=tag, histo=_histogram(values, buckets)))

    def write_summaries(self, step, values, metadata=None):
        for tag, value in values.items():
            self._add(step, summary_pb2.Summary.Value(
                tag=tag, metadata=(metadata or {}).get(tag),
                tensor=tensor_util.make_tensor_proto(np.asarray(value)),
            ))

    def write_videos(self, step, videos):
        raise ValueError("TensorBoard shows no videos: write an MP4 and an image of its frames")

    def write_audios(self, step, audios, *, sample_rate):
        raise ValueError("there is no sound here")

    def write_hparams(self, hparams):
        """A nested mapping; values that are no number, bool or text are written as text."""
        summary = hparams_summary.hparams_pb(dict(_flat(hparams)))
        # hparams_pb may build TensorFlow's class of the same message, where that is installed.
        summary = summary_pb2.Summary.FromString(summary.SerializeToString())
        self._add(0, *summary.value)

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def _image(image_HWC) -> summary_pb2.Summary.Image:
    if image_HWC.dtype != np.uint8:
        image_HWC = np.round(np.clip(image_HWC, 0, 1) * 255).astype(np.uint8)
    height, width, channels = image_HWC.shape
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC).save(buffer, "PNG")
    return summary_pb2.Summary.Image(
        height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue()
    )


def _histogram(values, num_buckets) -> summary_pb2.HistogramProto:
    values = np.asarray(values, np.float64).ravel()
    counts, edges = np.histogram(values, bins=num_buckets)
    return summary_pb2.HistogramProto(
        min=values.min(), max=values.max(), num=values.size, sum=values.sum(),
        sum_squares=np.square(values).sum(), bucket_limit=edges[1:], bucket=counts,
    )


def _flat(mapping, prefix=""):
    for key, value in mapping.items():
        if hasattr(value, "items"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float)) else str(value)


_REPLACED = "clu.metric_writers.summary_writer"
assert sys.modules.get(_REPLACED, sys.modules[__name__]) is sys.modules[__name__], (
    f"{_REPLACED} was imported before {__name__}"
)
sys.modules[_REPLACED] = sys.modules[__name__]
metric_writers = importlib.import_module("clu.metric_writers")
