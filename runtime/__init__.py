"""latentrt's runtime: prompts to pictures from a bundle's engines, without torch or diffusers."""

from engines import EngineError
from runtime.pipeline import Pipeline, Result
from runtime.request import Request, Step

__all__ = ["EngineError", "Pipeline", "Request", "Result", "Step"]
