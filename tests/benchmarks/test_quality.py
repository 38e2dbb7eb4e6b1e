"""The quality gate: the model that ships draws what held-out captions ask for, through every fast engine."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.__main__ import main
from benchmarks.quality import MAY_LOSE, Drawn, paired
from models.world.adherence import Verdict
from tests.conftest import Lazy
from tests.tolerances import ADHERENCE_POINTS

LEAST_SHARE = 0.9


@pytest.mark.slow
def test_pictures_show_what_held_out_captions_ask_for(bundles: Lazy, tmp_path: Path) -> None:
    """Draw in the precision that auto is, bf16 where the CPU has it, and in fp32, which must not be a point better."""
    figures = tmp_path / "quality.json"
    options = ["--backend", "openvino", "--dtype", "auto", "--against", "fp32", "--json", str(figures)]
    assert main(["quality", str(bundles["shapes"]), *options]) == 0
    found = json.loads(figures.read_text())
    for one in (found, found["against"]):
        rows = {row["captions"]: row for row in one["adherence"]}
        assert rows["all"]["asked"] == 256 and rows["an unseen pair"]["asked"] > 50
        assert rows["all"]["right"] >= LEAST_SHARE * rows["all"]["asked"], rows
    assert found["against"]["points"] >= -ADHERENCE_POINTS and MAY_LOSE == ADHERENCE_POINTS


def drawn(right: str, shade: int) -> Drawn:
    """Return grey pictures of which those marked x are right."""
    return Drawn("openvino", "bf16", [Image.new("RGB", (4, 4), (shade,) * 3) for _ in right],
                 [Verdict(mark == "x", [] if mark == "x" else ["wrong"]) for mark in right], 1.0)


def test_engines_are_paired_caption_by_caption() -> None:
    found = paired(drawn("xx.x......", 100), drawn("x.xxxx....", 110))
    assert found["points"] == -20 and found["gained"] == [1] and found["lost"] == [2, 4, 5]
    assert found["p"] == pytest.approx(2 * (1 + 4) / 16)  # of four flips, one or none the one way
    assert found["psnr"]["least"] == found["psnr"]["median"] == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    same = paired(drawn("x.", 7), drawn("x.", 7))
    assert same["points"] == 0 and same["p"] == 1 and same["psnr"] is None
