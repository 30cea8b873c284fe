"""What a kernel may ask about the call that it is to serve."""

import dataclasses

from sora_jax.core.shapes import nearest_multiples

MASKED = -1e30  # finite, so that a query without keys gives no NaN


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one use of attention."""

    device: str  # cpu | gpu | tpu
    capability: float  # of an NVIDIA GPU, 9.0 = Hopper; 0 elsewhere
    num_queries: int  # N
    num_keys: int  # M
    head_width: int  # E
    dtype: str  # operands of products
    max_clips: int  # segments are 1..max_clips, each in one run of tokens; 0 = not known
    interpret: bool = False  # accelerator kernels run in Pallas' interpreter

    def device_is_not(self, device: str) -> str | None:
        """Why a kernel of `device` cannot run; None where it can."""
        if self.interpret or self.device == device:
            return None
        return f"it runs on a {device}, this is a {self.device}"

    def not_multiples(self, queries: int, keys: int) -> str | None:
        """Why the lengths do not suit blocks of these sizes; None where they do."""
        for what, length, step in (("queries", self.num_queries, queries),
                                   ("keys", self.num_keys, keys)):
            if length % step:
                near = " and ".join(map(str, nearest_multiples(length, step)))
                return (f"the number of {what} must be a multiple of {step}, it is {length}; "
                        f"near are {near}")
        return None
