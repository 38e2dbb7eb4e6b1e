"""`python -m runtime BUNDLE "prompt"`: from the words of a command line to files."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engines import Bundle, store
from runtime.cli.files import targets_of, write
from runtime.cli.report import report
from runtime.cli.requests import requests_of, settings_of
from runtime.pictures import save as images
from runtime.pipeline import Pipeline
from runtime.request.plan import plan
from runtime.request.request import Request
from runtime.request.result import Result

HANDOVER = 0.8
"""Share of the schedule at which the refiner takes over, unless --denoising-end says another."""


def draw(args: argparse.Namespace) -> str:
    """Draw what a command line asks for and write it; returns what is to be printed.

    Raises ValueError for options that cannot be, FileExistsError for a file that is not to be replaced, EngineError for
    a bundle or an engine that cannot be used.
    """
    requests = requests_of(args)
    targets = targets_of(args, requests)
    if args.refiner:
        requests = _begun(args, requests)
    pipe, why, results = _drawn(args, args.refiner or args.bundle, requests)
    about = {"model": pipe.bundle.manifest.provenance, "backend": pipe.config.backend, "dtype": pipe.config.dtype}
    drawn: list[Image.Image] = []
    for result, files in zip(results, targets, strict=True):
        write(result, files, about, args.force)
        drawn += result.images
    if args.grid:
        images.save(images.grid(drawn), args.grid, force=args.force)
    return report(args, pipe, why, results, targets)


def _begun(args: argparse.Namespace, requests: Sequence[Request]) -> list[Request]:
    """Draw with the base model, and return the requests that let the refiner go on with its latents."""
    ends = [HANDOVER if r.denoising_end is None else r.denoising_end for r in requests]
    _, _, halves = _drawn(args, args.bundle, [dataclasses.replace(r, output="latent", denoising_end=end)
                                              for r, end in zip(requests, ends, strict=True)])
    return [dataclasses.replace(r, image=half.latents, denoising_start=end, denoising_end=None,
                                height=half.request.height, width=half.request.width, seed=half.request.seed)
            for r, half, end in zip(requests, halves, ends, strict=True)]


def _drawn(args: argparse.Namespace, path: str | Path,
           requests: Sequence[Request]) -> tuple[Pipeline, str, list[Result]]:
    """Return the pipeline of a bundle, why it has its engine, and what it draws."""
    bundle = Bundle.open(path)
    plans = [plan(request, bundle, bundle.manifest.default_size) for request in requests]
    config, why = settings_of(args, plans[0].size).chosen(bundle)
    if args.rebuild:
        store.build_all(bundle, config.backend, sizes=[plans[0].size], batches=[config.batch], dtype=config.dtype,
                        device=config.device, threads=config.threads, rebuild=True, options=config.options)
    pipe = Pipeline(bundle, config)
    return pipe, why, pipe.draw(plans)
