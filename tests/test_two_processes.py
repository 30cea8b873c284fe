"""Two and four processes with two devices each: rows, sums, checkpoints, files and figures are
those of one process."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run
from test_checkpoint import equal, make_state, restore

from sora_jax.data import latent_cache, text_cache
from sora_jax.data.sharded_records import INDEX
from sora_jax.metrics import read_json_lines

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, count=2, timeout=240):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "local.py", f"--num-processes={count}",
         "--module=two_processes", "--", "--dead_peer_seconds=30", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True, capture_output=True, timeout=timeout)


def test_two_processes_feed_their_rows_and_share_checkpoints_with_one(tmp_path):
    """Step 2 is damaged on the disk, 3 and 4 for process 1 alone: both processes go on with 1
    and save 2 anew."""
    process = run(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    equal(restore(tmp_path), make_state(2))
    damaged = sorted(path.name for path in (tmp_path / "checkpoints_damaged").iterdir())
    assert damaged == ["2.0", "3.0", "4.0"]
    expected = float(np.sum(np.arange(32).reshape(16, 2) * np.arange(16)[:, None]))
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": expected}]


def test_an_exception_in_one_process_ends_both_and_shows_its_traceback(tmp_path):
    begin = time.monotonic()
    process = run(tmp_path, "raise")
    assert process.returncode == 1, process.stdout + process.stderr
    assert "[1] ValueError: for no reason" in process.stderr
    assert "error: process 1 of 2 ended with 1; the others are ended (1 " in process.stderr
    assert time.monotonic() - begin < 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with the run of tiny_run.py made by one, two and four processes."""
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("whole")
    tiny_run.write_encoder(directory)
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.replace_parts(patch.setattr)
        tiny_run.make(tiny_run.config(directory), directory / "one")
    for count in (4, 2):
        process = run(directory, "whole", count=count, timeout=600)
        assert process.returncode == 0, process.stdout + process.stderr
    return directory


@pytest.mark.parametrize("count", ["two", "four"])
def test_the_losses_of_training_are_those_of_one_process(whole, count):
    one, several = (read_json_lines(whole / name / "metrics.jsonl") for name in ("one", count))
    assert [row["step"] for row in several] == list(range(1, tiny_run.STEPS + 1))
    for name in ("loss", "num_clips", "useful_tokens"):
        np.testing.assert_allclose(
            [row[name] for row in several], [row[name] for row in one], rtol=1e-5)


@pytest.mark.parametrize("count", ["two", "four"])
def test_caches_that_processes_encode_together_hold_what_one_would_write(whole, count):
    for split in ("train", "held_out"):
        one, several = (whole / name / "latents" / split for name in ("one", count))
        assert (several / INDEX).read_bytes() == (one / INDEX).read_bytes()
        caches = latent_cache.open_cache(one), latent_cache.open_cache(several)
        assert len(list(several.glob("*.array_record"))) > 1, "each process has written a part"
        for i in range(len(caches[0])):
            a, b = (cache[i] for cache in caches)
            np.testing.assert_array_equal(a.latents_THWC, b.latents_THWC)
            assert (a.id, a.captions) == (b.id, b.captions)
        one, several = (
            whole / name / "latents" / "text" / split for name in ("one", count))
        assert (several / INDEX).read_bytes() == (one / INDEX).read_bytes()
        assert text_cache.open_text_cache(one).key == text_cache.open_text_cache(several).key
    assert not list((whole / count / "latents").rglob("*.part-*"))


@pytest.mark.parametrize("by", ["two", "four"])
def test_figures_are_those_of_one_process_and_written_once(whole, by):
    assert len(read_json_lines(whole / by / "eval.jsonl")) == 1
    one, several = (tiny_run.figures(whole / name) for name in ("one", by))
    assert list(one) == list(several) and one["prompt_match_count"] == 5
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=1e-4, err_msg=name)
    clips = [json.loads((whole / name / "vae_clips.json").read_text())["clips"]
             for name in ("one", by)]
    assert [clip["clip"] for clip in clips[0]] == [clip["clip"] for clip in clips[1]]
    for a, b in zip(*clips, strict=True):
        np.testing.assert_allclose(a["psnr"], b["psnr"], rtol=1e-4)


def test_a_checkpoint_of_four_processes_is_restored_bit_for_bit_by_one(whole):
    """And by two, which compare it themselves."""
    equal(restore(whole / "saved"), make_state(7))
