"""Contenders on an NVIDIA GPU, timed by its own clock. None of this has run on a GPU yet.

A turn is a burst of calls that follow one another on one stream, as the steps of a picture do, after others that bring
the clocks up and do not count; its figure is the time of one. So where the host cannot launch as fast as the GPU runs,
that shows. Inputs are in the GPU's memory before, and outputs stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import engines
from benchmarks.harness import limits
from benchmarks.harness.given import configure_compiler, engines_of, inputs, torch_module
from benchmarks.harness.on_cpu import REFERENCE
from benchmarks.harness.turns import Contender, Job, Run, Timed
from engines import Bundle, EngineConfig, store

TURN = 0.5  # seconds of calls that count in a turn
WARM = 0.2  # and of those before


class Clock:
    """The GPU of this process, on a stream of its own. Made first: it counts the memory that is taken after."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: got no GPU from torch, expected a CUDA build of it and a GPU")
        self._torch = torch
        self.stream = torch.cuda.Stream()
        self._free: Callable[[], int] = lambda: torch.cuda.mem_get_info()[0]  # the GPU's; one process works at a time
        self._before = self._free()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work of torch in this block goes to the stream, without gradients."""
        with self._torch.inference_mode(), self._torch.cuda.stream(self.stream):
            yield

    def run(self, call: Callable[[], Any], output: Callable[[], np.ndarray]) -> Run:
        """A Run that times `call`, which launches one call of the work on the stream; output: what it wrote."""
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds(calls: int) -> float:
            begin.record(self.stream)
            for _ in range(calls):
                call()
            end.record(self.stream)
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / calls

        with self():
            seconds(2)
            one = seconds(3)
            results = [output()]
        taken = self._before - self._free()

        def turn() -> Timed:
            nonlocal taken
            before = self._free()
            with self():
                seconds(math.ceil(WARM / one))
                mean = seconds(math.ceil(TURN / one))
            taken += before - self._free()
            return Timed(mean, results.pop() if results else None, taken)
        return turn

    def captured(self, call: Callable[[], Any]) -> Callable[[], None]:
        """`call`, which has run before, as a CUDA graph."""
        graph = self._torch.cuda.CUDAGraph()
        self.stream.synchronize()
        with self._torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            call()
        return graph.replay


def ours(backend: str, dtype: str, graph: bool, job: Job) -> Run:
    """One of our engines, bound to torch's tensors; graph: captured and replayed, as the runtime does."""
    clock = Clock()
    import torch

    bundle, feed = Bundle.open(job.bundle), inputs(job)
    with clock():
        tensors = {name: torch.from_numpy(array).cuda() for name, array in feed.items()}
        for name, config in engines_of(job, bundle, backend, dtype, device="cuda:0").items():
            if job.fresh:
                store.build(bundle, name, config, rebuild=True)
            engine = store.load(bundle, name, config)
            tensors |= {name: torch.zeros([int(d) for d in spec.shape], dtype=getattr(torch, spec.dtype), device="cuda")
                        for name, spec in engine.outputs.items()}
            clock.stream.synchronize()
            engine.bind({name: tensors[name] for name in (*engine.inputs, *engine.outputs)})
            enqueue = partial(engine.enqueue, clock.stream.cuda_stream)
            enqueue()
        call = clock.captured(enqueue) if graph else enqueue
    output, = engine.outputs
    return clock.run(call, lambda: tensors[output].cpu().numpy())


def diffusers(dtype: str, how: str, job: Job) -> Run:
    """diffusers' own module. how: "" is eager, "graph" the same in a CUDA graph, "compile" torch.compile in its mode
    max-autotune, which makes CUDA graphs itself.
    """
    configure_compiler(job)
    import torch

    clock = Clock()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # of fp32, which is the reference

    def compiler(function: Any) -> Any:
        if how != "compile":
            return function
        return torch.compile(function, mode="max-autotune", fullgraph=True, dynamic=False)

    kept: list[Any] = []

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # the result before may be overwritten
        kept[:] = [module()]

    module = torch_module(job, dtype, "cuda", compiler)
    with clock():
        for _ in range(3):  # cuDNN chooses, torch.compile compiles, then records its graph
            call()
        run = clock.captured(call) if how == "graph" else call
    return clock.run(run, lambda: kept[0].float().cpu().numpy())


def onnxruntime(dtype: str, job: Job) -> Run:
    """ONNX Runtime's CUDA provider on the bundle's graph, in a CUDA graph of its own, inputs and outputs bound."""
    clock = Clock()
    import onnxruntime as ort
    import torch

    bundle, feed = Bundle.open(job.bundle), inputs(job)
    component = bundle.component(job.component)
    config = engines_of(job, bundle, "onnxruntime", dtype, whole=True)[job.component]
    options = ort.SessionOptions()
    for name, value in config.dims.items():
        options.add_free_dimension_override_by_name(name, value)
    with clock():
        tensors = {name: torch.from_numpy(array).cuda() for name, array in feed.items()}
        tensors |= {spec.name: torch.zeros(_shape(spec.shape, config), device="cuda") for spec in component.outputs}
        clock.stream.synchronize()
    session = ort.InferenceSession(bundle.path / component.file, options, providers=[
        ("CUDAExecutionProvider", {"device_id": "0", "enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE",
                                   "user_compute_stream": str(clock.stream.cuda_stream)})])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise ValueError("got no CUDAExecutionProvider, expected onnxruntime-gpu; run: pip install onnxruntime-gpu")
    binding = session.io_binding()
    for specs, bind in ((component.inputs, binding.bind_input), (component.outputs, binding.bind_output)):
        for spec in specs:
            bind(spec.name, "cuda", 0, np.float32, _shape(spec.shape, config), tensors[spec.name].data_ptr())
    settings = ort.RunOptions()
    settings.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the events do
    output, = (spec.name for spec in component.outputs)
    return clock.run(lambda: session.run_with_iobinding(binding, settings), lambda: tensors[output].cpu().numpy())


def _shape(shape: tuple[int | str, ...], config: EngineConfig) -> list[int]:
    return [d if isinstance(d, int) else config.dims[d] for d in shape]


def _engine(backend: str, dtype: str, graph: bool) -> Contender:
    """Our engine of one backend and precision; graph: whether as a CUDA graph."""
    return Contender(partial(ours, backend, dtype, graph), keeps=True, backend=backend, dtype=dtype)


BACKENDS = tuple(name for name in engines.BACKENDS if name not in ("onnxruntime", "openvino"))
CONTENDERS = {
    REFERENCE: Contender(partial(diffusers, "fp32", "")),
    **{f"diffusers-{how}{dtype}": Contender(partial(diffusers, dtype, how.strip("-")), dtype=dtype)
       for dtype in limits.NARROW for how in ("", "graph-")},
    **{f"onnxruntime-{dtype}": Contender(partial(onnxruntime, dtype), dtype=dtype, graph=dtype)
       for dtype in limits.NARROW},
    **{f"latentrt-{backend}-{eager}{dtype}": _engine(backend, dtype, graph=not eager)
       for dtype in limits.NARROW for backend in BACKENDS for eager in ("", "eager-")},
    **{f"diffusers-compile-{dtype}": Contender(partial(diffusers, dtype, "compile"), keeps=True, dtype=dtype)
       for dtype in limits.NARROW},
}
"""Those that start at once first."""
