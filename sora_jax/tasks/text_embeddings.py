"""From captions to the text cache: every distinct caption through the frozen encoder once."""

import dataclasses
import functools
import time

from sora_jax import shared_work
from sora_jax.core.errors import UserError
from sora_jax.data.latent_cache import LatentCache
from sora_jax.data.sharded_records import REBUILD
from sora_jax.data.text_cache import TextCache, TextKey, TextWriter, open_text_cache
from sora_jax.run_config import RunConfig, TextEncoderConfig
from sora_jax.tasks import shared_cache
from sora_jax.tasks.latents import latents_directory
from sora_jax.tasks.requests import Embed
from sora_jax.weights.text_encoder_files import FrozenTextEncoder, load_text_encoder

CAPTIONS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """The encoder of a section; its weights are loaded when they are first needed."""

    section: TextEncoderConfig

    @functools.cached_property
    def encoder(self) -> FrozenTextEncoder:
        return load(self.section).on_device()


@functools.lru_cache(maxsize=1)
def load(section: TextEncoderConfig) -> FrozenTextEncoder:
    """The frozen encoder of config.text_encoder, its tensors still in their files.

    Raises UserError where its width is another.
    """
    encoder = load_text_encoder(section.weights, section.tokenizer, section.max_tokens,
                                section.padding, section.truncate)
    if encoder.width != section.width:
        raise UserError(f"text_encoder.width = {section.width} and {section.weights} gives "
                        f"embeddings of width {encoder.width}; set it to that")
    return encoder


def open_text(config: RunConfig, workdir: str, latents: LatentCache, split: str
              ) -> TextCache | None:
    """The text cache of a split, built first where the config allows it (then all processes call
    this and build it together); None where the model reads bytes.

    Raises UserError where it is missing (and may not be built), stale, damaged, or lacks a caption
    of the latents.
    """
    section = config.text_encoder
    if not section.weights:
        return None
    encoder = load(section)
    key = text_key(encoder, section)
    directory = latents_directory(config, workdir) / "text" / split
    if shared_cache.to_be_built(config, directory):
        build_text(encoder, key, section.dtype, latents, directory,
                   (config.sampling.negative_prompt,))
    cache = open_text_cache(directory, key)
    if latents.caption_digest_K16 is None:
        raise UserError(f"latent cache {latents.directory} was made before text encoders and does "
                        f"not tell its captions apart; {REBUILD}")
    cache.num_tokens(latents.caption_digest_K16)  # raises where one is missing
    return cache


def text_key(encoder: FrozenTextEncoder, section: TextEncoderConfig) -> TextKey:
    """What the text cache of a run is made from."""
    return dataclasses.replace(
        encoder.key, options=f"{encoder.key.options}, {section.dtype}")


def build_text(encoder: FrozenTextEncoder, key: TextKey, dtype: str, latents: LatentCache,
               directory, more=()) -> None:
    """Encodes every distinct caption of the latents, the empty one and `more`, and writes their
    cache; an existing one is replaced. All processes call this, and each encodes a part."""
    start = time.monotonic()
    captions = sorted({"", *more, *distinct_captions(latents)})
    firsts = range(0, len(captions), CAPTIONS_AT_ONCE)
    mine = shared_work.run_of([1] * len(firsts))
    encoder = encoder.on_device()

    def write(writer):
        for first in firsts[mine.start : mine.stop]:
            part = captions[first : first + CAPTIONS_AT_ONCE]
            for caption, embedding_MD in zip(part, encoder.encode(part), strict=True):
                writer.add(caption, embedding_MD)
        return 0

    shared_cache.build(directory, functools.partial(
        TextWriter, directory, key, encoder.width, dtype, encoder.padded_tokens), write)
    print(f"encoded {len(captions)} captions in {time.monotonic() - start:.0f} s", flush=True)


def distinct_captions(latents: LatentCache) -> set[str]:
    """The captions of all clips; each process reads some of these."""
    mine = {caption for clip in range(len(latents))[shared_work.share()]
            for caption in latents[clip].captions}
    return {caption for part in shared_work.gathered(lambda: sorted(mine)) for caption in part}


def embedder(config: RunConfig, cache: TextCache | None) -> Embed | None:
    """What gives the embeddings of prompts: the cache where it holds them, else the encoder, which
    is loaded when it is first needed. None where the model reads bytes."""
    section = config.text_encoder
    if not section.weights:
        return None
    lazy = _Lazy(section)

    def embed(texts):
        held = {text for text in texts if cache is not None and text in cache}
        others = sorted(set(texts) - held)
        new = dict(zip(others, lazy.encoder.embed(others), strict=True)) if others else {}
        return [cache.embedding(text) if text in held else new[text] for text in texts]

    return embed
