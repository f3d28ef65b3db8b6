"""Taking two sides in turn, and the table that comes of it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Rounds of every comparison; the median of fewer says little on a shared machine.
ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. ours, peer: medians, in the unit; goal: as text; is_met: None where the peer is missing."""

    number: str
    name: str
    ours: float
    peer: float | None
    ratio: float | None
    unit: str
    goal: str
    is_met: bool | None
    note: str = ""


def in_turn(sides: Sequence[Callable[[], float]], *, rounds: int = ROUNDS) -> list[list[float]]:
    """Each side's figures, one per round. The order turns with every round, so that a drift of the machine favours nobody."""
    taken: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            taken[side].append(sides[side]())
    return taken


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(mine / theirs for mine, theirs in zip(ours, peer, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compared(
    number: str, name: str, ours: Sequence[float], peer: Sequence[float], *, unit: str, at_least: float = 0, at_most: float = 0
) -> Figure:
    """A figure whose goal is a ratio to the peer."""
    found = ratio(ours, peer)
    return Figure(
        number=number,
        name=name,
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ratio=found,
        unit=unit,
        goal=f"≥ {at_least:g} ×" if at_least else f"≤ {at_most:g} ×",
        is_met=found >= at_least if at_least else found <= at_most,
    )


def limited(number: str, name: str, value: float, *, unit: str, at_most: float, peer: float | None = None) -> Figure:
    """A figure whose goal is a number."""
    return Figure(
        number=number,
        name=name,
        ours=value,
        peer=peer,
        ratio=None,
        unit=unit,
        goal=f"≤ {at_most:g} {unit}",
        is_met=value <= at_most,
    )


def skipped(number: str, name: str, why: str) -> Figure:
    """A figure that could not be taken, and why: never silently."""
    return Figure(number=number, name=name, ours=0, peer=None, ratio=None, unit="", goal="", is_met=None, note=why)


def table(figures: Sequence[Figure]) -> str:
    """The figures as text."""
    rows = [("", "figure", "ours", "peer", "ratio", "goal", ""), *map(_cells, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def line(figure: Figure) -> str:
    """One figure as text, outside the table."""
    return "  ".join(cell for cell in _cells(figure) if cell)


def _cells(figure: Figure) -> tuple[str, ...]:
    mark = {True: "met", False: "MISSED", None: f"skipped: {figure.note}"}[figure.is_met]
    ours = _number(figure.ours, figure.unit) if figure.is_met is not None else ""
    peer = _number(figure.peer, figure.unit) if figure.peer is not None else ""
    times = f"{figure.ratio:.3f}" if figure.ratio is not None else ""
    return figure.number, figure.name, ours, peer, times, figure.goal, mark


def _number(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"
