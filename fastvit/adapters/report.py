"""`report(model)`: a row per module, what runs it now or why it was left."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastvit.adapters.graphs import graphs_sentence, is_graphed
from fastvit.adapters.readout import FusedReadout, read_in_part
from fastvit.adapters.registry import judge_block, judge_patch_conv, required_mask
from fastvit.adapters.swap import FusedBlock, is_fused, last_fallback
from fastvit.ops._backend import extension, has_triton


@dataclass(frozen=True)
class Row:
    """One module.

    path: dotted name in the model.  cls: class name.  status: "fused", "fallback" (fused, but its last call ran the
    original forward, or any would now), "left" or "ready" (optimize would fuse it).  detail: the operators, or the
    reason.
    """

    path: str
    cls: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What runs now, module by module.  `str()` is a table."""

    rows: list[Row] = field(default_factory=list)
    backend: str = ""
    # How the graphs of `optimize(cuda_graphs=True)` went, by the path of the module that has them.
    cuda_graphs: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> list[Row]:
        """Modules that fastvit runs (a row with status "fallback" runs its original forward)."""
        return [r for r in self.rows if r.status in ("fused", "fallback")]

    @property
    def skipped(self) -> list[Row]:
        """Modules that stay as they were, with the reason."""
        return [r for r in self.rows if r.status in ("left", "ready")]

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "rows": [asdict(r) for r in self.rows], "cuda_graphs": self.cuda_graphs}

    def __str__(self) -> str:
        graphs = [f"CUDA graphs of {path or '(model)'}: {told}" for path, told in self.cuda_graphs.items()]
        if not self.rows:
            return "\n".join(["no Vision Transformer block was found: nothing to replace", *graphs])
        lines = [("module", "class", "status", "what runs, or why it was left")]
        lines += [(r.path or "(model)", r.cls, r.status, r.detail) for r in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            "  ".join([*(c.ljust(w) for c, w in zip(line[:3], widths, strict=True)), line[3]]).rstrip()
            for line in lines
        ]
        table.insert(1, "  ".join("-" * w for w in [*widths, len(lines[0][3])]))
        fallbacks = sum(r.status == "fallback" for r in self.rows)
        table.append(
            f"{len(self.replaced)} replaced, {len(self.skipped)} left"
            + (f", {fallbacks} of the replaced run their original forward" if fallbacks else "")
            + f"; backend: {self.backend}"
        )
        return "\n".join([*table, *graphs])


def report(model: nn.Module) -> Report:
    """What fastvit runs in `model`, and what it leaves and why; before `optimize`, what it would replace.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} is not accepted; give a torch.nn.Module")
    rows = []
    last = read_in_part(model)
    for path, module in model.named_modules():
        cls = type(module).__name__
        if isinstance(module, FusedReadout):
            continue  # its last block's row tells
        if is_fused(module):
            reason = last_fallback(module)
            mask = None
            if isinstance(module, FusedBlock):
                reason = reason or module.standing_obstacle()
                mask = required_mask(module.fastvit_original, path, model)
            detail = f"original forward: {reason}" if reason else _sentence(module)
            if module in last and not reason:
                detail += f"; {FusedReadout.fastvit_sentence}"
            if mask and not reason:
                detail += f"; {mask}"
            rows.append(Row(path, cls, "fallback" if reason else "fused", detail))
        elif verdict := judge_block(module, path, model):
            ready = verdict.cls is not None
            would_run = f"would run {verdict.sentence}" if ready else ""
            detail = "; ".join(filter(None, (would_run, verdict.reason)))
            rows.append(Row(path, cls, "ready" if ready else "left", detail))
    if any(row.status != "left" for row in rows):
        rows += [
            Row(path, type(m).__name__, "ready", f"would run {verdict.sentence}")
            for path, m in model.named_modules()
            if not is_fused(m) and (verdict := judge_patch_conv(path, m))
        ]
    graphs = {path: graphs_sentence(m) for path, m in model.named_modules() if is_graphed(m)}
    return Report(rows, _backend(model), graphs)


def _sentence(module: Any) -> str:
    """How a fused module runs, and which of its linears were too bad in int8."""
    sentence = str(module.fastvit_sentence)
    if isinstance(module, FusedBlock):
        for name, reason in module.fastvit_quantization.notes:
            # DataParallel's replicas have no parameters.
            parameter = next(module.parameters(), None)  # type: ignore[attr-defined]
            dtype = "float" if parameter is None else str(parameter.dtype).removeprefix("torch.")
            sentence += f"; {name} stays {dtype}: {reason}"
    return sentence


def _backend(model: nn.Module) -> str:
    """Which backend serves the device and dtype that the model's parameters have."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return "none (no parameters)"
    device, dtype = parameter.device.type, parameter.dtype
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16) and (ext := extension()):
        return f"C++ on CPU ({ext.isa()}), {dtype}"
    if device == "cuda" and has_triton() and dtype != torch.float64:
        return f"Triton on CUDA, {dtype}"
    return f"plain torch on {device}, {dtype}"
