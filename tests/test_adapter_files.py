"""Adapters in a file of their own: merged into their base they are the run's weights, and into no
other."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sora_jax import adapter_files, train_state
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten
from sora_jax.lora import LoRAConfig
from sora_jax.sharding import MeshConfig
from sora_jax.weights.tensor_files import open_tensors
from tests.two_matrices import HIDDEN, LAYERS, WIDTH, Run

LORA = LoRAConfig(rank=2, alpha=6.0, targets=(r"^blocks/.*mlp_(in|out)/kernel$", "^head/kernel$"))


@pytest.fixture(scope="module")
def trained():
    run = Run(LORA)
    return run, run.after(3)[0]


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    run, state = trained
    folder = tmp_path_factory.mktemp("adapters")
    paths = adapter_files.write_trained(LORA, state, "runs/x", run.mesh, folder)
    assert paths == [str(folder / "adapters.safetensors"), str(folder / "adapters.json")]
    return folder / "adapters.safetensors"


@pytest.fixture
def base(trained):
    """Numpy arrays by dotted name, as weights are read from files."""
    return flatten(jax.device_get(trained[1].frozen["params"]))


def test_merged_into_their_base_they_are_the_averaged_weights(trained, file, base):
    merged = adapter_files.merged(base, file, "here")
    wanted = flatten(jax.device_get(train_state.averaged_weights(trained[1])))
    assert list(merged) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
        changed = np.abs(value - base[name]).max() > 1e-4
        assert changed == (name != "blocks.mlp_in.bias")


def test_the_file_holds_adapters_alone_and_its_card_what_they_need(file):
    shapes = {name: x.shape for name, x in open_tensors(file).tensors.items()}
    assert shapes == {
        "blocks.mlp_in.kernel.a": (LAYERS, WIDTH, 2), "blocks.mlp_in.kernel.b": (LAYERS, 2, HIDDEN),
        "blocks.mlp_out.kernel.a": (LAYERS, HIDDEN, 2),
        "blocks.mlp_out.kernel.b": (LAYERS, 2, WIDTH),
        "head.kernel.a": (WIDTH, 2), "head.kernel.b": (2, WIDTH)}
    card = adapter_files.read(file)[1]
    assert (card.rank, card.alpha, card.targets, card.step, card.base) == (
        2, 6.0, LORA.targets, 3, "runs/x")


def test_a_base_has_one_digest_on_every_mesh(trained, file, tmp_path):
    many = Run(LORA, mesh=MeshConfig(data=1, fsdp=2, tensor=2), devices=jax.devices()[:4])
    adapter_files.write_trained(LORA, many.create(), "runs/x", many.mesh, tmp_path)
    assert adapter_files.read(tmp_path / "adapters.safetensors")[1].base_digest == (
        adapter_files.read(file)[1].base_digest)


def test_a_base_in_another_dtype_with_the_same_values_is_the_same(file, base):
    """As published weights are read in their own dtype, and trained in float32."""
    wide = {name: x.astype(np.float64) for name, x in base.items()}
    merged = adapter_files.merged(wide, file, "here")
    np.testing.assert_array_equal(
        merged["head.kernel"], adapter_files.merged(base, file, "here")["head.kernel"])


@pytest.mark.parametrize("change, words", [
    (lambda flat: {**flat, "head.kernel": np.nextafter(flat["head.kernel"], np.float32(9))},
     "1 of 4 parameters differ, the first is head.kernel"),
    (lambda flat: {**flat, "blocks.mlp_in.bias": flat["blocks.mlp_in.bias"][::-1]},
     "1 of 4 parameters differ, the first is blocks.mlp_in.bias"),
    (lambda flat: {name: x for name, x in flat.items() if name != "head.kernel"},
     "1 of 3 parameters differ, the first is head.kernel"),
    (lambda flat: {**flat, "tail.kernel": flat["head.kernel"]},
     "1 of 5 parameters differ, the first is tail.kernel"),
])
def test_another_base_is_refused_by_name(file, base, change, words):
    with pytest.raises(UserError, match=rf"belong to runs/x \(digest \w+\) and runs/y has other "
                                        rf"weights \(digest \w+\): {words}"):
        adapter_files.merged(change(base), file, "runs/y")


def test_files_that_are_no_pair_are_one_line(file, base, tmp_path):
    def copied(name):
        (tmp_path / name).mkdir()
        for path in (file, file.with_suffix(".json")):
            shutil.copy(path, tmp_path / name)
        return tmp_path / name / file.name

    with pytest.raises(UserError, match="adapters are two files, .* one cannot be read"):
        adapter_files.merged(base, tmp_path / "absent.safetensors", "here")
    torn = copied("torn")
    torn.write_bytes(torn.read_bytes()[:-4])
    with pytest.raises(UserError, match="adapters and card are not a pair"):
        adapter_files.merged(base, torn, "here")
    foreign = copied("foreign")
    foreign.with_suffix(".json").write_text(json.dumps({"format": "sora_jax transformer 1"}))
    with pytest.raises(UserError, match="is not one of 'sora_jax adapters 1'"):
        adapter_files.merged(base, foreign, "here")
    less = copied("less")
    card = dataclasses.asdict(adapter_files.read(file)[1])
    del card["rank"]
    less.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="less/adapters.safetensors:.rank is missing"):
        adapter_files.merged(base, less, "here")
