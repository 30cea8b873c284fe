"""The whole configuration of a run as frozen dataclasses, and the rules between its sections.

Defaults stand in configs/base.py; nothing here has one unless a section may be left out.
"""

import dataclasses
import math

from sora_jax import workdir as workdir_files
from sora_jax.checkpoint import CheckpointConfig
from sora_jax.core.config import from_mapping
from sora_jax.core.errors import UserError
from sora_jax.data.clip_plan import FRAME_SAMPLINGS
from sora_jax.data.conditioning import ConditioningConfig
from sora_jax.data.moving_shapes.world import ShapesSpec
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pixel_batches import PixelConfig
from sora_jax.data.text_cache import DTYPES as TEXT_DTYPES
from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.diffusion.consistency import DistillConfig, check_student
from sora_jax.lora import LoRAConfig
from sora_jax.models.distortion_net import DistortionNetConfig
from sora_jax.models.model_config import ModelConfig
from sora_jax.models.patch_embedding import INFLATIONS
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.video_vae import VideoVAEConfig
from sora_jax.optim import OptimConfig
from sora_jax.run_sections import (
    DiffusionConfig,
    EvaluationConfig,
    SamplingConfig,
    VAELossConfig,
)
from sora_jax.sharding import MeshConfig
from sora_jax.timing import ProfileConfig
from sora_jax.weights import quantized
from sora_jax.weights.text_encoder_files import PADDINGS

