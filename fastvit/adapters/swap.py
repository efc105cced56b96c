"""The swap itself: a module's class becomes a subclass of its own, with another forward.

Parameters, buffers, hooks, attributes and isinstance stay because the object stays; the undo is the old class.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from fastvit import ops
from fastvit.adapters.parts import (
    FLOAT,
    Angles,
    BlockParts,
    NotServed,
    Quantization,
    RopeArgument,
    block_obstacle,
    explain,
    input_obstacle,
    mode_obstacle,
    own_numbers,
    read_angles,
    run_block,
    training_obstacle,
)
from fastvit.adapters.prepared import forget, prepare, run_prepared
from fastvit.nn._listeners import descendants, has_own_forward, listener_obstacle
from fastvit.ops import _int8

# What a class that `fused_class` made has, and nobody else.
_MADE = "fastvit_original"

# Why a module last ran its original forward; beside the modules, so that they gain no attribute.
_fallbacks: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def last_fallback(module: nn.Module) -> str | None:
    return _fallbacks.get(module)


def note_fallback(module: nn.Module, reason: str | None) -> None:
    if torch.compiler.is_compiling():
        return
    if reason is not None:
        _fallbacks[module] = reason
    elif module in _fallbacks:
        del _fallbacks[module]


# The block whose first tokens alone are read in this thread's forward, and how many they are.
_reading = threading.local()


@contextlib.contextmanager
def reading(block: nn.Module, tokens: int) -> Iterator[None]:
    """What comes out of `block` is read no further than its first tokens."""
    before = getattr(_reading, "now", None)
    _reading.now = (block, tokens)
    try:
        yield
    finally:
        _reading.now = before


def _tokens_read(block: nn.Module) -> int | None:
    now = getattr(_reading, "now", None)
    return now[1] if now is not None and now[0] is block else None


class Fused:
    """Mixin of every swapped class; `fused_class` fills in the attributes."""

    fastvit_original: type[nn.Module]
    # The arguments of `fused_class` that made this class.
    fastvit_recipe: tuple[Any, ...]
    # The forwards that the fused one stands for: a class that is patched since must run its own.
    fastvit_forwards: tuple[Callable[..., Any], ...]
    # How the module runs now, for the report.
    fastvit_sentence: str
    # The adapter's function that reads the module.
    fastvit_reader: ClassVar[str] = "read"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and deepcopy look classes up by name, and the made class shares its original's name.
        forget(self)  # type: ignore[arg-type]
        return _rebuild, self.fastvit_recipe, *super().__reduce_ex__(protocol)[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the original's source."""
        twin = self.fastvit_original.__new__(self.fastvit_original)
        twin.__dict__.update(self.__dict__)
        forget(twin)
        return twin


