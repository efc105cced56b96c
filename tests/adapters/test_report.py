"""report and compare."""

from __future__ import annotations

import json

import pytest
import torch

import fastvit
from fastvit.adapters import FAMILIES
from tests.adapters import zoo


@pytest.fixture
def vit():
    model = zoo.make("timm vit")
    return model, zoo.image(model)


def test_before_optimize_it_says_what_would_be_replaced(vit):
    report = fastvit.report(vit[0])
    assert [r.status for r in report.rows] == ["ready"] * 3
    assert not report.replaced
    assert {r.path for r in report.skipped} == {"blocks.0", "blocks.1", "patch_embed.proj"}


def test_after_optimize(vit):
    report = fastvit.report(fastvit.optimize(vit[0]))
    assert {r.path for r in report.replaced} == {"blocks.0", "blocks.1", "patch_embed.proj"}
    table = str(report)
    assert "norm_linear, attention, linear_residual" in table
    assert "3 replaced, 0 left" in table
    lines = table.splitlines()
    assert lines[0].index("what runs") == lines[2].rindex(report.rows[0].detail)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["status"] == "fused"


def test_compare(vit):
    model, x = vit
    fastvit.optimize(model)
    classes = [type(m) for m in model.modules()]
    comparison = fastvit.compare(model, x)
    assert [type(m) for m in model.modules()] == classes
    (row,) = comparison.outputs
    assert row.shape == (2, 64)
    assert 0.0 < row.relative_l2 < 1e-5
    assert row.cosine > 0.999999
    assert comparison.max_relative_l2 == row.relative_l2
    assert "rel. L2" in str(comparison)
    assert json.loads(json.dumps(comparison.to_dict()))["max_relative_l2"] == row.relative_l2


def test_compare_uses_the_original_dtype(vit):
    model, x = vit
    fastvit.optimize(model, dtype=torch.bfloat16)
    bits = [p.detach().clone() for p in model.parameters()]
    comparison = fastvit.compare(model, x)
    assert 1e-4 < comparison.max_relative_l2 < 0.1
    assert all(torch.equal(p, b) and p.dtype == b.dtype for p, b in zip(model.parameters(), bits, strict=True))
    assert fastvit.report(model).rows[0].status == "fused"


def test_compare_of_many_outputs():
    model = zoo.make("hf clip")
    comparison = fastvit.compare(fastvit.optimize(model), zoo.image(model), output_hidden_states=True)
    names = {o.name for o in comparison.outputs}
    assert {"last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.2"} <= names


def test_compare_leaves_the_model_optimized_when_it_fails(vit):
    model, _ = vit
    fastvit.optimize(model, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        fastvit.compare(model, torch.zeros(1, 5, 32, 32))
    assert fastvit.report(model).replaced
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_documented_families_are_those_that_are_tested():
    """Every row of the registry has a model in the zoo."""
    tested = {name.split()[0] for name in zoo.MODELS}
    assert {f.library.split()[0] for f in FAMILIES} == {"timm", "transformers", "torchvision", "open_clip"}
    assert tested == {"timm", "hf", "torchvision", "open_clip"}
