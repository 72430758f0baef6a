"""The command line, ``afl-jax``: arguments, exit codes, and the commands by name."""

import argparse
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from afl_jax.commands.check import check, detect_data
from afl_jax.commands.evaluate import evaluate
from afl_jax.commands.predict import predict
from afl_jax.commands.prepare import prepare
from afl_jax.commands.report import report
from afl_jax.commands.train import train
from afl_jax.config import Config, read_config
from afl_jax.errors import InputError, print_error
from afl_jax.presets import PRESETS
from afl_jax.signals import Interrupted, raised_signals


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: The command and its options.

    Returns:
        The exit code: 0, 2 after bad input, 130 after SIGINT, or 143 after SIGTERM.
    """
    _enable_compilation_cache()
    try:
        with raised_signals():
            return _run_command(list(arguments))
    except (InputError, OSError) as error:
        print_error(error)
        return 2
    except Interrupted as interruption:
        print(f"afl-jax: {interruption}", file=sys.stderr)
        return interruption.exit_code


def _run_command(arguments: list[str]) -> int:
    arguments, base = _take_base_config(arguments)
    return tyro.extras.subcommand_cli_from_dict(
        {
            "check": _with_default(check, "data", base and base.data),
            "prepare": _with_default(prepare, "data", base and base.data),
            "train": _with_default(train, "config", base),
            "predict": predict,
            "evaluate": evaluate,
            "report": report,
        },
        prog="afl-jax",
        description=(
            "Segment small, irregular lesions with the adaptive focal loss. "
            "`afl-jax prepare NAME ...` and `afl-jax train NAME ...` begin from the run of "
            f"that name: {', '.join(PRESETS)}."
        ),
        args=arguments,
    )


def _enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless told otherwise.

    ``AFL_JAX_COMPILATION_CACHE=0`` switches it off; JAX's own ``JAX_COMPILATION_CACHE_DIR`` names
    another folder.
    """
    if os.environ.get("AFL_JAX_COMPILATION_CACHE") == "0" or jax.config.jax_compilation_cache_dir:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "afl_jax" / "xla"))


def _take_base_config(arguments: list[str]) -> tuple[list[str], Config | None]:
    """The arguments without the name of a preset, and the config whose fields are defaults.

    That is a preset's, that of a folder to check, that of ``--config``, or that of a run to resume.
    """
    if not arguments or arguments[0] not in ("check", "prepare", "train"):
        return arguments, None
    name = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None
    if name is not None:
        if arguments[0] == "check" and name not in PRESETS and Path(name).is_dir():
            return ["check", *arguments[2:]], Config(data=detect_data(Path(name)))
        if name not in PRESETS:
            raise InputError(f"no run is called {name!r}: choose from {', '.join(PRESETS)}.")
        arguments = [arguments[0], *arguments[2:]]
    if arguments[0] != "train":
        # The options of a run's data are understood as they stand.
        arguments = [
            f"--{option.removeprefix('--data.')}" if option.startswith("--data.") else option
            for option in arguments
        ]
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        known, _ = parser.parse_known_args(arguments[1:])
    except argparse.ArgumentError:
        return arguments, None  # tyro says what is wrong.
    path = known.config
    if path is None and known.resume and known.out and (known.out / "config.json").exists():
        path = known.out / "config.json"
    if path is not None and name is not None:
        raise InputError(f"give either the name {name} or a config file, {path}.")
    return arguments, PRESETS.get(name) if path is None else read_config(path)


def _with_default(
    command: Callable[..., int], parameter: str, default: object
) -> Callable[..., int]:
    """The command with another default of one parameter, unless that is None."""
    if default is None:
        return command
    signature = inspect.signature(command)
    parameters = [
        p.replace(default=default) if p.name == parameter else p
        for p in signature.parameters.values()
    ]
    # tyro reads defaults from the signature.
    wrapped = functools.wraps(command)(lambda *args, **kwargs: command(*args, **kwargs))
    wrapped.__signature__ = signature.replace(parameters=parameters)
    return wrapped


def report_unraisable(unraisable: Any) -> None:
    """Reports an exception of another thread, as Python does, unless it says nothing.

    Args:
        unraisable: As ``sys.unraisablehook`` has it.
    """
    # What is left of reading a damaged checkpoint, in a thread of its storage.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def run() -> None:
    """Entry point of the console script."""
    # Names of files that are not of the terminal's encoding are printed as escapes.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.unraisablehook = report_unraisable
    sys.exit(main(sys.argv[1:]))
