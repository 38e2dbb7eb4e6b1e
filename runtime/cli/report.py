"""The report that a command line prints when its pictures are written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from runtime.pipeline import Pipeline
from runtime.request.result import Result


def report(args: argparse.Namespace, pipe: Pipeline, why: str, results: Sequence[Result],
           targets: Sequence[Sequence[Path]]) -> str:
    """Return the files with their seeds, the engine and the seconds, as text or JSON. why: the engine's reason."""
    seconds = {"load": pipe.load_seconds, **results[0].timings}
    written = [(file, result.request_of(i)) for result, files in zip(results, targets, strict=True)
               for i, file in enumerate(files)]
    backend, dtype = pipe.config.backend, pipe.config.dtype
    if args.json:
        return json.dumps({
            "images": [{"file": str(file), "request": request.to_json()} for file, request in written],
            "grid": str(args.grid) if args.grid else None, "backend": backend, "dtype": dtype, "chosen": why,
            "seconds": seconds}, indent=1, ensure_ascii=False)
    lines = [f"{file}  seed {request.seed}" for file, request in written]
    lines += [str(args.grid)] if args.grid else []
    stages = ", ".join(f"{stage} {time:.2f} s" for stage, time in seconds.items())
    return "\n".join([*lines, f"{backend} {dtype}: {stages}"])
