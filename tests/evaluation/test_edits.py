"""Figures of edits, with a VAE that loses nothing: a sampler that knows the truth reaches every
floor, and one that does not is told by each figure."""

import dataclasses
import types

import numpy as np
import pytest

from configs import base, base_edit
from sora_jax import run_config
from sora_jax.core.errors import UserError
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.data.transforms import ClipWindow
from sora_jax.evaluation import edits
from sora_jax.tasks.editing import Editor
from tests.tasks.test_editing import LosslessVAE


class Sampler:
    """Gives the source where it is known, and elsewhere the latents of `truth` at its place."""

    vae = LosslessVAE()
    model = types.SimpleNamespace(config=types.SimpleNamespace(patch=(1, 2, 2)))

    def __init__(self, truth_THWC):
        self.truth_THWC = truth_THWC

    def __call__(self, params, requests):
        (request,) = requests
        known = np.repeat(np.repeat(request.edit.known_THW, 2, axis=1), 2, axis=2)[..., None]
        truth = self.vae.encode_normalized(self.truth_THWC[None])[0]
        return [self.vae.decode_normalized(
            np.where(known, request.edit.source_THWC, truth)[None])[0]]


def figures(frames, truth=lambda pixels_THWC: pixels_THWC):
    """Means over clips of a sampler that takes truth(clip) for what is to be made."""
    spec = ShapesSpec("held_out", sizes=((48, 64, 1.0),), frames=((frames, 1.0),))
    values = {}
    for index in range(6):
        clip = generate(5, index, spec)
        editor = Editor(Sampler(truth(clip.pixels_THWC)), {}, "", 8.0, 0, window_frames=frames)
        found = edits.clip_figures(
            editor, edits.TrueClip(clip.pixels_THWC, "", 8.0, clip.state))
        for name, each in found.items():
            values.setdefault(name, []).extend(each)
    return edits.summarize(values)


@pytest.mark.parametrize("frames", [9, 17])
def test_a_sampler_that_makes_the_truth_reaches_every_floor(frames):
    found = figures(frames)
    for name in ("forward_kept_error", "backward_kept_error", "forward_velocity_error",
                 "backward_velocity_error", "forward_seen", "join_jump", "inpaint_outside_error"):
        np.testing.assert_allclose(found[name], found[f"{name}_floor"], err_msg=name)
    assert found["forward_kept_error"] == found["inpaint_outside_error"] == 0
    assert found["forward_velocity_error"] < 0.1 * found["forward_velocity_still"]
    assert found["backward_velocity_error"] < 0.1 * found["backward_velocity_still"]
    assert found["loop_closure_floor"] < 1.5
    assert found["loop_closure"] > 1.8, "the truth goes on and does not lead back"


def test_loops_alone_are_made_without_the_prompt():
    clip = generate(5, 0, ShapesSpec("held_out", sizes=((48, 64, 1.0),), frames=((9, 1.0),)))
    asked = []

    class Listening(Sampler):
        def __call__(self, params, requests):
            asked.append(requests[0].prompt)
            return super().__call__(params, requests)

    editor = Editor(Listening(clip.pixels_THWC), {}, "a circle", 8.0, 0, window_frames=9)
    edits.clip_figures(editor, edits.TrueClip(clip.pixels_THWC, "a circle", 8.0, clip.state))
    assert asked == ["a circle", "a circle", "", "a circle", "a circle"]


def test_a_sampler_that_goes_another_way_is_told():
    found = figures(17, lambda pixels_THWC: pixels_THWC[::-1])
    assert found["forward_velocity_error"] > found["forward_velocity_still"]
    assert found["backward_velocity_error"] > found["backward_velocity_still"]
    assert found["join_jump"] > 2 * found["join_jump_floor"]
    assert found["backward_kept_error"] == found["inpaint_outside_error"] == 0
    assert found["forward_kept_error"] == 0, "what is given stays, whatever is made"
    empty = figures(17, lambda pixels_THWC: np.full_like(pixels_THWC, 128))
    assert empty["forward_seen"] == 0 and "forward_velocity_error" not in empty


@dataclasses.dataclass(frozen=True)
class Planned:
    spec: object
    record: int
    window: ClipWindow


def test_clips_that_are_too_short_to_be_edited_are_refused(monkeypatch):
    plan = [Planned(types.SimpleNamespace(frames=5, height=32, width=32), 0, None)]
    monkeypatch.setattr(edits, "open_dataset", lambda *_: [])
    monkeypatch.setattr(edits, "clip_plan", lambda *_: plan)
    config = base_edit.get_config("runlocal")
    with pytest.raises(UserError, match="at least 9 frames and the longest has 5"):
        edits.true_clips(run_config.resolve(config), Sampler(None), "")


def test_edits_are_judged_where_a_run_asks_for_them():
    assert run_config.resolve(base.get_config()).evaluation.edits == 0
    assert run_config.resolve(base_edit.get_config()).evaluation.edits > 0
    config = base.get_config()
    config.evaluation.edits = -1
    with pytest.raises(UserError, match="evaluation.edits = -1"):
        run_config.resolve(config)
