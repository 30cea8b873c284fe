"""One checkpoint of a train state on disk: written by Orbax, read back only as it was saved.

Arrays that lie on the devices of several processes are read by all of them: each reads its part by
itself, then they agree whether the step is whole, and none goes on alone.

The format is described in docs/formats_checkpoint.md.
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util

from sora_jax import frozen, processes
from sora_jax.core.errors import UserError
from sora_jax.core.tree import named_leaves
from sora_jax.fingerprint import fingerprints, opened, sealed

# A train state is saved as these items, each a flat dict {path: array}; "frozen" is left out where
# all is trained, "other" holds the counters and the optimizer's state.
FROZEN = "frozen"
ITEMS = ("params", "ema_params", FROZEN, "other")


class DamagedCheckpoint(UserError):
    """A step that is not what was saved."""


def save_args(state) -> ocp.args.Composite:
    """What Orbax is to write for a train state; waits for the devices (see fingerprint.py)."""
    items = _items(state)
    record = sealed(fingerprints({k: v for item in items.values() for k, v in item.items()}))
    return ocp.args.Composite(
        fingerprint=ocp.args.JsonSave(record),
        **{name: ocp.args.StandardSave(item) for name, item in items.items()
           if item or name != FROZEN},
    )


def _items(state) -> dict[str, dict[str, object]]:
    """The leaves of a train state by item and path."""
    items = {name: {} for name in ITEMS}
    for path, leaf in named_leaves(state):
        item = path.split("/")[0]
        items[item if item in ITEMS else "other"][path] = leaf
    return items


def read_state(directory, step, abstract_state, shardings):
    """The train state of a step, placed by shardings (a NamedSharding per leaf, any mesh).

    Raises DamagedCheckpoint where it is not what was saved, UserError where names, shapes or dtypes
    are not those of abstract_state.
    """
    placed = jax.tree.map(_placed, abstract_state, shardings)
    read = _read_items(directory, step, _items(placed))
    leaves = [read[path] for path, _ in named_leaves(placed)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def read_params(directory, step, item, abstract_params, shardings):
    """The weights of a step as nested dicts, of the whole network; item is "params" or
    "ema_params".

    Without abstract_params they have the saved shapes, without shardings they lie on this process's
    first device. Raises as read_state does.
    """
    def leaves():
        return _fingerprints(directory, step)

    joint = shardings is not None and is_joint(shardings)
    saved = _agreed(leaves) if joint else leaves()
    if any(_item_of(path) == FROZEN for path in saved):
        weights = _read_whole(directory, step, item, saved, shardings)
        if abstract_params is not None:
            _check_layout(directory / str(step), {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
                for path, leaf in named_leaves(weights)}, dict(named_leaves(abstract_params)))
        return weights
    if abstract_params is None:
        return _nested(_read_items(directory, step, {item: _as_saved(saved, item)}))
    if shardings is None:
        shardings = jax.tree.map(lambda _: _first_device(), abstract_params)
    placed = jax.tree.map(_placed, abstract_params, shardings)
    read = _read_items(
        directory, step, {item: {f"{item}/{path}": leaf for path, leaf in named_leaves(placed)}})
    return jax.tree.unflatten(jax.tree.structure(abstract_params), list(read.values()))


def _read_whole(directory, step, item, saved, shardings):
    """The weights of a step of which a part is frozen, merged; adapters lie whole on each device.

    shardings: of the merged weights, or None.
    """
    places, elsewhere = {}, _first_device()
    if shardings is not None:
        places = dict(named_leaves(shardings))
        elsewhere = next(iter(places.values()))
        if isinstance(elsewhere, jax.sharding.NamedSharding):
            elsewhere = jax.sharding.NamedSharding(elsewhere.mesh, jax.sharding.PartitionSpec())
    items = {name: {
        path: _placed(leaf, places.get(path.removeprefix(prefix), elsewhere))
        for path, leaf in _as_saved(saved, name).items()
    } for name, prefix in ((item, f"{item}/"), (FROZEN, f"{FROZEN}/{frozen.PARAMS}/"))}
    read = _read_items(directory, step, items)
    trained, held = (_nested({path: read[path] for path in part}) for part in items.values())
    return jax.jit(frozen.whole, out_shardings=shardings)(held, trained)


def is_joint(shardings) -> bool:
    """Whether arrays so placed are read by several processes together."""
    return not all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings))


def _first_device():
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_saved(saved, item):
    """Abstract leaves of an item by path, on this process's first device."""
    return {path: jax.ShapeDtypeStruct(
        tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]), sharding=_first_device())
        for path, leaf in saved.items() if _item_of(path) == item}


