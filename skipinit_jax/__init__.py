"""Very deep residual networks, with and without normalization, in JAX and Flax."""
