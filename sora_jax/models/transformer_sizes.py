"""The sizes of the DiT paper, and the arithmetic of a transformer for a clip."""

from sora_jax.core.errors import UserError
from sora_jax.models.attention_layouts import layer_kinds
from sora_jax.models.neighbours import OFFSETS
from sora_jax.models.transformer_config import TransformerConfig

# Layers, width, heads. Source: DiT, arXiv 2212.09748, table 1.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dit_config(width: int, num_layers: int, num_heads: int, patch: int, num_classes: int = 1000,
               in_channels: int = 4, out_channels: int = 8, **options) -> TransformerConfig:
    """A DiT with adaLN-zero, labels, fixed 2-D positions and a learned variance.

    Source: DiT, section 3 and appendix A.
    """
    return TransformerConfig(
        patch=(1, patch, patch), in_channels=in_channels, out_channels=out_channels, width=width,
        num_layers=num_layers, num_heads=num_heads, mlp_width=4 * width, num_classes=num_classes,
        position="sincos2d", rope=False, **options)


def named_dit(name: str, **options) -> TransformerConfig:
    """The DiT of a name like "XL/2"; raises UserError on an unknown size or patch."""
    size, _, patch = name.partition("/")
    if size not in DIT_SIZES or not patch.isdigit() or int(patch) < 1:
        raise UserError(f"size {name!r} is unknown; it is one of {', '.join(DIT_SIZES)} with a "
                        "patch, as in XL/2")
    layers, width, heads = DIT_SIZES[size]
    return dit_config(width, layers, heads, int(patch), **options)


def multiply_adds(config: TransformerConfig, shape: tuple[int, int, int], num_text: int = 0,
                  num_image: int = 0) -> int:
    """Multiply-adds of matrix products in one forward pass of one clip alone in its row.

    shape: of the clip in patches (t, h, w). num_text, num_image: tokens of its text and image.
    The paper's "Gflops" are these, in 1e9; elementwise work and a byte encoder are not counted.
    """
    num_tokens = shape[0] * shape[1] * shape[2]
    width, cond = config.width, config.condition_width
    joint_text = num_text if config.text == "joint" else 0
    tokens = num_tokens + joint_text
    pairs = sum(_pairs(config, shape, joint_text))
    per_block = tokens * 2 * width * config.mlp_width
    if config.text == "cross":
        per_block += num_tokens * 2 * width * width + 2 * num_tokens * num_text * width
        per_block += num_text * 2 * config.kv_width * width
        per_block += num_image * 2 * width * width + 2 * num_tokens * num_image * width
    per_block += (config.num_sublayers - 1) * tokens * 4 * width * width
    own_text = config.text == "joint" and not config.shares_streams
    modulation = config.modulation_width * cond * (2 if own_text else 1)
    if config.modulation == "linear":
        per_block += modulation
    near = len(OFFSETS) if config.local_width else 0
    per_block += num_tokens * width * config.local_width * (1 + near)
    once = num_tokens * width * ((1 + near) * config.in_width + config.out_width)
    once += width * cond if near else 0
    once += cond * (config.frequency_width + cond)
    once += 2 * width * cond if config.modulation == "linear" else 0
    once += modulation if config.modulation == "table" else 0
    if config.text != "none" and config.text_proj != "none":
        once += num_text * config.text_width * width
        once += num_text * width * width * (config.text_proj == "mlp")
    once += num_image * config.image_width * (config.image_width + width)
    return config.num_layers * per_block + 2 * width * pairs + once


def _pairs(config, shape, joint_text):
    """Pairs of tokens that attend, per layer."""
    t, h, w = shape
    space, time = t * (h * w) ** 2, h * w * t**2
    for layer, kind in enumerate(
            layer_kinds(config.layout, config.num_layers, config.num_space_layers)):
        if config.layout == "full":
            yield (t * h * w + joint_text) ** 2
        elif config.layout == "space_and_time":
            yield space + time
        elif config.layout == "window":
            shift = config.window // 2 * (layer % 2)
            frames = [(i + shift) // config.window for i in range(t)]
            yield sum(frames.count(i) ** 2 for i in set(frames)) * (h * w) ** 2
        else:
            yield time if kind else space
