"""What is measured against each other in benchmarks/ computes the same, and the records are complete."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_linear_residual,
    bench_mlp,
    bench_model,
    bench_norm_linear,
    bench_patch_embed,
    bench_pool,
    bench_self_attention,
    case,
    cpu,
)

OPERATORS = (
    bench_patch_embed,
    bench_norm_linear,
    bench_attention,
    bench_linear_residual,
    bench_self_attention,
    bench_mlp,
    bench_pool,
)
TINY = case.Width("tiny", dim=32, num_heads=2, tokens=17, patch_size=8, image_size=32, num_classes=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m in OPERATORS for name in m.NAMES], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_both_sides_compute_the_same(module, name, dtype):
    if module is bench_attention:
        name = 19
    c = module.case(name, dtype, 2, width=TINY)
    row = case.measure(c, seconds=1e-3)
    assert row.passed, row
    assert row.speedup > 0
    assert row.limit in ("arithmetic", "memory")
    assert row.fraction_of_limit > 0
    assert c.flops > 0
    output = c.fused(*c.tensors)
    # Inputs and output cross the bus; what only the eager side reads does not count.
    assert c.bytes >= output.numel() * output.element_size()


def test_a_model_is_measured():
    pytest.importorskip("timm")
    c = bench_model.case("vit_tiny_patch16_224", torch.float32, 1)
    assert c.expected().dtype == torch.float64
    assert c.flops > 2e9
    row = case.measure(c, seconds=1e-3)
    assert row.passed, row


def test_the_runner_writes_its_records(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu, "BATCHES", (1,))
    monkeypatch.setattr(sys, "argv", ["cpu", "--only", "pool", "--seconds", "0.001", "--output", str(tmp_path)])
    assert cpu.main() == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert [r["dtype"] for r in record["rows"]] == ["f32", "f32", "bf16", "bf16"]
    assert record["environment"]["versions"]["torch"]
    assert (tmp_path / "cpu.png").stat().st_size > 5000
    assert capsys.readouterr().out.count(" % of ") == 4


def test_a_wrong_kernel_fails_its_benchmark():
    c = bench_pool.case("token", torch.float32, 1, width=TINY)
    wrong = case.Case(c.operator, c.name, c.eager, lambda *t: c.fused(*t) * 1.001, c.tensors, c.flops, c.bytes)
    assert not case.measure(wrong, seconds=1e-3).passed
