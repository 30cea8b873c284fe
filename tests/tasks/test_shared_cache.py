"""A cache that several processes build is that of one, or there is none."""

import functools
import threading

import numpy as np
import pytest
from as_processes import Died, run

from sora_jax import shared_work
from sora_jax.core.errors import UserError
from sora_jax.data.latent_cache import CacheKey, CacheWriter, open_cache
from sora_jax.data.sharded_records import INDEX
from sora_jax.tasks import shared_cache

KEY = CacheKey("dataset", "vae", "clips", "bytes")
NUM_CLIPS = 11


def add(writer, i):
    """Clip i, of which every third stands at two sizes and two neighbours are one video."""
    writer.add(f"clip {i}", np.full((1, 2, 2, 4), i), ("a", f"größer {i}")[: i % 3], 1, 16, 16 + i,
               0.1 * i, clip=f"video {(7 * i) % NUM_CLIPS // 2}", resolutions=(i % 2,))


def build(directory, index, fail=lambda index: None, check=lambda total: None):
    def write(writer):
        mine = shared_work.run_of(range(1, 1 + NUM_CLIPS))
        for i in mine:
            add(writer, i)
        fail(index)
        return len(mine)

    return shared_cache.build(
        directory, functools.partial(CacheWriter, directory, KEY, 4, shard_bytes=200), write, check)


@pytest.mark.parametrize("count", [2, 4, 16])
def test_it_holds_the_same_in_the_same_order(monkeypatch, tmp_path, count):
    one, several = tmp_path / "one", tmp_path / "several"
    (tmp_path / "several.part-00099").mkdir()  # of a run of more processes that was killed
    assert run(monkeypatch, 1, lambda index: build(one, index)) == [NUM_CLIPS]
    totals = run(monkeypatch, count, lambda index: build(several, index))
    assert totals == [NUM_CLIPS] * count
    assert (one / INDEX).read_bytes() == (several / INDEX).read_bytes()
    caches = open_cache(one, KEY), open_cache(several, KEY)
    for i in range(NUM_CLIPS):
        a, b = (cache[i] for cache in caches)
        assert (a.id, a.captions, a.fps) == (b.id, b.captions, b.fps)
        np.testing.assert_array_equal(a.latents_THWC, b.latents_THWC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several"]


def test_an_error_of_one_process_is_that_of_all_and_leaves_what_was_there(monkeypatch, tmp_path):
    def fail(index):
        if index == 1:
            raise UserError("the disk is full")

    def too_many(total):
        raise UserError(f"{total} are too many")

    for options, told in (({"fail": fail}, "process 1: the disk is full"),
                          ({"check": too_many}, "11 are too many")):
        errors = run(monkeypatch, 3, lambda index: build(tmp_path / "cache", index, **options))  # noqa: B023
        assert [str(error) for error in errors] == [told] * 3
        assert not list(tmp_path.iterdir())
    run(monkeypatch, 3, lambda index: build(tmp_path / "cache", index))
    errors = run(monkeypatch, 3, lambda index: build(tmp_path / "cache", index, fail))
    assert all(isinstance(error, UserError) for error in errors)
    assert len(open_cache(tmp_path / "cache", KEY)) == NUM_CLIPS


@pytest.mark.parametrize("dead", [0, 2])
def test_a_process_that_dies_leaves_no_cache_and_a_later_run_makes_it(monkeypatch, tmp_path, dead):
    def die(index):
        if index == dead:
            raise Died

    ends = run(monkeypatch, 3, lambda index: build(tmp_path / "cache", index, die))
    assert [type(end) for i, end in enumerate(ends) if i != dead] == [
        threading.BrokenBarrierError] * 2
    with pytest.raises(UserError, match="no latent cache"):
        open_cache(tmp_path / "cache", KEY)
    assert list(tmp_path.glob("cache.part-*")), "the others had written theirs"
    assert run(monkeypatch, 2, lambda index: build(tmp_path / "cache", index)) == [NUM_CLIPS] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_processes_that_do_not_share_a_disk_are_told_so(monkeypatch, tmp_path):
    ends = run(monkeypatch, 2, lambda index: build(tmp_path / str(index) / "cache", index))
    for end in ends:
        assert "cache.part-00001, which process 1 has written, cannot be read" in str(end)
        assert "on a disk that all processes share" in str(end)
