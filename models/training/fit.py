"""The loop that every stage of the training shares, on one device or on several processes that average weights."""

import argparse
import copy
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from models.training.optimizer import MuonAndAdamW

logger = logging.getLogger(__name__)

AVERAGE_EVERY = 8
"""Steps between two averagings of the workers' weights."""


class Worker:
    """A worker is one of the processes that train together: its rank, its randomness and its device."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.args, self.work = rank, args, Path(args.work)
        self.device = torch.device(args.device)
        self.rng = Random(f"{args.seed} {rank}")
        torch.manual_seed(args.seed * 1000 + rank)

    @property
    def first(self) -> bool:
        """Return whether it is the one that reports and saves."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """Return a context in which torch computes in bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def average(self, tensors: list[Tensor], progress: float) -> float:
        """Replace tensors by their mean over all workers, and return the mean progress, the same on each of them."""
        if self.args.workers == 1:
            return progress
        flat = torch.cat([t.reshape(-1) for t in tensors] + [torch.tensor([progress], device=self.device)])
        dist.all_reduce(flat)
        flat /= self.args.workers
        parts = flat[:-1].split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
        return float(flat[-1])


def fit(
    worker: Worker,
    name: str,
    module: nn.Module,
    loss: Callable[[float], Tensor],
    *,
    lr: float,
    minutes: float,
    batch: int,
    ema_decay: float = 0.0,
    muon: bool = False,
    report: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Minimise `loss` over a stage's minutes; go on from its checkpoint if there is one.

    Args:
        loss: draws a batch and returns its mean loss; told how much of the stage is done, 0 to 1.
        ema_decay: of the averaged weights, per averaging of the workers; 0 returns the last weights.
        muon: use MuonAndAdamW instead of AdamW.
        report: called with the averaged weights by the first worker every --report-minutes.

    Returns:
        The module with its averaged weights.
    """
    path = worker.work / f"{name}.pt"
    state = {"progress": 0.0, "seconds": 0.0, "samples": 0}
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = MuonAndAdamW(params, lr) if muon else torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), fused=True)
    ema = copy.deepcopy(module).requires_grad_(False)
    ema_params = [e for e, p in zip(ema.parameters(), module.parameters(), strict=True) if p.requires_grad]
    if path.exists():
        saved = torch.load(path, map_location=worker.device)
        module.load_state_dict(saved["module"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    step = averaged = 0
    base, start, reported = state["seconds"], time.monotonic(), time.monotonic()
    state["progress"] = base / (60 * minutes)
    bar = tqdm(total=100, desc=name, unit="%", disable=None if worker.first else True, mininterval=10)
    running: list[float] = []
    while state["progress"] < 1:
        decay = 0.5 * (1 + math.cos(math.pi * state["progress"]))
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.02 + 0.98 * decay) * min(1.0, (step + 1) / 200)
        value = loss(state["progress"])
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running.append(float(value.detach()))
        step += 1
        if step % AVERAGE_EVERY:
            continue

        state["seconds"] = base + time.monotonic() - start
        state["progress"] = worker.average([p.data for p in params], state["seconds"] / (60 * minutes))
        state["samples"] += AVERAGE_EVERY * batch * worker.args.workers
        averaged += 1
        keep = min(ema_decay, averaged / (averaged + 10)) if ema_decay else 0.0
        torch._foreach_lerp_(ema_params, [p.data for p in params], 1 - keep)
        bar.n = int(100 * state["progress"])
        bar.set_postfix(loss=np.mean(running[-200:]), samples=state["samples"])
        if worker.first and (time.monotonic() - reported > 60 * worker.args.report_minutes or state["progress"] >= 1):
            rate, spent = state["samples"] / state["seconds"], state["seconds"] / 60
            mean = np.mean(running[-200:])
            logger.info("%s: %d samples, %.0f/s, %.1f min, loss %.5f", name, state["samples"], rate, spent, mean)
            saved = {"module": module.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"state": state}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            if report is not None:
                report(ema)
            reported = time.monotonic()
    bar.close()
    return ema
