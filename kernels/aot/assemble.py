"""PTX to cubin with Triton's own ptxas, to the same bytes every time.

ptxas decides some things in the order of its own addresses: the code of large kernels for sm_90 and later differs from
run to run, and with the paths that it is given. So it runs where its addresses are always the same: not randomised, the
stack limited as usual, no environment, and short names relative to a directory of its own.
"""

from __future__ import annotations

import ctypes
import logging
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kernels.aot.artefact import KernelError

VERSION = 1
"""Version of what this file makes of the same PTX; part of the key of all compiled code."""
ADDR_NO_RANDOMIZE = 0x0040000
"""A flag of <linux/personality.h>."""
STACK = 8 << 20
"""Bytes of stack, the usual limit."""

logger = logging.getLogger(__name__)


def fix_addresses() -> bool:
    """Give programs that this process starts the same addresses each time; returns whether the system allowed it."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK if hard == resource.RLIM_INFINITY else min(STACK, hard), hard))
    libc = ctypes.CDLL(None)
    libc.personality.argtypes = [ctypes.c_ulong]
    fixed: bool = libc.personality(libc.personality(0xffffffff) | ADDR_NO_RANDOMIZE) >= 0
    if not fixed:  # as in some containers
        logger.warning("got no fixed addresses from this system, expected personality(ADDR_NO_RANDOMIZE) to be "
                       "allowed; cubins may differ in some bytes from those of another build")
    return fixed


def use(backend: Any, stages: dict[str, Any], options: Any, language: Any, capability: Any) -> None:
    """Put `assemble` in the place of Triton's last stage; for `triton.knobs.runtime.add_stages_inspection_hook`."""
    arch = backend.target.arch
    stages["cubin"] = lambda ptx, metadata: assemble(ptx, arch, fused=options.enable_fp_fusion)


def assemble(ptx: str, arch: int, *, fused: bool = True) -> bytes:
    """Return the cubin of `ptx` for compute capability `arch` (89: 8.9).

    fused: multiply and add may become one instruction. Raises KernelError with what ptxas says.
    """
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "ptxas").symlink_to(get_ptxas(arch).path)
        (Path(directory) / "k.ptx").write_text(ptx)
        command = ["./ptxas", f"--gpu-name={sm_arch_from_capability(arch)}", "k.ptx", "-o", "k.cubin"]
        done = subprocess.run(command + ["--fmad=false"] * (not fused), cwd=directory, env={}, capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise KernelError(f"ptxas for sm_{arch} ended with status {done.returncode}: {done.stderr.strip()[:500]}")
        return (Path(directory) / "k.cubin").read_bytes()
