"""What --mode=plan says, against arrays counted by hand and against the ratios of chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sora_jax import optim, plan, plan_flops, plan_host, run_config, sharding
from sora_jax.core import chips, flops
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression


def test_products_of_all_layers_of_a_scan_and_of_their_gradient_are_counted():
    weights_LDD, x_ND = jnp.ones((5, 8, 8)), jnp.ones((3, 8))

    def forward(weights_LDD, x_ND):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_ND, weights_LDD)[0].sum()

    once = 5 * 2 * 3 * 8 * 8
    assert flops.count(forward, weights_LDD, x_ND) == (once, 0)
    assert flops.count(jax.grad(forward, (0, 1)), weights_LDD, x_ND) == (3 * once, 0)
    again = jax.grad(jax.checkpoint(forward), (0, 1))
    assert flops.count(again, weights_LDD, x_ND) == (4 * once, 0)  # forward is computed twice


def test_convolutions_count_their_window_also_strided_grouped_and_in_the_gradient():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 6))

    def conv(x, kernel, stride=1, groups=1):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    once = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops.count(conv, x, kernel)[0] == once
    assert flops.count(lambda *a: conv(*a, stride=2), x, kernel)[0] == once / 4
    assert flops.count(lambda *a: conv(*a, groups=2), x, kernel[:, :, :2])[0] == once / 2
    for stride in (1, 2):
        grad = jax.grad(lambda *a, s=stride: conv(*a, stride=s).sum(), (0, 1))
        # The sum's gradient needs no forward; padding makes a small difference.
        np.testing.assert_allclose(flops.count(grad, x, kernel)[0], 3 * once / stride**2, rtol=0.01)


def test_a_loop_of_unknown_length_is_reported():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    assert flops.count(loop, jnp.ones((4, 4))) == (2 * 4**3, 1)


@pytest.mark.parametrize("fsdp, expected", [
    (1, 2 * 4096 * 7 / 8 + 2 * 64 * 7 / 8),  # both summed over 8 devices
    (8, 3 * 4096 * 7 / 8 + 2 * 64 * 7 / 8),  # the matrix is split and never summed
    (2, 3 * 4096 / 2 + 2 * 2048 * 3 / 4 + 2 * 64 * 7 / 8),
])
def test_exchanged_bytes_are_those_of_ring_algorithms(fsdp, expected):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp))
    params = {"kernel": jnp.ones((32, 32)), "bias": jnp.ones(16)}
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    shardings = {"kernel": split, "bias": sharding.replicated(mesh)}
    assert plan.exchanged_bytes(params, shardings, mesh) == expected


def test_along_tensor_nothing_is_gathered_and_no_gradient_summed():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    params, half = {"kernel": jnp.ones((32, 32))}, 32 * 32 * 4 / 2
    expected = 3 * half / 2 + 2 * half / 2 / 2  # gathered over fsdp, parts summed over data
    assert plan.exchanged_bytes(params, {"kernel": at}, mesh) == expected


def test_products_of_all_devices_of_a_split_program_are_counted():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))
    split = jax.sharding.PartitionSpec("data", "tensor")
    x = jnp.ones((4, 8, 8))

    def product(x):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(split, split),
                             out_specs=split)(x, jnp.ones((4, 32, 8)))

    assert flops.count(product, x) == (2 * 4 * 2 * 8 * 8 * 4, 0)


def test_the_held_bytes_of_a_donated_step_count_its_state_once():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    held = plan.device_bytes(step.lower(x).compile().memory_analysis())
    assert 4096 <= held < 2 * 4096


@pytest.mark.parametrize("sizes, num_parts", [((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 2, 2), 1)])
def test_activations_kept_on_the_host_are_the_results_of_products(sizes, num_parts):
    width, layers, rows, tokens, text, clips = 32, 4, 8, 64, 80, 16
    config = base.get_config("runlocal")
    config.model.update({"width": width, "num_layers": layers, "unroll": 1, "local_width": 0,
                         "remat": "offload", "product_dtype": "float32"})
    config.packing.update({"rows": rows, "row_tokens": tokens, "row_text": 4 * text,  # bytes
                           "max_clips": clips})
    config.optim.update({"optimizer": "adamw", "accumulate_steps": num_parts,
                         "offload": ("average", "parameters")})
    config.mesh.update(dict(zip(("data", "fsdp", "sequence"), sizes, strict=True)))
    config = run_config.resolve(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:np.prod(sizes)])
    tx = optim.make_optimizer(config.optim, config.num_steps)
    # Of a token: qkv, the output, queries and output for text, an MLP of 4 widths, and what
    # attention returns twice; of text keys and values; of a clip six parts of its modulation.
    of_tokens, of_rest = 13 * width * tokens, 2 * width * text + 6 * width * clips
    data, fsdp, sequence = sizes
    assert plan_host.kept_on_host(config, mesh, tx) == (
        4 * layers * rows // num_parts // (data * fsdp) * (of_tokens // sequence + of_rest))


def test_the_verdict_names_what_binds_and_whether_it_fits():
    chip = chips.Chip("c", hbm_bytes=100, bf16_flops=10, hbm_bandwidth=50, link_bytes=20)
    summary = {"bytes_per_device": 100, "flops_per_device_and_step": 50,
               "exchanged_bytes_per_device": 20}
    text = plan.against(chip, summary)
    assert "c: fits, 100.0%" in text
    assert "at least" in text and "5,000.000 ms (products in bfloat16)" in text
    text = plan.against(chip, {**summary, "bytes_per_device": 101,
                               "exchanged_bytes_per_device": 60})
    assert "DOES NOT FIT" in text and "6,000.000 ms (links, one way)" in text


def test_chips_are_complete_and_a_device_of_two_is_half_a_chip():
    assert list(chips.CHIPS) == ["v5e", "v5p", "v6e", "tpu7x", "A100", "H100", "H200", "B200"]
    for chip in chips.CHIPS.values():
        # A mistaken power of ten shows in the ratios, which differ little between chips.
        assert 100 < chip.bf16_flops / chip.hbm_bandwidth < 600, chip
        assert 0.005 < chip.hbm_bytes / chip.hbm_bandwidth < 0.05, chip
        assert 1 < chip.hbm_bandwidth / chip.link_bytes < 7, chip
    assert chips.chip("tpu7x").per_device().hbm_bytes == 96 * 2**30
    assert chips.chip("H100").per_device().bf16_flops == 989.5e12


def test_an_unknown_chip_and_a_wrong_number_of_devices_are_named():
    with pytest.raises(UserError, match="mesh.chip = 'v9'.*v5e, v5p"):
        sharding.MeshConfig(chip="v9")
    with pytest.raises(UserError, match="mesh.num_devices = 3 and 8 devices are here"):
        sharding.make_mesh(sharding.MeshConfig(num_devices=3))


@pytest.mark.parametrize("row_tokens, percent", [(256, 100 * 76 / 256), (180, 0.0), (900, 0.0)])
def test_padding_is_what_whole_clips_leave_of_a_row(row_tokens, percent):
    config = base.get_config()
    config.packing.row_tokens = row_tokens
    compression = Compression(time=4, space=8)
    config = run_config.resolve(config)
    assert plan_flops.clip_shape(config, compression) == (5, 36)  # 17 frames of 96x96
    assert plan_flops.padding_percent(config, compression) == pytest.approx(percent)
