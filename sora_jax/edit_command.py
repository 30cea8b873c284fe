"""The editing flags of `sora_jax.sample`: which edit they ask for, its inputs and its result.

Every edit and what it measures: docs/editing.md.
"""

import dataclasses

import numpy as np
from absl import flags

from sora_jax.core.errors import UserError
from sora_jax.core.shapes import VideoSpec
from sora_jax.data.decode import decode_video, probe
from sora_jax.data.transforms import choose_size
from sora_jax.diffusion.consistency import DistillConfig
from sora_jax.diffusion.editing import pooled_noise
from sora_jax.run_config import RunConfig
from sora_jax.tasks import editing
from sora_jax.tasks.editing import Editor
from sora_jax.tasks.requests import Request, seeded_noise
from sora_jax.tasks.sampling import Sampler

flags.DEFINE_string("image", None, "A still picture to begin with.")
flags.DEFINE_string("video", None, "A clip to edit.")
flags.DEFINE_string("video_b", None, "A second clip, to join, compose or interpolate with.")
flags.DEFINE_string("mask", None, "A clip or picture of the video's size: white is made anew.")
flags.DEFINE_enum("extend", None, editing.DIRECTIONS, "Continue --video to --frames.")
flags.DEFINE_bool("loop", None, "End where the clip begins; of --video or of the prompt.")
flags.DEFINE_list("outpaint", None, "TOP,LEFT of --video in the larger --size.")
flags.DEFINE_float("strength", None, "How much of --video is made anew: 0 nothing, 1 everything.")
flags.DEFINE_integer("interpolate", None, "Number of clips between two clips or prompts.")
flags.DEFINE_bool("draft", None, "A quick look: half of each side, 8 steps, the same composition.")
flags.DEFINE_integer("variations", 1, "Number of results, with seeds --seed, --seed + 1, ...")
flags.DEFINE_integer("window", None, "Frames sampled at once, 1 + 4k; default as in training.")
flags.DEFINE_bool("paste", False, "What stays keeps its pixels instead of their reconstruction.")
flags.DEFINE_integer(
    "ways", None, f"Joins and loops are made so often, and the smoothest is taken; {editing.WAYS}.")
flags.DEFINE_enum(
    "known", "auto", ("auto", "clean", "noised"),
    "How what stays is shown to the model; auto: clean where it was trained with conditions.")

MAIN = ("image", "video", "video_b", "mask", "extend", "loop", "outpaint", "strength",
        "interpolate", "draft")
# The flags of every edit, and those that may be left out.
EDITS = {
    "sample": ((), ()),
    "draft": (("draft",), ()),
    "image": (("image",), ()),
    "extend": (("video", "extend"), ()),
    "loop": (("loop",), ("video",)),
    "join": (("video", "video_b"), ()),
    "inpaint": (("video", "mask"), ("strength",)),
    "outpaint": (("video", "outpaint"), ()),
    "restyle": (("video", "strength"), ()),
    "compose": (("video", "video_b", "mask", "strength"), ()),
    "interpolate": (("interpolate",), ("video", "video_b")),
}
WINDOWED = ("image", "extend", "loop", "join")
KEEPING = (*WINDOWED, "inpaint", "outpaint")
DRAFT_FACTOR, DRAFT_STEPS = 2, 8
GAP_LATENTS = 2  # new latent frames of a join or a loop whose --frames is not given
DEFAULT_FRAMES, DEFAULT_SIZE, DEFAULT_FPS = 17, (64, 64), 8.0


@dataclasses.dataclass(frozen=True)
class Ask:
    """What the flags ask for. None: not given."""

    edit: str
    frames: int | None
    size: tuple[int, int] | None
    fps: float | None
    seed: int
    image: str | None
    video: str | None
    video_b: str | None
    mask: str | None
    extend: str | None
    outpaint: tuple[int, int] | None
    strength: float | None
    interpolate: int | None
    variations: int
    window: int | None
    paste: bool
    ways: int | None
    known: str

    @property
    def spec(self) -> VideoSpec:
        """Of a clip made from its prompt alone."""
        frames = DEFAULT_FRAMES if self.frames is None else self.frames
        return VideoSpec(frames, *(self.size or DEFAULT_SIZE))


