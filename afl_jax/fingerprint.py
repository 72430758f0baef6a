"""What a run depends on: its data set, case by case, and the versions of the programs that ran it.

It stands in ``fingerprint.json`` of the run, beside ``config.json``::

    {"data": {"name": ..., "digest": ..., "splits": {split: number of cases}, "cases": {id: key}},
     "sessions": [{"step": 0, "versions": {package: version}, "git": ..., "device": ...}, ...]}

The key of a case is a digest of its files and of the settings with which it is prepared; the digest
is one of all keys and of which case is in which split. A session begins with every ``afl-jax
train``, at the step from which it goes on.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from afl_jax.errors import InputError

# What computes, reads or writes the numbers of a run.
_PACKAGES = (
    *("afl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record"),
    *("numpy", "scipy", "SimpleITK", "tensorflow-datasets"),
)
_NAMED_CASES = 5


def describe_data(
    name: str, *, keys: Mapping[str, str], splits: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The data set of a run.

    Args:
      name: Of its builder.
      keys: Of each case, a digest of what its record depends on.
      splits: The cases of each split, in order.

    Returns:
      JSON-able, as the module says.
    """
    content = json.dumps([name, keys, splits], sort_keys=True)
    return {
        "name": name,
        "digest": hashlib.sha256(content.encode()).hexdigest()[:12],
        "splits": {split: len(cases) for split, cases in splits.items()},
        "cases": dict(keys),
    }


def describe_session(*, step: int) -> dict[str, Any]:
    """What runs here and now.

    Args:
      step: From which the run goes on.

    Returns:
      JSON-able, as the module says; ``git`` is None outside of a checkout.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return {
        "step": step,
        "versions": versions,
        "git": _git_revision(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Reads what was written as ``fingerprint.json``.

    Args:
      path: Of the file.

    Returns:
      Its content, of the kinds that the module says.

    Raises:
      InputError: If it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data, sessions = content["data"], content["sessions"]
        kinds = {
            "name": isinstance(data["name"], str),
            "digest": isinstance(data["digest"], str),
            "splits": isinstance(data["splits"], dict),
            "cases": isinstance(data["cases"], dict),
            "sessions": isinstance(sessions, list)
            and all(isinstance(session["versions"], dict) for session in sessions),
        }
        if wrong := [name for name, is_right in kinds.items() if not is_right]:
            raise ValueError(f"{wrong[0]} is of another kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as the fingerprint of a run ({type(error).__name__}: {error});"
            " delete it, and go on with --resume --allow-changes."
        ) from error
    return content


def data_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says in words how two data sets differ.

    Args:
      before: From `describe_data`.
      now: The same.

    Returns:
      What differs; empty if nothing does.
    """
    if before["digest"] == now["digest"]:
        return ""
    if before["name"] != now["name"]:
        return f"the data set was {before['name']}, and is {now['name']}"
    old, new = before["cases"], now["cases"]
    differences = {
        "gone": sorted(set(old) - set(new)),
        "new": sorted(set(new) - set(old)),
        "changed": sorted(case for case in set(old) & set(new) if old[case] != new[case]),
    }
    parts = [f"{what}: {_listed(cases)}" for what, cases in differences.items() if cases]
    return f"cases {', '.join(parts)}" if parts else "the same cases are split otherwise"


def version_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says in words how the programs and devices of two sessions differ.

    Args:
      before: From `describe_session`.
      now: The same.

    Returns:
      What differs; empty if nothing does.
    """
    old = {**before["versions"], "git": before.get("git"), "device": before.get("device")}
    new = {**now["versions"], "git": now["git"], "device": now["device"]}
    return ", ".join(
        f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name) != new[name]
    )


def _listed(cases: Sequence[str]) -> str:
    more = len(cases) - _NAMED_CASES
    return " ".join(cases[:_NAMED_CASES]) + (f" and {more} more" if more > 0 else "")


def _git_revision() -> str | None:
    """The commit that the package was checked out from, with a mark if it was changed since."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie in the checkout of something else.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    return f"{revision}, changed since" if git("status", "--porcelain", "--", ".") else revision
