"""configs/vae_wan.py on a tiny Wan VAE as published, and its decoder alone after that: both begin
as the weights they are given, and the second leaves latents as they are."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import configs.vae
from configs import vae_two_stage, vae_wan
from sora_jax import optim, run_config, sharding, train
from sora_jax.core.errors import UserError
from sora_jax.core.tree import flatten, named_leaves
from sora_jax.models.video_vae import ENCODING, VideoVAE, VideoVAEConfig
from sora_jax.tasks import initial_vae, registry, vae
from sora_jax.tasks.exported import exporter
from sora_jax.train_step import state_functions
from sora_jax.weights import published
from sora_jax.weights.quantized import bits_of
from sora_jax.weights.tensor_files import open_tensors
from sora_jax.weights.vae_files import load_vae, save_vae
from tests.tiny_wan import write_clips, write_vae

STEPS, RATE = 3, 1e-3
SIZE = {"frames": 5, "height": 16, "width": 16, "weight": 1.0, "batch": 2}
VAE = VideoVAEConfig(
    encoder_dims=(2, 4), decoder_dims=(2, 4), z_dim=4, temporal_downsample=(True,),
    num_res_blocks=1, norm_eps=0.0)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "vae"
    write_vae(folder, VAE)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A user's folder of four clips of 5 and 9 frames, and where its dataset is prepared."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder, tmp_path_factory.mktemp("data")


def settled(config, weights, clips, workdir, **changes):
    """The config on these weights and clips, as the command has it after reading the weights."""
    config.init.weights = str(weights)
    config.data.update({"dataset": "video_folder", "folder": str(clips[0]),
                        "data_dir": str(clips[1]), "max_frames": 5, "fps": 8.0})
    config.pixels.update({"sizes": (SIZE,), "target_fps": 8.0})
    config.optim.update({"learning_rate": RATE, "warmup_steps": 0, "weight_decay": 0.0})
    config.num_steps, config.log_every_steps, config.checkpoint.every_steps = STEPS, 1, STEPS
    config.sampling.num_clips = config.evaluation.num_vae_clips = 0
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return registry.settled(run_config.resolve(config), str(workdir))


def trained(config, workdir):
    run_config.claim_workdir(config, str(workdir))
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        train.train(config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def whole(wan, clips, tmp_path_factory):
    """The workdir of a run that trained all of the published VAE."""
    workdir = tmp_path_factory.mktemp("whole")
    return trained(settled(vae_wan.get_config("runlocal"), wan, clips, workdir), workdir)


@pytest.fixture(scope="module")
def decoder(whole, clips, tmp_path_factory):
    """The workdir of a run that trained the decoder of that run's VAE, with weight decay."""
    workdir = tmp_path_factory.mktemp("decoder")
    config = settled(vae_two_stage.get_config("stage2_runlocal"), whole, clips, workdir,
                     optim__weight_decay=0.1)
    return trained(config, workdir)


def values(folder):
    return {name: np.asarray(x) for name, x in flatten(load_vae(folder).params).items()}


def test_architecture_parameters_and_statistics_are_those_of_the_weights(wan, whole):
    own = vae_wan.get_config("runlocal")
    own.data.folder = "somewhere"
    assert run_config.load_workdir(whole).vae == VAE != run_config.resolve(own).vae
    theirs, ours = values(wan), values(whole)
    moved = {name: np.abs(ours[name] - theirs[name]).max() for name in theirs}
    assert 0 < max(moved.values()) < 2 * STEPS * RATE, "AdamW moves a value by its rate at most"
    assert sum(x > 0 for x in moved.values()) > 0.8 * len(moved)
    card = load_vae(whole).card
    assert (card["latent_mean"], card["latent_std"]) == ([0.1, 0.0, -0.1, 0.2], [1, 0.5, 2, 1.5])
    assert card["channel_std"] is None and load_vae(whole).digest != load_vae(wan).digest


def test_the_trained_vae_goes_into_the_published_files_and_comes_back_exactly(wan, whole, tmp_path):
    exporter(whole)(str(whole), tmp_path / "out", None)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (wan / "config.json").read_text())
    theirs, ours = (open_tensors(x / "diffusion_pytorch_model.safetensors").tensors
                    for x in (wan, tmp_path / "out"))
    assert {n: (x.shape, x.dtype) for n, x in ours.items()} == {
        n: (x.shape, x.dtype) for n, x in theirs.items()}
    again = published.as_native(tmp_path / "out")[2]
    for name, leaf in values(whole).items():
        np.testing.assert_array_equal(again[name], leaf, name)


def test_after_the_decoders_stage_the_encoder_is_the_same_bits(whole, decoder):
    before, after = values(whole), values(decoder)
    frozen = {name for name in before if name.split(".")[0] in ENCODING}
    assert {name.split(".")[0] for name in frozen} == {"encoder", "quant_conv"}
    for name in before:
        same = before[name].tobytes() == after[name].tobytes()
        assert same if name in frozen else not same or not before[name].any(), name


