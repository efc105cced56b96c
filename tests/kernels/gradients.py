"""Gradients by autograd of the plain definition: in float64 the truth, in lower precision what eager PyTorch gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tests import nasty
from tests.tolerances import assert_close


def by_autograd(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], grad: Tensor, **options: object
) -> dict[str, Tensor]:
    """The gradient of every tensor that `function(**tensors, **options)` takes, given the result's."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    function(**{**dict.fromkeys(tensors), **leaves}, **options).backward(grad)
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


def assert_gradients(
    actual: Mapping[str, Tensor | None],
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    grad: Tensor,
    **options: object,
) -> None:
    """Every gradient in `actual` that is not None is as near to float64's as its dtype demands."""
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    truth = by_autograd(function, double, grad.double(), **options)
    eager = by_autograd(function, tensors, grad, **options)
    compared = {name: g for name, g in actual.items() if g is not None}
    assert compared
    for name, mine in compared.items():
        # A launcher may return float32; the operator rounds to the argument's dtype, as eager does.
        mine = mine.cpu().to(eager[name].dtype)
        try:
            assert_close(mine, truth[name], eager=eager[name])
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def seed(*shape: int) -> Tensor:
    """float64 (shape): the gradient of a result.

    No massive channel: sums over rows would be one number each for it, whose rounding, a matter of luck, is all that
    relative L2 sees.
    """
    return nasty.tokens(*shape, seed=9, massive=0)
