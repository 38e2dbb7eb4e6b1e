"""What every contender of one component computes: the same inputs, the same shapes, the same module of diffusers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import limits
from benchmarks.harness.turns import Job
from engines import Bundle, EngineConfig, store
from engines.bundle import resolve_dims


def rows(job: Job) -> int:
    """Of the component's batch: guidance takes two of a UNet for each picture."""
    return 2 * job.batch if job.component == "unet" else job.batch


def inputs(job: Job) -> dict[str, np.ndarray]:
    """Standard normal float32 inputs by name, the same for everyone; the timestep is 601, the crop of time_ids none."""
    bundle, rng = Bundle.open(job.bundle), np.random.default_rng(0)
    given = {"batch": rows(job), "height": job.height, "width": job.width, "sequence": bundle.tokens}
    dims = resolve_dims(bundle.component(job.component).dims, given, bundle.manifest.dims)
    arrays = {spec.name: rng.standard_normal(spec.resolve(dims).empty().shape).astype(np.float32)
              for spec in bundle.component(job.component).inputs}
    fixed = {"timestep": [601], "time_ids": [job.height, job.width, 0, 0, job.height, job.width]}
    for name in fixed.keys() & arrays.keys():
        arrays[name][:] = np.array(fixed[name], np.float32)
    return arrays


def engines_of(job: Job, bundle: Bundle, backend: str, dtype: str, *, whole: bool = False,
               **rest: Any) -> dict[str, EngineConfig]:
    """What our engines of a job are: component → config, the one that is timed last.

    A UNet in parts has text and time before it, which run once, as the runtime runs them. whole: not in parts.
    """
    parts = job.component == "unet" and not whole and store.in_parts(bundle, backend)
    names = ("unet_text", "unet_time", "unet_body") if parts else (job.component,)
    return {name: bundle.config(name, backend=backend, dtype=dtype, batch=rows(job),
                                size=(job.height, job.width), **rest) for name in names}


def configure_compiler(job: Job) -> None:
    """The job's cache directory for torch.compile; before torch is imported."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job.cache)
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")  # advice to who wrote the model


def freeze() -> None:
    """Let torch.compile take weights as constants, which it may repack for a CPU."""
    import torch._inductor.config

    torch._inductor.config.freezing = True


def torch_module(job: Job, dtype: str, device: str, compiler: Callable[[Any], Any]) -> Callable[[], Any]:
    """diffusers' component on `inputs(job)`, with its channels last in 16 bits; gives a tensor of its own precision.

    compiler: what the module's function is wrapped in.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = getattr(torch, limits.DTYPES[dtype])

    def placed(model: Any) -> Any:
        model = model.eval().to(device)
        return model if dtype == "fp32" else model.to(memory_format=torch.channels_last)

    feed = {name: torch.from_numpy(array).to(device) for name, array in inputs(job).items()}
    feed |= {name: x.to(kind) for name, x in feed.items() if name not in ("timestep", "time_ids")}
    if job.component == "vae_decoder":
        vae = placed(AutoencoderKL.from_pretrained(job.checkpoint, subfolder="vae", dtype=kind))
        decode, latents = compiler(vae.decode), feed["latents"] / vae.config.scaling_factor
        return lambda: decode(latents, return_dict=False)[0]
    unet = compiler(placed(UNet2DConditionModel.from_pretrained(job.checkpoint, subfolder="unet", dtype=kind)))
    added = {name: feed[name] for name in ("text_embeds", "time_ids") if name in feed}
    return lambda: unet(feed["sample"], feed["timestep"], feed["encoder_hidden_states"], added_cond_kwargs=added,
                        return_dict=False)[0]
