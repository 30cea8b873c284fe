"""A clip in chunks is the whole clip, in constant memory; tiles meet without an edge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core.errors import UserError
from sora_jax.models import vae_streaming
from sora_jax.models.vae_streaming import decode_stream, encode_stream, reconstruct_stream
from sora_jax.models.vae_tiling import Box, Tiling, blended, tiles
from sora_jax.models.video_vae import VideoVAE, VideoVAEConfig

WAN_LIKE = VideoVAEConfig(
    encoder_dims=(4, 8, 8), decoder_dims=(4, 8, 8), z_dim=3, temporal_downsample=(True, True),
    num_res_blocks=1, num_mid_blocks=1)
CONFIGS = {
    "wan_like": WAN_LIKE,
    "shortcuts": dataclasses.replace(
        WAN_LIKE, temporal_kernels=(1, 3, 1), residual=True, block_shortcut=True, patch_size=2),
    "image": dataclasses.replace(
        WAN_LIKE, temporal_downsample=(False, False), temporal_kernels=(1, 1, 1),
        latent_temporal_kernel=1, norm_groups=2, upsample_halves=False, quant_convs=False),
    "blocks": VideoVAEConfig(
        encoder_dims=(8,), decoder_dims=(8,), z_dim=3, temporal_downsample=(), num_res_blocks=1,
        patch_size=4, patch_frames=2, context_blocks=(1, 2), context_width=4,
        block_shortcut=True),
}


def random_vae(config, frames, seed=0):
    """(params with all weights set, pixels (2, frames, 16, 24, 3))."""
    rng = np.random.default_rng(seed)
    start = jax.ShapeDtypeStruct((1, 1 + config.compression.time, 16, 16, 3), jnp.float32)
    abstract = jax.eval_shape(VideoVAE(config).init, jax.random.key(0), start)
    leaves, tree = jax.tree.flatten(abstract["params"])
    params = jax.tree.unflatten(
        tree, [0.25 * rng.standard_normal(x.shape, np.float32) for x in leaves])
    return params, rng.uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)


def cut(x, *lengths):
    """x in pieces of these lengths along time, the last takes the rest."""
    return np.split(x, np.cumsum(lengths), axis=1)


def joined(chunks):
    return np.concatenate([np.asarray(chunk) for chunk in chunks], axis=1)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    params, pixels = random_vae(config, 1 + 5 * config.compression.time)
    apply = jax.jit(VideoVAE(config).apply, static_argnames="method")
    mean, logvar = apply({"params": params}, pixels, method="encode")
    again = apply({"params": params}, mean, method="decode")
    return config, params, pixels, mean, logvar, again


def close(got, wanted):
    return np.abs(np.asarray(got) - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("count", [1, 2])
def test_chunks_give_the_latents_of_the_whole_clip(case, count):
    config, params, pixels, mean, logvar, _ = case
    chunks = list(encode_stream(config, params, cut(pixels, 2, 3), latents_per_chunk=count))
    assert [chunk[0].shape[1] for chunk in chunks] == {1: [1] * 6, 2: [1, 2, 2, 1]}[count]
    assert close(joined(chunk[0] for chunk in chunks), mean)
    assert close(joined(chunk[1] for chunk in chunks), logvar)


@pytest.mark.parametrize("count", [1, 3])
def test_chunks_give_the_pixels_of_the_whole_clip(case, count):
    config, params, _, mean, _, again = case
    chunks = decode_stream(config, params, cut(np.asarray(mean), 4), latents_per_chunk=count,
                           clip=False)
    assert close(joined(chunks), again)


def test_memory_does_not_grow_with_the_clip(case):
    """The same two programs run, however long the clip; what they keep has one size."""
    config, params, pixels, mean, *_ = case
    vae_streaming._encode.clear_cache()
    vae_streaming._decode.clear_cache()
    for repeats in (1, 3):
        longer = joined([pixels[:, :1], *[pixels[:, 1:]] * repeats])
        list(encode_stream(config, params, [longer]))
        list(decode_stream(config, params, [np.repeat(mean, repeats, axis=1)]))
        assert vae_streaming._encode._cache_size() == 2
        assert vae_streaming._decode._cache_size() == 2
    sizes, cache = [], {}
    for latents in np.split(np.asarray(mean), mean.shape[1], axis=1):
        _, cache = vae_streaming._decode(config, True, params, cache, latents)
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(cache)))
    assert len(set(sizes)) == 1 and (sizes[0] > 100 or config.compression.time == 1)


def test_frames_beyond_the_last_latent_are_repeated_dropped_or_refused_and_said():
    config = WAN_LIKE
    params, pixels = random_vae(config, 11)
    whole = list(encode_stream(config, params, [pixels[:, :9]]))
    told = []
    dropped = list(encode_stream(config, params, [pixels], beyond="drop", report=told.append))
    assert close(joined(c[0] for c in dropped), joined(c[0] for c in whole))
    repeated = list(encode_stream(config, params, [pixels], report=told.append))
    longer = joined([pixels, pixels[:, -1:], pixels[:, -1:]])
    wanted = list(encode_stream(config, params, [longer], beyond="refuse"))
    assert close(joined(c[0] for c in repeated), joined(c[0] for c in wanted))
    assert told == ["11 frames are 2 beyond 1 + 4k: the last 2 are dropped",
                    "11 frames are 2 beyond 1 + 4k: the last frame is repeated 2 times"]
    with pytest.raises(UserError, match="11 frames are 2 beyond.*cut the clip to 9"):
        list(encode_stream(config, params, [pixels], beyond="refuse"))


@pytest.mark.parametrize("frames", [1, 4, 9, 11])
def test_a_reconstruction_has_the_frames_of_the_clip(frames):
    params, pixels = random_vae(WAN_LIKE, frames)
    again = joined(reconstruct_stream(WAN_LIKE, params, cut(pixels, 3)))
    assert again.shape == pixels.shape


@pytest.mark.parametrize("height, width, size, overlap", [
    (7, 5, 4, 1), (4, 4, 4, 1), (3, 9, 4, 2), (16, 5, 6, 5)])
def test_tiles_cover_the_frame_and_overlap(height, width, size, overlap):
    boxes = tiles(2 * height, 2 * width, Tiling(size, overlap), unit=2)
    covered = np.zeros((2 * height, 2 * width), int)
    for box in boxes:
        covered[box.rows, box.columns] += 1
        assert box.bottom - box.top == 2 * min(size, height)
        assert box.right - box.left == 2 * min(size, width)
    assert covered.min() == 1
    lefts = sorted({(box.left, box.right) for box in boxes})
    for (_, stop), (start, _) in zip(lefts, lefts[1:], strict=False):
        assert stop - start >= 2 * overlap


def test_blending_tiles_of_a_local_function_is_the_function():
    x = np.random.default_rng(0).standard_normal((1, 2, 14, 18, 3)).astype(np.float32)
    boxes = tiles(14, 18, Tiling(6, 2))
    parts = [np.square(x[:, :, box.rows, box.columns]) for box in boxes]
    np.testing.assert_allclose(blended(parts, boxes), np.square(x), rtol=1e-5, atol=1e-6)


def test_the_seam_between_tiles_is_a_ramp_and_no_edge():
    """Two tiles that disagree by 1 meet in steps of 1 / overlap; without overlap in one of 1."""
    for overlap, step in ((8, 1 / 8), (0, 1.0)):
        boxes = [Box(0, 4, 0, 16), Box(0, 4, 16 - overlap, 32 - overlap)]
        parts = [np.zeros((1, 1, 4, 16, 1)), np.ones((1, 1, 4, 16, 1))]
        row = blended(parts, boxes)[0, 0, 2, :, 0]
        assert np.abs(np.diff(row)).max() == pytest.approx(step)
        assert row[0] == 0 and row[-1] == 1 and (np.diff(row) >= 0).all()


def test_tiled_decoding_has_no_seam_and_streams():
    """Neighbouring pixels across the middle of an overlap differ as they do anywhere else."""
    config = WAN_LIKE
    params, pixels = random_vae(config, 9)
    latents = np.random.default_rng(1).standard_normal((1, 3, 8, 20, 3)).astype(np.float32)
    whole = joined(decode_stream(config, params, [latents], clip=False))

    def error_jump(tiling):
        tiled = joined(decode_stream(config, params, [latents], clip=False, tiling=tiling))
        assert tiled.shape == whole.shape
        error = tiled - whole
        jumps = np.abs(np.diff(error, axis=3)).mean((0, 1, 2, 4))
        inner = [box.left * 4 for box in tiles(8, 20, tiling) if box.left]
        inner += [box.right * 4 for box in tiles(8, 20, tiling) if box.right < 20]
        return max(jumps[edge - 1] for edge in inner)

    assert error_jump(Tiling(8, 4)) < 0.25 * error_jump(Tiling(8, 0))
    one = joined(decode_stream(config, params, [latents], clip=False, tiling=Tiling(20, 0)))
    assert close(one, whole)
    encoded = list(encode_stream(config, params, [pixels], tiling=Tiling(4, 2)))
    assert joined(part[0] for part in encoded).shape == (2, 3, 4, 6, 3)


def test_wrong_tilings_and_chunks_are_refused():
    params, pixels = random_vae(WAN_LIKE, 5)
    for size, overlap in ((4, 4), (0, 0), (4, -1)):
        with pytest.raises(UserError, match="overlap must be"):
            Tiling(size, overlap)
    with pytest.raises(UserError, match="beyond = 'keep'"):
        next(encode_stream(WAN_LIKE, params, [pixels], beyond="keep"))
    with pytest.raises(UserError, match="latents_per_chunk = 0"):
        next(decode_stream(WAN_LIKE, params, [pixels], latents_per_chunk=0))
    with pytest.raises(UserError, match="multiples of 4"):
        next(encode_stream(WAN_LIKE, params, [pixels[:, :, :15]], tiling=Tiling(2, 1)))
