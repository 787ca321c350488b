"""What travels with a submitted command: the project's code and the user's files, as one archive below Ray's limit."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.registry import InputError

PROJECT = Path(__file__).parent.parent
LIMIT = 100 * 2**20  # bytes from which on a dashboard refuses an archive
EXCLUDED = [".git", ".venv", "venv", "**/__pycache__", "runs", "tests", "analysis/*.png", "*.parquet", "*.egg-info"]
GIVEN = "given"  # the folder of the user's files inside the archive
_CHUNK = 2**20


@dataclass(frozen=True)
class Parcel:
    """A command whose files are named as the job will find them, and those files: place in the archive -> file here."""

    words: tuple[str, ...]
    files: dict[str, Path]

    def write(self, archive: Path) -> int:
        """Write the files as a zip file, small ones first; its size. InputError where Ray would refuse it."""
        sizes = {place: file.stat().st_size for place, file in self.files.items()}
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as whole:
            for place in sorted(sizes, key=lambda place: (sizes[place], place)):
                entry = zipfile.ZipInfo(place)  # of no date: equal files make an equal archive, which travels once
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                with open(self.files[place], "rb") as source, whole.open(entry, "w", force_zip64=True) as sink:
                    while chunk := source.read(_CHUNK):
                        sink.write(chunk)
                        if archive.stat().st_size >= LIMIT:
                            raise InputError(_too_large(sizes))
        if archive.stat().st_size >= LIMIT:
            raise InputError(_too_large(sizes))
        return archive.stat().st_size


def _too_large(sizes: dict[str, int]) -> str:
    largest = sorted(sizes, key=lambda place: -sizes[place])[:3]
    named = ", ".join(f"{place} ({sizes[place] / 2**20:.0f} MiB)" for place in largest)
    return (
        f"what would travel with the job is {LIMIT / 2**20:.0f} MiB or more when compressed, and Ray takes less; the "
        f"largest files: {named}. List what the job does not need in a .rayignore in {PROJECT}, and put data where "
        "the nodes read it"
    )


def pack(words: Sequence[str], project_files: Iterable[Path]) -> Parcel:
    """The project's files, and the user's modules from wherever they are.

    Raises InputError for a file that the command names and that would not be there.
    """
    files = {str(path.relative_to(PROJECT)): path for path in project_files}
    renamed = []
    for before, word in zip(["", *words[:-1]], words, strict=True):
        place, colon, function = word.rpartition(":")
        if word.startswith("--plugin="):
            word = f"--plugin={_module(word.partition('=')[2], files)}"
        elif before == "--plugin":
            word = _module(word, files)
        elif place.endswith(".py") and function.isidentifier():
            word = _module(place, files) + colon + function
        elif word.endswith(".py") and Path(word).expanduser().is_file():  # a recipe whose function is not named
            word = _module(word, files)
        else:
            _check_files(word, files)
        renamed.append(word)
    return Parcel(tuple(renamed), files)


def _module(name: str, files: dict[str, Path]) -> str:
    """What the job calls a module of the user's; its file joins those that travel, where it is not among them."""
    if not name.endswith(".py"):
        _check_module(name, files)
        return name
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"module file {name!r} cannot be read; give the path of a Python file")
    inside = _place(path)
    if inside in files:
        return inside
    place = f"{GIVEN}/{path.name}"
    if files.setdefault(place, path.absolute()) != path.absolute():
        raise InputError(f"two module files are named {path.name}: {files[place]} and {path}; rename one of the two")
    return place


def _check_module(name: str, files: dict[str, Path]) -> None:
    """Refuse a module that is found in a folder of this machine which does not travel."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    origin = Path(found.origin) if found and found.origin and found.has_location else None
    if origin and _place(origin) not in files and "site-packages" not in origin.parts:
        raise InputError(
            f"module {name} is {origin} of this machine, which the job will not find; give its file by path, "
            "or install it on all nodes"
        )


def _place(path: Path) -> str:
    """The place of a file of the project in the archive; empty for any other."""
    path = path.absolute()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else ""


def _check_files(word: str, files: dict[str, Path]) -> None:
    """Refuse a relative path to a file of this machine, in a word or after its `=`, that the job will not find."""
    for value in word.rpartition("=")[2].split(","):
        path = Path(value)
        if not re.search(r"[./]", value) or path.is_absolute() or not path.is_file():
            continue
        if Path.cwd() != PROJECT or _place(path) not in files:
            raise InputError(
                f"{word!r} names a file of this machine, which the job will not find; put it where all nodes see it "
                "and give its absolute path"
            )
