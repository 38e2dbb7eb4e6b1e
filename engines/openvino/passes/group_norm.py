"""Our group norm in the place of OpenVINO's, with the SiLU after it."""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.openvino.extension import Make
from engines.openvino.passes.match import nodes, silu


def replace_group_norm(ov: Any, model: Any, group_norm: Make) -> int:
    """Replace group norm, with the SiLU that may follow, by ours; return at how many sites.

        before   x ─▶ GroupNormalization ─▶ Sigmoid, Multiply ─▶ …
        after    x ─▶ Transpose ─▶ GroupNormSilu ─▶ Transpose ─▶ …

    Ours has its channels last, as the plugin's convolutions have them. The plugin sees that the transpositions move
    nothing, and no longer converts between the layouts of its own group norm and of its convolutions.
    """
    opset, count = ov.opset13, 0
    for op in nodes(model, "GroupNormalization"):
        x, weight, bias = op.input_values()
        end, rank = silu(op), len(x.get_shape())
        to_last, to_first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        y = opset.transpose(x, opset.constant(np.array(to_last)))
        attributes = {"groups": op.get_attributes()["num_groups"], "eps": op.get_attributes()["epsilon"],
                      "silu": end is not None, "channels_last": True}
        y = group_norm([y.output(0), weight, bias], attributes)
        y = opset.transpose(y, opset.constant(np.array(to_first)))
        (end or op).output(0).replace(y.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count
