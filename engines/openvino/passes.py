"""What the openvino backend changes in a graph between reading and compiling; `ov` is the openvino package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engines.onnx.initializers import Initializer
from engines.onnx.low_rank import LowRank, Weight, constant

OWN_HEAD_DIMS = range(8, 1025, 8)
SWAP = [0, 2, 1, 3]  # tokens and heads
HALF = "#half"  # between the name of a weight and the number of its half


def own_attention(ov: Any, model: Any, attention: Callable[..., Any]) -> int:
    """Replace OpenVINO's attention by ours wherever ours computes the same; returns at how many sites.

    before   q, k, v ─▶ Transpose ─▶ ScaledDotProductAttention ─▶ Transpose ─▶ …
    after    q, k, v ─▶ Attention ─▶ …    it reads and writes [batch, tokens, heads, head dim] as it lies

    attention: makes a node from inputs and attributes.
    """
    count = 0
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]:
        q, k, v, *rest = op.input_values()
        scale = _scale(rest)
        if scale is None or not _fits(q.get_shape(), k.get_shape(), v.get_shape()):
            continue
        users = [target.get_node() for target in op.output(0).get_target_inputs()]
        swapped = all(_is_swap(value.get_node()) for value in (q, k, v)) and len(users) == 1 and _is_swap(users[0])
        inputs = [value.get_node().input_value(0) if swapped else value for value in (q, k, v)]
        attributes = {"scale": scale, "causal": op.get_attributes()["causal"], "heads_first": not swapped}
        out = attention(inputs, attributes)
        (users[0] if swapped else op).output(0).replace(out.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def own_group_norm(ov: Any, model: Any, group_norm: Callable[..., Any]) -> int:
    """Replace group norm, with the SiLU that may follow, by ours; returns at how many sites.

    before   x ─▶ GroupNormalization ─▶ Sigmoid, Multiply ─▶ …
    after    x ─▶ Transpose ─▶ GroupNormSilu ─▶ Transpose ─▶ …    channels last, as the plugin's convolutions have them

    The plugin sees that the transpositions move nothing, and no longer converts between the layouts of its own group
    norm and of its convolutions. group_norm: makes a node from inputs and attributes.
    """
    opset, count = ov.opset13, 0
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "GroupNormalization"]:
        x, weight, bias = op.input_values()
        silu, rank = _silu(op), len(x.get_shape())
        to_last, to_first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        y = opset.transpose(x, opset.constant(np.array(to_last)))
        attributes = {"groups": op.get_attributes()["num_groups"], "eps": op.get_attributes()["epsilon"],
                      "silu": silu is not None, "channels_last": True}
        y = group_norm([y.output(0), weight, bias], attributes)
        y = opset.transpose(y, opset.constant(np.array(to_first)))
        (silu or op).output(0).replace(y.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def halve_gates(ov: Any, model: Any) -> int:
    """Multiply by each half of a weight where the product is split in two anyway; returns at how many sites.

    before   x ─▶ MatMul(w), Add(b) ─▶ Split ─▶ …      a feed-forward whose one half gates the other
    after    x ─▶ MatMul(w₁), Add(b₁) ─▶ … and x ─▶ MatMul(w₂), Add(b₂) ─▶ …

    Nothing is copied, and the activation of the gate becomes part of its product.
    """
    opset, count = ov.opset13, 0
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "Split" and op.get_output_size() == 2]:
        if (found := _linear(op.input_value(0).get_node())) is None or not _halves_last(op):
            continue
        x, weight, bias, transposed = found
        weights = opset.split(weight, opset.constant(np.int64(0 if transposed else 1)), 2)
        biases = opset.split(bias, opset.constant(np.int64(len(bias.get_shape()) - 1)), 2)
        for half in range(2):
            product = opset.matmul(x, weights.output(half), False, transposed)
            op.output(half).replace(opset.add(product, biases.output(half)).output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _linear(add: Any) -> tuple[Any, Any, Any, bool] | None:
    """(x, weight, bias, whether the weight is transposed) of x · weight + bias with a constant weight; else None."""
    for product, bias in (add.input_values(), add.input_values()[::-1]) if add.get_type_name() == "Add" else ():
        node = product.get_node()
        if node.get_type_name() == "MatMul" and len(product.get_target_inputs()) == 1:
            x, weight = node.input_values()
            attributes = node.get_attributes()
            if (_is_constant(weight) and len(weight.get_shape()) == 2 and _is_constant(bias)
                    and bias.get_shape()[-1:] == product.get_shape()[-1:] and not attributes["transpose_a"]):
                return x, weight, bias, attributes["transpose_b"]
    return None


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def _halves_last(split: Any) -> bool:
    """Whether a Split divides the last axis of a value that nothing else reads."""
    axis = _number(split.input_value(1))
    value = split.input_value(0)
    return axis in (-1, len(value.get_shape()) - 1) and len(value.get_target_inputs()) == 1


def narrow(ov: Any, model: Any) -> None:
    """Make a float32 graph one of bfloat16 between its inputs and outputs, which stay float32.

    The plugin computes in bfloat16 either way; but to nodes of ours it gives what their inputs say, and conversions
    before and after every one of them would copy each tensor twice. Weights are rounded here, to nearest even: a
    Convert that the plugin folds cuts their last bits off, which adds a quarter to the error of a UNet. The weight and
    bias of our group norm stay float32.
    """
    opset = ov.opset13
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if not op.get_output_size() or op.get_output_element_type(0).to_string() != "f32":
            continue
        users = [user for user in op.output(0).get_target_inputs()
                 if not (user.get_node().get_type_name() == "GroupNormSilu" and user.get_index())]
        if not users:
            continue
        if kind == "Parameter":
            value = opset.convert(op, "bf16").output(0)
        elif (source := _behind(op)) is not None:
            rounded = _rounded(ov, constant(_bits(source)))
            rounded.set_friendly_name(source.get_friendly_name())
            value = rounded.output(0)
        elif kind == "Convert":
            value = opset.convert(op.input_value(0), "bf16").output(0)
        else:
            continue
        for user in users:
            user.replace_source_output(value)
    for result in model.get_results():
        source = result.input_value(0)
        names = source.get_tensor().get_names()
        wide = opset.convert(source, "f32")
        source.get_tensor().set_names(set())
        wide.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def _behind(op: Any) -> Any:
    """The constant that `op` is, or converts; else None."""
    node = op.input_value(0).get_node() if op.get_type_name() == "Convert" else op
    return node if node.get_type_name() == "Constant" else None


def _rounded(ov: Any, value: LowRank) -> Any:
    """A bfloat16 constant, rounded to nearest even; what is finite stays so."""
    tensor = ov.Tensor(ov.Type.bf16, ov.Shape(list(value.shape)))
    value.into(tensor.data.view(np.uint16))
    return ov.op.Constant(tensor)


def _bits(constant: Any) -> np.ndarray:
    """Values of a constant; numpy has no bfloat16, so OpenVINO gives its bits as float16, and they are uint16 here."""
    data = constant.get_data()
    return data.view(np.uint16) if constant.get_output_element_type(0).to_string() == "bf16" else data


def _silu(op: Any) -> Any:
    """The node that ends op · sigmoid(op), where nothing else reads `op`; else None."""
    users = {target.get_node().get_type_name(): target.get_node() for target in op.output(0).get_target_inputs()}
    if set(users) == {"Swish"} and len(op.output(0).get_target_inputs()) == 1:
        return users["Swish"]
    if set(users) == {"Multiply", "Sigmoid"} and len(op.output(0).get_target_inputs()) == 2:
        factors = {value.get_node().get_friendly_name() for value in users["Multiply"].input_values()}
        if factors == {op.get_friendly_name(), users["Sigmoid"].get_friendly_name()}:
            return users["Multiply"]
    return None


def _scale(rest: Sequence[Any]) -> float | None:
    """The factor of the scores, 0 for the usual one; None where there is a mask, or a factor known only at run time."""
    mask, scale = ([_number(value) for value in rest] + [0.0, 0.0])[:2]
    return scale if mask == 0 else None


def _number(value: Any) -> float | None:
    """A constant of one element, behind conversions or not; None for anything else."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "ConvertLike"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().reshape(()))


