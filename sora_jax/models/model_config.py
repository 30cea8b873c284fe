"""config.model: the options of the network that a run may set."""

import dataclasses

from sora_jax.core.errors import UserError
from sora_jax.models.text_bytes import TextBytesConfig
from sora_jax.models.transformer_config import CHOICES, TransformerConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Options of `TransformerConfig` under the names they have there, but for these.

    mlp_ratio: width of the MLP over `width`, where mlp_width is 0. text: the byte encoder.
    text_attention: how blocks read its words, `TransformerConfig.text`.
    """

    patch: tuple[int, int, int]
    width: int
    num_layers: int
    num_heads: int
    mlp_ratio: float
    rope_theta: float
    num_position_frequencies: int
    frequency_width: int
    remat: str
    unroll: int
    compute_dtype: str
    product_dtype: str
    text: TextBytesConfig
    # The defaults below are those of configs/base.py; they stand here too so that workdirs written
    # before these fields can still be read.
    mlp_width: int = 0
    local_width: int = 0
    text_attention: str = "cross"
    text_proj: str = "none"
    text_summary: bool = True
    streams: str = "shared"
    modulation: str = "linear"
    gates: bool = True
    time_width: int = 0
    size_facts: bool = True
    norm_affine: bool = False
    cross_norm_affine: bool = False
    final_norm: bool = False
    qkv_bias: bool = True
    qk_norm: str = "rms_head"
    position: str = "fractional"
    position_grid: tuple[int, int, int] = (0, 0, 0)
    rope: bool = True
    rope_split: tuple[int, ...] = ()
    layout: str = "full"
    num_space_layers: int = 0
    window: int = 0
    attention_kernel: str = "auto"

    def __post_init__(self):
        if self.text_attention not in CHOICES["text"]:
            raise UserError(f"text_attention {self.text_attention!r} is unknown; allowed: "
                            f"{', '.join(CHOICES['text'])}")
        self.network(1)  # raises on what does not fit together

    def network(self, channels: int, frozen_text_width: int = 0) -> TransformerConfig:
        """The network for latents of `channels`; it reads embeddings of frozen_text_width, or
        where that is 0 its own byte encoder."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        ratio, text = options.pop("mlp_ratio"), options.pop("text")
        return TransformerConfig(
            in_channels=channels, out_channels=channels,
            mlp_width=options.pop("mlp_width") or int(self.width * ratio),
            text=options.pop("text_attention"), text_bytes=None if frozen_text_width else text,
            text_width=frozen_text_width or text.width, **options)
