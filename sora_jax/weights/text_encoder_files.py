"""The frozen text encoder that other parts use: published weights and a tokenizer's file.

Source: how pipelines call them. T5 and umT5 (Wan, CogVideoX) mask the padding; CLIP (Stable
Diffusion) is causal and masks nothing; SigLIP was trained on texts padded to its length without a
mask, so its texts are padded to that.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.core.errors import UserError
from sora_jax.data.text_cache import TextKey, padded
from sora_jax.data.tokenizers import FileTokenizer, open_tokenizer, tokenize
from sora_jax.models.text_encoders.t5 import T5Config, t5_encode
from sora_jax.models.text_encoders.two_towers import TwoTowersConfig, encode_text
from sora_jax.weights import published, text_encoders
from sora_jax.weights.rules import check_names
from sora_jax.weights.tensor_files import open_tensors

PADDINGS = ("none", "zeros", "encoded")
TOKENS_AT_ONCE = 4096
SHARDS = "shards"  # the axis of the devices that share an encoder
SHORTEST = 16  # tokens that texts are padded to for encoding: this times a power of two


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenTextEncoder:
    """A text encoder that is only used.

    padding: what follows a text in its embedding: nothing, zeros up to max_tokens (Wan), or what
    the encoder makes of padding (Stable Diffusion, SigLIP). digest: of weights and config.
    """

    config: T5Config | TwoTowersConfig
    tensors: dict
    tokenizer: FileTokenizer
    digest: str
    max_tokens: int
    padding: str
    truncate: bool
    mesh: Mesh | None = None  # over which the tensors are split; None: they lie in their files

    @property
    def width(self) -> int:
        """Of an embedding."""
        return encoder_width(self.config)

    @property
    def key(self) -> TextKey:
        """What embeddings of this encoder are made from; the dtype kept is the cache's."""
        cut = ", longer ones cut" if self.truncate else ""
        return TextKey(self.digest, self.tokenizer.digest,
                       f"up to {self.max_tokens} tokens{cut}, padding {self.padding}")

    @property
    def padded_tokens(self) -> int:
        """To which zeros fill up every embedding."""
        return self.max_tokens if self.padding == "zeros" else 0

    def on_device(self, devices=None) -> "FrozenTextEncoder":
        """The same with its tensors in the memory of these devices (None: those of this process),
        where they stay while it is kept. Each is split over all of them, and so are texts: a layer
        is whole only while it runs (fully sharded, arXiv 2304.11277, section 3.2)."""
        mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), (SHARDS,))
        return dataclasses.replace(self, mesh=mesh, tensors=jax.tree.map(
            lambda x: jax.device_put(np.asarray(x), split(x.shape, mesh)), self.tensors))

    def embed(self, texts: list[str]) -> list[np.ndarray]:
        """float32 (M, width) of every text, with padding as asked for; see `encode`."""
        return [padded(x_MD, self.padded_tokens) for x_MD in self.encode(texts)]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """`embed` without the zeros; compiled once per length.

        Raises UserError on a text of more than max_tokens tokens, unless they are to be cut.
        """
        tokens = [tokenize(self.tokenizer, text, self.max_tokens, self.truncate) for text in texts]
        used = [int(mask_M.sum()) for _, mask_M in tokens]
        lengths = [self._length(count) for count in used]
        out, keeps_all = [None] * len(texts), self.padding == "encoded"
        for length in sorted(set(lengths)):
            mine = [i for i, own in enumerate(lengths) if own == length]
            rows = self._rows(length)
            for first in range(0, len(mine), rows):
                part = mine[first : first + rows]
                ids_BM = np.full((rows, length), self.tokenizer.pad_id, np.int32)
                mask_BM = np.zeros((rows, length), np.int32)
                for row, i in enumerate(part):
                    ids_BM[row], mask_BM[row] = (x[:length] for x in tokens[i])
                if self.mesh is not None:
                    ids_BM, mask_BM = jax.device_put(
                        (ids_BM, mask_BM), NamedSharding(self.mesh, PartitionSpec(SHARDS)))
                embeddings_BMD = np.asarray(
                    _encode(self.config, self.tensors, ids_BM, mask_BM))
                for row, i in enumerate(part):
                    out[i] = embeddings_BMD[row, : length if keeps_all else used[i]]
        return out

    def _rows(self, length: int) -> int:
        """Texts of that length encoded at once: as many on each device."""
        count = 1 if self.mesh is None else self.mesh.size
        return max(1, TOKENS_AT_ONCE // length // count) * count

    def _length(self, count: int) -> int:
        """What a text of so many tokens is padded to for encoding."""
        if self.padding == "encoded" or _sees_padding(self.config):
            return self.max_tokens
        length = SHORTEST
        while length < count:
            length *= 2
        return min(length, self.max_tokens)


def split(shape, mesh: Mesh) -> NamedSharding:
    """The longest side of a tensor that the devices divide is split; where none is, each device
    holds it whole."""
    sides = [axis for axis, side in enumerate(shape) if side % mesh.size == 0]
    longest = max(sides, key=lambda axis: shape[axis], default=None)
    return NamedSharding(mesh, PartitionSpec(
        *(SHARDS if axis == longest else None for axis in range(len(shape)))))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, tensors, ids_BM, mask_BM):
    if isinstance(config, T5Config):
        return t5_encode(config, tensors, ids_BM, mask_BM)
    return encode_text(config, tensors, ids_BM).last