def _fits(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> bool:
    return len(q) == 4 and list(k) == list(v) and list(q[:2]) == list(k[:2]) and q[3] == k[3] and q[3] in OWN_HEAD_DIMS


def _is_swap(node: Any) -> bool:
    if node.get_type_name() != "Transpose" or (order := node.input_value(1).get_node()).get_type_name() != "Constant":
        return False
    return [int(axis) for axis in order.get_data()] == SWAP


def cut_angles(ov: Any, model: Any) -> Any:
    """Take the sines and cosines of inputs out of `model`; returns the model that computes them, None without any.

    before   timestep ─▶ Multiply ─▶ Sin ─▶ MatMul …
    after    timestep ─▶ Multiply ─▶ Sin ─▶ "angle0"  (returned)      "angle0" ─▶ MatMul …  (`model`)
    """
    apart = model.clone()
    results: list[Any] = []
    twins = {op.get_friendly_name(): op for op in apart.get_ordered_ops()}
    used: set[str] = set()
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]:
        twin = twins[op.get_friendly_name()]
        above = _above(twin)
        if any(node.get_type_name() in ("MatMul", "Convolution") for node in above):
            continue
        name = f"angle{len(results)}"
        handed = ov.opset13.parameter(list(op.get_output_shape(0)), op.get_output_element_type(0), name=name)
        handed.output(0).get_tensor().set_names({name})
        op.output(0).replace(handed.output(0))
        model.add_parameters([handed])
        result = ov.opset13.result(twin.output(0))
        twin.output(0).get_tensor().set_names({name})
        results.append(result)
        used |= {node.get_friendly_name() for node in above}
    if not results:
        return None
    for parameter in list(model.get_parameters()):
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    return ov.Model(results, [p for p in apart.get_parameters() if p.get_friendly_name() in used], "angles")


