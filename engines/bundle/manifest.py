"""The bundle: a directory of ONNX graphs and a tokenizer whose only index is `manifest.json`.

This file is the manifest's only reader and writer, and needs nothing beyond the standard library and numpy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.spec import EngineConfig, EngineError, TensorSpec, parse

FORMAT = 2  # 1 had text-to-image models only
MANIFEST = "manifest.json"
CONTROL = "control_"
"""What the name of a component that is a ControlNet begins with; the net's own name follows."""
RESIDUAL = "residual_"
"""What the names of the UNet's inputs begin with that are sums of what ControlNets give."""
STORE, FIRST, PREVIOUS, HIDDEN = "store", "first_", "previous_", "hidden_"
"""Inputs of the UNet for videos, and of its outputs: `export.passes.frames`."""
PARTS = ("text", "time", "hint", "body")
"""What the names of the graphs end with that `export.passes.hoist` cuts one into: unet_text, unet_time, unet_body."""
TASKS = {("mask", "masked_image"): "inpaint", ("depth",): "depth-to-image", ("low_resolution",): "upscale"}
"""Extra channels of a UNet → the one task that such a model does."""
LARGE = 1 << 26
"""Bytes from which on the hash of a file is remembered while it is unchanged."""


@dataclass(frozen=True)
class Check:
    """How far a component is from its reference on inputs drawn from `seed`.

    max_abs: largest absolute difference. rel_rms: RMS of the difference over RMS of the reference.
    reference: what it was compared with, in words.
    """

    reference: str
    seed: int
    max_abs: float
    rel_rms: float


@dataclass(frozen=True)
class Component:
    """One ONNX graph: where it is, what goes in and out, what it holds.

    file: the .onnx file, relative to the bundle. files: every file it needs (external weights too) → sha256.
    dtype: precision of its weights and arithmetic (inputs and outputs are float32 whatever it is).
    sites: op type → how many single nodes of it the graph has (Attention, GroupNormalization, …).
    """

    file: str
    files: Mapping[str, str]
    dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: Mapping[str, int]
    check: Check


@dataclass(frozen=True)
class TextSpec:
    """One tokenizer and text encoder: files, tokens per prompt, and the hidden layer that the UNet is given.

    hidden_layer: "last" (after the final norm) or "penultimate" (without a norm). pooled: the output that is the UNet's
    input text_embeds, "" where it takes none. The hidden states of several encoders are joined along their width.
    """

    component: str
    tokenizer: str
    max_length: int
    pad_id: int
    hidden_layer: str
    pooled: str = ""


@dataclass(frozen=True)
class LatentSpec:
    """latent = (encoder mean − shift) · scale; `factor` pixels a latent; sizes are multiples of `multiple` latents."""

    channels: int
    scale: float
    shift: float
    factor: int
    multiple: int


@dataclass(frozen=True)
class DimSpec:
    """Where the size of a dimension comes from: it is `of` / `divisor`, rounded up, or else the number `size`."""

    of: str = ""
    divisor: int = 1
    size: int = 0

    def __post_init__(self) -> None:
        if bool(self.of) == bool(self.size) or self.divisor < 1 or self.size < 0:
            raise EngineError(f"manifest dims: got {self!r}, expected the name of another dimension and a divisor, or a "
                              "size")


