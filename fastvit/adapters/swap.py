"""The swap itself: a module's class becomes a subclass of its own, with another forward.

Parameters, buffers, hooks, attributes and isinstance stay because the object stays; the undo is the old class.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.adapters.parts import NotServed, call_obstacle, mode_obstacle, run_block

# Why a module last ran its original forward; beside the modules, so that they gain no attribute.
_fallbacks: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def last_fallback(module: nn.Module) -> str | None:
    return _fallbacks.get(module)


def _note_fallback(module: nn.Module, reason: str | None) -> None:
    if torch.compiler.is_compiling():
        return
    if reason is not None:
        _fallbacks[module] = reason
    elif module in _fallbacks:
        del _fallbacks[module]


class Fused:
    """Mixin of every swapped class."""

    fastvit_original: type[nn.Module]
    # How the module runs now, for the report.
    fastvit_sentence: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle and deepcopy look classes up by name, and the made class shares its original's name.
        return _rebuild, (self.fastvit_original, fused_mixin(type(self))), self.__getstate__()  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the original's source."""
        twin = self.fastvit_original.__new__(self.fastvit_original)
        twin.__dict__.update(self.__dict__)
        return twin


class FusedBlock(Fused):
    """A pre-norm block in five operators; `fastvit_library` is the adapter that knows its names."""

    fastvit_library: Any
    fastvit_returns_tuple: bool
    fastvit_sentence = "norm_linear, attention, linear_residual, norm_linear, linear_residual"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        obstacle, x = _hidden_states(args, kwargs)
        if obstacle is None:
            try:
                parts = self.fastvit_library.read(self)
                obstacle = call_obstacle(parts, x, self.training)  # type: ignore[attr-defined]
            except NotServed as reason:
                obstacle = str(reason)
        _note_fallback(self, obstacle)  # type: ignore[arg-type]
        if obstacle is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        out = run_block(parts, x)
        return (out,) if self.fastvit_returns_tuple else out


class FusedPatchConv(Fused):
    """A convolution whose stride is its kernel, as one product over patches."""

    fastvit_sentence = "patch_embed"

    def forward(self, input: Any) -> Any:
        conv: Any = self
        obstacle = None
        if type(input) is not Tensor and type(input) is not nn.Parameter:
            obstacle = f"input is {type(input).__name__}, not a plain tensor"
        elif input.ndim != 4 or input.shape[1] != conv.in_channels or not input.is_floating_point():
            obstacle = f"input has shape {tuple(input.shape)} and dtype {input.dtype}"
        elif any(size < patch for size, patch in zip(input.shape[2:], conv.kernel_size, strict=True)):
            obstacle = f"image {tuple(input.shape[2:])} is smaller than the patch"
        elif input.dtype != conv.weight.dtype and not torch.is_autocast_enabled(input.device.type):
            obstacle = f"input is {input.dtype}, but the weights are not"
        elif type(conv.weight) is not nn.Parameter and type(conv.weight) is not Tensor:
            obstacle = f"weight is {type(conv.weight).__name__}"
        else:
            obstacle = mode_obstacle()
        _note_fallback(conv, obstacle)
        if obstacle is not None:
            return super().forward(input)  # type: ignore[misc]
        p1, p2 = conv.kernel_size
        grid = (input.shape[2] // p1, input.shape[3] // p2)
        # Like the convolution, ignore what lies beyond the last whole patch.
        tokens = ops.patch_embed(input[:, :, : grid[0] * p1, : grid[1] * p2], conv.weight, conv.bias)
        # The tokens' memory seen as (B, D, rows, columns): flattening it back costs nothing.
        return tokens.transpose(1, 2).unflatten(2, grid)


# Demands on the model, passed down to every layer, that change nothing inside a layer.
_HARMLESS = {"output_hidden_states", "return_dict", "interpolate_pos_encoding"}


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """(why not, None) or (None, hidden states): the fused path takes one tensor and no other demand."""
    named = {k: v for k, v in kwargs.items() if v is not None and v is not False and k not in _HARMLESS}
    extra = [type(a).__name__ for a in args[1:] if a is not None and a is not False]
    x = args[0] if args else named.pop("hidden_states", named.pop("x", named.pop("input", None)))
    if named or extra:
        return f"called with {', '.join([*named, *extra])}", None
    return (None, x) if x is not None else ("called without hidden states", None)


@functools.cache
def fused_class(original: type[nn.Module], mixin: type[Fused], library: Any = None) -> type[nn.Module]:
    """The subclass of `original` that runs `mixin`'s forward.  It goes by its original's name."""
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "fastvit_original": original,
        "fastvit_mixin": mixin,
        "fastvit_library": library,
    }
    if mixin is FusedBlock:
        # CLIP of transformers 4 returns a tuple, with the attentions behind when they are asked for.
        namespace["fastvit_returns_tuple"] = "output_attentions" in inspect.signature(original.forward).parameters
    return type(original.__name__, (mixin, original), namespace)


def fused_mixin(cls: type) -> tuple[type[Fused], Any]:
    return cls.fastvit_mixin, cls.fastvit_library  # type: ignore[attr-defined]


def _rebuild(original: type[nn.Module], mixin: tuple[type[Fused], Any]) -> nn.Module:
    cls = fused_class(original, *mixin)
    return cls.__new__(cls)


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, Fused)


def swap_in(module: nn.Module, mixin: type[Fused], library: Any = None) -> None:
    module.__class__ = fused_class(type(module), mixin, library)


def swap_out(module: nn.Module) -> None:
    if is_fused(module):
        module.__class__ = module.fastvit_original  # type: ignore[assignment]
        _fallbacks.pop(module, None)


# ---- Proof by probe -------------------------------------------------------------------------------

_PROBE_TOKENS = 5
_PROBE_TOLERANCE = 1e-4
# Class signature of a block -> why the fused block is not the same function, or None.
_probed: dict[tuple[type, ...], str | None] = {}


def probe(block: nn.Module, library: Any) -> str | None:
    """Run a random copy of the block both ways; returns why the fused one must not replace it, or None.

    Structure alone can't see that somebody's subclass computes something else with the same children.
    """
    signature = tuple(type(m) for m in block.modules())
    if signature not in _probed:
        _probed[signature] = _compare_once(block, library)
    return _probed[signature]


def _compare_once(block: nn.Module, library: Any) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        try:
            twin = copy.deepcopy(block).to_empty(device="cpu").float().eval()
        except Exception as error:
            return f"can't be copied for a trial run ({type(error).__name__})"
        for module in twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for p in twin.parameters():
            # Matrices keep the scale of their input; vectors (norms, biases, LayerScale) are around one.
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1))
        parts = library.read(twin)
        x = torch.randn(2, _PROBE_TOKENS, parts.qkv[0][0].shape[1])
        arguments: list[Any] = [x]
        # Later required parameters are masks.
        for parameter in list(inspect.signature(type(twin).forward).parameters.values())[2:]:
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                arguments.append(None)
        try:
            expected = type(twin).forward(twin, *arguments)
        except Exception as error:
            return f"its forward needs more than hidden states ({type(error).__name__})"
        if isinstance(expected, tuple):
            expected = expected[0]
        actual = run_block(parts, x)
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return "its forward returns something else"
    error = (actual - expected).norm() / expected.norm()
    return None if error < _PROBE_TOLERANCE else "its forward computes something else"
