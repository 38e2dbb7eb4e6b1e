"""The runtime's GPU side without a GPU: cuda.core on a stand-in for the driver, kernels in numpy.

    python -m tests.tools.emulated DRIVER KERNELS    with DRIVER as libcuda.so.1, by tests/runtime/devices/

What is real: `runtime.devices.cuda.Cuda`, slots, graphs, `kernels.launch`, artefacts, cuda.core. What is not: the GPU,
so nothing is asynchronous, and the kernels, whose arguments are read as the GPU would and given to `kernels.host.ops`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines import Engine, EngineError, TensorSpec
from engines.onnx.low_rank import Weight
from kernels.aot.artefact import artefacts
from kernels.host import ops
from kernels.host.step_table import width
from runtime.devices.bound import BoundEngine
from runtime.devices.cuda import Cuda
from runtime.loop.job import Place
from runtime.loop.loop import Loop
from runtime.loop.slots import Capacity
from runtime.networks.first_stage import PictureDecoder
from tests.cases.devices import Wave, Waves, expected, job, mixed, run
from tests.tolerances import SCHEDULER_REL

LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.POINTER(ctypes.c_void_p))
GRAPH = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_ssize_t)
CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Gpu:
    """Runs what is launched, or keeps it while a graph is captured, and runs that whenever the graph is launched."""

    def __init__(self, driver: ctypes.CDLL, kernels: Path) -> None:
        self.arguments = {a.entry: a.arguments for a in artefacts(kernels)}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing = 0
        self.memory = 0
        self._callbacks = LAUNCH(self._checked(self._launch)), GRAPH(self._checked(self._graph))
        driver.fake_driver_calls(*self._callbacks)

    def do(self, work: Callable[[], None]) -> None:
        self.graphs[self.capturing].append(work) if self.capturing else work()

    def _launch(self, entry: bytes, x: int, y: int, z: int, pointers: Any) -> None:
        given = {}
        for i, (name, kind) in enumerate(self.arguments[entry.decode()]):
            ctype: Any = ctypes.c_uint64 if kind.startswith("*") else CTYPES[kind]
            given[name] = ctypes.cast(pointers[i], ctypes.POINTER(ctype))[0]
        self.do(lambda: getattr(self, entry.decode())(given, (x, y, z)))

    def _graph(self, what: int, graph: int) -> None:
        if what == 0:
            self.graphs[graph] = []
        self.capturing = graph if what == 0 else 0
        if what == 2:
            for work in self.graphs[graph]:
                work()

    def _step_input(self, a: Mapping[str, int], grid: tuple[int, int, int]) -> None:
        images, n, batch = grid[1], a["n"], a["first"] + grid[1]
        columns = array(a["columns_ptr"], (grid[2] - 1, 3), np.int32)
        numbers = max(int(offset + batch * width) for _, offset, width in columns)
        ops.step_input(
            array(a["state_ptr"], (images, a["states"], n)), array(a["table_ptr"], (images, a["rows"], a["width"])),
            array(a["progress_ptr"], (images, 3), np.int32), array(a["times_ptr"], (images, a["rows"], a["total"])),
            columns, array(a["sample_ptr"], (batch, n)), array(a["arena_ptr"], (numbers,)))

    def _accumulate(self, a: Mapping[str, int], grid: tuple[int, int, int]) -> None:
        ops.accumulate(array(a["x_ptr"], (a["n"],)), array(a["keep_ptr"], (1,), np.int32),
                        array(a["out_ptr"], (a["n"],)))

    def _guidance_step(self, a: Mapping[str, int], grid: tuple[int, int, int]) -> None:
        images, n, batch, states = grid[1], a["n"], a["first"] + grid[1], 1 + self.memory
        sample, timestep = array(a["sample_ptr"], (batch, n)), array(a["timestep_ptr"], (batch,))
        ops.guidance_step(
            array(a["noise_pred_ptr"], (batch, n)), array(a["noise_ptr"], (images, a["draws"], n)),
            array(a["table_ptr"], (images, a["rows"], width(self.memory))), array(a["controls_ptr"], (images, 3)),
            array(a["known_ptr"], (images, 3, n)), array(a["state_ptr"], (images, states, n)), sample, timestep,
            array(a["progress_ptr"], (images, 3), np.int32))

    def _planes(self, a: Mapping[str, int], grid: tuple[int, int, int]) -> None:
        images, pixels = grid[1], a["pixels"]
        ops.to_image(array(a["x_ptr"], (images, 3, 1, pixels)), array(a["out_ptr"], (images, 1, pixels, 3), np.uint8))

    @staticmethod
    def _checked(function: Callable[..., None]) -> Callable[..., None]:
        """An exception cannot pass through C: show it and end."""
        def call(*arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        return call


class GpuWave(Wave):
    """The UNet of the tests on memory that only its address is known of, as an engine of a GPU has it."""

    def __init__(self, rows: int, gpu: Gpu) -> None:
        super().__init__(rows)
        self._gpu = gpu

    def bind(self, buffers: Mapping[str, Any]) -> None:
        assert all(int(b) % 256 == 0 for b in buffers.values())
        faces = {name: b.__cuda_array_interface__ for name, b in buffers.items()}
        super().bind({name: array(f["data"][0], f["shape"], np.dtype(f["typestr"])) for name, f in faces.items()})

    def enqueue(self, stream: Any = None) -> None:
        assert int(stream.handle)
        self._gpu.do(lambda: Wave.enqueue(self))


class Picture(Engine):
    """A decoder: image = the first three channels of the latents, as they are."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.inputs = {"latents": TensorSpec("latents", "float32", (1, 4, 16, 12))}
        self.outputs = {"image": TensorSpec("image", "float32", (1, 3, 16, 12))}

    def bind(self, buffers: Mapping[str, Any]) -> None:
        self._arrays = {name: array(int(b), b.shape) for name, b in buffers.items()}

    def enqueue(self, stream: Any = None) -> None:
        self._gpu.do(lambda: np.copyto(self._arrays["image"], self._arrays["latents"][:, :3]))

    def refit(self, weights: Mapping[str, Weight]) -> None:
        raise EngineError("refit: got weights, expected none: this engine has none")


