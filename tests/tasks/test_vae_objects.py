"""Claims of the field that latents are drawn to while a VAE is trained."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from sora_jax import run_config, sharding
from sora_jax.core.errors import UserError
from sora_jax.core.shapes import Compression
from sora_jax.data.moving_shapes import objects
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.models.video_vae import VideoVAE
from sora_jax.tasks import vae, vae_objects

ROOT = pathlib.Path(__file__).parents[2]
COMPRESSION = Compression(time=4, space=8)


def thing(x_T, y_T, radius=8.0, shape="square", rgb=(225, 45, 45)):
    return {"centers_T2": np.stack([x_T, y_T], axis=1).tolist(), "radius": radius, "shape": shape,
            "rgb": list(rgb)}


def field_of(*shapes, height=6, width=6):
    """Without the gains and the mean of the window: (T', height, width, CHANNELS)."""
    objects_BOTK = objects.objects_of({"shapes": shapes})[None]
    field_BTHWC = np.array(vae_objects.field(objects_BOTK, COMPRESSION, height, width))
    return field_BTHWC[0] / vae_objects.GAINS + np.eye(vae_objects.CHANNELS)[0] * (
        vae_objects.WINDOW_MEAN)


def test_latents_say_how_far_the_centre_is_and_the_nearest_says_it_loudest():
    x_T = np.full(5, 20.0)  # the middle of column 2
    y_T = np.array([12.0, 17, 19, 21, 23])  # row 1, then a mean of 20, row 2
    field_THWC = field_of(thing(x_T, y_T))
    for t, row in enumerate((1, 2)):
        window_HW = field_THWC[t, ..., 0]
        assert np.unravel_index(window_HW.argmax(), window_HW.shape) == (row, 2)
        np.testing.assert_allclose(window_HW[row, 2], 1, rtol=1e-6)
    offset_HW2 = field_THWC[1, ..., 1:3] / field_THWC[1, ..., :1]
    np.testing.assert_allclose(offset_HW2[2, 2], 0, atol=1e-6)
    np.testing.assert_allclose(offset_HW2[2, 4], [-2, 0], atol=1e-5)  # two latents to the left
    np.testing.assert_allclose(offset_HW2[0, 2], [0, 2], atol=1e-5)


def test_motion_is_the_way_within_a_latent_in_the_unit_of_offsets_and_frame_0_cannot_know_it():
    """So a decoder can place each of a latent's frames, quick ones as exactly as slow ones."""
    still = field_of(thing(np.full(5, 20.0), np.full(5, 20.0)))
    for pixels_per_frame in (0.5, 1.5, 3.0):
        x_T = 20 + pixels_per_frame * np.arange(5)
        moving = field_of(thing(x_T, 0 * x_T + 20))
        away = (moving[1] / moving[1, ..., :1])[..., 1:3] - (still[1] / still[1, ..., :1])[..., 1:3]
        motion_HW2 = moving[1, ..., 4:6] / moving[1, ..., :1]
        # Three of its four frames apart; its mean is 2.5 frames from where the still one stays.
        np.testing.assert_allclose(motion_HW2, away * 3 / 2.5, atol=1e-3)
        np.testing.assert_allclose(
            motion_HW2, np.broadcast_to([3 * pixels_per_frame / 8, 0], (6, 6, 2)), atol=1e-3)
        assert not moving[0, ..., 4:6].any()
    assert not still[..., 4:6].any()


def test_kinds_are_equally_far_apart():
    x_T, y_T = np.full(5, 12.0), np.full(5, 12.0)
    one = {kind: field_of(thing(x_T, y_T, shape=kind)) for kind in ("circle", "square", "cross")}
    distances = [np.linalg.norm(one[a] - one[b]) for a, b in (
        ("circle", "square"), ("circle", "cross"), ("square", "cross"))]
    np.testing.assert_allclose(distances, distances[0], rtol=1e-5)


def test_a_latent_between_two_objects_speaks_of_the_nearer_one():
    x_T, y_T = np.full(5, 12.0), np.full(5, 20.0)
    first, second = thing(x_T, y_T), thing(x_T + 24, y_T, shape="circle", rgb=(45, 205, 215))
    one, two, both = field_of(first), field_of(second), field_of(first, second)
    for column, mine in ((0, one), (1, one), (4, two), (5, two)):
        np.testing.assert_allclose(both[:, 2, column], mine[:, 2, column], atol=1e-3)
    heard_C = (one + two)[0, 2, 2]  # 8 of the 24 pixels from the first, where the sum is of both
    assert np.abs(both - one)[0, 2, 2].max() < 0.3 * np.abs(heard_C - one[0, 2, 2]).max()


def test_far_from_every_object_the_field_ends():
    x_T = np.full(5, 12.0)
    field_THWC = field_of(thing(x_T, x_T), thing(x_T + 4, x_T), height=40, width=40)
    assert np.isfinite(field_THWC).all()
    np.testing.assert_allclose(field_THWC[:, 20:, 20:], 0, atol=1e-6)


def test_the_field_of_usual_clips_has_a_spread_of_about_one_in_every_channel():
    fields = []
    for index in range(40):
        clip = generate(3, index, ShapesSpec(frames=((17, 1.0),)))
        height, width = (side // 8 for side in clip.pixels_THWC.shape[1:3])
        fields.append(np.array(vae_objects.field(
            objects.objects_of(clip.state)[None], COMPRESSION, height, width)
        ).reshape(-1, vae_objects.CHANNELS))
    spread = np.concatenate(fields).std(0)
    assert spread.min() > 0.6 and spread.max() < 1.5, spread


def test_stills_have_a_field_without_motion():
    objects_OTK = objects.objects_of({"shapes": [thing(np.array([12.0]), np.array([12.0]))]})
    field_BTHWC = np.array(vae_objects.field(objects_OTK[None], COMPRESSION, 4, 4))
    assert field_BTHWC.shape == (1, 1, 4, 4, vae_objects.CHANNELS)
    assert not field_BTHWC[..., 4:6].any()


def config_with(**changes):
    config = runpy.run_path(str(ROOT / "configs/vae.py"))["get_config"]("runlocal")
    config.vae.update({"encoder_dims": (16,), "decoder_dims": (16,)})
    config.update(changes)
    return config


def test_the_error_pulls_at_the_encoder_alone_and_the_loss_counts_it_by_its_weight():
    config = run_config.resolve(config_with())
    _, batch = vae.outline(config)
    clip = generate(3, 0, ShapesSpec(sizes=((32, 32, 1.0),), frames=((9, 1.0),)))
    batch = {"pixels_BTHWC": clip.pixels_THWC[None].astype(np.float32) / 127.5 - 1,
             "objects_BOTK": objects.objects_of(clip.state)[None]}
    model = VideoVAE(config.vae)
    params = jax.jit(lambda key: sharding.unbox(vae.init(config, model, key)))(jax.random.key(0))
    slope = jax.jit(jax.grad(
        lambda p: vae.forward(config, model, p, batch, jax.random.key(1)).objects))(params)
    size = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(part))
            for name, part in slope.items()}
    assert size["encoder"] > 0 and size["decoder"] == 0

    mapping = config_with()
    mapping.vae_loss.objects_weight = 0.3
    loss, scalars = (jax.jit(lambda p, c=c: vae.loss(c, model, None, p, batch, jax.random.key(1)))(
        params) for c in (run_config.resolve(mapping), config))
    np.testing.assert_allclose(loss[0] - scalars[0], 0.2 * loss[1]["objects"], rtol=1e-3)


@pytest.mark.parametrize("section, field, value", [
    ("vae", "z_dim", 8), ("pixels", "crop", True), ("pixels", "target_fps", 8.0)])
def test_latents_and_batches_that_cannot_hold_the_field_are_one_line(section, field, value):
    config = config_with()
    config[section][field] = value
    with pytest.raises(UserError, match="objects_weight.*z_dim") as caught:
        vae.outline(run_config.resolve(config))
    assert "\n" not in str(caught.value)


def test_records_of_other_datasets_are_one_line():
    with pytest.raises(UserError, match="objects_weight.*moving_shapes"):
        objects.objects_of({"source": "a.mp4"})
