"""Batches of pixels for training a VAE: a step has one size, drawn with its clips by the step."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterator

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.rng import numpy_stream
from sora_jax.data import transforms
from sora_jax.data.caption_words import word_buckets
from sora_jax.data.clip_plan import decode_clip
from sora_jax.data.pipeline import ENDLESS_STEPS, UnreadableBudget, iterate

# The metadata of a record -> float32 (objects, frames, values).
Objects = Callable[[dict], np.ndarray]

MAX_DRAWS = 20  # records tried for one place of a batch before it stays empty


@dataclasses.dataclass(frozen=True)
class PixelSize:
    """One size of a batch; frames = 1 draws still images. `batch` is global."""

    frames: int
    height: int
    width: int
    weight: float
    batch: int


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """What pixel batches are drawn from."""

    sizes: tuple[PixelSize, ...]
    target_fps: float | None = None  # faster records are resampled to it; None keeps every rate
    resize_share: float = 0.5  # share of clips shrunk by a random factor before they are cropped
    crop: bool = True  # False: a size takes records of exactly its height and width
    segment_frames: int = 64  # longer records are decoded and kept in segments of this length
    cache_bytes: int = 2**30  # of decoded pixels kept in memory

    def __post_init__(self):
        if not self.sizes:
            raise UserError("pixels.sizes is empty; it needs at least one (frames, height, width, "
                            "weight, batch)")
        for size in self.sizes:
            if min(size.frames, size.height, size.width, size.batch) < 1 or not size.weight > 0:
                raise UserError(f"{size} must have positive frames, height, width, weight, batch")


class DecodedCache:
    """Least recently used decoded clips, up to a budget in bytes; thread-safe."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of `key`, made by `make` (outside the lock) where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        array = make()
        array.setflags(write=False)
        with self._lock:
            if key not in self._kept and array.nbytes <= self._max_bytes:
                self._kept[key] = array
                self._bytes += array.nbytes
                while self._bytes > self._max_bytes:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return array


