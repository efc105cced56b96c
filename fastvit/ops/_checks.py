"""Argument checks of the operators: each names the argument, its value and what is accepted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvit.ops import _backend

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
NORMS = ("none", "layer", "rms")
POOL_MODES = ("token", "avg", "norm_avg")
QUANTIZE = ("int8",)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Kinds of arguments of an operator, before all are forgotten: images may have any size.
_MOST_KINDS = 1000

_Value = TypeVar("_Value")


class _Passed(Generic[_Value]):
    """What came of checks, by the kinds of arguments that passed them.

    A dozen checks in Python take longer than a small product.
    """

    def __init__(self) -> None:
        self._values: dict[bytes, _Value] = {}

    def find(self, arguments: tuple[Any, ...]) -> tuple[bytes | None, _Value | None]:
        """The arguments' kinds, or None where these can't be told; and what came of them."""
        extension = None if torch.compiler.is_compiling() else _backend.extension()
        kinds = None if extension is None else extension.kinds_of(arguments)
        return kinds, None if kinds is None else self._values.get(kinds)

    def keep(self, kinds: bytes | None, value: _Value) -> None:
        if kinds is not None:
            if len(self._values) >= _MOST_KINDS:
                self._values.clear()
            self._values[kinds] = value


def remembered(output: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`output`, which checks its arguments and makes an empty result, but checks only once what is alike."""
    passed: _Passed[tuple[torch.Size, torch.dtype]] = _Passed()

    @functools.wraps(output)
    def empty(*arguments: Any) -> Tensor:
        kinds, known = passed.find(arguments)
        if known is not None:
            shape, dtype = known
            return torch.empty(*shape, dtype=dtype, device="cpu")  # a shape as one argument takes longer
        out = output(*arguments)
        passed.keep(kinds, (out.shape, out.dtype))
        return out

    return empty


_Arguments = TypeVar("_Arguments", bound=tuple[Any, ...])


def once(check: Callable[[_Arguments], None]) -> Callable[[_Arguments], None]:
    """`check`, which returns nothing, but only once of what is alike."""
    passed: _Passed[bool] = _Passed()

    @functools.wraps(check)
    def unless_passed(arguments: _Arguments) -> None:
        kinds, known = passed.find(tuple(arguments))
        if known is None:
            check(arguments)
            passed.keep(kinds, True)

    return unless_passed


def one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not known; accepted: {', '.join(accepted)}")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.is_nested:
        raise TypeError(f"{name}: {type(value).__name__} is not accepted; give a dense torch.Tensor")


def pair(name: str, value: Any, of: str) -> tuple[Any, Any]:
    """An optional pair, as two values."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        given = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{name}: {given}; accepted: a pair, {of}")
    return value[0], value[1]


def floating(name: str, t: Tensor) -> None:
    tensor(name, t)  # the dispatcher lets None pass for a tensor
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: dtype {t.dtype} is not accepted; give {', '.join(map(str, FLOATS))}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: layout {t.layout} is not accepted; give a dense tensor")


def ndim(name: str, t: Tensor, accepted: int, layout: str) -> None:
    if t.ndim != accepted:
        raise ValueError(f"{name}: shape {tuple(t.shape)} has {t.ndim} dimensions; accepted: {layout}")


def vector(name: str, t: Tensor | None, size: int) -> None:
    """An optional floating-point vector of `size` elements."""
    if t is None:
        return
    floating(name, t)
    if t.ndim != 1 or t.shape[0] != size:
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not fit; accepted: ({size},)")


def drop_path(t: Tensor | None, residual: Tensor) -> None:
    """An optional factor for each sample of `residual` (B, ..., N)."""
    if t is not None and residual.ndim < 2:
        raise ValueError(f"drop_path: given for a shape of {tuple(residual.shape)}; accepted with it: (B, ..., N)")
    vector("drop_path", t, residual.shape[0])


def same_device(**tensors: Tensor | None) -> None:
    first_name, first = "", None
    for name, t in tensors.items():
        if t is None:
            continue
        device = t.device
        if first is None:
            first_name, first = name, device
        elif device != first:
            raise ValueError(f"{name}: on {device}, but {first_name} is on {first}; put them on one device")


def same_dtype(name: str, t: Tensor | None, expected: torch.dtype, of: str) -> None:
    """As in torch's own linear: outside autocast, operands of one product have one dtype."""
    if t is not None and t.dtype != expected:
        raise TypeError(f"{name}: dtype {t.dtype}, but {of} is {expected}; convert one, or use torch.autocast")


def norm(
    kind: str, weight: Tensor | None, bias: Tensor | None, size: int, name: str = "norm", tensors: str = "norm"
) -> None:
    """A norm's kind and tensors, which are the arguments `name`, `{tensors}_weight` and `{tensors}_bias`."""
    one_of(name, kind, NORMS)
    if kind == "none" and (weight is not None or bias is not None):
        raise ValueError(
            f"{name}: 'none' takes no {tensors}_weight or {tensors}_bias; accepted norms with them: layer, rms"
        )
    if kind == "rms" and bias is not None:
        raise ValueError(f"{tensors}_bias: RMSNorm has no bias; accepted: None")
    vector(f"{tensors}_weight", weight, size)
    vector(f"{tensors}_bias", bias, size)


def attention_bias(bias: Tensor | None, full: tuple[int, int, int, int]) -> None:
    """An optional additive bias that broadcasts to (B, num_heads, Nq, Nk)."""
    if bias is None:
        return
    floating("bias", bias)
    if bias.ndim > 4 or any(b not in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias: shape {tuple(bias.shape)} does not broadcast; accepted: towards {full}")


def rope(cos: Tensor | None, sin: Tensor | None, nq: int, nk: int, head_dim: int) -> None:
    """Optional rotary positions of the last tokens of q and k."""
    if cos is None or sin is None:
        if cos is not sin:
            raise TypeError("rope: None for one of the pair; accepted: two tensors")
        return
    for name, t in (("rope[0]", cos), ("rope[1]", sin)):
        floating(name, t)
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != head_dim or cos.shape[0] > nq:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(f"rope: shapes {shapes} do not fit; accepted: two of (P, {head_dim}), P <= {nq}")
    if nk != nq or head_dim % 2:
        raise ValueError(f"rope: Nq={nq}, Nk={nk}, head_dim={head_dim}; accepted: Nq = Nk, even head_dim")


def quantize(value: str | None) -> None:
    if value is not None and value not in QUANTIZE:
        raise ValueError(f"quantize: {value!r} is not known; accepted: {', '.join(map(repr, QUANTIZE))} or None")


def quantize_pair(value: str | tuple[str | None, str | None] | None, of: str) -> tuple[str | None, str | None]:
    """One setting for both products, or one for each."""
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"quantize: {value!r} has {len(pair)} entries; accepted: one value, or a pair for {of}")
    for each in pair:
        quantize(each)
    return pair
