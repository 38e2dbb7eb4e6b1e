"""UNet steps: our engines beside diffusers and OpenVINO's own runtime, same weights and shape, in turn, in one run.

Every contender lives in a process of its own and sleeps while another is timed. One step is one call with guidance: two
rows. Seconds are medians over the rounds; the error is RMS against diffusers in fp32 on the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import measure
from engines import Bundle, EngineError

Call = Callable[[], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="bundle exported from CHECKPOINT")
    parser.add_argument("checkpoint", help="diffusers folder with the same weights")
    parser.add_argument("--size", default="512x512", metavar="HxW", help="pixels (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contender (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), metavar="NAME",
                        help=f"some of: {', '.join(CONTENDERS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures with machine and versions")


def run(args: argparse.Namespace) -> int:
    names = list(dict.fromkeys([*(args.only or CONTENDERS), REFERENCE]))
    workers = {name: _Worker(name, args) for name in tqdm(names, desc="load", disable=None)}
    try:
        outputs = {name: worker.call()[1] for name, worker in tqdm(workers.items(), desc="warm-up", disable=None)}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
            for name, worker in workers.items():
                seconds[name].append(worker.call()[0])
    finally:
        for worker in workers.values():
            worker.close()
    reference = outputs[REFERENCE]
    results = {name: {**measure.spread(seconds[name]), "load_seconds": workers[name].load_seconds,
                      "rel_rms": float(np.sqrt(np.mean((outputs[name] - reference) ** 2) / np.mean(reference**2)))}
               for name in names}
    base = results[REFERENCE]["median"]
    print(measure.table([{"contender": name, "s/step": f"{r['median']:.3f}", "p20": f"{r['p20']:.3f}",
                          "p80": f"{r['p80']:.3f}", "speed": f"{base / r['median']:.2f} x",
                          "error": f"{r['rel_rms']:.1e}", "load s": f"{r['load_seconds']:.1f}"}
                         for name, r in results.items()]))
    if args.json:
        measure.write_json(args.json, {"machine": measure.machine(), "size": args.size, "rows": 2, "results": results})
    return 0


class _Worker:
    """A contender in its own process: loads on creation, then runs one call whenever asked."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, args.bundle, args.checkpoint, args.size),
                                        daemon=True)
        self._process.start()
        self.name = name
        self.load_seconds: float = self._receive()

    def call(self) -> tuple[float, np.ndarray]:
        """Seconds of one call, and its output."""
        self._pipe.send("call")
        return self._receive()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=10)
        self._process.terminate()

    def _receive(self) -> Any:
        try:
            message = self._pipe.recv()
        except EOFError as e:
            raise EngineError(f"{self.name}: its process ended without an answer (out of memory?)") from e
        if isinstance(message, str):
            raise EngineError(f"{self.name}: {message}")
        return message


def _serve(pipe: Connection, name: str, bundle: str, checkpoint: str, size: str) -> None:
    try:
        height, width = (int(side) // 8 for side in size.split("x"))
        inputs = _inputs(Bundle.open(bundle), height, width)
        start = time.perf_counter()
        call = CONTENDERS[name](bundle, checkpoint, inputs)
        pipe.send(time.perf_counter() - start)
        while pipe.recv():
            start = time.perf_counter()
            output = call()
            pipe.send((time.perf_counter() - start, np.array(output, np.float32)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as e:
        traceback.print_exc()
        pipe.send(f"{type(e).__name__}: {e}")


def _inputs(bundle: Bundle, height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    specs = {s.name: s for s in bundle.component("unet").inputs}
    dims = {"batch": 2, "latent_height": height, "latent_width": width, "sequence": bundle.manifest.text[0].max_length}
    arrays = {name: rng.standard_normal(spec.resolve(dims).empty().shape).astype(np.float32)
              for name, spec in specs.items()}
    arrays["timestep"][:] = 601.0
    return arrays


def _ours(backend: str, dtype: str) -> Callable[..., Call]:
    def make(bundle: str, checkpoint: str, inputs: dict[str, np.ndarray]) -> Call:
        import engines
        from runtime.buffers import BoundEngine

        opened = Bundle.open(bundle)
        factor = opened.manifest.latent.factor
        height, width = inputs["sample"].shape[2:]
        config = opened.config("unet", backend=backend, dtype=dtype, batch=2, height=height * factor,
                               width=width * factor)
        engine = BoundEngine(engines.load(opened, "unet", config))
        return lambda: engine(**inputs)["noise_pred"]
    return make


def _openvino(precision: str) -> Callable[..., Call]:
    """OpenVINO's own runtime on the bundle's graph, as its documentation shows: read, reshape, compile, infer."""
    def make(bundle: str, checkpoint: str, inputs: dict[str, np.ndarray]) -> Call:
        import openvino

        opened = Bundle.open(bundle)
        core = openvino.Core()
        model = core.read_model(opened.path / opened.component("unet").file)
        model.reshape({name: list(array.shape) for name, array in inputs.items()})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision,
                                                     "PERFORMANCE_HINT": "LATENCY"})
        return lambda: compiled(inputs)[0]
    return make


def _diffusers(dtype: str) -> Callable[..., Call]:
    def make(bundle: str, checkpoint: str, inputs: dict[str, np.ndarray]) -> Call:
        import torch
        from diffusers import UNet2DConditionModel

        kind = getattr(torch, dtype)
        unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", dtype=kind).eval()
        if kind != torch.float32:
            unet = unet.to(memory_format=torch.channels_last)
        sample, timestep, text = (torch.from_numpy(inputs[name]) for name in
                                  ("sample", "timestep", "encoder_hidden_states"))

        @torch.inference_mode()
        def call() -> np.ndarray:
            return unet(sample.to(kind), timestep, text.to(kind), return_dict=False)[0].float().numpy()
        return call
    return make


REFERENCE = "diffusers-fp32"
CONTENDERS: dict[str, Callable[..., Call]] = {
    "latentrt-openvino-bf16": _ours("openvino", "bf16"),
    "latentrt-openvino-fp32": _ours("openvino", "fp32"),
    "latentrt-onnxruntime-fp32": _ours("onnxruntime", "fp32"),
    "openvino-bf16": _openvino("bf16"),
    "diffusers-bf16": _diffusers("bfloat16"),
    REFERENCE: _diffusers("float32"),
}
