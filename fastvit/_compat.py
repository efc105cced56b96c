"""Imports of optional libraries, with what they need to work here and a clear error where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

# Kept alive: a torch.library.Library takes its operators with it.
_libraries: list[Any] = []
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
_IN_BENCH_EXTRA = ("timm", "torchvision", "pillow", "scikit-learn", "rich", "matplotlib")


class MissingLibraryError(ImportError):
    """An optional library is missing or broken; the message says how to get it."""


def import_library(name: str) -> ModuleType:
    """Import a module of an optional library, such as "timm" or "rich.table".

    Raises:
        MissingLibraryError: the library is not installed, or its own import fails.
    """
    library = name.split(".", 1)[0]
    package = _PACKAGES.get(library, library)
    wanted = 'pip install "fastvit[bench]"' if package in _IN_BENCH_EXTRA else f"pip install {package}"
    if importlib.util.find_spec(library) is None:
        raise MissingLibraryError(f"{package} is not installed; get it with: {wanted}")
    try:
        if library in ("timm", "torchvision", "transformers", "open_clip"):
            _declare_torchvision_operators()
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise MissingLibraryError(
            f"{package} is installed, but its import fails: {error}; try: {wanted} --force-reinstall"
        ) from error


def import_timm() -> ModuleType:
    """timm, also beside a torchvision that was built for another torch.

    Raises:
        MissingLibraryError: timm is not installed, or its own import fails.
    """
    return import_library("timm")


def import_torchvision() -> ModuleType:
    """torchvision, also one that was built for another torch.

    Raises:
        MissingLibraryError: torchvision is not installed, or its own import fails.
    """
    return import_library("torchvision")


def _declare_torchvision_operators() -> None:
    """torchvision's wheels carry operators for one build of torch; without them its import fails on their names.

    The models need none of these operators, so their names are enough.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"nms{_SCHEMA}")
        library.define(f"qnms{_SCHEMA}")
        _libraries.append(library)
