"""`optimize`, `restore`, `report` and `compare`: other libraries' Vision Transformers in fastvit's operators."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastvit.adapters.compare import Comparison, difference, tensors
from fastvit.adapters.graphs import _KEY as GRAPHS
from fastvit.adapters.graphs import Graphs, is_graphed, swap_graphs_in, swap_graphs_out
from fastvit.adapters.int8 import choose_quantization
from fastvit.adapters.parts import FLOAT, Quantization
from fastvit.adapters.registry import ADAPTERS, FAMILIES, Verdict, judge_block, judge_classifier, judge_patch_conv
from fastvit.adapters.report import Report, report
from fastvit.adapters.swap import (
    FusedBlock,
    is_fused,
    last_fallback,
    note_fallback,
    set_quantization,
    swap_in,
    swap_out,
)
from fastvit.errors import UnsupportedModelError

__all__ = ["ADAPTERS", "FAMILIES", "Comparison", "Report", "compare", "optimize", "report", "restore"]

Model = TypeVar("Model", bound=nn.Module)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# On the model, so that a deep copy can be restored too.
_UNDO = "_fastvit_undo"


# Orders conversions of a model and of its parts, so that restore goes back through them in reverse.
_conversions = itertools.count()


@dataclass
class _Undo:
    """What `optimize(dtype=...)` replaced: the tensors before, and the dtypes that they went through since."""

    originals: dict[str, Tensor]
    dtypes: list[torch.dtype] = field(default_factory=list)
    order: int = field(default_factory=lambda: next(_conversions))


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    cuda_graphs: bool = False,
    strict: bool = False,
) -> Model:
    """Run the Vision Transformer blocks of `model` in fused operators, in place, with the same weights and outputs.

    Parameters, buffers, state_dict keys, hooks, attributes and isinstance stay; `restore` undoes it exactly.  A call
    that the fused path can't serve (a mask, `output_attentions=True`, a hook on a module inside a block, dropout in
    training) runs the original forward.  Calling it again changes nothing, or changes to another `dtype`, `quantize` or
    `cuda_graphs`.

    Args:
        model: any nn.Module that holds blocks of a supported family (`report(model)` tells).
        dtype: convert floating-point parameters and buffers, for instance to torch.bfloat16.  The old values are kept
            for `restore`, outside the state_dict, in as much memory as they had.
        quantize: "int8" multiplies weights and activations as integers, on the CPU: weights per output channel,
            activations per token, both rotated so that massive channels do no harm.  Attention, norms and the residual
            stream keep the dtype.  No data is needed: each linear is tried on synthetic tokens, and one whose error is
            above 4 % stays as it is (`report` says which).  Parameters stay float: what changes them takes effect at
            the next call, and gradients are those of the float product.  A change of a few elements through `.data`
            alone may go unseen; calling `optimize` again takes all weights anew.  The int8 form costs a byte per
            weight, is no part of copies, pickles and the state_dict, and goes with `restore`.
            None: no linear is quantised, nor any longer.
        cuda_graphs: on a CUDA GPU, serve the forward of `model` by CUDA graphs, for the latency of small batches.  In
            eval mode without gradients, the second call of a kind (shapes, dtypes, other arguments, autocast) captures
            a graph, and later ones replay it.  Batches up to 32 are filled up to the next of ten sizes, if a trial at
            the capture shows that the images don't influence each other; else each size has a graph of its own.  Every
            call compares weights, modules, hooks and attributes with what they were, and captures anew after a change;
            what it can't see is a change of what Python code refers to from elsewhere, such as globals, and of a class
            beyond its `forward`.  Outputs are the caller's own.  Whatever a graph can't serve runs as it does without
            (`report` says how often and why).  Graphs take memory for the activations of each bucket, are no part of
            copies, pickles and the state_dict, and go with `restore`.
        strict: raise instead of leaving any transformer block as it was, or replacing one whose calls would run the
            original forward as things stand (a hook inside, a mask that the model requires); the model is then
            unchanged.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: `strict`, and a block can't be replaced or would not be used, or there is none.
        TypeError, ValueError: an argument is not accepted, or `quantize` is given for a model that is not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} is not accepted; give a torch.nn.Module")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype} is not accepted; accepted: {', '.join(map(str, _DTYPES))} or None")
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs: {cuda_graphs!r} is not accepted; accepted: True or False")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize: {quantize!r} is not served by this version; accepted: 'int8' or None")

    # Judge everything before anything is touched.
    blocks: dict[str, tuple[nn.Module, Verdict]] = {}
    others: list[tuple[nn.Module, Verdict]] = []
    for path, module in model.named_modules():
        if is_fused(module):
            continue
        if verdict := judge_block(module, path, model):
            blocks[path] = (module, verdict)
        elif verdict := judge_patch_conv(path, module) or judge_classifier(module):
            others.append((module, verdict))
    done = any(is_fused(m) for m in model.modules())
    if strict:
        _raise_if_left(blocks, done)

    swaps = [(m, v) for m, v in blocks.values() if v.cls is not None]
    if swaps or done:
        swaps += others
    swapped: list[nn.Module] = []
    # Off while other classes change below it.
    graphs = {m: taken for m in list(model.modules()) if (taken := swap_graphs_out(m)) is not None}
    quantized: list[tuple[FusedBlock, Quantization]] = []
    try:
        for module, verdict in swaps:
            assert verdict.cls is not None
            swap_in(module, verdict.cls)
            swapped.append(module)
        for path, module in model.named_modules():
            if isinstance(module, FusedBlock):
                chosen = FLOAT if quantize is None else _judge_linears(path, module)
                quantized.append((module, module.fastvit_quantization))
                set_quantization(module, chosen)
        if cuda_graphs:
            swap_graphs_in(model, graphs.get(model) or Graphs())
        if dtype is not None:
            _convert(model, dtype)
    except BaseException:
        swap_graphs_out(model)
        for block, before in quantized:
            set_quantization(block, before)
        for module in swapped:
            swap_out(module)
        for module, taken in graphs.items():
            swap_graphs_in(module, taken)
        raise
    for module, taken in graphs.items():
        if module is not model or not cuda_graphs:
            taken.drop()
    return model