class FusedBlock(Fused):
    """A pre-norm block in two operators, each made of others."""

    fastvit_sentence = "self_attention (norm_linear, attention, linear_residual), mlp (norm_linear, linear_residual)"
    fastvit_read: ClassVar[Callable[[Any], BlockParts]]
    # The types of all modules inside, as they were when the fused block was proven to be the same function.
    fastvit_types: tuple[type[nn.Module], ...]
    # What `own_numbers` said then of the block and them.
    fastvit_numbers: tuple[tuple[tuple[str, Any], ...], ...]
    fastvit_returns_tuple: bool
    fastvit_quantization: Quantization
    # How its forward takes rotary positions, if it does.
    fastvit_rope: RopeArgument | None
    # What its forward takes beside hidden states.
    fastvit_demands: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: Any = self
        obstacle, x, angles = _arguments(self.fastvit_demands, self.fastvit_rope, args, kwargs)
        out = None
        compiling = torch.compiler.is_compiling()
        tokens = None if compiling else _tokens_read(block)
        if obstacle is None and not compiling and (out := run_prepared(block, x, tokens, angles)) is not None:
            return (out,) if self.fastvit_returns_tuple else out
        if obstacle is None:
            inner = descendants(block)
            obstacle = self._structure_obstacle(inner) or listener_obstacle(inner)
        if obstacle is None:
            try:
                parts = self.fastvit_read()
                if self.fastvit_quantization != FLOAT:
                    parts = parts._replace(quantization=self.fastvit_quantization)
                obstacle = block_obstacle(parts, x, angles)
                if obstacle is None:
                    out = run_block(parts, x, tokens, angles)
                    if not compiling:
                        prepare(block, inner, parts, x)
            except (NotServed, ValueError, TypeError) as error:
                obstacle = str(error)
        note_fallback(block, obstacle)
        if out is None:
            if not compiling:
                forget(block)  # a prepared call would leave the note
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return (out,) if self.fastvit_returns_tuple else out

    def standing_obstacle(self) -> str | None:
        """Why any call would run the original forward, as the block is now."""
        block: Any = self
        inner = descendants(block)
        if obstacle := self._structure_obstacle(inner) or listener_obstacle(inner):
            return obstacle
        try:
            return training_obstacle(self.fastvit_read())
        except (NotServed, AttributeError) as error:
            return explain(error)

    def _structure_obstacle(self, inner: list[nn.Module]) -> str | None:
        types = self.fastvit_types
        for module, kind in zip(inner, types, strict=False):
            if type(module) is not kind:
                return f"{kind.__name__} was replaced by {type(module).__name__}"
        if len(inner) != len(types):
            return "modules were added or removed"
        if self.fastvit_numbers and own_numbers([self, *inner]) != self.fastvit_numbers:
            return f"a number in {type(self).__name__} has changed: restore and optimize again"
        if not torch.compiler.is_compiling():
            for kind, forward in zip((self.fastvit_original, *types), self.fastvit_forwards, strict=True):
                if kind.forward is not forward:
                    return f"{kind.__name__}.forward was replaced"
        return None


