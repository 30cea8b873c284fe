"""Windows, masks and inputs of editing, with a VAE that loses nothing and a sampler that marks what
it makes: what stays, where it stands, and how flags ask for it."""

import dataclasses
import types

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.tasks import editing
from sora_jax.tasks.editing import Editor

NEW = 77  # the value of every pixel that is made


class LosslessVAE:
    """Latents that hold the pixels themselves: 4 frames of 8 x 8; the first frame four times."""

    compression = Compression(4, 8)
    config = types.SimpleNamespace(z_dim=4 * 8 * 8 * 3)

    def encode_normalized(self, pixels_BTHWC):
        B, T, H, W, C = pixels_BTHWC.shape
        x = np.concatenate([np.repeat(pixels_BTHWC[:, :1], 3, axis=1), pixels_BTHWC], axis=1)
        x = x.reshape(B, -1, 4, H // 8, 8, W // 8, 8, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(*x.shape[:4], -1).astype(np.float32)

    def decode_normalized(self, latents_BTHWC):
        B, T, H, W, _ = latents_BTHWC.shape
        x = latents_BTHWC.reshape(B, T, H, W, 4, 8, 8, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(B, T * 4, H * 8, W * 8, 3)[:, 3:].astype(np.uint8)


class MarkingSampler:
    """Gives the source where it is known and NEW elsewhere, and keeps the requests."""

    vae = LosslessVAE()
    model = types.SimpleNamespace(config=types.SimpleNamespace(patch=(1, 2, 2)))

    def __init__(self):
        self.requests = []

    def __call__(self, params, requests):
        self.requests += requests
        out = []
        for request in requests:
            edit = request.edit
            known = np.repeat(np.repeat(edit.known_THW, 2, axis=1), 2, axis=2)[..., None]
            latents = np.where(known, edit.source_THWC, NEW)
            out.append(self.vae.decode_normalized(latents[None])[0])
        return out


@pytest.fixture
def editor():
    return Editor(MarkingSampler(), {}, "a red circle", 8.0, seed=0, window_frames=17)


def clip(frames, seed=0, height=32, width=48):
    return np.random.default_rng(seed).integers(100, 256, (frames, height, width, 3), np.uint8)


def new_frames(pixels_THWC):
    """Which frames are made."""
    return (pixels_THWC == NEW).all((1, 2, 3))


@pytest.mark.parametrize("given, frames", [(1, 17), (1, 30), (9, 17), (12, 50), (40, 41)])
def test_a_clip_extended_forward_begins_with_the_given_frames(editor, given, frames):
    pixels = clip(given)
    out = editing.extended(editor, pixels, frames, "forward")
    assert out.shape == (frames, *pixels.shape[1:])
    np.testing.assert_array_equal(out[:given], pixels)
    assert new_frames(out[given:]).all()
    seeds = [request.seed for request in editor.sampler.requests]
    assert len(set(seeds)) == len(seeds)
    if frames == 50:  # a later window knows the end of the one before
        known = editor.sampler.requests[1].edit.known_THW
        assert known[:3].all() and not known[3:].any()
        assert (editor.sampler.requests[1].edit.source_THWC[1:3] == NEW).all()


@pytest.mark.parametrize("given, frames", [(4, 8), (9, 17), (10, 40)])
def test_a_clip_extended_backward_ends_with_the_given_frames(editor, given, frames):
    pixels = clip(given)
    out = editing.extended(editor, pixels, frames, "backward")
    assert len(out) == frames
    np.testing.assert_array_equal(out[-given:], pixels)
    assert new_frames(out[:-given]).all()
    known = editor.sampler.requests[0].edit.known_THW
    assert known[-1].all() and not known[0].any()


def test_a_join_has_both_clips_and_sees_the_end_of_one_and_the_beginning_of_the_other(editor):
    before, after = clip(10), clip(7, seed=1)
    out = editing.joined(editor, before, after, 8)
    np.testing.assert_array_equal(out[:10], before)
    np.testing.assert_array_equal(out[18:], after)
    assert new_frames(out[10:18]).all()
    (request,) = editor.sampler.requests
    known, vae = request.edit.known_THW.all((1, 2)), editor.sampler.vae
    np.testing.assert_array_equal(known, [1, 1, 0, 0, 1])
    window = vae.decode_normalized(request.edit.source_THWC[None])[0]
    np.testing.assert_array_equal(window[:5], before[-5:])
    np.testing.assert_array_equal(window[-4:], after[:4])


def test_a_loop_leads_to_the_latents_of_its_first_frames(editor):
    pixels = clip(9)
    out = editing.looped(editor, pixels, 8)
    np.testing.assert_array_equal(out[:9], pixels)
    assert len(out) == 17 and new_frames(out[9:]).all()
    (request,) = editor.sampler.requests
    edit = request.edit
    beginning = editor.sampler.vae.encode_normalized(np.concatenate([pixels[:1], pixels[:4]])[None])
    assert edit.known_THW[-1].all() and not edit.known_THW[-2].any()
    np.testing.assert_array_equal(edit.source_THWC[-1], beginning[0, 1])
    np.testing.assert_array_equal(edit.source_THWC[1], editing.encoded(editor, pixels)[-1])


@pytest.mark.parametrize("ways, taken", [(1, 40), (3, 140)])
def test_of_several_ways_between_two_ends_the_smoothest_is_taken(editor, ways, taken):
    greys = {0: 40, editing.WAY_SEEDS: 140, 2 * editing.WAY_SEEDS: 240}
    ends = np.full((9, 32, 48, 3), 130, np.uint8)

    def sampler(params, requests):
        return [np.where(np.isin(np.arange(17), range(5, 13))[:, None, None, None],
                         np.uint8(greys[request.seed]), np.uint8(130))
                * np.ones((17, 32, 48, 3), np.uint8) for request in requests]

    sampler.vae, sampler.model = editor.sampler.vae, editor.sampler.model
    editor = dataclasses.replace(editor, sampler=sampler, ways=ways)
    assert np.unique(editing.bridge(editor, ends, ends, 8)) == taken


def test_outside_of_a_mask_nothing_changes_and_a_patch_is_kept_whole_or_not_at_all(editor):
    pixels, inside = clip(9), np.zeros((9, 32, 48), bool)
    inside[3, 17, 33] = True  # one pixel of latent frame 1, patch (1, 2)
    out = editing.filled(editor, pixels, ~inside)
    expected = np.zeros_like(inside)
    expected[1:5, 16:32, 32:48] = True
    np.testing.assert_array_equal((out == NEW).all(-1), expected)
    np.testing.assert_array_equal(out[~expected], pixels[~expected])
    pasted = editing.filled(dataclasses.replace(editor, paste=True), pixels, ~inside)
    np.testing.assert_array_equal((pasted == NEW).all(-1), inside)


def test_outpainting_keeps_the_clip_where_it_was_put(editor):
    canvas, kept = editing.on_canvas(clip(5), 64, 96, 16, 32)
    out = editing.filled(editor, canvas, kept)
    np.testing.assert_array_equal(out[:, 16:48, 32:80], clip(5))
    assert ((out == NEW).all(-1) == ~kept).all()
    with pytest.raises(UserError, match="does not fit into --size=64x96"):
        editing.on_canvas(clip(5), 64, 96, 40, 0)


def test_a_composition_starts_from_the_other_clip_inside_the_mask(editor, monkeypatch):
    edits = []
    monkeypatch.setattr(
        editing, "made", lambda editor, pixels, edit: edits.append(edit) or [pixels])
    inside = np.zeros((5, 32, 48), bool)
    inside[:, :16] = True
    editing.composed(editor, clip(5), clip(5, seed=1), inside, 0.6)
    mixed = editor.sampler.vae.decode_normalized(edits[0].source_THWC[None])[0]
    np.testing.assert_array_equal(mixed[:, :16], clip(5, seed=1)[:, :16])
    np.testing.assert_array_equal(mixed[:, 16:], clip(5)[:, 16:])
    assert edits[0].known_THW is None and edits[0].strength == 0.6


@pytest.mark.parametrize("edit, words", [
    (lambda e: editing.extended(e, clip(9), 9, "forward"), "already has 9 frames"),
    (lambda e: editing.extended(e, clip(3), 9, "backward"), "it takes at least 4"),
    (lambda e: editing.extended(dataclasses.replace(e, window_frames=5), clip(9), 20, "forward"),
     "at least 9 are needed"),
    (lambda e: editing.joined(e, clip(9), clip(9), 6), "a multiple of 4, from 4 to 12"),
    (lambda e: editing.joined(e, clip(9), clip(9), 16), "a multiple of 4, from 4 to 12"),
    (lambda e: editing.joined(e, clip(9), clip(3), 8), "has 3 frames; it takes at least 4"),
])
def test_what_cannot_be_made_is_one_line(editor, edit, words):
    with pytest.raises(UserError, match=words):
        edit(editor)
