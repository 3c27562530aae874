"""Ahead of time: compiles training and sampling for TPUs or GPUs that are not there; do they fit, and scale?"""
