"""The quality gate: the model that ships draws what held-out captions ask for, through every fast engine."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from tests.conftest import Lazy

LEAST_SHARE = 0.9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "auto"])  # auto is bf16 where the CPU has it
def test_pictures_show_what_held_out_captions_ask_for(dtype: str, bundles: Lazy, tmp_path: Path) -> None:
    figures = tmp_path / "quality.json"
    options = ["--backend", "openvino", "--dtype", dtype, "--json", str(figures)]
    assert main(["quality", str(bundles["shapes"]), *options]) == 0
    rows = {row["captions"]: row for row in json.loads(figures.read_text())["adherence"]}
    assert rows["all"]["asked"] == 256 and rows["an unseen pair"]["asked"] > 50
    assert rows["all"]["right"] >= LEAST_SHARE * rows["all"]["asked"], rows
