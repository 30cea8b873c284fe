"""Golden cases and published layouts: where they are, and how outputs are compared."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.models.patchify import clips_as_rows, unpatchify
from sora_jax.models.transformer import Transformer
from sora_jax.weights.transformer_weights import parameter_shapes
from sora_jax.weights.vae_files import flatten, unflatten
from tests.outside_data import outside

GOLDEN, LAYOUTS = outside("golden"), outside("layouts")
TOLERANCE = 2e-5
COMPILE_FAST = {"xla_backend_optimization_level": "0"}  # programs run once, on tiny inputs

needs_golden = pytest.mark.skipif(GOLDEN is None, reason="no golden files (SORA_JAX_GOLDEN)")
needs_layouts = pytest.mark.skipif(LAYOUTS is None, reason="no layouts (SORA_JAX_LAYOUTS)")


@dataclasses.dataclass(frozen=True)
class Case:
    """config: the published one. tensors: its weights. io: "in.*" and "out.*" arrays."""

    config: dict
    tensors: dict
    io: dict


def load_case(name: str) -> Case:
    folder = GOLDEN / name
    return Case(json.loads((folder / "config.json").read_text()),
                load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors"))


def load_layout(name: str) -> tuple[dict, dict]:
    """(published config, {tensor name: shape}) of layouts/NAME.txt; "{}" counts from 0."""
    lines = (LAYOUTS / f"{name}.txt").read_text().splitlines()
    shapes = {}
    for line in lines[2:]:
        path, shape, _, count = line.split("\t")
        for i in range(int(count[1:])):
            shapes[path.replace("{}", str(i))] = tuple(json.loads(shape))
    return json.loads(lines[1].removeprefix("# config: ")), shapes


def structs(shapes: dict) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def traced_shapes(function, shapes: dict) -> dict:
    """Shapes of function(tensors) -> tensors for tensors of these shapes; allocates nothing."""
    out = jax.eval_shape(function, structs(shapes))
    return {name: leaf.shape for name, leaf in out.items()}


def count(shapes: dict) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def precise(function, *arrays):
    """function(*arrays), compiled, with products in exact float32."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function, compiler_options=COMPILE_FAST)(*arrays)


def predict(case: Case, config, params, time_BN=None, channel_axis=1):
    """What the native transformer makes of the case's inputs, in the layout of "out.sample".

    Images (B, C, H, W) are clips of one frame. Times are in the published unit: 0..1000 goes in as
    it is, since t / 1000 and back would round.
    """
    io = case.io
    latents = np.moveaxis(io["in.hidden_states"], channel_axis, -1)
    clips_BTHWC = latents if latents.ndim == 5 else latents[:, None]
    batch = clips_as_rows(clips_BTHWC, config.patch)
    for name, tokens, segment in (
            ("in.encoder_hidden_states", "text_embedding_BMD", "text_segment_BM"),
            ("in.encoder_hidden_states_image", "image_embedding_BLD", "image_segment_BL")):
        if name in io:
            batch[tokens], batch[segment] = io[name], np.ones(io[name].shape[:2], np.int32)
    if "in.class_labels" in io:
        batch["label_BS"] = io["in.class_labels"][:, None]
    model = Transformer(dataclasses.replace(config, time_scale=1.0))
    time_BS = io["in.timestep"][:, None].astype(np.float32)
    out = np.asarray(precise(model.apply, {"params": params}, batch, time_BS, time_BN))
    sample = unpatchify(out, config.patch, clips_BTHWC.shape[1:4])
    return np.moveaxis(sample.reshape(*latents.shape[:-1], -1), -1, channel_axis)


def native_shapes(params) -> dict:
    return {name: leaf.shape for name, leaf in flatten(params).items()}


def assert_file_comes_back(case: Case, config, params, export):
    """The parameters are those of the config, and export(config, params) is the case's file."""
    assert native_shapes(params) == parameter_shapes(config)
    assert_bit_for_bit(export(config, params), case.tensors)


def shapes_there_and_back(published: dict, shapes: dict, config, import_, export) -> dict:
    """Native shapes of a published layout, which export takes back to it; allocates nothing."""
    params = jax.eval_shape(lambda tensors: import_(published, tensors)[1], structs(shapes))
    native = native_shapes(params)
    assert native == parameter_shapes(config)
    assert traced_shapes(lambda x: export(config, unflatten(x)), native) == shapes
    return native


def error(got, wanted) -> float:
    assert got.shape == wanted.shape
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


def assert_bit_for_bit(exported: dict, tensors: dict):
    assert set(exported) == set(tensors)
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype and exported[name].shape == tensor.shape, name
        assert exported[name].tobytes() == tensor.tobytes(), name
