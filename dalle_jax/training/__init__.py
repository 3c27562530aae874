"""The loop and what it needs; knows no model."""
