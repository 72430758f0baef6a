"""What the bytes of an image file say, looked at before a library believes them.

ITK takes a truncated NIfTI file without complaint, leaving the missing voxels to chance, makes
zeros of values that are not finite, takes the memory that a header asks for, and ends the program
on some MetaImage headers. So a file is refused here unless its header is sound and its voxels are
all there. A size that is absurd raises `InputError`; what else is wrong, a ValueError or EOFError,
which the reader of the file words.
"""

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from afl_jax.errors import InputError

# Values (voxels times channels) that one file may hold: four gibibytes of float32. The largest
# whole-body scans have a quarter of it.
MAX_NUM_VALUES = 2**30
# A NIfTI-1 header with its extension flag, after which ITK writes the voxels.
NIFTI_HEADER_BYTES = 352

# Bytes of a voxel by the type's code: whole numbers, float32 and float64, and RGB.
_NIFTI_TYPES = {
    2: 1, 256: 1, 4: 2, 512: 2, 8: 4, 768: 4, 1024: 8, 1280: 8, 16: 4, 64: 8, 128: 3
}  # fmt: skip
_NIFTI_FLOATS = {16: "f4", 64: "f8"}
_META_TYPES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 4,
    "MET_ULONG": 4,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
# A MetaImage header is a few hundred bytes of text before the pixels.
_META_HEADER_BYTES = 65536
# How many numbers each of these has, in NDims; an image may leave them out.
_META_VECTORS = {
    "TransformMatrix": 2,
    "Rotation": 2,
    "Orientation": 2,
    "Offset": 1,
    "Position": 1,
    "Origin": 1,
    "CenterOfRotation": 1,
    "ElementSpacing": 1,
    "ElementSize": 1,
}


