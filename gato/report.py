"""What `gato quickstart` shows at its end: a table, a picture, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gato.examples import PICTURES, commands

CHANCE = "#9aa5b1"
OURS = "#2563eb"


def task_score(row: dict[str, Any]) -> float:
    """Return a task's score in the measure its expert is scored in: success where defined."""
    rate = row.get("success_rate")
    return float(row["mean_return"] if rate is None else rate)


def table(result: dict[str, Any]) -> Table:
    """Return the table of scores: tasks, then language corpora, then labels and captions."""
    shown = Table(title="One set of weights", title_justify="left")
    shown.add_column("task")
    for heading in ("random", "expert", "ours", "% of expert"):
        shown.add_column(heading, justify="right")
    for task, row in result["tasks"].items():
        score = task_score(row)
        low, high = row["random_score"], row["expert_score"]
        percent = f"{100 * row['expert_normalised']:.0f}"
        shown.add_row(task, f"{low:.2f}", f"{high:.2f}", f"{score:.2f}", percent)
    for name, row in result["language"].items():
        if row.get("exact") is not None:
            shown.add_row(f"{name}, answered exactly", "", "1.00", f"{row['exact']:.2f}", "")
        else:
            shown.add_row(f"{name}, nats per token", "", "", f"{row['loss']:.2f}", "")
    for name, row in result.get("matching", {}).items():
        told = f"{name}, of {1 / row['chance']:.0f}"
        shown.add_row(told, f"{row['chance']:.2f}", "1.00", f"{row['score']:.2f}", "")
    return shown


def picture(result: dict[str, Any], metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the scores per task and the loss of every corpus into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    bars = {t: 100.0 * r["expert_normalised"] for t, r in result["tasks"].items()}
    bars |= {
        n: 100.0 * r["exact"] for n, r in result["language"].items() if r.get("exact") is not None
    }
    bars |= {n: 100.0 * row["score"] for n, row in result.get("matching", {}).items()}
    left.barh(list(bars), list(bars.values()), color=OURS)
    left.invert_yaxis()
    for at, label in ((0, "random"), (100, "expert")):
        left.axvline(at, color=CHANCE, linestyle="--", linewidth=1, label=label, zorder=0)
    left.set_xlabel("score: random 0, expert (or every answer right) 100")
    left.set_title("One set of weights")
    names = sorted({name for line in metrics for name in line["losses"]})
    for name in names:
        points = [(x["step"], x["losses"][name]) for x in metrics if name in x["losses"]]
        right.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_ylabel("loss per predicted token (nats)")
    right.set_title("Training")
    right.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, some captions and answers, and commands to go on with."""
    console.print(table(result))
    for name, row in result["language"].items():
        for sample in row.get("samples", [])[:3]:
            asked = f"{sample['asked']} " if sample["asked"] else ""
            wanted = "" if sample["right"] else f"   (wanted: {sample['wanted']})"
            console.print(f"  {name}: {asked}→ {sample['said']}{wanted}", markup=False)
    checkpoint = Path(result["checkpoint"])
    console.print(f"\nCheckpoint: {checkpoint}\nTry next:", markup=False)
    task = next(iter(result["tasks"]))
    for command in commands(checkpoint, checkpoint.parent / PICTURES, task):
        console.print(f"  {command}", markup=False, soft_wrap=True)  # to be copied whole
