"""What the processes of a run say to each other decides for all; here the others are played.

Real processes do the same in test_two_processes.py.
"""

import json
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp
import pytest
from test_checkpoint import CheckpointConfig, Checkpointer, equal, make_state, restore, saved_steps

from sora_jax import checkpoint, checkpoint_step, processes
from sora_jax.core.errors import UserError


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    source = saved_steps(str(tmp_path_factory.getbasetemp() / "three_steps"))
    return pathlib.Path(shutil.copytree(source, tmp_path / "run"))


@pytest.fixture
def two(monkeypatch):
    """Takes exchange(text) -> what both processes say; from then on this is the first of two."""

    def play(exchange):
        for module in (checkpoint, checkpoint_step):
            monkeypatch.setattr(module, "is_joint", lambda shardings: True)
        monkeypatch.setattr(processes, "exchange", exchange)

    return play


def names(directory):
    return sorted(path.name for path in directory.glob("[0-9]*"))


def test_own_workdir_that_is_not_shared_is_refused_and_keeps_its_steps(run, two):
    two(lambda text: [text, "[1, 2]"])
    with pytest.raises(UserError, match=r"process 1 sees the steps \[1, 2\] in .*disk that all"):
        restore(run)
    assert names(run / "checkpoints") == ["1", "2", "3"]


def test_steps_of_another_workdir_are_those_that_the_first_process_sees(
        run, tmp_path, two):
    two(lambda text: [text if text != "[1, 2, 3]" else "[1, 2]", text])
    equal(restore(tmp_path / "new", resume_from=str(run)), make_state(2))


def test_mistake_that_one_process_finds_ends_all_and_moves_no_damaged_step(run, two):
    (run / "checkpoints" / "3" / "fingerprint" / "metadata").write_bytes(b"")
    said = []

    def exchange(text):
        said.append(text)
        return [text, json.dumps([False, "another model"]) if "damaged" in text else text]

    two(exchange)
    with pytest.raises(UserError, match="process 1: another model"):
        restore(run)
    assert json.loads(said[-1])[0] is True  # this process had found the damage
    assert names(run / "checkpoints") == ["1", "2", "3"]


def test_whether_a_step_is_saved_already_is_what_the_first_process_sees(run, two):
    with Checkpointer(run, CheckpointConfig(keep=9)) as checkpointer:
        two(lambda text: [json.dumps(not json.loads(text)), text])
        checkpointer.save(4, make_state(4))
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3]


def test_device_without_memory_is_no_damage(run, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.Checkpointer, "restore", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        restore(run)
    assert names(run / "checkpoints") == ["1", "2", "3"]
