"""The options that commands share, as the command line knows them; light, for the command line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

Recipe = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe (`unlearn list recipes`), or your own as FILE.py:FUNCTION.", show_default=False
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override a field, an option or an axis (axis=v1,v2); repeatable."
    ),
]
Storage = Annotated[
    str,
    typer.Option(help="Root of all results: a folder or s3://bucket/prefix.", envvar="UNLEARN_STORAGE"),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        help="MLflow to write to; `none` for none. Default: MLFLOW_TRACKING_URI, else SQLite in a local root."
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Workers, one core each. Default: as many as there are cores.")
]


def _share(text: str | float) -> float | Literal["auto"]:
    """A share of a GPU, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise typer.BadParameter(f"got {text!r}; allowed: a number from 0 up, or auto")
    return share


GpusPerWorker = Annotated[
    Any,
    typer.Option(
        parser=_share,
        metavar="SHARE|auto",
        help="Share of a GPU that each worker takes; `auto`: by a short measurement; 0 trains on CPUs.",
    ),
]
Compile = Annotated[
    Literal["off", "on", "auto"],
    typer.Option(help="Compile subset models; `auto`: on GPUs, for campaigns of 100 or more. Results say which."),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to use. Default: RAY_ADDRESS, else a Ray of our own on this machine.")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="FILE.py|MODULE", help="Module with functions of your own to register; repeatable."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run and what is cached, and stop.")]

DEFAULT_STORAGE = "./runs"
