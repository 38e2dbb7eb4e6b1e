"""Who may import whom, what an import costs, and life beside the other package named `kernels`.

The rules are folders: docs/adr/0001-layout.md and docs/adr/0012-rooms.md.
"""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": set[str](),
    "engines": {"kernels"},
    "export": {"engines", "kernels"},
    "runtime": {"engines", "kernels"},
    "models": {"engines", "export", "kernels", "runtime"},
    "benchmarks": {"engines", "export", "kernels", "models", "runtime"},
    "tests": {"benchmarks", "docs", "engines", "export", "kernels", "models", "runtime"},
}
SLIM = ("kernels", "engines", "runtime")
"""Packages that are imported without HEAVY ones, which only their rooms of TORCH need."""
HEAVY = {"torch", "triton", "onnx", "onnxscript", "diffusers", "transformers"}
TORCH = ("kernels/triton/", "kernels/cpu/torch_ops.py", "engines/inductor/torch/")
"""Rooms whose files import torch, and Triton, when they are imported themselves; only functions import these rooms."""
VENDORS = {"onnxruntime": "engines/onnxruntime/", "openvino": "engines/openvino/", "tensorrt": "engines/tensorrt/",
           "tensorrt_rtx_bindings": "engines/tensorrt/", "cuda": "kernels/launch.py"}
"""A vendor's package → the room that imports it, in functions alone."""
SECONDS_TO_IMPORT = 1.0


def imports(node: ast.AST, lazy: bool, types: bool = True) -> Iterator[str]:
    """Dotted names that `node` imports; with lazy=False only those that importing the file itself brings in.

    types: those that only a type checker imports too, where lazy ones count. `from a import b` gives "a" and "a.b".
    """
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not lazy:
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not (lazy and types):
                continue
        yield from imports(child, lazy, types)


def files_of(package: str, root: Path = ROOT) -> dict[str, ast.Module]:
    """File, relative to `root` → its syntax tree, for every file of a package."""
    files = sorted((root / package).rglob("*.py"))
    assert files, f"{package}/ has no Python file to read"
    return {str(file.relative_to(root)): ast.parse(file.read_text(encoding="utf8")) for file in files}


def top_level(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def imported_files(root: Path = ROOT) -> dict[str, set[str]]:
    """File → the files of ours that it imports, lazily or for its types too; a package is its __init__.py."""
    packages = [package for package in MAY_IMPORT if (root / package).is_dir()]
    trees = {name: tree for package in packages for name, tree in files_of(package, root).items()}
    modules = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in trees}
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found[name] = {modules[n] for n in imports(tree, lazy=True) if n in modules} - {name}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every set of files that import one another, by Tarjan's algorithm (SIAM J. Comput. 1(2), 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) > at + 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


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
    assert top_level(imports(tree, lazy=True)) == {"a", "c", "f", "g", "h", "j"}
    assert top_level(imports(tree, lazy=True, types=False)) == {"a", "c", "g", "h", "j"}
    assert top_level(imports(tree, lazy=False)) == {"a", "c", "j"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependency_direction(package):
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    files = {file: top_level(imports(tree, lazy=True)) for file, tree in files_of(package).items()}
    assert not {file: wrong for file, names in files.items() if (wrong := names & forbidden)}


def test_no_circle_of_imports():
    assert circles(imported_files()) == []


@pytest.mark.parametrize("how", ["import engines.b", "from engines import b", "from engines.b import c",
                                 "def f():\n    from engines import b", "if TYPE_CHECKING:\n    from engines import b"])
def test_a_circle_is_found(how, tmp_path):
    (tmp_path / "engines").mkdir()
    files = {"__init__": "", "a": how, "b": "from engines.d import x", "d": "import engines.a", "e": "import engines.a"}
    for name, text in files.items():
        (tmp_path / "engines" / f"{name}.py").write_text(text, encoding="utf8")
    assert circles(imported_files(tmp_path)) == [[f"engines/{name}.py" for name in "abd"]]


@pytest.mark.parametrize("package", SLIM)
def test_no_file_loads_a_heavy_package_when_imported(package):
    """But those of the rooms of TORCH."""
    files = {file: top_level(imports(tree, lazy=False)) for file, tree in files_of(package).items()}
    assert not {file: wrong for file, names in files.items() if not file.startswith(TORCH) and (wrong := names & HEAVY)}


def test_only_functions_import_the_rooms_of_torch():
    rooms = tuple(room.removesuffix(".py").rstrip("/").replace("/", ".") for room in TORCH)
    wrong = {file: names for package in SLIM for file, tree in files_of(package).items() if not file.startswith(TORCH)
             and (names := [n for n in imports(tree, lazy=False) if n.startswith(rooms)])}
    assert not wrong


@pytest.mark.parametrize("vendor", VENDORS)
def test_one_room_imports_each_vendor(vendor):
    files = [file for package in (*SLIM, "export") for file, tree in files_of(package).items()
             if vendor in top_level(imports(tree, lazy=True, types=False))]
    assert files and all(file.startswith(VENDORS[vendor]) for file in files), files
    at_import = [file for file in files
                 if vendor in top_level(imports(ast.parse((ROOT / file).read_text()), lazy=False))]
    assert not at_import


def test_backends_never_import_each_other():
    rooms = ("engines/onnxruntime/", "engines/openvino/", "engines/tensorrt/", "engines/inductor/")
    wrong = {file: others for file, imported in imported_files().items() for room in rooms if file.startswith(room)
             and (others := [o for o in imported if o.startswith(rooms) and not o.startswith(room)])}
    assert not wrong


def test_no_folder_has_more_than_twelve_files():
    """`__init__.py` apart: such a folder is two rooms."""
    folders: dict[str, int] = {}
    for package in MAY_IMPORT.keys() - {"tests"}:
        for file in files_of(package):
            folders[os.path.dirname(file)] = folders.get(os.path.dirname(file), 0) + (not file.endswith("__init__.py"))
    assert not {folder: count for folder, count in folders.items() if count > 12}


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
