"""Whether an operator may stand for modules: one that somebody listens to, or has replaced, must be called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def descendants(module: nn.Module) -> list[nn.Module]:
    """All modules inside, each as often as it occurs."""
    # As fast as can be: it runs at every call of a block.
    found: list[nn.Module] = []
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            if child._modules:
                found += descendants(child)
    return found


def kinds_inside(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The types of all modules inside."""
    return tuple(map(type, descendants(module)))


def can_bypass(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Are the modules inside what they were made as (`kinds_inside` then), and would nobody notice their absence?"""
    inner = descendants(module)
    return tuple(map(type, inner)) == kinds and listener_obstacle(inner) is None


def listener_obstacle(bypassed: Iterable[nn.Module]) -> str | None:
    """Why one of these modules must be called as a module: somebody listens to it, or gave it another forward."""
    registry = torch.nn.modules.module
    if registry._global_forward_hooks or registry._global_forward_pre_hooks:
        return "global module hooks"
    if registry._global_backward_hooks or registry._global_backward_pre_hooks:
        return "global module hooks"
    for module in bypassed:
        if (obstacle := own_listener(module)) is not None:
            return obstacle
    return None


def own_listener(module: nn.Module) -> str | None:
    """`listener_obstacle` of one module, global hooks apart."""
    if module._forward_hooks and not all(_is_idle_capture(hook) for hook in module._forward_hooks.values()):
        return f"forward hook on {type(module).__name__}"
    if module._forward_pre_hooks:
        return f"forward pre-hook on {type(module).__name__}"
    if module._backward_hooks or module._backward_pre_hooks:
        return f"backward hook on {type(module).__name__}"
    if "forward" in module.__dict__ and not has_own_forward(module):
        return f"forward of {type(module).__name__} was replaced"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Is the forward on the instance, if any, the class's own?

    transformers 4 assigns it: it wraps `forward` to record attentions and puts the bound method back afterwards.
    """
    forward = module.__dict__.get("forward")
    return forward is None or (
        getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
    )


def _is_idle_capture(hook: Any) -> bool:
    """Is this transformers' recording hook, which stays installed but records only when attentions are asked for?"""
    if getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    if torch.compiler.is_compiling():
        return True  # a compiled model asks through an argument or its configuration, and both are looked at
    collector = hook.__globals__["_active_collector"].get()
    return collector is None or "attentions" not in collector
