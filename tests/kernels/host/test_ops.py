"""The numpy twins against the torch references of the same ops; those of small ops are tested beside their kernels."""

from __future__ import annotations

import numpy as np
import torch

from kernels import calls
from kernels.host import ops
from kernels.triton import guidance_step, to_image
from tests.cases.step import guidance_arguments


def test_everything_that_the_runtime_launches_has_a_twin() -> None:
    assert tuple(ops.OPS) == calls.OPS


def test_guidance_step_is_its_reference_but_for_the_next_input() -> None:
    """Guided, rescaled and blended images, one that is not, and one that is done."""
    arguments = {name: t.cpu() for name, t in guidance_arguments(images=4, rows=4).items()}
    arguments["progress"][3, 0] = 4
    truth = {name: t.double() if t.is_floating_point() else t.clone() for name, t in arguments.items()}
    guidance_step.reference(**truth)
    run = {name: t.numpy().copy() for name, t in arguments.items()}
    ops.guidance_step(**run)
    assert run["progress"].tolist() == truth["progress"].tolist()
    np.testing.assert_allclose(run["state"], truth["state"].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run["state"][3], arguments["state"][3].numpy())
    assert np.isnan(run["sample"]).all() and np.isnan(run["timestep"]).all(), "the next input is step_input's"


def test_to_image_is_its_reference() -> None:
    """A good part of the values out of range, and one that is not a number."""
    x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3, 4] = torch.nan
    out = np.full((2, 12, 10, 3), 77, np.uint8)
    ops.to_image(x.numpy(), out)
    np.testing.assert_array_equal(out, to_image.reference(x).numpy())