class PixelBatches:
    """`batch(step)` is a pure function of the step: {"pixels_BTHWC": float32 in [-1, 1]}, this
    process's share of the global batch, with word_buckets also "words_BV" (see
    caption_words.py) of all captions of the clips, with `objects` also "objects_BOTK". A record
    that cannot be read is replaced by another draw and counted against a budget."""

    def __init__(self, source, config: PixelConfig, seed: int, num_steps: int, process_index: int,
                 process_count: int, max_unreadable: int, num_threads: int, num_prefetch: int,
                 cache: DecodedCache | None, word_buckets: int, objects: Objects | None):
        if not len(source):
            raise UserError("the dataset has no clips: there are no pixels to train on")
        for size in config.sizes:
            if size.batch % process_count:
                raise UserError(f"{size}: batch must be a multiple of {process_count} processes")
        self._source, self._config, self._seed = source, config, seed
        self._num_steps, self._threads, self._prefetch = num_steps, num_threads, num_prefetch
        self._process = process_index, process_count
        self._budget = UnreadableBudget(max_unreadable, "the dataset")
        self._cache = DecodedCache(config.cache_bytes) if cache is None else cache
        self._num_buckets, self._words = word_buckets, {}
        self._objects_of, self._objects = objects, {}
        if objects:  # raises here for records that tell of none
            self._num_objects, _, self._object_values = objects(source[0].metadata).shape
        self._plan_records()

    def __len__(self):
        return self._num_steps

    def size(self, step: int) -> PixelSize:
        """The size of the batch of `step`."""
        weights = np.array([size.weight for size in self._config.sizes])
        rng = numpy_stream(self._seed, "pixel_size", step)
        return self._config.sizes[rng.choice(len(weights), p=weights / weights.sum())]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's part of the batch of `step`."""
        size = self.size(step)
        index, count = self._process
        rows = range(size.batch // count * index, size.batch // count * (index + 1))
        pixels = np.zeros((len(rows), size.frames, size.height, size.width, 3), np.float32)
        batch = {"pixels_BTHWC": pixels}
        if self._num_buckets:
            batch["words_BV"] = np.zeros((len(rows), self._num_buckets), np.float32)
        if self._objects_of:
            batch["objects_BOTK"] = np.zeros(
                (len(rows), self._num_objects, size.frames, self._object_values), np.float32)
        for local, row in enumerate(rows):
            drawn = self._draw(size, numpy_stream(self._seed, "pixel_clip", step, row))
            if drawn is not None:
                record, start, clip = drawn
                pixels[local] = transforms.to_float(clip)
                if self._num_buckets:
                    batch["words_BV"][local] = self._words_of(record)
                if self._objects_of:
                    batch["objects_BOTK"][local] = self._objects_in(record, start, size.frames)
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """`batch(step)` from `start_step` on, prefetched. Raises UserError when more records
        cannot be read than the budget allows."""
        for batch in iterate(self.batch, start_step, self._num_steps, self._threads,
                             self._prefetch):
            self._budget.check()
            yield batch

    def _plan_records(self):
        """Frames at the target rate, kept size of every record, and the records of each size."""
        specs, config = self._source.specs(), self._config
        self._windows = [
            transforms.windows(int(n), float(fps), config.target_fps, int(n), 1)[0]
            for n, fps in zip(specs.num_frames, specs.fps, strict=True)
        ]
        frames_R = np.array([window.num_frames for window in self._windows])
        height_R, width_R = np.asarray(specs.height), np.asarray(specs.width)
        self._records, scale_R = {}, np.zeros(len(self._source))
        for size in config.sizes:
            if config.crop:
                covers_R = (height_R >= size.height) & (width_R >= size.width)
            else:
                covers_R = (height_R == size.height) & (width_R == size.width)
            fits_R = (frames_R >= size.frames) & covers_R
            if not fits_R.any():
                raise UserError(
                    f"no record {'holds' if config.crop else 'is'} {size.frames} frames of "
                    f"{size.height}x{size.width} (most frames {frames_R.max()}, largest "
                    f"{height_R.max()}x{width_R.max()}); ask for a smaller size"
                    f"{'' if config.crop else ', or set pixels.crop'}"
                )
            self._records[size] = np.flatnonzero(fits_R)
            cover_R = np.maximum(size.height / height_R, size.width / width_R)
            scale_R = np.where(fits_R, np.maximum(scale_R, cover_R), scale_R)
        self._kept_size = np.stack([np.ceil(height_R * scale_R - 1e-6),
                                    np.ceil(width_R * scale_R - 1e-6)], axis=1).astype(int)
        self._segment = max([config.segment_frames, *(size.frames for size in config.sizes)])

    def _draw(self, size, rng):
        """(record, first frame, pixels_THWC uint8 of a random crop of it); None where none can be
        read."""
        for _ in range(MAX_DRAWS):
            record = int(rng.choice(self._records[size]))
            num_frames = self._windows[record].num_frames
            length = min(self._segment, num_frames)
            segment = int(rng.integers(-(-num_frames // length)))
            first = min(segment * length, num_frames - length)
            draws = rng.random(5)
            try:
                pixels = self._cache.get(
                    (record, first), lambda: self._decode(record, first, length)  # noqa: B023
                )
            except Exception as error:  # it must not be raised inside Grain's map
                self._budget.count(f"record {record}", error)
                continue
            start = int(draws[0] * (len(pixels) - size.frames + 1))
            return record, first + start, self._crop(pixels[start:][:size.frames], size, draws)
        self._budget.give_up()
        return None

    def _words_of(self, record):
        if record not in self._words:
            self._words[record] = word_buckets(
                self._source[record].captions, self._num_buckets).astype(bool)
        return self._words[record]

    def _objects_in(self, record, start, num_frames):
        if record not in self._objects:
            self._objects[record] = self._objects_of(self._source[record].metadata)
        return self._objects[record][:, start:start + num_frames]

    def _decode(self, record, first, length):
        window = dataclasses.replace(self._windows[record], start_frame=first, num_frames=length)
        item = self._source[record]
        height, width = self._kept_size[record]
        return decode_clip(item.video_bytes, window, int(height), int(width), item.id)

    def _crop(self, pixels_THWC, size, draws):
        H, W = pixels_THWC.shape[1:3]
        cover = max(size.height / H, size.width / W)
        if draws[1] < self._config.resize_share and cover < 1:
            scale = cover ** draws[2]  # log-uniform between covering the crop and full size
            H, W = max(size.height, round(H * scale)), max(size.width, round(W * scale))
        top, left = int(draws[3] * (H - size.height + 1)), int(draws[4] * (W - size.width + 1))
        return transforms.resize(pixels_THWC, H, W, (top, left, size.height, size.width))


def pixel_batches(
    source,
    config: PixelConfig,
    seed: int,
    num_steps: int = ENDLESS_STEPS,
    process_index: int = 0,
    process_count: int = 1,
    max_unreadable: int = 10,
    num_threads: int = 2,
    num_prefetch: int = 4,
    cache: DecodedCache | None = None,
    word_buckets: int = 0,
    objects: Objects | None = None,
) -> PixelBatches:
    """Pixel batches of a dataset. Raises UserError where a size fits no record.

    cache: shared by batches of the same source and config, however else they differ; None = its
    own. word_buckets: that the words of captions fall into; 0 = batches without words.
    objects: makes an array (objects, frames, values) of a record's metadata, whose frames of each
    clip are given; places in it are those of whole frames, so `config` must not crop.
    """
    return PixelBatches(source, config, seed, num_steps, process_index, process_count,
                        max_unreadable, num_threads, num_prefetch, cache, word_buckets, objects)
