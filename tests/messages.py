"""What the tests ask of an error's message."""

import re


def one_line(text: str) -> str:
    """A pattern for a message of a single line that holds the text."""
    return rf"\A[^\n]*{re.escape(text)}[^\n]*\Z"
