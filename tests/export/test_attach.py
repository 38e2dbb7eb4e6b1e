"""ControlNets and VAEs in a bundle that is there: what they compute, and that nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from engines import Bundle, EngineError, store
from engines.bundle.publish import lock
from export import ExportError
from export import attach as attaching
from export.__main__ import main
from export.attach import attach, detach
from export.families.controlnet import residual_specs
from export.families.stable_diffusion import UNet
from export.sources.addition import open_addition
from export.sources.checkpoint import open_checkpoint
from export.trace.component import export_component
from models import tiny
from runtime.pictures.hints import canny
from tests.export.test_bundle import ROOT, rel_rms, wait_for
from tests.tolerances import EXPORT_REL_RMS
from tests.tools import compvis

ROWS, HEIGHT, WIDTH = 3, 16, 8
NET_PARTS = ["text", "time", "hint", "body"]


@pytest.fixture(scope="module")
def checkpoint(checkpoints) -> Path:
    return checkpoints["sd1"]


@pytest.fixture
def net(edge_net) -> Path:
    return edge_net


@pytest.fixture(scope="module")
def plain(bundles) -> Bundle:
    return Bundle.open(bundles["sd1"])


@pytest.fixture(name="controlled")
def opened(controlled) -> Bundle:
    return Bundle.open(controlled)


@pytest.fixture
def bundle(controlled, tmp_path) -> Bundle:
    return Bundle.open(shutil.copytree(controlled.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


def run(bundle: Bundle, name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(bundle.path / bundle.component(name).file,
                                           providers=["CPUExecutionProvider"])
    values = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    return dict(zip([value.name for value in session.get_outputs()], values, strict=True))


def inputs(text: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"sample": rng.standard_normal((ROWS, 4, HEIGHT, WIDTH), np.float32),
            "timestep": np.array([3, 500, 903], np.float32),
            "encoder_hidden_states": rng.standard_normal((ROWS, 20, text), np.float32),
            "hint": rng.uniform(0, 1, (ROWS, 3, 8 * HEIGHT, 8 * WIDTH)).astype(np.float32),
            "scale": np.array([1, 0.5, 0], np.float32)}


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def truth(checkpoint, edge_net) -> dict[str, np.ndarray]:
    """Residuals and prediction of diffusers, a row at a time: its conditioning_scale is one number for all."""
    feed = {name: torch.from_numpy(value) for name, value in inputs().items()}
    model, unet = ControlNetModel.from_pretrained(edge_net), UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    rows: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for n in range(ROWS):
            sample, time, text, hint, scale = (value[n:n + 1] for value in feed.values())
            down, mid = model(sample, time, text, hint, conditioning_scale=float(scale), return_dict=False)
            found = unet(sample, time, text, down_block_additional_residuals=down, mid_block_additional_residual=mid)
            rows.append({"noise_pred": found.sample.numpy(),
                         **{f"residual_{k}": value.numpy() for k, value in enumerate((*down, mid))}})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_net_and_unet_equal_diffusers(controlled, truth, parts):
    feed = inputs()
    found, unet, names = dict(feed), dict(feed), ([], [])
    if parts:
        names = ([f"control_edge-net_{part}" for part in NET_PARTS[:-1]], ["unet_text", "unet_time"])
    for name in names[0]:
        found |= run(controlled, name, found)
    residuals = run(controlled, "control_edge-net_body" if parts else "control_edge-net", found)
    assert len(residuals) == 9 and all(rel_rms(value, truth[name]) < EXPORT_REL_RMS["fp32"]
                                       for name, value in residuals.items())
    for name in names[1]:
        unet |= run(controlled, name, unet)
    got = run(controlled, "unet_control_body" if parts else "unet_control", unet | residuals)["noise_pred"]
    assert rel_rms(got, truth["noise_pred"]) < EXPORT_REL_RMS["fp32"]
    plain = run(controlled, "unet", feed)["noise_pred"]
    assert rel_rms(plain[2:], truth["noise_pred"][2:]) < EXPORT_REL_RMS["fp32"]  # scale 0 is as if there were no net
    assert all(not residuals[name][2].any() for name in residuals)
    assert rel_rms(plain[:2], truth["noise_pred"][:2]) > 1e-2


@pytest.mark.parametrize("name", ["unet", "unet_body"])
def test_the_unet_without_residuals_is_node_for_node_the_same(plain, name):
    """Both are on one weights file, and differ in the sums with residuals alone."""
    control = name.replace("unet", "unet_control")
    graphs = [ir.load(plain.path / plain.component(n).file).graph for n in (name, control)]
    own, changed = ([(node.op_type, tuple(v and v.name for v in node.inputs), tuple(v.name for v in node.outputs))
                     for node in graph if not str(node.name).startswith("residual_")] for graph in graphs)
    added = {str(node.outputs[0].name): str(node.inputs[0].name) for node in graphs[1]
             if str(node.name).startswith("residual_")}
    assert len(added) == 9 and not any("residual" in str(value.name) for value in graphs[0].inputs)
    assert own == [(op, tuple(added.get(v, v) for v in read), made) for op, read, made in changed]
    assert plain.component(name).sites == plain.component(control).sites
    assert set(plain.component(control).files) == {f"{control}.onnx", "unet.onnx.data"}


def test_residuals_are_where_stable_diffusion_has_them():
    config = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
    found = [(spec.shape[1], spec.shape[2]) for spec in residual_specs(config)]
    levels = ["latent_height", "latent_height_2", "latent_height_4", "latent_height_8"]
    assert found == [(320, levels[0])] * 3 + [(320, levels[1])] + [(640, levels[1])] * 2 + [(640, levels[2])] + [
        (1280, levels[2])] * 2 + [(1280, levels[3])] * 4


def test_engines_of_a_net(controlled, plain, bundle):
    """Only with a ControlNet are engines built for it and for the UNet that takes what it gives; they go with it."""
    own = [f"control_edge-net_{part}" for part in NET_PARTS]
    whole = ["control_edge-net", *own]
    assert controlled.labels == ("edge-net",) and not plain.labels
    assert [n for n in controlled.manifest.components if n not in plain.manifest.components] == whole
    before, after = (store.used(b, "onnxruntime") for b in (plain, controlled))
    assert set(after) - set(before) == {*own, "unet_control_body"} and set(before) < set(after)
    rows = {name: config.dims["batch"] for name, config in store.plan(controlled, "onnxruntime", batches=[2])}
    assert [rows[name] for name in own] == [2, 32, 1, 4]
    config = bundle.config(own[-1], backend="onnxruntime", size=(64, 64), batch=2)
    path, other = store.build(bundle, own[-1], config), bundle.path / "engines" / "unet-onnxruntime-0123456789ab"
    other.mkdir()
    assert path.is_dir() and store.verify_files(bundle, path, store.Record.read(path, "")) is None
    detach("edge-net", bundle.path)
    assert not path.exists() and other.is_dir()


def test_attach_touches_nothing_else_and_detach_takes_all_of_it_away(plain, controlled, bundle):
    """The manifest, too, is then what it was."""
    before, after = files(plain.path), files(controlled.path)
    own = {name: value for name, value in before.items() if not name.startswith(("engines", "manifest"))}
    assert {name: after.get(name) for name in own} == own
    new = {name for name in after if name not in own and not name.startswith(("engines", "manifest"))}
    assert {name.partition("/")[2] for name in new} == {
        "control_edge-net.onnx", "control_edge-net.onnx.data",
        *(f"control_edge-net_{part}.onnx" for part in NET_PARTS)}
    listed = {f for c in controlled.manifest.components.values() for f in c.files} | set(controlled.manifest.files)
    assert listed == {*own, *new}
    controlled.verify({f: d for c in controlled.manifest.components.values() for f, d in c.files.items()})
    assert controlled.manifest.provenance["added"]["control_edge-net"]["source"] == "edge net"
    assert detach("edge-net", bundle.path).manifest == plain.manifest
    assert {n: v for n, v in files(bundle.path).items() if not n.startswith("engines")} == {
        n: v for n, v in before.items() if not n.startswith("engines")}
    with pytest.raises(ExportError, match=r"got ControlNet 'edge-net', expected .* there is none"):
        detach("edge-net", bundle.path)


def test_a_single_file_replaces_the_net_of_its_name(bundle, checkpoint, net, tmp_path, capsys):
    other = tiny.control(tmp_path / "other", checkpoint, seed=4, hint=(16, 32, 96, 256))
    file = compvis.save(compvis.of_control(other), tmp_path / "net.safetensors")
    command = [str(file), "--into", str(bundle.path), "--as", "edge-net", "--config", str(checkpoint)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "control_edge-net_body" in said and "ControlNets: edge-net" in said and "text_encoder" not in said
    new = Bundle.open(bundle.path)
    assert new.labels == ("edge-net",) and len(list(bundle.path.glob("control_*"))) == 1
    assert list(new.manifest.components) == list(bundle.manifest.components)
    feed = inputs()
    got = run(new, "control_edge-net", feed)["residual_8"][0]
    with torch.no_grad():
        expected = ControlNetModel.from_pretrained(other)(*(torch.from_numpy(v) for v in list(feed.values())[:4]))
    assert rel_rms(got, expected.mid_block_res_sample[0].numpy()) < EXPORT_REL_RMS["fp32"]


def test_vae_swap_changes_the_decoder_alone(bundle, tmp_path, monkeypatch):
    """As ft-MSE and ft-EMA are. What is interrupted before the manifest is replaced leaves the old bundle."""
    folder, before = tiny.vae(tmp_path / "ft-mse", seed=8), files(bundle.path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attaching, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach(folder, bundle.path, progress=False)
    assert {n: files(bundle.path)[n] for n in before} == before
    (bundle.path / ".adding.killed").mkdir()
    new = attach(folder, bundle.path, progress=False)
    changed = {name for name, one in new.manifest.components.items() if one != bundle.manifest.components[name]}
    assert changed == {"vae_decoder"} and list(new.manifest.components) == list(bundle.manifest.components)
    after = files(new.path)
    assert {name for name in before if after.get(name) != before[name]} == {
        "manifest.json", "vae_decoder.onnx", "vae_decoder.onnx.data"}
    assert {name.split("/")[-1] for name in after.keys() - before.keys()} == {
        "vae_decoder.onnx", "vae_decoder.onnx.data"}
    latents = np.random.default_rng(2).standard_normal((1, 4, 8, 16), np.float32)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder).decode(torch.from_numpy(latents) / 0.18215).sample.numpy()
    assert rel_rms(run(new, "vae_decoder", {"latents": latents})["image"], expected) < EXPORT_REL_RMS["fp32"]
    assert rel_rms(run(bundle_of(before, tmp_path), "vae_decoder", {"latents": latents})["image"], expected) > 0.1


def bundle_of(content: dict[str, bytes], path: Path) -> Bundle:
    for name, value in content.items():
        (path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "again" / name).write_bytes(value)
    return Bundle.open(path / "again")


def test_both_halves_of_a_vae_from_one_file(controlled, checkpoint, tmp_path):
    """Its names are bare, and it holds what training left."""
    folder = tiny.vae(tmp_path / "vae", seed=9)
    state = {**compvis.of_vae(folder), "loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)}
    file = compvis.save(state, tmp_path / "vae.ckpt")
    assert list(open_addition(file, controlled, config=checkpoint).graphs) == ["vae_decoder"]
    found = open_addition(file, controlled, encoder=True, config=checkpoint)
    assert list(found.graphs) == ["vae_decoder", "vae_encoder"]
    got, expected = (vae.state_dict() for vae in (found.load("vae"), AutoencoderKL.from_pretrained(folder)))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_killed_while_it_attaches(bundle, tmp_path):
    """What it leaves is no part of the bundle, and the next one removes it."""
    before = files(bundle.path)
    command = [sys.executable, "-m", "export", str(tiny.vae(tmp_path / "vae", seed=5)), "--into", str(bundle.path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(bundle.path.glob(".adding.*/*.onnx")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(bundle.path.glob(".adding.*"))
    assert {n: v for n, v in files(bundle.path).items() if not n.startswith(".adding.")} == before
    assert Bundle.open(bundle.path).labels == ("edge-net",)
    detach("edge-net", bundle.path)
    assert not list(bundle.path.glob(".adding.*")) and not list(bundle.path.glob("control_*"))


def test_one_writer(bundle, net):
    with lock(bundle.path), pytest.raises(EngineError, match="being written by another process"):
        attach(net, bundle.path)
    with pytest.raises(EngineError, match="got nothing, expected a bundle"):
        attach(net, bundle.path / "nowhere")


def test_a_net_of_stable_diffusion_xl(plain, tmp_path):
    """It is given pooled text and sizes as the UNet is. In 16 bits, and cut in the same parts."""
    folder = tiny.sdxl(tmp_path / "xl")
    net = tiny.control(tmp_path / "net", folder)
    checkpoint = open_checkpoint(folder)
    unet = dataclasses.replace(plain.component("unet"), inputs=(
        *UNet(checkpoint.load("unet"), checkpoint).inputs, *residual_specs(checkpoint.unet)))
    manifest = dataclasses.replace(plain.manifest, family="sdxl", components={
        "unet": unet, "unet_control": dataclasses.replace(unet, variant="control")})
    got = export_component("control_xl", open_addition(net, Bundle(tmp_path, manifest), "xl"), "fp16", tmp_path)
    assert [n.removeprefix("control_xl") for n in got] == ["", *(f"_{part}" for part in NET_PARTS)]
    assert {"text_embeds", "time_ids"} < {spec.name for spec in got["control_xl"].inputs}
    assert all(0 < one.check.rel_rms < EXPORT_REL_RMS["fp16"] for one in got.values())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes, message", [
    ({"_class_name": "T2IAdapter"}, "got a T2IAdapter, expected one of ControlNetModel, AutoencoderKL"),
    ({"global_pool_conditions": True}, "global_pool_conditions=True, expected False"),
    ({"num_class_embeds": 10}, "num_class_embeds=10, expected None"),
    ({"cross_attention_dim": 48}, "cross_attention_dim=48, expected 32"),
    ({"in_channels": 9}, "in_channels=9, expected 4"),
    ({"conditioning_channels": 1}, "conditioning_channels=1, expected 3"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time', expected None"),
    ({"conditioning_embedding_out_channels": [8, 8, 16]}, "pixels a latent=4, expected 8"),
    ({"block_out_channels": [32, 32, 64, 32]}, "9 residuals of .* which are not the 9"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_net_that_does_not_fit(controlled, net, tmp_path, changes, message):
    folder = shutil.copytree(net, tmp_path / "net")
    edit(folder / "config.json", **changes)
    with pytest.raises(ExportError, match=message):
        open_addition(folder, controlled)


@pytest.mark.parametrize("options, message", [
    ({"latent_channels": 16}, "latent_channels=16, expected 4"),
    ({"scaling_factor": 0.13025}, "scaling_factor=0.13025, expected 0.18215"),
    ({"shift_factor": 0.1}, "shift_factor=0.1, expected 0.0"),
    ({"block_out_channels": [8, 16, 16]}, "pixels a latent=4, expected 8"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_vae_that_does_not_fit(controlled, tmp_path, options, message):
    folder = tiny.vae(tmp_path / "vae", seed=1)
    edit(folder / "config.json", **options)
    with pytest.raises(ExportError, match=message):
        open_addition(folder, controlled)


def test_what_is_no_addition(controlled, checkpoint, net, tmp_path):
    def refused(message: str, path: Path, *options: Any) -> None:
        with pytest.raises(ExportError, match=message):
            open_addition(path, controlled, *options)

    refused("no such file or folder", tmp_path / "nowhere")
    refused("no config.json, expected .* give the folder of its VAE, PATH/vae", checkpoint)
    refused("got a UNet2DConditionModel, expected one of", checkpoint / "unet")
    refused("which has its own; leave out --config", net, None, False, "sd1")
    refused("got --encoder for a ControlNet", net, None, True)
    refused("got 'a b' for the ControlNet's name, expected letters", net, "a b")
    refused("got 'my_body' for the ControlNet's name, .* do not end in _text", net, "my_body")
    refused("got the name 'x' for a VAE", tiny.vae(tmp_path / "vae", seed=1), "x")
    whole = compvis.save(compvis.from_folder(checkpoint), tmp_path / "whole.safetensors")
    refused("got a whole checkpoint, expected a ControlNet or a VAE", whole)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    refused("no ControlNet or VAE in the original layout", tmp_path / "lora.safetensors")
    state = compvis.of_control(net)
    file = compvis.save(state, tmp_path / "net.safetensors")
    refused("its architecture is not known, .* pass --config DIR", file)
    state.pop("control_model.zero_convs.2.0.bias")
    addition = open_addition(compvis.save(state, file), controlled, None, False, checkpoint)
    with pytest.raises(ExportError, match=r"lack controlnet_down_blocks\.2\.bias"):
        addition.load("control")
    shutil.copytree(net, tmp_path / "damaged")
    os.truncate(next((tmp_path / "damaged").glob("*.safetensors")), 1000)
    with pytest.raises(ExportError, match="weights could not be read"):
        open_addition(tmp_path / "damaged", controlled).load("control")
    assert load_file(next(net.glob("*.safetensors")))


@pytest.mark.parametrize("arguments, message", [
    (["net", "-o", "b", "--as", "x"], "--as goes with --into only"),
    (["net", "-o", "b", "--encoder"], "--encoder goes with --into only"),
    (["net", "--into", "b", "--force"], "--force goes with -o only"),
    (["net", "--into", "b", "--detach", "x"], "--detach takes no CHECKPOINT"),
    (["--into", "b"], "CHECKPOINT is missing"), (["net", "-o", "a", "--into", "b"], "not allowed with"),
], ids=" ".join)
def test_options_that_exclude_each_other(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_detach_from_the_command_line(bundle, capsys):
    assert main(["--into", str(bundle.path), "--detach", "other"]) == 2
    assert "got ControlNet 'other', expected one of edge-net" in capsys.readouterr().err
    assert main(["--into", str(bundle.path), "--detach", "edge-net"]) == 0
    assert "ControlNets: none" in capsys.readouterr().out


def test_canny():
    """Edges of a white square, one pixel wide, in three equal channels; the same for grey and colour."""
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[8:24, 12:36] = 255
    found = canny(Image.fromarray(picture))
    edges = np.asarray(found)
    assert (found.size, found.mode) == ((48, 32), "RGB") and set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all() and edges[8:24, 11:13, 0].any(axis=1).all()
    assert not edges[12:20, 16:32].any() and not edges[:6].any()
    for other in (picture, picture[..., 0], Image.fromarray(picture).convert("RGBA")):
        assert np.array_equal(np.asarray(canny(other)), edges)
    faint = (picture // 8).astype(np.uint8)
    assert not np.asarray(canny(faint)).any() and np.asarray(canny(faint, 10, 20)).any()
    for wrong, message in ((picture.astype(np.float32), "image: got float32"), (picture[None], "expected uint8")):
        with pytest.raises(ValueError, match=message):
            canny(wrong)
    with pytest.raises(ValueError, match="low, high: got 200 and 100"):
        canny(picture, 200, 100)


def test_canny_without_opencv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(EngineError, match=r"canny needs OpenCV .* run: pip install opencv-python-headless"):
        canny(np.zeros((8, 8), np.uint8))
