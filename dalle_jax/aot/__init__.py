"""Ahead of time: compiles training and sampling for a TPU that is not there, and says whether they fit and scale."""
