"""The distance from the reference that an engine may have."""

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "fp8": 1e-1}
"""Precision that an engine computes in → largest RMS of the difference over RMS of the reference.

"fp8" stands for an engine of any dtype with linear layers in float8, which says so in its `precision`.
"""
