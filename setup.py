"""Which packages a wheel holds; the rest of the build is declared in pyproject.toml."""

from setuptools import find_packages, setup

PACKAGES = ("runtime", "kernels", "export", "engines")

setup(
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={"export": ["configs/**/*"]},
)
