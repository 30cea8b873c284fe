"""Golden cases and published layouts: where they are, and how outputs are compared."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.models.transformer import Transformer
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


def run(config, params, batch, time, time_BN=None):
    """The transformer's output for times in the published unit.

    0..1000 goes in as it is: t / 1000 and back would round.
    """
    model = Transformer(dataclasses.replace(config, time_scale=1.0))
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(model.apply, compiler_options=COMPILE_FAST)
        return np.asarray(apply({"params": params}, batch, time, time_BN))


def error(got, wanted) -> float:
    assert got.shape == wanted.shape
    return np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()


def assert_bit_for_bit(exported: dict, tensors: dict):
    assert set(exported) == set(tensors)
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype and exported[name].shape == tensor.shape, name
        assert exported[name].tobytes() == tensor.tobytes(), name
