"""Fills a planned row: clips of latents become the arrays of a packed batch, and back."""

import dataclasses

import numpy as np

from sora_jax.core.errors import UserError
from sora_jax.data.conditioning import ClipCondition
from sora_jax.data.tokenizers import encode_bytes

NUM_FACTS = 5  # F: frames, height, width (pixels), fps, latent tokens (dropped ones too)


@dataclasses.dataclass(frozen=True)
class PackedClip:
    """One clip of a row: its latents, its caption (None: dropped) and its facts.

    text_MD: what a frozen encoder makes of the caption, in batches that carry embeddings.
    """

    latents_THWC: np.ndarray
    caption: str | None
    frames: int  # of the pixels, as are height and width
    height: int
    width: int
    fps: float
    kept: np.ndarray | None = None  # indices of its tokens that are there; None: all
    text_MD: np.ndarray | None = None
    condition: ClipCondition | None = None  # of all its tokens; None: its text alone


def num_tokens(shape_THW, patch) -> np.ndarray:
    """Tokens of latents of (T, H, W) after patching; UserError where the patch does not divide."""
    shape = np.asarray(shape_THW)
    bad = np.argwhere(np.atleast_2d(shape % np.asarray(patch)).any(axis=-1)).reshape(-1)
    if len(bad):
        size = tuple(int(x) for x in np.atleast_2d(shape)[bad[0]])
        raise UserError(
            f"latents of clip {bad[0]} are {size} (T, H, W), which the patch {tuple(patch)} does "
            f"not divide ({len(bad)} such clips); change the patch, or encode with sizes that are "
            "multiples of it"
        )
    return np.prod(shape // np.asarray(patch), axis=-1)


def patchify(latents_THWC, patch) -> np.ndarray:
    """tokens_ND with D ordered (pt, ph, pw, C); tokens in (t, h, w) order."""
    T, H, W, C = latents_THWC.shape
    pt, ph, pw = patch
    x = latents_THWC.reshape(T // pt, pt, H // ph, ph, W // pw, pw, C)
    return x.transpose(0, 2, 4, 1, 3, 5, 6).reshape(-1, pt * ph * pw * C)


def unpatchify(tokens_ND, shape_THWC, patch) -> np.ndarray:
    """latents_THWC; the inverse of `patchify`."""
    T, H, W, C = shape_THWC
    pt, ph, pw = patch
    x = tokens_ND.reshape(T // pt, H // ph, W // pw, pt, ph, pw, C)
    return x.transpose(0, 3, 1, 4, 2, 5, 6).reshape(shape_THWC)


def positions(grid_THW) -> np.ndarray:
    """position_N3 int32: (t, h, w) of each token, in patches."""
    return np.indices(tuple(grid_THW), np.int32).reshape(3, -1).T


def empty_rows(num_rows: int, config, patch, channels: int, text_width: int = 0,
               conditioned: bool = False) -> dict[str, np.ndarray]:
    """A batch of padding: every field of the packed batch, all zero.

    text_width: of the embeddings of a frozen encoder; 0: text is byte ids.
    conditioned: with the fields of clips that are given more than their text.
    """
    B, N, M, S = num_rows, config.row_tokens, config.row_text, config.max_clips
    text = {"text_embedding_BMD": np.zeros((B, M, text_width), np.float32)} if text_width else {
        "text_BM": np.zeros((B, M), np.int32)}
    conditions = {
        "known_BN": np.zeros((B, N), bool),
        "own_time_BN": np.zeros((B, N), bool),
        "time_normal_BN": np.zeros((B, N), np.float32),
    } if conditioned else {}
    return {
        "tokens_BND": np.zeros((B, N, int(np.prod(patch)) * channels), np.float32),
        "segment_BN": np.zeros((B, N), np.int32),
        "position_BN3": np.zeros((B, N, 3), np.int32),
        **text,
        "text_segment_BM": np.zeros((B, M), np.int32),
        "clip_BSF": np.zeros((B, S, NUM_FACTS), np.float32),
        "extent_BS3": np.zeros((B, S, 3), np.int32),
        **conditions,
    }


def pack_row(batch: dict, row: int, clips: list[PackedClip | None], config, patch) -> None:
    """Writes `clips` into row `row` of `batch` (from `empty_rows`), clip i as segment i + 1.

    None is a hole: a clip that could not be read. Its segment number stays unused and its tokens
    are left as padding at the end of the row.
    """
    n = m = 0
    embedded = "text_embedding_BMD" in batch
    for segment, clip in enumerate(clips, 1):
        if clip is None:
            continue
        tokens_ND = patchify(clip.latents_THWC, patch)
        kept = slice(None) if clip.kept is None else clip.kept
        num_all, tokens_ND = len(tokens_ND), tokens_ND[kept]
        words = clip.text_MD if embedded else encode_bytes(clip.caption, config.caption_limit)
        video, text = slice(n, n + len(tokens_ND)), slice(m, m + len(words))
        n, m = video.stop, text.stop
        assert n <= config.row_tokens and m <= config.row_text, (n, m, "row is over its capacity")
        batch["tokens_BND"][row, video] = tokens_ND
        batch["segment_BN"][row, video] = segment
        grid = [size // p for size, p in zip(clip.latents_THWC.shape, patch, strict=False)]
        batch["position_BN3"][row, video] = positions(grid)[kept]
        batch["extent_BS3"][row, segment - 1] = grid
        batch["text_embedding_BMD" if embedded else "text_BM"][row, text] = words
        batch["text_segment_BM"][row, text] = segment
        batch["clip_BSF"][row, segment - 1] = (
            clip.frames, clip.height, clip.width, clip.fps, num_all
        )
        if clip.condition is not None:
            batch["known_BN"][row, video] = clip.condition.known_N[kept]
            if clip.condition.normal_N is not None:
                batch["own_time_BN"][row, video] = True
                batch["time_normal_BN"][row, video] = clip.condition.normal_N[kept]


def same_text(batch: dict, words) -> dict[str, np.ndarray]:
    """The text fields of a packed batch in which every clip has the same words: byte ids (M,), or
    embeddings (M, E). Raises AssertionError where a row has no room for them."""
    name = "text_embedding_BMD" if "text_embedding_BMD" in batch else "text_BM"
    text, segment_BM = np.zeros_like(batch[name]), np.zeros_like(batch["text_segment_BM"])
    for row, facts_SF in enumerate(batch["clip_BSF"]):
        segments = 1 + np.flatnonzero(facts_SF[:, 0] > 0)
        owners = np.repeat(segments, len(words))
        assert len(owners) <= segment_BM.shape[1], (len(owners), segment_BM.shape)
        segment_BM[row, : len(owners)] = owners
        text[row, : len(owners)] = np.concatenate([words] * len(segments)) if len(owners) else 0
    return {name: text, "text_segment_BM": segment_BM}


def unpack_row(batch: dict, row: int, segment: int, patch) -> np.ndarray:
    """latents_THWC of one segment of a row with all its tokens; the inverse of `pack_row`."""
    mine = batch["segment_BN"][row] == segment
    tokens_ND = batch["tokens_BND"][row][mine]
    grid = batch["position_BN3"][row][mine].max(axis=0) + 1
    channels = tokens_ND.shape[1] // int(np.prod(patch))
    shape = [int(g) * p for g, p in zip(grid, patch, strict=True)]
    return unpatchify(tokens_ND, (*shape, channels), patch)
