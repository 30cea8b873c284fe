"""A workdir belongs to one config, whatever differs is named."""

import dataclasses
import functools
import json

import pytest

from configs import base
from sora_jax import run_config, workdir
from sora_jax.core.errors import UserError
from sora_jax.data.conditioning import ConditioningConfig


def test_workdir_of_another_config_is_refused_with_both_values(tmp_path):
    config = {"seed": 0, "mesh": {"data": 1}, "optim": {"learning_rate": 1e-3}, "sizes": (1, 2)}
    lines = []
    claim = functools.partial(
        workdir.claim, tmp_path, may_differ=("mesh",), report=lines.append)
    claim(config)
    claim(config)
    assert workdir.read(tmp_path) == json.loads(json.dumps(config)) and not lines
    claim({**config, "mesh": {"data": 2}})
    assert lines == [
        "changed since the workdir was begun: config.mesh.data is 1 there and 2 here"]
    assert workdir.read(tmp_path)["mesh"] == {"data": 2}
    with pytest.raises(UserError, match="config.seed is 0 there and 1 here; "
                       "config.optim.learning_rate is 0.001 there and 0.002 here"):
        claim({**config, "optim": {"learning_rate": 2e-3}, "seed": 1})
    assert workdir.read(tmp_path)["seed"] == 0
    with pytest.raises(UserError, match="config.meshes is absent there and 3 here"):
        claim({**config, "meshes": 3})


def test_fields_that_came_after_a_workdir_was_begun_have_their_defaults_there(tmp_path):
    config = run_config.resolve(base.get_config("runlocal"))
    run_config.claim_workdir(config, tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["conditioning"]["ends"], old["sampling"]["resample_jump"]
    path.write_text(json.dumps(old))
    run_config.claim_workdir(config, tmp_path)
    with_ends = dataclasses.replace(config, conditioning=ConditioningConfig(ends=0.5))
    with pytest.raises(UserError, match="config.conditioning.ends is 0.0 there and 0.5 here"):
        run_config.claim_workdir(with_ends, tmp_path)
    path.write_text(json.dumps({**old, "gone": 1}))
    with pytest.raises(UserError, match="config.gone is 1 there and absent here"):
        run_config.claim_workdir(config, tmp_path)


def test_damaged_or_absent_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no workdir: it has no config.json"):
        workdir.read(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 0, ')
    with pytest.raises(UserError, match="config.json is damaged"):
        workdir.claim(tmp_path, {"seed": 0})
