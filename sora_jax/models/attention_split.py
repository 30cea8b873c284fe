"""How one attention is split over the devices of a mesh.

Rows are split over data and fsdp, heads over tensor. Where tokens are split over `sequence`, a
device needs all keys of its queries' clips. If heads divide, they take the place of tokens around
attention (Ulysses, arXiv 2309.14509: an all-to-all before and after), so every kernel sees whole
rows. If they do not, a device keeps its queries and gathers keys and values.
"""

import dataclasses

import jax
from jax.sharding import AxisType, PartitionSpec

from sora_jax.core.axes import SEQUENCE, TENSOR, size
from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Mesh axes of heads; `queries`: queries are split over sequence; `keys`: so are keys, until
    they are gathered. Without any, only rows are split."""

    heads: tuple[str, ...] = ()
    queries: bool = False
    keys: bool = False

    @property
    def within_rows(self) -> bool:
        """Whether a row is on several devices."""
        return bool(self.heads or self.queries)

    @property
    def num_query_parts(self) -> int:
        return size(SEQUENCE) if self.queries else 1


def split_of(num_heads: int, token_queries: bool, token_keys: bool) -> Split:
    """The split of an attention under the mesh of this trace.

    token_queries, token_keys: whether they are tokens of packed rows, which `sequence` splits; text
    is whole. Raises UserError where heads do not divide over tensor.
    """
    sequence, tensor = size(SEQUENCE), size(TENSOR)
    if sequence == tensor == 1:
        return Split()
    if num_heads % tensor:
        raise UserError(f"attention has {num_heads} heads, which do not divide over mesh.tensor = "
                        f"{tensor}; change mesh.tensor or the number of heads")
    if sequence == 1 or not token_queries:
        return Split(heads=(TENSOR,))
    if not token_keys:
        return Split(heads=(TENSOR,), queries=True)
    if num_heads % (sequence * tensor) == 0:
        return Split(heads=(TENSOR, SEQUENCE))
    return Split(heads=(TENSOR,), queries=True, keys=True)


def heads_for_tokens(x_BNKE, split: Split):
    """Queries, keys or values as they stand inside of an attention that splits heads alone."""
    if not split.heads or split.queries:
        return x_BNKE
    return jax.lax.with_sharding_constraint(x_BNKE, PartitionSpec(row_axes(), None, split.heads))


def check(split: Split, num_rows: int, num_queries: int, num_keys: int) -> None:
    """Raises UserError where rows, or queries or keys that are split, do not divide."""
    sizes = [("rows", num_rows, num_row_parts(), "mesh.data or mesh.fsdp")]
    sizes += [("queries", num_queries, size(SEQUENCE), "mesh.sequence")] * split.queries
    sizes += [("keys", num_keys, size(SEQUENCE), "mesh.sequence")] * split.keys
    for what, count, parts, field in sizes:
        if count % parts:
            raise UserError(f"attention of {count} {what}, which do not divide over {parts} "
                            f"devices; change {field} or the number of {what}")


def over_mesh(function, split: Split):
    """function(q, k, v, q_segment, k_segment, plan arrays) on every device for its own part."""
    rows, heads = row_axes(), split.heads or None
    q_axes = SEQUENCE if split.queries else None
    k_axes = SEQUENCE if split.keys else None
    q, k = PartitionSpec(rows, q_axes, heads), PartitionSpec(rows, k_axes, heads)

    def part(q, k, v, *others):
        if split.keys:
            k, v = (jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (k, v))
        return function(q, k, v, *others)

    return jax.shard_map(part, in_specs=(q, k, k, *_of_segments(split), _of_plan(split)),
                         out_specs=q, check_vma=False)


def plan_over_mesh(function, split: Split):
    """function(q_segment, k_segment), a kernel's plan, for the queries that a device has. Only the
    same split can read the arrays that come back."""
    if not split.queries or size(SEQUENCE) == 1:
        return function
    return jax.shard_map(function, in_specs=_of_segments(split), out_specs=_of_plan(split),
                         check_vma=False)


def _of_segments(split: Split):
    rows = row_axes()
    return PartitionSpec(rows, SEQUENCE if split.queries else None), PartitionSpec(rows)


def _of_plan(split: Split) -> PartitionSpec:
    """Whatever a plan's arrays hold, axis 0 is rows; parts of a row's queries stand beside them."""
    return PartitionSpec((*row_axes(), *(SEQUENCE,) * split.queries))


def row_axes() -> tuple[str, ...]:
    """Axes of the mesh over which rows are still to be split: all but sequence and tensor."""
    return tuple(name for name in split_axes() if name not in (SEQUENCE, TENSOR))


def num_row_parts() -> int:
    return size(*row_axes())


def split_axes() -> tuple[str, ...]:
    """Axes of the mesh over which this program's arrays are still to be split."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
                 if kind != AxisType.Manual)