def read_flags(values, frames, size, fps, seed) -> Ask:
    """The edit that absl's flag values ask for. Raises UserError where flags do not go together."""
    given = {name for name in MAIN if getattr(values, name) not in (None, False)}
    name = edit_of(given)
    if values.window is not None and name not in WINDOWED:
        raise UserError(f"--window={values.window} is of {_listed(WINDOWED)}; leave it out")
    if values.ways is not None and name not in ("loop", "join"):
        raise UserError(f"--ways={values.ways} is of {_listed(('loop', 'join'))}; leave it out")
    if values.paste and name not in KEEPING:
        raise UserError(f"--paste is of {_listed(KEEPING)}; leave it out")
    if values.strength is not None and not 0 <= values.strength <= 1:
        raise UserError(f"--strength={values.strength:g} must be from 0 (the clip comes back) to 1 "
                        "(it is ignored)")
    if values.interpolate is not None and values.interpolate < 2:
        raise UserError(f"--interpolate={values.interpolate} clips; at least 2 are needed")
    for flag, value in (("variations", values.variations), ("frames", frames),
                        ("ways", values.ways)):
        if value is not None and value < 1 and (flag, name) != ("frames", "sample"):
            raise UserError(f"--{flag}={value} must be at least 1")
    same = ("image", "video", "video_b", "mask", "extend", "strength", "interpolate", "variations",
            "window", "paste", "ways", "known")
    return Ask(edit=name, frames=frames, size=size, fps=fps, seed=seed,
               outpaint=_place(values.outpaint), **{each: getattr(values, each) for each in same})


def edit_of(given: set[str]) -> str:
    """The name of the edit that has these flags. Raises UserError where none has."""
    for name, (needed, optional) in EDITS.items():
        if set(needed) <= given <= {*needed, *optional}:
            return name
    shown = " ".join(f"--{name}" for name in MAIN if name in given)
    raise UserError(f"{shown} ask for no edit together; possible are {_listed(list(EDITS)[1:])}")


def check_jumps(ask: Ask, config: DistillConfig) -> None:
    """Raises UserError on edits that a distilled model cannot make: it knows only jumps, to the
    edges of its segments."""
    if ask.edit == "interpolate" and ask.video:
        raise UserError("--interpolate between clips walks them to noise in small steps, and a "
                        "distilled model knows none; use its teacher's workdir")
    if ask.strength not in (None, 0, 1) and config.segments > 1:
        raise UserError(f"--strength={ask.strength:g} begins inside a segment of this distilled "
                        f"model (distill.segments = {config.segments}); use its teacher's workdir")


def _listed(names) -> str:
    return "; ".join(
        " ".join([f"--{each}" for each in EDITS[name][0]]
                 + [f"[--{each}]" for each in EDITS[name][1]]) for name in names)


def _place(words) -> tuple[int, int] | None:
    if words is None:
        return None
    try:
        top, left = map(int, words)
    except ValueError:
        raise UserError(
            f"--outpaint={','.join(words)} should be TOP,LEFT in pixels, such as 0,32") from None
    return top, left


def run(ask: Ask, config: RunConfig, sampler: Sampler, params, prompts: list[str]):
    """(clips pixels_THWC, one prompt and frames per second for each) of an edit."""
    if ask.edit in ("sample", "draft"):
        return _sampled(ask, sampler, params, prompts)
    trained = config.conditioning.is_used
    clean = trained if ask.known == "auto" else ask.known == "clean"
    if clean and sampler.settings.resample_times > 1:
        raise UserError(f"--resample={sampler.settings.resample_times} is for what stays with the "
                        "noise of its clip, and here it is clean; leave it out, or give "
                        "--known=noised")
    sampler = dataclasses.replace(
        sampler, sees_clean=clean, packing=dataclasses.replace(sampler.packing, rows=1))
    print(f"what stays is shown to the model {'clean' if clean else 'with the noise of its clip'}: "
          f"the run was trained {'with' if trained else 'without'} conditions")
    inputs = read_inputs(ask, config, sampler)
    window = ask.window or config.data.max_frames
    sampler.vae.compression.check(VideoSpec(window, *(ask.size or inputs.shape[1:])),
                                  patch=max(sampler.model.config.patch[1:]))
    clips, said = [], []
    for prompt in (prompts or [""])[: 1 if ask.edit == "interpolate" else None]:
        for variation in range(ask.variations):
            editor = Editor(sampler, params, prompt, inputs.fps, ask.seed + variation, window,
                            ask.paste, ask.ways or editing.WAYS)
            if ask.edit == "interpolate":
                made = _interpolate(editor, ask, inputs, prompts)
            else:
                made = [OPERATIONS[ask.edit](editor, ask, inputs)]
            clips += made
            said += [prompt] * len(made)
    return clips, said, [inputs.fps] * len(clips)


