"""The images that a user names: files, the files of a case, or folders of them."""

from collections.abc import Sequence
from pathlib import Path

from afl_jax.data import volume
from afl_jax.errors import InputError


def find_images(
    images: Sequence[str], *, channels: Sequence[str] = ()
) -> list[tuple[str, list[Path]]]:
    """The cases that arguments name; no file is opened.

    Args:
        images: Files, one a case; or the files of a case joined by commas; or folders of files,
            and with channels of folders.
        channels: Endings of the names of a case's files in the folders, without suffix, in order.

    Returns:
        Name and files of each case, those of a folder sorted. A case of which one channel is in a
        folder has all files in its list, whether they are there or not.

    Raises:
        InputError: If an argument is empty, a folder has no images, has a case twice, or the
            endings do not tell files apart.
    """
    for index, channel in enumerate(channels):
        if any(channel.endswith(other) for other in channels[:index] + channels[index + 1 :]):
            raise InputError(
                f"--channels must be endings of which none ends in another, got {channels}."
            )
    found: list[tuple[str, list[Path]]] = []
    for argument in images:
        if (folder := Path(argument)).is_dir():
            found += _find_in_folder(folder, channels)
            continue
        files = [Path(name) for name in argument.split(",") if name]
        if not files:
            raise InputError("--images has an empty argument: give a file for each case.")
        found.append((volume.case_name(files[0]), files))
    return found


def _find_in_folder(folder: Path, channels: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """The cases of a folder, and with channels those of the folders in it, sorted."""
    cases: dict[str, list[Path]] = {}
    # A case that lacks one of its files has it in its list all the same: reading will say so.
    for path in sorted(folder.rglob("*") if channels else folder.iterdir()):
        if not path.name.endswith(volume.SUFFIXES) or path.name.startswith("."):
            continue
        name = volume.case_name(path)
        if not channels:
            cases[name] = [path]
            continue
        for channel in channels:
            if name.endswith(channel):
                case_id, suffix = name.removesuffix(channel), path.name.removeprefix(name)
                files = [path.with_name(f"{case_id}{other}{suffix}") for other in channels]
                if cases.setdefault(case_id, files) != files:
                    raise InputError(
                        f"case {case_id} is there twice, as {cases[case_id][0]} and {files[0]}: "
                        "keep one."
                    )
    if not cases:
        named = f" whose names end in {', '.join(channels)}" if channels else ""
        raise InputError(
            f"--images {folder} holds no volumes ({', '.join(volume.SUFFIXES)}){named}."
        )
    return list(cases.items())
