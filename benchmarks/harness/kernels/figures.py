"""Rates, limits and ratios of latentrt's kernels, and the tables that show them. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.harness import measure

if TYPE_CHECKING:
    from benchmarks.harness.kernels.bench import Bench


def figures(bench: Bench, spreads: Mapping[str, Mapping[str, float]], device: str) -> dict[str, dict[str, Any]]:
    """Return for each of latentrt's kernels its rate, the limit and its share of it, the fastest peer and the ratio.

    spreads: contender → median, p20 and p80 of its seconds; empty where nothing was timed.
    """
    if not spreads:
        return {}
    limits = {"copy": spreads["copy"]["p20"]}
    if bench.flops:
        limits["matmul"] = spreads["matmul"]["p20"] * bench.flops / (2 * measure.MATRIX_SIDE[device] ** 3)
    bound = max(limits, key=lambda name: limits[name])
    peers = {name: spreads[name]["median"] for name in bench.peers if name in spreads}
    of_ours: dict[str, dict[str, Any]] = {}
    for name in bench.ours:
        if name not in spreads:
            continue
        median = spreads[name]["median"]
        of_ours[name] = {"gb_per_second": bench.moved / median / 1e9, "tflop_per_second": bench.flops / median / 1e12,
                         "limited_by": bound, "limit_seconds": limits[bound], "share": limits[bound] / median}
        if peers:
            fastest = min(peers, key=lambda name: peers[name])
            of_ours[name] |= {"fastest_peer": fastest, "ratio": peers[fastest] / median}
    return of_ours


def show(results: Sequence[dict[str, Any]], device: str) -> None:
    """Print a table for each op and dtype, then what was left out and why."""
    scale, unit = (1e6, "µs") if device == "cuda" else (1e3, "ms")
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in results):
        group = [r for r in results if (r["op"], r["dtype"]) == (op, dtype)]
        peers = dict.fromkeys(name for r in group for name in (*r["seconds"], *r["left_out"])
                              if not name.startswith("latentrt") and name not in ("copy", "matmul"))
        rows = [_row(result, name, op, list(peers), scale) for result in group for name in result["ours"]]
        if rows:
            print(f"\n{op} {dtype}, {unit}\n{measure.table(rows)}")
    reasons: dict[str, list[str]] = {}
    for r in results:
        for name, reason in r["left_out"].items():
            reasons.setdefault(f"{r['op']} {r['dtype']} {name}: {reason}", []).append(r["case"])
    for reason, shapes in reasons.items():
        print(f"left out: {reason} ({', '.join(shapes)})", file=sys.stderr)


def _row(result: dict[str, Any], name: str, op: str, peers: list[str], scale: float) -> dict[str, str]:
    def text(contender: str, key: str = "median") -> str:
        spread = result["seconds"].get(contender)
        return f"{spread[key] * scale:.4g}" if spread else "-"

    of_ours = result["ours"][name]
    rate = ({"TFLOP/s": f"{of_ours['tflop_per_second']:.3g}"} if op == "attention" else
            {"GB/s": f"{of_ours['gb_per_second']:.4g}"})
    return {"shape": result["case"], "ours": name, "median": text(name), "p20": text(name, "p20"),
            "p80": text(name, "p80"), **rate, "limit": f"{of_ours['limit_seconds'] * scale:.4g}",
            "by": of_ours["limited_by"], "share": f"{of_ours['share']:.0%}", **{peer: text(peer) for peer in peers},
            "ratio": f"{of_ours['ratio']:.2f} x" if "ratio" in of_ours else "-"}