def _above(node: Any) -> list[Any]:
    """Every node that `node` depends on."""
    found: dict[str, Any] = {}
    todo = [value.get_node() for value in node.input_values()]
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            todo += [value.get_node() for value in node.input_values()]
    return list(found.values())


def replace(ov: Any, model: Any, weights: Mapping[str, Weight], known: Mapping[str, Initializer]) -> set[str]:
    """Put floating-point values in place of the constants named after initializers; returns which were found.

    A constant keeps its element type: 16 bits are rounded to nearest even. `model` may have been through any of the
    passes here. known: the initializers. Raises EngineError for values that do not fit one.
    """
    constants: dict[str, list[Any]] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            constants.setdefault(op.get_friendly_name().partition(HALF)[0], []).append(op)
    found = set(weights) & set(constants)
    for name in found:
        value = known[name].check(name, weights[name])
        for old in constants[name]:
            new = _like(ov, old, value if isinstance(value, LowRank) else constant(value))
            new.set_friendly_name(old.get_friendly_name())
            old.output(0).replace(new.output(0))
    return found


def _like(ov: Any, old: Any, value: LowRank) -> Any:
    """A constant of the element type of `old`, and of its half of `value` where it is one."""
    _, half, number = old.get_friendly_name().partition(HALF)
    if half:
        value = value.rows(int(number) * len(value) // 2, (int(number) + 1) * len(value) // 2)
    if (kind := old.get_element_type().to_string()) == "bf16":
        return _rounded(ov, value)
    return ov.op.Constant(value.into(np.empty(value.shape, np.float16 if kind == "f16" else np.float32)))  # it copies


def fold_halves(ov: Any, model: Any) -> int:
    """Cut constants in two where `halve_gates` left that to every compilation; returns how many.

    before   w ─▶ Split(axis 0) ─▶ …       after    w₁, w₂ ─▶ …
    """
    count = 0
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "Split" and op.get_output_size() == 2]:
        whole = op.input_value(0).get_node()
        if whole.get_type_name() != "Constant" or _number(op.input_value(1)) != 0:
            continue
        for number, half in enumerate(np.split(whole.get_data(), 2)):
            tensor = ov.Tensor(whole.get_element_type(), ov.Shape(list(half.shape)))
            tensor.data[...] = half
            constant = ov.op.Constant(tensor)
            constant.set_friendly_name(f"{whole.get_friendly_name()}{HALF}{number}")
            op.output(number).replace(constant.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def widen(ov: Any, model: Any) -> None:
    """Make a 16-bit graph compute in float32: every conversion to 16 bits, and every 16-bit weight, gives float32."""
    opset = ov.opset13
    for op in model.get_ordered_ops():
        if not op.get_output_size() or op.get_output_element_type(0).to_string() not in ("f16", "bf16"):
            continue
        if op.get_type_name() == "Convert":
            op.output(0).replace(opset.convert(op.input_value(0), "f32").output(0))
        elif op.get_type_name() == "Constant":
            users = list(op.output(0).get_target_inputs())
            wide = opset.convert(op, "f32")
            for user in users:
                user.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()
