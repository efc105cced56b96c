"""benchmarks/int8_accuracy.py on a small shape: its figures are errors, and its table and JSON hold them."""

from __future__ import annotations

import json
import sys

from benchmarks import int8_accuracy
from fastvit.models import FastViT
from fastvit.nn import SwiGLU


def small_model():
    return FastViT(128, 32, embed_dim=64, depth=1, num_heads=2)


def test_a_small_shape(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(int8_accuracy, "SHAPES", (int8_accuracy.Shape("small", 128, 2, 4.0, SwiGLU, 1.0),))
    monkeypatch.setattr(int8_accuracy, "deep_model", small_model)
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["int8_accuracy", "--tokens", "9", "--json", str(path)])
    int8_accuracy.main()
    rows = json.loads(path.read_text())
    assert [r["what"] for r in rows] == ["qkv", "proj", "fc1", "fc2", "block", "logits"]
    assert all(0 < r["bf16"] < 0.1 and 0 < r["int8"] < 0.1 for r in rows)
    assert all(r["plain"] > r["int8"] for r in rows if r["what"] in ("qkv", "fc1"))
    assert capsys.readouterr().out.count("small") == 5
