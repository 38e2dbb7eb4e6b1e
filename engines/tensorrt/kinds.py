"""The kinds of sites that can be nodes of our own in a TensorRT engine."""

KINDS = {"attention": "Attention", "norm": "GroupNormalization"}
"""Kind of site → the operator that is one."""
