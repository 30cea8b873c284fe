"""What benchmarks count and how they cut: the figures in docs/performance.md rest on it."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def import_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def test_flops_of_dit_s2_are_the_papers_and_those_of_packed_clips_add_up(import_benchmark):
    our_step, cases = import_benchmark("our_step"), import_benchmark("cases")
    one = our_step.train_flops(cases.make_case("dit_s2", 1))
    # 6.06 Gflops (multiply-adds) of a forward pass: DiT, arXiv 2212.09748, table 4
    assert one / 6 / 1e9 == pytest.approx(6.06, rel=2e-3)
    assert our_step.train_flops(cases.make_case("dit_s2", 5)) == 5 * one


def test_training_flops_of_a_large_packed_row_are_near_the_closed_form(import_benchmark):
    """3 N L d (24 d + 4 s) + 36 d^2 L per clip, s the mean length that a token attends in."""
    our_step, cases = import_benchmark("our_step"), import_benchmark("cases")
    case = cases.make_case("dit_1b", 1)
    lengths = np.array([np.prod(size) for size in case.rows[0]], float)
    N, L, d, s = lengths.sum(), case.num_layers, case.width, (lengths**2).sum() / lengths.sum()
    expected = 3 * N * L * d * (24 * d + 4 * s) + 36 * d**2 * L * len(lengths)
    assert our_step.train_flops(case) == pytest.approx(expected, rel=0.02)


def test_a_batch_holds_the_cases_clips_and_nothing_else(import_benchmark):
    cases = import_benchmark("cases")
    case = cases.make_case("packed_30m", 2)
    batch = cases.make_batch(case)
    assert (batch["segment_BN"] > 0).sum() == case.useful_tokens
    assert case.useful_tokens > 0.95 * 2 * case.row_tokens
    for row, clips in enumerate(case.rows):
        for number, size in enumerate(clips, 1):
            mine = batch["segment_BN"][row] == number
            assert mine.sum() == np.prod(size)
            assert tuple(batch["position_BN3"][row][mine].max(0) + 1) == size


@pytest.mark.parametrize("count", [1, 3, 7])
def test_no_other_buckets_pad_less(count, import_benchmark):
    packing = import_benchmark("packing")
    lengths = packing.draw_clips(300).prod(axis=1)

    def slots(bounds):
        return np.array(sorted(bounds))[np.searchsorted(sorted(bounds), lengths)].sum()

    bounds = packing.tight_buckets(lengths, count)
    assert len(bounds) == count and bounds[-1] == lengths.max()
    rng = np.random.default_rng(0)
    for _ in range(50):
        others = [*rng.choice(np.unique(lengths)[:-1], count - 1, replace=False), lengths.max()]
        assert slots(bounds) <= slots(others)


def test_without_torch_one_line_says_what_to_install():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_step.py"), "--case=tiny", "--rows=1",
         "--contestants=torch eager"], capture_output=True, text=True, timeout=120)
    if "torch 2" in done.stdout:
        pytest.skip("torch is installed")
    assert "PyTorch is missing; pip install torch" in done.stdout
