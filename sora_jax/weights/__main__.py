"""Imports published weights, and writes native ones as they are published.

    python -m sora_jax.weights import FOLDER_OR_FILE TARGET [--family=NAME] [--config=CONFIG.json]
    python -m sora_jax.weights export NATIVE_FOLDER_OR_FILE TARGET [--family=NAME]
    python -m sora_jax.weights export WORKDIR TARGET

The last writes the averaged weights of the newest checkpoint of a run that began with published
weights, as those were published.
"""

import pathlib

from absl import flags

from sora_jax import runtime
from sora_jax.core.errors import UserError
from sora_jax.tasks import initial_weights
from sora_jax.weights import published

_FAMILY = flags.DEFINE_string("family", None, "The family of weights; default: recognised.")
_CONFIG = flags.DEFINE_string("config", None, "The published config.json, where it lies apart.")

USAGE = ("python -m sora_jax.weights import SOURCE TARGET [--family=NAME] [--config=CONFIG.json], "
         "or python -m sora_jax.weights export SOURCE TARGET [--family=NAME]")


def main(argv):
    if len(argv) != 4 or argv[1] not in ("import", "export"):
        raise UserError(f"the arguments are {' '.join(argv[1:]) or 'none'}; usage: {USAGE}")
    _, what, source, target = argv
    if what == "import":
        family, path, flat = published.import_weights(source, target, _FAMILY.value, _CONFIG.value)
        count = sum(x.size for x in flat.values())
        print(f"{family.name}: {len(flat)} parameters with {count:,} values, none left over")
        print(f"wrote {path} and its card")
        return
    export = published.export_weights
    if (pathlib.Path(source).expanduser() / "checkpoints").is_dir():
        export = initial_weights.export_trained
    for path in export(source, target, _FAMILY.value):
        print(f"wrote {path}")


if __name__ == "__main__":
    runtime.start(main)
