"""Settings of the whole suite: no network, and a reason for every GPU test that is skipped."""

import ctypes
import fcntl
import functools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, on tensors this small and beside other work, is slower with more
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a test that needs a download fails at once
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; processes that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPES = Path(__file__).parent.parent / "models" / "shapes"


@functools.cache
def why_no_gpu() -> str | None:
    """None where the CUDA driver has a device, else the reason. Asks the driver itself, so torch stays unloaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs an NVIDIA GPU: no driver here (libcuda.so.1)"
    if status := driver.cuInit(0):
        return f"needs an NVIDIA GPU: the driver does not start (cuInit gives {status})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value else "needs an NVIDIA GPU: the driver sees none"


if why_no_gpu():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and whenever a kernel is decorated


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


class Lazy(dict[str, Path]):
    """A mapping whose values are made at their first use."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Path:
        self[name] = self._make(name)
        return self[name]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A directory of this run of pytest, and the same for all of its workers, if it has several (pytest-xdist)."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if hasattr(pytestconfig, "workerinput") else base) / "shared"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def once(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): a copy of the directory that `make(path)` writes, which it does once in a run of pytest.

    The copy is the worker's own: what tests add to it, as engines to a bundle, is no concern of other workers.
    """
    def get(name: str, make: Callable[[Path], object]) -> Path:
        made, unfinished = shared / name, shared / f"{name}.unfinished"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker that asks for it meanwhile waits here
            if not made.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                os.rename(unfinished, made)
        return shutil.copytree(made, tmp_path_factory.mktemp("once") / name)

    return get


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Lazy:
    """Tiny random checkpoints by the name of their builder in models/tiny.py, and the model that ships as "shapes"."""
    from models import tiny

    def make(name: str) -> Path:
        return SHAPES if name == "shapes" else getattr(tiny, name)(tmp_path_factory.mktemp("checkpoints") / name)

    return Lazy(make)


@pytest.fixture(scope="session")
def bundles(checkpoints: Lazy, once: Callable[[str, Callable[[Path], object]], Path]) -> Lazy:
    """fp32 bundles of `checkpoints`. One more costs half a minute: a test that can do with another's asks for that."""
    from export import export

    return Lazy(lambda name: once(name, lambda path: export(checkpoints[name], path, progress=False)))


@pytest.fixture(scope="session")
def edge_net(checkpoints: Lazy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for the checkpoint "sd1"."""
    from models import tiny

    return tiny.control(tmp_path_factory.mktemp("control") / "edge net", checkpoints["sd1"])


@pytest.fixture(scope="session")
def controlled(bundles: Lazy, edge_net: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The bundle "sd1" with `edge_net`."""
    from export.attach import attach

    def make(path: Path) -> None:
        shutil.copytree(bundles["sd1"], path, ignore=shutil.ignore_patterns("engines"))
        attach(edge_net, path, progress=False)

    return once("controlled", make)


@pytest.fixture(scope="session")
def kernel_cache(shared: Path) -> Path:
    """For XDG_CACHE_HOME: kernels that several tests build are compiled once."""
    return shared / "kernel-cache"
