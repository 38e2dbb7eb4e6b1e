"""The manifest: all that engines and the runtime know of a model, as data. `export/families/` writes it.

It says what differs between models, so that nothing else asks which model it has: the roles of the networks and the
graphs that each is cut into, what the denoiser is told and by what, the form of guidance, the latents and the
scheduler. This file is its only reader and writer, and needs nothing beyond the standard library and numpy.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.bundle.dims import DimSpec
from engines.spec import EngineError, TensorSpec, parse

FORMAT = 3
"""Version of the manifest. 1 had text-to-image models only, 2 names of components in the place of roles."""
MANIFEST = "manifest.json"
STEPS = {"denoise": "denoiser", "tokens": "decode"}
"""Loop of a model → the role of the network that it runs at every step."""
ROWS = ("image", "branch")
"""Ways in which the rows of an engine follow from the images that are drawn together; see `Component`."""
FORMS = ("none", "classifier-free", "channels", "embedded", "ramp")
"""Forms of guidance; see `Guidance`."""


@dataclass(frozen=True)
class Check:
    """The distance of a component or an engine from its reference, on inputs drawn from `seed`.

    max_abs: largest absolute difference. rel_rms: RMS of the difference over RMS of the reference.
    reference: what it was compared with, in words.
    """

    reference: str
    seed: int
    max_abs: float
    rel_rms: float


@dataclass(frozen=True, kw_only=True)
class Component:
    """A component is one ONNX graph: where it is, what it is for, what goes in and out.

    file: the .onnx file, relative to the bundle. files: every file it needs (external weights too) → sha256.
    dtype: precision of its weights and arithmetic (inputs and outputs are float32 whatever it is).
    role: what it does: "denoiser", "text_encoder", "first_stage_decoder", "first_stage_encoder", "controlnet" … (of
    other loops "prefill", "decode" …). network: the network whose weights it computes with, which all graphs of it
    share; what LoRAs and refits refer to. label: the name that requests have for the network, "" where they have none.
    part: "" for the whole network; "text", "time" or "hint" for what depends on that alone, "body" for the rest, which
    runs at every step. variant: "" for the plain network; otherwise a name for one with more inputs and outputs.
    rows: how many rows its engines have: a number, "image" for one an image, or "branch" for one an image and branch of
    guidance. sites: op type → how many single nodes of it the graph has (Attention, GroupNormalization …).
    """

    file: str
    files: Mapping[str, str]
    dtype: str
    role: str
    network: str
    label: str = ""
    part: str = ""
    variant: str = ""
    rows: int | str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: Mapping[str, int]
    check: Check

    def __post_init__(self) -> None:
        if not (self.rows in ROWS or (type(self.rows) is int and self.rows > 0)):
            raise EngineError(f"component {self.file}: got rows {self.rows!r}, expected a number of them, or one of "
                              f"{', '.join(ROWS)}")

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions of its inputs and outputs, "batch" among them."""
        names = {d: None for spec in (*self.inputs, *self.outputs) for d in spec.shape if isinstance(d, str)}
        return tuple({"batch": None, **names})

    @property
    def groups(self) -> frozenset[str]:
        """The groups of tensors among its inputs."""
        return frozenset(spec.group for spec in self.inputs if spec.group)

    def row_counts(self, batch: int) -> tuple[int, ...]:
        """Return the batches of its engines for `batch` images drawn together: without guidance, and with it."""
        if isinstance(self.rows, int):
            return (self.rows,)
        return (batch,) if self.rows == "image" else (batch, 2 * batch)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition is one thing that the denoiser is told beside sample and time.

    meaning: "text", "pooled_text", "sizes", "noise_level", "mask", "masked_image", "depth", "low_resolution", "class",
    "boxes", "segmentation" … input: the denoiser's input that it goes to. source: what makes it: a "text_encoder",
    "numbers" of the request, its "label", its "picture" at the latents' size, its picture through the "first_stage" or
    through an "image_encoder" …
    fields: the options of a request whose numbers it is made of, in their order. channels: how many it joins to the
    sample's, 0 for an input of its own. classes: how many there are, of a class, of boxes or of a segmentation. null:
    the label that stands for none, in the row without the condition. slots: how many boxes a request may bring, and
    grid: in how many places a side they lie.
    """

    meaning: str
    input: str
    source: str
    fields: tuple[str, ...] = ()
    channels: int = 0
    classes: int = 0
    null: int | None = None
    slots: int = 0
    grid: int = 0


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The way in which a prediction is pushed towards the conditions.

    form: "none"; "classifier-free" (arXiv 2207.12598), on all channels; "channels", the same on the first `channels`
    of them; "ramp", with a scale that grows over the frames; "embedded", where the scale is the denoiser's `input`.
    negative: what the row without the conditions is told where a request has no negative prompt: the text of the empty
    "prompt", or "zeros".
    """

    form: str = "classifier-free"
    negative: str = "prompt"
    channels: int = 0
    input: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (("form", self.form, FORMS), ("negative", self.negative, ("prompt", "zeros"))):
            if value not in known:
                raise EngineError(f"manifest guidance {name}: got {value!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class LatentSpec:
    """The latents that are drawn: latent = (encoder mean − shift) · scale.

    factor: pixels a latent, along each side. multiple: sizes are multiples of so many latents. frames: pictures that
    are drawn together, of a video.
    """

    channels: int
    scale: float
    shift: float
    factor: int
    multiple: int
    frames: int = 1


@dataclass(frozen=True)
class TextSpec:
    """A text spec is a tokenizer and its encoder: files, tokens a prompt, the hidden layer the denoiser is given.

    hidden_layer: "last" (after the final norm) or "penultimate" (without a norm). pooled: the output that is the
    denoiser's pooled text; "" where there is none. kind: how its tokenizer splits a prompt.
    """

    component: str
    tokenizer: str
    max_length: int
    pad_id: int
    hidden_layer: str
    pooled: str = ""
    kind: str = "clip"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that the runtime knows of a model.

    kind: "latent-diffusion", "pixel-diffusion", "codes" … loop: what draws, a key of STEPS. family: of models, for
    people. tasks: what it does, the first where a request does not say. conditions: what the denoiser is told. dims:
    the dimensions of the graphs that follow from others, or have one size. first_stage: "kl", "vq" or "none".
    scheduler: the checkpoint's own scheduler_config, `_class_name` too. low_res_scheduler, max_noise_level: of an
    upscaler, the schedule of the noise in its low-resolution input and the highest level of it. default_size: (height,
    width) in pixels. defaults: values of options that a request leaves open and that are not the runtime's own.
    files: bundle files that belong to no component (tokenizer) → sha256. provenance: source, its hash, exporter and
    library versions, date.
    """

    format: int = FORMAT
    kind: str = "latent-diffusion"
    loop: str = "denoise"
    family: str
    tasks: tuple[str, ...]
    components: Mapping[str, Component]
    conditions: tuple[Condition, ...] = ()
    guidance: Guidance = Guidance()
    latent: LatentSpec
    first_stage: str = "kl"
    text: tuple[TextSpec, ...] = ()
    dims: Mapping[str, DimSpec] = field(default_factory=dict)
    scheduler: Mapping[str, Any]
    prediction_type: str
    low_res_scheduler: Mapping[str, Any] | None = None
    max_noise_level: int = 0
    default_size: tuple[int, int]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.loop not in STEPS:
            raise EngineError(f"manifest loop: got {self.loop!r}, expected one of {', '.join(STEPS)}")
        if not self.tasks:
            raise EngineError("manifest tasks: got none, expected what the model does; export the checkpoint again")

    @property
    def joined(self) -> tuple[Condition, ...]:
        """The conditions whose channels are joined to the sample's, in their order."""
        return tuple(condition for condition in self.conditions if condition.channels)

    def condition(self, meaning: str) -> Condition | None:
        """Return the condition of this meaning, None where the model is not told such."""
        return next((condition for condition in self.conditions if condition.meaning == meaning), None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, JSON values all the way down."""
        return dataclasses.asdict(self)


def read_manifest(directory: Path) -> Manifest:
    """Read `directory`/manifest.json. Raises EngineError where it is damaged or of another format."""
    file, do = directory / MANIFEST, f"export the checkpoint again: python -m export CHECKPOINT -o {directory} --force"
    try:
        data = json.loads(file.read_text(encoding="utf8"))
    except ValueError as e:
        raise EngineError(f"{file}: not JSON ({e}); {do}") from e
    if not isinstance(data, dict):
        raise EngineError(f"{file}: got {type(data).__name__}, expected an object; {do}")
    if (version := data.get("format")) != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise EngineError(f"{file}: got bundle format {version!r}, expected {FORMAT}; "
                          f"{'update latentrt, or ' if newer else ''}{do}")
    return parse(Manifest, data, str(file), do)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory`/manifest.json, or replace the one that is there by one rename."""
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    new = directory / f".{MANIFEST}.tmp"
    new.write_text(text, encoding="utf8")
    os.replace(new, directory / MANIFEST)
