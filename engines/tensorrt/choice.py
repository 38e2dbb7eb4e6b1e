"""Our kernels or TensorRT's own: build with either, time both on the real shapes, keep the faster."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.spec import EngineError
from engines.tensorrt import child, record
from engines.tensorrt.build import BuildRequest

logger = logging.getLogger(__name__)

Kinds = frozenset[str]
"""Kinds of sites ("attention", "norm") whose kernels are ours, in plugin nodes, in one build."""

SAFE_SHARED = 48 * 1024
"""Bytes of shared memory that every kernel may take without being allowed to."""


def following(asked: Mapping[str, str], seconds: Mapping[Kinds, float | None]) -> Kinds | None:
    """Return what to build next, None where everything that is to be compared has been built.

    asked: kind → ours, vendor or auto. seconds: of what has been built, None where that failed. The first build has our
    kernels where they alone are asked for; then comes one with each kind that is to be decided, and at last one with
    all those that were faster than the first.
    """
    base = frozenset(kind for kind, wanted in asked.items() if wanted == "ours")
    alone = {kind: base | {kind} for kind, wanted in sorted(asked.items()) if wanted == "auto"}
    for kinds in (base, *alone.values()):
        if kinds not in seconds:
            return kinds
    times = {kinds: s for kinds, s in seconds.items() if s is not None}
    won = [kind for kind, kinds in alone.items() if times.get(kinds, math.inf) < times.get(base, 0)]
    together = base.union(won)
    return together if together not in seconds else None


def fastest(seconds: Mapping[Kinds, float | None]) -> Kinds:
    """Return the build to keep; of equally fast ones that with the fewest kinds of ours."""
    return min((kinds for kinds, s in seconds.items() if s is not None), key=lambda kinds: (seconds[kinds], len(kinds)))


def build(request: BuildRequest, asked: Mapping[str, str]) -> None:
    """Write plan and record into the request's directory, with our kernels at the kinds of sites that `asked` names.

    asked: kind → ours, vendor, or auto: ours where that is faster here. The record has what was decided, every figure
    behind it, and why a build with our kernels failed. Raises EngineError for a graph that TensorRT refuses.
    """
    directory = Path(request.directory)
    with tempfile.TemporaryDirectory(dir=request.directory) as root:
        made, rounds, failed = _candidates(request, asked, Path(root))
        seconds = {kinds: statistics.median(rounds[kinds]) if rounds else 0.0 for kinds in made}
        best = fastest(seconds)
        for name in (record.PLAN, record.ABOUT):
            os.replace(made[best] / name, directory / name)
    sites = record.read(directory)["sites"]
    used = {kind: "ours" if sites.get(kind, {}).get("ours") else "vendor" for kind in sorted(asked)}
    record.note(directory, {
        "kernels": {kind: {"asked": asked[kind], "used": whose} for kind, whose in used.items()},
        "timings": [{"ours": sorted(kinds), "seconds": seconds[kinds], "rounds": figures}
                    for kinds, figures in rounds.items()],
        "failed": failed})
    if request.gpu is not None:
        record.note(directory, child.run("inspect", {**_place(request), "directory": request.directory},
                                         f"{request.directory}: the new plan cannot be inspected"))


def _candidates(request: BuildRequest, asked: Mapping[str, str],
                root: Path) -> tuple[dict[Kinds, Path], dict[Kinds, list[float]], dict[str, str]]:
    """Return what was built, and where; rounds of seconds, where there was more than one; what failed, and why."""
    made: dict[Kinds, Path] = {}
    rounds: dict[Kinds, list[float]] = {}
    failed: dict[str, str] = {}
    seconds: dict[Kinds, float | None] = {}
    while True:
        while (kinds := following(asked, seconds)) is not None:
            try:
                if not _build_one(request, kinds, root / _name(kinds), optional=bool(made)):
                    raise EngineError("none of its sites can be a plugin node")
                made[kinds], seconds[kinds] = root / _name(kinds), 0.0
            except EngineError as e:
                if not made:
                    raise
                logger.info("%s as plugins: %s", _name(kinds), e)
                failed[_name(kinds)], seconds[kinds] = str(e), None
        if len(made) == 1 or rounds.keys() == made.keys():
            return made, rounds, failed
        first, *others = made
        try:
            measured = dict(zip(made, _measure(request, list(made.values())), strict=True))
        except EngineError as e:  # one of them does not run: keep the first, which there was nothing to decide about
            return {first: made[first]}, {}, failed | {_name(kinds): f"not measured: {e}" for kinds in others}
        for kinds in others:
            if not (apart := measured[kinds]["difference"]) <= request.tolerance:
                failed[_name(kinds)], seconds[kinds] = (
                    f"differs from {_name(first)} by {apart:.1e} (relative RMS), expected at most "
                    f"{request.tolerance:.0e}"), None
                del made[kinds]
        rounds = {kinds: measured[kinds]["rounds"] for kinds in made}
        seconds |= {kinds: statistics.median(figures) for kinds, figures in rounds.items()}


def _build_one(request: BuildRequest, kinds: Kinds, directory: Path, optional: bool) -> bool:
    """Build once in a child; attention is tried again with kernels of little shared memory where it fails.

    How much shared memory a plugin's kernel may have is not documented. optional: build nothing and return False where
    no site of `kinds` can be a plugin node.
    """
    directory.mkdir()
    attempt = dataclasses.replace(request, directory=str(directory), plugins=tuple(sorted(kinds)), optional=optional)
    failure = f"{request.flavour} could not build {request.onnx}"
    try:
        return bool(child.run("build", dataclasses.asdict(attempt), failure))
    except EngineError as e:
        if "attention" not in kinds:
            raise
        logger.info("%s as plugins: %s; once more within %d bytes of shared memory", _name(kinds), e, SAFE_SHARED)
        attempt = dataclasses.replace(attempt, max_shared=SAFE_SHARED)
        return bool(child.run("build", dataclasses.asdict(attempt), failure))


def _measure(request: BuildRequest, directories: Sequence[Path]) -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = child.run(
        "measure", {**_place(request), "directories": [str(d) for d in directories]},
        f"{request.onnx}: a plan cannot be timed")
    return figures


def _place(request: BuildRequest) -> dict[str, Any]:
    return {"flavour": request.flavour, "gpu": request.gpu}


def _name(kinds: Kinds) -> str:
    return "+".join(sorted(kinds)) or "vendor"
