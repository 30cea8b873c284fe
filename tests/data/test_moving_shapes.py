"""The world is what its captions and its state say; a prepared dataset is whole or absent."""

import dataclasses
import errno
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.data.decode import decode_video
from sora_jax.data.moving_shapes import builder, examples
from sora_jax.data.moving_shapes.captions import (
    Fact,
    long_caption,
    parse_caption,
    short_caption,
)
from sora_jax.data.moving_shapes.drawing import AREAS, EXTENTS, coverage
from sora_jax.data.moving_shapes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    EDGES,
    SHAPES,
    SIZES,
    SPEEDS,
    TONES,
    combinations,
)
from sora_jax.data.moving_shapes.world import STRAIGHT_SHARE, ShapesSpec, generate
from sora_jax.data.sources import open_source

ROOT = pathlib.Path(__file__).parents[2]
NUM_CLIPS = 400


@pytest.fixture(scope="module")
def train_clips():
    return [generate(0, index, ShapesSpec()) for index in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def held_out_clips():
    return [generate(0, index, ShapesSpec("held_out")) for index in range(NUM_CLIPS)]


def shapes_of(clips):
    return [(clip, shape) for clip in clips for shape in clip.state["shapes"]]


def combination(shape):
    return shape["colour"], shape["shape"], shape["direction"]


def test_a_clip_is_a_function_of_seed_index_and_spec(train_clips):
    again = generate(0, 7, ShapesSpec())
    np.testing.assert_array_equal(again.pixels_THWC, train_clips[7].pixels_THWC)
    assert again.state == train_clips[7].state
    for other in (generate(1, 7, ShapesSpec()), generate(0, 8, ShapesSpec())):
        assert other.state != again.state


def test_train_and_held_out_share_no_combination(train_clips, held_out_clips):
    train = {combination(shape) for _, shape in shapes_of(train_clips)}
    held_out = {combination(shape) for _, shape in shapes_of(held_out_clips)}
    assert train <= set(combinations("train")) and held_out == set(combinations("held_out"))
    assert not set(combinations("train")) & set(combinations("held_out"))
    assert len(combinations("train")) == 7 * len(combinations("held_out")) == 168


def test_every_pair_of_attributes_occurs_in_train_and_held_out_is_balanced():
    words = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS))
    for axes in itertools.combinations(range(3), 2):
        wanted = set(itertools.product(*(words[axis] for axis in axes)))
        assert {tuple(c[axis] for axis in axes) for c in combinations("train")} == wanted
    for axis in range(3):
        held_out = [c[axis] for c in combinations("held_out")]
        assert {held_out.count(word) for word in words[axis]} == {24 // len(words[axis])}


def test_state_gives_the_centre_of_area_of_every_frame():
    spec = ShapesSpec(two_shape_share=0, textured_share=0, sizes=((32, 48, 1.0), (64, 64, 1.0)))
    for index in range(40):
        clip = generate(3, index, spec)
        (shape,) = clip.state["shapes"]
        pixels = clip.pixels_THWC.astype(float)
        corner = pixels[0, 0, 0] if shape["centers_T2"][0][0] > 24 else pixels[0, 0, -1]
        alpha_THW = (pixels - corner) @ (np.array(shape["rgb"]) - corner)
        alpha_THW /= np.sum((np.array(shape["rgb"]) - corner) ** 2)
        area_T = alpha_THW.sum((1, 2))
        y, x = np.mgrid[:pixels.shape[1], :pixels.shape[2]] + 0.5
        centers_T2 = np.stack([(alpha_THW * x).sum((1, 2)), (alpha_THW * y).sum((1, 2))], -1)
        np.testing.assert_allclose(centers_T2 / area_T[:, None], shape["centers_T2"], atol=0.12)
        np.testing.assert_allclose(area_T, AREAS[shape["shape"]] * shape["radius"] ** 2, rtol=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_sums_to_the_area_at_any_sub_pixel_place(shape):
    rng = np.random.default_rng(0)
    centers_T2 = 20 + rng.random((50, 2))
    zeros = np.zeros(50)
    covered = coverage(shape, 11.3, centers_T2, zeros, zeros, 41, 41)
    np.testing.assert_allclose(covered.sum((1, 2)), AREAS[shape] * 11.3**2, rtol=0.01)
    # A shift by whole pixels shifts the picture.
    moved = coverage(shape, 11.3, centers_T2 + [3, -2], zeros, zeros, 41, 41)
    np.testing.assert_allclose(moved[:, :-2, 3:], covered[:, 2:, :-3], atol=1e-4)


def test_shapes_stay_inside_and_bounce_elastically(train_clips, held_out_clips):
    for clip, shape in shapes_of(train_clips + held_out_clips):
        num_frames, height, width, _ = clip.pixels_THWC.shape
        centers_T2 = np.array(shape["centers_T2"])
        left, right, up, down = np.array(EXTENTS[shape["shape"]]) * shape["radius"]
        assert (centers_T2 >= [left - 1e-9, up - 1e-9]).all()
        assert (centers_T2 <= [width - right + 1e-9, height - down + 1e-9]).all()
        speed = SPEEDS[shape["speed"]] * min(height, width)
        velocities_T2 = np.array(shape["velocities_T2"])
        np.testing.assert_allclose(np.hypot(*velocities_T2.T), speed)
        first = num_frames if shape["bounce_frame"] is None else int(shape["bounce_frame"]) + 1
        steps_T2 = np.diff(centers_T2, axis=0)[:first - 1]
        np.testing.assert_allclose(
            steps_T2, np.broadcast_to(np.array(DIRECTIONS[shape["direction"]]) * speed,
                                      steps_T2.shape), atol=1e-9)
        assert first > STRAIGHT_SHARE * (num_frames - 1)
        if shape["bounce_edge"]:
            x, y = centers_T2[0] + velocities_T2[0] * shape["bounce_frame"]
            gaps = {"left": x - left, "right": width - right - x,
                    "top": y - up, "bottom": height - down - y}
            np.testing.assert_allclose(gaps[shape["bounce_edge"]], 0, atol=1e-6)
            assert min(gaps.values()) > -1e-6


def test_bounces_images_and_pairs_are_as_frequent_as_promised(train_clips):
    full = [clip for clip in train_clips if len(clip.pixels_THWC) == 17]
    bounces = [any(s["bounce_edge"] for s in clip.state["shapes"]) for clip in full]
    assert np.mean(bounces) >= 0.25
    assert 0.07 < np.mean([len(clip.pixels_THWC) == 1 for clip in train_clips]) < 0.17
    assert 0.18 < np.mean([len(clip.state["shapes"]) == 2 for clip in train_clips]) < 0.32
    assert {clip.state["background"] for clip in train_clips} == set(BACKGROUNDS)
    sizes = {clip.pixels_THWC.shape[1:3] for clip in train_clips}
    assert sizes == {(height, width) for height, width, _ in ShapesSpec().sizes}


def test_captions_say_what_the_state_says(train_clips, held_out_clips):
    for clip in train_clips + held_out_clips:
        json.dumps(clip.state)
        moving = len(clip.pixels_THWC) > 1
        shapes = clip.state["shapes"]
        assert len({shape["colour"] for shape in shapes}) == len(shapes)
        wanted = tuple(
            Fact(s["colour"], s["shape"], s["direction"] if moving else None,
                 s["speed"] if moving else None, s["size"]) for s in shapes
        )
        assert parse_caption(clip.long_caption) == wanted
        short = parse_caption(clip.short_caption)
        silent = {fact.speed is None for fact in short}
        assert len(silent) == 1 and all(fact.size is None for fact in short)
        assert [dataclasses.replace(f, size=None, speed=None) for f in wanted] == [
            dataclasses.replace(f, speed=None) for f in short]
        for shape in shapes:
            if shape["bounce_edge"]:
                assert f"bounces off the {shape['bounce_edge']} edge" in clip.long_caption


def test_parsing_inverts_writing_for_every_fact():
    combos = combinations("train") + combinations("held_out")
    motionless = sorted({(colour, shape, None) for colour, shape, _ in combos})
    for number, (colour, shape, direction) in enumerate(combos + motionless):
        for speed in (None, *SPEEDS) if direction else (None,):
            fact = Fact(colour, shape, direction, speed)
            other = Fact(*combos[(number * 7 + 3) % len(combos)], speed)
            if direction is None:
                other = dataclasses.replace(other, direction=None)
            for facts in ((fact,), (fact, other), (other, fact)):
                assert parse_caption(short_caption(facts)) == facts
                for size in SIZES:
                    sized = tuple(dataclasses.replace(f, size=size) for f in facts)
                    edges = [(None, *EDGES)[(number + i) % 5] for i in range(len(facts))]
                    kind = BACKGROUNDS[number % len(BACKGROUNDS)]
                    text = long_caption(sized, edges, TONES[number % 2], kind)
                    assert parse_caption(text) == sized


def test_prompts_are_read_whatever_their_case_and_spaces():
    assert parse_caption(" A red  Circle moves Left. ") == (Fact("red", "circle", "left"),)


@pytest.mark.parametrize("prompt", [
    "", "a red circle moves sideways", "a pink circle", "a red circle moves left fast",
    "two red circles", "a red circle moves left and", "x a red circle",
])
def test_a_prompt_outside_the_world_is_refused_with_an_example(prompt):
    with pytest.raises(UserError, match="a red circle moves left"):
        parse_caption(prompt)


@pytest.mark.parametrize("change, words", [
    ({"split": "test"}, "'test'"), ({"sizes": ()}, "sizes"), ({"sizes": ((16, 32, 1.0),)}, "16x32"),
    ({"frames": ((0, 1.0),)}, "frames = 0"), ({"frames": ((1, -1.0),)}, "frames"),
    ({"two_shape_share": 1.5}, "two_shape_share = 1.5"), ({"fps": 0.0}, "fps = 0"),
    ({"train_two_shape_share": -0.5}, "train_two_shape_share = -0.5"),
])
def test_an_impossible_spec_is_refused_by_value(change, words):
    with pytest.raises(UserError, match=words):
        ShapesSpec(**change)


def test_more_clips_of_two_shapes_to_train_on_leave_the_held_out_ones_as_they_are():
    world = ShapesSpec(two_shape_share=0.0)
    more = dataclasses.replace(world, train_two_shape_share=1.0)
    for index in range(5):
        assert len(generate(0, index, more).state["shapes"]) == 2
        assert len(generate(0, index, world).state["shapes"]) == 1
        ours, theirs = (generate(0, index, dataclasses.replace(spec, split="held_out"))
                        for spec in (more, world))
        assert ours.state == theirs.state
        np.testing.assert_array_equal(ours.pixels_THWC, theirs.pixels_THWC)


SMALL = {"seed": 5, "num_train": 6, "num_held_out": 3,
         "spec": ShapesSpec(sizes=((32, 32, 1.0),), frames=((5, 1.0),))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("shapes")
    return data_dir, builder.prepare(data_dir, **SMALL)


def test_a_prepared_dataset_gives_the_generated_clips_back(prepared):
    _, directory = prepared
    for split, count in (("train", 6), ("held_out", 3)):
        source = open_source(str(directory), split)
        assert len(source) == count
        for index in range(count):
            record = source[index]
            clip = generate(5, index, dataclasses.replace(SMALL["spec"], split=split))
            np.testing.assert_array_equal(
                decode_video(record.video_bytes).pixels_THWC, clip.pixels_THWC)
            assert record.captions == (clip.short_caption, clip.long_caption)
            assert record.metadata == clip.state
            assert (record.num_frames, record.height, record.width) == clip.pixels_THWC.shape[:3]
            assert record.fps == clip.fps == decode_video(record.video_bytes).fps


def test_a_whole_dataset_is_reused_and_another_spec_is_another_dataset(prepared, monkeypatch):
    data_dir, directory = prepared

    def never(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(builder, "_build", never)
    assert builder.prepare(data_dir, **SMALL) == directory
    changed_spec = dataclasses.replace(SMALL["spec"], two_shape_share=0.3)
    for change in ({"seed": 6}, {"num_train": 7}, {"num_held_out": 4}, {"spec": changed_spec}):
        with pytest.raises(AssertionError, match="generated again"):
            builder.prepare(data_dir, **{**SMALL, **change})


@pytest.mark.parametrize("damage", ["cut shard", "lost shard", "lost manifest", "odd manifest",
                                    "another manifest"])
def test_a_damaged_dataset_is_generated_again_with_the_same_content(prepared, damage):
    data_dir, directory = prepared
    fingerprint = open_source(str(directory), "train").fingerprint
    shard = next(directory.glob("*-train.array_record-*"))
    if damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "lost shard":
        shard.unlink()
    elif damage == "lost manifest":
        (directory / builder.MANIFEST).unlink()
    elif damage == "odd manifest":
        (directory / builder.MANIFEST).write_text("[1]")
    else:
        text = (directory / builder.MANIFEST).read_text()
        assert '"seed": 5' in text
        (directory / builder.MANIFEST).write_text(text.replace('"seed": 5', '"seed": 6'))
    assert builder.prepare(data_dir, **SMALL) == directory
    assert '"seed": 5' in (directory / builder.MANIFEST).read_text()
    assert open_source(str(directory), "train").fingerprint == fingerprint


def test_a_shard_that_was_written_short_is_never_taken_as_whole(tmp_path, monkeypatch):
    build = builder._build

    def build_and_cut(data_dir, config, parent, directory):
        build(data_dir, config, parent, directory)
        shard = next(directory.glob("*-train.array_record-*"))
        shard.write_bytes(shard.read_bytes()[:-40_000])

    monkeypatch.setattr(builder, "_build", build_and_cut)
    with pytest.raises(OSError, match="not written whole"):
        builder.prepare(tmp_path, **SMALL)
    assert not list(tmp_path.rglob(builder.MANIFEST))
    monkeypatch.setattr(builder, "_build", build)
    assert len(open_source(str(builder.prepare(tmp_path, **SMALL)), "train")) == 6


def test_a_full_disk_is_one_line_and_leaves_no_dataset(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(examples, "encode_video", full)
    with pytest.raises(UserError, match="no space left"):
        builder.prepare(tmp_path, **SMALL)
    assert not list(tmp_path.rglob("*.0.0")) and not list(tmp_path.rglob("*.array_record*"))


KILLED_AT_THE_FOURTH_CLIP = """
import os, signal, sys
from sora_jax.data.moving_shapes import builder, examples
from tests.data.test_moving_shapes import SMALL
encode, calls = examples.encode_video, []
def deadly(*arguments):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
examples.encode_video = deadly
builder.prepare(sys.argv[1], **SMALL)
"""


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_AT_THE_FOURTH_CLIP, str(tmp_path)],
                          cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*incomplete*")), "the process should have been at work"
    directory = builder.prepare(tmp_path, **SMALL)
    assert len(open_source(str(directory), "train")) == 6
    assert not list(tmp_path.rglob("*incomplete*"))


def test_several_processes_draw_what_one_draws_in_the_same_order():
    spec, indices = SMALL["spec"], range(3, 10)
    alone = list(examples.examples(5, spec, indices, num_children=0))
    assert [name for name, _ in alone] == [f"train-{index:06d}" for index in indices]
    assert list(examples.examples(5, spec, indices, num_children=3)) == alone


def test_a_process_that_dies_drawing_ends_the_dataset_and_the_others(monkeypatch):
    children, popen = [], subprocess.Popen

    def kept(*arguments, **options):
        children.append(popen(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", kept)
    clips = examples.examples(5, SMALL["spec"], range(1000), num_children=2)
    next(clips)
    children[1].kill()
    with pytest.raises(RuntimeError, match="ended with exit status -9"):
        list(clips)
    assert all(child.returncode is not None for child in children)


@pytest.mark.parametrize("change, words", [
    ({"seed": -1}, "seed = -1"), ({"num_train": 0}, "num_train = 0"),
    ({"num_held_out": 0}, "num_held_out = 0"),
])
def test_impossible_counts_are_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        builder.prepare(tmp_path, **{**SMALL, **change})


def test_a_data_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another data directory"):
        builder.prepare(tmp_path / "file", **SMALL)


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/moving_shapes.md").read_text()
    examples = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})  # noqa: S102 - our own page
    assert "moves" in capsys.readouterr().out
