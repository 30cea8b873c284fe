"""Sections of a run's configuration: diffusion, sampling, evaluation and the loss of a VAE."""

import dataclasses
import math
from types import SimpleNamespace

from sora_jax.core.errors import UserError
from sora_jax.diffusion.grids import FLOW_SPACINGS
from sora_jax.diffusion.repaint import RESAMPLED
from sora_jax.diffusion.solvers import SAMPLERS
from sora_jax.models.discriminator import DiscriminatorConfig


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
    latent_noise: float = 0.0  # up to this share of a clip's latents is noise when decoded
    # Of the nats by which the words of a clip's captions are missed when they are read from its
    # latents, noise included.
    words_weight: float = 0.0
    # Of the mean square by which the first latent channels miss a field of where the objects of a
    # clip are (tasks/vae_objects.py).
    objects_weight: float = 0.0
    temporal_weight: float = 0.0  # of the error of changes from frame to frame
    perceptual: str = ""  # "lpips:FILE", "distortion:FILE" or "" (none); see tasks/perceptual.py
    perceptual_weight: float = 0.0
    perceptual_frames: int = 0  # frames drawn of each clip for it; 0 = all
    adversarial: AdversarialConfig = AdversarialConfig()

    def __post_init__(self):
        for name in ("free_nats", "words_weight", "objects_weight", "temporal_weight",
                     "perceptual_weight", "perceptual_frames"):
            if getattr(self, name) < 0:
                raise UserError(f"vae_loss.{name} = {getattr(self, name)} must not be negative")
        if not 0 <= self.latent_noise <= 1:
            raise UserError(
                f"vae_loss.latent_noise = {self.latent_noise} must be a share from 0 to 1")
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
    # The defaults below are how runs were sampled before these fields came, so that their workdirs
    # still are.
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
        check_sampling(self, shown_in_config)


def shown_in_config(field: str, value) -> str:
    """How a config writes a field of the sampling section."""
    return f"sampling.{field} = {value}"


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
        refuse("resample_times", f"goes with the samplers {', '.join(RESAMPLED)} and the "
               f"sampler is {config.sampler}; set it to 1")
    first, last = config.guidance_interval
    if not 0 <= first <= last <= 1:
        refuse("guidance_interval", "must be two times from 0 (data) to 1 (noise), smaller first")


def changed_sampling(sampling: SamplingConfig, changes: dict, shown=shown_in_config
                     ) -> SamplingConfig:
    """The section with other values; its eta belongs to its own sampler and does not go over to
    another. Raises UserError as check_sampling does."""
    if changes.get("sampler", "ddim") != "ddim":
        changes = {"eta": 0.0, **changes}
    wanted = {**dataclasses.asdict(sampling), **changes}
    check_sampling(SimpleNamespace(**wanted), shown)
    return SamplingConfig(**wanted)


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
