"""Content-addressed storage on pyarrow.fs: a local folder or s3://bucket/prefix. Atomic puts; knows no contents."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from orchestrator.registry import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """Objects under one root. `endpoint` is the URL of an S3 other than Amazon's (default: AWS_ENDPOINT_URL)."""

    root: str
    endpoint: str | None = None

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def __post_init__(self) -> None:
        if not self.root.strip() or (not self.is_local and not re.match("s3://[^/]", self.root)):
            raise InputError(f"storage is {self.root!r}; allowed: a local folder or s3://bucket/prefix")
        if self.is_local:
            object.__setattr__(self, "root", str(Path(self.root).expanduser().absolute()))

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        if self.is_local:
            return fs.LocalFileSystem()
        url = self.endpoint or os.environ.get("AWS_ENDPOINT_URL")
        if url is None:
            return fs.S3FileSystem(allow_delayed_open=True)
        scheme, _, host = url.rpartition("://")
        return fs.S3FileSystem(endpoint_override=host, scheme=scheme or "https", allow_delayed_open=True)

    def path(self, name: str) -> str:
        """The path of an object as the filesystem knows it."""
        return f"{self.root.removeprefix('s3://').rstrip('/')}/{name}"

    def url(self, name: str) -> str:
        """The place of an object, for people."""
        return f"{self.root.rstrip('/')}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write an object whole or not at all; what was there before is replaced."""
        if self.is_local:
            _put_local(Path(self.path(name)), content)
            return
        memoryview(content)  # closing a stream completes the object: what is not bytes must fail before it is opened
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(content)

    def get(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError where it is not there."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            content: bytes = stream.read()
        return content

    def start_of(self, name: str, length: int) -> bytes:
        """The first bytes of an object, fewer where it is shorter; FileNotFoundError where it is not there."""
        with self.filesystem.open_input_file(self.path(name)) as file:
            content: bytes = file.read(length)
        return content

    def size(self, name: str) -> int:
        """The bytes of an object; FileNotFoundError where it is not there."""
        size = self.filesystem.get_file_info(self.path(name)).size
        if size is None:
            raise FileNotFoundError(self.path(name))
        return int(size)

    def exists(self, name: str) -> bool:
        is_file: bool = self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File
        return is_file

    def names(self, folder: str) -> list[str]:
        """The sorted names of all objects below a folder, each relative to it; none where there is no folder."""
        base = self.path(folder).rstrip("/")
        infos = self.filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        found = [i.path[len(base) + 1 :] for i in infos if i.type == fs.FileType.File]
        return sorted(name for name in found if not name.endswith(TEMPORARY))

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def probe(self) -> None:
        """Write, read back and remove a marker; raises InputError where the root cannot be used."""
        name, content = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(16)

        def round_trip() -> bytes:
            self.exists(name)  # where nobody answers, a question gives up sooner than an upload
            self.put(name, content)
            try:
                return self.get(name)
            finally:
                self.delete(name)

        if self._checked(round_trip) != content:
            raise InputError(f"storage root {self.root!r} gives back other bytes than were written")

    def _checked(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, ValueError) as error:
            reason = str(error).split("\n", 1)[0]
            raise InputError(
                f"storage root {self.root!r} cannot be written and read: {reason}; "
                "allowed: a folder that you may write to, or s3://bucket/prefix of an existing bucket "
                "with credentials set"
            ) from None


TEMPORARY = ".partial"


def _put_local(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
