"""The whole configuration of a run as frozen dataclasses, and the rules between its sections.

Defaults stand in configs/base.py; nothing here has one unless a section may be left out.
"""

import dataclasses
import math

from sora_jax import workdir as workdir_files
from sora_jax.checkpoint import CheckpointConfig
from sora_jax.core.config import from_mapping
from sora_jax.core.errors import UserError
from sora_jax.data.conditioning import ConditioningConfig
from sora_jax.data.moving_shapes.world import ShapesSpec
from sora_jax.data.packing import PackingConfig
from sora_jax.data.pixel_batches import PixelConfig
from sora_jax.data.text_cache import DTYPES as TEXT_DTYPES
from sora_jax.data.video_folder.options import FolderOptions
from sora_jax.diffusion.consistency import DistillConfig, check_student
from sora_jax.diffusion.grids import FLOW_SPACINGS
from sora_jax.diffusion.repaint import RESAMPLED
from sora_jax.diffusion.solvers import SAMPLERS
from sora_jax.models.discriminator import DiscriminatorConfig
from sora_jax.models.distortion_net import DistortionNetConfig
from sora_jax.models.model_config import ModelConfig
from sora_jax.models.patch_embedding import INFLATIONS
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.video_vae import VideoVAEConfig
from sora_jax.optim import OptimConfig
from sora_jax.sharding import MeshConfig
from sora_jax.weights.text_encoder_files import PADDINGS

TASKS = ("diffusion", "distill", "vae", "features")
SAMPLED_TASKS = ("diffusion", "distill")
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

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise UserError(
                f"data.dataset = {self.dataset!r} is unknown; allowed: {', '.join(DATASETS)}"
            )
        if self.dataset == "video_folder" and not self.folder:
            raise UserError(
                "data.folder is empty; name your folder of videos: --config.data.folder=DIR"
            )


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

    def __post_init__(self):
        allowed = ("", *INFLATIONS, "resample")
        if self.patch not in allowed:
            raise UserError(f"init.patch = {self.patch!r} is unknown; allowed: "
                            f"{', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Rectified flow: how times are drawn and shifted."""

    time_mean: float  # of the logit
    time_std: float
    base_shift: float  # shift of times towards noise for a clip of base_tokens tokens
    base_tokens: float
    # The defaults below are those of configs/base.py; they stand here too so that workdirs written
    # before these fields can still be read.
    shift_by_size: bool = True  # the shift grows with the clip; False: base_shift for every clip
    precondition: bool = True  # see diffusion/process.py; False: the network gives the velocity
    learned_variance: bool = False  # twice the output, and the hybrid loss (diffusion/vlb.py)
    variance_steps: int = 1000  # whose variance is learned, from noise to data
    vlb_share: float = 0.001  # of the bound in the loss

    def __post_init__(self):
        if not 3 <= self.variance_steps <= 10_000 or self.vlb_share <= 0:
            raise UserError(f"diffusion.variance_steps = {self.variance_steps} must be from 3 to "
                            f"10000 and vlb_share = {self.vlb_share} above 0")
        if self.base_shift <= 0 or self.base_tokens <= 0:
            raise UserError(f"diffusion.base_shift = {self.base_shift} and base_tokens = "
                            f"{self.base_tokens} must be above 0")


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator of the VAE's training; weight 0: there is none."""

    weight: float = 0.0  # of the generator's loss; with `adaptive` against the reconstruction's
    start_step: int = 0  # neither side learns from the other before
    adaptive: bool = True
    r1_weight: float = 0.0  # of the squared gradient at real pixels
    learning_rate_scale: float = 1.0  # of the discriminator's rate over optim.learning_rate
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self):
        for name in ("weight", "start_step", "r1_weight", "learning_rate_scale"):
            if getattr(self, name) < 0:
                raise UserError(f"vae_loss.adversarial.{name} = {getattr(self, name)} must not be "
                                "negative")


