"""Our kernels or TensorRT's own: build with either, time both on the real shapes, keep the faster."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.spec import EngineError
from engines.tensorrt import child as tensorrt_child
from engines.tensorrt.build import ABOUT, PLAN, Request

log = logging.getLogger(__name__)

Kinds = frozenset[str]
"""Kinds of sites ("attention", "norm") that are plugin nodes in one build."""

SAFE_SHARED = 48 * 1024
"""Bytes of shared memory that every kernel may take without being allowed to."""


def following(asked: Mapping[str, str], seconds: Mapping[Kinds, float | None]) -> Kinds | None:
    """What to build next, None where everything that is to be compared has been built.

    asked: kind → native, plugin or auto. seconds: of what has been built, None where that failed. The first has plugins
    where nothing else is asked for; then one with each kind that is to be decided, and at last one with all those
    that were faster than the first.
    """
    base = frozenset(kind for kind, wanted in asked.items() if wanted == "plugin")
    alone = {kind: base | {kind} for kind, wanted in sorted(asked.items()) if wanted == "auto"}
    for kinds in (base, *alone.values()):
        if kinds not in seconds:
            return kinds
    times = {kinds: s for kinds, s in seconds.items() if s is not None}
    won = [kind for kind, kinds in alone.items() if times.get(kinds, math.inf) < times.get(base, 0)]
    together = base.union(won)
    return together if together not in seconds else None


def fastest(seconds: Mapping[Kinds, float | None]) -> Kinds:
    """The build to keep; of equally fast ones that with the fewest plugins."""
    return min((kinds for kinds, s in seconds.items() if s is not None), key=lambda kinds: (seconds[kinds], len(kinds)))


def build(request: Request, asked: Mapping[str, str]) -> None:
    """Write PLAN and ABOUT into the request's directory, with plugins at the kinds of sites where they are `asked` for.

    asked: kind → native, plugin, or auto: where that is faster here. ABOUT has what was decided, every figure behind
    it, and why a build with plugins failed. Raises EngineError for a graph that TensorRT refuses.
    """
    with tempfile.TemporaryDirectory(dir=request.directory) as root:
        made, rounds, failed = _candidates(request, asked, Path(root))
        seconds = {kinds: statistics.median(rounds[kinds]) if rounds else 0.0 for kinds in made}
        best = fastest(seconds)
        for name in (PLAN, ABOUT):
            os.replace(made[best] / name, Path(request.directory) / name)
    sites = json.loads((Path(request.directory) / ABOUT).read_text(encoding="utf8"))["sites"]
    used = {kind: "plugin" if sites.get(kind, {}).get("ours") else "native" for kind in sorted(asked)}
    _note(request, {
        "kernels": {kind: {"asked": asked[kind], "used": whose} for kind, whose in used.items()},
        "timings": [{"plugins": sorted(kinds), "seconds": seconds[kinds], "rounds": figures}
                    for kinds, figures in rounds.items()],
        "failed": failed})
    if request.gpu is not None:
        _note(request, tensorrt_child.run("inspect", {**_place(request), "directory": request.directory},
                                          f"{request.directory}: the new plan cannot be inspected"))


def _candidates(request: Request, asked: Mapping[str, str],
                root: Path) -> tuple[dict[Kinds, Path], dict[Kinds, list[float]], dict[str, str]]:
    """(what was built, where; its rounds of seconds, where there was anything to compare; what failed, why)."""
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
                log.info("%s as plugins: %s", _name(kinds), e)
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


def _build_one(request: Request, kinds: Kinds, directory: Path, optional: bool) -> bool:
    """One build in a child; attention is tried again with kernels of little shared memory where it fails.

    How much shared memory a plugin's kernel may have is not documented. optional: build nothing and return False where
    no site of `kinds` can be a plugin node.
    """
    directory.mkdir()
    one = dataclasses.replace(request, directory=str(directory), plugins=tuple(sorted(kinds)), optional=optional)
    failure = f"{request.flavour} could not build {request.onnx}"
    try:
        return bool(tensorrt_child.run("build", dataclasses.asdict(one), failure))
    except EngineError as e:
        if "attention" not in kinds:
            raise
        log.info("%s as plugins: %s; once more within %d bytes of shared memory", _name(kinds), e, SAFE_SHARED)
        one = dataclasses.replace(one, max_shared=SAFE_SHARED)
        return bool(tensorrt_child.run("build", dataclasses.asdict(one), failure))


def _measure(request: Request, directories: Sequence[Path]) -> list[dict[str, Any]]:
    figures: list[dict[str, Any]] = tensorrt_child.run(
        "measure", {**_place(request), "directories": [str(d) for d in directories]},
        f"{request.onnx}: a plan cannot be timed")
    return figures


def _note(request: Request, more: Mapping[str, Any]) -> None:
    file = Path(request.directory) / ABOUT
    about = {**json.loads(file.read_text(encoding="utf8")), **more}
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")


def _place(request: Request) -> dict[str, Any]:
    return {"flavour": request.flavour, "gpu": request.gpu}


def _name(kinds: Kinds) -> str:
    return "+".join(sorted(kinds)) or "native"
