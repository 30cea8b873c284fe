"""configs/finetune_wan.py on a tiny Wan: it begins as the published network, learns from a user's
folder, and goes back into the published files."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import finetune_wan
from sora_jax import checkpoint, run_config, sharding, train
from sora_jax.core.errors import UserError
from sora_jax.core.rng import stream
from sora_jax.core.shapes import VideoSpec
from sora_jax.core.tree import flatten, unflatten
from sora_jax.data import pipeline
from sora_jax.data.encode import write_mp4
from sora_jax.models.patchify import clips_as_rows
from sora_jax.models.transformer import Transformer
from sora_jax.tasks import diffusion, initial_weights, latents, text_embeddings
from sora_jax.tasks.initial_weights import (
    export_adapted,
    export_trained,
    load_initial,
    open_initial,
)
from sora_jax.tasks.requests import Request
from sora_jax.tasks.sampling import clip_shift, velocity
from sora_jax.weights import published
from sora_jax.weights.tensor_files import open_tensors, write_tensors
from sora_jax.weights.vae_files import load_vae
from tests.tiny_wan import write_transformer, write_wan

pytest.importorskip("tokenizers")

WORDS = ("red circle", "blue square", "green triangle", "red square", "blue circle")
STEPS = 12


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A user's folder of five clips of 5 frames."""
    folder = tmp_path_factory.mktemp("clips")
    for i, words in enumerate(WORDS):
        pixels_THWC = np.random.default_rng(i).integers(0, 256, (5, 32, 32, 3), np.uint8)
        write_mp4(folder / f"{i}.mp4", pixels_THWC // 2 + 20 * i, 8.0)
        (folder / f"{i}.txt").write_text(f"a {words} moves left")
    return folder


def make_config(wan, clips, **changes):
    config = finetune_wan.get_config("runlocal")
    config.init.weights = str(wan)
    config.data.update({"folder": str(clips), "max_frames": 5, "max_pixels": 32 * 32})
    config.text_encoder.dtype = "float32"
    config.model.update({"product_dtype": "float32", "unroll": 1})
    config.num_steps, config.log_every_steps = STEPS, 1
    config.checkpoint.every_steps = STEPS
    config.sampling.num_clips = config.evaluation.num_loss_clips = 0
    config.evaluation.num_vae_clips = 0
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return run_config.resolve(config)


@pytest.fixture(scope="module")
def run(wan, clips, tmp_path_factory):
    """(config, workdir) of a finished run."""
    return trained(make_config(wan, clips), tmp_path_factory.mktemp("run"))


def trained(config, workdir):
    """(config, workdir) after training on one device, which is saved ten times as fast."""
    run_config.claim_workdir(config, str(workdir))
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        train.train(config, str(workdir))
    return config, workdir


@pytest.fixture(scope="module")
def parts(run):
    """(vae, model, cache, its text, a batch of training)."""
    config, workdir = run
    vae = load_vae(config.latents.vae)
    cache = latents.open_latents(config, workdir, vae, "train")
    text = text_embeddings.open_text(config, workdir, cache, "train")
    loader = pipeline.packed_batches(
        cache, config.packing, config.model.patch, config.seed, num_threads=0, text=text)
    return vae, diffusion.make_model(config, vae), cache, text, loader


def test_the_first_prediction_is_that_of_the_imported_network(run, parts, wan, tmp_path):
    """Every clip of packed rows, against the imported network on that clip alone with its text
    filled up with zeros, as Wan's own pipelines call it."""
    config, _ = run
    vae, model, cache, text, loader = parts
    params = load_initial(config, model.config, str(tmp_path))
    family, theirs, flat, _ = published.as_native(wan / "transformer")
    imported, given = Transformer(theirs), unflatten(flat)
    batch, rows = loader.batch(0), loader.rows(0)
    time_BS = np.random.default_rng(0).random(batch["clip_BSF"].shape[:2]).astype(np.float32)
    std = diffusion.data_std(config.diffusion, vae)
    assert np.all(np.asarray(clip_shift(batch, config.diffusion)) == 3.0), "the same for every size"
    with jax.default_matmul_precision("highest"):
        ours_BND = np.asarray(jax.jit(lambda *x: velocity(model, std, params, *x))(
            batch, batch["tokens_BND"], time_BS))
        alone = jax.jit(lambda *x: imported.apply({"params": given}, *x))
        for r, segment in ((0, 1), (1, 2), (2, 1)):
            clip, caption = rows[r].clips[segment - 1], rows[r].captions[segment - 1]
            record = cache[int(clip)]
            words = "" if caption < 0 else record.captions[caption]
            own = clips_as_rows(record.latents_THWC[None].astype(np.float32), model.config.patch)
            own["text_embedding_BMD"] = text.embedding(words)[None]
            own["text_segment_BM"] = np.ones((1, config.text_encoder.max_tokens), np.int32)
            theirs_ND = np.asarray(alone(own, time_BS[r, None, segment - 1, None]))[0]
            mine = batch["segment_BN"][r] == segment
            np.testing.assert_allclose(
                ours_BND[r][mine], theirs_ND, atol=2e-5 * np.abs(theirs_ND).max())
            assert np.abs(theirs_ND).max() > 0.1


def test_training_begins_at_the_imported_network_and_the_loss_goes_down(run, parts, tmp_path):
    """The first loss of the log is that of the imported network on the first batch; later the loss
    is lower on the same clips, times and noise."""
    config, workdir = run
    vae, model, _, _, loader = parts
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        step, trained = checkpoints.restore_params(which="params")
    assert step == STEPS
    begun = load_initial(config, model.config, str(tmp_path))
    std = diffusion.data_std(config.diffusion, vae)
    loss = jax.jit(lambda params, batch: diffusion.loss(
        config, model, std, params, batch, stream(config.seed, "train", 0))[0])
    before, after = (float(loss(params, loader.batch(0))) for params in (begun, trained))
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    np.testing.assert_allclose(first["loss"], before, rtol=1e-4)
    assert after < 0.9 * before


def test_the_trained_weights_go_into_the_published_files_and_come_back_exactly(run, wan, tmp_path):
    config, workdir = run
    written = export_trained(workdir, tmp_path / "out")
    assert len(written) == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (wan / "transformer" / "config.json").read_text())
    theirs = open_tensors(wan / "transformer" / "diffusion_pytorch_model.safetensors").tensors
    ours = open_tensors(tmp_path / "out" / "diffusion_pytorch_model.safetensors").tensors
    assert {n: (x.shape, x.dtype) for n, x in ours.items()} == {
        n: (x.shape, x.dtype) for n, x in theirs.items()}
    assert any((ours[name] != theirs[name]).any() for name in ours)
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        _, trained = checkpoints.restore_params()
    again = published.as_native(tmp_path / "out")[2]
    for name, leaf in flatten(trained).items():
        np.testing.assert_array_equal(again[name], np.asarray(leaf), name)
    from_workdir = open_initial(str(workdir)).flat  # and another run may begin with the workdir
    np.testing.assert_array_equal(from_workdir["patch_in.kernel"], again["patch_in.kernel"])


