"""Import of public checkpoints as run directories; see `python -m dalle_jax.convert --help`."""
