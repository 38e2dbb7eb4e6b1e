"""OpenVINO on CPUs, in bfloat16 where the CPU has it.

Where our C++ kernels are built, attention and group norm with SiLU are theirs, in fp32 and bf16. A model is compiled
anew at every load: an exported blob holds the weights in full and imports no faster than the ONNX file compiles
(`docs/backends.md` has the figures).

Options: attention, norm = ours, vendor (the kernels of OpenVINO's CPU plugin) or auto, the default: ours where they can
be used. Any other option is a property of the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engines.backend import Backend, Layer, Target
from engines.machine.cpu import describe
from engines.openvino import extension, vendor
from engines.openvino.engine import OpenVinoEngine
from engines.openvino.options import Options
from engines.spec import EngineConfig, EngineError


class OpenVino(Backend):
    """OpenVINO as a backend."""

    name = "openvino"

    def available(self) -> str | None:
        try:
            vendor.package()
        except EngineError as e:
            return str(e)
        return None

    def devices(self) -> list[str]:
        return ["cpu"] if "CPU" in vendor.package().Core().available_devices else []

    def dtypes(self) -> tuple[str, ...]:
        has = vendor.package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return tuple(dtype for dtype in ("bf16", "fp32", "fp16") if dtype.upper() in has)

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        ours = {"kernels": extension.fingerprint()} if config is not None and Options.read(config).ours else {}
        return {"openvino": vendor.package().get_version(), **ours, **describe()}

    def build(self, target: Target, directory: Path) -> None:
        """Refuse a device, precision or option that this machine does not have. Nothing is written."""
        if target.config.device != "cpu":
            raise EngineError(f"openvino: got device {target.config.device!r}, expected 'cpu'")
        if target.config.dtype not in self.dtypes():
            raise EngineError(f"openvino: got dtype {target.config.dtype}, but {describe()['cpu']} computes in "
                              f"{', '.join(self.dtypes())}; pass --dtype fp32")
        Options.read(target.config)

    def load(self, target: Target, directory: Path) -> OpenVinoEngine:
        """Compile the graph for the config's static shapes. Raises EngineError where OpenVINO cannot."""
        return OpenVinoEngine(target)

    def layers(self, target: Target, directory: Path, feed: Mapping[str, np.ndarray], calls: int) -> list[Layer]:
        """See `engines.backend.Backend`. Nodes that the plugin has folded into others or need not run are left out."""
        engine = OpenVinoEngine(target, counters=True)
        engine.bind({**feed, **{name: spec.empty() for name, spec in engine.outputs.items()}})
        runs = []
        for _ in range(calls + 1):
            engine.enqueue()
            runs.append({node.node_name: node for node in engine.counters()})
        nodes = {name: node for run in runs for name, node in run.items()}  # a run leaves out those of no microsecond
        seconds = {name: [run[name].real_time.total_seconds() if name in run else 0.0 for run in runs[1:]]
                   for name in nodes}
        return [_layer(name, node.node_type, node.exec_type, float(np.median(seconds[name])) if calls else None)
                for name, node in nodes.items()]


OPENVINO = OpenVino()


def _layer(name: str, kind: str, implementation: str, seconds: float | None) -> Layer:
    """Return a node of the plugin; `implementation`: such as "brgconv_avx512_amx_bf16", or "ref_bf16" of our nodes."""
    kernel, _, precision = implementation.rpartition("_")
    ours = next((op for op in extension.OPS.values() if kind == "Reference" and name.startswith(f"{op}_")), None)
    return Layer(name, ours or kind, "ours" if ours else kernel, precision, seconds)
