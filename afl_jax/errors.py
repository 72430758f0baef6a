"""The error of bad input: what a user can mend without reading a traceback."""

import sys


class InputError(ValueError):
    """Bad input: a file, an argument or a case that the user can mend.

    The message is one line that names what is at fault, says what was expected and what was
    found, and how to mend it. The command line prints it and exits with code 2.
    """


def print_error(error: Exception | str) -> None:
    """Prints an error as the command line does: one line on standard error.

    Args:
        error: What is wrong.
    """
    print(f"afl-jax: error: {' '.join(str(error).split())}", file=sys.stderr)
