"""Options of TensorRT, and whose kernels they ask for."""

from pathlib import Path

import pytest

from engines import __main__ as cli
from engines.spec import EngineError
from engines.tensorrt import vendor
from engines.tensorrt.backend import ENTERPRISE, RTX
from engines.tensorrt.options import Options
from export.__main__ import main as export_main
from tests.cases.tensorrt import needs_rtx
from tests.tools.small import small_bundle


@needs_rtx
def test_options_become_builder_flags():
    flags = vendor.package("tensorrt-rtx").BuilderFlag
    for options, expected in (({}, ()), ({"refit": "true"}, ("REFIT",)), ({"refit": False, "workspace": "64"}, ()),
                              ({"stripped": "true"}, ("REFIT_IDENTICAL", "STRIP_PLAN")),
                              ({"stripped": True, "refit": "True"}, ("REFIT", "STRIP_PLAN"))):
        assert Options.read(options).flags == expected
        assert all(hasattr(flags, name) for name in expected)
    assert Options.read({"optimization_level": "0", "workspace": 1024}) == Options(False, False, 0, 1024)


def asked(flavour, **options: str) -> dict[str, str]:
    return Options.read(options).asked(flavour.name)


def test_auto_wherever_there_can_be_plugins() -> None:
    assert asked(ENTERPRISE) == {"attention": "auto", "norm": "auto"}
    assert asked(ENTERPRISE, attention="vendor") == {"attention": "vendor", "norm": "auto"}
    assert asked(ENTERPRISE, stripped="true") == asked(RTX) == {"attention": "vendor", "norm": "vendor"}
    assert asked(RTX, attention="vendor") == {"attention": "vendor", "norm": "vendor"}
    for flavour, options, message in (
            (RTX, {"attention": "ours"}, "option attention: got 'ours', expected vendor: TensorRT-RTX has no"),
            (RTX, {"norm": "auto"}, "option norm: got 'auto', expected vendor: TensorRT-RTX"),
            (ENTERPRISE, {"norm": "ours", "stripped": "true"}, "option norm: got 'ours', expected vendor: a str"),
            (ENTERPRISE, {"norm": "latentrt"}, "option norm: got 'latentrt', expected ours, vendor or auto")):
        with pytest.raises(EngineError, match=message):
            asked(flavour, **options)


def test_the_command_lines_pass_it_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An option that the backend does not have, or a value that it does not know, is its own error."""
    words = ["build", str(small_bundle(tmp_path / "small").path), "--component", "unet", "--backend"]
    with pytest.raises(SystemExit):
        cli.main([*words, "openvino", "--attention", "flash"])
    assert "argument --attention: invalid choice: 'flash' (choose from 'ours', 'vendor', 'auto')" in \
        capsys.readouterr().err
    assert cli.main([*words, "openvino", "--option", "attention=flash"]) == 2
    assert "option attention: got 'flash', expected ours, vendor or auto" in capsys.readouterr().err
    assert cli.main([*words, "onnxruntime", "--norm", "vendor"]) == 2
    assert "onnxruntime: got unknown options ['norm']" in capsys.readouterr().err
    words = [str(tmp_path / "no checkpoint"), "-o", str(tmp_path / "bundle"), "--backend", "openvino"]
    with pytest.raises(SystemExit):
        export_main([*words, "--attention", "flash"])
    assert "argument --attention: invalid choice: 'flash'" in capsys.readouterr().err