class Shares(Wave):
    """An engine that can share its working memory."""

    def __init__(self, size: int) -> None:
        super().__init__(1)
        self.workspace_bytes = size

    def use_workspace(self, buffer: int) -> None:
        self.address = buffer


def array(address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Memory at an address that the kernels may take, as numpy."""
    assert address % 16 == 0
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


def waves(device: Cuda, gpu: Gpu) -> Callable[..., BoundEngine]:
    bound: dict[int, BoundEngine] = {}
    return lambda rows, variant="": bound.setdefault(rows, bound.get(rows) or BoundEngine(GpuWave(rows, gpu), device))


def jobs_end_where_each_ends_alone(gpu: Gpu, kernels: Path) -> None:
    found = []
    for eager in (True, False):
        device = Cuda(0, kernels, eager=eager)
        for count in (1, 3):
            jobs, alone = mixed(), mixed()
            capacity = Capacity.of(jobs)
            gpu.memory = capacity.memory
            before = len(gpu.graphs)
            run(Loop(Waves(device, unet=waves(device, gpu)), count), jobs)
            for done, single in zip(jobs, alone, strict=True):
                truth = expected(single)
                assert np.abs(done.latents - truth).max() / np.abs(truth).max() < SCHEDULER_REL, (eager, count)
            assert (len(gpu.graphs) - before) in ((0,) if eager else (1, 2)), "one for each batch that came twice"
            found.append(np.stack([done.latents for done in jobs]))
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3]), "graphs give other bits"


def a_refit_reaches_what_was_captured(gpu: Gpu, kernels: Path) -> None:
    device = Cuda(0, kernels)
    engines = Waves(device, unet=waves(device, gpu))
    loop, gpu.memory = Loop(engines, 1), Capacity.of([job(0)]).memory
    run(loop, [job(0)])
    before = len(gpu.graphs)
    engines.denoiser(Place(), 2, "").refit({"gain": np.array(0.5, np.float32)})
    got, asked = job(0, seed=3), job(0, seed=3)
    run(loop, [got])
    asked.fixed["text"][:, 1, 2] *= 0.5
    np.testing.assert_allclose(got.latents, expected(asked), rtol=0, atol=1e-4)
    assert len(gpu.graphs) == before + 1


def pictures_are_those_of_numpy(gpu: Gpu, kernels: Path) -> None:
    decode = PictureDecoder(BoundEngine(Picture(gpu), Cuda(0, kernels)))
    for seed in range(3):
        latents = np.random.default_rng(seed).standard_normal((1, 4, 16, 12)).astype(np.float32)
        picture = np.empty((1, 16, 12, 3), np.uint8)
        ops.to_image(latents[:, :3], picture)
        assert np.array_equal(decode(latents), picture)


def memory_goes_there_and_back(gpu: Gpu, kernels: Path) -> None:
    device = Cuda(0, kernels)
    memory, values = device.zeros((5, 3, 7), np.float32), np.random.default_rng(0).standard_normal((5, 3, 7))
    assert not device.download(memory)().any()
    device.upload(memory, values)
    waiting = device.download(memory[2:4])
    device.upload(memory[3], np.zeros((3, 7)))
    assert np.array_equal(waiting(), values[2:4].astype(np.float32)) and not device.download(memory)()[3].any()
    large = device.zeros((3 << 20,), np.float32)
    device.upload(large, np.arange(3 << 20))
    assert np.array_equal(device.download(large)(), np.arange(3 << 20, dtype=np.float32))
    sharing = [Shares(size) for size in (1000, 500, 1 << 20, 2000)]
    for engine in sharing:
        device.adopt(engine)
    assert len({engine.address for engine in sharing}) == 1 and sharing[0].address % 256 == 0


if __name__ == "__main__":
    kernels = Path(sys.argv[2])
    emulated = Gpu(ctypes.CDLL(sys.argv[1]), kernels)
    for test in (jobs_end_where_each_ends_alone, a_refit_reaches_what_was_captured, pictures_are_those_of_numpy,
                 memory_goes_there_and_back):
        test(emulated, kernels)
        print(test.__name__)
