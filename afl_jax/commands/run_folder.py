"""The folder of a run: whether a run may begin there, or go on."""

from pathlib import Path
from typing import Any

from afl_jax.commands import construct
from afl_jax.config import Config, changed_fields, read_config
from afl_jax.errors import InputError
from afl_jax.files import remove_leftovers
from afl_jax.fingerprint import data_difference, describe_data, read_fingerprint

# What a resumed run may change of the config that it began with.
_FREE_ON_RESUME = (
    *("num_epochs", "eval_every", "checkpoint_every", "num_checkpoints", "non_finite"),
    *("num_devices", "tensorboard"),
)


def check_run_folder(out: Path, config: Config, *, resume: bool, allow_changes: bool) -> None:
    """A new run needs a new folder; a resumed one, the config that it began with.

    Args:
        out: The folder.
        config: The run's.
        resume: Whether the run that is there goes on.
        allow_changes: Whether its config may have changed.

    Raises:
        InputError: If the folder is not as it must be.
    """
    remove_leftovers(out)
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"--out {out} exists already: choose another folder, or go on with --resume."
            )
        return
    path = out / "config.json"
    if not path.exists():
        raise InputError(f"--out {out} is not a run that could be resumed: it has no config.json.")
    differences = [
        f"{name} is {before}, got {now}"
        for name, (now, before) in changed_fields(config, read_config(path)).items()
        if name not in _FREE_ON_RESUME
    ]
    if differences and not allow_changes:
        raise InputError(
            f"--resume goes on with the config of {path}, where {'; '.join(differences)}: leave "
            "the options out, start a new run, or say --allow-changes."
        )


def take_fingerprint(
    out: Path, config: Config, *, resume: bool, allow_changes: bool
) -> dict[str, Any]:
    """The data set of the run, as it must have been before, and its sessions before this one.

    Args:
        out: The folder.
        config: The run's.
        resume: Whether the run that is there goes on.
        allow_changes: Whether its data set may have changed.

    Returns:
        See `fingerprint`.

    Raises:
        InputError: If the data set is another one.
    """
    builder = construct.create_builder(config.data)
    keys = zip(builder.cases, builder.builder_config.keys, strict=True)
    splits = builder.split_cases().items()
    data = describe_data(
        config.data.name,
        keys={case.case_id: key for case, key in keys},
        splits={name: [case.case_id for case in cases] for name, cases in splits},
    )
    path, sessions = out / "fingerprint.json", []
    if resume and path.exists():
        before = read_fingerprint(path)
        difference = data_difference(before["data"], data)
        if difference and not allow_changes:
            raise InputError(
                f"--resume goes on with the data set of {path}, but {difference}: bring it back, "
                "start a new run, or say --allow-changes."
            )
        sessions = before["sessions"]
    return {"data": data, "sessions": sessions}
