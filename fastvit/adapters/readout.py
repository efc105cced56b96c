"""A classifier whose head reads a token or two: its last block need not compute the others.

In the last attention all tokens are keys and values, but only those that are read need a query, a projection and an
MLP: 10/12 of that block's products fall away, 7 % of a model of twelve blocks.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fastvit.adapters.parts import NotServed, Readout, is_published, mode_obstacle, read_norm
from fastvit.adapters.swap import Fused, FusedBlock, reading
from fastvit.nn._listeners import has_own_forward, listener_obstacle


class FusedReadout(Fused):
    """A classifier that tells its last block what its head will read."""

    # In the report it is the last block's.
    fastvit_sentence = "computes only what the head reads, unless a gradient is asked for"
    fastvit_reader = "readout"
    fastvit_read: ClassVar[Callable[[Any], Readout | None]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (original := cls.__dict__.get("fastvit_original")) is not None:
            cls.forward = _forward_like(original)  # type: ignore[attr-defined]


def _forward_like(original: type[nn.Module]) -> Callable[..., Any]:
    # With the signature of the original, by which models are exported and traced, and data sets lose columns.
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (readout := _readout(self, kwargs)) is None:
            return original.forward(self, *args, **kwargs)
        with reading(readout.blocks[-1], readout.tokens):
            return original.forward(self, *args, **kwargs)

    return forward


def _read(model: Any) -> Readout | None:
    try:
        readout: Readout | None = model.fastvit_read()
        if readout is None:
            return None
        *before, last = readout.blocks
        if not isinstance(last, FusedBlock) or last in before:
            return None
        for norm in readout.norms:
            if norm is not None:
                read_norm(norm, torch.float32)
    except (NotServed, AttributeError, TypeError, ValueError):  # of a model that was rebuilt
        return None
    return readout


def _readout(model: Any, arguments: dict[str, Any]) -> Readout | None:
    """How the head reads the last block in this call, or None where somebody else may read it too."""
    if arguments.get("output_hidden_states") or mode_obstacle() is not None:
        return None
    if (readout := _read(model)) is None:
        return None
    model, *others = readout.route
    norms = [norm for norm in readout.norms if norm is not None]
    listened = listener_obstacle([*others, readout.blocks[-1], *norms])
    if listened is not None or not has_own_forward(model) or not all(map(_is_as_published, (*readout.route, *norms))):
        return None
    return readout


def read_in_part(model: nn.Module) -> dict[Any, int]:
    """The blocks that optimized classifiers in `model` read no further than their first tokens, and how many."""
    found = [_read(m) for m in model.modules() if isinstance(m, FusedReadout)]
    return {r.blocks[-1]: r.tokens for r in found if r is not None}


# What the forward of a classifier calls on itself.
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pool", "_global_pool")


def _is_as_published(module: nn.Module) -> bool:
    """Is the module's code its library's own, neither derived from nor patched?"""
    cls: Any = getattr(module, "fastvit_original", type(module))
    if not is_published(cls):
        return False
    library = sys.modules[cls.__module__.partition(".")[0]]
    folder = os.path.dirname(library.__file__ or "") + os.sep
    for name in _METHODS:
        if (method := getattr(cls, name, None)) is None:
            continue
        code = getattr(method, "__code__", None)
        if code is None or not code.co_filename.startswith(folder) or (name != "forward" and name in module.__dict__):
            return False
    return True
