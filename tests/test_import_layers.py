"""Imports run down only: the table of rooms is data, and every import is read from the source."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sora_jax"

# Layer of each room (directory or file of the package). A file that is not listed fails.
LAYERS = {
    "core": 0,
    "diffusion": 1,
    "models": 1,
    "data": 1,
    "sharding": 2,
    "optim": 2,
    "parameter_groups": 2,
    "lora": 2,
    "adapter_files": 2,
    "frozen": 2,
    "offload": 2,
    "block_norms": 2,
    "train_state": 2,
    "checkpoint": 2,
    "checkpoint_step": 2,
    "fingerprint": 2,
    "workdir": 2,
    "stopping": 2,
    "processes": 2,
    "shared_work": 2,
    "peer_loss": 2,
    "metrics": 2,
    "timing": 2,
    "clu_without_tensorflow": 2,
    "run_config": 2,
    "run_sections": 2,
    "weights": 2,
    "tasks": 3,
    "evaluation": 4,
    "train_step": 4,
    "runtime": 5,
    "plan": 5,
    "plan_flops": 5,
    "plan_host": 5,
    "eval_job": 5,
    "train": 5,
    "sample": 5,
    "edit_command": 5,
    "weights.__main__": 5,
}
SIBLINGS = {"diffusion", "models", "data"}  # these never import each other

# What a room never imports from outside, and why it is a room of its own.
FORBIDDEN_OUTSIDE = {
    "core": {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "av", "absl"},
    "diffusion": {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "av", "absl"},
    "models": {"optax", "orbax", "grain", "tensorflow_datasets", "av", "absl"},
    "data": {"flax", "optax", "orbax"},
}
NEVER = {"tensorflow", "torch"}


def room_of(module: str) -> str | None:
    """The room of a dotted module of the package; None is the package itself."""
    parts = module.split(".")[1:]
    if not parts:
        return None
    longest = ".".join(parts[:2])
    return longest if longest in LAYERS else parts[0]


def imports(source: str, module: str, known: set[str]) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of a source file, also those inside functions.

    known: the package's modules, to tell `from sora_jax.core import rng` from a name in a module.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in known else base))
    return found


def refused(importer: str, imported: str) -> str | None:
    """Why a module must not import another; None where it may."""
    room = room_of(importer)
    if imported.split(".")[0] != "sora_jax":
        top = imported.split(".")[0]
        if top in NEVER | FORBIDDEN_OUTSIDE.get(room, set()):
            return f"{room or 'the package'} never imports {top}"
        return None
    other = room_of(imported)
    if room is None or other is None or room == other:
        return None if room is not None or other is None else "the package itself imports nothing"
    for name in (room, other):
        if name not in LAYERS:
            return f"{name} stands in no layer; give it one in LAYERS"
    if {room, other} <= SIBLINGS:
        return f"{room} and {other} are siblings"
    if LAYERS[other] > LAYERS[room]:
        return f"{room} (layer {LAYERS[room]}) is below {other} (layer {LAYERS[other]})"
    return None


def package_sources() -> dict[str, pathlib.Path]:
    """{dotted module: file} of the package."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return sources


SOURCES = package_sources()


def test_imports_run_down_only():
    problems = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}: {reason}"
        for module, path in SOURCES.items()
        for line, imported in imports(
            path.read_text(), f"{module}.__init__" if path.stem == "__init__" else module,
            set(SOURCES))
        if (reason := refused(module, imported))
    ]
    assert not problems, "\n".join(problems)


def test_every_file_stands_in_a_layer():
    rooms = {room_of(module) for module in SOURCES} - {None}
    assert rooms <= set(LAYERS), f"no layer for {sorted(rooms - set(LAYERS))}"


def test_flags_are_read_by_entries_alone():
    for module, path in SOURCES.items():
        if LAYERS.get(room_of(module), 0) < 5:
            names = {name for _, name in imports(path.read_text(), module, set(SOURCES))}
            assert "absl.flags" not in names and "from absl import flags" not in path.read_text(), (
                f"{path.relative_to(ROOT)} reads flags")


@pytest.mark.parametrize("entry", ["sora_jax.train", "sora_jax.sample"])
def test_a_command_starts_anew_before_it_imports_anything_slow(entry):
    """Else it makes its imports twice, jax among them."""
    before = SOURCES[entry].read_text().partition('if __name__ == "__main__":')[0]
    own = "sora_jax.core.startup"
    names = [name for source, module in ((before, entry), (SOURCES[own].read_text(), own))
             for _, name in imports(source, module, set(SOURCES))]
    assert own in names
    slow = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} - {own}
    assert not slow


@pytest.mark.parametrize("importer, source, reason", [
    ("sora_jax.core.rng", "import sora_jax.models.layers", "(layer 0) is below models (layer 1)"),
    ("sora_jax.core.rng", "from sora_jax import train", "(layer 0) is below train (layer 5)"),
    ("sora_jax.core.rng", "def f():\n    from ..tasks import task", "(layer 0) is below tasks"),
    ("sora_jax.models.layers", "from sora_jax.diffusion import times", "are siblings"),
    ("sora_jax.data.packing", "from ..models.layers import Linear", "are siblings"),
    ("sora_jax.tasks.vae", "from sora_jax.evaluation import psnr", "tasks (layer 3) is below"),
    ("sora_jax.weights.rules", "from sora_jax.weights import __main__", "(layer 2) is below"),
    ("sora_jax.diffusion.times", "from flax import linen", "diffusion never imports flax"),
    ("sora_jax.metrics", "import tensorflow as tf", "metrics never imports tensorflow"),
    ("sora_jax.drawer", "import sora_jax.core.rng", "drawer stands in no layer"),
])
def test_a_wrong_import_is_found(importer, source, reason):
    known = set(SOURCES) | {"sora_jax.train", "sora_jax.weights.__main__"}
    found = [refused(importer, name) for _, name in imports(source, importer, known)]
    assert any(reason in (why or "") for why in found), found


@pytest.mark.parametrize("importer, source", [
    ("sora_jax.train", "from sora_jax import checkpoint\nfrom sora_jax.tasks import registry"),
    ("sora_jax.weights.__main__", "from sora_jax import runtime\nfrom sora_jax.weights import x"),
    ("sora_jax.tasks.vae", "from sora_jax.models import dit\nfrom . import task\nimport jax"),
])
def test_a_right_import_passes(importer, source):
    assert not any(refused(importer, name) for _, name in imports(source, importer, set(SOURCES)))
