"""The rows of a sampler table that a request runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.request.request import Request
from runtime.schedulers import Table, inversion_table, make_table


def table_of(request: Request, task: str, config: Mapping[str, Any]) -> Table:
    """Return the rows of the solver that a request runs, whose strength is filled in where its task has one.

    config: the checkpoint's scheduler_config, whose solver is taken unless the request names another. Raises ValueError
    for a solver or steps that cannot be, or where none is left of them.
    """
    if task == "invert":
        return inversion_table(config, request.steps)
    steps = None if request.timesteps is not None else request.steps

    def table(start: int = 0) -> Table:
        return make_table(config, steps, scheduler=request.scheduler, eta=request.eta, timesteps=request.timesteps,
                          start=start)

    whole, first = table(), 0
    trained = int(config.get("num_train_timesteps", 1000))
    if request.denoising_start is not None:
        rows = int((whole.timesteps < round(trained * (1 - request.denoising_start))).sum())
        first = whole.rows - rows - (whole.order == 2 and rows % 2 == 0)
    elif request.strength is not None:
        asked = len(request.timesteps or ()) or request.steps
        first = max(asked - min(int(asked * request.strength), asked), 0) * whole.order
    if first >= whole.rows:
        raise ValueError(f"strength, denoising_start: got {request.strength} and {request.denoising_start} of "
                         f"{request.steps} steps, of which none is left; take more")
    run = table(first) if first else whole
    if request.denoising_end is not None:
        run = run.first(int((run.timesteps >= round(trained * (1 - request.denoising_end))).sum()))
    return run
