"""`compare(model, *inputs)`: the optimized model against the original one on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One output tensor: its path in the result, shape, and how far the optimized one is from the original."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative_l2: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """A row per output tensor.  `str()` is a table."""

    outputs: list[Difference] = field(default_factory=list)

    @property
    def max_relative_l2(self) -> float:
        return max((o.relative_l2 for o in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {"outputs": [asdict(o) for o in self.outputs], "max_relative_l2": self.max_relative_l2}

    def __str__(self) -> str:
        width = max([6, *(len(o.name) for o in self.outputs)])
        shapes = max([5, *(len(str(o.shape)) for o in self.outputs)])
        lines = [f"{'output':{width}}  {'shape':{shapes}}  {'max abs':>9}  {'rel. L2':>9}  {'cosine':>10}"]
        lines += [
            f"{o.name:{width}}  {o.shape!s:{shapes}}  {o.max_abs:9.2e}  {o.relative_l2:9.2e}  {o.cosine:10.8f}"
            for o in self.outputs
        ]
        return "\n".join(lines)


def difference(name: str, actual: Tensor, original: Tensor) -> Difference:
    a, b = actual.detach().double().flatten(), original.detach().double().flatten()
    if a.numel() == 0:
        return Difference(name, tuple(actual.shape), 0.0, 0.0, 1.0)
    error, scale = (a - b).norm().item(), b.norm().item()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item() if scale and a.norm() else float(error == 0.0)
    relative = error / scale if scale else error
    return Difference(name, tuple(actual.shape), (a - b).abs().max().item(), relative, cosine)


def tensors(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every floating-point tensor in a nest of tuples, lists, dicts and ModelOutputs, by its path."""
    if isinstance(output, Tensor):
        return {path or "output": output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        items = [(str(k), v) for k, v in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(str(i), v) for i, v in enumerate(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        found.update(tensors(value, f"{path}.{key}" if path else key))
    return found
