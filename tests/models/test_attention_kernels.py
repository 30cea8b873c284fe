"""Every kernel that runs here, natively or in Pallas' interpreter, against the dense reference."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models import attention as module
from sora_jax.models.attention import attention, attention_plan, choose, make_plan, run
from sora_jax.models.attention_kernels import cpu_blocks, cudnn, ranges
from sora_jax.models.attention_kernels.call import Call

HEADS, WIDTH, ROWS = 2, 8, 3
# Kernel -> numbers of queries and keys: several blocks of each, for cpu_blocks a rest as well.
LENGTHS = {"cpu_blocks": (90, 70), "pallas": (256, 192), "splash": (384, 256)}
KERNELS = list(LENGTHS)


def call_of(kernel, dtype="float32"):
    N, M = LENGTHS[kernel]
    return Call("cpu", 0.0, N, M, WIDTH, dtype, 0, interpret=kernel != "cpu_blocks")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cpu_blocks, "BLOCK", 32)


@pytest.fixture
def one_device(monkeypatch):
    """Of a real machine: no self-test, and one device."""
    monkeypatch.setattr(module, "_self_test", lambda *_: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@functools.cache
def compiled(kernel, lengths_of, dtype="float32"):
    """(q, k, v, segments, weight) -> output and gradients of sum(output * weight)."""
    call = call_of(lengths_of, dtype)

    def step(q, k, v, q_segment, k_segment, weight):
        def forward(q, k, v):
            arrays = make_plan(kernel, call, q_segment, k_segment)
            return run(kernel, call, q, k, v, q_segment, k_segment, arrays)

        out, pullback = jax.vjp(forward, q, k, v)
        return out, *pullback(weight)

    return jax.jit(step)


def rows_of(length, rng, kind):
    """Segments of three rows: many clips, one clip, and the last all padding; or clips whose
    tokens stand in no order."""
    cuts = [np.sort(rng.choice(length - 8, 4)) + 4, [], []]
    segment = np.array([1 + (np.arange(length)[:, None] >= np.array(c)).sum(1) for c in cuts])
    segment[:, length - 3:] = 0
    segment[2] = 0
    if kind == "shuffled":
        segment[0] = rng.permutation(segment[0])
    return segment


def inputs(kernel, seed=0, kind="sorted"):
    rng = np.random.default_rng(seed)
    N, M = LENGTHS[kernel]
    q, k, v, weight = (rng.normal(size=(ROWS, length, HEADS, WIDTH)) for length in (N, M, M, N))
    q_segment, k_segment = (rows_of(length, rng, kind) for length in (N, M))
    k_segment[k_segment == 3] = 0  # a clip without keys
    floats = [jnp.asarray(x, jnp.float32) for x in (q, k, v, weight)]
    return (*floats[:3], jnp.asarray(q_segment), jnp.asarray(k_segment), floats[3])


@pytest.mark.parametrize("kind", ["sorted", "shuffled"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_the_reference(kernel, kind):
    arguments = inputs(kernel, kind=kind)
    ours = compiled(kernel, kernel)(*arguments)
    reference = compiled("dense", kernel)(*arguments)
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)
        assert np.abs(other).max() > 0.1
    out, segment = np.asarray(ours[0]), np.asarray(arguments[3])
    assert (out[(segment == 0) | (segment == 3)] == 0).all()  # the last row is all padding


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_gradient_crosses_from_a_clip(kernel):
    q, k, v, q_segment, k_segment, weight = inputs(kernel, seed=1)
    for clip in (1, 2, 5):
        mine = jnp.where((q_segment == clip)[..., None, None], weight, 0)
        _, d_q, d_k, d_v = compiled(kernel, kernel)(q, k, v, q_segment, k_segment, mine)
        assert (np.asarray(d_q)[np.asarray(q_segment) != clip] == 0).all()
        for d in (d_k, d_v):
            assert (np.asarray(d)[np.asarray(k_segment) != clip] == 0).all()
            assert np.abs(d).max() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_clips_do_not_change_a_bit_of_a_clip(kernel):
    q, k, v, q_segment, k_segment, weight = inputs(kernel, seed=2)
    before = compiled(kernel, kernel)(q, k, v, q_segment, k_segment, weight)[0]
    far = jnp.where((k_segment == 2)[..., None, None], 1e4, 1.0)
    after = compiled(kernel, kernel)(q, k * far, v * far, q_segment, k_segment, weight)[0]
    others = np.asarray(q_segment) != 2
    np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert not np.array_equal(before, after)


def test_bfloat16_products_are_near_the_reference():
    arguments = inputs("cpu_blocks")
    ours = compiled("cpu_blocks", "cpu_blocks", "bfloat16")(*arguments)
    for one, other in zip(ours, compiled("dense", "cpu_blocks")(*arguments), strict=True):
        assert 0 < np.abs(one - other).max() < 0.05 * np.abs(other).max()


def test_blocks_of_other_clips_are_passed_over():
    segment = jnp.array([[1] * 4 + [2] * 8 + [3] * 2 + [0] * 2])
    meeting = ranges.meeting_blocks(segment, segment, 4, 4)
    np.testing.assert_array_equal(meeting[0], [
        [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    first, end = ranges.spans(meeting)
    np.testing.assert_array_equal(first[0], [0, 1, 1, 3])
    np.testing.assert_array_equal(end[0], [1, 3, 3, 4])
    empty = ranges.spans(ranges.meeting_blocks(jnp.zeros((1, 16), int), segment, 4, 4))
    assert not np.any(empty)


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_that_may_attend_is_in_no_passed_block(seed):
    rng = np.random.default_rng(seed)
    q_segment, k_segment = (jnp.asarray(rng.integers(0, 4, (2, n))) for n in (24, 40))
    meeting = np.asarray(ranges.meeting_blocks(q_segment, k_segment, 4, 8))
    first, end = map(np.asarray, ranges.spans(meeting))
    allowed = (q_segment[:, :, None] == k_segment[:, None]) & (q_segment > 0)[:, :, None]
    for b, n, m in np.argwhere(allowed):
        assert meeting[b, n // 4, m // 8] and first[b, n // 4] <= m // 8 < end[b, n // 4]


def packed(lengths, numbers=None, pad=0):
    numbers = range(1, len(lengths) + 1) if numbers is None else numbers
    row = [n for n, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    return jnp.array([row + [0] * pad])


def test_cudnn_is_told_where_clips_begin_and_which_have_both_queries_and_keys():
    q_starts, q_lengths, k_starts, k_lengths, proper = cudnn.plan(
        packed([3, 2, 4], (1, 3, 4), pad=1), packed([2, 1, 5], (1, 2, 4)), 5)
    np.testing.assert_array_equal(q_starts[0], [0, -1, -1, 5, -1])
    np.testing.assert_array_equal(q_lengths[0], [3, -1, -1, 4, -1])
    np.testing.assert_array_equal(k_starts[0], [0, -1, -1, 3, -1])
    np.testing.assert_array_equal(k_lengths[0], [2, -1, -1, 5, -1])
    assert proper[0]


@pytest.mark.parametrize("segment, max_clips", [
    (jnp.array([[1, 2, 1]]), 4), (jnp.array([[1, 2, 5]]), 4)])
def test_cudnn_knows_segments_that_it_cannot_take(segment, max_clips):
    assert not cudnn.plan(segment, segment, max_clips)[-1][0]


def test_the_installed_jax_has_the_offsets_that_cudnn_needs():
    assert cudnn.why_not_installed() is None


def test_a_plan_made_once_serves_every_layer(monkeypatch):
    q, k, v, q_segment, k_segment, _ = inputs("cpu_blocks")
    plan = attention_plan(q_segment, k_segment, WIDTH, kernel="cpu_blocks")
    assert len(jax.tree.leaves(plan)) == 2
    alone = attention(q, k, v, q_segment, k_segment, kernel="cpu_blocks")
    monkeypatch.setattr(cpu_blocks, "plan", None)  # not asked again
    np.testing.assert_array_equal(
        alone, attention(q, k, v, q_segment, k_segment, plan=plan))


def gpu(**changes):
    return Call(**{"device": "gpu", "capability": 9.0, "num_queries": 4096, "num_keys": 4096,
                   "head_width": 64, "dtype": "bfloat16", "max_clips": 64, **changes})


@pytest.mark.parametrize("call, expected", [
    (gpu(), "cudnn"),
    (gpu(dtype="float32"), "pallas"),
    (gpu(max_clips=0), "pallas"),
    (gpu(capability=8.0), "pallas"),
    (gpu(capability=8.0, num_queries=4097), "dense"),
    (gpu(device="tpu"), "splash"),
    (gpu(device="tpu", num_keys=200), "dense"),
    (gpu(device="cpu"), "cpu_blocks"),
    (gpu(device="cpu", num_queries=64), "dense"),
])
def test_auto_takes_the_first_kernel_that_can_serve_and_says_so_once(
        call, expected, one_device, caplog):
    module._log.cache_clear()
    with caplog.at_level(logging.INFO):
        assert choose("auto", call) == choose("auto", call) == expected
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1 and f"kernel {expected}" in lines[0]
    passed = module.ORDER[call.device][: module.ORDER[call.device].index(expected)]
    assert all(f"not {name}: " in lines[0] for name in passed)


def test_a_kernel_that_fails_its_self_test_is_not_used(one_device, monkeypatch):
    monkeypatch.setattr(module, "_self_test", lambda name, *_: "off" if name == "cudnn" else None)
    assert choose("auto", gpu()) == "pallas"
    with pytest.raises(UserError, match="'cudnn' cannot be used: off"):
        choose("cudnn", gpu())


@pytest.mark.parametrize("offset, passes", [(0.0, True), (1.0, False), (np.nan, False)])
def test_the_self_test_compares_with_the_reference(offset, passes, monkeypatch):
    attend = cpu_blocks.attend
    monkeypatch.setattr(cpu_blocks, "attend", lambda *a: attend(*a) + offset)
    monkeypatch.setattr(module, "compare", functools.partial(module.compare, length=64))
    module._self_test.cache_clear()
    found = jax.jit(lambda x: x if module._self_test("cpu_blocks", "cpu", "float32") else -x)(1)
    assert (found == -1) == passes  # it runs while another program is traced
    module._self_test.cache_clear()


@pytest.mark.parametrize("kernel, call, message", [
    ("splsh", gpu(), "'splsh' is unknown; allowed: auto, dense, cpu_blocks, cudnn, pallas, splash"),
    ("splash", gpu(device="cpu"), "runs on a tpu, this is a cpu. Usable here: auto, dense, cpu_b"),
    ("splash", gpu(device="tpu", num_keys=200), "keys must be a multiple of 128, it is 200; near"),
    ("pallas", gpu(num_queries=4100), "queries must be a multiple of 128, it is 4100; near are 40"),
    ("cudnn", gpu(dtype="float32"), "takes bfloat16 or float16, the products are float32"),
    ("cudnn", gpu(capability=8.0), r"capability 9.0 \(Hopper\) or more, this is 8.0"),
    ("cudnn", gpu(head_width=60), "multiple of 8 wide and at most 256, they are 60"),
    ("cudnn", gpu(max_clips=0), "known max_clips"),
])
def test_a_kernel_asked_for_that_cannot_serve_is_an_error(kernel, call, message, one_device):
    with pytest.raises(UserError, match=message):
        choose(kernel, call)


def test_rows_that_may_be_split_unseen_are_left_to_the_kernel_that_splits(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert choose("auto", gpu(device="cpu")) == "dense"
    assert choose("cpu_blocks", gpu(device="cpu")) == "cpu_blocks"


def test_under_a_mesh_every_device_attends_in_its_rows():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:2])
    q, k, v, q_segment, k_segment, _ = (x[:2] for x in inputs("cpu_blocks"))

    def forward(q, k, v):
        return attention(q, k, v, q_segment, k_segment, kernel="cpu_blocks")

    with jax.set_mesh(mesh):
        split = jax.jit(forward)
        program = split.lower(q, k, v).as_text()
        np.testing.assert_allclose(
            split(q, k, v), attention(q, k, v, q_segment, k_segment, kernel="dense"), atol=3e-6)
        with pytest.raises(UserError, match="3 rows do not divide over the 2 devices"):
            choose("cpu_blocks", gpu(device="cpu"), rows=3)
    assert "manual_computation" in program or "shard_map" in program
