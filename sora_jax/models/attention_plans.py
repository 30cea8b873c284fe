"""Who attends to whom in a batch, worked out once: every layer of the network reads the same plans.

A plan is what a kernel prepares from the segments (which blocks meet, where clips begin); layers
run in a scan, inside which it would be made again by each of them.
"""

import typing

import jax
import jax.numpy as jnp

from sora_jax.models.attention import Plan, attention, attention_plan
from sora_jax.models.attention_layouts import layout_segments
from sora_jax.models.attention_split import heads_for_tokens, split_of
from sora_jax.models.segments import by_order, clips_together
from sora_jax.models.transformer_config import TransformerConfig


class Meeting(typing.NamedTuple):
    """Queries and keys that meet, and the plan for it.

    order_2BN: None, or where tokens go so that each clip stands in one run, and the way back; the
    segments are then in that order.
    """

    q_segment_BN: jnp.ndarray
    k_segment_BM: jnp.ndarray
    plan: Plan
    order_2BN: jnp.ndarray | None = None

    def attend(self, q_BNKE, k_BMKE, v_BMKE, dtype: str):
        """Attention (B, N, K, E) of queries and keys in the order that they were given in."""
        q, k, v = q_BNKE, k_BMKE, v_BMKE
        if self.order_2BN is not None:
            there, back = self.order_2BN
            split = self.plan.split
            q, k, v = (by_order(heads_for_tokens(x, split), there, back) for x in (q, k, v))
        out = attention(q, k, v, self.q_segment_BN, self.k_segment_BM, dtype, plan=self.plan)
        return out if self.order_2BN is None else by_order(out, back, there)


class Meetings(typing.NamedTuple):
    """own: a clip with itself, one per sub-layer; where layers take turns (`takes_turns`) one with
    a leading axis, the kinds of layers. text, image: clips with what they read; None: nothing."""

    own: tuple[Meeting, ...]
    text: Meeting | None
    image: Meeting | None

    def of_layer(self, kind, config: TransformerConfig) -> tuple[Meeting, ...]:
        """`own` for a layer of this kind."""
        if not takes_turns(config):
            return self.own
        return tuple(jax.tree.map(lambda x: x[kind], meeting) for meeting in self.own)


def takes_turns(config: TransformerConfig) -> bool:
    """Whether layers attend in different layouts."""
    return config.layout not in ("full", "space_and_time")


def attention_dtype(config: TransformerConfig) -> str:
    """Of the operands of attention's products."""
    return config.product_dtype or config.compute_dtype


def plan_meetings(config: TransformerConfig, batch: dict, text_segment_BM, max_clips: int
                  ) -> Meetings:
    """The meetings of a batch whose clips are numbered up to max_clips, each in one run of tokens
    (and of text, and of image tokens); text_segment_BM: of what blocks read, None: nothing."""
    segment_BN = batch["segment_BN"]

    def meet(q_segment, k_segment, clips, order=None, token_keys=True):
        plan = attention_plan(q_segment, k_segment, config.head_width, attention_dtype(config),
                              config.attention_kernel, clips,
                              split=split_of(config.num_heads, True, token_keys))
        return Meeting(q_segment, k_segment, plan, order)

    def joint():
        both = jnp.concatenate([text_segment_BM, segment_BN], axis=1)
        order = clips_together(both)
        sorted_BN = jnp.take_along_axis(both, order[0], axis=1)
        meeting = meet(sorted_BN, sorted_BN, max_clips, order)
        # The mask of the reference serves any order.
        return meet(both, both, 0) if meeting.plan.kernel == "dense" else meeting

    if config.text == "joint":
        own = (joint(),)
    else:
        clips = max_clips if config.layout == "full" else 0
        own = tuple(meet(segment, segment, clips) for segment in layout_segments(
            config.layout, segment_BN, batch["position_BN3"], config.window))
    if takes_turns(config):
        own = (jax.tree.map(lambda *kinds: jnp.stack(kinds), *own),)
    return Meetings(
        own=own,
        text=meet(segment_BN, text_segment_BM, max_clips, token_keys=False)
        if config.text == "cross" else None,
        image=meet(segment_BN, batch["image_segment_BL"], max_clips, token_keys=False)
        if config.image_width else None,
    )
