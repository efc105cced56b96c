"""Which code runs an operator: the C++ extension, Triton, or the plain torch reference."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cpp", "triton", "reference")

# dtype codes of csrc (fastvit::DType).
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_CPP_COMPUTES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: ContextVar[str] = ContextVar("fastvit_backend", default="auto")
# The same for torch.compile, which can't read a ContextVar, but guards on what a module holds.
_traced = "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the `with` block: "cpp", "triton", "reference", or "auto" to choose as usual.

    Raises ValueError for another name.  A forced backend that can't take an input raises RuntimeError: nothing falls
    back silently.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: {name!r} is not a backend; accepted: {', '.join(BACKENDS)}")
    global _traced
    token, before = _forced.set(name), _traced
    _traced = name
    try:
        yield
    finally:
        _forced.reset(token)
        _traced = before


def may_run(name: str) -> bool:
    """Is no other backend forced?"""
    return _forced.get() in ("auto", name)


@functools.cache
def extension() -> Any:
    """The compiled extension `fastvit._C`, or None where it was not built.

    torch is loaded by now, so the extension binds to torch's OpenMP runtime and shares its thread pool.
    """
    try:
        return importlib.import_module("fastvit._C")
    except ImportError:
        return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    return _HAS_TRITON


def choose(x: Tensor, compute: torch.dtype, *others: Tensor | None) -> str:
    """The backend for an operator whose main input is `x` and whose products run in `compute`."""
    forced = _forced.get()
    if forced != "auto":
        able = {"reference": True, "cpp": _cpp_serves(x, compute, others), "triton": _triton_serves(x, compute)}
        if not able[forced]:
            raise RuntimeError(
                f"backend {forced!r} was forced, but can't run here: device {x.device}, dtype {x.dtype}, "
                f"computing in {compute}"
            )
        return forced
    if _cpp_serves(x, compute, others):
        return "cpp"
    if x.is_cuda and _triton_serves(x, compute):
        return "triton"
    return "reference"


def _cpp_serves(x: Tensor, compute: torch.dtype, others: tuple[Tensor | None, ...]) -> bool:
    if not (x.is_cpu and compute in _CPP_COMPUTES and x.dtype in _DTYPE_CODES):
        return False
    for other in others:  # all() takes longer
        if other is not None and other.dtype not in _DTYPE_CODES:
            return False
    return extension() is not None


def _triton_serves(x: Tensor, compute: torch.dtype) -> bool:
    return has_triton() and compute in _TRITON_DTYPES and x.device.type in ("cuda", "cpu")


def differentiates(x: Tensor, compute: torch.dtype) -> bool:
    """Does an operator whose products run in `compute` have Triton's backward?  Elsewhere the reference is recomputed.

    Asks only what torch.compile can trace.
    """
    forced = _traced if torch.compiler.is_compiling() else _forced.get()
    return (x.is_cuda if forced == "auto" else forced == "triton") and x.numel() > 0 and _triton_serves(x, compute)


def trains(x: Tensor, compute: torch.dtype, arguments: tuple[Any, ...]) -> bool:
    """Will `arguments` be differentiated, and by Triton's backward?"""
    return (
        torch.is_grad_enabled()
        and any(a.requires_grad for a in arguments if isinstance(a, Tensor))
        and differentiates(x, compute)
    )


def triton_kernel(name: str, function: str | None = None) -> Any:
    """The host launcher `fastvit.kernels.<name>.<function>`; of the operator's own name unless told otherwise."""
    return getattr(importlib.import_module(f"fastvit.kernels.{name}"), function or name)


def code(dtype: torch.dtype) -> int:
    return _DTYPE_CODES[dtype]


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def unit_stride(t: Tensor) -> Tensor:
    """`t` with elements of the last dimension side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rows(t: Tensor) -> Tensor:
    """(..., K) as (M, K) with unit stride in the last dimension; a view wherever one exists."""
    return unit_stride(t.reshape(t.shape[:-1].numel(), t.shape[-1]))
