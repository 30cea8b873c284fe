"""A checkpoint is whole or refused, whatever happens to its files, on any mesh."""

import errno
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import sharding, train_state
from sora_jax.checkpoint import CheckpointConfig, Checkpointer
from sora_jax.checkpoint_step import DamagedCheckpoint
from sora_jax.core.errors import UserError
from sora_jax.fingerprint import fingerprints
from sora_jax.optim import OptimConfig, make_optimizer
from sora_jax.sharding import MeshConfig

TX = make_optimizer(OptimConfig(warmup_steps=1), 100)


def make_state(seed=0, width=8):
    """A small train state of three dtypes and shapes, filled at random."""
    rng = np.random.default_rng(seed)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(64, width, 8)), jnp.float32),
                   "bias": jnp.asarray(rng.normal(size=(width,)), jnp.bfloat16)},
        "scale": jnp.asarray(rng.normal(), jnp.float32),
    }
    state = train_state.create(params, TX)
    return jax.tree.map(
        lambda x: x if x.dtype == jnp.int32 else jnp.asarray(rng.normal(size=x.shape), x.dtype),
        state).replace(step=jnp.int32(seed))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def placed(state, mesh=None):
    """Shardings of a state: large dimensions of 8 split over `fsdp`, the rest replicated."""
    mesh = mesh or sharding.make_mesh(MeshConfig())
    size = mesh.shape["fsdp"]
    spec = jax.sharding.PartitionSpec

    def one(x):
        split = x.ndim and x.shape[-1] % size == 0
        return jax.sharding.NamedSharding(
            mesh, spec(*[None] * (x.ndim - 1), "fsdp") if split else spec())

    return jax.tree.map(one, state)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def restore(directory, lines=None, state=None, **config):
    state = make_state() if state is None else state
    report = lines.append if lines is not None else lambda line: None
    with Checkpointer(directory, CheckpointConfig(**config), report=report) as checkpointer:
        return checkpointer.restore_or_none(abstract(state), placed(state))


@functools.cache
def saved_steps(directory: str):
    """A workdir with steps 1, 2, 3 saved from make_state(step)."""
    with Checkpointer(directory, CheckpointConfig(keep=3)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
    return pathlib.Path(directory)


@pytest.fixture
def three_steps(tmp_path_factory, tmp_path):
    source = saved_steps(str(tmp_path_factory.getbasetemp() / "three_steps"))
    return pathlib.Path(shutil.copytree(source, tmp_path / "run"))


def test_newest_state_comes_back_bit_for_bit(three_steps):
    equal(restore(three_steps), make_state(3))


def test_only_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        for step in (10, 20, 30, 35):
            checkpointer.save(step, make_state(step))
        checkpointer.wait()
        assert checkpointer.steps() == [30, 35]
        assert checkpointer.due(20) is False and checkpointer.due(500) is True


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=4, fsdp=2)])
def test_state_saved_on_one_mesh_is_restored_on_another(tmp_path, mesh):
    mesh = sharding.make_mesh(mesh)
    state = make_state(5)
    before = placed(state, sharding.make_mesh(MeshConfig(data=2, fsdp=4)))
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(5, jax.device_put(state, before))
        checkpointer.wait()
        after = checkpointer.restore_or_none(abstract(state), placed(state, mesh))
    equal(after, state)
    assert after.params["blocks"]["kernel"].sharding.mesh.shape == mesh.shape


def test_state_donated_right_after_the_save_is_saved_as_it_was(tmp_path):
    state = make_state(1)
    scramble = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step in range(1, 4):
            state = jax.tree.map(jnp.copy, make_state(step))
            checkpointer.save(step, state)
            for _ in range(3):
                state = scramble(state)
    equal(restore(tmp_path), make_state(3))


