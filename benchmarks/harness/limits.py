"""The floor that no implementation can beat: a model's floating-point operations over the machine's matrix rate.

Operations are counted as torch.utils.flop_counter does on tensors without memory: matrix products and convolutions, two
for each multiply-add. An algorithm that needs fewer, such as Winograd's for convolutions, could be faster.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import measure

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Precision → torch's name of it."""
NARROW = ("fp16", "bf16")
"""Precisions of 16 bits."""
SIZES = 6
"""How many numbers condition the UNet of Stable Diffusion XL beside the pooled text."""
RATES = {"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
"""Device → precisions whose matrix rate is measured."""


def count(module: Any, *inputs: Any, **options: Any) -> int:
    """Return the operations of one call of a torch module or function."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs, **options)
    return counter.get_total_flops()


def unet_flops(checkpoint: Path, rows: int, height: int, width: int, tokens: int = 77) -> int:
    """Return the operations of one call of the UNet on `rows` rows of height x width latents.

    Only the folder's configuration is read.
    """
    import torch
    from diffusers import UNet2DConditionModel

    config = _config(checkpoint, "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).eval()
        added = None
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(rows, pooled), "time_ids": torch.empty(rows, SIZES)}
        return count(unet, torch.empty(rows, config.get("in_channels", 4), height, width), torch.empty(rows),
                     torch.empty(rows, tokens, config["cross_attention_dim"]), added_cond_kwargs=added)


def vae_decoder_flops(checkpoint: Path, images: int, height: int, width: int) -> int:
    """Return the operations of decoding `images` pictures of height x width latents."""
    import torch
    from diffusers import AutoencoderKL

    config = _config(checkpoint, "vae")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config).eval()
        return count(vae.decode, torch.empty(images, config.get("latent_channels", 4), height, width))


def text_encoder_flops(checkpoint: Path, rows: int, tokens: int = 77) -> int:
    """Return the operations of encoding `rows` prompts with every text encoder.

    The last layer of XL's first encoder is not needed and not counted.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    models = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    here = [name for name in models if (checkpoint / name).is_dir()]
    flops = 0
    for name in here:
        config = CLIPTextConfig.from_dict(_config(checkpoint, name))
        config.num_hidden_layers -= name != here[-1]
        with torch.device("meta"):
            flops += count(models[name](config).eval(), torch.zeros(rows, tokens, dtype=torch.long))
    return flops


def matrix_seconds(dtype: str, device: str = "cpu") -> float:
    """Return the seconds of one square matrix product of side measure.MATRIX_SIDE[device], float32 without TF32.

    On a CPU the fastest of three, on a GPU the mean of as many as fill a tenth of a second.
    """
    import torch

    n = measure.MATRIX_SIDE[device]
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, DTYPES[dtype])).unbind()
    if device == "cuda":
        return _on_gpu(lambda: torch.matmul(a, b))
    seconds = []
    for _ in range(4):  # the first wakes the cores
        start = time.perf_counter()
        torch.matmul(a, b)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _on_gpu(call: Callable[[], Any]) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(calls: int) -> float:
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    seconds(2)
    return seconds(math.ceil(0.1 / seconds(2)))


def sample(flops: int, device: str = "cpu") -> dict[str, Any]:
    """Return the figures of one turn: operations of the work and of a matrix product, and seconds of that by dtype."""
    return {"flops": flops, "product": 2 * measure.MATRIX_SIDE[device] ** 3,
            "seconds": {dtype: matrix_seconds(dtype, device) for dtype in RATES[device]}}


def combine(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return operations, and by dtype the rate (FLOP/s, at the 20th percentile of seconds) and the floor in seconds.

    product_seconds keeps every sample in order: whether the machine was as fast from the first round to the last.
    """
    if not samples:
        return {}
    flops, product = samples[0]["flops"], samples[0]["product"]
    seconds = {dtype: [s["seconds"][dtype] for s in samples] for dtype in samples[0]["seconds"]}
    rates = {dtype: product / float(np.percentile(values, 20)) for dtype, values in seconds.items()}
    return {"flops": flops, "flop_per_second": rates,
            "floor_seconds": {dtype: flops / rate for dtype, rate in rates.items()}, "product_seconds": seconds}


def _config(checkpoint: Path, component: str) -> dict[str, Any]:
    return json.loads((checkpoint / component / "config.json").read_text(encoding="utf8"))
