"""Attention on packed rows: a token sees the tokens of its own clip and no others.

One function for every kernel (attention_kernels/). `kernel="auto"` takes the first of ORDER[device]
that can serve and logs the choice once; a kernel that is asked for by name and cannot serve is a
UserError. On a GPU or TPU a kernel is compared with the reference once before it is used.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, use_abstract_mesh

from sora_jax.core.axes import size
from sora_jax.core.errors import UserError
from sora_jax.models import attention_split
from sora_jax.models.attention_kernels import cpu_blocks, cudnn, dense, pallas_gpu, splash_tpu
from sora_jax.models.attention_kernels.call import Call
from sora_jax.models.attention_split import Split

LOG = logging.getLogger(__name__)
KERNELS = {"dense": dense, "cpu_blocks": cpu_blocks, "cudnn": cudnn, "pallas": pallas_gpu,
           "splash": splash_tpu}
ORDER = {"cpu": ("cpu_blocks", "dense"), "gpu": ("cudnn", "pallas", "dense"),
         "tpu": ("splash", "dense")}
SCOPE = "attention_within_clips"  # of its operations, in jaxprs and profiles
DENSE_LOGITS = 512 * 512  # rows with no more logits are faster in one piece on a CPU
TOLERANCE = {"float32": 2e-2, "bfloat16": 5e-2, "float16": 2e-2}  # tf32 products count as float32


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",),
                   meta_fields=("kernel", "split"))
@dataclasses.dataclass(frozen=True)
class Plan:
    """A kernel, and what it works out from the segments alone; layers of one batch share it.
    split: over devices, with which the arrays were made."""

    kernel: str
    arrays: tuple
    split: Split = Split()


@jax.named_scope(SCOPE)
def attention(
    q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, dtype: str = "float32",
    kernel: str = "auto", max_clips: int = 0, plan: Plan | None = None,
):
    """Softmax attention within segments, (B, N, K, E); zeros where the segment is 0 (padding).

    Queries and keys may come from different sequences (cross-attention). Positive segments number
    the clips of a row (or parts of them), in any order. The mask is exact: weights of other
    segments are 0, so no gradient crosses. A query whose segment has no keys gives zeros. Operands
    of products are rounded to `dtype`; logits, softmax and sums are float32.

    kernel: a name of KERNELS, or auto. max_clips: the caller's word that segments are 1..max_clips
    and each stands in one run of tokens; 0 = not known. plan: of `attention_plan`, replaces kernel.
    Under a mesh (`jax.set_mesh`) rows are split over all its axes but sequence and tensor; what
    these split is in the plan.
    Raises UserError where the kernel asked for cannot serve, with the reason.
    """
    if plan is None:
        plan = attention_plan(q_segment_BN, k_segment_BM, q_BNKE.shape[-1], dtype, kernel,
                              max_clips)
    call = _call(
        q_segment_BN, k_segment_BM, q_BNKE.shape[-1], dtype, max_clips, plan.split)
    function = functools.partial(run, plan.kernel, call)
    # Kernels are programs of one device. The reference is none, but within a row it is split best
    # as one: its products have rows and heads in one axis.
    alone = size(*attention_split.split_axes()) == 1
    if not (alone or plan.kernel == "dense" and not plan.split.within_rows):
        function = attention_split.over_mesh(function, plan.split)
    return function(q_BNKE, k_BMKE, v_BMKE, q_segment_BN, k_segment_BM, plan.arrays)


def attention_plan(q_segment_BN, k_segment_BM, head_width: int, dtype: str = "float32",
                   kernel: str = "auto", max_clips: int = 0, split: Split = Split()) -> Plan:
    """The kernel for these segments and what it can prepare, to be shared by layers.

    split: of `attention_split.split_of`, where a mesh splits more than rows.
    """
    (B, N), M = q_segment_BN.shape, k_segment_BM.shape[1]
    if split.within_rows:
        attention_split.check(split, B, N, M)
    call = _call(q_segment_BN, k_segment_BM, head_width, dtype, max_clips, split)
    name = choose(kernel, call, B)
    make = attention_split.plan_over_mesh(functools.partial(make_plan, name, call), split)
    return Plan(name, make(q_segment_BN, k_segment_BM), split)


def run(name: str, call: Call, q, k, v, q_segment_BN, k_segment_BM, arrays):
    """The kernel's output in the type of the queries; every kernel gives zeros without keys."""
    return KERNELS[name].attend(
        q, k, v, q_segment_BN, k_segment_BM, arrays, call).astype(q.dtype)


def make_plan(name: str, call: Call, q_segment_BN, k_segment_BM):
    """Arrays of a Plan."""
    more = (call.max_clips,) if name == "cudnn" else ()
    return KERNELS[name].plan(q_segment_BN, k_segment_BM, *more)


