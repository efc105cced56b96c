"""The project's goals on a CPU, and which of them a record reaches: `python -m benchmarks.summary cpu.json`.

`python -m benchmarks.cpu` prints it last.  A goal is a rule about rows; each row that it speaks of is judged alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.case import Row


@dataclass(frozen=True)
class Goal:
    """`figure` of every row that the goal is about must be at least `least`; it is None where the run did not tell."""

    text: str
    least: float
    about: Callable[[Row], bool]
    figure: Callable[[Row], float | None]
    unit: str = "x"

    def show(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}"


def _models(dtype: str, name: str = "") -> Callable[[Row], bool]:
    return lambda row: row.operator == "model" and row.dtype == dtype and row.name.startswith(name)


def _over(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row.peer_speedups.get(peer)


def _over_sdpa(row: Row) -> float:
    """Over SDPA in the layout in which it is fastest."""
    return min([row.speedup, *(ratio for peer, ratio in row.peer_speedups.items() if peer.startswith("SDPA"))])


def _scores_over_extra(row: Row) -> float | None:
    # Zero is no memory at all, which no kernel gets by with: it was reused unseen.
    return row.scores_bytes / row.extra_bytes if row.scores_bytes and row.extra_bytes else None


def _of_peak(row: Row) -> float | None:
    return row.fraction_of_limit if row.limit == "arithmetic" else None


_VIT_B_8 = "vit_base_patch16_224, batch 8"

GOALS = (
    Goal("float32 over OpenVINO", 1.05, _models("f32"), _over("openvino")),
    Goal("float32, share of the peak", 0.85, _models("f32", _VIT_B_8), _of_peak, "%"),
    Goal("bfloat16 over OpenVINO", 1.15, _models("bf16"), _over("openvino")),
    Goal("bfloat16, share of the peak", 0.85, _models("bf16", _VIT_B_8), _of_peak, "%"),
    Goal("int8 over fastvit's bfloat16", 1.5, _models("int8", _VIT_B_8), _over("fastvit bf16")),
    Goal("attention over SDPA's fastest layout", 1.3, lambda row: row.operator == "attention", _over_sdpa),
    # Where the matrix is large beside the scratch of two threads.
    Goal(
        "one head's N x N over all of attention's memory",
        1.0,
        lambda row: row.operator == "attention" and "1370 tokens" in row.name,
        _scores_over_extra,
    ),
    Goal(
        "uint8 image to tokens over to-tensor, normalise, conv",
        5.0,
        lambda row: row.operator == "patch_embed" and "uint8" in row.name,
        lambda row: row.speedup,
    ),
)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    case: str
    value: float | None

    @property
    def text(self) -> str:
        return "not measured" if self.value is None else "reached" if self.value >= self.goal.least else "NOT REACHED"


def judge(rows: Iterable[Row], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Every goal with every row it is about; a goal without rows is not measured."""
    rows = list(rows)
    verdicts = []
    for goal in goals:
        chosen = [Verdict(goal, f"{row.name}, {row.dtype}", goal.figure(row)) for row in rows if goal.about(row)]
        verdicts += chosen or [Verdict(goal, "-", None)]
    return verdicts


def summary(rows: Iterable[Row], goals: Sequence[Goal] = GOALS) -> str:
    lines = [f"{'goal':<55}{'case':<48}{'at least':>9}{'this run':>10}"]
    verdicts = judge(rows, goals)
    for v in verdicts:
        value = "-" if v.value is None else v.goal.show(v.value)
        lines.append(f"{v.goal.text:<55}{v.case:<48}{v.goal.show(v.goal.least):>9}{value:>10}  {v.text}")
    reached = sum(v.text == "reached" for v in verdicts)
    measured = sum(v.value is not None for v in verdicts)
    return "\n".join([*lines, f"{reached} of {measured} reached, {len(verdicts) - measured} not measured"])


def read(path: Path) -> list[Row]:
    """The rows of a record, also of one that was written before a field was added."""
    known = {f.name for f in fields(Row)}
    return [Row(**{k: v for k, v in row.items() if k in known}) for row in json.loads(path.read_text())["rows"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="a cpu.json")
    print(summary(read(parser.parse_args().record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
