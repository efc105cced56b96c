"""What a pre-norm transformer block is made of, and the one sentence of operators that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastvit import ops
from fastvit.nn._spelling import activation_name, norm_arguments
from fastvit.nn.attention import Projection, project_heads

# A probability, and the module in whose training mode it acts.
Dropout = tuple[float, nn.Module]


class Quantization(NamedTuple):
    """How a block's linears multiply: in "int8", or in the dtype of the model (None)."""

    qkv: str | None = None
    proj: str | None = None
    fc1: str | None = None
    fc2: str | None = None
    # (linear, why it is None), where int8 was asked for.
    notes: tuple[tuple[str, str], ...] = ()


FLOAT = Quantization()


# cos and sin, each (P, head_dim): what turns q and k of the last P tokens.
Angles = tuple[Tensor, Tensor]


class RopeArgument(NamedTuple):
    """How a library's blocks are told the rotary positions of their tokens: by an argument of their forward."""

    name: str
    required: bool  # does a forward that has it fail without?
    read: Callable[[Any], Angles]  # the argument as angles; raises NotServed
    make: Callable[[Angles], Any]  # the other way


class BlockParts(NamedTuple):
    """The modules and tensors of x + attention(norm1(x)), then x + mlp(norm2(x)), in the order that data flows.

    Read from the block at every call, so a weight or setting that is replaced takes effect at once.
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
    dropouts: tuple[Dropout, ...]
    config: Any = None  # an object outside the modules whose attributes were read
    quantization: Quantization = FLOAT
    proj_norm: nn.Module | None = None  # before proj
    fc2_norm: nn.Module | None = None  # before fc2
    rope_interleaved: bool = False
    rope_prefix: int | None = None  # how many first tokens are not rotated; None: those that the angles don't cover
    copied: tuple[Tensor, ...] = ()  # what a tensor above was copied from
    bias: Tensor | None = None  # (1, num_heads, N, N), added to the scores of N tokens


class Readout(NamedTuple):
    """How a classifier reads its last block."""

    blocks: nn.ModuleList | nn.Sequential
    tokens: int  # how many of the first tokens of the last block the head reads
    route: tuple[nn.Module, ...]  # whose forwards the tokens pass on their way to the head, the classifier's own first
    norms: tuple[nn.Module | None, ...]  # what all tokens pass on that way: nothing that mixes them


class NotServed(Exception):
    """Why a module or a call can't be expressed in the operators; the message is shown in the report."""


def explain(error: Exception) -> str:
    """An error as a reason for the report."""
    if not isinstance(error, AttributeError) or not error.name:
        return str(error) or type(error).__name__
    if error.obj is None:
        return f"a module with {error.name} is missing"
    return f"{type(error.obj).__name__} has no {error.name}, which its adapter needs"


def run_block(p: BlockParts, x: Tensor, tokens: int | None = None, angles: Angles | None = None) -> Tensor:
    """self_attention, mlp: the block in two operators, or in those that these are made of.

    tokens: compute only the first so many tokens, (B, tokens, D); not with angles.
    """
    norm1, norm2 = read_norm(p.norm1, x.dtype), read_norm(p.norm2, x.dtype)
    activation = _activation(p)
    qkv, proj, fc1, fc2, _ = p.quantization

    drop_path1 = _drop_path(p.drop_path1, x, p.layer_scale1)
    if (p.q_norm, p.k_norm, p.proj_norm, tokens) == (None,) * 4:
        weights, biases = zip(*p.qkv, strict=True)
        x = ops.self_attention(
            x,
            weights if len(weights) == 3 else weights[0],
            biases if len(weights) == 3 else biases[0],
            *p.proj,
            num_heads=p.num_heads,
            scale=p.scale,
            bias=p.bias,
            rope=angles,
            rope_interleaved=p.rope_interleaved,
            **norm1,
            layer_scale=p.layer_scale1,
            drop_path=drop_path1,
            quantize=(qkv, proj),
        )
    else:
        x = ops.linear_residual(
            heads(p, x, norm1, tokens, angles),
            *p.proj,
            residual=x[:, :tokens],
            layer_scale=p.layer_scale1,
            drop_path=drop_path1,
            quantize=proj,
        )
    drop_path2 = _drop_path(p.drop_path2, x, p.layer_scale2)
    if len(p.fc1) == 1 and p.fc2_norm is None:
        return ops.mlp(
            x,
            *p.fc1[0],
            *p.fc2,
            **norm2,
            activation=activation,
            layer_scale=p.layer_scale2,
            drop_path=drop_path2,
            quantize=(fc1, fc2),
        )
    between = hidden(p, x, norm2)
    return ops.linear_residual(
        between, *p.fc2, residual=x, layer_scale=p.layer_scale2, drop_path=drop_path2, quantize=fc2
    )