def choose(kernel: str, call: Call, rows: int = 1) -> str:
    """The name of the kernel that serves the call. Raises UserError (see `attention`)."""
    if kernel != "auto":
        reasons = {name: _why_not(name, call, rows) for name in KERNELS}
        if kernel not in KERNELS:
            raise UserError(f"attention kernel {kernel!r} is unknown; allowed: auto, "
                            f"{', '.join(KERNELS)}")
        if reasons[kernel] is not None:
            usable = [name for name, reason in reasons.items() if reason is None]
            others = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()
                               if reason is not None and name != kernel)
            raise UserError(
                f"attention kernel {kernel!r} cannot be used: {reasons[kernel]}. Usable here: "
                f"auto, {', '.join(usable)} ({others})")
        return kernel
    passed = []
    for name in ORDER[call.device]:
        reason = _why_not(name, call, rows) or _why_not_best(name, call)
        if reason is None:
            _log(name, call, "; ".join(passed))
            return name
        passed.append(f"not {name}: {reason}")
    raise AssertionError("dense serves every call")


def kernel_on(call: Call) -> tuple[str, str]:
    """(the kernel that `auto` takes where call.device is at hand and its self-test passes, why not
    those before it)."""
    passed = []
    for name in ORDER[call.device]:
        reason = KERNELS[name].why_not(call)
        if reason is None:
            return name, "; ".join(passed)
        passed.append(f"not {name}: {reason}")
    raise AssertionError("dense serves every call")


def _why_not(name: str, call: Call, rows: int) -> str | None:
    reason = KERNELS[name].why_not(call)
    if reason is not None or name == "dense":
        return reason
    devices = attention_split.num_row_parts()
    if rows % devices:
        return f"{rows} rows do not divide over the {devices} devices of the mesh"
    return _self_test(name, call.device, call.dtype) if call.device != "cpu" else None


def _why_not_best(name: str, call: Call) -> str | None:
    """Why auto leaves out a kernel that could serve."""
    if name == "dense":
        return None
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return "several devices are present and no mesh is set, so rows might be split unseen"
    if call.device == "cpu" and call.num_queries * call.num_keys <= DENSE_LOGITS:
        return f"{call.num_queries} x {call.num_keys} logits are few"
    return None


@functools.lru_cache(maxsize=256)
def _log(name: str, call: Call, passed: str) -> None:
    LOG.info(
        "attention of %d queries and %d keys, heads of %d, %s: kernel %s%s", call.num_queries,
        call.num_keys, call.head_width, call.dtype, name, f" ({passed})" if passed else "")


def _call(q_segment_BN, k_segment_BM, head_width, dtype, max_clips, split=Split()) -> Call:
    """What a kernel is to serve on one device."""
    device = jax.default_backend()
    device = device if device in ORDER else "gpu"
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    return Call(
        device=device, capability=float(capability) if device == "gpu" else 0.0,
        num_queries=q_segment_BN.shape[1] // split.num_query_parts, num_keys=k_segment_BM.shape[1],
        head_width=head_width, dtype=str(jnp.dtype(dtype)), max_clips=max_clips,
    )


@functools.lru_cache(maxsize=64)
def _self_test(name: str, device: str, dtype: str) -> str | None:
    """Why the kernel is not to be trusted on this device; None where values and gradients of a
    small packed row agree with the reference."""
    with jax.ensure_compile_time_eval(), use_abstract_mesh(AbstractMesh((), ())):
        try:
            difference = compare(name, dtype)
        except Exception as error:  # whatever a compiler or library says, it is the reason
            return f"its self-test failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
    if not difference <= TOLERANCE[dtype]:
        return f"its self-test is off the reference by {difference:.3g} (of the largest value)"
    return None


def compare(name: str, dtype: str, length: int = 512, head_width: int = 64,
            interpret: bool = False) -> float:
    """Largest difference from the reference, over the largest value, of outputs and gradients of
    two packed rows of `length`; NaN counts as infinite."""
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(2, length, 2, head_width)), jnp.float32) for _ in range(4))
    cuts = np.array([[1, 7], [2, 3]]) * length // 10
    segment = 1 + (np.arange(length) >= cuts[..., None]).sum(1)
    segment = jnp.asarray(np.where(np.arange(length) < length - 5, segment, 0), jnp.int32)
    call = dataclasses.replace(
        _call(segment, segment, head_width, dtype, 3), interpret=interpret)

    def outputs(kernel):
        def weighted(q, k, v):
            arrays = make_plan(kernel, call, segment, segment)
            out = run(kernel, call, q, k, v, segment, segment, arrays)
            return (out * weight).sum(), out

        (_, out), gradients = jax.jit(
            jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float64) for x in (out, *gradients)]

    differences = [np.abs(ours - theirs).max() / np.abs(theirs).max()
                   for ours, theirs in zip(outputs(name), outputs("dense"), strict=True)]
    return float(np.nan_to_num(np.max(differences), nan=np.inf))
