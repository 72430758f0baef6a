"""Files that are there whole or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which takes the place of another on success and is removed on failure.

    Args:
        path: Replaced if it exists.

    Yields:
        A hidden path in the same folder, with the same suffixes.
    """
    path = Path(path)
    beside = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike, *, name: str = "*") -> None:
    """Removes what `written_beside` had begun in a folder when its process was killed.

    Args:
        folder: Where nothing is being written now; it need not exist.
        name: Pattern of the names of the files that were to be written.
    """
    for path in Path(folder).glob(f".*.{name}"):
        if re.match(r"\.[0-9a-f]{32}\.", path.name):
            path.unlink(missing_ok=True)