def heads(
    p: BlockParts, x: Tensor, norm1: dict[str, Any], tokens: int | None = None, angles: Angles | None = None
) -> Tensor:
    """What goes into proj, where q or k may be normalised (Dehghani et al. 2023) and the last tokens have no query."""
    q, k, v = project_heads(x, p.qkv, p.num_heads, tokens, **norm1, quantize=p.quantization.qkv)
    if p.q_norm is not None:
        q = p.q_norm(q)
    if p.k_norm is not None:
        k = p.k_norm(k)
    bias = None if p.bias is None else p.bias[:, :, :tokens]
    out = ops.attention(
        q, k.to(q.dtype), v.to(q.dtype), scale=p.scale, bias=bias, rope=angles, rope_interleaved=p.rope_interleaved
    )
    return out if p.proj_norm is None else p.proj_norm(out)


def hidden(p: BlockParts, x: Tensor, norm2: dict[str, Any]) -> Tensor:
    """What goes into fc2, where gate and value may be two linears."""
    norm2 = {**norm2, "quantize": p.quantization.fc1}
    out = ops.norm_linear(x, *p.fc1[0], **norm2, activation=_activation(p))
    if len(p.fc1) == 2:
        out = out * ops.norm_linear(x, *p.fc1[1], **norm2)
    return out if p.fc2_norm is None else p.fc2_norm(out)


def _activation(p: BlockParts) -> str:
    return p.activation if isinstance(p.activation, str) else read_activation(p.activation)


# ---- Whether a call can be served ------------------------------------------------------------------


# What the operators take.  The last two stand for plain tensors while torch.export traces.
PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def input_obstacle(x: Any, weights: tuple[Tensor | None, ...], ndim: int) -> str | None:
    """Why these tensors need the original forward, or None."""
    if type(x) not in PLAIN:
        return f"input is {type(x).__name__}, not a plain tensor"
    if x.ndim != ndim or x.layout is not torch.strided:
        return f"input has shape {tuple(x.shape)} and layout {x.layout}"
    if not x.is_floating_point() or x.is_meta:
        return f"input is {x.dtype} on {x.device}"
    autocast = torch.is_autocast_enabled(x.device.type)
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in PLAIN:
            return f"a weight is {type(weight).__name__}, not a plain tensor"
        if weight.dtype != x.dtype and not autocast:
            return f"input is {x.dtype}, but a weight is {weight.dtype}"
    return None


def block_obstacle(p: BlockParts, x: Any, angles: Angles | None = None) -> str | None:
    """Why this call of a block must run the original forward, or None."""
    weights = [t for projection in (*p.qkv, p.proj, *p.fc1, p.fc2) for t in projection]
    if obstacle := input_obstacle(x, tuple(weights), 3):
        return obstacle
    if angles is not None and p.rope_prefix is not None and angles[0].shape[0] + p.rope_prefix != x.shape[1]:
        return f"rotary positions for {angles[0].shape[0]} of {x.shape[1]} tokens, {p.rope_prefix} not rotated"
    if p.bias is not None and p.bias.shape[-1] != x.shape[1]:
        return f"position biases for {p.bias.shape[-1]} tokens, not {x.shape[1]}"
    return training_obstacle(p) or mode_obstacle()


