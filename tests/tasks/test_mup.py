"""muP: what the network says keeps its size when it grows wider, at one learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from sora_jax import optim, run_config, sharding
from sora_jax.core.errors import UserError
from sora_jax.models.transformer import Transformer
from sora_jax.tasks import diffusion, mup

WIDTHS, BASE = (32, 128), 32


def make_config(width, mup_base_width):
    config = base.get_config("runlocal")
    config.packing.update({"rows": 2, "row_tokens": 16, "row_text": 16, "max_clips": 2})
    config.model.update({
        "width": width, "num_heads": width // 16, "num_layers": 2, "unroll": 1, "local_width": 0,
        "product_dtype": "float32", "text_attention": "none"})
    config.optim.update({
        "optimizer": "adamw", "learning_rate": 0.02, "warmup_steps": 0, "decay": "constant",
        "clip_norm": 0.0, "weight_decay": 0.0, "mup_base_width": mup_base_width})
    return run_config.resolve(config)


@pytest.mark.parametrize("changes, words", [
    ({"optim.optimizer": "muon"}, "optim.mup_base_width = 32 scales rates as Adam needs it"),
    ({"optim.mup_base_width": 24}, "model.num_heads = 4 times their ratio is no whole number"),
    ({"task": "vae"}, "of the transformer's own weights"),
])
def test_a_config_that_cannot_be_is_refused_by_field(changes, words):
    config = base.get_config("runlocal")
    config.optim.update({"optimizer": "adamw", "mup_base_width": 32})
    config.model.num_heads = 4
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        run_config.resolve(config)


def test_only_what_has_more_inputs_learns_slower_and_output_counts_do_not_matter():
    narrow = {"patch_in/kernel": (64, 8), "blocks/qkv/kernel": (2, 8, 24),
              "blocks/qkv/bias": (2, 24), "patch_out/kernel": (8, 64), "label_table": (10, 8)}
    wide = {"patch_in/kernel": (64, 32), "blocks/qkv/kernel": (2, 32, 96),
            "blocks/qkv/bias": (2, 96), "patch_out/kernel": (32, 64), "label_table": (10, 32)}
    ratios = mup.fan_in_ratios(wide, narrow)
    assert ratios == {**dict.fromkeys(wide, 1.0), "blocks/qkv/kernel": 0.25,
                      "patch_out/kernel": 0.25}
    factors = mup.initial_factors(wide, narrow)
    assert factors["blocks/qkv/kernel"] == factors["label_table"] == 1.0
    variance = 2 / (64 + 32) * factors["patch_in/kernel"] ** 2
    assert variance == pytest.approx(2 / (64 + 8))


@pytest.fixture(scope="module")
def sizes():
    """{(width, with muP): root mean squares of (tokens read in at init, output after 3 steps)}."""
    found = {}
    for width in WIDTHS:
        gradient = None
        for scaled in (False, True)[:1 + (width != BASE)]:
            config = make_config(width, BASE if scaled else 0)
            task, batch = diffusion.outline(config)
            batch = {name: np.array(rows) for name, rows in batch.items()}
            rng = np.random.default_rng(0)
            batch["tokens_BND"][:] = rng.normal(size=batch["tokens_BND"].shape)
            batch["clip_BSF"][:] = 8
            batch["segment_BN"][:] = np.repeat([1, 2], 8)
            model = Transformer(config.network(batch["tokens_BND"].shape[-1] // 4))
            time_BS = np.full((2, 2), 0.5, np.float32)

            def output(params, batch, model=model, time_BS=time_BS):
                return model.apply({"params": params}, batch, time_BS)

            gradient = gradient or jax.jit(jax.value_and_grad(
                lambda p, b, output=output: (lambda y: (jnp.mean((y - 1.0) ** 2), y))(output(p, b)),
                has_aux=True))
            tx = task.optimizer or optim.make_optimizer(config.optim, config.num_steps)
            params = sharding.unbox(jax.jit(task.init)(jax.random.key(0)))
            kernel = np.asarray(params["patch_in"]["kernel"])
            read = np.square(batch["tokens_BND"] @ kernel).mean() ** 0.5
            state, update = tx.init(params), jax.jit(tx.update)
            for _ in range(3):
                (_, _), grads = gradient(params, batch)
                updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
            said = np.asarray(gradient(params, batch)[0][1])
            found[width, scaled] = read, np.square(said).mean() ** 0.5
    found[BASE, True] = found[BASE, False]  # the narrow network is itself
    return found


def test_coordinate_check(sizes):
    """From width 32 to 128, four times as many channels."""
    grown = {scaled: np.divide(sizes[128, scaled], sizes[32, scaled])
             for scaled in (False, True)}
    assert 0.8 < grown[True][0] < 1.25 and grown[False][0] < 0.8  # tokens read in
    assert 0.6 < grown[True][1] < 1.7 and grown[False][1] > 2.5  # output
