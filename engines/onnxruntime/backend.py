"""ONNX Runtime, the portable default and, in float32 on a CPU, the numerical reference of every other backend.

Sessions are made from the bundle's own ONNX file. An optimised copy of a 3.4 GB UNet opens in 3 s instead of 7 to 13 s
on two cores, but costs another 3.4 GB for every shape, so none is kept (`docs/engines.md` has the figures).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.backend import Backend, Engine, Layer, Target
from engines.machine.cpu import describe
from engines.onnxruntime.engine import WIDENED, OnnxRuntimeEngine
from engines.onnxruntime.options import PROVIDERS, provider, vendor
from engines.spec import EngineConfig, EngineError


class OnnxRuntime(Backend):
    """ONNX Runtime as a backend."""

    name = "onnxruntime"

    def available(self) -> str | None:
        try:
            vendor()
        except EngineError as e:
            return str(e)
        return None

    def devices(self) -> list[str]:
        providers = vendor().get_available_providers()
        return ["cpu", *(["cuda:0"] if PROVIDERS["cuda"] in providers else [])]

    def dtypes(self) -> tuple[str, ...]:
        return ("fp16", "fp32", "bf16") if "cuda:0" in self.devices() else ("fp32",)

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        ort = vendor()
        version = {"onnxruntime": ort.__version__}
        if config is None or config.device == "cpu":
            return {**version, **describe()}
        return {**version, "provider": provider(config)[0], "build": ort.get_build_info(), "gpu": _gpu_name()}

    def build(self, target: Target, directory: Path) -> None:
        """Write the widened graph where a 16-bit component is to compute in float32, else nothing."""
        config, graph = target.config, target.component.dtype
        provider(config)
        on_cpu = config.device == "cpu"
        if config.dtype not in ("fp32", graph) or (on_cpu and config.dtype != "fp32"):
            raise EngineError(
                f"onnxruntime on {config.device}: got dtype {config.dtype} for a {graph} graph, expected fp32"
                f"{'' if on_cpu else ' or that of the graph'}; pass --dtype fp32"
                f"{', or --backend openvino where the CPU computes in 16 bits' if on_cpu else ''}")
        if config.dtype == "fp32" and graph != "fp32":
            from engines.onnx.widen import widen

            widen(target.onnx, directory / WIDENED)

    def load(self, target: Target, directory: Path) -> Engine:
        return OnnxRuntimeEngine(target, directory)

    def layers(self, target: Target, directory: Path, feed: Mapping[str, np.ndarray], calls: int) -> list[Layer]:
        """Return the nodes, on a CPU. The kernel is the provider's, which has one for each type of node."""
        with tempfile.TemporaryDirectory() as profiles:
            engine = OnnxRuntimeEngine(target, directory, Path(profiles) / "call")
            engine.bind({**feed, **{name: spec.empty() for name, spec in engine.outputs.items()}})
            for _ in range(calls + 1):
                engine.enqueue()
            events = json.loads(Path(engine.end_profile()).read_text(encoding="utf8"))
        nodes: dict[tuple[str, str], list[dict[str, Any]]] = {}  # fused nodes share a name
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = (event["name"].removesuffix("_kernel_time"), event["args"]["node_index"])
                nodes.setdefault(name, []).append(event)
        return [Layer(name, runs[0]["args"]["op_name"], runs[0]["args"]["provider"].removesuffix("ExecutionProvider"),
                      ", ".join(kind for out in runs[0]["args"].get("output_type_shape", ())[:1] for kind in out),
                      float(np.median([run["dur"] for run in runs[1:]])) / 1e6 if calls else None)
                for (name, _), runs in nodes.items()]


ONNXRUNTIME = OnnxRuntime()


def _gpu_name() -> str:
    """Return name and driver of the GPUs; ONNX Runtime itself tells neither."""
    files = sorted(Path("/proc/driver/nvidia").glob("gpus/*/information"))
    lines = [line for f in files for line in f.read_text().splitlines() if line.startswith("Model")]
    version = Path("/proc/driver/nvidia/version")
    return "; ".join([*lines, version.read_text().splitlines()[0] if version.is_file() else "no driver found"])
