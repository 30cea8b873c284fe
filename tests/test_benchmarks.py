"""What benchmarks count and how they cut: the figures in docs/performance.md rest on it."""

import importlib.util
import pathlib
import subprocess
import sys
import types

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


@pytest.mark.skipif(bool(importlib.util.find_spec("torch")), reason="torch is installed")
def test_without_torch_one_line_says_what_to_install():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_step.py"), "--case=tiny", "--rows=1",
         "--contestants=torch eager"], capture_output=True, text=True, timeout=120)
    assert "PyTorch is missing; pip install torch" in done.stdout


def test_a_contestant_that_is_killed_ends_the_comparison_with_one_line(import_benchmark):
    worker = import_benchmark("worker")
    program = "import os; print('{}', flush=True); input(); os.kill(os.getpid(), 9)"
    contestant = worker.Contestant("torch", [sys.executable, "-c", program], {})
    for _ in range(2):  # in the middle of a round, and before the next one
        with pytest.raises(SystemExit, match="torch ended in the middle with -9 .*--rows"):
            contestant.run(1)
    contestant.end()


@pytest.fixture
def moving_picture():
    """9 frames of 32x48: smooth colours that move, and a fine pattern."""
    t, y, x = np.meshgrid(np.arange(9), np.arange(32), np.arange(48), indexing="ij")
    colours = [np.sin((x + 2 * t) / 7), np.cos((y - t) / 5), np.sin((x + y) / 1.5)]
    return np.rint(127.5 + 100 * np.stack(colours, -1)).astype(np.uint8)


def test_quantised_latents_are_within_half_a_step_and_bytes_are_the_bits(import_benchmark):
    codecs = import_benchmark("codecs_of_frames")
    latents_THWC = np.random.default_rng(0).normal(0, [1, 5, 0.1], (3, 4, 5, 3)).astype(np.float32)
    for bits in (3, 8):
        again_THWC, num_bytes = codecs.quantized(latents_THWC, bits)
        step_C = np.ptp(latents_THWC, (0, 1, 2)) / (2**bits - 1)
        assert (np.abs(again_THWC - latents_THWC) <= 0.501 * step_C).all()
        assert num_bytes == -(-3 * 4 * 5 * 3 * bits // 8) + 8 * 3
        assert all(len(np.unique(again_THWC[..., c])) <= 2**bits for c in range(3))


def test_rescaling_never_keeps_more_values_and_takes_the_best_way(import_benchmark, moving_picture):
    codecs = import_benchmark("codecs_of_frames")
    full = codecs.rescaled(moving_picture, moving_picture.size)
    np.testing.assert_array_equal(full.pixels_THWC, moving_picture)
    sizes = [codecs.rescaled(moving_picture, n).size for n in (60, 500, 1200, 4000)]
    assert all(0.6 * n < size <= n for n, size in zip((60, 500, 1200, 4000), sizes, strict=True))
    still = np.repeat(moving_picture[:1], 9, axis=0)
    kept = codecs.rescaled(still, 3 * still[0].size)
    np.testing.assert_array_equal(kept.pixels_THWC, still)  # a quarter of the frames is enough
    assert "3x32x48" in kept.variant
    with pytest.raises(ValueError, match="do not hold 9 frames"):
        codecs.rescaled(moving_picture, 8)


def test_codecs_take_the_highest_quality_within_their_bytes(import_benchmark, moving_picture):
    from sora_jax.evaluation.pixel_metrics import psnr

    codecs = import_benchmark("codecs_of_frames")
    for codec in (codecs.jpeg, codecs.h264):
        before = 0.0
        for budget in (1800, 3000, 4300):
            stored = codec(moving_picture, budget)
            assert stored.size <= budget, codec
            assert psnr(stored.pixels_THWC, moving_picture) > before
            before = psnr(stored.pixels_THWC, moving_picture)
        best = codec(moving_picture, 100_000)
        assert psnr(best.pixels_THWC, moving_picture) > 35  # the colours come back as they were
    assert codecs.jpeg(moving_picture, 10).size > 10  # the smallest, where none fits


def test_counted_bytes_are_the_pictures_without_headers(import_benchmark, moving_picture):
    import io

    from PIL import Image

    codecs = import_benchmark("codecs_of_frames")
    file = io.BytesIO()
    Image.fromarray(moving_picture[0]).save(file, "JPEG", quality=50, comment=b"x" * 999)
    plain = io.BytesIO()
    Image.fromarray(moving_picture[0]).save(plain, "JPEG", quality=50)
    assert codecs.scan_bytes(file.getvalue()) == codecs.scan_bytes(plain.getvalue())
    assert 550 < len(plain.getvalue()) - codecs.scan_bytes(plain.getvalue()) < 650
    stream = codecs.encode_h264(moving_picture, 30, "yuv420p")
    assert b"x264" in stream  # the encoder's note, several hundred bytes
    assert codecs.nal_bytes(stream) < len(stream) - 500
    note = b"\x00\x00\x01\x06" + b"y" * 500
    assert codecs.nal_bytes(note + stream) == codecs.nal_bytes(stream)


def test_a_vae_is_compared_on_its_own_clip_at_its_own_size(import_benchmark, moving_picture):
    from sora_jax.tasks import latents
    from sora_jax.weights.vae_files import load_vae

    references = import_benchmark("vae_references")
    vae = load_vae("builtin:moving_shapes")
    latents_THWC = np.asarray(vae.encode_normalized(moving_picture[None]))[0]
    (again_THWC,) = latents.decode(vae, [latents_THWC])
    found = references.compare(vae, moving_picture, latents_THWC, again_THWC, bits=8)
    assert found["vae"]["size"] == 3 * 4 * 6 * 16 and found["bicubic"]["size"] <= 3 * 4 * 6 * 16
    allowed = found["vae, 8 bits"]["size"]
    assert allowed == 3 * 4 * 6 * 16 + 8 * 16
    assert max(found["jpeg"]["size"], found["h264"]["size"]) <= allowed
    assert abs(found["vae"]["psnr"] - found["vae, 8 bits"]["psnr"]) < 1
    row = references.table([{"figures": found}]).splitlines()[3]
    assert row.startswith("| bicubic | 1 |")
    assert f"{found['vae']['psnr'] - found['bicubic']['psnr']:+.2f}" in row


def test_a_curve_goes_through_its_points(import_benchmark, tmp_path):
    from PIL import Image

    plot_curve = import_benchmark("plot_curve")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.jsonl").write_text(
        '{"step": 10, "vae_psnr": 20.0}\n{"step": 20, "other": 1}\n{"step": 30, "vae_psnr": 24.0}\n'
        '{"step": 30, "vae_psnr": 25.0}\n')
    assert plot_curve.points(tmp_path / "run" / "eval.jsonl", "vae_psnr") == [(10, 20), (30, 25)]
    assert plot_curve.ticks(19.6, 25.4) == [20, 21, 22, 23, 24, 25]
    out = tmp_path / "curve.png"
    plot_curve.main([str(out), f"--runs={tmp_path / 'run'}", "--line=22:bicubic"])
    picture = np.asarray(Image.open(out)).astype(int)
    blue = np.argwhere(picture[..., 2] - picture[..., 0] > 80)
    left, right = blue[blue[:, 1].argmin()], blue[blue[:, 1].argmax()]
    assert left[0] > right[0] + 150  # it rises, over two thirds of the width
    assert right[1] - left[1] > 400


