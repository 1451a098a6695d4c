"""The packages that training needs besides the library's own."""

import importlib.util

PACKAGES = ("filelock", "grain", "matplotlib", "tensorboardX")


def check_extras() -> None:
    """Refuses to go on where a package of `peanut-jax[train]` is not installed.

    Raises:
        ImportError: naming the packages, and how to install them.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'peanut-jax[train]'")
