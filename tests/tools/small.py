"""A bundle of three small hand-written graphs: the engines' tests need neither an export nor a checkpoint.

The graphs hold what the real ones hold (symbolic dims, Attention, GroupNormalization, Gelu, a sinusoidal timestep) and
run in milliseconds. The same call gives the same weights.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import helper as h
from onnx import numpy_helper

from engines.bundle import (
    Bundle,
    Check,
    Component,
    Condition,
    DimSpec,
    LatentSpec,
    Manifest,
    TextSpec,
    hash_files,
    write_manifest,
)
from engines.spec import TensorSpec

FACTOR, CHANNELS, TEXT, WIDTH, TOKENS = 8, 4, 32, 32, 77
DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SIZE: tuple[int | str, ...] = ("batch", CHANNELS, "latent_height", "latent_width")


PLACES: dict[str, tuple[str, int | str]] = {
    "text_encoder": ("text_encoder", 2), "unet": ("denoiser", "branch"), "vae_decoder": ("first_stage_decoder", 1)}
"""Component → its role and rows."""


def small_bundle(path: Path, dtype: str = "fp32", external: bool = True) -> Bundle:
    """Write the bundle at `path`; weights in files of their own, or inside the .onnx files."""
    path.mkdir(parents=True)
    graphs = {"text_encoder": _text_encoder(dtype), "unet": _unet(dtype), "vae_decoder": _vae_decoder(dtype)}
    components = {}
    for name, (model, inputs, outputs) in graphs.items():
        file = f"{name}.onnx"
        onnx.save(model, path / file, save_as_external_data=external, location=f"{file}.data", size_threshold=256)
        files = [f.name for f in sorted(path.glob(f"{name}.onnx*"))]
        sites: dict[str, int] = {}
        for node in model.graph.node:
            sites[node.op_type] = sites.get(node.op_type, 0) + 1
        role, rows = PLACES[name]
        components[name] = Component(
            file=file, files=hash_files(path, files), dtype=dtype, role=role, network=name, rows=rows,
            inputs=tuple(inputs), outputs=tuple(outputs), sites=sites, check=Check("itself", 0, 0.0, 0.0))
    write_manifest(path, Manifest(
        family="small", tasks=("text-to-image",), components=components,
        conditions=(Condition(meaning="text", input="encoder_hidden_states", source="text_encoder"),),
        scheduler={"_class_name": "DDIMScheduler"}, prediction_type="epsilon",
        latent=LatentSpec(CHANNELS, 0.18215, 0.0, FACTOR, 1),
        text=(TextSpec("text_encoder", "tokenizer/tokenizer.json", TOKENS, 0, "last"),),
        default_size=(64, 64), files={}, provenance={"source": "small"},
        dims={f"latent_{side}": DimSpec(side, FACTOR) for side in ("height", "width")}))
    return Bundle.open(path)


def _text_encoder(dtype: str):
    graph = _Graph(dtype)
    x = graph("Gather", [graph.weight("embedding", (512, TEXT)), "input_ids"])
    x = graph("Attention", [x, x, x], is_causal=1, q_num_heads=4, kv_num_heads=4)
    graph.last(x, "hidden_states")
    return graph.model([TensorSpec("input_ids", "int64", ("batch", TOKENS))],
                       [TensorSpec("hidden_states", "float32", ("batch", TOKENS, TEXT))])


def _unet(dtype: str):
    graph = _Graph(dtype)
    angle = graph("Mul", [graph("Unsqueeze", ["timestep", graph.constant([1])]),
                          graph.weight("frequencies", value=np.geomspace(1, 1e-4, WIDTH // 2), dtype="fp32")])
    time = graph("Concat", [graph("Sin", [angle]), graph("Cos", [angle])], axis=1)
    time = graph("MatMul", [graph.narrow(time), graph.weight("time.weight", (WIDTH, WIDTH))])
    x = graph("Conv", [graph.narrow("sample"), graph.weight("conv_in.weight", (WIDTH, CHANNELS, 3, 3)),
                       graph.weight("conv_in.bias", (WIDTH,))], pads=[1, 1, 1, 1])
    x = graph("Add", [x, graph("Unsqueeze", [time, graph.constant([2, 3])])])
    y = graph("GroupNormalization", [x, graph.weight("norm.weight", (WIDTH,)), graph.weight("norm.bias", (WIDTH,))],
              num_groups=8, epsilon=1e-5)
    y = graph("Mul", [y, graph("Sigmoid", [y])])
    tokens = graph("Transpose", [graph("Reshape", [y, graph.constant([0, WIDTH, -1])])], perm=[0, 2, 1])
    text = graph.narrow("encoder_hidden_states")
    query, key, value = (graph("MatMul", [source, graph.weight(f"{name}.weight", (WIDTH, WIDTH))])
                         for name, source in (("query", tokens), ("key", text), ("value", text)))
    tokens = graph("Add", [tokens, graph("Attention", [query, key, value], q_num_heads=4, kv_num_heads=4)])
    tokens = graph("Gelu", [graph("LayerNormalization", [tokens, graph.weight("layer.weight", (WIDTH,))])])
    y = graph("Reshape", [graph("Transpose", [tokens], perm=[0, 2, 1]), graph("Shape", [x])])
    y = graph("Conv", [y, graph.weight("conv_out.weight", (CHANNELS, WIDTH, 3, 3))], pads=[1, 1, 1, 1])
    graph.last(y, "noise_pred")
    return graph.model([TensorSpec("sample", "float32", SIZE),
                        TensorSpec("timestep", "float32", ("batch",), span=(0, 1000)),
                        TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence", TEXT))],
                       [TensorSpec("noise_pred", "float32", SIZE)])


def _vae_decoder(dtype: str):
    graph = _Graph(dtype)
    scales = graph.weight("scales", value=np.array([1, 1, FACTOR, FACTOR]), dtype="fp32")
    x = graph("Resize", [graph.narrow("latents"), "", scales], mode="nearest")
    x = graph("Conv", [x, graph.weight("conv.weight", (3, CHANNELS, 3, 3))], pads=[1, 1, 1, 1])
    graph.last(x, "image")
    return graph.model([TensorSpec("latents", "float32", SIZE)],
                       [TensorSpec("image", "float32", ("batch", 3, "height", "width"))])


class _Graph:
    """Nodes and weights in the order they are asked for; calling it adds a node and names its output."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(7)

    def __call__(self, op: str, inputs: list[str], **attributes) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(h.make_node(op, inputs, [name], **attributes))
        return name

    def weight(self, name: str, shape=(), value=None, dtype: str | None = None) -> str:
        if value is None:
            value = self.rng.standard_normal(shape) * 0.5 / np.sqrt(np.prod(shape[1:]) or 1) + (len(shape) == 1)
        self.weights.append(numpy_helper.from_array(value.astype(DTYPES[dtype or self.dtype]), name))
        return name

    def constant(self, value: list[int]) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def narrow(self, name: str) -> str:
        return name if self.dtype == "fp32" else self("Cast", [name], to=h.np_dtype_to_tensor_dtype(DTYPES[self.dtype]))

    def last(self, name: str, output: str) -> None:
        self.nodes.append(h.make_node("Cast", [name], [output], to=onnx.TensorProto.FLOAT))

    def model(self, inputs: list[TensorSpec], outputs: list[TensorSpec]):
        infos = [[h.make_tensor_value_info(s.name, h.np_dtype_to_tensor_dtype(np.dtype(s.dtype)), s.shape)
                  for s in specs] for specs in (inputs, outputs)]
        graph = h.make_graph(self.nodes, "small", *infos, self.weights)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)], ir_version=11)
        onnx.checker.check_model(model)
        return model, inputs, outputs