def _sampled(ask, sampler, params, prompts):
    """Clips of prompts alone, and their drafts."""
    spec, fps = ask.spec, ask.fps or DEFAULT_FPS
    patch = max(sampler.model.config.patch[1:])
    factor = DRAFT_FACTOR if ask.edit == "draft" else 1
    sampler.vae.compression.check(spec, patch=patch * factor)
    small = VideoSpec(spec.frames, spec.height // factor, spec.width // factor)
    requests = [
        Request(prompt, small, fps, ask.seed + i, noise_THWC=pooled_noise(
            seeded_noise(ask.seed + i, spec, sampler.vae), factor) if factor > 1 else None)
        for i, prompt in enumerate(each for each in prompts for _ in range(ask.variations))]
    return (sampler(params, requests), [request.prompt for request in requests],
            [fps] * len(requests))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Decoded clips of one size and rate; shape: (frames, height, width) of what is made."""

    shape: tuple[int, int, int]
    fps: float
    clip_THWC: np.ndarray | None = None
    other_THWC: np.ndarray | None = None
    inside_THW: np.ndarray | None = None  # the mask: what is made anew


def read_inputs(ask: Ask, config: RunConfig, sampler: Sampler) -> Inputs:
    """The files of an edit, decoded as for training: as displayed, cut to the size's aspect."""
    path = ask.image or ask.video
    if path is None:
        spec = ask.spec
        return Inputs((spec.frames, spec.height, spec.width), ask.fps or DEFAULT_FPS)
    info = probe(path)
    multiple = sampler.vae.compression.space * max(sampler.model.config.patch[1:])
    if ask.edit == "outpaint" and ask.size is None:
        raise UserError("--outpaint needs --size, the size of the larger picture")
    size = None if ask.edit == "outpaint" else ask.size
    size = size or choose_size(info.height, info.width, config.data.max_pixels, multiple)
    rate = ask.fps or config.data.fps
    fps = rate if rate and info.fps > rate else None
    video = decode_video(
        path, num_frames=1 if ask.image else None, fps=fps, height=size[0], width=size[1])
    pixels_THWC = video.pixels_THWC
    fps = (ask.fps or DEFAULT_FPS) if len(pixels_THWC) == 1 else video.fps
    other_THWC, inside_THW = None, None
    if ask.video_b:
        other = probe(ask.video_b)
        other_THWC = decode_video(
            ask.video_b, fps=None if abs(other.fps / fps - 1) < 0.01 else fps, height=size[0],
            width=size[1]).pixels_THWC
    if ask.mask:
        inside_THW = read_mask(ask.mask, ask.video, info, fps, size, len(pixels_THWC))
    return Inputs((len(pixels_THWC), *size), fps, pixels_THWC, other_THWC, inside_THW)


def read_mask(path, video, info, fps, size, frames) -> np.ndarray:
    """inside_THW: where the mask is white. Raises UserError where it is not of the video's size."""
    mask = probe(path)
    if (mask.height, mask.width) != (info.height, info.width):
        raise UserError(f"--mask={path} is {mask.height}x{mask.width} and --video={video} is "
                        f"{info.height}x{info.width}; they must be of one size")
    moves = mask.num_frames != 1 and mask.fps and abs(mask.fps / fps - 1) > 0.01
    pixels_THWC = decode_video(
        path, fps=fps if moves else None, height=size[0], width=size[1]).pixels_THWC
    if len(pixels_THWC) not in (1, frames):
        raise UserError(f"--mask={path} has {len(pixels_THWC)} frames and --video={video} has "
                        f"{frames}; give one for each, or a single picture")
    inside_THW = pixels_THWC.astype(np.float32).mean(-1) > 127.5
    return np.broadcast_to(inside_THW, (frames, *size))


def cut(editor: Editor, ask: Ask, *arrays):
    """The first --frames frames of clips of one length; without it as many as 1 + k * time."""
    shortest = min(len(array) for array in arrays)
    frames = ask.frames or editing.whole_groups(shortest, editor.time)
    if frames > shortest:
        raise UserError(f"--frames={frames} and the input has {shortest}")
    return [array[:frames] for array in arrays]


def _image(editor, ask, inputs):
    return editing.extended(editor, inputs.clip_THWC, ask.frames or DEFAULT_FRAMES, "forward")


def _extend(editor, ask, inputs):
    frames = ask.frames or len(inputs.clip_THWC) + editor.window_frames // 2
    return editing.extended(editor, inputs.clip_THWC, frames, ask.extend)


def _gap(editor, ask, given: int) -> int:
    """New frames beside the given ones."""
    if ask.frames is None:
        return GAP_LATENTS * editor.time
    if ask.frames <= given:
        raise UserError(f"--frames={ask.frames} is the length of the whole clip, and {given} "
                        "frames are given; ask for more")
    return ask.frames - given


def _loop(editor, ask, inputs):
    clip_THWC = inputs.clip_THWC
    if clip_THWC is None:
        gap = GAP_LATENTS * editor.time
        frames = inputs.shape[0] - gap
        if frames < 1 + editor.time:
            raise UserError(f"--frames={inputs.shape[0]} is too short for a loop; at least "
                            f"{1 + editor.time + gap} are needed")
        request = Request(editor.prompt, VideoSpec(frames, *inputs.shape[1:]), editor.fps,
                          editor.seed)
        clip_THWC = editor.sampler(editor.params, [request])[0]
        silent = dataclasses.replace(editor, prompt="", paste=True)
        return editing.looped(silent, clip_THWC, gap)
    return editing.looped(editor, clip_THWC, _gap(editor, ask, len(clip_THWC)))


def _join(editor, ask, inputs):
    before, after = inputs.clip_THWC, inputs.other_THWC
    return editing.joined(editor, before, after, _gap(editor, ask, len(before) + len(after)))


def _inpaint(editor, ask, inputs):
    clip_THWC, inside_THW = cut(editor, ask, inputs.clip_THWC, inputs.inside_THW)
    strength = 1.0 if ask.strength is None else ask.strength
    return editing.filled(editor, clip_THWC, ~inside_THW, strength=strength)


def _outpaint(editor, ask, inputs):
    (clip_THWC,) = cut(editor, ask, inputs.clip_THWC)
    canvas_THWC, kept_THW = editing.on_canvas(clip_THWC, *ask.size, *ask.outpaint)
    return editing.filled(editor, canvas_THWC, kept_THW)


def _restyle(editor, ask, inputs):
    return editing.restyled(editor, *cut(editor, ask, inputs.clip_THWC), ask.strength)


def _compose(editor, ask, inputs):
    parts = cut(editor, ask, inputs.clip_THWC, inputs.other_THWC, inputs.inside_THW)
    return editing.composed(editor, *parts, ask.strength)


def _interpolate(editor, ask, inputs, prompts):
    if inputs.clip_THWC is None:
        if len(prompts) != 2:
            raise UserError(f"--interpolate between prompts takes two of --prompt, not "
                            f"{len(prompts)}; between clips it takes --video and --video_b")
        return editing.blended_prompts(editor, inputs.shape, tuple(prompts), ask.interpolate)
    if inputs.other_THWC is None or len(prompts) > 2:
        raise UserError("--interpolate between clips takes --video and --video_b, and at most two "
                        f"of --prompt ({len(prompts)} are given)")
    prompts = prompts or [""]
    clips = cut(editor, ask, inputs.clip_THWC, inputs.other_THWC)
    return editing.blended(editor, *clips, (prompts[0], prompts[-1]), ask.interpolate)


OPERATIONS = {
    "image": _image, "extend": _extend, "loop": _loop, "join": _join, "inpaint": _inpaint,
    "outpaint": _outpaint, "restyle": _restyle, "compose": _compose,
}
