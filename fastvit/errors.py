"""Errors of fastvit that are not plain ValueError or TypeError."""

from __future__ import annotations


class UnsupportedModelError(RuntimeError):
    """`optimize(model, strict=True)` found Vision Transformer blocks that it can't express in fused operators."""
