"""Perceptual distances: LPIPS as published, the project's own features under their own name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten
from sora_jax.models import distortion_net
from sora_jax.models.distortion_net import KINDS, DistortionNet, DistortionNetConfig, distorted
from sora_jax.models.lpips import LAYERS, SCALE, SHIFT, lpips
from sora_jax.tasks.perceptual import clip_features, perceptual_distance
from sora_jax.weights import lpips_file
from sora_jax.weights.features_file import load_features, save_features
from sora_jax.weights.rules import published_shapes

CHANNELS = (2, 3, 4, 4, 5)


@pytest.fixture(scope="module")
def published():
    """Random tensors in the layout of the package, with its constants and its second copy."""
    rng = np.random.default_rng(0)
    tensors = {
        name: (0.5 * rng.standard_normal(shape)).astype(np.float32) for name, shape in
        published_shapes(lpips_file.rules(), lpips_file.shapes(CHANNELS)).items()}
    for i in range(len(LAYERS)):
        weight = np.abs(tensors[f"lin{i}.model.1.weight"])
        tensors[f"lin{i}.model.1.weight"] = tensors[f"lins.{i}.model.1.weight"] = weight
    tensors["scaling_layer.shift"] = np.array(SHIFT, np.float32).reshape(1, 3, 1, 1)
    tensors["scaling_layer.scale"] = np.array(SCALE, np.float32).reshape(1, 3, 1, 1)
    return tensors


def by_definition(tensors, x, y):
    """Equation 1 of the paper, channels first, in numpy, one image (3, H, W)."""
    def features(x):
        x = (x - tensors["scaling_layer.shift"][0]) / tensors["scaling_layer.scale"][0]
        for i, layers in enumerate(LAYERS):
            if i:
                c, h, w = x.shape
                x = x.reshape(c, h // 2, 2, w // 2, 2).max((2, 4))
            for layer in layers:
                kernel = tensors[f"net.slice{i + 1}.{layer}.weight"]
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
                x = np.einsum("chwij,ocij->ohw", windows, kernel)
                x = np.maximum(x + tensors[f"net.slice{i + 1}.{layer}.bias"][:, None, None], 0)
            yield x / (np.sqrt((x**2).sum(0)) + 1e-10)

    return sum(
        ((a - b) ** 2 * tensors[f"lin{i}.model.1.weight"][0]).sum(0).mean()
        for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)))


def test_lpips_is_its_definition(published, tmp_path):
    save_file(published, tmp_path / "lpips.safetensors")
    params = lpips_file.load_lpips(tmp_path / "lpips.safetensors", lpips_file.shapes(CHANNELS))
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, 2, 32, 16, 3)).astype(np.float32)
    measure = jax.jit(lpips)
    got = measure(params, x, y)
    wanted = [by_definition(published, *(z.transpose(2, 0, 1).astype(np.float64) for z in pair))
              for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
    assert np.abs(measure(params, x, x)).max() == 0
    assert np.isfinite(jax.jit(jax.grad(lambda z: lpips(params, z, x).sum()))(x)).all()


def test_files_that_are_no_lpips_are_refused(published, tmp_path):
    path = tmp_path / "lpips.safetensors"
    save_file({k: v for k, v in published.items() if k != "lin3.model.1.weight"}, path)
    with pytest.raises(UserError, match="1 keys missing: lin3.model.1.weight"):
        lpips_file.load_lpips(path, lpips_file.shapes(CHANNELS))
    save_file({"a": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="none of the tensors of LPIPS"):
        lpips_file.load_lpips(path)
    for name, message in (("vgg:x", "are unknown"), ("lpips:", "are unknown"),
                          (f"lpips:{tmp_path}/no", "no weights of lpips")):
        with pytest.raises(UserError, match=message):
            perceptual_distance(name)
    with pytest.raises(UserError, match="a distance and no vector"):
        clip_features(f"lpips:{path}")


def test_own_features_come_back_from_their_file_and_measure(tmp_path):
    config = DistortionNetConfig(channels=(4, 6))
    x = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16, 3), minval=-1, maxval=1)
    params = DistortionNet(config).init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), params,
                          is_leaf=lambda leaf: hasattr(leaf, "names"))
    path = tmp_path / "features.safetensors"
    save_features(path, config, params, {"seed": 0})
    again, restored = load_features(path)
    assert again == config
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(restored)[name], leaf)
    distance = perceptual_distance(f"distortion:{path}")
    noise = 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    near, far = distance(x + 0.2 * noise, x), distance(x + noise, x)
    assert (0 < near).all() and (near < far).all() and np.abs(distance(x, x)).max() == 0
    clip = np.asarray((x[0] + 1) * 127.5, np.uint8)
    assert clip_features(f"distortion:{path}")(clip).shape == (2 * (4 + 6),)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="has format None"):
        load_features(path)


def test_each_distortion_does_what_its_name_says():
    x = jax.random.uniform(jax.random.key(0), (len(KINDS), 4, 12, 12, 3), minval=-1, maxval=1)
    kind = jnp.arange(len(KINDS))
    got = distorted(x, kind, jnp.full(len(KINDS), distortion_net.STRENGTHS), jax.random.key(1))
    change = dict(zip(KINDS, np.asarray(got - x), strict=True))
    assert np.abs(change["none"]).max() == 0
    assert np.std(got[KINDS.index("blur")]) < 0.6 * np.std(x[KINDS.index("blur")])
    assert np.abs(change["noise"]).min((0, 3)).max() > 0
    assert np.ptp(change["colour"], axis=(0, 1, 2)).max() < 1e-6
    assert np.ptp(change["flicker"], axis=(1, 2, 3)).max() < 1e-6
    assert np.ptp(change["flicker"], axis=0).min() > 1e-3
    blocks = np.asarray(got[KINDS.index("blocks")]).reshape(4, 3, 4, 3, 4, 3)
    assert np.ptp(blocks, axis=(2, 4)).max() < 1e-6
    for name in KINDS[1:]:
        assert np.abs(change[name]).max() > 0.01, name
