"""Paired measurement of fastvit against eager PyTorch, with the machine's own limits beside it."""