def _nested(leaves):
    """Nested dicts of the leaves of one item by path."""
    return traverse_util.unflatten_dict(
        {tuple(path.split("/")[1:]): leaf for path, leaf in leaves.items()})


def _open_step(directory, step, names):
    """What Orbax reads of a step; whatever goes wrong in there means that the step is damaged.

    Each process reads alone: a barrier of Orbax in here would not be reached by one that fails.
    """
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    try:
        with ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        ) as reader:
            restored = reader.restore(directory / str(step), args=ocp.args.Composite(**names))
        return {name: restored[name] for name in names}
    except jax.errors.JaxRuntimeError:  # of a device, as when memory is short, and not of the files
        raise
    except Exception as error:  # Orbax raises bare Exceptions for truncated files
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DamagedCheckpoint(
            f"checkpoint {directory / str(step)} is damaged: {first_line}") from error


def _fingerprints(directory, step) -> dict[str, dict]:
    read = _open_step(directory, step, {"fingerprint": ocp.args.JsonRestore()})
    try:
        return opened(read["fingerprint"])
    except ValueError as error:
        raise DamagedCheckpoint(
            f"checkpoint {directory / str(step)} is damaged: {error}") from error


def _read_items(directory, step, items) -> dict[str, jax.Array]:
    """The arrays by path, each verified; items: {item: {path: placed ShapeDtypeStruct}}."""
    wanted = {path: leaf for item in items.values() for path, leaf in item.items()}
    joint = is_joint([leaf.sharding for leaf in wanted.values()])

    def read():
        saved = _fingerprints(directory, step)
        saved = {path: leaf for path, leaf in saved.items() if _item_of(path) in items}
        _check_layout(directory / str(step), saved, wanted)
        restored = _open_step(
            directory, step,
            {name: ocp.args.StandardRestore(item) for name, item in items.items() if item})
        return saved, {path: leaf for item in restored.values() for path, leaf in item.items()}

    saved, leaves = _agreed(read) if joint else read()
    found = fingerprints(leaves)  # sums over the devices of all processes

    def check():
        changed = [path for path in wanted if found.get(path) != saved[path]]
        if changed:
            raise DamagedCheckpoint(
                f"checkpoint {directory / str(step)} is damaged: {len(changed)} of {len(wanted)} "
                f"arrays are not what was saved, the first is {changed[0]}"
            )

    _agreed(check) if joint else check()
    return {path: leaves[path] for path in wanted}


def _agreed(work: Callable):
    """work() on every process; where it raises a UserError on one, all raise that of the first.

    An error that is no damage goes first: after it no step is moved away.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    said = processes.exchange(
        "" if error is None else json.dumps([isinstance(error, DamagedCheckpoint), str(error)]))
    failed = [(*json.loads(text), index) for index, text in enumerate(said) if text]
    if not failed:
        return result
    is_damage, told, index = min(failed, key=lambda each: each[0])
    kind = DamagedCheckpoint if is_damage else UserError
    raise kind(f"process {index}: {told}" if index else told) from error


def _item_of(path):
    item = path.split("/")[0]
    return item if item in ITEMS else "other"


def _check_layout(place, saved, wanted):
    """Raises UserError where names, shapes or dtypes differ: another model, not a damage."""
    remedy = "use the config it was trained with, or another workdir"
    for path, leaf in wanted.items():
        if path not in saved:
            raise UserError(f"checkpoint {place} has no array {path}; {remedy}")
        asked = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for key in ("shape", "dtype"):
            if asked[key] != saved[path][key]:
                raise UserError(
                    f"checkpoint {place}: {path} has {key} {saved[path][key]}, the model asks "
                    f"for {asked[key]}; {remedy}"
                )
    for path in saved:
        if path not in wanted:
            raise UserError(f"checkpoint {place} has the array {path}, the model has not; {remedy}")