def test_every_sampler_and_number_of_steps_is_measured_once(
        import_benchmark, tmp_path, monkeypatch, capsys):
    from sora_jax.data.moving_shapes.world import ShapesSpec, generate

    sampler_steps = import_benchmark("sampler_steps")
    spec = ShapesSpec(sizes=((64, 64, 1.0),), frames=((17, 1.0),), two_shape_share=0.0)
    true = [generate(0, i, spec) for i in range(4)]
    asked = []

    def made(workdir, pairs, num_prompts):
        asked.extend(pairs)
        for sampler, count in pairs:  # more steps, more clips that show their prompt
            shown = [true[i] if i < count else true[i - 1] for i in range(num_prompts)]
            yield ((sampler, count), [clip.pixels_THWC for clip in shown],
                   [clip.short_caption for clip in true])

    monkeypatch.setattr(sampler_steps, "made", made)
    common = [f"--workdir={tmp_path}", "--prompts=4", "--samplers=euler,heun"]
    sampler_steps.main([*common, "--steps=2"])
    sampler_steps.main([*common, "--steps=2,4", f"--picture={tmp_path / 'all.png'}"])
    assert asked == [("euler", 2), ("heun", 2), ("euler", 4), ("heun", 4)]
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()
            if line.startswith("| ")][-4:]
    assert [[x.strip() for x in row][:3] for row in rows] == [
        ["euler", "2", "2"], ["euler", "4", "4"], ["heun", "2", "4"], ["heun", "4", "8"]]
    match = [float(row[-1]) for row in rows]
    assert match[1] == match[3] == 100 and match[0] == match[2] <= 75
    assert (tmp_path / "all.png").stat().st_size > 0


def test_the_picture_of_edits_shows_every_edit(import_benchmark):
    from sora_jax.edit_command import EDITS, MAIN, edit_of

    examples = import_benchmark("edit_examples")
    record = types.SimpleNamespace(
        captions=("a red circle moves left",), height=48, width=32, num_frames=17)
    shown = {
        edit_of({name for flag in flags if (name := flag[2:].split("=")[0]) in MAIN})
        for flags in examples.commands(record, record).values()}
    assert shown == set(EDITS)
