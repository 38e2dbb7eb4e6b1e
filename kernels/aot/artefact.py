"""Kernels that were built ahead of time, as the files in DIR/sm_NN describe them. Needs the standard library only.

    DIR/sm_90/NAME.json                     signature, and which files belong to it
    DIR/sm_90/NAME.<hash>.cubin  .ptx       machine code, and the same as text for a driver to compile

The JSON file is replaced last and names the others by content: an artefact is the old one or the new one, never half.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
ARCHS = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are built for."""

SCRATCH = (("global_scratch", "*u8"), ("profile_scratch", "*u8"))
"""Arguments that Triton appends to every kernel. Ours use no scratch memory: pass null pointers."""


class KernelError(RuntimeError):
    """A kernel that cannot be built, read or launched. The message says got / expected / do."""


@dataclass(frozen=True)
class Artefact:
    """An artefact is one kernel compiled for one GPU architecture.

    op, name: as in `Variant`. arch: "sm_90". entry: the symbol to look up in the code. arguments: (name, Triton type)
    in the order of launch, the two unused scratch pointers last. constants: values that are compiled in. divisible:
    arguments that must be divisible by 16 (pointers: aligned to 16 bytes). block: threads of a program. shared: bytes
    of dynamic shared memory. num_warps, num_stages: as Triton's. triton: its version. source: hash of the kernel's
    source. files: "cubin" and "ptx" → file name. hashes: the same → sha256. directory: where the files are.
    """

    op: str
    name: str
    arch: str
    entry: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, int | float | bool | str]
    divisible: tuple[str, ...]
    block: tuple[int, int, int]
    shared: int
    num_warps: int
    num_stages: int
    triton: str
    source: str
    files: Mapping[str, str]
    hashes: Mapping[str, str]
    format: int = FORMAT
    directory: Path = field(default=Path(), compare=False)

    @classmethod
    def read(cls, directory: Path | str, name: str, arch: str) -> Artefact:
        """Return the artefact of one kernel for one architecture in the build output `directory`.

        Raises KernelError where it was not built, is damaged, or is of a newer format.
        """
        path = Path(directory) / arch / f"{name}.json"
        do = f"build it: python -m kernels build --arch {arch} -o {directory}"
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf8")), path)
        except FileNotFoundError as e:
            there = ", ".join(sorted(p.name for p in Path(directory).glob("sm_*") if (p / path.name).is_file()))
            raise KernelError(f"{path}: no such kernel, expected one that was built; there is "
                              f"{there or 'none for any architecture'}; {do}") from e
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise KernelError(f"{path}: not a readable kernel signature ({e}); {do}") from e

    @classmethod
    def from_json(cls, data: dict[str, Any], path: Path) -> Artefact:
        """Return the artefact that `to_json` wrote to `path`. Raises ValueError, TypeError or KeyError."""
        if data["format"] > FORMAT:
            raise ValueError(f"got format {data['format']}, this version reads up to {FORMAT}; update latentrt")
        known = {f.name for f in dataclasses.fields(cls)} - {"directory"}
        if data.keys() != known:
            raise ValueError(f"got the keys {sorted(data)}, expected {sorted(known)}")
        data = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        data["arguments"] = tuple((name, kind) for name, kind in data["arguments"])
        return cls(**data, directory=path.parent)

    def to_json(self) -> dict[str, Any]:
        """Return all but the directory, as JSON takes it."""
        data = dataclasses.asdict(self)
        del data["directory"]
        return data

    def code(self, kind: str) -> bytes:
        """Return the bytes of the "cubin" or "ptx". Raises KernelError where they are missing or were changed."""
        path = self.directory / self.files[kind]
        try:
            code = path.read_bytes()
        except OSError as e:
            raise KernelError(f"{path}: cannot be read ({e}); {self._rebuild()}") from e
        if hashlib.sha256(code).hexdigest() != self.hashes[kind]:
            raise KernelError(f"{path} is damaged; {self._rebuild()}")
        return code

    def _rebuild(self) -> str:
        return f"build it again: python -m kernels build --arch {self.arch} -o {self.directory.parent}"


def artefacts(directory: Path | str) -> Iterator[Artefact]:
    """Yield every artefact of the build output `directory`, by architecture and name; raises as `Artefact.read`."""
    for path in sorted(Path(directory).glob("sm_*"), key=lambda p: (len(p.name), p.name)):
        for file in sorted(path.glob("*.json")):
            yield Artefact.read(directory, file.stem, path.name)


def arch_for(capability: int) -> str:
    """Return the architecture of `ARCHS` whose code a GPU of compute capability `capability` (90: 9.0) runs.

    Code for 7.x and 8.x also runs on later GPUs of the same major version; from 9.0 on, ours is for exactly one.
    Raises KernelError where there is none.
    """
    if capability in ARCHS:
        return f"sm_{capability}"
    older = [arch for arch in ARCHS if arch // 10 == capability // 10 < 9 and arch < capability]
    if not older:
        raise KernelError(f"compute capability: got {capability / 10:.1f}, expected one of "
                          f"{', '.join(f'{arch / 10:.1f}' for arch in ARCHS)}; no kernel is built for this GPU")
    return f"sm_{older[-1]}"
