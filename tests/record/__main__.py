"""Draw every task on every engine and keep it to the bit: did a change that must draw the same draw the same?

  python -m tests.record.inputs CASES                      once: what is drawn from
  python -m tests.record CASES before                      with the code as it was
  python -m tests.record CASES after --against before      with the code as it is
  python -m tests.record CASES after --against before      again: nothing is drawn, the two are compared
  python -m tests.record CASES trial --against before --only "lora*" xl --engines onnxruntime-fp32

CASES is what `python -m tests.record.inputs` made. OUT gets bundles/ (exported from CASES first, 7 minutes
on two cores), a .npz for every engine and case, and, once all of them are drawn, index.json with dtype, shape and
sha256 of every array. One OUT is one state of the code: bundles that are there are used again, and one with an
index.json is only compared. With --only or --engines what is chosen is drawn and compared, and no index written.

Of every request are kept: latents, pictures, pictures in float32 (`Pipeline.decode`), whether it was cancelled, which
pictures were withheld, the size, seed and strength that were filled in, and of every call of on_step its numbers, the
latents and, in some cases, a preview. Nothing is imported but what every version must have: `Pipeline`, `Request`,
`Control`, `Lora`.

Bits depend on the processor and on the versions of the engines: index.json says which, and a comparison of records
that differ in them says so. OpenVINO's also depend on our C++ kernels (kernels/*.so): build them before both. The exit
status is 1 where anything differs or could not be drawn.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import logging
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from tests.record.draws import CASES, Draw

BUNDLES = {
    "sd1": ("sd1", "net0 --as net0", "net1 --as net1"),
    "sd1-file": ("sd1.safetensors --config {cases}/sd1 --dtype fp16", "vae --encoder"),
    "sd2": ("sd2",), "inpainting": ("inpainting",), "inpainting_2": ("inpainting_2",), "depth": ("depth",),
    "upscaler": ("upscaler",), "sdxl": ("sdxl", "net-xl --as net0"), "refiner": ("refiner",),
    "shapes": ("shapes", "shapes-edges --as edges"),
}
"""Bundle → what is exported, and what then joins it: files of CASES and options of `python -m export`."""

ENGINES = {"onnxruntime-fp32": ("onnxruntime", "fp32"), "openvino-fp32": ("openvino", "fp32"),
           "openvino-bf16": ("openvino", "bf16")}


def export(cases: Path, bundles: Path, name: str) -> None:
    """Export a bundle of BUNDLES, unless that is done already, which an empty file NAME.done says."""
    done, start = bundles / f"{name}.done", time.perf_counter()
    if done.exists():
        return
    first, *others = BUNDLES[name]
    for words, target in ((first, ["--force", "-o"]), *((other, ["--into"]) for other in others)):
        checkpoint, *options = words.format(cases=cases).split()
        command = [sys.executable, "-m", "export", str(cases / checkpoint), *target, str(bundles / name), *options]
        subprocess.run([*command, "--quiet"], check=True)
    done.touch()
    print(f"exported {name} in {time.perf_counter() - start:.0f} s", flush=True)


def machine() -> dict[str, str]:
    """What the bits depend on beside the code."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"cpu": cpu[1] if cpu else platform.processor(), "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow", "tokenizers", "onnxruntime", "openvino", "torch")}}


def record(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Draw the chosen cases: ENGINE/CASE → array → what index.json says of it. A case that fails is left out."""
    bundles, index, start = args.out / "bundles", {}, time.perf_counter()
    bundles.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: export(args.cases, bundles, name), BUNDLES))
    for engine in args.engines:
        (args.out / engine).mkdir(exist_ok=True)
        draw = Draw(bundles, *ENGINES[engine])
        for name in args.chosen:
            draw.arrays, begun = {}, (time.perf_counter(), time.process_time())
            try:
                CASES[name](draw, args.cases)
            except Exception:
                print(f"{engine} {name} failed:\n{traceback.format_exc()}", flush=True)
                continue
            np.savez(args.out / engine / f"{name}.npz", **draw.arrays)  # type: ignore[arg-type]
            index[f"{engine}/{name}"] = {key: about(array) for key, array in draw.arrays.items()}
            seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
            print(f"{engine} {name}: {len(draw.arrays)} arrays, {seconds:.1f} s, {cpu:.1f} s of CPU", flush=True)
    print(f"{len(index)} cases drawn in {time.perf_counter() - start:.0f} s", flush=True)
    return index


def about(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest()}


def compare(out: Path, index: Mapping[str, Mapping[str, Any]], other: Path, before: Mapping[str, Any]) -> int:
    """Print every array that differs, and a last line; the exit status."""
    differ = 0
    for case in dict.fromkeys([*before, *index]):
        old, new = before.get(case, {}), index.get(case, {})
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                differ += 1
                print(f"{case} {name}: " + (difference(other, out, case, name) if name in old and name in new else
                                            f"only in {other if name in old else out}"))
    arrays = sum(map(len, index.values()))
    print(f"{len(index)} cases, {arrays} arrays: {f'{differ} differ' if differ else 'all equal to the bit'}")
    return 1 if differ else 0


def difference(other: Path, out: Path, case: str, name: str) -> str:
    a, b = (np.load(at / f"{case}.npz")[name] for at in (other, out))
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} before, {b.dtype} {list(b.shape)} now"
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return f"max abs {apart.max():.3g}, {np.count_nonzero(apart)} of {apart.size} values"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="cases: " + ", ".join(CASES))
    parser.add_argument("cases", type=lambda text: Path(text).resolve(), metavar="CASES", help="what is drawn from")
    parser.add_argument("out", type=Path, metavar="OUT", help="where bundles and what is drawn go")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="compare with what another run recorded there")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help='some cases, as "inpaint*"')
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
                        help=f"some of {', '.join(ENGINES)}")
    args = parser.parse_args()
    args.chosen = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    keys = [f"{engine}/{name}" for engine in args.engines for name in args.chosen]
    logging.disable(logging.WARNING)
    file = args.out / "index.json"
    if file.exists():
        found = json.loads(file.read_text())
        found["cases"] = {key: found["cases"][key] for key in keys}
    else:
        print(f"draws with {Path(runtime.__file__).parent}", flush=True)
        found = {"machine": machine(), "cases": record(args)}
        if len(found["cases"]) == len(ENGINES) * len(CASES):
            file.write_text(json.dumps(found, indent=1) + "\n")
    status = 0 if len(found["cases"]) == len(keys) else 1
    if args.against:
        before = json.loads((args.against / "index.json").read_text())
        for name, value in before["machine"].items():
            if found["machine"].get(name) != value:
                print(f"note: {name} was {value}, is {found['machine'].get(name)}")
        status |= compare(args.out, found["cases"], args.against, {key: before["cases"].get(key, {}) for key in keys})
    return status


if __name__ == "__main__":
    sys.exit(main())
