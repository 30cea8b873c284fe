"""The editing flags: every command of docs/editing.md reads its files and gives the clip it says,
and flags that do not go together are refused in one line. Decoding is real, the model is not."""

import dataclasses
import pathlib
import re
import shlex
import types

import numpy as np
import pytest
from absl import flags

from configs import base
from sora_jax import edit_command, run_config, sample
from sora_jax.core.errors import UserError
from sora_jax.data.decode import decode_video
from sora_jax.data.encode import write_mp4
from sora_jax.tasks import editing
from sora_jax.tasks.contact_sheet import write_png
from tests.tasks.test_editing import NEW, LosslessVAE

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "editing.md"
COMMANDS = re.findall(r"^    python -m sora_jax\.sample (.*)$", DOCS.read_text(), re.M)


@dataclasses.dataclass(frozen=True)
class MarkingSampler:
    """Gives the source where it is known and NEW elsewhere."""

    sees_clean: bool = False
    packing: object = None
    settings = types.SimpleNamespace(resample_times=1)
    vae = LosslessVAE()
    model = types.SimpleNamespace(config=types.SimpleNamespace(patch=(1, 2, 2)))
    asked = []

    def __call__(self, params, requests):
        self.asked.extend((self, request) for request in requests)
        out = []
        for request in requests:
            shape = *self.vae.compression.latent_shape(request.spec), self.vae.config.z_dim
            latents = np.full(shape, NEW, np.float32)
            if request.edit and request.edit.known_THW is not None:
                known = np.repeat(np.repeat(request.edit.known_THW, 2, axis=1), 2, axis=2)
                latents = np.where(known[..., None], request.edit.source_THWC, latents)
            out.append(self.vae.decode_normalized(latents[None])[0])
        return out

    def without_fresh_noise(self):
        return self

    def noises(self, params, requests):
        return [np.ones_like(request.edit.source_THWC) for request in requests]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """a.mp4 (13 frames of 64 x 96), b.mp4 (9), a.png and mask.png of that size."""
    directory = tmp_path_factory.mktemp("inputs")
    ramp = np.broadcast_to(np.linspace(100, 250, 96)[None, None, :, None], (13, 64, 96, 3))
    write_mp4(directory / "a.mp4", ramp.astype(np.uint8), 8.0)
    write_mp4(directory / "b.mp4", ramp[:9, :, ::-1].astype(np.uint8), 8.0)
    write_png(directory / "a.png", ramp[0].astype(np.uint8))
    mask = np.zeros((64, 96, 3), np.uint8)
    mask[16:48, 32:64] = 255
    write_png(directory / "mask.png", mask)
    write_png(directory / "small.png", mask[:32])
    (directory / "broken.mp4").write_bytes(b"no video")
    return directory


def run(line, files, trained=False):
    """(ask, clips, prompts, rates) of a command line."""
    words = [re.sub(r"=(\w+\.(mp4|png))$", rf"={files}/\1", word)
             if not word.startswith("--out") else word for word in shlex.split(line)]
    values = flags.FlagValues()
    for flag in {**flags.FLAGS.flags_by_module_dict()}.values():
        for each in flag:
            if each.name in KNOWN:
                values[each.name] = _copy(each)
    values(["sample", *words])
    ask = edit_command.read_flags(
        values, values.frames, sample.parse_size(values.size), values.fps, values.seed)
    config = base.get_config()
    config.conditioning.prefix = 0.5 if trained else 0.0
    config = run_config.resolve(config)
    MarkingSampler.asked.clear()
    prompts = sample.read_prompts(
        values.prompt, values.prompt_file, needed=not (ask.video or ask.image))
    sampler = MarkingSampler(packing=config.packing)
    return ask, *edit_command.run(ask, config, sampler, {}, prompts)


KNOWN = {flag.name for module in ("sora_jax.runtime", "sora_jax.sample", "sora_jax.edit_command")
         for flag in flags.FLAGS.flags_by_module_dict().get(module, [])}


def _copy(flag):
    import copy

    fresh = copy.deepcopy(flag)
    fresh.unparse()
    return fresh


