"""Engines: what compiles one component of a bundle for static shapes, and the cache of what was compiled."""

from engines.backend import BACKENDS, Backend, Engine, Layer, Target, backend
from engines.bundle import Bundle
from engines.spec import EngineConfig, EngineError, TensorSpec

__all__ = ["BACKENDS", "Backend", "Bundle", "Engine", "EngineConfig", "EngineError", "Layer", "Target",
           "TensorSpec", "backend"]