def test_guidance_pushes_away_from_the_empty_caption(run, parts):
    config, workdir = run
    vae, model, _, text, _ = parts
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params()

    def latents_of(prompt, **settings):
        sampler = diffusion.make_sampler(
            config, model, vae, embed=text_embeddings.embedder(config, text), **settings)
        return sampler.latents(params, [Request(prompt, VideoSpec(5, 32, 32), 8.0, seed=0)])[0]

    empty = latents_of("", guidance=2.0)
    prompt = "a red circle moves right up"  # in no cache: the encoder is asked
    np.testing.assert_allclose(latents_of(prompt, guidance=0.0), empty, atol=1e-4)
    assert np.abs(latents_of(prompt, guidance=2.0) - empty).max() > 1e-3


def test_a_text_cache_of_another_encoder_is_refused_by_name(run, tmp_path, wan):
    config, workdir = run
    vae = load_vae(config.latents.vae)
    cache = latents.open_latents(config, workdir, vae, "train")
    other = dataclasses.replace(
        config, text_encoder=dataclasses.replace(config.text_encoder, max_tokens=15))
    with pytest.raises(UserError, match="text cache .* is stale: options is 'up to 16 tokens"):
        text_embeddings.open_text(other, workdir, cache, "train")
    narrow = dataclasses.replace(
        config, text_encoder=dataclasses.replace(config.text_encoder, width=32))
    with pytest.raises(UserError, match="text_encoder.width = 32 .* embeddings of width 24"):
        text_embeddings.open_text(narrow, workdir, cache, "train")


