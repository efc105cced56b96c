"""What int8 costs in accuracy, beside bfloat16, against float64, and what the rotation is for.

    python -m benchmarks.int8_accuracy [--tokens 197] [--json FILE]

builds blocks of real shapes with random norms, LayerScale and weights ("nasty"), runs them on tokens with massive
channels and a massive token, and prints the relative L2 error of every linear alone, of the block, and of a small deep
model.  Takes a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import ops
from fastvit.adapters.parts import BlockParts, heads, hidden, read_norm
from fastvit.bench.models import randomize
from fastvit.nn import MLP, Block, SwiGLU
from fastvit.reference import int8


@dataclass(frozen=True)
class Shape:
    """A transformer block of a published model."""

    name: str
    dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    mlp_layer: type[MLP] = MLP
    init_values: float | None = None


SHAPES = (
    Shape("ViT-B", 768, 12),
    Shape("ViT-L", 1024, 16),
    Shape("DINOv2-giant", 1536, 24, 2.66667 * 2, SwiGLU, 1.0),
)


@dataclass(frozen=True)
class Row:
    """Relative L2 errors against float64.  plain: int8 without the rotation (None where only the product has one)."""

    model: str
    what: str
    bf16: float
    int8: float
    plain: float | None = None


def nasty_tokens(tokens: int, dim: int) -> Tensor:
    """(2, N, D) float64: three channels a hundred times larger, one token ten times."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, dim, generator=g, dtype=torch.float64)
    x[..., torch.randperm(dim, generator=g)[:3]] *= 100.0
    x[:, 0] *= 10.0
    return x


def error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth.double()).norm() / truth.double().norm()).item()


def unrotated(x: Tensor, weight: Tensor) -> Tensor:
    (qx, x_scale), (qw, w_scale) = int8.quantize(x.float()), int8.quantize(weight.float())
    return (qx.double() @ qw.double().T) * x_scale.unsqueeze(-1) * w_scale


@torch.no_grad()
def linears(shape: Shape, tokens: int) -> list[Row]:
    """Each linear alone, on the input that it has in the block."""
    block = fastvit.optimize(make_block(shape).double())
    p: BlockParts = block.fastvit_read()  # type: ignore[operator]
    x = nasty_tokens(tokens, shape.dim)
    norm1, norm2 = read_norm(p.norm1, x.dtype), read_norm(p.norm2, x.dtype)
    attended = heads(p, x, norm1)
    after = ops.linear_residual(attended, *p.proj, residual=x, layer_scale=p.layer_scale1)
    inputs = {
        "qkv": (p.norm1(x), p.qkv[0][0]),
        "proj": (attended, p.proj[0]),
        "fc1": (p.norm2(after), p.fc1[0][0]),
        "fc2": (hidden(p, after, norm2), p.fc2[0]),
    }
    rows = []
    for name, (given, weight) in inputs.items():
        truth = F.linear(given, weight)
        product = ops.norm_linear(given.float(), weight.float(), norm="none", quantize="int8")
        low = F.linear(given.bfloat16(), weight.bfloat16())
        rows.append(
            Row(shape.name, name, error(low, truth), error(product, truth), error(unrotated(given, weight), truth))
        )
    return rows


def make_block(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    block = Block(
        shape.dim,
        shape.num_heads,
        shape.mlp_ratio,
        qkv_bias=True,
        init_values=shape.init_values,
        mlp_layer=shape.mlp_layer,
    )
    return randomize(block).eval()


@torch.no_grad()
def whole(name: str, what: str, model: nn.Module, x: Tensor) -> Row:
    """A block, residual stream included, or a model."""
    truth = copy.deepcopy(model).double()(x)
    low = fastvit.optimize(copy.deepcopy(model).bfloat16())(x.bfloat16())
    quantized = fastvit.optimize(copy.deepcopy(model), quantize="int8")(x.float())
    return Row(name, what, error(low, truth), error(quantized, truth))


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(
        fastvit.create_model("vit_small_patch16_224", num_classes=100, img_size=128, init_values=0.1)
    ).eval()


def measure(tokens: int) -> list[Row]:
    rows = []
    for shape in SHAPES:
        rows += linears(shape, tokens)
        rows.append(whole(shape.name, "block", make_block(shape), nasty_tokens(tokens, shape.dim)))
    image = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows.append(whole("ViT-S, 12 blocks", "logits", deep_model(), image))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| model | what | bf16 | int8 | int8 without rotation |", "|---|---|---|---|---|"]
    for row in rows:
        plain = "-" if row.plain is None else f"{row.plain:.2%}"
        lines.append(f"| {row.model} | {row.what} | {row.bf16:.2%} | {row.int8:.2%} | {plain} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=197, help="tokens of each of two samples (default: 197)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    rows = measure(arguments.tokens)
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
