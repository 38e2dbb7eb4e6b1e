"""These files measure one component of a model, called again and again: `python -m benchmarks unet` and `vae`."""