def data_files(step_dir):
    return sorted(path for path in step_dir.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bits_never_pass(three_steps):
    """Each trial flips one random bit of one random file of step 3: the restored state is that of
    step 3 exactly (the bit did not matter) or that of step 2, never anything else."""
    rng = np.random.default_rng(0)
    state, pristine = make_state(), three_steps.parent / "pristine"
    shutil.copytree(three_steps, pristine)
    caught = 0
    for _ in range(25):
        shutil.rmtree(three_steps)
        shutil.copytree(pristine, three_steps)
        files = data_files(three_steps / "checkpoints" / "3")
        sizes = np.array([path.stat().st_size for path in files], float)
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        data = bytearray(path.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        lines = []
        with Checkpointer(three_steps, CheckpointConfig(), read_only=True,
                          report=lines.append) as checkpointer:
            found = checkpointer.restore_or_none(abstract(state), placed(state))
        step = int(found.step)
        equal(found, make_state(step))
        assert step == (2 if len(lines) == 2 else 3), lines
        caught += step == 2
    assert caught >= 12


def test_any_change_of_the_arrays_changes_the_fingerprint():
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "int8", "bool"):
        array = jnp.asarray(rng.integers(0, 2, (3, 5)), dtype)
        before = fingerprints({"a": array})["a"]["sum"]
        negated = -array if dtype != "bool" else ~array
        swapped = array.at[0].set(array[1]).at[1].set(array[0])
        assert not np.array_equal(swapped, array)
        for other in (negated, swapped, array[::-1]):
            assert fingerprints({"a": other})["a"]["sum"] != before, dtype
    two_signs = jnp.ones((8,)).at[2].set(-1).at[5].set(-1)
    assert fingerprints({"a": two_signs}) != fingerprints({"a": jnp.ones((8,))})


def test_fingerprint_is_the_documented_sum_on_any_mesh():
    """The formula of docs/formats_checkpoint.md, written a second time in numpy."""

    def mix(x, seed):
        x = x ^ np.uint32(seed)
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    array = np.random.default_rng(0).normal(size=(8, 3, 5)).astype(np.float32)
    bits, place = array.view(np.uint32).ravel(), np.arange(array.size, dtype=np.uint32)
    expected = "".join(
        f"{int(np.sum(mix(bits + mix(place, seed), ~np.uint32(seed)), dtype=np.uint32)):08x}"
        for seed in (0x243F6A88, 0x85A308D3))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    for where in (sharding.replicated(mesh), sharding.batch_sharding(mesh)):
        found = fingerprints({"a": jax.device_put(array, where)})
        assert found == {"a": {"dtype": "float32", "shape": [8, 3, 5], "sum": expected}}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "empty_files", "file_gone", "half_deleted"])
def test_damaged_step_falls_back_with_one_line_and_can_be_saved_again(three_steps, damage):
    step_dir = three_steps / "checkpoints" / "3"
    files = data_files(step_dir)
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "empty_files":
        for path in files:
            path.write_bytes(b"")
    elif damage == "file_gone":
        (step_dir / "fingerprint" / "metadata").unlink()
    else:
        shutil.rmtree(step_dir / "params")
        shutil.rmtree(step_dir / "other")
    lines = []
    with Checkpointer(three_steps, CheckpointConfig(), report=lines.append) as checkpointer:
        state = make_state()
        equal(checkpointer.restore_or_none(abstract(state), placed(state)), make_state(2))
        assert len(lines) == 2 and "\n" not in lines[0]
        assert f"{step_dir} is damaged" in lines[0] and "trying the step before" in lines[0]
        checkpointer.save(3, make_state(3))
        checkpointer.wait()
        equal(checkpointer.restore_or_none(abstract(state), placed(state)), make_state(3))


def test_empty_step_directory_is_no_checkpoint(three_steps):
    (three_steps / "checkpoints" / "4").mkdir()
    with Checkpointer(three_steps, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]
    equal(restore(three_steps), make_state(3))
    with Checkpointer(three_steps, CheckpointConfig()) as checkpointer:
        checkpointer.save(4, make_state(4))
    equal(restore(three_steps), make_state(4))


