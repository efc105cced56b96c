"""What the documents say is what the code says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fastvit

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", ["families.py", "results.py"])
def test_tables_come_from_the_registry_and_from_the_record(script):
    expected = runpy.run_path(str(ROOT / "docs" / script))["table"]()
    assert expected in README, f"README.md's table is out of date; it should be:\n{expected}"


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_ten_lines_run(monkeypatch):
    """The README's Python, as it stands but for the download."""
    from fastvit._compat import import_timm

    timm = import_timm()
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: real("vit_tiny_patch16_224"))
    code = re.search(r"## Ten lines\n\n```python\n(.*?)```", README, re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    assert names["logits"].shape == (8, 1000)


def test_every_public_name_exists():
    for name in fastvit.__all__:
        assert getattr(fastvit, name) is not None


def test_the_changelog_knows_this_version():
    assert f"## {fastvit.__version__}" in (ROOT / "CHANGELOG.md").read_text()
