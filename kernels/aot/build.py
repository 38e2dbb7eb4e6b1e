"""Ahead-of-time build: plan what there is, compile what the cache does not have, publish all of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.aot import cache as entries
from kernels.aot.artefact import ARCHS, Artefact, KernelError
from kernels.aot.compiler import compile_all
from kernels.aot.plan import OPS, plan
from kernels.aot.publish import publish

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a build did.

    artefacts: what is in its output now. unfit: those that need more shared memory than one block of their architecture
    has; a launcher does not choose them there, so they are left out. compiled, cached: where all of them came from.
    """

    artefacts: tuple[Artefact, ...]
    unfit: tuple[Artefact, ...]
    compiled: int
    cached: int


def build(output: Path, *, archs: Sequence[int] = ARCHS, ops: Sequence[str] = OPS, cache: Path | None = None,
          processes: int = 0) -> Built:
    """Compile what the cache does not have, then write all artefacts of `ops` for `archs` below `output`.

    cache: directory, by default ~/.cache/latentrt/kernels. processes: at a time, 0 for one per CPU. On Ctrl-C or an
    error the kernels that are finished stay in the cache, and every artefact in `output` is whole. Raises KernelError.
    """
    cache = cache or entries.default()
    compilations = plan(archs, ops)
    missing = [c for c in compilations if entries.find(cache, c.key) is None]
    logger.info("%d artefacts, %d of them to compile", len(compilations), len(missing))
    try:
        if missing:
            compile_all(missing, cache, processes or len(os.sched_getaffinity(0)))
        made = publish(compilations, cache, output)
    except OSError as e:
        raise KernelError(f"could not write: {e}; make room, or choose another -o or --cache") from e
    fit, unfit = tuple(a for a in made if a.files), tuple(a for a in made if not a.files)
    return Built(fit, unfit, len(missing), len(compilations) - len(missing))