class FusedPatchConv(Fused):
    """A convolution whose stride is its kernel, as one product over patches."""

    fastvit_sentence = "patch_embed"

    def forward(self, input: Any) -> Any:
        conv: Any = self
        weight, bias = conv.weight, conv.bias
        obstacle = input_obstacle(input, (weight, bias), 4) or mode_obstacle()
        if obstacle is None:
            if input.shape[1] != weight.shape[1] or any(s < p for s, p in zip(input.shape[2:], weight.shape[2:])):  # noqa: B905
                obstacle = f"input has shape {tuple(input.shape)}"
            elif nn.Conv2d.forward is not self.fastvit_forwards[0]:
                obstacle = "Conv2d.forward was replaced"
        note_fallback(conv, obstacle)
        if obstacle is not None:
            return super().forward(input)  # type: ignore[misc]
        p1, p2 = weight.shape[2:]
        grid = (input.shape[2] // p1, input.shape[3] // p2)
        # Like the convolution, ignore what lies beyond the last whole patch.
        tokens = ops.patch_embed(input[:, :, : grid[0] * p1, : grid[1] * p2], weight, bias)
        # The tokens' memory seen as (B, D, rows, columns): flattening it back costs nothing.
        return tokens.transpose(1, 2).unflatten(2, grid)


def demands(cls: type[nn.Module]) -> list[str]:
    """The names of what a block's forward takes beside hidden states."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[2:]
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def rope_argument(adapter: Any, cls: type[nn.Module]) -> RopeArgument | None:
    """How blocks of this class take rotary positions, if they do."""
    return adapter.ROPE if adapter.ROPE is not None and adapter.ROPE.name in demands(cls) else None


# Demands on the model, passed down to every layer, that change nothing inside a layer.
_HARMLESS = {"output_hidden_states", "return_dict", "interpolate_pos_encoding"}


def _arguments(
    demands: list[str], rope: RopeArgument | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, Any, Angles | None]:
    """(why not, None, None) or (None, hidden states, angles): the fused path takes no other demand."""
    named = {k: v for k, v in kwargs.items() if v is not None and v is not False and k not in _HARMLESS}
    for i, given in enumerate(args[1:]):
        if given is not None and given is not False:
            named[demands[i] if i < len(demands) else type(given).__name__] = given
    x = args[0] if args else named.pop("hidden_states", named.pop("x", named.pop("input", None)))
    positions = None if rope is None else named.pop(rope.name, None)
    if named:
        return f"called with {', '.join(named)}", None, None
    if x is None and not args:
        return "called without hidden states", None, None
    try:
        return None, x, read_angles(rope, positions)
    except NotServed as error:
        return str(error), None, None


def fused_class(
    original: type[nn.Module],
    mixin: type[Fused],
    library: str | None = None,
    types: tuple[type[nn.Module], ...] = (),
    numbers: tuple[tuple[tuple[str, Any], ...], ...] = (),
    returns_tuple: bool = False,
    quantization: Quantization = FLOAT,
) -> type[nn.Module]:
    """The subclass of `original` that runs `mixin`'s forward.  It goes by its original's name.

    library: the adapter that knows the module's names.  types, numbers, returns_tuple: what the probe found.
    """
    forwards = tuple(kind.forward for kind in (original, *types))
    recipe = (original, mixin, library, types, numbers, returns_tuple, quantization)
    return _fused_class(*recipe, forwards)  # type: ignore[arg-type]


@functools.cache
def _fused_class(
    original: type[nn.Module],
    mixin: type[Fused],
    library: str | None,
    types: tuple[type[nn.Module], ...],
    numbers: tuple[tuple[tuple[str, Any], ...], ...],
    returns_tuple: bool,
    quantization: Quantization,
    forwards: tuple[Callable[..., Any], ...],
) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "fastvit_original": original,
        "fastvit_recipe": (original, mixin, library, types, numbers, returns_tuple, quantization),
        "fastvit_forwards": forwards,
    }
    if library is not None:
        adapter = importlib.import_module(f"fastvit.adapters.{library}")
        namespace["fastvit_read"] = getattr(adapter, mixin.fastvit_reader)
        namespace["fastvit_demands"] = demands(original)
        namespace["fastvit_rope"] = rope_argument(adapter, original)
        namespace["fastvit_types"] = types
        namespace["fastvit_numbers"] = numbers
        namespace["fastvit_returns_tuple"] = returns_tuple
        namespace["fastvit_quantization"] = quantization
        if quantization != FLOAT:
            namespace["fastvit_sentence"] = _sentence(quantization)
    return type(original.__name__, (mixin, original), namespace)


def _sentence(q: Quantization) -> str:
    halves = {"self_attention": {"qkv": q.qkv, "proj": q.proj}, "mlp": {"fc1": q.fc1, "fc2": q.fc2}}
    phrases = []
    for half, linears in halves.items():
        names = ", ".join(name for name, kind in linears.items() if kind is not None)
        phrases.append(f"{half} (int8 {names})" if names else half)
    return ", ".join(phrases)


def _rebuild(*recipe: Any) -> nn.Module:
    cls = fused_class(*recipe)
    return cls.__new__(cls)


def is_fused(module: Any) -> bool:
    return isinstance(module, Fused)


def swap_in(module: nn.Module, cls: type[nn.Module]) -> None:
    if has_own_forward(module):
        # A bound method of the old class would hide the new one.
        module.__dict__.pop("forward", None)
    module.__class__ = cls


def swap_out(module: nn.Module) -> None:
    if is_fused(module):
        if has_own_forward(module):
            module.__dict__.pop("forward", None)
        forget_int8(module)
        module.__class__ = with_made(type(module), _MADE, lambda fused: fused.fastvit_original)
        _fallbacks.pop(module, None)


def set_quantization(block: FusedBlock, quantization: Quantization) -> None:
    """Have the linears of a fused block multiply in another way from now on."""

    def changed(fused: type[Fused]) -> type:
        # Its own forwards stay: one that was patched since must still be noticed.
        return _fused_class(*fused.fastvit_recipe[:-1], quantization, fused.fastvit_forwards)

    forget_int8(block)  # type: ignore[arg-type]
    if block.fastvit_quantization != quantization:
        block.__class__ = with_made(type(block), _MADE, changed)


def forget_int8(block: nn.Module) -> None:
    """Free what is derived from the block's weights, or have it derived anew."""
    forget(block)
    for p in block.parameters():
        _int8.forget(p)


def with_made(cls: type, mark: str, change: Callable[[Any], type]) -> type:
    """`cls` with `change` of the made class in its place: the one that has the attribute `mark` of its own."""
    if mark in vars(cls):
        return change(cls)
    # Somebody (FSDP2, parametrize) has derived a class of their own since.
    bases = tuple(with_made(base, mark, change) if hasattr(base, mark) else base for base in cls.__bases__)
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, namespace)
