"""The configs of large runs: networks of the right size, which divide over their meshes, and rows
that accelerators' kernels take. Nothing is compiled here."""

import json
import math
import runpy

import jax
import pytest
from commands import ROOT

from sora_jax import plan, run_config, sharding
from sora_jax.core import axes, chips
from sora_jax.models.attention import kernel_on
from sora_jax.models.attention_kernels.call import Call
from sora_jax.models.transformer_sizes import multiply_adds, named_dit
from sora_jax.plan_flops import clip_shape
from sora_jax.tasks import registry
from sora_jax.weights.rules import published_shapes
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.wan_dit import wan_rules
from tests.outside_data import outside

LARGE = ("dit:s", "dit:b", "dit:l", "dit:xl", "wan:1b", "wan:14b", "pod_v5p_256:images",
         "pod_v5p_256:low", "pod_v5p_256:high")
WAN = {"1b": (1536, 8960, 30, 1_418_996_800), "14b": (5120, 13_824, 40, 14_288_491_584)}


def config_of(name):
    """The resolved config of "FILE:ARGUMENT"."""
    file, _, argument = name.partition(":")
    config = runpy.run_path(str(ROOT / f"configs/{file}.py"))["get_config"](argument)
    config.data.folder = "somewhere"
    return run_config.resolve(config)


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_dits_have_the_papers_network_but_for_what_reads_labels(size):
    """tests/models/test_transformer_sizes.py holds `named_dit` against the paper's table."""
    ours, theirs = config_of(f"dit:{size}").network(4), named_dit(f"{size.upper()}/2")
    ours_shapes, their_shapes = parameter_shapes(ours), parameter_shapes(theirs)
    assert their_shapes.pop("label_table") == (1001, ours.width)
    assert their_shapes == {
        name: shape for name, shape in ours_shapes.items() if not name.startswith("text")}
    assert multiply_adds(ours, (1, 16, 16)) == multiply_adds(theirs, (1, 16, 16))


def wan_layout(width, mlp_width, layers):
    """{name: shape} of diffusers' WanTransformer3DModel, text to video."""
    def dense(name, out, into):
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    embed, shapes = "condition_embedder", {"scale_shift_table": (1, 2, width)}
    shapes |= {"patch_embedding.weight": (width, 16, 1, 2, 2), "patch_embedding.bias": (width,)}
    for name, out, into in (
            ("time_embedder.linear_1", width, 256), ("time_embedder.linear_2", width, width),
            ("time_proj", 6 * width, width), ("text_embedder.linear_1", width, 4096),
            ("text_embedder.linear_2", width, width)):
        shapes |= dense(f"{embed}.{name}", out, into)
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes[f"{block}.scale_shift_table"] = (1, 6, width)
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= dense(f"{block}.{attention}.{part}", width, width)
            for part in "qk":
                shapes[f"{block}.{attention}.norm_{part}.weight"] = (width,)
        shapes |= {f"{block}.norm2.weight": (width,), f"{block}.norm2.bias": (width,)}
        shapes |= dense(f"{block}.ffn.net.0.proj", mlp_width, width)
        shapes |= dense(f"{block}.ffn.net.2", width, mlp_width)
    return shapes | dense("proj_out", 64, width)


@pytest.mark.parametrize("size", WAN)
def test_wan_configs_have_the_published_names_and_shapes(size):
    *sizes, count = WAN[size]
    config = config_of(f"wan:{size}")
    network = config.network(config.vae.z_dim)
    published = published_shapes(wan_rules(network), parameter_shapes(network))
    assert published == wan_layout(*sizes)
    assert sum(math.prod(shape) for shape in published.values()) == count


@pytest.mark.skipif(outside("layouts") is None, reason="no layouts (SORA_JAX_LAYOUTS)")
@pytest.mark.parametrize("size, stem", [("1b", "wan2.1-t2v-1.3b"), ("14b", "wan2.1-t2v-14b")])
def test_the_layout_above_is_that_of_the_published_class(size, stem):
    (path,) = outside("layouts").glob(f"{stem}*.txt")
    *sizes, _ = WAN[size]
    listed = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, shape, _, times = line.split("\t")
            for layer in range(int(times.removeprefix("x"))):
                listed[name.format(layer)] = tuple(json.loads(shape))
    assert listed == wan_layout(*sizes)


@pytest.mark.parametrize("name", LARGE)
def test_large_configs_divide_over_their_mesh_and_keep_the_accelerators_kernels(name):
    config = config_of(name)
    devices = config.mesh.num_devices or 8
    sizes = [getattr(config.mesh, axis) for axis in axes.AXES]
    sizes[0] = devices // math.prod(sizes[1:])
    mesh = jax.sharding.AbstractMesh(tuple(sizes), axes.AXES)
    task, batch = registry.outline(config)
    sharding.param_shardings(jax.eval_shape(task.init, jax.random.key(0)), mesh)
    sharding.batch_shardings(batch, mesh)
    network = config.network(config.vae.z_dim)
    for chip in ("v5p", "H100"):
        shown = plan.kernel_lines(chips.chip(chip), config, network, mesh)
        assert "kernel dense" not in shown, shown
    tokens = math.prod(clip_shape(config, config.vae.compression))
    assert tokens <= config.packing.row_tokens
    if name.endswith("high"):
        assert tokens == 41 * 45 * 80


def test_a_row_that_is_no_whole_number_of_blocks_would_lose_its_kernel_and_the_plan_says_so():
    def call(tokens):
        return Call("tpu", 0.0, tokens, tokens, 128, "bfloat16", 8)

    assert kernel_on(call(74 * 1024)) == ("splash", "")
    name, reason = kernel_on(call(75_600))
    assert name == "dense" and "multiple of 128, it is 75600" in reason


def test_stages_of_the_pod_learn_one_network_in_steps_of_like_size():
    stages = [config_of(f"pod_v5p_256:{stage}") for stage in ("images", "low", "high")]
    networks = {config.network(config.vae.z_dim) for config in stages}
    assert len(networks) == 1
    count = sum(map(math.prod, parameter_shapes(networks.pop()).values()))
    assert count == pytest.approx(4.9e9, rel=0.02)
    tokens = [config.packing.rows * config.packing.row_tokens for config in stages]
    assert max(tokens) < 1.2 * min(tokens)
    assert [config.checkpoint.init_from for config in stages] == [
        "", "runs/pod_v5p_256_images", "runs/pod_v5p_256_low"]