@dataclasses.dataclass(frozen=True)
class VAELossConfig:
    """Reconstruction + KL, and what may be added to them."""

    reconstruction: str  # "l1", "l2" or "charbonnier"
    kl_weight: float  # nats per latent value against the mean error per pixel value
    free_nats: float = 0.0  # KL of a latent channel (mean per value) that costs nothing
    temporal_weight: float = 0.0  # of the error of changes from frame to frame
    perceptual: str = ""  # "lpips:FILE", "distortion:FILE" or "" (none); see tasks/perceptual.py
    perceptual_weight: float = 0.0
    perceptual_frames: int = 0  # frames drawn of each clip for it; 0 = all
    adversarial: AdversarialConfig = AdversarialConfig()

    def __post_init__(self):
        for name in ("free_nats", "temporal_weight", "perceptual_weight", "perceptual_frames"):
            if getattr(self, name) < 0:
                raise UserError(f"vae_loss.{name} = {getattr(self, name)} must not be negative")
        if bool(self.perceptual) != bool(self.perceptual_weight):
            raise UserError(
                f"vae_loss.perceptual = {self.perceptual!r} with perceptual_weight = "
                f"{self.perceptual_weight}: give both, or leave both out")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Samples written during training, and defaults of evaluation."""

    every_steps: int
    first_step: int  # the first sheet, so that one sees something early; 0 = none
    num_clips: int  # 0 = no samples
    num_steps: int
    guidance: float  # 1 = none
    seed: int
    rows: int  # rows sampled at once
    # The defaults below are those of configs/base.py; they stand here too so that workdirs written
    # before these fields can still be sampled.
    sampler: str = "euler"  # of diffusion/solvers.py
    eta: float = 0.0  # of sampler "ddim": share of the ancestral noise
    grid: str = "flow"  # flow | karras | exponential
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times of a clip where guidance works
    guidance_rescale: float = 0.0  # 1 = a clip keeps the spread of its unguided prediction
    negative_prompt: str = ""  # what guidance pushes away from; "" = the prediction without caption
    # How often every `resample_jump` steps are walked where tokens are known and shown noised; 1 =
    # once (diffusion/repaint.py).
    resample_times: int = 1
    resample_jump: int = 4

    def __post_init__(self):
        check_sampling(self, lambda field, value: f"sampling.{field} = {value}")


def check_sampling(config, shown) -> None:
    """Raises UserError on values no sampler can use.

    config: anything with the fields of SamplingConfig; shown(field, value): how the user wrote it.
    """
    def refuse(field, why):
        raise UserError(f"{shown(field, getattr(config, field))} {why}")

    for field, allowed in (("sampler", SAMPLERS), ("grid", FLOW_SPACINGS)):
        if getattr(config, field) not in allowed:
            refuse(field, f"is unknown; allowed: {', '.join(allowed)}")
    if config.num_steps < 1:
        refuse("num_steps", "must be at least 1")
    if not 0 <= config.guidance < math.inf:
        refuse("guidance", "must not be negative; 1 is no guidance")
    for field in ("eta", "guidance_rescale"):
        if not 0 <= getattr(config, field) <= 1:
            refuse(field, "must be from 0 to 1")
    if config.eta and config.sampler != "ddim":
        refuse("eta", f"is of sampler ddim alone and the sampler is {config.sampler}; set it to 0")
    for field in ("resample_times", "resample_jump"):
        if getattr(config, field) < 1:
            refuse(field, "must be at least 1")
    if config.resample_times > 1 and config.sampler not in RESAMPLED:
        refuse("resample_times", f"goes with the samplers {' and '.join(RESAMPLED)} and the "
               f"sampler is {config.sampler}; set it to 1")
    first, last = config.guidance_interval
    if not 0 <= first <= last <= 1:
        refuse("guidance_interval", "must be two times from 0 (data) to 1 (noise), smaller first")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Figures of a checkpoint; a count of 0 leaves its figure out."""

    every_steps: int  # 0 = only at the end
    num_prompts: int
    num_loss_clips: int
    loss_times: tuple[float, ...]
    num_vae_clips: int
    seed: int
    # of vae_frechet: "pixel_statistics" or "distortion:FILE"
    vae_features: str = "pixel_statistics"
    edits: int = 0  # held-out clips that are edited


    def __post_init__(self):
        if self.edits < 0:
            raise UserError(f"evaluation.edits = {self.edits} must not be negative; 0 edits none")


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
    distill: DistillConfig = DistillConfig()

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
    return config


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
    "log_every_steps", "checkpoint", "sampling", "evaluation", "mesh", "data.data_dir",
    "latents.directory", "latents.build_if_missing", "latents.rebuild", "latents.batch_pixels",
)


def claim_workdir(config: RunConfig, workdir: str) -> None:
    """Writes WORKDIR/config.json, or compares with the one that is there.

    Raises UserError naming the fields that differ: a workdir belongs to one run.
    """
    workdir_files.claim(workdir, dataclasses.asdict(config), FREE_FIELDS)


def load_workdir(workdir: str) -> RunConfig:
    """The config a workdir was trained with. Raises UserError where there is none."""
    return resolve(workdir_files.read(workdir))