def training_obstacle(p: BlockParts) -> str | None:
    """Why the random numbers of training need the original forward, or None."""
    if any(probability and module.training for probability, module in p.dropouts):
        return "dropout in training"
    for drop_path in (p.drop_path1, p.drop_path2):
        if drop_path is not None and drop_path.training and not _is_known_drop_path(drop_path):
            return f"{type(drop_path).__name__} in training"
    return None


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


# ---- DropPath and dropout --------------------------------------------------------------------------


def _is_known_drop_path(module: nn.Module) -> bool:
    library, name = _origin(module)
    return (
        type(module) is nn.Identity
        or (library, name) in (("timm.layers.drop", "DropPath"), ("fastvit.nn.layers", "DropPath"))
        or (library.startswith("transformers.models.") and name.endswith("DropPath"))
    )


def _drop_path(module: nn.Module | None, x: Tensor, layer_scale: Tensor | None) -> Tensor | None:
    """(B,) factors of a library's DropPath, from the same random numbers; None where nothing is dropped."""
    probability = getattr(module, "drop_prob", None)
    if module is None or not module.training or not probability:
        return None
    if (factors_of := getattr(module, "factors", None)) is not None:  # fastvit.nn
        return factors_of(x)
    keep = 1.0 - probability
    # The libraries draw in the dtype of the branch.
    dtype = x.dtype
    if layer_scale is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    shape = (x.shape[0], 1, 1)
    if hasattr(module, "scale_by_keep"):  # timm
        factors = torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(keep)
        if keep > 0.0 and module.scale_by_keep:
            factors = factors.div_(keep)
    else:  # transformers
        factors = torch.rand(shape, dtype=dtype, device=x.device).add(keep).floor().div(keep)
    return factors.flatten()


def dropout(module: nn.Module) -> Dropout:
    """The probability of a dropout module; one of an unknown kind counts as acting."""
    if isinstance(module, nn.Identity):
        return 0.0, module
    return (module.p if type(module) is nn.Dropout else 1.0), module


# ---- Whose code a module is ------------------------------------------------------------------------

LIBRARIES = ("timm", "transformers", "torchvision", "open_clip", "fastvit", "torch")


def is_published(defined: Any) -> bool:
    """Does a library define this class, whose settings are known here, or this function?"""
    return defined.__module__.partition(".")[0] in LIBRARIES


def own_numbers(modules: Iterable[object]) -> tuple[tuple[tuple[str, Any], ...], ...]:
    """The numbers and words that modules of somebody's own class hold: any may be a factor in its forward."""
    return tuple(
        tuple((k, v) for k, v in m.__dict__.items() if isinstance(v, (int, float, str)) and k != "training")
        for m in modules
        if not is_published(type(m))
    )


# ---- Rotary positions ------------------------------------------------------------------------------


def read_angles(argument: RopeArgument | None, value: Any) -> Angles | None:
    """What a block was called with; raises NotServed."""
    if argument is None:
        return None
    if value is None:
        if argument.required:
            raise NotServed(f"called without {argument.name}")
        return None
    cos, sin = argument.read(value)
    for t in (cos, sin):
        if type(t) not in PLAIN or t.ndim != 2 or not t.is_floating_point():
            what = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise NotServed(f"{argument.name} has {what}, not angles by token and channel")
    return cos, sin


# ---- Reading modules -------------------------------------------------------------------------------


# Reading happens at every call of a block, and nn.Module.__getattr__ takes microseconds: these look directly.


def child(module: nn.Module | None, *names: str) -> Any:
    """The first submodule of one of these names, or None."""
    if module is not None:
        for name in names:
            if (found := module._modules.get(name)) is not None:
                return found
    return None


def tensor(module: nn.Module, name: str) -> Any:
    # DataParallel's replicas have plain tensors in place of parameters.
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def linear(module: nn.Module) -> Projection:
    """The tensors of a linear layer."""
    return tensor(module, "weight"), tensor(module, "bias")


