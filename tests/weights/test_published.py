"""The import and export commands, and what they say of files that are not whole."""

import functools
import json
import shutil

import pytest
from commands import call_warm

from sora_jax.core.errors import UserError
from sora_jax.weights import published
from sora_jax.weights.tensor_files import open_tensors
from tests.outside_data import outside

GOLDEN = outside("golden")
pytestmark = pytest.mark.skipif(GOLDEN is None, reason="no golden files (SORA_JAX_GOLDEN)")


@pytest.fixture
def folder(tmp_path):
    """The Stable Diffusion case as a diffusers folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name, target in (("weights.safetensors", "diffusion_pytorch_model.safetensors"),
                         ("config.json", "config.json")):
        shutil.copyfile(GOLDEN / "sd_vae" / name, folder / target)
    return folder


command = functools.partial(call_warm, "sora_jax.weights", check=False)


def test_one_command_imports_a_folder_and_one_writes_it_back(folder, tmp_path):
    done = command("import", folder, tmp_path / "native")
    assert done.returncode == 0 and "sd_vae: 240 parameters" in done.stdout, done
    done = command("export", tmp_path / "native", tmp_path / "again")
    assert done.returncode == 0, done
    for path in folder.iterdir():
        again = tmp_path / "again" / path.name
        if path.suffix == ".json":
            assert json.loads(again.read_text()) == json.loads(path.read_text())
        else:
            assert again.read_bytes() == path.read_bytes()


MODELS = ("wan_dit_t2v", "wan_dit_i2v", "dit_paper_diffusers", "cogvideox_dit", "mmdit_block",
          "t5_encoder", "umt5_encoder", "clip", "siglip", "wan21_vae", "wan22_vae", "sd_vae")


@pytest.mark.parametrize("case", MODELS)
def test_every_published_model_comes_back_byte_for_byte(case, tmp_path):
    source = GOLDEN / case / "weights.safetensors"
    published.import_weights(source, tmp_path / "native", None, None)
    published.export_weights(tmp_path / "native", tmp_path / "again", None)
    written, = (tmp_path / "again").glob("*.safetensors")
    assert written.read_bytes() == source.read_bytes()


def test_a_wrong_command_is_one_line(tmp_path):
    done = command("import", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: the arguments are import")
    assert done.stderr.count("\n") == 1


def test_a_truncated_file_is_refused_wherever_it_ends(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    for size in (0, 5, 8, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="no whole safetensors file"):
            open_tensors(path)


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="there is no family of weights 'wan'; known are wan_vae"):
        published.import_weights(folder, tmp_path / "x", "wan")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"_class_name": "AutoencoderKLLTXVideo"}, "AutoencoderKLLTXVideo.*none of the families"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"latent_channels": 6}, "of another shape: .*, should be"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            published.import_weights(folder, tmp_path / "x")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="looks like sd_vae but has no config.json"):
        published.import_weights(folder, tmp_path / "x")
    assert not (tmp_path / "x").exists()
