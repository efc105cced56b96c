"""What a pre-norm transformer block is made of, and the one sentence of operators that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.nn._spelling import activation_name, norm_arguments

# A linear layer's tensors: weight (N, K), bias (N,) or None.
Projection = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class BlockParts:
    """The modules and tensors of x + attention(norm1(x)), then x + mlp(norm2(x)), in the order that data flows.

    Read from the block at every call, so a weight or module that is replaced takes effect at once.
    """

    norm1: nn.Module
    qkv: tuple[Projection, ...]  # one packed [q; k; v], or three
    num_heads: int
    scale: float
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    proj: Projection
    layer_scale1: Tensor | None
    drop_path1: nn.Module | None
    norm2: nn.Module
    fc1: tuple[Projection, ...]  # one, or gate and value of a SwiGLU
    activation: nn.Module | str  # a module, or "swiglu" for one packed [gate; value]
    fc2: Projection
    layer_scale2: Tensor | None
    drop_path2: nn.Module | None
    dropouts: tuple[float, ...]  # probabilities that act in training
    bypassed: tuple[nn.Module, ...]  # modules whose __call__ the fused path skips


class NotServed(Exception):
    """Why a module or a call can't be expressed in the operators; the message is shown in the report."""


def run_block(p: BlockParts, x: Tensor) -> Tensor:
    """norm_linear, attention, linear_residual, norm_linear, linear_residual."""
    norm1, norm2 = read_norm(p.norm1, x.dtype), read_norm(p.norm2, x.dtype)
    activation = p.activation if isinstance(p.activation, str) else read_activation(p.activation)

    projected = [ops.norm_linear(x, weight, bias, **norm1) for weight, bias in p.qkv]
    if len(projected) == 1:
        q, k, v = projected[0].unflatten(-1, (3, p.num_heads, -1)).unbind(2)
    else:
        q, k, v = (t.unflatten(-1, (p.num_heads, -1)) for t in projected)
    if p.q_norm is not None:
        q = p.q_norm(q)
    if p.k_norm is not None:
        k = p.k_norm(k)
    heads = ops.attention(q, k.to(q.dtype), v.to(q.dtype), scale=p.scale)
    x = ops.linear_residual(
        heads, *p.proj, residual=x, layer_scale=p.layer_scale1, drop_path=drop_path_factors(p.drop_path1, x)
    )
    if len(p.fc1) == 1:
        hidden = ops.norm_linear(x, *p.fc1[0], **norm2, activation=activation)
    else:
        gate, value = p.fc1
        hidden = ops.norm_linear(x, *gate, **norm2, activation=activation) * ops.norm_linear(x, *value, **norm2)
    return ops.linear_residual(
        hidden, *p.fc2, residual=x, layer_scale=p.layer_scale2, drop_path=drop_path_factors(p.drop_path2, x)
    )


def call_obstacle(p: BlockParts, x: Any, training: bool) -> str | None:
    """Why this call must run the original forward, or None."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"input is {type(x).__name__}, not a plain tensor"
    if x.ndim != 3 or x.layout is not torch.strided:
        return f"input has shape {tuple(x.shape)} and layout {x.layout}; served: strided (B, N, C)"
    if not x.is_floating_point():
        return f"input is {x.dtype}"
    if not torch.is_autocast_enabled(x.device.type) and any(w.dtype != x.dtype for w, _ in (*p.qkv, p.proj, *p.fc1)):
        return f"input is {x.dtype}, but the weights are not"
    for weight, _ in (*p.qkv, p.proj, *p.fc1, p.fc2):
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"a weight is {type(weight).__name__}, not a plain tensor"
    if training and any(p.dropouts):
        return "dropout in training"
    return mode_obstacle() or _hook_obstacle(p.bypassed)


def mode_obstacle() -> str | None:
    """Why the way in which torch runs now needs the original forward: it lacks rules for custom operators."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD"
    return None


def _hook_obstacle(bypassed: tuple[nn.Module, ...]) -> str | None:
    """Why one of these modules must be called as a module: somebody listens to it."""
    registry = torch.nn.modules.module
    if registry._global_forward_hooks or registry._global_forward_pre_hooks or registry._global_backward_hooks:
        return "global module hooks"
    for module in bypassed:
        if module._forward_hooks and not all(_is_idle_capture(hook) for hook in module._forward_hooks.values()):
            return f"forward hook on {type(module).__name__}"
        if module._forward_pre_hooks:
            return f"forward pre-hook on {type(module).__name__}"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"backward hook on {type(module).__name__}"
        if "forward" in module.__dict__:
            return f"forward of {type(module).__name__} was replaced"
    return None


def _is_idle_capture(hook: Any) -> bool:
    """Is this transformers' recording hook, which stays installed but records only when attentions are asked for?"""
    if getattr(hook, "__name__", "") != "output_capturing_hook":
        return False
    if torch.compiler.is_compiling():
        return True  # transformers can't record inside a compiled graph
    collector = hook.__globals__["_active_collector"].get()
    return collector is None or "attentions" not in collector


def drop_path_factors(drop_path: nn.Module | None, x: Tensor) -> Tensor | None:
    """(B,) factors of a library's DropPath, drawn as that library draws them; None where nothing is dropped."""
    probability = getattr(drop_path, "drop_prob", None)
    if drop_path is None or not drop_path.training or not probability:
        return None
    keep = 1.0 - probability
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    if hasattr(drop_path, "scale_by_keep"):  # timm
        factors = x.new_empty(shape).bernoulli_(keep)
        if keep > 0.0 and drop_path.scale_by_keep:
            factors = factors.div_(keep)
    else:  # transformers
        factors = torch.rand(shape, dtype=x.dtype, device=x.device).add(keep).floor().div(keep)
    return factors.flatten()


def linear(module: nn.Module, name: str) -> Projection:
    """The tensors of a plain nn.Linear; anything wrapped around it (LoRA, quantisation) is not served."""
    # torch makes this subclass for out_proj; its forward is Linear's.
    if type(module) is not nn.Linear and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise NotServed(f"{name} is {type(module).__name__}, not nn.Linear")
    return module.weight, module.bias


# Norms and activations of the libraries that compute what torch's own do, by module and class name.
_NORMS = {("timm.layers.norm", "LayerNorm"), ("timm.layers.norm", "LayerNormFp32")}
_ACTIVATIONS = {
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
    ("timm.layers.activations", "QuickGELU"): "quick_gelu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "QuickGELUActivation"): "quick_gelu",
    ("transformers.activations", "SiLUActivation"): "silu",
}


def _origin(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def read_norm(module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """A norm as arguments of `norm_linear`; raises NotServed."""
    known = type(module) in (nn.LayerNorm, nn.RMSNorm, nn.Identity) or _origin(module) in _NORMS
    arguments = norm_arguments(module, dtype) if known else None
    if arguments is None:
        raise NotServed(f"norm is {type(module).__name__}")
    return arguments


def read_activation(module: nn.Module) -> str:
    """An activation's name in the operators; raises NotServed."""
    name = activation_name(module) or _ACTIVATIONS.get(_origin(module))
    if name is None:
        raise NotServed(f"activation is {type(module).__name__}")
    return name


def check_children(module: nn.Module, expected: set[str], name: str = "block") -> None:
    """Structure is trusted only when nothing is there that the sentence doesn't say."""
    # Identity and None say nothing; an unknown child that computes does.
    extra = {n for n, child in module.named_children() if n not in expected and type(child) is not nn.Identity}
    if extra:
        raise NotServed(f"{name} has {', '.join(sorted(extra))}")
