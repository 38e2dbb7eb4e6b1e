"""`python -m engines inspect`: what a bundle holds, and its engines down to layers, kernels and times."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from engines.bundle import Bundle, Condition
from engines.cli.describe import describe, engine_table, named
from engines.cli.inside import engine_text, look_inside, plain
from engines.cli.options import positive
from engines.cli.tables import size, table
from engines.spec import TensorSpec

ABOUT = ("show a bundle's components, shapes, kernel sites, provenance and engines; or the layers, kernels, times and "
         "memory of engines")
SHOWN = 3
"""Inputs, and outputs, of a component that are shown; parts of a denoiser have dozens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("bundle", help="bundle directory")
    parser.add_argument("--engine", metavar="NAME",
                        help="open the engines whose names begin so: kernels, memory, times")
    parser.add_argument("--profile", action="store_true", help="time every layer and show what takes longest")
    parser.add_argument("--layers", action="store_true", help="show every layer")
    parser.add_argument("--top", type=positive, default=15, metavar="N",
                        help="with --profile, how many layers to show (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Print what was asked for and return the exit status."""
    bundle = Bundle.open(options.bundle)
    paths = named(bundle, options.engine)
    if options.engine or options.layers or options.profile:
        engines = [look_inside(bundle, path, options.profile) for path in paths]
        texts = (engine_text(engine, options.layers, options.top) for engine in engines)
        print(json.dumps(engines, indent=1) if options.json else "\n\n".join(texts))
        return 0
    engines = [describe(bundle, path) for path in paths]
    if options.json:
        print(json.dumps({"manifest": bundle.manifest.to_json(), "engines": engines}, indent=1))
        return 0
    print(bundle_text(bundle), engine_table(engines, options.bundle), sep="\n\n")
    if engines:
        print(f"\nlayers, kernels and what is slow: python -m engines inspect {options.bundle} --engine NAME --profile")
    return 0


def bundle_text(bundle: Bundle) -> str:
    """Return what a bundle holds, for people."""
    manifest, latent = bundle.manifest, bundle.manifest.latent
    pixels = "x".join(map(str, manifest.default_size))
    lines = [f"{bundle.path}: {manifest.family}, {manifest.kind}, format {manifest.format}, "
             f"{manifest.prediction_type} prediction, {manifest.scheduler.get('_class_name', 'unnamed')}, "
             f"{pixels} pixels",
             f"latents: {latent.channels} channels, scale {latent.scale:g}, shift {latent.shift:g}, "
             f"{latent.factor} pixels each, first stage {manifest.first_stage}",
             f"tasks: {', '.join(manifest.tasks)}",
             f"guidance: {manifest.guidance.form}",
             *(f"condition: {_told(condition)}" for condition in manifest.conditions),
             *(f"text: {text.component} gives {text.hidden_layer}, {text.max_length} tokens by {text.tokenizer}"
               for text in manifest.text),
             *(f"{bundle.graph(bundle.label(label))[1].role}: {label}" for label in bundle.labels)]
    components = table(
        ["component", "role", "rows", "dtype", "inputs → outputs", "sites", "size", "error against its reference"],
        [[name, c.role, c.rows, c.dtype, f"{_shapes(c.inputs)} → {_shapes(c.outputs)}",
          " ".join(f"{n} {op}" for op, n in c.sites.items()), size(_bytes(bundle, c.files)),
          f"{c.check.rel_rms:.1e} rel. RMS, {c.check.max_abs:.1e} max ({c.check.reference})"]
         for name, c in manifest.components.items()])
    provenance = [f"  {name}: {plain(value)}" for name, value in manifest.provenance.items()]
    return "\n".join([*lines, "", components, "", "provenance", *provenance])


def _told(condition: Condition) -> str:
    """Return a condition in words."""
    fields = f" ({', '.join(condition.fields)})" if condition.fields else ""
    channels = f", {condition.channels} channels beside the sample's" if condition.channels else ""
    return f"{condition.meaning} from {condition.source}{fields} to {condition.input}{channels}"


def _shapes(specs: tuple[TensorSpec, ...]) -> str:
    rest = [f"… {len(specs) - SHOWN} more"] if len(specs) > SHOWN else []
    return ", ".join([f"{s.name}[{', '.join(map(str, s.shape))}]" for s in specs[:SHOWN]] + rest)


def _bytes(bundle: Bundle, files: Iterable[str]) -> int:
    return sum((bundle.path / f).stat().st_size for f in files if (bundle.path / f).is_file())
