"""Full-size models with random weights: export reads them, they are made once, and only where there is memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.harness import measure, random_model, turns
from benchmarks.harness.networks import on_cpu
from export.families.stable_diffusion import StableDiffusion
from export.sources.architectures import CONFIGS
from export.sources.open import open_checkpoint

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 32}


def shrink(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the configuration that ships small widths, its two lowest levels and a VAE of one."""
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    unet, vae = config["unet"], config["vae"]
    unet |= {"block_out_channels": [32, 64], "cross_attention_dim": 32, "layers_per_block": 1,
             "down_block_types": unet["down_block_types"][-2:], "up_block_types": unet["up_block_types"][:2]}
    vae |= {"block_out_channels": [32], "layers_per_block": 1,
            "down_block_types": vae["down_block_types"][:1], "up_block_types": vae["up_block_types"][:1]}
    if family == "sdxl":
        unet |= {"cross_attention_dim": 64, "attention_head_dim": [4, 8], "transformer_layers_per_block": [1, 2],
                 "projection_class_embeddings_input_dim": 32 + 6 * 256}
        config["text_encoder_2"] |= TEXT
    config["text_encoder"] |= TEXT
    (tmp_path / f"{family}.json").write_text(json.dumps(config))
    monkeypatch.setattr("export.sources.architectures.CONFIGS", tmp_path)


def test_a_random_xl_checkpoint_is_one_that_export_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink("sdxl", tmp_path, monkeypatch)
    random_model._save("sdxl", 0, tmp_path / "checkpoint")
    model = StableDiffusion.read(open_checkpoint(tmp_path / "checkpoint"))
    assert model.family == "sdxl" and model.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert [tokenizer.pad_token_id for _, _, tokenizer in model.texts] == [49407, 0]
    assert model.modules["unet"]().model.add_embedding.linear_1.weight.std() > 0
    assert model.modules["text_encoder_2"]().model.text_projection.weight.shape == (32, 32)


def test_a_random_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once, the same each time, and its output has the scale of noise."""
    shrink("sd1", tmp_path, monkeypatch)
    bundle, checkpoint = random_model.make("sd1", directory=tmp_path)
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights.read_bytes()
    made = weights.stat().st_mtime_ns, (bundle / "manifest.json").stat().st_mtime_ns
    assert random_model.make("sd1", directory=tmp_path) == (bundle, checkpoint)
    assert made == (weights.stat().st_mtime_ns, (bundle / "manifest.json").stat().st_mtime_ns)
    workload = turns.Workload(bundle, checkpoint, 64, 64, 1, tmp_path)
    out = on_cpu._onnxruntime(workload)()
    assert 0.2 < out.std() < 5
    shutil.rmtree(checkpoint)
    random_model.make("sd1", directory=tmp_path)
    assert weights.read_bytes() == first


def test_without_memory_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda: 15e9)
    with pytest.raises(ValueError, match=r"--random sdxl: got 15\.0 GB of free memory, expected 15\.4 GB; end other"):
        random_model.make("sdxl", directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
