"""A call watches its jobs while they run: a progress bar, and the requests' own callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.loop.job import Job
from runtime.request.request import Step


class Watch:
    """The jobs of one call, told of after each of their evaluations.

    What a callback raises ends the call, and no other that runs at the same time.
    """

    def __init__(self, jobs: Sequence[Job], bar: tqdm, picture: Callable[[np.ndarray], Image.Image]) -> None:
        """bar: counts evaluations. picture: decodes latents float32 [C, h, w], for previews."""
        self._jobs, self._bar, self._picture = jobs, bar, picture
        self._raised: list[Exception] = []
        for job in jobs:
            job.after_step = self._after_step

    def cancel(self) -> None:
        """Let the jobs leave before their next evaluation, whoever steps it."""
        for job in self._jobs:
            job.cancelled = True

    def check(self) -> None:
        """Raise what a callback raised, or what ended a job too early."""
        for error in (*self._raised, *(job.error for job in self._jobs if job.error)):
            raise error

    def _after_step(self, job: Job) -> None:
        self._bar.update()
        if (callback := job.request.on_step) is None or self._raised:
            return
        step = Step(job.image, job.row, job.table.rows, float(job.table.timesteps[job.row - 1]), job.latents,
                    lambda: self._picture(job.latents))
        try:
            unwanted = [job.request_index] if callback(step) is False else []
        except Exception as e:
            self._raised.append(e)
            unwanted = [other.request_index for other in self._jobs]
        for other in self._jobs:
            other.cancelled |= other.request_index in unwanted
