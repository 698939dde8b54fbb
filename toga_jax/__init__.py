"""Joint pruning and mixed-precision quantization of language models in JAX."""

__version__ = '0.1.0'
