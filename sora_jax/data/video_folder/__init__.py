"""A user's folder of videos as a dataset."""

from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.data.video_folder.prepare import prepare

__all__ = ["FolderOptions", "prepare"]
