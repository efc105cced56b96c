"""Imports of optional libraries, with what they need to work here and a clear error where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# Kept alive: a Library takes its operators with it.
_libraries: list[torch.library.Library] = []
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


class MissingLibraryError(ImportError):
    """An optional library is not installed; the message says how to get it."""


def import_library(name: str) -> ModuleType:
    """Import a module of an optional library, such as "timm" or "rich.table".

    Raises:
        MissingLibraryError: the library is not installed.
    """
    library = name.split(".", 1)[0]
    if importlib.util.find_spec(library) is None:
        package = _PACKAGES.get(library, library)
        raise MissingLibraryError(f'{package} is not installed; get it with: pip install "fastvit[bench]" {package}')
    if library in ("timm", "torchvision", "transformers"):
        _declare_torchvision_operators()
    return importlib.import_module(name)


def import_timm() -> ModuleType:
    """timm, also beside a torchvision that was built for another torch."""
    return import_library("timm")


def import_torchvision() -> ModuleType:
    """torchvision, also one that was built for another torch."""
    return import_library("torchvision")


def _declare_torchvision_operators() -> None:
    """torchvision's wheels carry operators for one build of torch; without them its import fails on their names.

    The models need none of these operators, so their names are enough.
    """
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"nms{_SCHEMA}")
        library.define(f"qnms{_SCHEMA}")
        _libraries.append(library)
