"""Algorithms over plain arrays and callables."""
