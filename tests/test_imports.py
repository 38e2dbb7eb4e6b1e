"""Who may import whom, what an import costs, and life beside the other package named `kernels`.

The rules are those of docs/adr/0001-layout.md.
"""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": set[str](),
    "engines": {"kernels"},
    "export": {"engines", "kernels"},
    "runtime": {"engines", "kernels"},
}
OURS = {*MAY_IMPORT, "benchmarks", "models", "tests"}
HEAVY = {"torch", "triton", "onnx", "onnxscript", "diffusers", "transformers"}
VENDORS = {"onnxruntime": "engines/onnxruntime.py", "openvino": "engines/openvino.py",
           "tensorrt": "engines/tensorrt.py", "tensorrt_rtx_bindings": "engines/tensorrt.py",
           "cuda": "kernels/launch.py"}
TRITON = {f"kernels/{name}.py" for name in (
    "accumulate", "attention", "checks", "geglu", "group_norm", "guidance_step", "layer_norm", "step_input", "to_image",
    "traced")}
LAZY = {"kernels/native_ops.py",
        *(f"engines/{name}.py" for name in ("inductor_choice", "inductor_fp8", "onnx_sites", "onnx_torch"))}
"""Files that only functions import: of the inductor backend."""
SECONDS_TO_IMPORT = 1.0


def imports(node: ast.AST, lazy: bool, types: bool = True) -> Iterator[str]:
    """Top-level names that `node` imports; with lazy=False only those that importing the file itself brings in.

    types: those that only a type checker imports too, where lazy ones count.
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.partition(".")[0]
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not lazy:
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not (lazy and types):
                continue
        yield from imports(child, lazy, types)


def imports_of_package(package: str, lazy: bool, types: bool = True) -> dict[str, set[str]]:
    """File, relative to the repository → the top-level names it imports."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ has no Python file to read"
    return {str(f.relative_to(ROOT)): set(imports(ast.parse(f.read_text(encoding="utf8")), lazy, types)) for f in files}


def run_python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter started in `cwd`, with `path` as PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def import_fresh(package: str) -> tuple[float, set[str]]:
    """Import `package` in a fresh interpreter: seconds, and the top-level names of the modules that it loaded."""
    code = f"""
import json, sys, time
before, start = set(sys.modules), time.perf_counter()
import {package}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})]))
"""
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    seconds, names = json.loads(done.stdout)
    return seconds, set(names)


def test_imports_are_found_wherever_they_hide():
    tree = ast.parse("""
import a.b
from c.d import e
from . import ignored
if TYPE_CHECKING:
    import f
def function():
    import g
    importlib.import_module("h.i")
class Class:
    try:
        import j
    except ImportError:
        pass
""")
    assert set(imports(tree, lazy=True)) == {"a", "c", "f", "g", "h", "j"}
    assert set(imports(tree, lazy=True, types=False)) == {"a", "c", "g", "h", "j"}
    assert set(imports(tree, lazy=False)) == {"a", "c", "j"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependency_direction(package):
    forbidden = OURS - MAY_IMPORT[package] - {package}
    files = imports_of_package(package, lazy=True)
    assert not {file: wrong for file, names in files.items() if (wrong := names & forbidden)}


@pytest.mark.parametrize("package", ["runtime", "engines", "kernels"])
def test_no_file_loads_a_heavy_package_when_imported(package):
    """But those of the Triton kernels, which the runtime never imports, and LAZY."""
    files = imports_of_package(package, lazy=False)
    assert not {file: wrong for file, names in files.items() if file not in TRITON | LAZY and (wrong := names & HEAVY)}


def test_the_runtime_imports_no_triton_kernel():
    modules = {file.removesuffix(".py").replace("/", ".") for file in TRITON}
    for file in sorted((ROOT / "runtime").rglob("*.py")) + sorted((ROOT / "engines").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & modules, file
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & modules, file


@pytest.mark.parametrize("vendor", VENDORS)
def test_one_file_imports_each_vendor(vendor):
    files = {file: names for package in MAY_IMPORT
             for file, names in imports_of_package(package, lazy=True, types=False).items()}
    assert [file for file, names in files.items() if vendor in names] == [VENDORS[vendor]]


@pytest.mark.parametrize("package", ["runtime", "engines", "kernels"])
def test_import_leaves_heavy_packages_out(package):
    _, names = import_fresh(package)
    assert package in names
    assert not names & (HEAVY | set(VENDORS))


def test_kernels_needs_only_the_standard_library_to_import():
    _, names = import_fresh("kernels")
    assert names <= {"kernels"} | sys.stdlib_module_names


def test_runtime_imports_in_under_a_second():
    """The best of three, so that a busy machine or a cold disk does not decide."""
    assert min(import_fresh("runtime")[0] for _ in range(3)) < SECONDS_TO_IMPORT


def test_version_is_not_one_that_transformers_takes_for_its_kernels():
    version = Version(importlib.metadata.version("latentrt"))
    assert not Version("0.18.2") <= version < Version("0.19")


@pytest.mark.parametrize("place", ["repository root", "elsewhere"])
def test_transformers_and_diffusers_leave_our_kernels_alone(place, tmp_path):
    code = f"""
import kernels
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}, kernels.__file__
import transformers.utils, diffusers.utils
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
import transformers.integrations.hub_kernels
print(transformers.utils.is_kernels_available(), diffusers.utils.is_kernels_available())
"""
    done = run_python(code, ROOT if place == "repository root" else tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_kernels_refuses_its_namesake(tmp_path):
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n", encoding="utf8")
    done = run_python("import kernels", ROOT, tmp_path)
    assert done.returncode == 1
    assert "ImportError: got the Hugging Face distribution `kernels` 0.18.2" in done.stderr
    assert "pip uninstall kernels" in done.stderr
