"""The tables and the figure of a comparison, which follow from its cells alone.

Dice, IoU and lesion F1 are of the cases that have a lesion, the same for every loss: a case without
one has a Dice of 0 or none at all, as a loss claims something there or nothing. What is claimed in
vain shows in the specificity and the false positives, which are of all cases.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from afl_jax import comparison, lesions, loop, reports
from afl_jax.files import written_beside

METRICS = {
    "dice": "Dice",
    "iou": "IoU",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "lesion_f1": "lesion F1",
    "false_positives": "lesions in vain",
}
_VOLUME, _SURFACE = "lesion volume", "boundary irregularity"
_THIRDS = {_VOLUME: ("small", "medium", "large"), _SURFACE: ("smooth", "medium", "irregular")}

Values = Mapping[str, NDArray[np.float64]]


def write_report(
    cells: Mapping[str, Sequence[Sequence[loop.Row]]], *, reference: str, out: Path
) -> str:
    """Writes ``table.csv``, ``thirds.csv``, ``report.md`` and ``comparison.png``.

    Args:
        cells: From `cells.read_cells`.
        reference: The column with which the others are compared.
        out: Folder of the comparison.

    Returns:
        The text of ``report.md``.
    """
    values = {
        metric: {name: _values(seeds, metric) for name, seeds in cells.items()}
        for metric in METRICS
    }
    first = next(iter(cells.values()))[0]
    thirds = {
        _VOLUME: reports.tercile_indices([_volume(row) for row in first]),
        _SURFACE: reports.tercile_indices(_irregularity(first)),
    }
    table = _table(values, reference)
    by_third = _by_third(values, thirds, reference)
    text = "\n\n".join(
        [
            _overall_markdown(table),
            _tests_markdown(table, reference),
            *[_third_markdown(by_third, kind, reference) for kind in thirds],
        ]
    )
    reports.write_csv(out / "table.csv", table)
    reports.write_csv(out / "thirds.csv", by_third)
    reports.write_text(out / "report.md", text + "\n")
    _draw(table, by_third, out / "comparison.png")
    return text


def _values(seeds: Sequence[Sequence[loop.Row]], metric: str) -> NDArray[np.float64]:
    """``[S, N]``."""
    return np.array([[_metric(row, metric) for row in rows] for rows in seeds])


def _metric(row: loop.Row, metric: str) -> float:
    if metric == "false_positives":
        return row["lesion_fp"]
    if metric == "specificity":
        return row[metric]
    if not _has_lesion(row):
        return math.nan
    if metric != "lesion_f1":
        return row[metric]
    counts = (int(row[f"lesion_{name}"]) for name in lesions.LesionCounts._fields)
    return lesions.lesion_f1(lesions.LesionCounts(*counts))


def _has_lesion(row: loop.Row) -> bool:
    return not math.isnan(row["irregularity"])


def _volume(row: loop.Row) -> float:
    return row["lesion_volume_mm3"] if _has_lesion(row) else math.nan


def _irregularity(rows: Sequence[loop.Row]) -> list[float]:
    """The roughness with which the lesions were made, if they were; else what was measured."""
    made = [row["roughness"] for row in rows]
    measured = [row["irregularity"] for row in rows]
    return measured if np.isnan(made).sum() > np.isnan(measured).sum() else made


def _table(values: Mapping[str, Values], reference: str) -> list[loop.Row]:
    """A row for each loss, the best Dice first."""
    dice = values["dice"]
    tests = {
        metric: comparison.paired_tests(values[metric], reference=reference) for metric in METRICS
    }
    ranks, wins = comparison.mean_ranks(dice), comparison.wins(dice)
    rows = []
    for name in dice:
        row = {"loss": name}
        for metric in METRICS:
            low, high = comparison.crossed_interval(values[metric][name])
            mean = float(np.nanmean(comparison.mean_over_seeds(values[metric][name])))
            row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
        row |= {"rank": ranks[name], "wins": wins[name]}
        for metric in ("dice", "lesion_f1"):
            test = tests[metric].get(name)
            row |= {
                f"{metric}_{field}": math.nan if test is None else getattr(test, field)
                for field in ("difference", "p_value", "p_holm", "effect_size")
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["dice"])


def _by_third(
    values: Mapping[str, Values], thirds: Mapping[str, NDArray[np.int_]], reference: str
) -> list[loop.Row]:
    """A row for each loss in each third of the cases; tests are adjusted within a third."""
    rows = []
    for kind, numbers in thirds.items():
        for number, third in enumerate(_THIRDS[kind]):
            chosen = numbers == number
            part = {
                metric: {name: value[:, chosen] for name, value in values[metric].items()}
                for metric in ("dice", "lesion_f1")
            }
            tests = {m: comparison.paired_tests(part[m], reference=reference) for m in part}
            wins = comparison.wins(part["dice"])
            for name in part["dice"]:
                row = {"by": kind, "third": third, "cases": int(chosen.sum()), "loss": name}
                row["wins"] = wins[name]
                for metric, of_loss in part.items():
                    low, high = comparison.crossed_interval(of_loss[name])
                    mean = float(np.nanmean(comparison.mean_over_seeds(of_loss[name])))
                    row |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
                    test = tests[metric].get(name)
                    row |= {
                        f"{metric}_{field}": math.nan if test is None else getattr(test, field)
                        for field in ("difference", "p_holm", "effect_size")
                    }
                rows.append(row)
    return rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(row: loop.Row, metric: str) -> str:
    return f"{row[metric]:.3f} ({row[f'{metric}_low']:.3f} to {row[f'{metric}_high']:.3f})"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _overall_markdown(table: Sequence[loop.Row]) -> str:
    rows = [
        [row["loss"], *[_interval(row, metric) for metric in METRICS], f"{row['rank']:.2f}"]
        for row in table
    ]
    return _markdown(["loss", *METRICS.values(), "rank"], rows)


def _tests_markdown(table: Sequence[loop.Row], reference: str) -> str:
    header = ["against " + reference]
    for metric in ("Dice", "lesion F1"):
        header += [f"{metric}, difference", "p (Holm)", "effect size"]
    rows = []
    for row in table:
        if row["loss"] == reference:
            continue
        cells = [row["loss"]]
        for metric in ("dice", "lesion_f1"):
            cells += [
                f"{row[f'{metric}_difference']:+.3f}",
                _p(row[f"{metric}_p_holm"]),
                f"{row[f'{metric}_effect_size']:+.2f}",
            ]
        rows.append(cells)
    return _markdown(header, rows)


def _third_markdown(by_third: Sequence[loop.Row], kind: str, reference: str) -> str:
    """Dice, lesion F1, wins and the test of Dice by third, a row for each loss."""
    thirds = _THIRDS[kind]
    cells = {(row["loss"], row["third"]): row for row in by_third if row["by"] == kind}
    header = [f"by {kind}"]
    for third in thirds:
        header += [f"{third}: Dice", "p", "lesion F1", "wins"]
    rows = []
    for name in dict.fromkeys(row["loss"] for row in by_third):
        line = [name]
        for third in thirds:
            row = cells[name, third]
            p = "" if name == reference else _p(row["dice_p_holm"])
            line += [f"{row['dice']:.3f}", p, f"{row['lesion_f1']:.3f}", f"{row['wins']:.1f}"]
        rows.append(line)
    return _markdown(header, rows)


def _draw(table: Sequence[loop.Row], by_third: Sequence[loop.Row], path: Path) -> None:
    """Dice of each loss with its interval: of all cases, and in the thirds."""
    names = [row["loss"] for row in table]
    place = {name: -index for index, name in enumerate(names)}
    figure = Figure(
        figsize=(11, 1.4 + 0.32 * len(names)), dpi=150, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for row in table:
        y = place[row["loss"]]
        panels[0].plot([row["dice_low"], row["dice_high"]], [y, y], color="#0072B2", linewidth=2)
        panels[0].plot(row["dice"], y, "o", color="#0072B2")
    colours = ("#56B4E9", "#E69F00", "#009E73")
    for axes, (kind, thirds) in zip(panels[1:], _THIRDS.items(), strict=True):
        for shift, (third, colour) in enumerate(zip(thirds, colours, strict=True)):
            rows = [row for row in by_third if (row["by"], row["third"]) == (kind, third)]
            ys = [place[row["loss"]] + 0.2 * (1 - shift) for row in rows]
            ends = [[row["dice_low"], row["dice_high"]] for row in rows]
            axes.plot(np.transpose(ends), [ys, ys], color=colour, linewidth=1)
            axes.plot([row["dice"] for row in rows], ys, "o", color=colour, ms=4, label=third)
        axes.set_title(f"by {kind}", loc="left", fontsize=11, pad=20)
        axes.legend(
            frameon=False,
            fontsize=8,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=3,
            handletextpad=0.1,
        )
    panels[0].set_title("all cases with a lesion", loc="left", fontsize=11, pad=20)
    panels[0].set_yticks([place[name] for name in names], names)
    for axes in panels:
        axes.set_xlim(0, 1)
        axes.set_xlabel("Dice")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