EXPECTED = {  # frames of every clip that comes out, by the line's most telling flag
    "--image": [17], "--extend=forward": [33], "--extend=backward": [33], "--video=a.mp4 --loop":
    [21], "--frames=25": [25], "--video_b=b.mp4 --out": [30], "--mask=mask.png --prompt": [13],
    "--outpaint": [13], "--strength=0.6 --prompt": [13], "--mask=mask.png --strength": [9],
    "--video_b=b.mp4 --interpolate": [9] * 5, "--interpolate=5 --out": [17] * 5,
    "--variations": [17] * 4, "--draft": [17],
}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_gives_clips_of_its_length(line, files):
    ask, clips, said, rates = run(line, files)
    expected = next(frames for word, frames in EXPECTED.items() if word in line)
    assert [len(clip) for clip in clips] == expected
    assert len(said) == len(rates) == len(clips) and set(rates) == {8.0}
    size = {"outpaint": (64, 128), "draft": (32, 48)}.get(ask.edit)
    if size:
        assert clips[0].shape[1:3] == size


def test_the_page_shows_every_edit(files):
    asked = {run(line, files)[0].edit for line in COMMANDS}
    assert asked == set(edit_command.EDITS)


def test_the_way_back_of_a_loop_is_made_without_the_prompt_of_its_clip(files):
    run("--prompt='a red circle moves left' --loop --size=64x64 --frames=25", files)
    assert [request.prompt for _, request in MarkingSampler.asked] == [
        "a red circle moves left", *[""] * editing.WAYS]
    run("--video=a.mp4 --loop --prompt='a red circle' --ways=2", files)
    assert [request.prompt for _, request in MarkingSampler.asked] == ["a red circle"] * 2


def test_inputs_are_decoded_as_for_training(files):
    _, (clip,), _, _ = run("--video=a.mp4 --extend=forward --frames=20", files)
    decoded = decode_video(files / "a.mp4").pixels_THWC
    np.testing.assert_array_equal(clip[:13], decoded)
    assert (clip[13:] == NEW).all()
    _, (clip,), _, _ = run("--video=a.mp4 --mask=mask.png", files)
    changed = (clip == NEW).all(-1)
    assert changed[:, 16:48, 32:64].all() and changed.sum() == 13 * 32 * 32


def test_what_stays_is_shown_clean_where_the_run_was_trained_so(files, capsys):
    for trained, known, clean in (
        (True, "auto", True), (False, "auto", False), (False, "clean", True),
        (True, "noised", False),
    ):
        run(f"--image=a.png --known={known}", files, trained)
        assert MarkingSampler.asked[0][0].sees_clean == clean
        told = capsys.readouterr().out
        assert ("shown to the model clean" in told) == clean
        assert ("trained with conditions" in told) == trained


@pytest.mark.parametrize("line, words", [
    ("--video=a.mp4", "--video ask for no edit together; possible are --draft; --image"),
    ("--image=a.png --loop", "ask for no edit together"),
    ("--video=a.mp4 --extend=forward --mask=mask.png", "ask for no edit together"),
    ("--video=a.mp4 --strength=1.5", "--strength=1.5 must be from 0"),
    ("--video=a.mp4 --mask=small.png", "is 32x96 and"),
    ("--video=a.mp4 --mask=b.mp4", "has 9 frames and"),
    ("--video=broken.mp4 --loop", "broken.mp4"),
    ("--video=absent.mp4 --loop", "absent.mp4"),
    ("--video=a.mp4 --strength=0.5 --frames=20", "--frames=20 and the input has 13"),
    ("--video=a.mp4 --loop --frames=13", "13 frames are given; ask for more"),
    ("--video=a.mp4 --outpaint=0,32", "--outpaint needs --size"),
    ("--video=a.mp4 --outpaint=x,32 --size=64x128", "--outpaint=x,32 should be TOP,LEFT"),
    ("--video=a.mp4 --loop --window=18", "near are 17 and 21"),
    ("--video=a.mp4 --strength=0.5 --window=17", "--window=17 is of"),
    ("--video=a.mp4 --strength=0.5 --paste", "--paste is of"),
    ("--video=a.mp4 --strength=0.5 --ways=2", "--ways=2 is of"),
    ("--video=a.mp4 --loop --ways=0", "--ways=0 must be at least 1"),
    ("--video=a.mp4 --loop --variations=0", "--variations=0 must be at least 1"),
    ("--prompt=a --interpolate=3", "takes two of --prompt, not 1"),
    ("--prompt=a --prompt=b --interpolate=1", "at least 2"),
    ("--prompt=a --loop --frames=9", "too short for a loop"),
    ("--prompt=a --draft --size=48x48", "multiples of 32"),
    ("--loop", "nothing to make"),
])
def test_what_does_not_go_together_is_one_line(line, words, files):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        run(line, files)
    assert "\n" not in str(caught.value)
