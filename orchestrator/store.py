"""Content-addressed storage on pyarrow.fs: a local folder or s3://bucket/prefix. Atomic puts; knows no contents."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from orchestrator.registry import InputError

T = TypeVar("T")

TEMPORARY = ".partial"
_ABANDONED_SECONDS = 3600.0  # without a byte more: whoever wrote it was killed
_LONGEST_PAUSE = 15.0  # between two tries of an S3

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_BUSY = re.compile(
    r"AWS Error (SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|REQUEST_TIMEOUT)|HTTP status (429|5\d\d)"
)
_AWAY = re.compile(f"{_BUSY.pattern}|AWS Error NETWORK_CONNECTION")


class StorageError(RuntimeError):
    """The storage is full, may only be read, or stays away: nothing can be kept any more, so work ends."""


@dataclass(frozen=True)
class Store:
    """Objects under one root. `endpoint` is the URL of an S3 other than Amazon's (default: AWS_ENDPOINT_URL).

    An S3 that is busy or out of reach is waited for, `patience_seconds` for each action. StorageError is raised where
    that was in vain, and where a local root is full or may only be read.
    """

    root: str
    endpoint: str | None = None
    patience_seconds: float = 600.0

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    def __post_init__(self) -> None:
        if not self.root.strip() or (not self.is_local and not re.match("s3://[^/]", self.root)):
            raise InputError(f"storage is {self.root!r}; allowed: a local folder or s3://bucket/prefix")
        if not self.is_local and re.match("s3://[^/]*[:@]", self.root):
            raise InputError(
                "storage names a user or a password before its bucket; allowed: s3://bucket/prefix, with "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set in the environment"
            )
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
        memoryview(content)  # closing a stream completes the object: what is not bytes must fail before it is opened
        if self.is_local:
            self._put_local(name, content)
        else:
            self._patiently(lambda: self._put_s3(name, content))

    def _put_s3(self, name: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(content)

    def _put_local(self, name: str, content: bytes) -> None:
        try:
            _put_file(Path(self.path(name)), content)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise StorageError(
                f"storage root {self.root!r} cannot keep {name} ({len(content):,} bytes): {os.strerror(error.errno)}; "
                "make room there and give the same command again: what is finished is kept"
            ) from None

    def _patiently(self, action: Callable[[], T], passing: re.Pattern[str] = _AWAY) -> T:
        """Do it until it succeeds, fails for a reason that does not pass, or patience ends."""
        deadline, pause = time.monotonic() + self.patience_seconds, 0.5
        while True:
            try:
                return action()
            except OSError as error:
                if not passing.search(str(error)):
                    raise
                reason = str(error).split("\n", 1)[0]
            left = deadline - time.monotonic()
            if left <= 0:
                raise StorageError(
                    f"storage root {self.root!r} stayed away for {self.patience_seconds:g} s: {reason}; "
                    "give the same command again when it answers: what is finished is kept"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def get(self, name: str) -> bytes:
        """The bytes of an object; FileNotFoundError where it is not there."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                content: bytes = stream.read()
            return content

        return self._patiently(read)

    def start_of(self, name: str, length: int) -> bytes:
        """The first bytes of an object, fewer where it is shorter; FileNotFoundError where it is not there."""

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path(name)) as file:
                content: bytes = file.read(length)
            return content

        return self._patiently(read)

    def ranges_of(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of an object, each from a place and so many bytes long; FileNotFoundError where it is not there."""

        def read() -> list[bytes]:
            with self.filesystem.open_input_file(self.path(name)) as file:
                return [file.read_at(length, start) for start, length in ranges]

        return self._patiently(read)

    def size(self, name: str) -> int:
        """The bytes of an object; FileNotFoundError where it is not there."""
        size = self._patiently(lambda: self.filesystem.get_file_info(self.path(name)).size)
        if size is None:
            raise FileNotFoundError(self.path(name))
        return int(size)

    def exists(self, name: str) -> bool:
        return self._patiently(lambda: self._is_file(name))

    def _is_file(self, name: str) -> bool:
        is_file: bool = self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File
        return is_file

    def names(self, folder: str) -> list[str]:
        """The sorted names of all objects below a folder, each relative to it; none where there is no folder."""
        return [name for name in self._all_names(folder) if not name.endswith(TEMPORARY)]

    def _all_names(self, folder: str) -> list[str]:
        base = self.path(folder).rstrip("/")
        below = fs.FileSelector(base, recursive=True, allow_not_found=True)
        infos = self._patiently(lambda: self.filesystem.get_file_info(below))
        return sorted(info.path[len(base) + 1 :] for info in infos if info.type == fs.FileType.File)

    def stamps(self, folder: str) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change (ns since 1970) of all objects below a folder, sorted."""
        base = self.path(folder).rstrip("/")
        below = fs.FileSelector(base, recursive=True, allow_not_found=True)
        infos = self._patiently(lambda: self.filesystem.get_file_info(below))
        return sorted((i.path[len(base) + 1 :], i.size, i.mtime_ns or 0) for i in infos if i.type == fs.FileType.File)

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._patiently(lambda: self.filesystem.delete_file(self.path(name)))

    def sweep_up(self) -> None:
        """Remove what writers that were killed left half-written in a local root, where it would keep a disk full."""
        if not self.is_local:
            return
        for name in self._all_names(""):
            if name.endswith(TEMPORARY):
                path = Path(self.path(name))
                with contextlib.suppress(FileNotFoundError):  # another command is sweeping, or the writer ended
                    if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                        path.unlink()

    def probe(self) -> None:
        """Write, read back and remove a marker; raises InputError where the root cannot be used."""
        name, content = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(16)

        def round_trip() -> bytes:
            # where nobody answers, a question gives up sooner than an upload; who says that he is busy is waited for
            self._patiently(lambda: self._is_file(name), _BUSY)
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


@dataclass(frozen=True)
class Sketch(Store):
    """A store that is only read: what is put is kept in memory, beside what is there. For dry runs."""

    _kept: dict[str, bytes] = field(default_factory=dict, compare=False)

    def put(self, name: str, content: bytes) -> None:
        self._kept[name] = content

    def get(self, name: str) -> bytes:
        return self._kept[name] if name in self._kept else super().get(name)

    def exists(self, name: str) -> bool:
        return name in self._kept or super().exists(name)

    def delete(self, name: str) -> None:
        self._kept.pop(name, None)

    def probe(self) -> None:
        """Raise InputError where the root cannot be read, or where it is clear that it could not be written."""
        self._checked(lambda: self._patiently(lambda: self._is_file("probe"), _BUSY))
        if self.is_local:
            self._checked(lambda: _check_place(Path(self.root)))

    def sweep_up(self) -> None:
        """Nothing: that is for commands that write."""


def _check_place(root: Path) -> None:
    """Raise OSError where a folder cannot be made, or written to."""
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{str(nearest)!r} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{str(nearest)!r} may not be written to")


def _put_file(path: Path, content: bytes) -> None:
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
