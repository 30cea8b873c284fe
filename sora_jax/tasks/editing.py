"""Editing: which pixels of a clip stay, which are made anew, and how windows make clips of any
length. See docs/editing.md.

Every edit is a clip of 1 + k * time frames with a mask of what stays: it is encoded, the tokens all
of whose pixels stay are known, the others are sampled, and all is decoded. So what stays comes back
as the VAE's reconstruction.
"""

import dataclasses

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.diffusion.editing import slerp
from sora_jax.tasks import latents
from sora_jax.tasks.requests import Edit, Request, seeded_noise
from sora_jax.tasks.sampling import Sampler

DIRECTIONS = ("forward", "backward")
WINDOW_SEEDS = 1_000_003  # between the seeds of the windows of one clip
WAY_SEEDS = 1_000_033  # between those of the ways from one clip to another
WAYS = 4  # that commands and evaluation try


@dataclasses.dataclass(frozen=True)
class Editor:
    """A trained model with what all windows of a clip share.

    window_frames: 1 + k * time frames that are sampled at once. fps, prompt, seed: of the clip.
    paste: what stays has the given pixels; else their reconstruction by the VAE, as what is new.
    ways: clips that are made between two ends, of which that with the smaller seams is taken.
    """

    sampler: Sampler
    params: dict
    prompt: str
    fps: float
    seed: int
    window_frames: int
    paste: bool = False
    ways: int = 1

    @property
    def time(self) -> int:
        """Frames of one latent frame but the first."""
        return self.sampler.vae.compression.time

    @property
    def window_latents(self) -> int:
        return 1 + (self.window_frames - 1) // self.time


def made(editor: Editor, pixels_THWC, edit: Edit, seeds=(0,)) -> list[np.ndarray]:
    """Sampled clips of the size and length of the given one, by seeds counted from the editor's."""
    return editor.sampler(editor.params, [
        Request(editor.prompt, VideoSpec(*pixels_THWC.shape[:3]), editor.fps, editor.seed + seed,
                edit) for seed in seeds])


def filled(editor: Editor, pixels_THWC, kept, window: int = 0, strength: float = 1.0):
    """pixels_THWC with what is not kept made anew; kept: bool, (T,) or (T, H, W)."""
    kept_THW = everywhere(kept, pixels_THWC.shape[:3])
    (out,) = made(editor, pixels_THWC, Edit(
        encoded(editor, pixels_THWC), known_tokens(editor, kept_THW), strength),
        [WINDOW_SEEDS * window])
    return np.where(kept_THW[..., None], pixels_THWC, out) if editor.paste else out


def everywhere(kept, shape_THW) -> np.ndarray:
    """A mask (T,) or (T, H, W) as (T, H, W)."""
    kept = np.asarray(kept, bool)
    return np.broadcast_to(kept.reshape(*kept.shape, *(1,) * (3 - kept.ndim)), shape_THW)


def shown(editor: Editor, pixels_THWC) -> np.ndarray:
    """Given frames as they stand in what is handed out."""
    return pixels_THWC if editor.paste else reconstructed(editor, pixels_THWC)


def encoded(editor: Editor, pixels_THWC) -> np.ndarray:
    """Normalised latents_THWC of uint8 pixels."""
    batch = latents.EncodingBatch([], 1, len(pixels_THWC))
    return latents.encode(editor.sampler.vae, [pixels_THWC], batch)[0]


def reconstructed(editor: Editor, pixels_THWC) -> np.ndarray:
    """The pixels through the VAE; frames behind the last 1 + k * time are padded for it."""
    padded = whole_groups(len(pixels_THWC), editor.time, up=True)
    grown = np.concatenate(
        [pixels_THWC, np.repeat(pixels_THWC[-1:], padded - len(pixels_THWC), axis=0)])
    return latents.decode(editor.sampler.vae, [encoded(editor, grown)])[0][: len(pixels_THWC)]


