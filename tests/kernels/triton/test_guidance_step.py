"""guidance_step: one launch against its reference in float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kernels.host.step_table import CLIP, DRAW, MEMORIES
from kernels.triton import guidance_step as op
from tests.cases.step import UPDATED, check_guidance, copied, guidance_arguments
from tests.cases.triton import DTYPES


@pytest.mark.parametrize("latent", [(1, 1, 2), (3, 5, 7), (4, 16, 16), (4, 36, 32)],
                         ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_matches_the_reference(dtype: str, memory: int, latent: tuple[int, ...]) -> None:
    """From less than one block to several, the last of them partly filled; 4·36·32 takes two chunks to rescale."""
    arguments = guidance_arguments(memory=memory, latent=latent, dtype=dtype)
    run = copied(arguments)
    op.launch(**run)
    check_guidance(arguments, run)


@pytest.mark.parametrize("latent", [(4, 64, 64), (4, 96, 96), (4, 128, 128)], ids=["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.gpu
def test_real_shapes_match_the_reference(dtype: str, latent: tuple[int, ...]) -> None:
    arguments = guidance_arguments(images=3, memory=3, latent=latent, dtype=dtype)
    run = copied(arguments)
    torch.ops.latentrt.guidance_step(**run)
    check_guidance(arguments, run)


def test_without_guidance_there_is_one_row_an_image() -> None:
    arguments = guidance_arguments(guided=False)
    run = copied(arguments)
    op.launch(**run)
    check_guidance(arguments, run)
    assert not run["sample"].isnan().any()


def test_a_kernel_that_is_one_percent_off_is_noticed() -> None:
    arguments = guidance_arguments(dtype="fp16")
    wrong = copied(arguments)
    wrong["controls"][:, 0] *= 1.01
    op.launch(**wrong)
    with pytest.raises(AssertionError, match=r"state: .* from the float64 result"):
        check_guidance(arguments, wrong)


def test_what_is_not_needed_is_not_read() -> None:
    """NaN in the noise of a row that draws none, in what nobody blends, in unused rows, and in an unguided half."""
    batch = guidance_arguments(images=2, rows=4)
    batch["controls"][:] = torch.tensor([1.0, 0.5, 0.0])
    batch["table"][:, :, DRAW] = -1
    batch["progress"][:] = torch.tensor([1, 3, 0], dtype=torch.int32)
    batch["table"][:, [0, 3]] = torch.nan
    for name in ("noise", "known"):
        batch[name][:] = torch.nan
    batch["noise_pred"][:2] = torch.nan
    op.launch(**batch)
    assert all(batch[name].isfinite().all() for name in UPDATED)


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["free", "clamped"])
def test_a_prediction_that_is_not_a_number_is_not_hidden(clip: float) -> None:
    batch = guidance_arguments()
    batch["table"][:, :, CLIP] = clip
    batch["noise_pred"][:, 0, 0, 0] = torch.nan
    op.launch(**batch)
    assert batch["state"][:, :, 0, 0, 0].isnan().all()


def test_an_image_that_is_done_stays_as_it_is_beside_one_that_is_not() -> None:
    batch = guidance_arguments(images=3)
    batch["progress"][:, 0] = torch.tensor([3, 1, 2])
    before = copied(batch)
    op.launch(**batch)
    assert batch["progress"].tolist() == [[3, 3, 0], [2, 3, 0], [3, 3, 0]]
    torch.testing.assert_close(batch["state"][0], before["state"][0], rtol=0, atol=0)
    assert not torch.equal(batch["state"][1], before["state"][1])
    assert not torch.equal(batch["state"][2], before["state"][2])
    written = [not batch["timestep"][row].isnan().item() for row in range(6)]
    assert written == [False, True, False] * 2, "after its last row an image has no next input"
    assert [not batch["sample"][row].isnan().all().item() for row in range(6)] == written


def test_noise_is_kept_for_as_many_draws_as_there_is_room() -> None:
    """One slot that is filled before every step gives what all draws in advance give."""
    many = guidance_arguments(rows=4, draws=4)
    one = copied(many)
    for i in range(3):
        one["progress"][:, 0] = many["progress"][:, 0] = i
        one["noise"] = many["noise"][:, i:i + 1].clone()
        op.launch(**many)
        op.launch(**one)
        torch.testing.assert_close(one["state"], many["state"], rtol=0, atol=0)


WRONG = {
    "state of two arrays of memory": ("state", lambda t: t[:, :3], ValueError, "state: got shape .* pad it"),
    "state in 16 bits": ("state", lambda t: t.half(), TypeError, r"state: got torch.float16, expected torch.float32"),
    "state with gaps": ("state", lambda t: t.transpose(3, 4).contiguous().transpose(3, 4), ValueError, "contiguous"),
    "noise_pred of three rows": ("noise_pred", lambda t: t[:3], ValueError, "noise_pred: got shape .* negative"),
    "noise_pred in 64 bits": ("noise_pred", lambda t: t.double(), TypeError, "sample: got torch.float32"),
    "noise without draws": ("noise", lambda t: t[:, :0], ValueError, "with at least one draw"),
    "noise of another size": ("noise", lambda t: t[..., :-1], ValueError, "noise: got shape"),
    "table of another memory": ("table", lambda t: t[..., :-1], ValueError, "table: got shape .*step_table.pack"),
    "controls without blending": ("controls", lambda t: t[:, :2], ValueError, "controls: got shape"),
    "known without a mask": ("known", lambda t: t[:, :2], ValueError, "known: got shape"),
    "sample of another dtype": ("sample", lambda t: t.half(), TypeError, "sample: got torch.float16"),
    "timestep of whole numbers": ("timestep", lambda t: t.long(), TypeError, "timestep: got torch.int64"),
    "progress in 64 bits": ("progress", lambda t: t.long(), TypeError, "progress: got torch.int64"),
    "progress elsewhere": ("progress", lambda t: t.to("meta"), ValueError, "progress: got a tensor on meta, expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_kernel_cannot_take_is_refused(case: str) -> None:
    name, change, error, message = WRONG[case]
    arguments = guidance_arguments()
    arguments[name] = change(arguments[name])
    before = copied({k: v for k, v in arguments.items() if v.device.type != "meta"})
    for run in (op.launch, torch.ops.latentrt.guidance_step):
        with pytest.raises(error, match=message):
            run(**arguments)
    for k, v in before.items():
        torch.testing.assert_close(arguments[k], v, rtol=0, atol=0, equal_nan=True)


def test_the_operator_on_a_cpu_is_the_reference() -> None:
    arguments = {name: t.cpu() for name, t in guidance_arguments(dtype="bf16").items()}
    expected = copied(arguments)
    op.reference(**expected)
    torch.ops.latentrt.guidance_step(**arguments)
    for name in (*UPDATED, "progress"):
        torch.testing.assert_close(arguments[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_opcheck(guided: bool) -> None:
    torch.library.opcheck(torch.ops.latentrt.guidance_step.default, (), guidance_arguments(guided=guided))


def test_every_variant_is_what_the_launcher_would_launch() -> None:
    found = {(v.signature["noise_pred_ptr"], v.constants["MEMORY"]): v for v in op.variants()}
    assert len(found) == len(DTYPES) * len(MEMORIES)
    for (_, memory), variant in found.items():
        assert (variant.constants["BLOCK"], variant.constants["CHUNK"], variant.num_warps) == (
            op.block(int(memory)), op.CHUNK, op.NUM_WARPS)
        assert variant.signature["sample_ptr"] == variant.signature["noise_pred_ptr"]
