"""How an operator is registered: `torch.ops.fastvit.<name>` with a kernel, a fake version and a backward.

`torch.library.Library` rather than the `custom_op` decorator: the decorator adds several microseconds to each call.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.ops import _backend

_LIBRARY = torch.library.Library("fastvit", "DEF")


def define(schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `fastvit::<name>` without a backward, as backward operators are, and return its default overload.

    kernel: computes.  Used on every device.
    fake: returns empty tensors of the right shape and dtype.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvit::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastvit, name).default


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Tensor],
    backward: Callable[[tuple[Any, ...], Tensor, tuple[bool, ...]], Sequence[Tensor | None] | None] | None = None,
    save: Callable[[tuple[Any, ...], Any], tuple[Tensor, ...]] | None = None,
) -> Any:
    """Define `fastvit::<name>` and return what calls it: its default overload, or `reference` under torch.func.

    Of several results the first is differentiable; the others are what a kernel leaves for its backward.

    kernel: checks its arguments, chooses a backend, computes.  Used on every device.
    fake: checks its arguments, returns an empty tensor of the right shape and dtype.
    reference: same arguments in differentiable torch, the first result alone; the backward recomputes it from the saved
        inputs wherever there is no `backward` kernel.
    backward: `(saved, grad, needs)`: the gradient of every argument, or None to recompute the reference.  `saved` holds
        all arguments, then what `save` added; `needs` tells which arguments want a gradient.  It is traced under
        torch.compile, so it calls operators (`define`), not kernels.
    save: `(arguments, result)`: the tensors to keep for `backward` besides the arguments.
    """
    name = schema.split("(", 1)[0]
    several = "-> (" in schema
    op = define(schema, kernel=kernel, fake=fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
        kept = inputs if save is None else (*inputs, *save(inputs, output))
        ctx.save_for_backward(*(a for a in kept if isinstance(a, Tensor)))
        ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in kept)
        ctx.is_tensor = tuple(isinstance(a, Tensor) for a in kept)

    def backward_from_saved(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = tuple(ctx.needs_input_grad)
        if grad is None:
            return (None,) * len(needs)
        tensors = iter(ctx.saved_tensors)
        saved = tuple(
            next(tensors) if is_tensor else argument
            for argument, is_tensor in zip(ctx.arguments, ctx.is_tensor, strict=True)
        )
        # No backward operator is differentiable itself; the reference is.
        twice = torch.is_grad_enabled()
        result = None if backward is None or twice else backward(saved, grad, needs)
        return _recompute(reference, saved[: len(needs)], grad, needs, twice) if result is None else tuple(result)

    torch.library.register_autograd(f"fastvit::{name}", backward_from_saved, setup_context=setup_context, lib=_LIBRARY)

    def call(*arguments: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not is_transformed():
            return op(*arguments) if compiling else _call(op, kernel, arguments)
        if not compiling:  # which can't trace the choice of a backend
            fake(*arguments)  # for its checks
        result = reference(*arguments)
        return (result,) if several else result

    return call


# How the dispatcher says that an argument is not what the schema asks for.
_WRONG_TYPE = re.compile(r"fastvit::\w+\(\) Expected a value of type '(.+?)' for argument '(\w+)' but .+ type '(\w+)'")


def _call(op: Any, kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if _concerns_nobody_else(arguments):
        try:
            return kernel(*arguments)
        except Exception:  # the dispatcher, which checks types, says what is wrong
            pass
    try:
        return op(*arguments)
    except RuntimeError as error:
        if (wrong := _WRONG_TYPE.match(str(error))) is None:
            raise
        accepted, name, given = wrong.groups()
        raise TypeError(f"{name}: {given} is not accepted; give {accepted}") from None


def _concerns_nobody_else(arguments: tuple[Any, ...]) -> bool:
    """Would the dispatcher, at some ten microseconds, only call the kernel?

    So it is where nothing is differentiated, recorded or traced, for plain tensors on a CPU, which have kinds.
    """
    extension = _backend.extension()
    if extension is None or extension.kinds_of(arguments) is None:
        return False
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return False
    return not (
        torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch.autograd._profiler_enabled()
    )


def is_transformed() -> bool:
    """Does a torch.func transform or forward-mode AD see this call?  They lack rules for custom operators.

    While torch.compile traces: does forward-mode AD?  It would take the tangent for zero; vmap loops, grad raises.
    """
    if torch.compiler.is_compiling():
        return torch.autograd.forward_ad._current_level >= 0
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _recompute(
    reference: Callable[..., Tensor], arguments: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...], twice: bool
) -> tuple[Tensor | None, ...]:
    """The gradient of every argument that needs one, through autograd of the reference.

    twice: the gradients will be differentiated again (`create_graph=True`).
    """

    def leaf(t: Tensor, needed: bool) -> Tensor:
        # A view, because arguments may depend on one another, and a gradient is of its own argument alone.
        return t.view_as(t) if twice else t.detach().requires_grad_(needed)

    wanted = [i for i, needed in enumerate(needs) if needed]
    with torch.enable_grad():
        leaves = [leaf(a, needed) if isinstance(a, Tensor) else a for a, needed in zip(arguments, needs, strict=True)]
        output = reference(*leaves)
    grads = torch.autograd.grad(output, [leaves[i] for i in wanted], grad, allow_unused=True, create_graph=twice)
    result: list[Tensor | None] = [None] * len(leaves)
    for i, g in zip(wanted, grads, strict=True):
        result[i] = g
    return tuple(result)


def gradients_like(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What a backward operator returns, empty: a contiguous gradient for each tensor that needs one."""
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]


def as_gradients(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """A backward operator's result from a launcher's: the gradients that are needed, in their tensors' dtypes.

    A launcher may have left out dimensions of one.
    """
    return [
        g.to(t.dtype).view(t.shape)
        for g, t, needed in zip(grads, tensors, needs, strict=True)
        if needed and g is not None and t is not None
    ]


def spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """A backward operator's result as autograd wants it: None for what needs no gradient."""
    left = iter(grads)
    return [next(left) if needed else None for needed in needs]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that products run in under autocast, or None outside it (and for float64, which autocast leaves)."""
    device = "cpu" if x.is_cpu else x.device.type  # which makes a string at every call
    if device == "meta":  # which autocast does not know
        return None
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def in_dtype(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Run the reference as eager PyTorch would: under autocast to `dtype`, or plainly when it is None."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
