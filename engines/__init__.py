"""Engines: the backends that compile one component of a bundle for static shapes, and their cache."""

from engines.backend import BACKENDS, Backend, Engine, Layer, Target, backend
from engines.bundle import Bundle
from engines.spec import EngineConfig, EngineError, TensorSpec

TIME_ROWS = 32
"""Timesteps that an engine of unet_time takes at once."""

__all__ = ["BACKENDS", "TIME_ROWS", "Backend", "Bundle", "Engine", "EngineConfig", "EngineError", "Layer", "Target",
           "TensorSpec", "backend"]
