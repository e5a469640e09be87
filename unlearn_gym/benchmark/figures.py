"""Figures with their goals and verdicts, and the tables made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured value, None where it cannot be measured. ``goal`` is a bound from below (``at_least``) or
    above; None: reported only.
    """

    item: str
    name: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, or ``–`` where there is no goal."""
        if self.goal is None or self.value is None:
            return "–"
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "met" if met else "missed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the verdict included."""
        return {**asdict(self), "verdict": self.verdict}

    def _digits(self, value: float) -> str:
        """Three digits after the point or less, or so many that a verdict shows."""
        text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
        if self.verdict == "missed" and float(text.replace(",", "")) == self.goal:
            return f"{value:.6f}".rstrip("0")
        return text

    def cells(self) -> list[str]:
        """A row of the tables: item, what, measured, goal, verdict."""
        bound = "" if self.goal is None else f"{'≥' if self.at_least else '≤'} {self.goal:g}"
        measured = "not here" if self.value is None else f"{self._digits(self.value)} {self.unit}".strip()
        return [self.item, self.name, measured, bound, self.verdict]


HEADER = ["item", "what", "measured", "goal", "verdict"]


def markdown(figures: list[Figure]) -> str:
    """The table as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(figure.cells() for figure in figures)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
