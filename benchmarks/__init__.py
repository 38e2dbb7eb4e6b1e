"""Measurements: tasks and quality of pictures, speed of kernels, UNet, VAE and pipeline. One command a file.

Here are the commands and `cases`, the shapes of kernels; harness/ is what commands share.
"""
