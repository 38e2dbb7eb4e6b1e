"""A sampler as a table: per UNet evaluation one linear update of sample, model output, a short memory and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

Vector = np.ndarray
"""float64 [slots + 4]: coefficients of one linear combination, in the order of `columns`."""


class Row(NamedTuple):
    """A row is one UNet evaluation, as the solvers write it; its fields are those of `Table`."""

    timestep: float
    predict: tuple[float, float]
    mix: list[Vector]
    signal: float
    sigma: float
    input_scale: float = 1.0
    clip: float = 0.0
    draws: bool = False


class Columns(NamedTuple):
    """Unit vectors: solvers write an update as a sum of these, as a paper does."""

    x: Vector
    p: Vector
    memory: np.ndarray
    noise: Vector
    m: Vector


def columns(slots: int) -> Columns:
    """The unit vectors of a solver with `slots` arrays of memory; `memory` is [slots, slots + 4]."""
    unit = np.eye(slots + 4)
    return Columns(unit[0], unit[1], unit[2:2 + slots], unit[-2], unit[-1])


@dataclass(frozen=True, eq=False)
class Table:
    """Everything a run of one sampler needs, float64, one row per UNet evaluation.

    The state of an image is [1 + slots, C, h, w]: the sample x, then the solver's memory s1 … sS. Row i does

        m     = unet(input_scale[i] * x, timesteps[i]), guided
        p     = predict[i, 0] * x + predict[i, 1] * m, clamped to ±clip[i] where clip[i] > 0
        state = mix[i] @ [x, p, s1 … sS, noise, m]

    timesteps: [n], some solvers use fractions. input_scale: [n]. predict: [n, 2]; p is the predicted x0, the noise or a
    derivative, whatever the solver combines. clip: [n]. mix: [n, 1 + slots, slots + 4]. draws: bool [n], the row takes
    one randn of the image's generator. signal, sigma: [n], the forward process at row i, x = signal * x0 + sigma *
    noise. init_scale: x of row 0 is init_scale * randn. order: table rows per solver step: image to image that skips k
    steps skips k * order rows (`start` of `make_table`).

    Raises ValueError for arrays that do not fit together or are not finite.
    """

    timesteps: np.ndarray
    input_scale: np.ndarray
    predict: np.ndarray
    clip: np.ndarray
    mix: np.ndarray
    draws: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    init_scale: float = 1.0
    order: int = 1

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        if n == 0:
            raise ValueError("sampler table: got no rows, expected at least one; take more steps or skip fewer (start)")
        memory = self.mix.shape[1] - 1 if self.mix.ndim == 3 else 0
        expected: dict[str, tuple[int, ...]] = {"predict": (n, 2), "mix": (n, 1 + memory, memory + 4)}
        expected |= dict.fromkeys(("timesteps", "input_scale", "clip", "draws", "signal", "sigma"), (n,))
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"sampler table {name}: got shape {array.shape}, expected {shape}; use Table.of")
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise ValueError(f"sampler table {name}: got a value that is not finite in row {row} (timestep "
                                 f"{self.timesteps[row]:g}), expected finite numbers: this scheduler is not defined "
                                 "for these settings; use fewer steps, another scheduler, or final_sigmas_type, "
                                 "prediction_type and rescale_betas_zero_snr that fit together")
            array.flags.writeable = False
        if not np.isfinite(self.init_scale) or self.order < 1:
            raise ValueError(f"sampler table: got init_scale {self.init_scale} and order {self.order}, expected a "
                             "finite number and a whole number of at least 1")

    @classmethod
    def of(cls, rows: Iterable[Row], *, init_scale: float = 1.0, order: int = 1) -> Self:
        """The table of a solver's rows. Raises ValueError as the class does."""
        table = list(rows)
        fields = {name: np.array([getattr(row, name) for row in table], float)
                  for name in ("input_scale", "predict", "clip", "mix", "signal", "sigma")}
        fields |= {"timesteps": np.array([row.timestep for row in table], float),
                   "draws": np.array([row.draws for row in table], bool)}
        return cls(**fields, init_scale=float(init_scale), order=order)

    @property
    def rows(self) -> int:
        """UNet evaluations of the whole run."""
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        """Arrays of solver memory beside the sample."""
        return self.mix.shape[1] - 1

    def first(self, rows: int) -> Table:
        """The table that ends after `rows` rows."""
        arrays = {f.name: getattr(self, f.name)[:rows] for f in dataclasses.fields(self)
                  if isinstance(getattr(self, f.name), np.ndarray)}
        return dataclasses.replace(self, **arrays)

    def following(self) -> Table:
        """The table whose signal and sigma are those after a row, not before it: of the next, and at the end clean."""
        return dataclasses.replace(self, signal=np.append(self.signal[1:], 1.0), sigma=np.append(self.sigma[1:], 0.0))