def _sees_padding(config) -> bool:
    return isinstance(config, TwoTowersConfig) and config.kind == "siglip"


def encoder_width(config) -> int:
    """Width of the embeddings of an encoder."""
    return config.width if isinstance(config, T5Config) else config.text.width


def load_text_encoder(weights, tokenizer, max_tokens: int, padding: str = "none",
                      truncate: bool = False) -> FrozenTextEncoder:
    """The encoder of a published folder or file, or of an imported one, with its tokenizer.

    Tensors keep their dtype and are read when they are first used; computing is float32. Raises
    UserError on anything missing, damaged or foreign, and on more tokens than the encoder takes.
    """
    config, tensors, files = _open_encoder(weights)
    if isinstance(config, TwoTowersConfig):
        if config.text is None:
            raise UserError(f"{weights} is an encoder of images alone; it has no text tower")
        if max_tokens > config.text.length:
            raise UserError(f"text_encoder.max_tokens = {max_tokens}; {weights} has "
                            f"{config.text.length} places for tokens, lower it to that")
        if _sees_padding(config) and max_tokens != config.text.length:
            raise UserError(f"text_encoder.max_tokens = {max_tokens}; {weights} was trained on "
                            f"texts padded to {config.text.length} tokens, set it to that")
        tensors = {name: x for name, x in tensors.items()
                   if not name.startswith(("vision_model.", "visual_projection", "logit_"))}
    content = [dataclasses.asdict(config), published.files_digest(files)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return FrozenTextEncoder(config, tensors, open_tokenizer(tokenizer), digest, max_tokens,
                             padding, truncate)


def _open_encoder(weights):
    """(config, tensors by name, the files they are in)."""
    path = pathlib.Path(weights).expanduser()
    family = text_encoders.FAMILY
    native = path / family.file_name if path.is_dir() else path
    card_path = native.with_suffix(".json")
    if native.is_file() and card_path.is_file():
        card = published.read_json(card_path)
        if card.get("format") == family.format:
            config, tensors = family.from_card(card, str(card_path)), open_tensors(native).tensors
            check_names({name: x.shape for name, x in tensors.items()}, family.shapes(config),
                        str(native))
            return config, tensors, [native]
    weights = published.open_published(path)
    family_found, config, tensors, _ = published.convert(weights)
    if family_found.name != family.name:
        raise UserError(f"{path} are weights of {family_found.name}, which is no text encoder")
    folder = path if path.is_dir() else path.parent
    return config, tensors, [folder / name for name in sorted(weights.files)]

