"""A wheel holds these packages, and builds its C++ kernels; the rest is declared in pyproject.toml.

The kernels are optional: where they cannot be built, a line says why, and latentrt installs and works without them.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PACKAGES = ("runtime", "kernels", "export", "engines")
LIBRARIES = ("liblatentrt_kernels", "liblatentrt_openvino")
ROOT = Path(__file__).parent


class BuildKernels(build_ext):
    """Runs CMake once for all libraries, and keeps their names as they are: no Python module is among them."""

    def run(self) -> None:
        try:
            self._cmake()
        except (OSError, subprocess.CalledProcessError) as e:
            output = (getattr(e, "stdout", None) or str(e)).strip()
            print(f"latentrt: the C++ kernels are left out, everything else works; building them gave:\n{output}",
                  file=sys.stderr)
        self.extensions: list[Extension] = [e for e in self.extensions if self._built(e).exists()]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(self._built(ext)), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def _cmake(self) -> None:
        # A pip-installed CMake is beside Python, which need not be on PATH.
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
        cmake = shutil.which("cmake", path=path)
        if cmake is None:
            raise OSError("got no cmake, expected 3.25 or later; pip install cmake, and install latentrt again")
        work = Path(self.build_temp).absolute()
        configure = [cmake, "-S", str(ROOT), "-B", str(work), f"-DOpenVINO_DIR={_openvino()}"]
        for command in (configure, [cmake, "--build", str(work), "--parallel", str(os.cpu_count())],
                        [cmake, "--install", str(work), "--prefix", str(work / "installed")]):
            subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _built(self, ext: Extension) -> Path:
        return Path(self.build_temp).absolute() / "installed" / self.get_ext_filename(ext.name)


def _openvino() -> str:
    """CMake's directory in the installed openvino package; empty without one."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        return ""
    directory = Path(spec.origin).parent / "cmake"
    return str(directory) if directory.is_dir() else ""


setup(
    py_modules=["latentrt"],
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"export.sources": ["configs/**/*"], "kernels": ["csrc/latentrt_kernels.h"]},
    ext_modules=[Extension(f"kernels.{name}", sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildKernels},
)