def resolve_dims(names: Iterable[str], given: Mapping[str, int], dims: Mapping[str, DimSpec]) -> dict[str, int]:
    """Return the size of each of the dimensions `names`: as given, else as `dims` says.

    Raises EngineError for a dimension of which neither says a size.
    """
    def size(name: str, seen: tuple[str, ...] = ()) -> int:
        if name in given:
            return given[name]
        if name not in dims or name in seen:
            asked = " ← ".join((*seen, name))
            raise EngineError(f"dimension {asked}: got no size, expected one of {', '.join({**given, **dims})}")
        spec = dims[name]
        return spec.size or -(-size(spec.of, (*seen, name)) // spec.divisor)

    return {name: size(name) for name in names}


@dataclass(frozen=True)
class ExtraChannels:
    """UNet input channels after the latent ones: what they mean ("mask", "masked_image", "depth" …) and how many."""

    meaning: str
    channels: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows of a model. scheduler is the checkpoint's own scheduler_config, `_class_name` too.

    files: bundle files that belong to no component (tokenizer) → sha256. provenance: source, its hash, exporter and
    library versions, date. default_size: (height, width) pixels. low_res_scheduler, max_noise_level: of an upscaler,
    the schedule of the noise in its low-resolution input and the highest level of it. zero_negative: without a negative
    prompt the text is zeros, not that of the empty prompt.
    """

    family: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    prediction_type: str
    latent: LatentSpec
    text: tuple[TextSpec, ...]
    default_size: tuple[int, int]
    files: Mapping[str, str]
    provenance: Mapping[str, Any]
    extra_channels: tuple[ExtraChannels, ...] = ()
    low_res_scheduler: Mapping[str, Any] | None = None
    max_noise_level: int = 0
    zero_negative: bool = False
    dims: Mapping[str, DimSpec] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def meanings(self) -> tuple[str, ...]:
        """What the UNet's extra input channels mean."""
        return tuple(extra.meaning for extra in self.extra_channels)

    @property
    def time_ids(self) -> int:
        """Numbers that the UNet takes for sizes and the like: 6 in Stable Diffusion XL, 5 in its refiner, else 0."""
        return next((int(spec.shape[1]) for spec in self.components["unet"].inputs if spec.name == "time_ids"), 0)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the model does: `runtime/tasks/tasks.py` says what each is."""
        if self.meanings:
            return (TASKS[self.meanings],)
        encodes = "vae_encoder" in self.components
        found: tuple[str, ...] = ("text-to-image", "image-to-image", "inpaint", "invert") if encodes \
            else ("text-to-image",)
        if encodes and "unet_frames" in self.components:
            found += ("video",)
        return found if self.time_ids != 5 else found[1:]

    def picture_size(self, dims: Mapping[str, int]) -> tuple[int, int] | None:
        """Return (height, width) in pixels of the pictures that an engine of these dimensions is for; None without."""
        sides = [self._side(side, dims) for side in ("height", "width")]
        return (sides[0], sides[1]) if all(sides) else None

    def _side(self, side: str, dims: Mapping[str, int]) -> int:
        """Return the size of a side, from the finest of `dims` that follows from it; 0 where none does."""
        if side in dims:
            return dims[side]
        known = [(factor, size * factor) for name, size in dims.items() if (factor := self._divisor(name, side))]
        return min(known)[1] if known else 0

    def _divisor(self, name: str, side: str) -> int:
        """Return how many of `side` make one of dimension `name`; 0 where it does not follow from it."""
        divisor = 1
        for _ in self.dims:
            if name == side or name not in self.dims:
                break
            name, divisor = self.dims[name].of, divisor * self.dims[name].divisor
        return divisor if name == side else 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _manifest(data: dict[str, Any], where: str) -> Manifest:
    version = data.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise EngineError(f"{where}: got bundle format {version!r}, this version reads up to {FORMAT}; "
                          "update latentrt or export the checkpoint again")
    return parse(Manifest, data, where, "export the checkpoint again with this version")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: where it is and what its manifest says."""

    path: Path
    manifest: Manifest = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read `path`/manifest.json. Raises EngineError where it is missing, damaged or of a newer format."""
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            found = "a file" if path.is_file() else "a directory without one" if path.is_dir() else "nothing"
            raise EngineError(f"{path}: got {found}, expected a bundle (a directory with {MANIFEST}); "
                              f"make one with: python -m export CHECKPOINT -o {path}")
        try:
            data = json.loads(file.read_text(encoding="utf8"))
        except ValueError as e:
            raise EngineError(f"{file}: not JSON ({e}); export the checkpoint again") from e
        if not isinstance(data, dict):
            raise EngineError(f"{file}: got {type(data).__name__}, expected an object; export the checkpoint again")
        return cls(path, _manifest(data, str(file)))

    def component(self, name: str) -> Component:
        """Raises EngineError for a component that the bundle does not have."""
        try:
            return self.manifest.components[name]
        except KeyError as e:
            raise EngineError(f"{self.path}: got component {name!r}, "
                              f"expected one of {', '.join(self.manifest.components)}") from e

    @property
    def tokens(self) -> int:
        """Of a prompt, as the UNet is given it."""
        return max(text.max_length for text in self.manifest.text)

    def part_of(self, name: str) -> str | None:
        """The component that `name` is a part of ("unet" for "unet_text"), None where it is whole itself."""
        whole, _, part = name.rpartition("_")
        return whole if part in PARTS and whole in self.manifest.components else None

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the ControlNets that are attached."""
        return tuple(name.removeprefix(CONTROL) for name in self.manifest.components
                     if name.startswith(CONTROL) and not self.part_of(name))

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError, naming the nearest size that fits, unless the model can draw height x width pixels."""
        latent = self.manifest.latent
        step = latent.factor * latent.multiple
        if min(height, width) < step or height % step or width % step:
            near = "x".join(str(max(step, round(side / step) * step)) for side in (height, width))
            raise ValueError(f"size: got {height}x{width} (height x width), expected multiples of {step} pixels "
                             f"(VAE factor {latent.factor} x UNet depth {latent.multiple}); try {near}")

    def config(self, name: str, *, backend: str, batch: int, size: tuple[int, int] | None = None, tokens: int = 0,
               sizes: Mapping[str, int] | None = None, **rest: Any) -> EngineConfig:
        """Return the EngineConfig of component `name` for `batch` rows, with the dimensions that the component has.

        size: (height, width) of the picture in pixels; a component without these needs none, so that one text encoder
        serves every picture size. tokens: of the text; 0 for those of one prompt. sizes: further dimensions by name,
        where they are not to be what the manifest says. rest: the other fields of EngineConfig. Raises EngineError for
        a dimension whose size is not known.
        """
        height, width = size or (0, 0)
        given = {"batch": batch, "height": height, "width": width, "sequence": tokens or self.tokens, **(sizes or {})}
        given = {dim: value for dim, value in given.items() if value or dim == "batch"}
        component = self.component(name)
        names = {d: None for spec in (*component.inputs, *component.outputs) for d in spec.shape if isinstance(d, str)}
        try:
            dims = resolve_dims({"batch": None, **names}, given, self.manifest.dims)
        except EngineError as e:
            raise EngineError(f"component {name}: {e}") from e
        return EngineConfig(backend, dims, **rest)

    def verify(self, files: Mapping[str, str]) -> None:
        """Hash `files` (relative path → sha256). Raises EngineError naming the first that is missing or differs."""
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda name: _hash_or_none(self.path / name), files))
        for (name, expected), got in zip(files.items(), found, strict=True):
            if got != expected:
                state = "missing" if got is None else f"damaged (got sha256 {got[:12]}, expected {expected[:12]})"
                raise EngineError(f"{self.path / name} is {state}; "
                                  f"export it again: python -m export CHECKPOINT -o {self.path} --force")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory`/manifest.json, or replace the one that is there by one rename."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    new = directory / f".{MANIFEST}.tmp"
    new.write_text(text, encoding="utf8")
    os.replace(new, directory / MANIFEST)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex.

    That of a large file is kept: the parts of a UNet share one weights file. Hashing it takes longer than a tick of
    the clock that says when a file was changed, so a change is never missed.
    """
    about = path.stat()
    if about.st_size < LARGE:
        return _hash(path)
    return _hash_unchanged(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_unchanged(path: Path, inode: int, size: int, changed: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Relative name → sha256 for files of `directory`."""
    return {name: hash_file(directory / name) for name in names}


def _hash_or_none(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None
