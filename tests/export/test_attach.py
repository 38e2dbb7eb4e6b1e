"""ControlNets and VAEs in a bundle that is there: what they compute, and that nothing else is touched."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

import export.attach
from engines import Bundle, EngineError, store
from engines.bundle.publish import lock
from export import ExportError
from export.__main__ import main
from export.attach import attach, detach
from export.families.addition import open_addition
from models import tiny
from tests.export.test_bundle import ROOT, wait_for
from tests.tolerances import EXPORT_REL_RMS
from tests.tools import compvis
from tests.tools.graphs import rel_rms, run

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


def run_component(bundle: Bundle, name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run(bundle.path / bundle.component(name).file, feed)


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
        found |= run_component(controlled, name, found)
    residuals = run_component(controlled, "control_edge-net_body" if parts else "control_edge-net", found)
    assert len(residuals) == 9 and all(rel_rms(value, truth[name]) < EXPORT_REL_RMS["fp32"]
                                       for name, value in residuals.items())
    for name in names[1]:
        unet |= run_component(controlled, name, unet)
    got = run_component(controlled, "unet_control_body" if parts else "unet_control", unet | residuals)["noise_pred"]
    assert rel_rms(got, truth["noise_pred"]) < EXPORT_REL_RMS["fp32"]
    plain = run_component(controlled, "unet", feed)["noise_pred"]
    assert rel_rms(plain[2:], truth["noise_pred"][2:]) < EXPORT_REL_RMS["fp32"]  # scale 0 is as if there were no net
    assert all(not residuals[name][2].any() for name in residuals)
    assert rel_rms(plain[:2], truth["noise_pred"][:2]) > 1e-2


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
    got = run_component(new, "control_edge-net", feed)["residual_8"][0]
    with torch.no_grad():
        expected = ControlNetModel.from_pretrained(other)(*(torch.from_numpy(v) for v in list(feed.values())[:4]))
    assert rel_rms(got, expected.mid_block_res_sample[0].numpy()) < EXPORT_REL_RMS["fp32"]


def test_vae_swap_changes_the_decoder_alone(bundle, tmp_path, monkeypatch):
    """As ft-MSE and ft-EMA are. What is interrupted before the manifest is replaced leaves the old bundle."""
    folder, before = tiny.vae(tmp_path / "ft-mse", seed=8), files(bundle.path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export.attach, "write_manifest", interrupted)
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
    assert rel_rms(run_component(new, "vae_decoder", {"latents": latents})["image"], expected) < EXPORT_REL_RMS["fp32"]
    old = bundle_of(before, tmp_path)
    assert rel_rms(run_component(old, "vae_decoder", {"latents": latents})["image"], expected) > 0.1


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
    assert list(open_addition(file, controlled, config=checkpoint).modules) == ["vae_decoder"]
    found = open_addition(file, controlled, encoder=True, config=checkpoint)
    assert list(found.modules) == ["vae_decoder", "vae_encoder"]
    got, expected = (vae.state_dict() for vae in (found.module.load(), AutoencoderKL.from_pretrained(folder)))
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