def test_adapters_go_merged_into_the_published_files(run, wan, clips, tmp_path):
    """Matrices of attention and MLPs have changed by what the adapters say, all else is the
    published bits."""
    _, prepared = run
    config, workdir = trained(make_config(
        wan, clips, lora__rank=2, data__data_dir=str(prepared / "data"),
        latents__directory=str(prepared / "latents")), tmp_path / "run")
    logs = [[json.loads(line)["loss"] for line in (at / "metrics.jsonl").read_text().splitlines()]
            for at in (prepared, workdir)]
    np.testing.assert_allclose(logs[1][0], logs[0][0], rtol=1e-4)  # step 0 is the base
    assert logs[1][-1] != logs[0][-1]
    export_trained(workdir, tmp_path / "out")
    ours, theirs = (published.as_native(at)[2] for at in (tmp_path / "out", wan / "transformer"))
    changed = {name for name in theirs if (ours[name] != theirs[name]).any()}
    assert changed == {f"blocks.{name}.kernel" for name in (
        "qkv", "out", "cross_q", "cross_kv", "cross_out", "mlp_in", "mlp_out")}
    with checkpoint.Checkpointer(workdir, config.checkpoint, read_only=True) as checkpoints:
        _, params = checkpoints.restore_params()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(ours[name], np.asarray(leaf), name)
    for layer in np.asarray(params["blocks"]["mlp_in"]["kernel"]) - theirs["blocks.mlp_in.kernel"]:
        values = np.linalg.svd(layer)[1]
        assert values[2] < 1e-3 * values[1]  # of rank 2
    adapters = workdir / "adapters.safetensors"
    assert adapters.stat().st_size < 0.2 * (
        wan / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    export_adapted(str(wan), tmp_path / "alone", None, str(adapters))
    alone = published.as_native(tmp_path / "alone")[2]
    begun = make_config(wan, clips, init__adapters=str(adapters))
    (tmp_path / "next").mkdir()
    again = flatten(load_initial(begun, network(begun), str(tmp_path / "next")))
    for name, x in ours.items():
        np.testing.assert_allclose(alone[name], x, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(again[name], x, atol=1e-6, err_msg=name)
    assert json.loads((tmp_path / "next" / initial_weights.INIT).read_text())["adapters"] == str(
        adapters)
    with pytest.raises(UserError, match=f"belong to {wan} .* and {prepared} has other weights"):
        export_adapted(str(prepared), tmp_path / "no", None, str(adapters))
    assert not (tmp_path / "no").exists()


def network(config):
    return config.model.network(4, config.text_encoder.width)


@pytest.mark.parametrize("changes, words", [
    ({"model__mlp_width": 80}, "config.model.mlp_width is 80 here and 72 there"),
    ({"model__rope_split": (6, 6, 8)}, "config.model.rope_split"),
    ({"text_encoder__width": 32}, "config.text_encoder.width is 32 here and 24 there"),
    ({"model__patch": (1, 4, 4)}, r"has the patch \(1, 2, 2\) .* say with init.patch how"),
    ({"init__weights": "/nowhere"}, "there is nothing at /nowhere"),
])
def test_weights_of_another_network_are_refused_by_option(wan, clips, tmp_path, changes, words):
    config = make_config(wan, clips, **changes)
    with pytest.raises(UserError, match=words):
        load_initial(config, network(config), str(tmp_path))


def test_weights_that_miss_a_key_are_refused_by_its_name(wan, clips, tmp_path):
    write_transformer(tmp_path / "less")
    file = tmp_path / "less" / "diffusion_pytorch_model.safetensors"
    tensors = {name: np.array(x) for name, x in open_tensors(file).tensors.items()}
    del tensors["proj_out.bias"]
    write_tensors(file, tensors)
    config = make_config(tmp_path / "less", clips)
    with pytest.raises(UserError, match="1 keys missing: proj_out.bias"):
        load_initial(config, network(config), str(tmp_path))
    with pytest.raises(UserError, match="wan_vae, which is no transformer"):
        open_initial(str(wan / "vae"))


@pytest.mark.parametrize("name, words", [
    ({"checkpoint__init_from": "runs/x"}, "both name weights to begin with"),
    ({"text_encoder__tokenizer": ""}, "name the tokenizer's file"),
    ({"text_encoder__padding": "ones"}, "allowed: none, zeros, encoded"),
    ({"packing__caption_tokens": 9}, "caption_tokens = 9 cuts bytes"),
    ({"packing__row_text": 8}, "max_tokens = 16 is above packing.row_text = 8"),
    ({"init__weights": "", "init__adapters": "x"}, "init.adapters = 'x' belong to weights and"),
    ({"init__patch": "stretch"}, "allowed: '', 'central', 'average', 'resample'"),
])
def test_a_config_that_cannot_be_is_refused_by_field(wan, clips, name, words):
    with pytest.raises(UserError, match=words):
        make_config(wan, clips, **name)


@pytest.mark.parametrize("how, patch", [
    ("central", (2, 2, 2)), ("average", (2, 2, 2)), ("resample", (1, 4, 4))])
def test_weights_with_another_patch_fit_a_run_that_says_how(wan, clips, tmp_path, how, patch):
    config = make_config(wan, clips, model__patch=patch, init__patch=how)
    params = flatten(load_initial(config, network(config), str(tmp_path)))
    theirs = open_initial(str(wan)).flat
    assert params["patch_in.kernel"].shape[0] == 4 * np.prod(patch)
    np.testing.assert_array_equal(params["blocks.qkv.kernel"], theirs["blocks.qkv.kernel"])
    if how == "central":
        frames = params["patch_in.kernel"].reshape(2, -1, 40)
        np.testing.assert_array_equal(frames[1], theirs["patch_in.kernel"])
        assert not frames[0].any()
    assert "published" not in json.loads((tmp_path / initial_weights.INIT).read_text())
