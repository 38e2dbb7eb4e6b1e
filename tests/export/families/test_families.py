"""A family is one class and one line: here that of DDPM in pixels (arXiv 2006.11239), which latentrt does not ship."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from engines.bundle import Component, Guidance, LatentSpec, Manifest
from engines.spec import TensorSpec
from export import ExportError, export, families
from export.families.family import Family
from export.sources.checkpoint import Checkpoint
from export.trace.traced_module import Cut, TracedModule
from tests.tolerances import EXPORT_REL_RMS
from tests.tools.graphs import opened, rel_rms, run_in_order


class Denoiser(TracedModule):
    """Noisy picture and a timestep for each row → the noise in it."""

    source = "unet"
    role = "denoiser"
    rows = "image"
    cuts = (Cut("time", ("timestep",), rows=32, shape=("batch", None)),)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        picture = ("batch", model.config["in_channels"], "height", "width")
        self.inputs = (TensorSpec("sample", "float32", picture),
                       TensorSpec("timestep", "float32", ("batch",), span=(0, 1000)))
        self.outputs = (TensorSpec("noise_pred", "float32", picture),)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.model(sample.to(self.dtype), timestep, return_dict=False)[0].float()


@dataclass(frozen=True)
class Pixels:
    pipelines: ClassVar[tuple[str, ...]] = ("DDPMPipeline",)
    title: ClassVar = "DDPM in pixels"

    checkpoint: Checkpoint

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.pipeline in cls.pipelines

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        return cls(checkpoint)

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def weights(self) -> tuple[Path, ...]:
        return self.checkpoint.weights(["unet"])

    @property
    def modules(self) -> dict[str, Callable[[], TracedModule]]:
        return {"unet": lambda: Denoiser(self.checkpoint.load("unet", UNet2DModel))}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {}

    def sizes(self, check: bool) -> dict[str, int]:
        return {"batch": 3, "height": 8, "width": 16} if check else {"batch": 2, "height": 24, "width": 32}

    def precision(self, network: str, dtype: str) -> str:
        return dtype

    def manifest(self, components: Mapping[str, Component], files: Mapping[str, str],
                 provenance: Mapping[str, Any]) -> Manifest:
        return Manifest(kind="pixel-diffusion", family="ddpm", tasks=("text-to-image",), components=components,
                        guidance=Guidance(form="none"), latent=LatentSpec(3, 1.0, 0.0, 1, 2), first_stage="none",
                        scheduler=self.checkpoint.config("scheduler"), prediction_type="epsilon", default_size=(32, 32),
                        files=files, provenance=provenance)


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(1)
    unet = UNet2DModel(sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_a_new_family(folder, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"got a DDPMPipeline, expected one of StableDiffusionPipeline.* are supp"):
        opened(folder)
    known: tuple[type[Family], ...] = (*families.FAMILIES, Pixels)
    monkeypatch.setattr(families, "FAMILIES", known)
    bundle = export(folder, tmp_path / "ddpm.bundle", progress=False)
    graphs = bundle.graphs(bundle.denoiser)
    assert {name: (c.role, c.part, c.rows) for name, c in graphs.items()} == {
        "unet": ("denoiser", "", "image"), "unet_time": ("denoiser", "time", 32),
        "unet_body": ("denoiser", "body", "image")}
    assert graphs["unet"].sites == {"Attention": 4, "GroupNormalization": 21}
    assert all(c.check.rel_rms < EXPORT_REL_RMS["fp32"] for c in graphs.values())
    sample, times = torch.randn(1, 3, 16, 16), torch.tensor([500.0])
    with torch.no_grad():
        expected = UNet2DModel.from_pretrained(folder / "unet")(sample, times).sample.numpy()
    got, = run_in_order(bundle.path / graphs["unet"].file, (sample, times))
    assert rel_rms(got, expected) < EXPORT_REL_RMS["fp32"]
