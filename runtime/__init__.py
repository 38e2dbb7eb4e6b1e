"""latentrt's runtime: prompts to pictures from a bundle's engines, without torch or diffusers."""

from engines import EngineError
from runtime.control import Control
from runtime.lora import Lora
from runtime.pipeline import Pipeline, Result
from runtime.request import Request, Step

__all__ = ["Control", "EngineError", "Lora", "Pipeline", "Request", "Result", "Step"]
