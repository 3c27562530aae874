"""Text-to-image transformers and story generation in JAX and Flax."""

__version__ = '0.1.0'
