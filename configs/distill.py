"""Four steps in the place of 16 or more, with guidance built in: distills a run of configs/base.py.

Command:  python -m sora_jax.train --config=configs/distill.py --config.init.weights=runs/base
Before:   the teacher, python -m sora_jax.train --config=configs/base.py
Time:     9 minutes on two CPU cores, other work beside it
Result:   on 128 held-out prompts colour is right in 98 %, direction in 89 %, shape in 78 %, all
          three in 73 %; of the teacher in 50 Euler steps, up to a hundred calls, in 100, 93, 80 and
          77 %, in 50 ancestral ones 81 % (docs/results.md)
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py with its result as the teacher. arg "runlocal": of base.py:runlocal."""
    config = BASE["get_config"](arg)
    teacher = "runs/base_runlocal" if arg == "runlocal" else "runs/base"
    config.task = "distill"
    config.init.weights = teacher
    config.data.data_dir = f"{teacher}/data"
    config.latents.directory = f"{teacher}/latents"
    config.num_steps = 20 if arg == "runlocal" else 400
    config.packing.caption_drop = 0.0  # the student is asked without guidance
    config.optim.update({
        "learning_rate": 5e-4, "warmup_steps": config.num_steps // 20, "ema_decay": 0.98})
    config.sampling.update(
        {"sampler": "euler", "guidance": 1.0, "num_steps": 4, "first_step": 0})
    return config
