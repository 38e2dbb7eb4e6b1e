"""PNDM: pseudo linear multistep, optionally begun with pseudo Runge-Kutta steps; arXiv 2202.09778."""

from __future__ import annotations

import numpy as np

from runtime.schedulers.config import Settings
from runtime.schedulers.predict import noise_from
from runtime.schedulers.schedule import alphas_cumprod, check_range, whole_timesteps
from runtime.schedulers.table import Columns, Row, Table, Vector, columns

# Adams-Bashforth weights of the newest, second newest … model output (arXiv 2202.09778 eq. 13 for four).
_WEIGHTS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_RUNGE_KUTTA_STEPS = 4


def pndm(settings: Settings, steps: int, start: int) -> Table:
    """The multistep method of §3.3. Its second row repeats the first step from the saved sample, with two outputs.

    A run that starts later counts its rows from there, as diffusers does: its own second row is the one that repeats.
    """
    if steps > settings["num_train_timesteps"]:
        raise ValueError(f"steps: got {steps}, expected at most the {settings['num_train_timesteps']} training "
                         "timesteps; use fewer")
    stride = settings["num_train_timesteps"] // steps
    ascending = whole_timesteps(settings, steps)[::-1]
    if settings["skip_prk_steps"]:
        runge_kutta = np.array([], np.int64)
        multistep = np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]
    else:
        runge_kutta, multistep = _with_runge_kutta(ascending, stride)
    times = check_range(np.concatenate([runge_kutta, multistep]), settings)
    solver = _Solver(settings, slots=3 if settings["skip_prk_steps"] else 5)
    rows = []
    for count, t in enumerate(int(t) for t in times[start:]):
        if count < len(runge_kutta):
            there = t - (0 if count % 2 else stride // 2)
            here = int(runge_kutta[count // 4 * 4])
            mix = solver.runge_kutta(count, here, there)
        else:
            mix = solver.multistep(count, t, stride)
        rows.append(Row(t, (0.0, 1.0), mix, solver.signal[t]**0.5, (1 - solver.signal[t])**0.5))
    return Table.of(rows)


def _with_runge_kutta(ascending: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    if len(ascending) < _RUNGE_KUTTA_STEPS:
        raise ValueError(f"steps: got {len(ascending)} for a PNDM scheduler with skip_prk_steps false, expected at "
                         f"least {_RUNGE_KUTTA_STEPS}; use more steps or skip_prk_steps true")
    halves = ascending[-_RUNGE_KUTTA_STEPS:].repeat(2) + np.tile([0, stride // 2], _RUNGE_KUTTA_STEPS)
    return halves[:-1].repeat(2)[1:-1][::-1], ascending[:-3][::-1]


class _Solver:
    """Memory: the three newest outputs, then for Runge-Kutta the sum of outputs and the sample a step began with.

    Without Runge-Kutta that sample lives in the third output's place, which nothing needs before it is read.
    """

    def __init__(self, settings: Settings, slots: int) -> None:
        self.signal = alphas_cumprod(settings).astype(np.float64)
        self.final = 1.0 if settings["set_alpha_to_one"] else self.signal[0]
        self.prediction_type = settings["prediction_type"]
        self.columns: Columns = columns(slots)
        self.outputs = 0

    def multistep(self, count: int, t: int, stride: int) -> list[Vector]:
        x, p, memory, *_ = self.columns
        older, rest = memory[:3], list(memory[3:])
        if count == 1:
            return [self._step(older[2], (p + older[0]) / 2, t + stride, t), *older, *rest]
        history = [p, *older[:self.outputs]]
        output = sum(w * e for w, e in zip(_WEIGHTS[len(history) - 1], history, strict=True))
        self.outputs = min(self.outputs + 1, 3)
        return [self._step(x, output, t, t - stride), p, older[0], x if count == 0 else older[1], *rest]

    def runge_kutta(self, count: int, t: int, there: int) -> list[Vector]:
        x, p, memory, *_ = self.columns
        *older, total, begun = memory
        stage = count % 4
        if stage == 0:
            self.outputs = min(self.outputs + 1, 3)
            return [self._step(x, p, t, there), p, *older[:2], _RUNGE_KUTTA[0] * p, x]
        total = total + _RUNGE_KUTTA[stage] * p
        return [self._step(begun, total if stage == 3 else p, t, there), *older, total, begun]

    def _step(self, sample: Vector, output: Vector, t: int, there: int) -> Vector:
        """Eq. 11 of arXiv 2202.09778: move `sample` from timestep t to `there` along the noise in `output`."""
        now, then = self.signal[t], self.signal[there] if there >= 0 else self.final
        of_x, of_m = noise_from(self.prediction_type, now**0.5, (1 - now)**0.5)
        noise = of_x * sample + of_m * output
        slope = (then - now) / (now * (1 - then)**0.5 + (now * (1 - now) * then)**0.5)
        return (then / now)**0.5 * sample - slope * noise
