"""Options of the general diffusion transformer: one config covers the published families.

| family | modulation | condition | positions | qk_norm |
|---|---|---|---|---|
| DiT (arXiv 2212.09748) | linear | classes | sincos2d | none |
| Wan 2.1, 2.2 | table | text cross | rope | rms_full |
| CogVideoX (arXiv 2408.06072) | linear | text joint, shared | sincos3d or rope | ln_head |
| MM-DiT (arXiv 2403.03206) | linear | text joint, separate | any | rms_head |
"""

import dataclasses

import jax

from sora_jax.core.errors import UserError
from sora_jax.models.attention import KERNELS
from sora_jax.models.text_bytes import TextBytesConfig

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}

CHOICES = {
    "modulation": ("linear", "table", "none"),
    "text": ("none", "cross", "joint"),
    "text_proj": ("none", "linear", "mlp"),
    "streams": ("shared", "separate"),
    "qk_norm": ("none", "rms_full", "rms_head", "ln_head"),
    "position": ("none", "learned", "factorised", "fractional", "sincos2d", "sincos3d"),
    "layout": ("full", "alternate", "space_then_time", "space_and_time", "window"),
    "remat": tuple(REMAT_POLICIES),
    "attention_kernel": ("auto", *KERNELS),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options; the defaults are an unconditional DiT with 3-D rotary positions.

    patch: (t, h, w) in latents.
    out_channels: of one latent; twice in_channels for a learned variance.
    mlp_norm_eps, head_norm_eps: of the norms before the MLP and the output; norm_eps of the others.
    norm_affine: learned scale and shift in the modulated norms; cross_norm_affine: in the norm
      before cross-attention; final_norm: one more norm (with scale and shift) after the blocks.
    qk_norm: over all heads at once (rms_full) or per head.
    modulation: a map of the condition per block (linear: adaLN-zero); one map for all blocks and a
      learned table per block (table: Wan); none: the condition is one more text token of its clip.
    gates: modulation also scales what a block adds (adaLN-zero); without them it is plain adaLN.
    frequency_width, time_width: of the sinusoid of the time and of the condition (0: `width`).
    frequency_shift: the slowest frequency is that of index half - shift.
    num_classes: labels 0..n-1, and n for no class; 0: no labels. size_facts: frames, height, width,
      fps and tokens of a clip join its condition.
    text: cross-attention, or joint: in one sequence with the clip, with shared weights or its own.
    text_width: of the embeddings given; text_proj: what maps them to `width`.
    text_bytes: a byte encoder trained along (its width is text_width). text_summary: the mean of a
      clip's text joins its condition.
    image_width: of image tokens with keys and values of their own in cross-attention; 0: none.
    position: added to the tokens; "learned" has a row per place of `position_grid` (t, h, w),
      "factorised" one per coordinate (fixed kinds know no end: there it is the size trained at);
      `position_divisor` divides the coordinates of sincos3d.
    rope: rotary positions; rope_split: widths of (t, h, w) in a head, empty for Wan's thirds.
    layout: who sees whom inside a clip, see `attention_layouts`; num_space_layers for
      "space_then_time", window (latent frames in patches) for "window".
    local_width: channels in which the 3 x 3 x 3 patches around a token speak to it in every block,
      beside attention; patches are read with theirs, too. 0: attention alone. In the
      spirit of the convolutions in SANA's MLP (arXiv 2410.10629).
    remat: what of a block is computed again for gradients: none, all but products with weights
      (dots), whose results may lie in the host's memory meanwhile (offload), or all (full);
      unroll: layers of the scan written out.
    attention_kernel: of all attention in blocks, a name of `attention.KERNELS`; auto: by device.
    compute_dtype: of activations. product_dtype: of the operands of large matrix products and of
      attention's, whose sums are float32; None: that of the activations.
    """

    patch: tuple[int, int, int]
    in_channels: int
    out_channels: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    local_width: int = 0
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6
    head_norm_eps: float = 1e-6
    norm_affine: bool = False
    cross_norm_affine: bool = False
    final_norm: bool = False
    qkv_bias: bool = True
    qk_norm: str = "none"
    qk_norm_eps: float = 1e-6
    modulation: str = "linear"
    gates: bool = True
    frequency_width: int = 256
    frequency_shift: float = 0.0
    time_width: int = 0
    time_scale: float = 1000.0
    num_classes: int = 0
    size_facts: bool = False
    text: str = "none"
    text_width: int = 0
    text_proj: str = "none"
    text_bytes: TextBytesConfig | None = None
    text_summary: bool = False
    streams: str = "shared"
    image_width: int = 0
    position: str = "none"
    position_grid: tuple[int, int, int] = (0, 0, 0)
    position_divisor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    num_position_frequencies: int = 4
    rope: bool = True
    rope_theta: float = 10_000.0
    rope_split: tuple[int, ...] = ()
    layout: str = "full"
    num_space_layers: int = 0
    window: int = 0
    remat: str = "none"
    unroll: int = 1
    attention_kernel: str = "auto"
    compute_dtype: str = "float32"
    product_dtype: str | None = None

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        self._check_sizes()
        self._check_text()
        self._check_positions()

    def _check_sizes(self):
        if self.width % self.num_heads or self.head_width % 2:
            raise UserError(
                f"width {self.width} with {self.num_heads} heads: the width must be a multiple "
                "of twice the number of heads")
        if self.layout == "space_then_time" and not 0 < self.num_space_layers < self.num_layers:
            raise UserError(
                f"num_space_layers {self.num_space_layers} of {self.num_layers} layers: the layout "
                "space_then_time needs at least one layer of each kind")
        if self.local_width < 0 or (self.local_width and self.shares_streams):
            raise UserError(
                f"local_width {self.local_width} must be at least 0, and 0 where text shares the "
                "clip's weights: a text has no neighbours")
        if self.layout == "window" and self.window < 1:
            raise UserError(f"window {self.window}: the layout window needs at least 1 frame")

        if self.modulation != "linear" and self.condition_width != self.width:
            raise UserError(
                f"time_width {self.time_width} with modulation {self.modulation!r}, which adds the "
                f"condition to activations: it must be 0 or the width {self.width}")

    def _check_text(self):
        if self.text != "none" and self.text_width < 1:
            raise UserError(f"{self.text} text needs text_width, the width of its embeddings")
        if self.text_bytes is not None and self.text_bytes.width != self.text_width:
            raise UserError(
                f"text_bytes.width {self.text_bytes.width} must be text_width {self.text_width}")
        if self.text == "joint" and self.text_proj == "none" and self.text_width != self.width:
            raise UserError(
                f"text_width {self.text_width} stands in one sequence with width {self.width}; "
                "set text_proj to linear or mlp")
        if self.text == "joint" and self.layout != "full":
            raise UserError(
                f"layout {self.layout!r} splits a clip that joint text reads whole; "
                "use layout 'full' or cross text")
        if self.image_width and self.text != "cross":
            raise UserError(f"image_width {self.image_width} needs cross text, not {self.text}")
        if self.modulation == "none" and (self.text == "none" or self.kv_width != self.width):
            raise UserError(
                "modulation 'none' makes the condition a token beside the text: it needs cross or "
                f"joint text mapped to width {self.width} (text_proj linear or mlp)")

    def _check_positions(self):
        parts = {"sincos2d": 4, "sincos3d": 16}.get(self.position, 1)
        if self.width % parts:
            raise UserError(f"position {self.position!r} needs a width that is a multiple of "
                            f"{parts}; it is {self.width}")
        if self.position in ("learned", "factorised") and min(self.position_grid) < 1:
            raise UserError(f"position {self.position!r} needs position_grid (t, h, w), the size "
                            f"of the largest clip in patches; it is {self.position_grid}")
        if self.rope_split and (sum(self.rope_split) != self.head_width or len(self.rope_split) != 3
                                or any(width % 2 for width in self.rope_split)):
            raise UserError(f"rope_split {self.rope_split} must be three even widths that add up "
                            f"to the head's {self.head_width}")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def condition_width(self) -> int:
        """Width of a clip's condition."""
        return self.time_width or self.width

    @property
    def shares_streams(self) -> bool:
        """One set of weights for a clip's tokens and its text in one sequence."""
        return self.text == "joint" and self.streams == "shared"

    @property
    def num_sublayers(self) -> int:
        """Modulated parts of a block: attention (twice in space_and_time) and MLP."""
        return 3 if self.layout == "space_and_time" else 2

    @property
    def modulation_parts(self) -> int:
        """Shift and scale, and a gate."""
        return 3 if self.gates else 2

    @property
    def modulation_width(self) -> int:
        """Per block, in the order (sub-layer, stream, part) where streams share weights."""
        per_stream = self.modulation_parts * self.num_sublayers * self.width
        return per_stream * (2 if self.shares_streams else 1)

    @property
    def kv_width(self) -> int:
        """Width of the text that blocks see."""
        return self.text_width if self.text_proj == "none" else self.width

    @property
    def in_width(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * self.in_channels

    @property
    def out_width(self) -> int:
        return self.patch[0] * self.patch[1] * self.patch[2] * self.out_channels
