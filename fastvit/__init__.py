"""fastvit: fused kernels for the Vision Transformers you already have.

`fastvit.optimize(model)` swaps the blocks of a timm, transformers, torchvision or open_clip ViT for fused ones with the
same weights and the same outputs; `fastvit.restore(model)` undoes it exactly.  Not related to Apple's FastViT network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvit.errors import UnsupportedModelError

__version__ = "0.1.0"

# Public names by the module that defines them: loaded on first use, so that `import fastvit` stays cheap.
_LAZY = {
    "optimize": "fastvit.adapters",
    "restore": "fastvit.adapters",
    "report": "fastvit.adapters",
    "compare": "fastvit.adapters",
    "Report": "fastvit.adapters",
    "Comparison": "fastvit.adapters",
    "FastViT": "fastvit.models",
    "create_model": "fastvit.models",
    "list_models": "fastvit.models",
    "env": "fastvit._env",
}
_SUBMODULES = ("adapters", "kernels", "models", "nn", "ops", "reference")

__all__ = [
    "Comparison",
    "FastViT",
    "Report",
    "UnsupportedModelError",
    "__version__",
    "adapters",
    "compare",
    "create_model",
    "env",
    "kernels",
    "list_models",
    "models",
    "nn",
    "ops",
    "optimize",
    "reference",
    "report",
    "restore",
]

if TYPE_CHECKING:
    from fastvit import adapters, kernels, models, nn, ops, reference  # type: ignore[attr-defined]
    from fastvit._env import env
    from fastvit.adapters import Comparison, Report, compare, optimize, report, restore  # type: ignore[no-redef]
    from fastvit.models import FastViT, create_model, list_models


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastvit.{name}")
    else:
        raise AttributeError(f"module 'fastvit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
