"""latentrt's runtime: prompts to pictures from a bundle's engines, without torch or diffusers."""

from engines import EngineError
from runtime.pipeline import Pipeline
from runtime.request.control import Control
from runtime.request.lora import Lora
from runtime.request.request import Request, Step
from runtime.request.result import Result

__all__ = ["Control", "EngineError", "Lora", "Pipeline", "Request", "Result", "Step"]
