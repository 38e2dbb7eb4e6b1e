"""The plan of a build: every variant of every op for every GPU architecture, each with the key of its code.

A kernel's code depends on its source (with all that it calls), its types, constants and options, the architecture, and
the compilers' versions: their hash is its name in the cache. No line or file names go in.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.aot import assemble
from kernels.aot.artefact import ARCHS, FORMAT, KernelError
from kernels.aot.variant import Variant

OPS = ("attention", "group_norm", "layer_norm", "geglu", "step_input", "accumulate", "guidance_step", "to_image")

MAX_SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one block can have (CUDA C++ Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class Compilation:
    """A compilation is one variant for one architecture; key: hash of everything that its code depends on."""

    variant: Variant
    arch: int
    key: str


def plan(archs: Sequence[int] = ARCHS, ops: Sequence[str] = OPS) -> list[Compilation]:
    """Return every variant of `ops` for those of `archs` that it runs on. Raises KernelError."""
    if unknown := [arch for arch in archs if arch not in ARCHS]:
        raise KernelError(f"arch: got {unknown}, expected some of {', '.join(map(str, ARCHS))}; "
                          "GPUs in between run the code of the one before (8.7: sm_86)")
    chosen = [variant for op in ops for variant in variants_of(op).values()]
    return [Compilation(variant, arch, key(variant, arch))
            for variant in chosen for arch in archs if arch in variant.archs]


@functools.cache
def variants_of(op: str) -> Mapping[str, Variant]:
    """Return the variants of an op by name. Raises KernelError for an unknown op or kernels that cannot be compiled."""
    if op not in OPS:
        raise KernelError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    with needs_triton():
        import triton

        module = importlib.import_module(f"kernels.triton.{op}")
    found: dict[str, Variant] = {}
    for variant in module.variants():
        if not variant.name.startswith(f"{op}_") or variant.name in found:
            raise KernelError(f"{variant.name}: got a name that is taken or not of {op}, expected {op}_ and what tells "
                              "it from the others; correct its variants()")
        if not isinstance(variant.kernel, triton.JITFunction):
            raise KernelError("got kernels that Triton interprets, expected ones that it compiles; unset "
                              "TRITON_INTERPRET and start again")
        given = [*variant.signature, *variant.constants]
        if sorted(given) != sorted(variant.kernel.arg_names) or not {*variant.divisible} <= {*variant.signature}:
            raise KernelError(f"{variant.name}: got signature and constants for {given}, expected {op}'s arguments "
                              f"{variant.kernel.arg_names}; correct its variants()")
        found[variant.name] = variant
    return found


@contextlib.contextmanager
def needs_triton() -> Iterator[None]:
    """Raise KernelError with the pip line where an import in here finds no torch or triton."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name not in ("torch", "triton"):
            raise
        raise KernelError(f"building kernels needs torch and triton ({e}); pip install torch triton") from e


def key(variant: Variant, arch: int) -> str:
    """Return the sha256 of everything that the code of `variant` for `arch` depends on."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend

    backend = make_backend(target(arch))
    material = {
        "format": FORMAT, "op": variant.op, "name": variant.name, "source": variant.kernel.cache_key,
        "signature": list(variant.signature.items()), "constants": dict(variant.constants),
        "divisible": variant.divisible, "arch": arch, "shared": MAX_SHARED[arch], "triton": triton_version(),
        "ptxas": backend.hash(), "assembled": assemble.VERSION, "environment": get_cache_invalidating_env_vars(),
        "options": backend.parse_options(options(variant)).hash(),
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


def target(arch: int) -> Any:
    """Return Triton's name for a GPU of compute capability `arch`."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


def options(variant: Variant) -> dict[str, int]:
    """Return the options of Triton's compiler for `variant`."""
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages}


def triton_version() -> str:
    """Return the version of the installed Triton."""
    import triton

    return triton.__version__
