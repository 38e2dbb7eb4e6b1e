"""Measurements: speed of kernels, UNet and pipeline, and the quality of the pictures."""
