"""TensorRT's long tasks, each in a process of its own.

The library crashes on some graphs (TensorRT-RTX 1.7.1: one tensor as query, key and value), asks nobody whether to go
on for most of a build (half a minute at Stable Diffusion 1.5's size), and holds several times the weights in memory.
A child that can be killed makes these an EngineError, a Ctrl-C at once, and memory that is given back.

`run` starts the child, `main`, which reads a task and its request from stdin and writes JSON messages, one a line.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from engines.spec import EngineError
from engines.tensorrt import build, measure

TASKS = {"build": build.build, "measure": measure.measure, "inspect": measure.inspect}
"""Task → what takes the request, JSON values, and a stream for progress, and returns the task's result."""

CHILD = "from engines.tensorrt.child import main; main()"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(task: str, request: Mapping[str, Any], failure: str) -> Any:
    """Return the result of one of TASKS. Raises EngineError with what the child said, or `failure` and how it died."""
    from tqdm import tqdm

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    with (tempfile.TemporaryFile("w+", errors="replace") as noise,
          tqdm(total=100, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}", leave=False, disable=None) as bar,
          subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise,
                           text=True, env=environment,
                           start_new_session=True) as child):  # of its own, so that Ctrl-C reaches us alone
        try:
            last = _follow(child, {"task": task, "request": request}, bar)
        finally:
            child.kill()
        if "result" in last:
            return last["result"]
        noise.seek(0)
        raise EngineError(last.get("error") or f"{failure}: the process died ({_ending(child.wait())}): "
                          f"{' '.join(noise.read().split())[-500:] or 'it said nothing'}; free memory (a build takes "
                          "three to four times the weights), or use another backend")


def _follow(child: subprocess.Popen[str], request: Mapping[str, Any], bar: Any) -> dict[str, Any]:
    """Show the child's progress; return its last message, an empty one where it ended without a word."""
    assert child.stdin and child.stdout
    try:
        with child.stdin:
            json.dump(request, child.stdin)
    except BrokenPipeError:
        child.wait()
        return {}
    last: dict[str, Any] = {}
    for line in child.stdout:
        message = json.loads(line)
        if "phase" not in message:
            last = message
            continue
        bar.set_description(message["phase"], refresh=False)
        bar.n = message["percent"]
        bar.refresh()  # at once: the phase that begins may say nothing for long
    return last if child.wait() == 0 else {}


def _ending(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def main() -> None:
    """Run as the child: one request from stdin, messages to stdout. What the library itself prints goes to stderr."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    tell: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    try:
        answer = {"result": TASKS[asked["task"]](asked["request"], tell)}
    except EngineError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), file=tell)