def layer_scale(module: nn.Module | None, name: str) -> Tensor | None:
    """The tensor of a LayerScale; None where there is none (or an Identity)."""
    return None if module is None or type(module) is nn.Identity else tensor(module, name)


def check_linear(module: nn.Module | None, name: str) -> None:
    """Only a plain nn.Linear is served, nothing wrapped around it (LoRA, quantisation); raises NotServed."""
    if module is None:
        raise NotServed(f"{name} is missing")
    # torch makes this subclass for out_proj; its forward is Linear's.
    if type(module) is not nn.Linear and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise NotServed(f"{name} is {type(module).__name__}, not nn.Linear")
    if (shape := tuple(module.weight.shape)) != (module.out_features, module.in_features):
        raise NotServed(f"{name}.weight has shape {shape}: optimize before it is sharded")


def check_contents(module: nn.Module, children: set[str], name: str, tensors: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Structure is trusted only when nothing is there that the sentence doesn't say; raises NotServed."""
    # Identity and None say nothing; an unknown child that computes does.
    extra = {n for n, child in module.named_children() if n not in children and type(child) is not nn.Identity}
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    extra |= {n for n, _ in own if n not in tensors}
    if extra:
        raise NotServed(f"{name} has {', '.join(sorted(extra))}")


def inner_norm(module: Any, name: str) -> nn.Module | None:
    """A norm inside attention or MLP; None where there is none (or an Identity)."""
    norm = child(module, name)
    return None if type(norm) is nn.Identity else norm


def check_layer_scale(module: nn.Module | None, name: str) -> None:
    if module is not None and type(module) is not nn.Identity:
        check_contents(module, set(), "LayerScale", {name})
        gamma = getattr(module, name, None)
        if gamma is None or gamma.ndim != 1:
            raise NotServed(f"{type(module).__name__} is no LayerScale")


def check_multihead_attention(attn: Any, name: str) -> None:
    """Only torch's own, with one packed projection of samples that come first; raises NotServed."""
    if type(attn) is not nn.MultiheadAttention:
        raise NotServed(f"{name} is {type(attn).__name__}")
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
        raise NotServed(f"{name} has split projections, bias_k, add_zero_attn or batch_first=False")
    check_linear(attn.out_proj, f"{name}.out_proj")


# Norms and activations of the libraries that compute what torch's own do, by module and class name.
_NORMS = {
    ("timm.layers.norm", "LayerNorm"): nn.LayerNorm,
    ("timm.layers.norm", "LayerNormFp32"): nn.LayerNorm,
    ("timm.layers.norm", "RmsNorm"): nn.RMSNorm,
    ("timm.layers.norm", "RmsNormFp32"): nn.RMSNorm,
    ("open_clip.transformer", "LayerNorm"): nn.LayerNorm,
    ("open_clip.transformer", "LayerNormFp32"): nn.LayerNorm,
}
_ACTIVATIONS = {
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
    ("timm.layers.activations", "QuickGELU"): "quick_gelu",
    ("open_clip.transformer", "QuickGELU"): "quick_gelu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "FastGELUActivation"): "gelu_tanh",
    ("transformers.activations", "QuickGELUActivation"): "quick_gelu",
    ("transformers.activations", "SiLUActivation"): "silu",
}


def _origin(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def read_norm(module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """A norm as arguments of `norm_linear`; raises NotServed."""
    library, name = _origin(module)
    if library.startswith("transformers.models.") and name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return {"norm": "rms", "norm_weight": module.weight, "eps": module.variance_epsilon}
    kind: type[nn.Module] = _NORMS.get((library, name), type(module))
    known = kind in (nn.LayerNorm, nn.RMSNorm, nn.Identity)
    arguments = norm_arguments(module, dtype, kind) if known else None
    if arguments is None:
        raise NotServed(f"norm is {type(module).__name__}")
    return arguments


def read_activation(module: nn.Module) -> str:
    """An activation's name in the operators; raises NotServed."""
    name = activation_name(module) or _ACTIVATIONS.get(_origin(module))
    if name is None:
        raise NotServed(f"activation is {type(module).__name__}")
    return name
