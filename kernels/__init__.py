"""Kernels: the operators that latentrt brings itself, one op a file.

`kernels` is also the import name of a Hugging Face distribution, which transformers and diffusers look for. They leave
this package alone, because its distribution is called latentrt, its version is not one that they ask for, and it has no
`__version__`. Where both distributions are installed each would get the other's modules, so this one does not load.
"""

from importlib.metadata import PackageNotFoundError, distribution


def _refuse_namesake() -> None:
    try:
        namesake = distribution("kernels")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"got the Hugging Face distribution `kernels` {namesake.version} and latentrt in one environment, expected one "
        "of the two, since both provide the package `kernels`; run `pip uninstall kernels` and install latentrt again, "
        "or give each an environment of its own"
    )


_refuse_namesake()
