"""A training stack for Sora-like text-to-video models in JAX."""

__version__ = "0.1.0"
