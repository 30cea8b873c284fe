"""The world's clips as examples of its dataset, drawn by as many processes as there are cores.

Drawing is Python, of which one process runs on one core. Child k of n draws every n-th clip from
the k-th on and writes it to its standard output: so clips come in their order whatever the speed of
the children, and no more are drawn ahead than a pipe holds.
"""

import contextlib
import os
import pickle
import signal
import sys

from sora_jax.core.child import start
from sora_jax.data.encode import encode_video
from sora_jax.data.moving_shapes.world import ShapesSpec, generate
from sora_jax.data.records import make_example

CODEC = "qtrle"
MAX_CHILDREN = 16
CLIPS_FOR_A_CHILD = 256  # fewer are drawn sooner than it starts


def examples(seed: int, spec: ShapesSpec, indices: range, num_children: int | None = None):
    """(key, example) of each clip, in order; the record's metadata is the clip's state.

    num_children: processes that draw; None: one for each core where there are clips enough; below
    2 it is this one. Raises RuntimeError where one of them dies.
    """
    if num_children is None:
        num_children = min(os.cpu_count(), MAX_CHILDREN, len(indices) // CLIPS_FOR_A_CHILD)
    if num_children < 2:
        return _drawn(seed, spec, indices)
    return _drawn_by_children(seed, spec, indices, num_children)


def _drawn(seed, spec, indices):
    for index in indices:
        clip = generate(seed, index, spec)
        num_frames, height, width, _ = clip.pixels_THWC.shape
        name = f"{spec.split}-{index:06d}"
        yield name, make_example(
            name, encode_video(clip.pixels_THWC, clip.fps, CODEC),
            (clip.short_caption, clip.long_caption), clip.state,
            num_frames=num_frames, height=height, width=width, fps=clip.fps,
        )


def _drawn_by_children(seed, spec, indices, num_children):
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_child(seed, spec, indices[k::num_children]))
                    for k in range(num_children)]
        for number in range(len(indices)):
            child = children[number % num_children]
            try:
                yield pickle.load(child.stdout)
            except (EOFError, pickle.UnpicklingError):  # nothing, or half a clip
                raise RuntimeError(f"a process that draws clips ended with exit status "
                                   f"{child.wait()}; its own message is above") from None


@contextlib.contextmanager
def _child(seed, spec, indices):
    child = start("sora_jax.data.moving_shapes.examples")
    try:
        with child.stdin:
            pickle.dump((seed, spec, indices), child.stdin)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _serve():
    """What a child does. Ctrl-C is for its parent, and ends it by its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):  # nobody wants more
        for example in _drawn(*pickle.load(sys.stdin.buffer)):
            pickle.dump(example, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
