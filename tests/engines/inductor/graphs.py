"""What the tests of this room share: small graphs of a few nodes, and configs of the backend."""

import numpy as np
import onnx
from onnx import helper as h
from onnx import numpy_helper


def proto(nodes, initializers, inputs, outputs=("y",)):
    """A model of these nodes. initializers: name → array; inputs: name → shape, float32."""
    tensors = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    arrays = [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()]
    return h.make_model(h.make_graph(nodes, "graph", tensors, out, arrays),
                        opset_imports=[h.make_opsetid("", 23)], ir_version=11)


def config(bundle, component="unet", **rest):
    return bundle.config(component, backend="inductor", **{"size": (64, 64), "batch": 2, **rest})
