"""Our attention in the place of OpenVINO's, with the transposes around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.openvino.extension import Make
from engines.openvino.passes.match import is_swap, nodes, number

HEAD_DIMS = range(8, 1025, 8)
"""Head dims that our kernel computes."""


def replace_attention(ov: Any, model: Any, attention: Make) -> int:
    """Replace OpenVINO's attention by ours wherever ours computes the same; return at how many sites.

        before   q, k, v ─▶ Transpose ─▶ ScaledDotProductAttention ─▶ Transpose ─▶ …
        after    q, k, v ─▶ Attention ─▶ …    it reads and writes [batch, tokens, heads, head dim] as it lies

    Without all four transposes the site becomes ours too, on [batch, heads, tokens, head dim].
    """
    count = 0
    for op in nodes(model, "ScaledDotProductAttention"):
        q, k, v, *rest = op.input_values()
        scale = _scale(rest)
        if scale is None or not _fits(q.get_shape(), k.get_shape(), v.get_shape()):
            continue
        users = [target.get_node() for target in op.output(0).get_target_inputs()]
        swapped = all(is_swap(value.get_node()) for value in (q, k, v)) and len(users) == 1 and is_swap(users[0])
        inputs = [value.get_node().input_value(0) if swapped else value for value in (q, k, v)]
        attributes = {"scale": scale, "causal": op.get_attributes()["causal"], "heads_first": not swapped}
        out = attention(inputs, attributes)
        (users[0] if swapped else op).output(0).replace(out.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _scale(rest: Sequence[Any]) -> float | None:
    """Return the factor of the scores, 0 for the usual one; None for a mask, or a factor known only at run time."""
    mask, scale = ([number(value) for value in rest] + [0.0, 0.0])[:2]
    return scale if mask == 0 else None


def _fits(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> bool:
    return len(q) == 4 and list(k) == list(v) and list(q[:2]) == list(k[:2]) and q[3] == k[3] and q[3] in HEAD_DIMS
