"""Edits of held-out clips whose truth is known, and the figures of what a model makes of them.

Every figure stands beside its floor: the same figure of the true clip through the VAE.
"""

import collections
import dataclasses

import numpy as np

from sora_jax import shared_work
from sora_jax.core.errors import UserError
from sora_jax.data.clip_plan import clip_plan, decode_clip
from sora_jax.evaluation import edit_figures as figures
from sora_jax.run_config import RunConfig
from sora_jax.tasks import editing, latents
from sora_jax.tasks.datasets import open_dataset
from sora_jax.tasks.editing import Editor
from sora_jax.tasks.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class TrueClip:
    """A held-out clip of 1 + k * time frames. state: of moving_shapes, None for other clips."""

    pixels_THWC: np.ndarray
    prompt: str
    fps: float
    state: dict | None


def edit_report(config: RunConfig, sampler: Sampler, params, workdir: str) -> dict[str, float]:
    """Means over the first config.evaluation.edits held-out clips of the greatest length, by name:

    edit_forward_, edit_backward_: the clip is continued from its first half or backwards from its
    second. kept_error: of the given frames (pixel values); velocity_error (px per frame) of new
    ones, with velocity_still beside it, the error if all stood still; seen: share of shapes that
    are there to measure. edit_loop_closure, edit_join_jump: see `edit_figures`; a loop is made
    without the prompt, and the join is of two parts of a clip. edit_inpaint_outside_error: of
    pixels outside the mask, when the half of the clip inside is made anew. "<name>_floor": of the
    truth through the VAE, for a loop that of the clip there and back.
    """
    sampler = dataclasses.replace(sampler, packing=dataclasses.replace(sampler.packing, rows=1))

    def mine():
        found = {}
        for i, clip in true_clips(config, sampler, workdir, shared_work.share()).items():
            editor = Editor(sampler, params, clip.prompt, clip.fps, config.evaluation.seed + i,
                            window_frames=len(clip.pixels_THWC), ways=editing.WAYS)
            found[i] = clip_figures(editor, clip)
        return found

    values = collections.defaultdict(list)
    for of_clip in shared_work.merged(mine):
        for name, found in of_clip.items():
            values[f"edit_{name}"] += found
    return summarize(values)


def summarize(values: dict[str, list]) -> dict[str, float]:
    """The mean of every figure without None, which stands for a shape that is not seen; figures
    without any value are left out."""
    known = {name: [value for value in found if value is not None]
             for name, found in values.items()}
    return {name: float(np.mean(found)) for name, found in known.items() if found}


def true_clips(config: RunConfig, sampler: Sampler, workdir: str,
               share: slice = slice(None)) -> dict[int, TrueClip]:
    """The first held-out clips of the greatest length by number; of these, a share. Raises
    UserError where that length is too short."""
    compression, patch = sampler.vae.compression, sampler.model.config.patch
    source = open_dataset(config.data, workdir, "held_out")
    plan = clip_plan(source, latents.clip_options(config), compression, patch)
    longest, unit = max(item.spec.frames for item in plan), compression.space * max(patch[1:])
    if longest < 1 + 2 * compression.time:
        raise UserError(
            f"evaluation.edits = {config.evaluation.edits} needs held-out clips of at least "
            f"{1 + 2 * compression.time} frames and the longest has {longest}; set it to 0")
    chosen = [item for item in plan if item.spec.frames == longest
              and max(item.spec.height, item.spec.width) >= 2 * unit][: config.evaluation.edits]
    clips = {}
    for i in range(len(chosen))[share]:
        item, record = chosen[i], source[chosen[i].record]
        spec = item.spec
        as_it_is = (item.window.start_frame == 0 and not item.window.resampled
                    and (spec.height, spec.width) == (record.height, record.width))
        clips[i] = TrueClip(
            decode_clip(record.video_bytes, item.window, spec.height, spec.width, record.id),
            record.captions[0], item.window.fps,
            record.metadata if as_it_is and "shapes" in record.metadata else None)
    return clips


def clip_figures(editor: Editor, clip: TrueClip) -> dict[str, list]:
    """The figures of one clip by name; of some there is one for every shape."""
    true_THWC = clip.pixels_THWC
    frames, place = len(true_THWC), np.arange(len(true_THWC))
    through_vae = editing.reconstructed(editor, true_THWC)
    half, gap = (editor.window_latents - 1) // 2 * editor.time, editor.time
    gap *= max(1, (editor.window_latents - 1) // 2)
    found = {}

    def both(name, figure, made_THWC, floor_THWC=through_vae):
        found[name], found[f"{name}_floor"] = [figure(made_THWC)], [figure(floor_THWC)]

    def motion(name, made_THWC, first, end):
        if clip.state is None:
            return
        for suffix, pixels_THWC in (("", made_THWC), ("_floor", through_vae)):
            errors, speeds = figures.velocity_error(pixels_THWC, clip.state, first, end)
            found[f"{name}_velocity_error{suffix}"] = errors
            found[f"{name}_seen{suffix}"] = [float(error is not None) for error in errors]
        found[f"{name}_velocity_still"] = speeds

    given = 1 + half
    made_THWC = editing.extended(editor, true_THWC[:given], frames, "forward")
    both("forward_kept_error", lambda x: figures.error(x, true_THWC, place < given), made_THWC)
    motion("forward", made_THWC, given, frames)

    new = frames - editor.window_latents // 2 * editor.time
    made_THWC = editing.extended(editor, true_THWC[new:], frames, "backward")
    both("backward_kept_error", lambda x: figures.error(x, true_THWC, place >= new), made_THWC)
    motion("backward", made_THWC, 0, new)

    start_THWC = true_THWC[: frames - gap]
    there_and_back = np.concatenate([start_THWC, start_THWC[-2::-1]])
    silent = dataclasses.replace(editor, prompt="")
    both("loop_closure", figures.loop_closure, editing.looped(silent, start_THWC, gap),
         editing.reconstructed(editor, there_and_back)[:-1])

    joints = frames - gap - editor.time, frames - editor.time
    made_THWC = editing.joined(editor, true_THWC[: joints[0]], true_THWC[joints[1] :], gap)
    both("join_jump", lambda x: figures.join_jump(x, joints), made_THWC)

    inside_THW = half_mask(editor, true_THWC.shape[:3])
    both("inpaint_outside_error", lambda x: figures.error(x, true_THWC, ~inside_THW),
         editing.filled(editor, true_THWC, ~inside_THW))
    return found


def half_mask(editor: Editor, shape_THW) -> np.ndarray:
    """inside_THW: half of the longer side, in whole tokens, at its end."""
    axis = 1 if shape_THW[1] > shape_THW[2] else 2
    unit = (editor.sampler.vae.compression.space
            * editor.sampler.model.config.patch[axis])
    new = shape_THW[axis] // unit // 2 * unit
    inside_THW = np.zeros(shape_THW, bool)
    np.moveaxis(inside_THW, axis, -1)[..., shape_THW[axis] - new :] = True
    return inside_THW