def _judge_linears(path: str, block: Any) -> Quantization:
    for name, p in block.named_parameters():
        if p.device.type != "cpu":
            raise ValueError(f"quantize: 'int8' needs a model on the CPU, but {path}.{name} is on {p.device}")
    return choose_quantization(block, type(block).fastvit_read)


def restore(model: Model) -> Model:
    """Undo `optimize` exactly: the old classes, and the old dtype with the old values bit for bit.

    A value that was changed since, by training or load_state_dict, keeps the change.  Returns the same object; a model
    that was never optimized stays as it is.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} is not accepted; give a torch.nn.Module")
    for module in model.modules():
        if (graphs := swap_graphs_out(module)) is not None:
            graphs.drop()
        swap_out(module)
    undos = [(m, m.__dict__.pop(_UNDO)) for m in list(model.modules()) if _UNDO in m.__dict__]
    for module, undo in sorted(undos, key=lambda pair: pair[1].order, reverse=True):
        _convert_back(module, undo)
    return model


def compare(model: nn.Module, *inputs: Any, **kwargs: Any) -> Comparison:
    """The optimized model against the original one, original dtype included, on the same inputs.

    Both run without gradients, in the mode (train or eval) that the model is in and from the same random state.  The
    model is left as it was, optimized or not.

    Args:
        model: an optimized model, or one that is to be optimized for the comparison alone.
        inputs, kwargs: what its forward takes.  Floating-point tensors are converted to each model's own dtype.

    Returns:
        Comparison: maximal absolute difference, relative L2 and cosine for each floating-point output tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} is not accepted; give a torch.nn.Module")
    with _kept(model):
        if not any(is_fused(m) or is_graphed(m) for m in model.modules()):
            optimize(model)
        optimized = _run(model, inputs, kwargs)
        restore(model)
        original = _run(model, inputs, kwargs)
    truth = tensors(original)
    return Comparison([difference(name, t, truth[name]) for name, t in tensors(optimized).items()])


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put back classes, tensors and what the report and `restore` know."""
    modules = [(m, type(m), _private(m), last_fallback(m)) for m in model.modules()]
    held = [(p, p.data) for p in model.parameters()]
    grads = [(p.grad, p.grad.data) for p in model.parameters() if p.grad is not None]
    # A model in training writes into its buffers.
    buffers = [(b, b.data, b.detach().clone()) for b in model.buffers()]
    try:
        yield
    finally:
        for module, cls, private, fallback in modules:
            module.__class__ = cls
            for key in _private(module):
                del module.__dict__[key]
            module.__dict__.update(private)
            note_fallback(module, fallback)
        for t, data in (*held, *grads):
            t.data = data
        for b, data, values in buffers:
            b.data = data
            b.data.copy_(values)


def _private(module: nn.Module) -> dict[str, Any]:
    """What `optimize` has left on a module."""
    return {key: module.__dict__[key] for key in (_UNDO, GRAPHS) if key in module.__dict__}


def _raise_if_left(blocks: dict[str, tuple[nn.Module, Verdict]], done: bool) -> None:
    blocks = {path: (m, v) for path, (m, v) in blocks.items() if v.strict}
    left = [(path, type(m).__name__, v.reason) for path, (m, v) in blocks.items() if v.reason]
    if left:
        lines = "\n".join(f"  {path or '(model)'} ({cls}): {reason}" for path, cls, reason in left)
        raise UnsupportedModelError(f"{len(left)} transformer blocks can't be replaced:\n{lines}")
    if not blocks and not done:
        raise UnsupportedModelError("no Vision Transformer block was found in the model")


def _floating_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t for name, t in named.items() if t.is_floating_point()}


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """model.to(dtype), remembering what the way back needs.  Parameters stay the same objects."""
    before = {
        name: (t, t.data, None if t.grad is None else t.grad.data) for name, t in _floating_tensors(model).items()
    }
    if all(data.dtype == dtype for _, data, _ in before.values()):
        return
    undo: _Undo = model.__dict__.get(_UNDO) or _Undo({name: data for name, (_, data, _) in before.items()})
    try:
        model.to(dtype)
    except BaseException:
        for t, data, grad in before.values():
            t.data = data
            if t.grad is not None and grad is not None:
                t.grad.data = grad
        raise
    undo.dtypes.append(dtype)
    model.__dict__[_UNDO] = undo


def _convert_back(model: nn.Module, undo: _Undo) -> None:
    now = _floating_tensors(model)
    for name, original in undo.originals.items():
        if name not in now:
            continue
        t = now[name]
        current = t.data
        # What the values would be if nobody had changed them, .half() and the like apart.
        converted = original = original.to(current.device)
        for dtype in (*undo.dtypes, current.dtype):
            converted = converted.to(dtype)
        if original.shape == current.shape:
            unchanged = (converted == current) | (converted.isnan() & current.isnan())
            t.data = original if unchanged.all() else torch.where(unchanged, original, current.to(original.dtype))
        else:
            t.data = current.to(original.dtype)
        if t.grad is not None:
            t.grad.data = t.grad.data.to(original.dtype)


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Norms and positions may have another dtype than what multiplies images.
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    dtypes = [p.dtype for p in (*weights, *model.parameters()) if p.is_floating_point()]

    def fit(value: Any) -> Any:
        return value.to(dtypes[0]) if dtypes and isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.random.fork_rng():
        return model(*map(fit, inputs), **{k: fit(v) for k, v in kwargs.items()})
