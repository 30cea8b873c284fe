"""Frames that a module remembers from the chunk before, in flax's collection "cache".

A clip given in chunks runs the same code as a whole clip. Where the collection is mutable, every
module that looks back in time leaves its last input frames there, and puts what it finds there in
front of its input; a module that finds nothing stands at the beginning of the clip.
"""

import flax.linen as nn
import jax.numpy as jnp

COLLECTION = "cache"


def streaming(module: nn.Module) -> bool:
    """Whether this call is a chunk of a clip."""
    return module.is_mutable_collection(COLLECTION) and not module.is_initializing()


def begun(module: nn.Module, name: str) -> bool:
    """Whether the module saw an earlier chunk of this clip; remembers under `name` that it did."""
    if not streaming(module):
        return False
    before = module.has_variable(COLLECTION, name)
    module.put_variable(COLLECTION, name, jnp.zeros((), jnp.int8))
    return before


def with_past(module: nn.Module, x_BTHWC, frames: int):
    """(x with the last `frames` frames before it in front, True), or (x, False) at the beginning
    of a clip. Remembers the last frames for the next chunk, zeros where there are too few."""
    if not streaming(module):
        return x_BTHWC, False
    before = module.has_variable(COLLECTION, "past")
    past_BTHWC = (module.get_variable(COLLECTION, "past") if before
                  else jnp.zeros_like(x_BTHWC, shape=(len(x_BTHWC), frames, *x_BTHWC.shape[2:])))
    longer_BTHWC = jnp.concatenate([past_BTHWC, x_BTHWC], axis=1)
    module.put_variable(COLLECTION, "past", longer_BTHWC[:, longer_BTHWC.shape[1] - frames:])
    return (longer_BTHWC, True) if before else (x_BTHWC, False)
