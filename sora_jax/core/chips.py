"""What accelerators can do, from their makers' pages; used to plan a run without one."""

import dataclasses

from sora_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip (the unit of its maker), dense rates, no sparsity.

    link_bytes: per second over all its links to other chips, both directions together; that is
    inside a TPU slice or an NVLink domain, not between them. devices: that JAX sees of one chip.
    capability: compute capability of an NVIDIA GPU; 0: a TPU.
    """

    name: str
    hbm_bytes: float
    bf16_flops: float  # per second
    hbm_bandwidth: float  # bytes per second
    link_bytes: float
    devices: int = 1
    capability: float = 0.0

    def per_device(self) -> "Chip":
        """The share of one JAX device."""
        return Chip(f"{self.name} device", *(
            value / self.devices for value in (
                self.hbm_bytes, self.bf16_flops, self.hbm_bandwidth, self.link_bytes)))


_GIB = 2.0**30
_TPU = (
    # cloud.google.com/tpu/docs/v5e: 16 GB, 197 TFLOPs, 819 GBps, ICI 1600 Gbps each way
    Chip("v5e", 16 * _GIB, 197e12, 819e9, 400e9),
    # cloud.google.com/tpu/docs/v5p: 95 GB, 459 TFLOPs, 2765 GBps, ICI 4800 Gbps each way
    Chip("v5p", 95 * _GIB, 459e12, 2765e9, 1200e9),
    # cloud.google.com/tpu/docs/v6e: 32 GB, 918 TFLOPs, 1600 GBps, ICI 800 GBps both ways
    Chip("v6e", 32 * _GIB, 918e12, 1600e9, 800e9),
    # cloud.google.com/tpu/docs/tpu7x: 192 GiB, 2307 TFLOPs, 7380 GBps, ICI 1200 GBps both ways;
    # JAX sees each of the two TensorCores of a chip as a device with half of its memory.
    Chip("tpu7x", 192 * _GIB, 2307e12, 7380e9, 1200e9, devices=2),
)
# NVIDIA counts a GB of GPU memory as 10**9 bytes of what is sold; all are the SXM versions, and the
# data sheets' rates "with sparsity" are halved.
_GPU = (
    # nvidia.com/en-us/data-center/a100 (80GB SXM): 80 GB, 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s
    Chip("A100", 80e9, 312e12, 2039e9, 600e9, capability=8.0),
    # nvidia.com/en-us/data-center/h100 (SXM): 80 GB, 1979 TFLOPS sparse, 3.35 TB/s, 900 GB/s
    Chip("H100", 80e9, 989.5e12, 3350e9, 900e9, capability=9.0),
    # nvidia.com/en-us/data-center/h200 (SXM): 141 GB, 1979 TFLOPS sparse, 4.8 TB/s, 900 GB/s
    Chip("H200", 141e9, 989.5e12, 4800e9, 900e9, capability=9.0),
    # nvidia.com/en-us/data-center/hgx (HGX B200, of 8): 1.44 TB, 36 PFLOPS sparse, 8 TB/s each,
    # NVLink 1.8 TB/s each
    Chip("B200", 180e9, 2250e12, 8000e9, 1800e9, capability=10.0),
)
CHIPS = {chip.name: chip for chip in (*_TPU, *_GPU)}


def chip(name: str) -> Chip:
    """The chip of that name. Raises UserError where it is unknown."""
    if name not in CHIPS:
        raise UserError(f"mesh.chip = {name!r} is unknown; allowed: {', '.join(CHIPS)}")
    return CHIPS[name]
