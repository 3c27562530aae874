"""State, sharding, optimiser, checkpoints and the loop; knows no model."""
