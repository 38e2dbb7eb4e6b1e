"""diffusers' own modules, eager or compiled: peers on a CPU and on a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.harness import limits
from benchmarks.harness.networks.inputs import inputs
from benchmarks.harness.turns import Workload


def configure_compiler(workload: Workload) -> None:
    """Give torch.compile the workload's cache directory. Called before torch is imported."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(workload.cache)
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")  # advice to who wrote the model


def freeze() -> None:
    """Let torch.compile take weights as constants, which it may repack for a CPU."""
    import torch._inductor.config

    torch._inductor.config.freezing = True


def torch_module(workload: Workload, dtype: str, device: str, compiler: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a call of diffusers' component on `inputs(workload)`, which gives a tensor of the component's precision.

    In 16 bits its channels are last. compiler: wraps the module's function.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = getattr(torch, limits.DTYPES[dtype])

    def placed(model: Any) -> Any:
        model = model.eval().to(device)
        return model if dtype == "fp32" else model.to(memory_format=torch.channels_last)

    feed = {name: torch.from_numpy(array).to(device) for name, array in inputs(workload).items()}
    feed |= {name: x.to(kind) for name, x in feed.items() if name not in ("timestep", "time_ids")}
    if workload.component == "vae_decoder":
        vae = placed(AutoencoderKL.from_pretrained(workload.checkpoint, subfolder="vae", dtype=kind))
        decode, latents = compiler(vae.decode), feed["latents"] / vae.config.scaling_factor
        return lambda: decode(latents, return_dict=False)[0]
    unet = compiler(placed(UNet2DConditionModel.from_pretrained(workload.checkpoint, subfolder="unet", dtype=kind)))
    added = {name: feed[name] for name in ("text_embeds", "time_ids") if name in feed}
    return lambda: unet(feed["sample"], feed["timestep"], feed["encoder_hidden_states"], added_cond_kwargs=added,
                        return_dict=False)[0]
