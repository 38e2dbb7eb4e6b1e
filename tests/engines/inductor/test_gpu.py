"""Engines of the inductor backend on a GPU."""

import numpy as np
import pytest

from engines.check import compare
from engines.check.tolerance import TOLERANCE
from engines.store import store
from tests.engines.cases import rel_rms, unet, weights
from tests.engines.inductor.graphs import config
from tests.tolerances import ENGINE_REL_RMS
from tests.tools.small import small_bundle

torch = pytest.importorskip("torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_equals_the_reference_on_a_gpu(tmp_path, dtype):
    bundle = small_bundle(tmp_path / "small")
    own = config(bundle, device="cuda:0", dtype=dtype, options={"max_autotune": "false"})
    check = store.Record.read(store.build(bundle, "unet", own), "").check
    assert check is not None and 0 < check.rel_rms < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_captured_run_sees_new_inputs_and_new_weights(tmp_path):
    bundle = small_bundle(tmp_path / "small")
    engine = store.load(bundle, "unet", config(bundle, device="cuda:0", options={"max_autotune": "false"}))
    specs = {**engine.inputs, **engine.outputs}
    buffers = {n: torch.zeros(s.shape, dtype=getattr(torch, s.dtype), device="cuda:0") for n, s in specs.items()}
    engine.bind(buffers)
    engine.enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue(torch.cuda.current_stream().cuda_stream)
    feed = compare.inputs(engine.inputs.values(), 3)
    other = torch.full((2**22,), float("nan"), device="cuda:0")  # what else is allocated is not the graph's memory
    for name, value in feed.items():
        buffers[name].copy_(torch.from_numpy(value))
    graph.replay()
    torch.cuda.synchronize()
    old = weights(bundle)
    assert rel_rms(buffers["noise_pred"].cpu().numpy(), unet(old, feed)) < ENGINE_REL_RMS["fp32"]
    changed = {"conv_in.weight": old["conv_in.weight"] * 1.5}
    engine.refit({name: value.astype(np.float32) for name, value in changed.items()})
    graph.replay()
    torch.cuda.synchronize()
    assert rel_rms(buffers["noise_pred"].cpu().numpy(), unet({**old, **changed}, feed)) < ENGINE_REL_RMS["fp32"]
    assert other.isnan().all()
