"""Tasks decide how the latents of an image start, what is blended in after a step, what else the denoiser is given.

A manifest says which of them its model does. Each is a file with `begin`, which turns a plan into jobs.
"""

from collections.abc import Iterator, Sequence

from runtime.loop.job import Job
from runtime.networks.denoiser import Inputs
from runtime.request.plan import Plan
from runtime.tasks import depth_to_image, image_to_image, inpaint, invert, text_to_image, upscale, video
from runtime.tasks.inpaint import paste
from runtime.tasks.model import Model

TASKS = {
    "text-to-image": text_to_image, "image-to-image": image_to_image, "inpaint": inpaint,
    "depth-to-image": depth_to_image, "upscale": upscale, "invert": invert, "video": video}

__all__ = ["TASKS", "Model", "jobs", "paste"]


def jobs(plans: Sequence[Plan], texts: Sequence[Inputs], model: Model) -> Iterator[Job]:
    """Yield the jobs of all images of `plans`; texts[i]: inputs of the denoiser that follow from it, [2, …]."""
    for index, (plan, text) in enumerate(zip(plans, texts, strict=True)):
        for job in TASKS[plan.task].begin(plan, model, text):
            job.request_index = index
            yield job
