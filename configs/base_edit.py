"""Text to video that also continues, joins and repaints clips: configs/base.py with conditions.

Command:  python -m sora_jax.train --config=configs/base_edit.py
Time:     not measured from scratch; a step has 1.19 times base's FLOPs (--mode=plan), as tokens
          have times
Result:   800 steps from the weights of a base run (--config.init.weights=RUN, nine minutes on two
          CPU cores) are in docs/editing.md: what is given stays, continued shapes go on about the
          right way, joins are nearly without a seam, loops less so
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("base.py")))


def get_config(arg: str = ""):
    """configs/base.py with most clips given more than their text. arg "runlocal": a trial."""
    config = BASE["get_config"](arg)
    config.packing.caption_drop = 0.3  # so that motion is read from what is given, too
    config.conditioning.first_frame = 0.10
    config.conditioning.first_last = 0.05
    config.conditioning.prefix = 0.10
    config.conditioning.suffix = 0.10
    config.conditioning.random_frames = 0.05
    config.conditioning.random_boxes = 0.10
    config.conditioning.frame_times = 0.05
    config.conditioning.ends = 0.10
    config.evaluation.edits = 2 if arg == "runlocal" else 32
    return config
