"""Arrays as stored safetensors objects, whole or in part, and whether they are as they were written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from orchestrator.registry import InputError
from orchestrator.store import Store


def pack(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Arrays by name as one safetensors object, which carries a checksum of each."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, {**(metadata or {}), **checksums(contiguous)})


CHECKSUMS = "crc32"  # the metadata that hold them


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The metadata by which readers tell that bytes have changed."""
    return {CHECKSUMS: json.dumps({name: _checksum(array) for name, array in sorted(arrays.items())})}


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _verify(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Raise ValueError where an array is not what its checksum says; objects from before they were kept have none."""
    known = json.loads(metadata.get(CHECKSUMS, "{}"))
    for name, array in arrays.items():
        if name in known and _checksum(array) != known[name]:
            raise ValueError(f"the bytes of {name} do not match their checksum")


def unpack(store: Store, name: str) -> dict[str, np.ndarray]:
    """The arrays of a stored safetensors object; raises InputError where it is damaged."""
    content = store.get(name)
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        _verify(arrays, header.get("__metadata__", {}))
    except (SafetensorError, ValueError) as error:
        raise damaged(store, name, error) from None
    return arrays


_USUAL_HEADER = 8192  # bytes that hold most headers: one read
_TYPES = {
    "BOOL": bool,
    "U8": np.uint8,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
}


def unpack_some(store: Store, name: str, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The wanted arrays of a stored safetensors object, and its metadata; the rest of it is not read.

    Raises InputError where it is damaged. Arrays are read-only.
    """
    try:
        header, start = _header(store, name)
        metadata = header.pop("__metadata__", {})
        chosen = {part: place for part, place in header.items() if wanted(part)}
        places = [place["data_offsets"] for place in chosen.values()]
        ranges = [(start + first, last - first) for first, last in places]
        arrays = {
            part: np.frombuffer(content, _TYPES[place["dtype"]]).reshape(place["shape"])
            for (part, place), content in zip(chosen.items(), store.ranges_of(name, ranges), strict=True)
        }
        _verify(arrays, metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(store, name, error) from None
    return arrays, metadata


def _header(store: Store, name: str) -> tuple[dict[str, Any], int]:
    """The header of a stored safetensors object, and where its arrays begin."""
    content = store.start_of(name, _USUAL_HEADER)
    end = 8 + int.from_bytes(content[:8], "little")
    if end > len(content):
        if end > store.size(name):
            raise ValueError(f"a header of {end} bytes in an object that is shorter")
        content = store.start_of(name, end)
    header: dict[str, Any] = json.loads(content[8:end])
    return header, end


def damaged(store: Store, name: str, error: Exception) -> InputError:
    """What to say of a stored object that cannot be read."""
    return InputError(
        f"{store.url(name)} is damaged ({error}); remove it and run the same command again, which computes it anew"
    )


def check_whole(store: Store, names: Sequence[str]) -> None:
    """Raise InputError for the first stored safetensors object that is cut or has no header; reads headers alone."""
    for name in not_whole(store, names):
        raise InputError(
            f"{store.url(name)} is damaged; remove it and run the same command again, which computes it anew"
        )


def not_whole(store: Store, names: Sequence[str]) -> list[str]:
    """Those of stored safetensors objects that are cut or have no header; reads headers alone."""
    groups = [names[start : start + 32] for start in range(0, len(names), 32)]  # to hand one over costs time, too
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda group: [name for name in group if not _is_whole(store, name)], groups)
        return list(chain.from_iterable(found))


def _is_whole(store: Store, name: str) -> bool:
    try:
        size, (header, begin) = store.size(name), _header(store, name)
        end = max((part["data_offsets"][1] for part in header.values() if "data_offsets" in part), default=0)
    except (FileNotFoundError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return isinstance(end, int) and size == begin + end


def metadata_of(store: Store, name: str) -> dict[str, str]:
    """What the header of a stored safetensors object says beside its arrays."""
    found: dict[str, str] = _header(store, name)[0].get("__metadata__", {})
    return found