def known_tokens(editor: Editor, kept_THW) -> np.ndarray:
    """known_THW of patches: those all of whose pixels are kept."""
    compression, patch = editor.sampler.vae.compression, editor.sampler.model.config.patch
    first, rest = kept_THW[:1], kept_THW[1:]
    groups = rest.reshape(-1, compression.time, *rest.shape[1:]).all(1)
    known_THW = np.concatenate([first, groups])
    t, h, w = (len(known_THW) // patch[0], *(
        side // (compression.space * p)
        for side, p in zip(kept_THW.shape[1:], patch[1:], strict=True)))
    blocks = known_THW.reshape(
        t, patch[0], h, kept_THW.shape[1] // h, w, kept_THW.shape[2] // w)
    return blocks.all((1, 3, 5))


def whole_groups(num_frames: int, time: int, up: bool = False) -> int:
    """The next 1 + k * time below (or above) a number of frames."""
    groups = (num_frames - 1) // time
    if up and (num_frames - 1) % time:
        groups += 1
    return 1 + groups * time


def held(pixels_HWC, count: int) -> np.ndarray:
    """`count` frames of one picture: what stands where new frames will be."""
    return np.repeat(pixels_HWC[None], count, axis=0)


def extended(editor: Editor, pixels_THWC, frames: int, direction: str) -> np.ndarray:
    """A clip of `frames` frames that begins (forward) or ends (backward) with the given one.

    It grows window by window, each of which knows about half of its latents from the frames before
    (or after) it. Raises UserError where nothing is left to make.
    """
    if direction not in DIRECTIONS:
        raise UserError(f"--extend={direction} is unknown; allowed: {', '.join(DIRECTIONS)}")
    if frames <= len(pixels_THWC):
        raise UserError(f"--frames={frames} is the length of the whole clip, and the one given "
                        f"already has {len(pixels_THWC)} frames; ask for more")
    if editor.window_latents < 3:
        raise UserError(f"--window={editor.window_frames} frames is too short to continue a clip; "
                        f"at least {1 + 2 * editor.time} are needed")
    if direction == "backward" and len(pixels_THWC) < editor.time:
        raise UserError(f"a clip of {len(pixels_THWC)} frames cannot be extended backward; it "
                        f"takes at least {editor.time}")
    grow = _grown_forward if direction == "forward" else _grown_backward
    clip, window = pixels_THWC, 0
    while len(clip) < frames:
        clip = grow(editor, clip, window)
        window += 1
    if direction == "forward":
        return np.concatenate([shown(editor, pixels_THWC), clip[len(pixels_THWC) : frames]])
    new = clip[len(clip) - frames : len(clip) - len(pixels_THWC)]
    return np.concatenate([new, shown(editor, pixels_THWC)])


def _grown_forward(editor, clip, window):
    context = min(1 + editor.time * ((editor.window_latents - 1) // 2),
                  whole_groups(len(clip), editor.time))
    new = editor.window_frames - context
    pixels_THWC = np.concatenate([clip[-context:], held(clip[-1], new)])
    out = filled(editor, pixels_THWC, np.arange(len(pixels_THWC)) < context, window)
    return np.concatenate([clip, out[context:]])


def _grown_backward(editor, clip, window):
    context = min(editor.window_latents // 2, len(clip) // editor.time) * editor.time
    new = editor.window_frames - context
    pixels_THWC = np.concatenate([held(clip[0], new), clip[:context]])
    out = filled(editor, pixels_THWC, np.arange(len(pixels_THWC)) >= new, window)
    return np.concatenate([out[:new], clip])


def bridge(editor: Editor, before_THWC, after_THWC, gap: int) -> np.ndarray:
    """`gap` frames that lead from the end of one clip to the beginning of another.

    One window: the last frames of one, the gap, the first frames of the other; made editor.ways
    times from other noise, of which the smoothest is taken. Raises UserError where the window has
    no room for them.
    """
    time = editor.time
    room = editor.window_latents - gap // time
    if gap < time or gap % time or room < 2:
        most = (editor.window_latents - 2) * time
        raise UserError(
            f"{gap} frames between two clips cannot be made in a window of {editor.window_frames} "
            f"(--window): they must be a multiple of {time}, from {time} to {most}; choose "
            "--frames so that they are")
    heads = min(room // 2, len(after_THWC) // time)
    tail = min(1 + time * (room - heads - 1), whole_groups(len(before_THWC), time))
    if not heads:
        raise UserError(f"the clip that follows has {len(after_THWC)} frames; it takes at least "
                        f"{time}")
    pixels_THWC = np.concatenate([
        before_THWC[-tail:], held(after_THWC[0], gap), after_THWC[: heads * time]])
    place = np.arange(len(pixels_THWC))
    edit = Edit(encoded(editor, pixels_THWC), known_tokens(editor, everywhere(
        (place < tail) | (place >= tail + gap), pixels_THWC.shape[:3])))
    outs = made(editor, pixels_THWC, edit, [WAY_SEEDS * way for way in range(editor.ways)])
    return min(outs, key=lambda out_THWC: seam(out_THWC, (tail, tail + gap)))[tail : tail + gap]


def seam(pixels_THWC, places) -> float:
    """The largest mean absolute change into one of the frames `places`."""
    pixels_THWC = pixels_THWC.astype(np.float32)
    return max(float(np.abs(pixels_THWC[at] - pixels_THWC[at - 1]).mean()) for at in places)


def joined(editor: Editor, before_THWC, after_THWC, gap: int) -> np.ndarray:
    """One clip, `gap` new frames, the other clip."""
    middle = bridge(editor, before_THWC, after_THWC, gap)
    return np.concatenate([shown(editor, before_THWC), middle, shown(editor, after_THWC)])


def looped(editor: Editor, pixels_THWC, gap: int) -> np.ndarray:
    """The clip and `gap` new frames that lead from its end back to its beginning.

    A prompt that tells of motion works against them: on the way back things move the other way.
    """
    middle = bridge(editor, pixels_THWC, pixels_THWC, gap)
    return np.concatenate([shown(editor, pixels_THWC), middle])


def restyled(editor: Editor, pixels_THWC, strength: float) -> np.ndarray:
    """The clip with noise up to `strength` of the way, and from there made after the prompt.

    Source: SDEdit, arXiv 2108.01073.
    """
    return made(editor, pixels_THWC, Edit(encoded(editor, pixels_THWC), None, strength))[0]


def composed(editor: Editor, pixels_THWC, other_THWC, inside_THW, strength: float) -> np.ndarray:
    """The other clip inside the mask, the first outside, both noised to `strength` and made one."""
    outside = known_tokens(editor, ~inside_THW)
    patch = editor.sampler.model.config.patch
    for axis, side in enumerate(patch):
        outside = np.repeat(outside, side, axis=axis)
    source = np.where(outside[..., None], encoded(editor, pixels_THWC),
                      encoded(editor, other_THWC))
    return made(editor, pixels_THWC, Edit(source, None, strength))[0]


def blended(editor: Editor, pixels_THWC, other_THWC, prompts: tuple[str, str],
            count: int) -> list[np.ndarray]:
    """`count` clips from one to the other: both are walked back to noise, and clips are made from
    points on the arc between the two noises, after both prompts by the same shares. Fresh noise
    on the way would lead elsewhere."""
    editor = dataclasses.replace(editor, sampler=editor.sampler.without_fresh_noise())
    clips = pixels_THWC, other_THWC
    noises = editor.sampler.noises(editor.params, [
        Request(prompt, VideoSpec(*clip.shape[:3]), editor.fps, editor.seed,
                Edit(encoded(editor, clip)))
        for clip, prompt in zip(clips, prompts, strict=True)])
    shares = np.linspace(0, 1, count)
    return between(editor, pixels_THWC.shape[:3], prompts,
                   [slerp(*noises, share) for share in shares], shares)


def blended_prompts(editor: Editor, shape_THW, prompts: tuple[str, str], count: int):
    """`count` clips from one prompt to the other, all from one noise."""
    noise = seeded_noise(editor.seed, VideoSpec(*shape_THW), editor.sampler.vae)
    return between(editor, shape_THW, prompts, [noise] * count, np.linspace(0, 1, count))


def between(editor: Editor, shape_THW, prompts, noises, shares) -> list[np.ndarray]:
    """Clips from these noises after two prompts, by the share of the second."""
    return editor.sampler(editor.params, [
        Request(prompts[0], VideoSpec(*shape_THW), editor.fps, editor.seed,
                Edit(second=(prompts[1], float(share))), noise)
        for noise, share in zip(noises, shares, strict=True)])


def on_canvas(pixels_THWC, height: int, width: int, top: int, left: int):
    """(pixels_THWC, kept_THW) of a larger picture that holds the clip at a place, grey around it.

    Raises UserError where the clip does not fit.
    """
    T, H, W, C = pixels_THWC.shape
    if top < 0 or left < 0 or top + H > height or left + W > width:
        raise UserError(f"a clip of {H}x{W} at --outpaint={top},{left} does not fit into "
                        f"--size={height}x{width}")
    canvas = np.full((T, height, width, C), 128, np.uint8)
    kept = np.zeros((T, height, width), bool)
    place = slice(None), slice(top, top + H), slice(left, left + W)
    canvas[place], kept[place] = pixels_THWC, True
    return canvas, kept