def test_when_no_step_is_whole_nothing_begins_from_scratch_in_silence(three_steps):
    for path in three_steps.glob("checkpoints/*/fingerprint/metadata"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole \(tried 1, 2, 3\)"):
        restore(three_steps)


def test_reader_beside_the_training_changes_no_file(three_steps):
    (three_steps / "checkpoints" / "3" / "fingerprint" / "metadata").write_bytes(b"")
    before = sorted(three_steps.rglob("*"))
    with Checkpointer(three_steps, CheckpointConfig(), read_only=True,
                      report=lambda line: None) as checkpointer:
        step, params = checkpointer.restore_params()
        with pytest.raises(DamagedCheckpoint, match="checkpoints/3 is damaged"):
            checkpointer.restore_params(3)
        with pytest.raises(UserError, match=r"no step 7 in .* \(present: 1, 2, 3\)"):
            checkpointer.restore_params(7)
    assert step == 2
    equal(params, make_state(2).ema_params)
    assert sorted(three_steps.rglob("*")) == before


def test_weights_alone_are_restored_by_kind_and_onto_a_mesh(three_steps):
    with Checkpointer(three_steps, CheckpointConfig(), read_only=True) as checkpointer:
        expected = make_state(1)
        shardings = placed(expected.params, sharding.make_mesh(MeshConfig(fsdp=8)))
        step, params = checkpointer.restore_params(
            1, "params", abstract(expected.params), shardings)
    assert step == 1
    equal(params, expected.params)
    assert params["blocks"]["kernel"].sharding == shardings["blocks"]["kernel"]


def test_other_shapes_dtypes_and_names_are_refused_by_name(three_steps):
    with pytest.raises(UserError, match=r"params/blocks/bias has shape \[8\], .* asks for \[16\]"):
        restore(three_steps, state=make_state(width=16))
    state = make_state()
    cast = state.replace(params={**state.params, "scale": state.params["scale"].astype("bfloat16")})
    with pytest.raises(UserError, match="params/scale has dtype float32, .* asks for bfloat16"):
        restore(three_steps, state=cast)
    more = state.replace(params={**state.params, "new": state.params["scale"]})
    with pytest.raises(UserError, match="has no array params/new"):
        restore(three_steps, state=more)
    fewer = state.replace(ema_params={"scale": state.ema_params["scale"]})
    with pytest.raises(UserError, match="has the array ema_params/blocks/bias, the model has not"):
        restore(three_steps, state=fewer)


def begin(directory, **config):
    state = make_state(50)
    with Checkpointer(directory, CheckpointConfig(**config), report=lambda line: None) as c:
        def create(weights=None):
            return state if weights is None else state.replace(params=weights, ema_params=weights)

        return c.restore_or_create(abstract(state), placed(state), create)


def test_order_of_beginnings(three_steps, tmp_path):
    equal(begin(tmp_path / "new"), make_state(50))
    warm = begin(tmp_path / "new", init_from=str(three_steps))
    assert int(warm.step) == 50
    equal(warm.params, make_state(3).ema_params)
    equal(warm.opt_state, make_state(50).opt_state)
    resumed = begin(
        tmp_path / "new", init_from=str(tmp_path / "absent"), resume_from=str(three_steps))
    equal(resumed, make_state(3))
    with Checkpointer(tmp_path / "new", CheckpointConfig()) as checkpointer:
        checkpointer.save(9, make_state(9))
    equal(begin(tmp_path / "new", resume_from=str(three_steps)), make_state(9))


@pytest.mark.parametrize("key", ["resume_from", "init_from"])
def test_absent_source_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=f"checkpoint.{key} = '/absent' holds no checkpoint"):
        begin(tmp_path, **{key: "/absent"})


@pytest.mark.parametrize("field", ["every_steps", "keep"])
def test_config_out_of_range_names_its_field(field):
    with pytest.raises(UserError, match=f"checkpoint.{field} = 0 must be 1 or more"):
        CheckpointConfig(**{field: 0})


def test_full_disk_is_one_line_and_the_step_before_stays(three_steps, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpointer(three_steps, CheckpointConfig(), report=lambda line: None) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", full)
            with pytest.raises(UserError, match="no space left for .*checkpoints .* free some"):
                checkpointer.save(4, make_state(4))
        state = make_state()
        equal(checkpointer.restore_or_none(abstract(state), placed(state)), make_state(3))


SAVE_FOREVER = """
import sys
import jax
sys.path[:0] = [{tests!r}, {root!r}]
from test_checkpoint import Checkpointer, CheckpointConfig, abstract, make_state, placed
state = make_state()
with Checkpointer(sys.argv[1], CheckpointConfig(keep=2)) as checkpointer:
    found = checkpointer.restore_or_none(abstract(state), placed(state))
    step = 0 if found is None else int(found.step)
    print("began at", step, flush=True)
    while True:
        step += 1
        checkpointer.save(step, make_state(step))
        print("step", step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_restorable_workdir(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[1]
    code = SAVE_FOREVER.format(tests=str(root / "tests"), root=str(root))
    rng = np.random.default_rng(time.time_ns())
    newest = 0
    for _ in range(int(os.environ.get("SORA_JAX_KILLS", "2"))):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        line = process.stdout.readline()
        while not line.startswith("step"):
            line = process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.8))
        process.send_signal(signal.SIGKILL)
        reported = [int(x.split()[1]) for x in [line, *process.communicate()[0].splitlines()]]
        found = restore(tmp_path)
        if found is None:
            assert newest == 0 and reported[-1] <= 2
            continue
        assert int(found.step) >= max(newest, reported[-1] - 2)
        equal(found, make_state(int(found.step)))
        newest = int(found.step)


def test_second_training_job_is_kept_out_and_readers_are_not(three_steps):
    code = ("import fcntl, sys\nf = open(sys.argv[1], 'a+')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\ninput()")
    other = subprocess.Popen([sys.executable, "-c", code, str(three_steps / ".lock")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process trains in .*run; wait for it"):
        Checkpointer(three_steps, CheckpointConfig())
    with Checkpointer(three_steps, CheckpointConfig(), read_only=True) as checkpointer:
        assert checkpointer.restore_params()[0] == 3
    other.kill()
    other.communicate()
    equal(restore(three_steps), make_state(3))
