"""The dataset a config names: prepared on first use, then opened."""

import pathlib

from sora_jax import processes
from sora_jax.data import sources
from sora_jax.data.moving_shapes import builder as moving_shapes
from sora_jax.run_config import DataConfig

SPLITS = ("train", "held_out")


def prepare_dataset(config: DataConfig, workdir: str) -> pathlib.Path:
    """The directory of the prepared dataset; prepares it where it is missing."""
    data_dir = config.data_dir or str(pathlib.Path(workdir) / "data")
    if config.dataset == "moving_shapes":
        return moving_shapes.prepare(
            data_dir, seed=config.seed, num_train=config.num_train_clips,
            num_held_out=config.num_held_out_clips, spec=config.shapes,
        )
    from sora_jax.data import video_folder

    return pathlib.Path(
        video_folder.prepare(config.folder, data_dir, config.from_folder, config.seed))


def prepare_together(config: DataConfig, workdir: str) -> None:
    """Prepares the dataset where it is missing: the first process does, the others wait. All call
    this, once in a run and before they open it."""
    with processes.first_goes_first("dataset"):
        prepare_dataset(config, workdir)


def open_dataset(config: DataConfig, workdir: str, split: str) -> sources.Source:
    """The records of a split. Raises UserError where there are none."""
    assert split in SPLITS, split
    return sources.open_source(str(prepare_dataset(config, workdir)), split)
