"""Encoding and decoding in batches changes no clip: padding in rows and time leaves no trace."""

import numpy as np
import pytest

from sora_jax.core.shapes import VideoSpec
from sora_jax.data.clip_plan import PlannedClip
from sora_jax.data.transforms import ClipWindow
from sora_jax.tasks import latents
from sora_jax.weights.vae_files import load_vae


@pytest.fixture(scope="module")
def vae():
    return load_vae("builtin:moving_shapes")


def planned(record, frames, height, width):
    return PlannedClip(record, ClipWindow(0, frames, 8.0, False), VideoSpec(frames, height, width))


def test_batches_hold_every_clip_once_with_two_programs_a_size():
    plan = [planned(i, (1, 5, 9)[i % 3], 32, (32, 48)[i % 2]) for i in range(30)]
    batches = list(latents.encoding_batches(plan, max_frames=9, batch_pixels=4 * 9 * 32 * 48))
    held = [item.record for batch in batches for item in batch.clips]
    assert sorted(held) == list(range(30))
    shapes = set()
    for batch in batches:
        sides = {(item.spec.height, item.spec.width) for item in batch.clips}
        assert len(sides) == 1 and len(batch.clips) <= batch.rows
        assert all(item.spec.frames <= batch.frames for item in batch.clips)
        shapes.add((*sides.pop(), batch.rows, batch.frames))
    assert len(shapes) == 4, "two sizes, images and videos"


def test_a_clip_is_encoded_and_decoded_in_a_batch_as_alone(vae):
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8) for frames in (9, 5)]
    batch = latents.EncodingBatch([], rows=3, frames=9)
    together = latents.encode(vae, clips, batch)
    alone = latents.encode(vae, clips[1:], latents.EncodingBatch([], rows=1, frames=5))[0]
    assert [len(x) for x in together] == [3, 2]
    np.testing.assert_allclose(together[1], alone, atol=2e-4)
    decoded = latents.decode(vae, together)
    assert [len(x) for x in decoded] == [9, 5]
    again = np.asarray(vae.decode_normalized(alone[None]))[0]
    assert np.abs(decoded[1].astype(int) - again.astype(int)).max() <= 1
