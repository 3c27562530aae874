"""Trained runs as objects that a user calls."""