def test_latent_caches_of_the_first_stage_stay_valid_unless_the_card_lies(whole, decoder, tmp_path):
    assert load_vae(decoder).digest == load_vae(whole).digest
    for name in ("vae.safetensors", "vae.json"):
        (tmp_path / name).write_bytes((decoder / name).read_bytes())
    card = json.loads((tmp_path / "vae.json").read_text())
    (tmp_path / "vae.json").write_text(json.dumps({**card, "latent_mean": [0.0] * 4}))
    with pytest.raises(UserError, match="latents_of"):
        load_vae(tmp_path)


def test_a_decoder_on_a_stored_encoder_is_stored_like_it_and_keeps_its_latents(clips, tmp_path):
    config = dataclasses.replace(VAE, encoder_dims=(16, 24), decoder_dims=(16, 24), norm_eps=1e-6)
    params = jax.jit(VideoVAE(config).init)(
        jax.random.key(0), np.zeros((1, 3, 8, 8, 3), np.float32))["params"]
    first = tmp_path / "first"
    save_vae(first / "vae.safetensors", config, nn.unbox(params), np.zeros(4), np.ones(4), {},
             kernel_bits=6)
    run = settled(configs.vae.get_config("decoder_runlocal"), first, clips, tmp_path / "second",
                  pixels__crop=True)
    second = trained(run, tmp_path / "second")
    assert bits_of(open_tensors(second / "vae.safetensors").tensors) == 6
    assert load_vae(second).digest == load_vae(first).digest
    before, after = values(first), values(second)
    assert any(before[name].tobytes() != after[name].tobytes() for name in before)


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_a_frozen_encoder_has_no_slots_in_the_optimizer(wan, clips, tmp_path, adversarial):
    config = vae_two_stage.get_config("stage2_runlocal")
    config.vae_loss.adversarial.weight = adversarial
    config.vae_loss.adversarial.discriminator.update({"channels": 4, "levels": 2})
    config = settled(config, wan, clips, tmp_path)
    task, _ = vae.outline(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    _, abstract, _ = state_functions(config, task, task.optimizer, mesh)
    names = [name for name, leaf in named_leaves(abstract.opt_state) if leaf.ndim]
    trained = [name for name, _ in named_leaves(abstract.params) if not initial_vae.is_frozen(name)]
    assert len(names) == 2 * len(trained) and len(trained) < len(named_leaves(abstract.params))
    assert not any({*name.split("/")} & {*ENCODING} for name in names)
    assert any("discriminator/" in name for name in names) == bool(adversarial)


def test_the_published_vae_beside_a_discriminator_begins_as_it_is(wan, clips, tmp_path):
    config = vae_wan.get_config("runlocal")
    config.vae_loss.adversarial.weight = 0.5
    config.vae_loss.adversarial.discriminator.update({"channels": 4, "levels": 2})
    task = vae.build(settled(config, wan, clips, tmp_path), str(tmp_path))
    params = task.initial()
    assert set(params) == {"vae", "discriminator"} and params["discriminator"]
    for name, leaf in values(wan).items():
        np.testing.assert_array_equal(flatten(params["vae"])[name], leaf)


@pytest.mark.parametrize("change, words", [
    ({"vae_train": "encoder"}, "vae_train = 'encoder' is unknown; allowed: all, decoder"),
    ({"init": {"weights": ""}}, "freezes the encoder of given weights"),
    ({"task": "diffusion"}, "set task to 'vae'"),
])
def test_a_decoder_without_an_encoder_to_keep_is_refused(change, words):
    config = vae_two_stage.get_config("stage2_runlocal")
    config.update(change)
    with pytest.raises(UserError, match=words):
        run_config.resolve(config)


def test_without_weights_a_plan_takes_the_configs_own_architecture(tmp_path, capsys):
    config = vae_wan.get_config("runlocal")
    config.data.folder, config.init.weights = "somewhere", str(tmp_path / "absent")
    config = run_config.resolve(config)
    assert registry.settled(config, str(tmp_path), planning=True) == config
    assert "no weights at" in capsys.readouterr().out
    with pytest.raises(UserError, match="no VAE weights at .*absent"):
        registry.settled(config, str(tmp_path))


def test_parameters_without_slots_are_left_as_they_are():
    config = optim.OptimConfig(learning_rate=1.0, warmup_steps=0, weight_decay=1.0)
    tx = optim.without(optim.make_optimizer(config, 10), lambda name: name == "held/kernel")
    params = {name: {"kernel": np.ones((2, 2), np.float32)} for name in ("held", "free")}
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    assert not updates["held"]["kernel"].any() and updates["free"]["kernel"].all()
