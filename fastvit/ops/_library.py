"""How an operator is registered: `torch.ops.fastvit.<name>` with a kernel, a fake version and a backward.

`torch.library.Library` rather than the `custom_op` decorator: the decorator adds several microseconds to each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fastvit", "DEF")


def register(
    schema: str,
    *,
    kernel: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    reference: Callable[..., Tensor],
) -> Any:
    """Define `fastvit::<name>` and return its default overload.

    kernel: checks its arguments, chooses a backend, computes.  Used on every device.
    fake: checks its arguments, returns an empty tensor of the right shape and dtype.
    reference: same arguments in differentiable torch; the backward recomputes it from the saved inputs.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIBRARY)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in inputs)
        ctx.is_tensor = tuple(isinstance(a, Tensor) for a in inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [
            next(saved).detach().requires_grad_(needs) if is_tensor else argument
            for argument, is_tensor, needs in zip(ctx.arguments, ctx.is_tensor, ctx.needs_input_grad, strict=True)
        ]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
        with torch.enable_grad():
            output = reference(*arguments)
        grads = torch.autograd.grad(output, [arguments[i] for i in wanted], grad, allow_unused=True)
        result: list[Tensor | None] = [None] * len(arguments)
        for i, g in zip(wanted, grads, strict=True):
            result[i] = g
        return tuple(result)

    torch.library.register_autograd(f"fastvit::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.fastvit, name).default


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that products run in under autocast, or None outside it (and for float64, which autocast leaves)."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def in_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Run the reference as eager PyTorch would: under autocast to `dtype`, or plainly when it is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