TASKS = ("diffusion", "distill", "vae", "features")
SAMPLED_TASKS = ("diffusion", "distill")
VAE_PARTS = ("all", "decoder")
DATASETS = ("moving_shapes", "video_folder")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which clips, where they are kept, and how they are cut and sized for the model."""

    dataset: str
    folder: str  # of video_folder
    data_dir: str  # prepared dataset; "" = WORKDIR/data
    seed: int  # of moving_shapes and of the held-out draw
    num_train_clips: int  # moving_shapes
    num_held_out_clips: int  # moving_shapes
    shapes: ShapesSpec
    from_folder: FolderOptions
    max_frames: int  # 1 + 4k; longer clips are cut into windows
    max_windows: int  # windows taken of one clip
    max_pixels: int  # height * width after resizing
    fps: float  # faster clips are thinned to this rate; 0 = as they are
    # The defaults below are those of configs/base.py; they stand here too so that workdirs written
    # before these fields can still be read.
    frame_sampling: str = "consecutive"  # consecutive | uniform (spread over the whole clip)
    stills_per_video: int = 0  # single frames taken of every video beside its clips, as images
    # (pixels, weight): every clip is cached at each, and each visit draws one; () = max_pixels
    resolutions: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        if self.frame_sampling not in FRAME_SAMPLINGS:
            raise UserError(f"data.frame_sampling = {self.frame_sampling!r} is unknown; allowed: "
                            f"{', '.join(FRAME_SAMPLINGS)}")
        if self.stills_per_video < 0:
            raise UserError(f"data.stills_per_video = {self.stills_per_video} must not be negative")
        if self.frame_sampling == "uniform" and self.max_windows != 1:
            raise UserError(
                f"data.frame_sampling = 'uniform' makes one clip of each video, and "
                f"data.max_windows = {self.max_windows}; set it to 1, or sample consecutive frames")
        self._check_resolutions()
        if self.dataset not in DATASETS:
            raise UserError(
                f"data.dataset = {self.dataset!r} is unknown; allowed: {', '.join(DATASETS)}"
            )
        if self.dataset == "video_folder" and not self.folder:
            raise UserError(
                "data.folder is empty; name your folder of videos: --config.data.folder=DIR"
            )


    @property
    def resolution_weights(self) -> tuple[float, ...]:
        """Of the resolutions, in rising order."""
        return tuple(weight for _, weight in sorted(self.resolutions))

    def _check_resolutions(self):
        pixels = [pixels for pixels, _ in self.resolutions]
        if len(set(pixels)) < len(pixels) or any(
                not 0 < p <= self.max_pixels or not 0 < weight < math.inf
                for p, weight in self.resolutions):
            raise UserError(
                f"data.resolutions = {self.resolutions} must be (pixels, weight) with different "
                f"pixels from 1 to data.max_pixels = {self.max_pixels} and weights above 0")


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """The frozen VAE and the cache of what it makes of the dataset."""

    vae: str  # "builtin:NAME", a .safetensors file, or a directory
    directory: str  # "" = WORKDIR/latents
    build_if_missing: bool
    rebuild: bool
    batch_pixels: int  # frames * height * width that are encoded at once


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen text encoder whose embeddings are cached beside the latents; without weights, a
    byte encoder is trained along (config.model.text)."""

    weights: str = ""  # a published folder or file of T5, umT5, CLIP or SigLIP; "" = none
    tokenizer: str = ""  # tokenizer.json, a SentencePiece *.model, or a folder that holds one
    width: int = 0  # of its embeddings
    max_tokens: int = 226  # of a caption, with the tokens that the tokenizer adds
    padding: str = "none"  # none | zeros (up to max_tokens: Wan) | encoded (Stable Diffusion)
    truncate: bool = False  # cut longer captions; False refuses them
    dtype: str = "float16"  # of the cache: float16 | float32

    def __post_init__(self):
        for name, allowed in (("padding", PADDINGS), ("dtype", TEXT_DTYPES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"text_encoder.{name} = {getattr(self, name)!r} is unknown; "
                                f"allowed: {', '.join(allowed)}")
        if self.weights and not (self.tokenizer and self.width > 0 and self.max_tokens > 0):
            raise UserError(
                f"text_encoder.weights = {self.weights!r} with tokenizer = {self.tokenizer!r}, "
                f"width = {self.width} and max_tokens = {self.max_tokens}: name the tokenizer's "
                "file, the width of the embeddings, and the tokens a caption may have")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weights of the network to begin with."""

    weights: str = ""  # a published folder or file, a native one, or a workdir; "" = random
    # what to do where its patch is another than model.patch: "" refuses it; central | average
    # make tubelets of an image model's patches; resample resizes the projections
    patch: str = ""
    adapters: str = ""  # the adapters.safetensors of a run on the same weights, merged into them

    def __post_init__(self):
        if self.adapters and not self.weights:
            raise UserError(f"init.adapters = {self.adapters!r} belong to weights and init.weights "
                            "is empty; name those that they were trained on")
        allowed = ("", *INFLATIONS, "resample")
        if self.patch not in allowed:
            raise UserError(f"init.patch = {self.patch!r} is unknown; allowed: "
                            f"{', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    task: str
    seed: int
    num_steps: int
    log_every_steps: int
    data: DataConfig
    latents: LatentsConfig
    packing: PackingConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    vae: VideoVAEConfig
    vae_loss: VAELossConfig
    pixels: PixelConfig
    optim: OptimConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    features: DistortionNetConfig = DistortionNetConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    init: InitConfig = InitConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    vae_train: str = "all"  # or "decoder": what makes latents is frozen
    vae_kernel_bits: int = 8  # of the file of a VAE that begins with random weights
    distill: DistillConfig = DistillConfig()
    lora: LoRAConfig = LoRAConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def begins_with(self) -> str:
        """Where a run finds its first weights; "" where they are random."""
        return (self.init.weights or self.checkpoint.init_from or self.checkpoint.resume_from or "")

    def network(self, channels: int) -> TransformerConfig:
        """The network for latents of so many channels."""
        text = self.text_encoder
        network = self.model.network(channels, text.width if text.weights else 0)
        if not self.diffusion.learned_variance:
            return network
        return dataclasses.replace(network, out_channels=2 * channels)


def resolve(mapping) -> RunConfig:
    """A checked RunConfig from a ConfigDict or dict. Raises UserError by field name."""
    config = from_mapping(RunConfig, mapping)
    if config.task not in TASKS:
        raise UserError(f"task = {config.task!r} is unknown; allowed: {', '.join(TASKS)}")
    for name in ("num_steps", "log_every_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} = {getattr(config, name)} must be at least 1")
    if (config.data.max_frames - 1) % 4:
        raise UserError(f"data.max_frames = {config.data.max_frames} must be 1 + 4k")
    if config.packing.token_drop is not None and config.model.local_width:
        raise UserError(
            f"packing.token_drop leaves gaps between tokens, and model.local_width = "
            f"{config.model.local_width} reads neighbours by their place in the row; set one of "
            "them to None or 0")
    _check_text(config)
    if config.init.weights and config.checkpoint.init_from:
        raise UserError(
            f"init.weights = {config.init.weights!r} and checkpoint.init_from = "
            f"{config.checkpoint.init_from!r} both name weights to begin with; give one of them")
    if config.task == "features" and config.init.weights or config.task == "vae" and (
            config.init.patch or config.init.adapters):
        raise UserError(f"init.weights = {config.init.weights!r}, init.patch = "
                        f"{config.init.patch!r}, init.adapters = {config.init.adapters!r}: task "
                        f"{config.task!r} cannot use them; leave them empty (a VAE takes "
                        "init.weights alone)")
    if config.vae_train not in VAE_PARTS:
        raise UserError(f"vae_train = {config.vae_train!r} is unknown; allowed: "
                        f"{', '.join(VAE_PARTS)}")
    if config.vae_kernel_bits not in quantized.BITS:
        raise UserError(f"vae_kernel_bits = {config.vae_kernel_bits} should be one of "
                        f"{', '.join(map(str, quantized.BITS))}")
    if config.vae_train != "all" and not (config.task == "vae" and config.init.weights):
        raise UserError(f"vae_train = {config.vae_train!r} freezes the encoder of given weights; "
                        "set task to 'vae' and init.weights to a VAE")
    if config.conditioning.is_used and config.model.modulation == "none":
        raise UserError(
            "config.conditioning gives tokens times of their own, which model.modulation = 'none' "
            "cannot tell them; set it to 'linear' or 'table', or all shares to 0")
    if config.task == "distill" and not config.init.weights:
        raise UserError("init.weights is empty; name the workdir or the file of the model to "
                        "distill: --config.init.weights=runs/base")
    if config.task == "distill" and config.conditioning.frame_times:
        raise UserError(f"conditioning.frame_times = {config.conditioning.frame_times} gives "
                        "frames times of their own and a jump has one; set it to 0")
    if config.task == "distill":
        check_student(config.distill, config.sampling)
    if config.optim.mup_base_width:
        _check_mup(config)
    if config.lora.rank:
        _check_lora(config)
    if "parameters" in config.optim.offload:
        _check_offload(config)
    return config


def _check_mup(config: RunConfig) -> None:
    """Raises UserError where no narrow network belongs to the wide one."""
    base, model = config.optim.mup_base_width, config.model
    shown = f"optim.mup_base_width = {base}"
    if config.task not in SAMPLED_TASKS or config.lora.rank:
        raise UserError(f"{shown} is of the transformer's own weights; set it to 0 with task = "
                        f"{config.task!r} and lora.rank = {config.lora.rank}")
    for name in ("num_heads", "mlp_width", "time_width"):
        if getattr(model, name) * base % model.width:
            raise UserError(f"{shown} and model.width = {model.width}: model.{name} = "
                            f"{getattr(model, name)} times their ratio is no whole number; heads "
                            "keep their width, so base and width must be multiples of it")


def _check_lora(config: RunConfig) -> None:
    """Raises UserError where adapters have nothing to adapt."""
    shown = f"lora.rank = {config.lora.rank}"
    if config.task not in SAMPLED_TASKS:
        raise UserError(f"{shown} and task = {config.task!r}: adapters are of the transformer; set "
                        f"it to 0, or task to {' or '.join(SAMPLED_TASKS)}")
    if not config.begins_with:
        raise UserError(f"{shown} adapts weights and there are none to begin with; name them: "
                        "--config.init.weights=runs/base")
    if any(group.freeze for group in config.optim.groups):
        raise UserError(f"{shown} freezes all but the adapters, and optim.groups freeze "
                        "parameters, too; leave that out and narrow lora.targets")


def _check_offload(config: RunConfig) -> None:
    """Raises UserError where weights would not be fetched layer by layer."""
    shown, model = f"optim.offload = {config.optim.offload}", config.model
    if config.task not in SAMPLED_TASKS:
        raise UserError(f"{shown} fetches the transformer's layers; leave 'parameters' out with "
                        f"task = {config.task!r}")
    if config.lora.rank:
        raise UserError(f"{shown} fetches layers one by one and lora.rank = {config.lora.rank} "
                        "merges adapters into all of them at once; leave 'parameters' out")
    if model.remat == "none":
        raise UserError(f"{shown} and model.remat = 'none', which keeps the weights of all layers "
                        "for the gradient; set it to dots, offload or full")
    if model.unroll >= model.num_layers:
        raise UserError(f"{shown} fetches layers in a loop and model.unroll = {model.unroll} "
                        f"writes out all {model.num_layers} layers; set it to 1")


def _check_text(config: RunConfig) -> None:
    """Raises UserError where a frozen text encoder and the rows do not go together."""
    encoder, packing = config.text_encoder, config.packing
    if not encoder.weights:
        return
    if packing.caption_tokens is not None:
        raise UserError(f"packing.caption_tokens = {packing.caption_tokens} cuts bytes; with a "
                        "frozen encoder set it to None and text_encoder.max_tokens instead")
    if encoder.max_tokens > packing.row_text:
        raise UserError(f"text_encoder.max_tokens = {encoder.max_tokens} is above "
                        f"packing.row_text = {packing.row_text}, the text tokens of a row; raise "
                        "row_text")


# Fields that may change between two starts of one workdir: they decide what is reported, when and
# where, but not a single number of the training.
FREE_FIELDS = (
    "log_every_steps", "checkpoint", "sampling", "evaluation", "mesh", "profile", "optim.offload",
    "data.data_dir", "latents.directory", "latents.build_if_missing", "latents.rebuild",
    "latents.batch_pixels",
)


def claim_workdir(config: RunConfig, workdir: str) -> None:
    """Writes WORKDIR/config.json, or compares with the one that is there.

    Fields that came after the workdir was begun have their defaults there. Raises UserError naming
    the fields that differ: a workdir belongs to one run.
    """
    workdir_files.claim(
        workdir, dataclasses.asdict(config), FREE_FIELDS, completed=with_later_fields)


def with_later_fields(mapping: dict) -> dict:
    """The config of a workdir with the defaults of fields that it does not have; as it is where it
    has others."""
    try:
        return dataclasses.asdict(from_mapping(RunConfig, mapping))
    except UserError:
        return mapping


def load_workdir(workdir: str) -> RunConfig:
    """The config a workdir was trained with. Raises UserError where there is none."""
    return resolve(workdir_files.read(workdir))
