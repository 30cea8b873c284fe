"""A user's folder of videos as a dataset."""

from sora_jax.data.video_folder.check import CheckOptions
from sora_jax.data.video_folder.prepare import FolderOptions, prepare
from sora_jax.data.video_folder.worker import Limits

__all__ = ["CheckOptions", "FolderOptions", "Limits", "prepare"]
