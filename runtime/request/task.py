"""The task of a request: which one its pictures say, and whether that task and the model have all its options."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.bundle import Manifest
from runtime.request.option import changed, defaults_of, options_of
from runtime.request.request import Request

NEEDS = {name: declared.tasks or () for name, declared in options_of(Request).items() if declared.needed}
"""The tasks that need a picture, by the name of its option; no other task takes it."""

SAID_BY = {"frames": "video", "mask": "inpaint", "image": "image-to-image"}
"""The task that a request wants by the first of these pictures that it has."""


def fields_of(manifest: Manifest) -> frozenset[str]:
    """Return the options of a request whose numbers the denoiser of this model is given."""
    return frozenset(field for condition in manifest.conditions for field in condition.fields)


def takes_mask(manifest: Manifest) -> bool:
    """Return whether the denoiser is given the mask itself."""
    return manifest.condition("mask") is not None


def task_of(request: Request, manifest: Manifest) -> str:
    """Return the task of a request: the only one of the model, or the one whose pictures the request brings.

    Raises ValueError where one is missing, or an option is given that this task or this model does not have.
    """
    task = _asked_for(request, manifest)
    values = changed(request)
    for name, tasks in NEEDS.items():
        if task in tasks and name not in values:
            raise ValueError(f"{name}: got none, expected one, for this model does {task}; pass {name}=…")
    for name, tasks in NEEDS.items():
        if task not in tasks and name in values:
            raise ValueError(f"{name}: got one, but {task} takes none; leave it out, or use a model that does "
                             f"{' or '.join(tasks)}")
    fields = fields_of(manifest)
    for name, declared in options_of(request).items():
        if name in values and not (declared.fits(task, values[name])
                                   and (not declared.condition or declared.condition in fields)):
            raise ValueError(declared.refusal.format(name=name, value=_shown(values[name]), task=task,
                                                     family=manifest.family))
    if task == "inpaint" and request.blend != "current" and takes_mask(manifest):
        raise ValueError(f"blend: got {request.blend!r} for a model that takes the mask itself, expected none; "
                         "leave it out")
    return task


def _asked_for(request: Request, manifest: Manifest) -> str:
    tasks = manifest.tasks
    wanted = next((task for name, task in SAID_BY.items() if name in changed(request)), "text-to-image")
    task = wanted if wanted in tasks else tasks[0]
    if wanted == "video" != task:
        raise ValueError(f"frames: got a video, expected none: this {manifest.family} model does {', '.join(tasks)}; "
                         "use one that starts from latents alone, exported by this version")
    if request.task == "invert" and request.output != "latent":
        raise ValueError(f"output: got {request.output!r} for a picture to invert, expected 'latent': what comes "
                         "of it is noise, to be passed on as latents=…")
    if request.task is not None and request.task not in tasks:
        raise ValueError(f"task: got {request.task!r}, expected one of {', '.join(tasks)}, which is what this "
                         f"{manifest.family} model does; use a model that does {request.task}")
    return request.task or task


def blank(manifest: Manifest, size: tuple[int, int]) -> Request:
    """Return a short request that the model can honour, with empty pictures. size: (height, width) in pixels."""
    grey = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size)
    task = manifest.tasks[0]
    options: dict[str, Any] = {name: grey if name == "depth" else np.stack([grey] * 3, axis=2)
                               for name, tasks in NEEDS.items() if task in tasks}
    if options_of(Request)["strength"].fits(task, 1.0):
        options["strength"] = 1.0
    return Request("", height=size[0], width=size[1], steps=4, seed=0, **options)


def value_without(name: str) -> Any:
    """Return the value of an option for a request that leaves it out: its fallback, or its default."""
    declared = options_of(Request)[name]
    return declared.fallback if declared.fallback is not None else defaults_of(Request)[name]


def _shown(value: Any) -> str:
    return f"an array {value.shape}" if isinstance(value, np.ndarray) else repr(value)
