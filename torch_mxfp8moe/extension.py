"""The compiled part, ``_C``: loaded if it is there, and if not, why."""

import warnings
from types import ModuleType


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
    except ImportError as error:
        if getattr(error, "name", None) == f"{__package__}._C" or "cannot import name '_C'" in str(error):
            return None, (
                "the C++ extension was not built: install a C++17 compiler and ninja, then "
                "`pip install --no-build-isolation .` again"
            )
        return None, f"the C++ extension does not load: {error}"
    return _C, None


MODULE, WHY_MISSING = _load()
"""The extension module, or None and the reason."""

if WHY_MISSING:
    warnings.warn(f"torch_mxfp8moe: {WHY_MISSING}. CPU tensors run on the slow reference.", stacklevel=3)
