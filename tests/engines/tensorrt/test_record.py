"""Files of engines and of builds."""

import os
from pathlib import Path

import pytest

from engines.spec import EngineError
from engines.tensorrt.backend import ENTERPRISE
from engines.tensorrt.record import ABOUT, write_whole


def test_the_timing_cache_is_written_whole(tmp_path):
    write_whole(tmp_path / "deep" / "cache", memoryview(b"one"))
    write_whole(tmp_path / "deep" / "cache", memoryview(b"two"))
    assert (tmp_path / "deep" / "cache").read_bytes() == b"two" and len(os.listdir(tmp_path / "deep")) == 1


def test_details_are_what_the_build_wrote(tmp_path: Path) -> None:
    (tmp_path / ABOUT).write_text('{"arch": "sm_90", "kernels": {}}')
    assert ENTERPRISE.details(tmp_path) == {"arch": "sm_90", "kernels": {}}
    for wrong in ("{", "[]"):
        (tmp_path / ABOUT).write_text(wrong)
        with pytest.raises(EngineError, match=r"tensorrt.json cannot be read .*--backend tensorrt --rebuild"):
            ENTERPRISE.details(tmp_path)
    (tmp_path / ABOUT).unlink()
    with pytest.raises(EngineError, match=r"tensorrt.json cannot be read"):
        ENTERPRISE.details(tmp_path)
