"""Words for engines: their shapes, what a call takes, and the command that makes one again."""

from __future__ import annotations

import shlex

from engines.bundle import Bundle
from engines.spec import EngineConfig


def rows(config: EngineConfig) -> str:
    """Return the shape of a config in words: "2 rows 512x512"."""
    dims = config.dims
    size = (f" {dims['height']}x{dims['width']}" if {"height", "width"} <= dims.keys() else
            f" {dims['latent_height']}x{dims['latent_width']} latents" if "latent_height" in dims else "")
    return f"{dims['batch']} row{'s' * (dims['batch'] > 1)}{size}"


def rebuild_command(bundle: Bundle, component: str, config: EngineConfig, *, alone: bool = True) -> str:
    """Return "build it again: python -m engines build …" for an engine; not alone: for every component of its size."""
    size, batch = bundle.picture_size(config), config.dims["batch"]
    tokens = config.dims.get("sequence", bundle.tokens)
    if isinstance(bundle.component(component).rows, int):
        batch = 1  # the number of its rows does not follow from it
    elif batch % 2 == 0:
        batch //= 2  # building for n images also builds for both branches of guidance, 2n rows
    words = ["python", "-m", "engines", "build", str(bundle.path), "--backend", config.backend,
             *(["--component", component] if alone else []), "--batch", str(batch), "--dtype", config.dtype]
    words += ["--size", f"{size[0]}x{size[1]}"] if size else []
    words += ["--tokens", str(tokens)] if tokens != bundle.tokens else []
    words += ["--threads", str(config.threads)] if config.threads else []
    words += ["--device", config.device] if config.device != "cpu" else []
    words += [w for name, value in config.options.items() for w in ("--option", f"{name}={value}")]
    return f"build it again: {shlex.join([*words, '--rebuild'])}"


def duration(seconds: float) -> str:
    """Return a duration in words, such as "12.3 ms"."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
