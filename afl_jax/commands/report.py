"""``afl-jax report``: what a run was, on what, and how it went."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.table import Table

from afl_jax import reports
from afl_jax.commands import construct
from afl_jax.config import Config, changed_fields, read_config
from afl_jax.errors import InputError
from afl_jax.fingerprint import read_fingerprint, version_difference


def report(run: Annotated[Path, tyro.conf.Positional]) -> int:
    """Show the config of a run, its data set, the versions that ran it, and its history.

    Args:
        run: Folder of the run.

    Returns:
        The exit code.
    """
    console = reports.create_console()
    config = read_config(construct.run_config_path(run))
    content = read_fingerprint(run / "fingerprint.json")
    history = _read_history(run / "metrics.jsonl")
    console.print(_settings_table(config, title=f"{run}: what its config changes"))
    console.print(_fingerprint_table(content))
    console.print(_history_table(history, config))
    for line in _version_changes(content["sessions"]):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics of the epochs that are done; none before the first."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as the log of a run ({error}).") from error


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _settings_table(config: Config, *, title: str) -> Table:
    table = _table(title, "field", "value", "default")
    for name, (value, default) in changed_fields(config, Config()).items():
        table.add_row(name, str(value), str(default))
    return table


def _fingerprint_table(content: dict[str, Any]) -> Table:
    data, session = content["data"], content["sessions"][-1]
    splits = ", ".join(f"{number} {split}" for split, number in data["splits"].items())
    table = _table("what it depends on", "what", "which")
    table.add_row("data set", f"{data['name']}, {splits}, digest {data['digest']}")
    table.add_row("git revision", str(session.get("git") or "none: not a checkout"))
    table.add_row("device", str(session.get("device")))
    for name, version in session["versions"].items():
        table.add_row(name, str(version))
    return table


def _history_table(history: list[dict[str, Any]], config: Config) -> Table:
    """The newest epoch, and the best of those that were validated."""
    state = "finished" if len(history) == config.num_epochs else "not finished"
    table = _table(
        f"{len(history)} of {config.num_epochs} epochs, {state}", "metric", "last epoch", "best"
    )
    if not history:
        return table
    validated = [row for row in history if row.get("val_dice") is not None]
    best = max(validated, key=lambda row: row["val_dice"], default={})
    for name in dict.fromkeys(column for row in history for column in row):
        table.add_row(name, *(_shown(row.get(name)) for row in (history[-1], best)))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version_changes(sessions: list[dict[str, Any]]) -> list[str]:
    """A line for each session, after the first, in which something was not as before."""
    lines = []
    for before, now in itertools.pairwise(sessions):
        if difference := version_difference(before, now):
            lines.append(f"from step {now['step']}: {difference}")
    return lines
