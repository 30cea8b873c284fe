"""Every training command of docs/finetuning.md is a config that holds together."""

import pathlib
import shlex
import sys

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
    words = shlex.split(command)[2:]
    monkeypatch.setattr(sys, "argv", words)  # where config flags look for what they override
    values(words)
    config = run_config.resolve(values.config)
    optim = config.optim
    assert (config.lora.rank or any(group.freeze for group in optim.groups)
            or optim.mup_base_width or config.init.adapters)


def test_the_page_has_commands():
    assert len(COMMANDS) == 5
