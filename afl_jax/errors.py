"""The error of bad input: what a user can mend without reading a traceback."""

import sys
from collections.abc import Mapping
from typing import Any

# What a file holds may become part of a message.
_MAX_MESSAGE = 1500


class InputError(ValueError):
    """Bad input: a file, an argument or a case that the user can mend.

    The message is one line that names what is at fault, says what was expected and what was
    found, and how to mend it. The command line prints it and exits with code 2. The middle of one
    that is very long is left out.
    """

    def __init__(self, message: str):
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
        super().__init__(message)


def print_error(error: BaseException | str) -> None:
    """Prints an error as the command line does: one line on standard error.

    Args:
        error: What is wrong. Control characters, which may come from the name of a file, are
            printed as escapes. An OSError is a file that cannot be made, read or written.
    """
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        error = f"{place}{error.strerror or error}; check the path, its rights and the disk."
    line = " ".join(str(error).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"afl-jax: error: {line}", file=sys.stderr)


def check_rules(rules: Mapping[str, tuple[str, Any, bool]], *, where: str = "") -> None:
    """Checks values against rules in words.

    Args:
        rules: Name of each value to the rule, the value, and whether it holds.
        where: In front of the name.

    Raises:
        InputError: If one does not hold; the first is named.
    """
    for name, (rule, value, holds) in rules.items():
        if not holds:
            raise InputError(f"{where}{name} must be {rule}, got {value!r}.")
