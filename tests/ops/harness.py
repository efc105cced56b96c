"""Runs one operator three ways on the same data: float64 reference, eager PyTorch in the dtype, and a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit import ops, reference
from tests.tolerances import assert_close

# "cpp" is what runs by default here; "reference" is the fall-back where the extension or the dtype is missing.
BACKENDS = ("cpp", "reference")
DTYPES = (torch.float32, torch.bfloat16)


def convert(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype` with their strides kept; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def check(
    name: str,
    *args: Any,
    dtype: torch.dtype,
    backend: str = "auto",
    layout: Callable[[Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Assert that `ops.<name>` in `dtype` is as near to float64 as its tolerance; returns what it computed.

    layout: changes the memory layout of the first argument before the operator sees it.
    """
    low_args, low_kwargs = [convert(a, dtype) for a in args], {k: convert(v, dtype) for k, v in kwargs.items()}
    # The truth starts from the values that the operator is given, rounding included.
    truth_args, truth_kwargs = (
        [convert(a, torch.float64) for a in low_args],
        {k: convert(v, torch.float64) for k, v in low_kwargs.items()},
    )
    truth = getattr(reference, name)(*truth_args, **truth_kwargs)
    eager = getattr(reference, name)(*low_args, **low_kwargs)
    if layout is not None:
        low_args[0] = layout(low_args[0])
    with ops.use_backend(backend):
        actual = getattr(ops, name)(*low_args, **low_kwargs)
    assert actual.dtype == eager.dtype
    assert_close(actual, truth, eager=eager)
    return actual


def check_gradients(name: str, *args: Any, **kwargs: Any) -> None:
    """Assert that every floating argument's gradient through the operator equals the float64 reference's."""

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                leaves.append(value.to(dtype).detach().requires_grad_())
                return leaves[-1]
            return value

        out = function(*map(leaf, args), **{k: leaf(v) for k, v in kwargs.items()})
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        out.backward(seed.to(out.dtype))
        assert all(t.grad is not None for t in leaves)
        return [t.grad for t in leaves if t.grad is not None]

    expected = gradients(getattr(reference, name), torch.float64)
    actual = gradients(getattr(ops, name), torch.float32)
    for mine, truth in zip(actual, expected, strict=True):
        assert_close(mine, truth)
