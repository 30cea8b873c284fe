"""Operations of a step of the diffusion transformer, counted for its clips: what the loops of an
attention kernel do is not in the program's text, and pairs of different clips are no work.

Without data a plan takes rows full of the largest clip that config.data allows.
"""

import dataclasses

import jax

from sora_jax.core import flops
from sora_jax.core.shapes import Compression
from sora_jax.models.attention import SCOPE
from sora_jax.models.transformer_config import TransformerConfig
from sora_jax.models.transformer_sizes import multiply_adds
from sora_jax.run_config import RunConfig
from sora_jax.tasks import registry
from sora_jax.train_step import make_step, state_functions


def clip_shape(config: RunConfig, compression: Compression) -> tuple[int, int]:
    """(patches along time, patches of a frame) of the largest clip of the data, at most a row."""
    t, h, w = config.model.patch
    times = -(-(1 + (config.data.max_frames - 1) // compression.time) // t)
    in_frame = max(1, config.data.max_pixels // (compression.space**2 * h * w))
    return times, max(1, min(in_frame, config.packing.row_tokens // times))


def clips_per_step(config: RunConfig, compression: Compression) -> float:
    """Of those clips in a full batch."""
    times, in_frame = clip_shape(config, compression)
    return config.packing.rows * config.packing.row_tokens / (times * in_frame)


def padding_percent(config: RunConfig, compression: Compression) -> float:
    """Of the slots of a row, those that whole clips of that size leave empty."""
    times, in_frame = clip_shape(config, compression)
    return 100 * (config.packing.row_tokens % (times * in_frame)) / config.packing.row_tokens


def text_of_clip(config: RunConfig, tokens: int) -> int:
    """Text tokens of a clip of so many tokens, where a row's text is shared out by tokens."""
    packing, encoder = config.packing, config.text_encoder
    limit = encoder.max_tokens if encoder.weights else packing.caption_limit
    return min(limit, round(packing.row_text * min(1.0, tokens / packing.row_tokens)))


def of_clips(config: RunConfig, network: TransformerConfig, compression: Compression) -> float:
    """Operations that the model needs for a step, forward and twice that backward: nothing that is
    computed again, nothing between clips, no optimizer. It is what MFU counts."""
    times, in_frame = clip_shape(config, compression)
    num_text = text_of_clip(config, times * in_frame)
    return 6.0 * multiply_adds(network, (times, in_frame, 1), num_text) * clips_per_step(
        config, compression)


def of_step(config: RunConfig, network: TransformerConfig, mesh, tx, compression: Compression
            ) -> float:
    """Operations that the step executes on all devices, with what is computed again, and attention
    among the tokens of the same clip alone. Traced with the reference in the kernel's place, whose
    products all are in the program's text."""
    model = dataclasses.replace(config.model, attention_kernel="dense")
    dense = dataclasses.replace(config, model=model)
    task, batch = registry.outline(dense)
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()}
    _, abstract, shardings = state_functions(dense, task, tx, mesh)
    step = make_step(dense, task, tx, mesh, shardings)
    total, attention = flops.count_within(SCOPE, step, abstract, batch)
    return total - attention * (1 - share_of_pairs(config, network, compression))


def share_of_pairs(config: RunConfig, network: TransformerConfig, compression: Compression
                   ) -> float:
    """Pairs of queries and keys that belong together, of all that a row has."""
    times, in_frame = clip_shape(config, compression)
    tokens, num_text = times * in_frame, text_of_clip(config, times * in_frame)
    row, row_text = config.packing.row_tokens, config.packing.row_text
    clips = row / tokens
    if network.text == "joint":
        return clips * ((tokens + num_text) / (row + row_text)) ** 2
    if network.text == "none":
        return clips * (tokens / row) ** 2
    return clips * tokens * (tokens + num_text) / (row * (row + row_text))
