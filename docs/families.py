"""Prints the README's table of supported families from the registry: `python docs/families.py`."""

from __future__ import annotations

from fastvit.adapters import FAMILIES


def table() -> str:
    rows = ["| family | library | models | notes |", "|---|---|---|---|"]
    rows += [f"| {f.name} | {f.library} | `{f.classes.replace(', ', '`, `')}` | {f.notes} |" for f in FAMILIES]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
