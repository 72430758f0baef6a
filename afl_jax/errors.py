"""The error of bad input: what a user can mend without reading a traceback."""


class InputError(ValueError):
    """Bad input: a file, an argument or a case that the user can mend.

    The message is one line that names what is at fault, says what was expected and what was
    found, and how to mend it. The command line prints it and exits with code 2.
    """
