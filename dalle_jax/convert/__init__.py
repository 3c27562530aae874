"""Public checkpoints as runs of this project: python -m dalle_jax.convert --help."""
