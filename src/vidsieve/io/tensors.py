"""Safetensors files with a header of plain values, and a checksum of all that they hold."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidsieve.errors import OutputError
from vidsieve.io.bounded import LONGEST_FILE
from vidsieve.io.files import writing

_HEADER, _CHECKSUM = "vidsieve", "checksum"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], keep: Path | None = None) -> str:
    """Write tensors and a header atomically, the same bytes for the same values; return their checksum.

    Parameters
    ----------
    header : mapping
        Values for JSON.
    keep : Path, optional
        As `writing` takes it.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"cannot write {path}: it is not a file; remove it")
    # Copies: slices of one tensor share memory, which would be stored as a whole for each.
    whole = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    digest = checksum(whole, header)
    with writing(path, keep) as temporary:
        save_file(whole, temporary, metadata={_HEADER: json.dumps({**header, _CHECKSUM: digest})})
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Return the header of a file, its tensors and their checksum; older files may have no header or checksum.

    Raises
    ------
    ValueError
        If the file cannot be read, or not all is as it was written; the text says why.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError("there is no such file")
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > LONGEST_FILE:
                raise ValueError(f"its header has more than {LONGEST_FILE:,} bytes")
        with safe_open(path, "pt") as file:
            header: Any = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(header, dict):
        raise ValueError("its header is damaged")
    expected = header.pop(_CHECKSUM, "")
    if expected and expected != checksum(tensors, header):
        raise ValueError("it was damaged after it was written: its checksum differs")
    return header, tensors, expected


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a header, and of names, types, shapes and values of tensors on the CPU."""
    digest = zlib.crc32(json.dumps(dict(header)).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), digest)
        digest = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, digest)
    return f"{digest:08x}"
