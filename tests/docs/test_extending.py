"""The recipes of docs/extending.md, followed: what each says that follows by itself, does.

The recipe of a family is followed by tests/export/families/test_families.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest

import engines
from engines import EngineConfig, EngineError, Target, store
from engines.backend import Backend, Engine
from engines.bundle import hash_file
from kernels.host.step import advance
from runtime.cli.options import add_declared
from runtime.request.checks import whole
from runtime.request.option import option
from runtime.request.request import PICTURE, XL, Request
from runtime.request.task import task_of
from runtime.schedulers import Table, config, make, make_table, names
from runtime.schedulers.config import Settings
from runtime.schedulers.schedule import alphas_cumprod
from runtime.schedulers.table import Row, columns
from tests.tools.kernel_builds import run_python
from tests.tools.manifests import bundle_of
from tests.tools.small import small_bundle


def test_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation, after which the sample is the x0 that it predicts: (x - σ · noise) / α."""
    def jump(settings: Settings, steps: int, start: int) -> Table:
        share, unit = alphas_cumprod(settings)[-1], columns(0)
        alpha, sigma = float(share) ** 0.5, float(1 - share) ** 0.5
        return Table.of([Row(999, (1 / alpha, -sigma / alpha), [unit.p], alpha, sigma)])

    monkeypatch.setitem(config.DEFAULTS, "JumpScheduler", config.DEFAULTS["DDIMScheduler"])
    monkeypatch.setitem(config.SCHEDULERS, "jump", ("JumpScheduler", {}))
    monkeypatch.setitem(make._SOLVERS, "JumpScheduler", jump)
    assert "jump" in names()
    table = make_table({"_class_name": "DDIMScheduler"}, 20, scheduler="jump")
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 8, 8), np.float32)
    state = (table.signal[0] * x0 + table.sigma[0] * noise)[None].astype(np.float32)
    advance(state, noise, None, table, 0)
    assert np.abs(state[0] - x0).max() < 1e-4
    with pytest.raises(ValueError, match=r"expected one of .*jump"):
        make_table({"_class_name": "DDIMScheduler"}, 20, scheduler="none of them")


@dataclasses.dataclass(frozen=True)
class Zoomed(Request):
    """A request with one option more."""

    zoom: int = option(1, whole(1, 8), "how many times the middle is enlarged", flag="--zoom",
                       tasks=("image-to-image",))


def test_a_request_option() -> None:
    """The command line, the check, what is stored, and the refusal of the tasks that do not have it."""
    command = argparse.ArgumentParser()
    add_declared({"": command, PICTURE: command, XL: command}, Zoomed)
    assert command.parse_args(["--zoom", "3"]).zoom == 3
    assert "how many times the middle is enlarged (default 1)" in " ".join(command.format_help().split())
    assert Zoomed("a cat", zoom=3).to_json() == {"prompt": "a cat", "zoom": 3}
    assert Zoomed.from_json({"prompt": "a cat", "zoom": 3}) == Zoomed("a cat", zoom=3)
    with pytest.raises(ValueError, match="zoom: got 9"):
        Zoomed("a cat", zoom=9)
    manifest = bundle_of("sd").manifest
    assert task_of(Zoomed("a cat"), manifest) == "text-to-image"
    with pytest.raises(ValueError, match="zoom: got 3, which text-to-image"):
        task_of(Zoomed("a cat", zoom=3), manifest)
    assert task_of(Zoomed("a cat", zoom=3, image=np.zeros((64, 64, 3), np.uint8)), manifest) == "image-to-image"


def test_a_kernel(tmp_path: Path) -> None:
    """A file of kernels and its name among the ops: the ahead-of-time build compiles it as every other."""
    (tmp_path / "double.py").write_text(textwrap.dedent('''
        import triton
        import triton.language as tl

        from kernels.aot.variant import Variant


        @triton.jit
        def _double_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, 2.0 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


        def variants():
            yield Variant(op="double", name="double_fp32", kernel=_double_kernel,
                          signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, constants={"BLOCK": 256},
                          divisible=("x_ptr", "out_ptr"))
    '''))
    printed = run_python(textwrap.dedent(f'''
        import kernels.triton
        from kernels.aot import plan
        kernels.triton.__path__.append({str(tmp_path)!r})
        plan.OPS = (*plan.OPS, "double")
        (variant,) = plan.variants_of("double").values()
        print(variant.name, len(plan.plan(archs=(80, 90), ops=("double",))))
    '''))
    assert printed.split() == ["double_fp32", "2"]


class Copying(Backend):
    """A backend whose engines are copies of the graph, which ONNX Runtime runs."""

    name = "copying"

    def available(self) -> str | None:
        return None

    def devices(self) -> list[str]:
        return ["cpu"]

    def dtypes(self) -> tuple[str, ...]:
        return ("fp32",)

    def versions(self, config: EngineConfig | None = None) -> dict[str, str]:
        return {"copying": "1"}

    def build(self, target: Target, directory: Path) -> None:
        (directory / "copy").write_bytes(target.onnx.read_bytes())

    def load(self, target: Target, directory: Path) -> Engine:
        assert hash_file(directory / "copy") == hash_file(target.onnx)
        return engines.backend("onnxruntime").load(target, directory)


COPYING = Copying()


def test_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engines are checked, recorded, found again, and refused when they are damaged."""
    bundle = small_bundle(tmp_path / "small")
    with pytest.raises(EngineError, match="got 'copying', expected one of"):
        engines.backend("copying")
    monkeypatch.setitem(engines.BACKENDS, "copying", f"{__name__}:COPYING")
    wanted = bundle.config("unet", backend="copying", size=(64, 64), batch=2)
    path = store.build(bundle, "unet", wanted)
    record = store.Record.read(path, "")
    assert record.check is not None and record.check.rel_rms < 1e-6 and "copy" in record.files
    assert store.build(bundle, "unet", wanted) == path
    store.load(bundle, "unet", wanted)
    (path / "copy").write_bytes(b"damaged")
    with pytest.raises(EngineError, match="copy"):
        store.load(bundle, "unet", wanted)
