"""Kernels that the runtime launches itself on a GPU, in a directory beside the engines: kernels-HASH/sm_NN/.

They are compiled by `python -m kernels build` in a process of its own: that needs torch and triton, and nothing that
reads them does. HASH is of their sources, so that other sources never find them.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import kernels
from engines.bundle import Bundle
from engines.spec import EngineError
from engines.store.places import KERNELS, roots, writable_root
from engines.store.sources import hashes
from kernels.aot.artefact import Artefact, KernelError, arch_for
from kernels.calls import OPS

NEEDED = ("step_input_fp32", "accumulate_fp32", "to_image_fp32_planes",
          *(f"guidance_step_fp32_memory{memory}" for memory in (1, 3, 7)))
"""Artefacts without which nothing runs; engines take and give float32 (docs/adr/0003-float32-at-the-border.md)."""

logger = logging.getLogger(__name__)


def runtime_kernels(bundle: Bundle, arch: str) -> Path:
    """Return the directory of the artefacts for GPUs of `arch` ("sm_90"), built first where they are not there.

    Raises EngineError where they cannot be built here, naming the command that does it where triton is.
    """
    try:
        arch = arch_for(int(arch.removeprefix("sm_")))
    except KernelError as e:
        raise EngineError(str(e)) from e
    files = hashes("kernels.calls", *(f"kernels.triton.{op}" for op in OPS))
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    name = f"{KERNELS}{digest[:12]}"
    for root in roots(bundle):
        if _complete(root / name, arch):
            return root / name
    directory = writable_root(bundle) / name
    _build(directory, arch)
    return directory


def _build(directory: Path, arch: str) -> None:
    command = ["python", "-m", "kernels", "build", "--op", ",".join(OPS), "--arch", arch, "-o", str(directory)]
    logger.info("compiling the runtime's kernels for %s: %s", arch, shlex.join(command))
    done = subprocess.run([sys.executable, *command[1:]], cwd=Path(kernels.__file__).parent.parent, text=True,
                          capture_output=True, check=False)
    if done.returncode or not _complete(directory, arch):
        said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise EngineError(f"the runtime's kernels for {arch} could not be compiled: {said}; where torch and triton are "
                          f"installed, run: {shlex.join(command)}")


def _complete(directory: Path, arch: str) -> bool:
    try:
        for name in NEEDED:
            Artefact.read(directory, name, arch).code("cubin")
    except KernelError:
        return False
    return True
