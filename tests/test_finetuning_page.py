"""Every training command of docs/finetuning.md is a config that holds together."""

import pathlib
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from sora_jax import run_config

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = [line.strip() for line in (ROOT / "docs" / "finetuning.md").read_text().splitlines()
            if line.startswith("    python -m sora_jax.train")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_a_run(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(shlex.split(command)[2:])
    config = run_config.resolve(values.config)
    assert config.lora.rank or any(group.freeze for group in config.optim.groups)


def test_the_page_has_commands():
    assert len(COMMANDS) == 3