def read_bytes(path: Path, num_bytes: int) -> bytes:
    """Reads the beginning of a file, unpacked.

    Args:
      path: A file, packed if its name ends in ``.gz``.
      num_bytes: How many bytes there must be.

    Returns:
      The bytes.

    Raises:
      EOFError: If the file has fewer.
      OSError: If it cannot be read, or its checksum is wrong.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        # One byte more reaches the end of a whole file, where gzip compares the checksum.
        data = file.read(num_bytes + 1)[:num_bytes]
    if len(data) < num_bytes:
        raise EOFError(f"{num_bytes} bytes expected, {len(data)} found")
    return data


def check_nifti(path: Path) -> bool:
    """Checks that the header of a NIfTI-1 file is sound and its voxels are all there.

    Args:
      path: A ``.nii`` or ``.nii.gz`` file.

    Returns:
      Whether all values are finite.

    Raises:
      InputError: If the header claims no values, or more than `MAX_NUM_VALUES`.
      ValueError: If it is not sound otherwise.
      EOFError: If the file is truncated.
      OSError: If it cannot be read.
    """
    header = read_bytes(path, NIFTI_HEADER_BYTES)
    orders = [order for order in "<>" if struct.unpack_from(f"{order}i", header)[0] == 348]
    if not orders:
        raise ValueError("no NIfTI-1 header")
    order = orders[0]

    def read(kind: str, offset: int) -> tuple:
        return struct.unpack_from(f"{order}{kind}", header, offset)

    num_axes, *shape = read("8h", 40)
    (datatype,), (voxels_begin,) = read("h", 70), read("f", 108)
    if not 1 <= num_axes <= 7 or datatype not in _NIFTI_TYPES:
        raise ValueError("unknown number of axes or type of voxel")
    # Spacing, and the two ways to say where the volume lies, if they say so.
    spacing, is_used = read("7f", 80)[:num_axes], read("2h", 252)
    placed = [read("6f", 256), read("12f", 280)]
    numbers = [spacing, *(v for code, v in zip(is_used, placed, strict=True) if code > 0)]
    if not all(math.isfinite(value) for values in numbers for value in values):
        raise ValueError("geometry that is not finite")
    if not math.isfinite(voxels_begin):
        raise ValueError("voxels that begin nowhere")
    num_values = _count_values(path, *shape[:num_axes])
    # No file has voxels in its header: the library, too, corrects an offset that says so.
    begin = max(int(voxels_begin), 348)
    data = read_bytes(path, begin + num_values * _NIFTI_TYPES[datatype])
    if datatype not in _NIFTI_FLOATS:
        return True
    values = np.frombuffer(data, f"{order}{_NIFTI_FLOATS[datatype]}", offset=begin)
    return bool(np.all(np.isfinite(values)))


def check_meta(path: Path) -> None:
    """Checks that the header of a MetaImage file is sound and its voxels are all there.

    Args:
      path: A ``.mha`` file.

    Raises:
      InputError: If the header claims no values, or more than `MAX_NUM_VALUES`.
      ValueError: If it is not sound otherwise.
      EOFError: If the file is truncated.
      OSError: If it cannot be read.
      zlib.error: If packed voxels are damaged.
    """
    with path.open("rb") as file:
        fields, begin = _parse_meta(file.read(_META_HEADER_BYTES))
        file.seek(begin)
        num_bytes = path.stat().st_size - begin
        shape = [int(size) for size in fields["DimSize"].split()]
        num_values = _count_values(path, *shape, int(fields.get("ElementNumberOfChannels", "1")))
        expected = num_values * _META_TYPES[fields["ElementType"]]
        if fields.get("CompressedData", "False") == "False":
            if num_bytes < expected:
                raise EOFError(f"{expected} bytes expected, {num_bytes} found")
            return
        if int(fields.get("CompressedDataSize", num_bytes)) > num_bytes:
            raise EOFError("fewer packed bytes than the header says")
        unpacker = zlib.decompressobj()
        # Unpacked piece by piece: what matters is how much it is.
        found, piece = 0, b""
        while found <= expected and not unpacker.eof:
            piece = unpacker.unconsumed_tail or file.read(2**20)
            if not piece:
                break
            found += len(unpacker.decompress(piece, 2**24))
        if found != expected or not unpacker.eof:
            raise EOFError(f"{expected} bytes expected, {found} found")


def find_data_file(path: Path) -> str:
    """Where the header of a MetaImage file says that its pixels are.

    Args:
      path: A ``.mha`` file.

    Returns:
      ``LOCAL`` if they follow the header; ``none`` if it says nothing.
    """
    with path.open("rb") as file:
        header = file.read(_META_HEADER_BYTES)
    found = re.search(rb"^ElementDataFile\s*=[ \t]*(\S+)", header, re.MULTILINE)
    return "none" if found is None else found.group(1).decode(errors="replace")


def _parse_meta(header: bytes) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage header, each sound and there once, and where the voxels begin."""
    fields, place = {}, 0
    while "ElementDataFile" not in fields:
        end = header.index(b"\n", place)
        name, equals, value = header[place:end].decode("ascii").partition("=")
        name, place = name.strip(), end + 1
        if not equals or name in fields:
            raise ValueError(f"a line that is no field, or a field twice: {name}")
        # The library understands these once it knows how many axes there are.
        if "NDims" not in fields and (name in _META_VECTORS or name == "DimSize"):
            raise ValueError(f"{name} in front of NDims")
        fields[name] = value.strip()
    _check_meta_fields(fields)
    return fields, place


def _check_meta_fields(fields: dict[str, str]) -> None:
    num_axes = int(fields["NDims"])
    flags = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
    is_sound = {
        "ObjectType": fields.get("ObjectType", "Image") == "Image",
        "NDims": num_axes in (2, 3, 4),
        "DimSize": len(fields["DimSize"].split()) == num_axes,
        "ElementType": fields["ElementType"] in _META_TYPES,
        "ElementNumberOfChannels": 1 <= int(fields.get("ElementNumberOfChannels", "1")) < 2**15,
        "HeaderSize": "HeaderSize" not in fields,
        "BinaryData": fields.get("BinaryData", "False") == "True",
        "CompressedDataSize": int(fields.get("CompressedDataSize", "1")) > 0,
        **{name: fields.get(name, "True") in ("True", "False") for name in flags[1:]},
    }
    for name, power in _META_VECTORS.items():
        if name in fields:
            numbers = [float(value) for value in fields[name].split()]
            count = num_axes**power
            is_sound[name] = len(numbers) == count and all(map(math.isfinite, numbers))
    if wrong := [name for name, holds in is_sound.items() if not holds]:
        raise ValueError(f"{wrong[0]} is not sound")


def _count_values(path: Path, *shape: int) -> int:
    num_values = math.prod(shape)
    if min(shape) < 1 or num_values > MAX_NUM_VALUES:
        raise InputError(
            f"{path}: the header claims size {shape}, {num_values} values; between 1 and "
            f"{MAX_NUM_VALUES} can be read. The header may be damaged."
        )
    return num_values
