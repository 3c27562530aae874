"""Ahead-of-time compilation of training and sampling for TPUs or GPUs that need not be present."""
