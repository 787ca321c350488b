"""The HTML report of one sweep, from exported tables alone; and its figures as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from matplotlib.figure import Figure

from analysis import costs, exact, figures, influence, pairs, paper, proxies, refinement, selections, tables
from analysis.load import Tables, load
from analysis.names import name_of
from orchestrator.registry import InputError

_PAIRED = (
    *("forget set", "arm", "rate", "budget", "against", "its rate"),
    *("pairs", "difference", "95 % interval", "p", "p (Holm)"),
)
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_ENOUGH = 5  # references per forget set
_EXTRA = (
    "ToW-MIA (floor)",
    "probability distance (floor)",
    *(f"SVC {name.removeprefix('published_svc_').replace('_', ' ')} (refs)" for name in tables.ATTACKS),
    *("realised", "effective"),
)


def write(exports: Path, out: Path, sweep: str | None = None, facts: Mapping[str, str] | None = None) -> Path:
    """Write one self-contained HTML file; `sweep` is a key or its first characters (default: the sweep with most runs).

    `facts` are further lines for the head of the report. What is missing from the tables, the report says is missing.
    """
    read = load(exports)
    chosen = _choose(read, sweep)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    Path(out).write_text(
        environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            _content(read, chosen, dict(facts or {}))
        ),
        encoding="utf-8",
    )
    return Path(out)


def pictures(exports: Path, folder: Path, sweep: str | None = None) -> list[Path]:
    """Write the figures as PNG files."""
    read = load(exports)
    chosen = _choose(read, sweep)
    made: dict[str, Figure] = {}
    for number, key in enumerate(_scores_of(read)):
        made[f"scores-{number}"] = figures.score_distribution(read, key)
        made[f"gallery-{number}"] = figures.gallery(read, key)
    if chosen is not None:
        runs = tables.of_sweep(read, chosen)
        if (runs["arm"] != "reference").any():
            made["forget-quality"] = figures.forget_quality(read, chosen)
        if _has_layers(read, runs):
            made["layers"] = figures.layer_shares(read, chosen)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in made.items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def _choose(read: Tables, prefix: str | None) -> str | None:
    sizes = read.members.group_by("sweep", "recipe").len().sort("len", "sweep", descending=True)
    matching = [key for key in sizes["sweep"].to_list() if key.startswith(prefix or "")]
    if prefix and len(matching) != 1:
        known = ", ".join(f"{line['sweep'][:8]} ({line['recipe']})" for line in sizes.iter_rows(named=True))
        raise InputError(f"sweep {prefix!r} matches {len(matching)} sweeps; allowed: {known or 'none is stored'}")
    return matching[0] if matching else None


def _scores_of(read: Tables) -> list[str]:
    found: list[str] = read.memorization["scores_key"].unique(maintain_order=True).to_list()
    return found


def _content(read: Tables, sweep: str | None, facts: dict[str, str]) -> dict[str, Any]:
    runs = pl.DataFrame() if sweep is None else tables.of_sweep(read, sweep)
    has_runs = sweep is not None and len(runs.filter(pl.col("arm") != "reference")) > 0
    recipe = read.members.filter(pl.col("sweep") == sweep)["recipe"][0] if sweep else "no sweep"
    content: dict[str, Any] = {
        "title": f"Unlearning report: {recipe}",
        "facts": _facts(runs, sweep) | facts,
        "others": _others(read, sweep),
        "notes": [*_cautions(read, sweep), *_notes(runs)],
        "pairing": _pairing(runs),
        "scores": [_scores(read, key) for key in _scores_of(read)],
        "influence": _influence(read),
        "proxies": _proxies(read),
        "exact": [_exact(part) for part in exact.comparisons(read)],
        "refinement": None,
        "costs": _costs(read),
        "failed": _failed(tables.failed_of_sweep(read, sweep)) if sweep else [],
        "export_id": read.export_id,
        "quality": None,
        "tables": [],
        "paired": None,
        "selections": None,
        "paper": [],
        "published": [],
        "ablations": [],
        "layers": None,
    }
    if has_runs and sweep is not None:
        content["quality"] = _embed(figures.forget_quality(read, sweep))
        content["tables"] = _tables(tables.comparison_table(read, sweep))
        content["selections"] = _selections(read, sweep)
        content["paired"] = _paired(pairs.paired_table(read, sweep))
        shaped = paper.paper_table(read, sweep)
        content["paper"] = _paper(shaped)
        content["published"] = paper.comparisons_with_paper(shaped, recipe)
        content["refinement"] = _refinement(read, sweep)
        content["ablations"] = _ablations(paper.ablation_table(read, sweep))
        if _has_layers(read, runs):
            content["layers"] = _embed(figures.layer_shares(read, sweep))
    return content


def _facts(runs: pl.DataFrame, sweep: str | None) -> dict[str, str]:
    if sweep is None or not len(runs):
        return {}
    return {
        "sweep": sweep[:8],
        "data": ", ".join(runs["data"].unique().to_list()),
        "model": ", ".join(runs["model"].unique().to_list()),
        "runs": f"{len(runs)}, of them {len(runs.filter(pl.col('arm') == 'reference'))} references",
        "training": f"{runs['seconds'].sum():.0f} s in these runs, whichever command trained them",
        "code": ", ".join(commit[:12] for commit in runs["git_commit"].drop_nulls().unique().to_list()) or "unknown",
        "numerics": "; ".join(runs["numerics"].drop_nulls().unique().to_list()),
    }


def _has_layers(read: Tables, runs: pl.DataFrame) -> bool:
    return len(read.layers.join(runs.drop_nulls("budget"), on="key", how="semi")) > 0


def _others(read: Tables, sweep: str | None) -> str:
    sizes = read.members.filter(pl.col("sweep") != (sweep or "")).group_by("sweep", "recipe").len().sort("sweep")
    return ", ".join(f"{key[:8]} ({recipe}, {count} runs)" for key, recipe, count in sizes.rows())


def _cautions(read: Tables, sweep: str | None) -> list[str]:
    """What the results of a sweep depend on beside its settings."""
    if sweep is None:
        return []
    said = read.sweeps.filter(pl.col("sweep") == sweep)["caution"].drop_nulls().to_list()
    members = read.members.filter(pl.col("sweep") == sweep)["key"].unique()
    stopped = read.runs.filter(pl.col("key").is_in(members.to_list()) & (pl.col("status") == "stopped"))
    early = f" {len(stopped)} of {len(members)} runs were stopped early." if len(stopped) else ""
    return [f"Not independent of the number of workers: {text}.{early}" for text in said]


def _notes(runs: pl.DataFrame) -> list[str]:
    if not len(runs):
        return []
    notes = []
    if runs["numerics"].drop_nulls().n_unique() > 1:
        notes.append(
            "These runs were computed under several numerics; equality of repeated runs holds within one only."
        )
    if runs["variant"].count():
        notes.append("Arms that ran with several options have one line per combination, named in parentheses.")
    counts = runs.group_by("forget_set", "forget_draw", maintain_order=True).agg((pl.col("arm") == "reference").sum())
    few = [f"{name} (draw {draw}: {count})" for name, draw, count in counts.rows() if count < 2]
    some = [f"{name} (draw {draw}: {count})" for name, draw, count in counts.rows() if 2 <= count < _ENOUGH]
    if few:
        notes.append(
            f"Forget sets with fewer than two references: {', '.join(few)}. Without their spread there are no "
            "intervals or floors; `unlearn references` makes more."
        )
    if some:
        notes.append(f"Forget sets with fewer than the {_ENOUGH} references that are advised: {', '.join(some)}.")
    return notes


def _pairing(runs: pl.DataFrame) -> str:
    """How seeds vary, as far as the runs show it."""
    if not len(runs):
        return ""
    draws = runs.group_by("forget_set").agg(pl.col("forget_draw").n_unique())["forget_draw"].to_numpy().max()
    text = "Every forget set is drawn once, so all numbers are conditional on the draw."
    if draws > 1:
        text = (
            "Forget sets are drawn several times: each draw is held against references of its own, and means and "
            "intervals are over the draws."
        )
    both = runs.drop_nulls("original_seed")
    if len(both) and (both["original_seed"] == both["seed"]).all():
        text += " Seeds vary the original and the unlearning together."
    return text


def _failed(runs: pl.DataFrame) -> list[str]:
    named = (
        ("forget_set", "{}"),
        ("learning_rate", "rate {:g}"),
        ("budget", "budget {:g}"),
        ("seed", "seed {}"),
        ("status", "{}"),
    )
    return [
        ", ".join([name_of(line), *(text.format(line[name]) for name, text in named if line[name] is not None)])
        for line in runs.iter_rows(named=True)
    ]


def _scores(read: Tables, key: str) -> dict[str, Any]:
    return {
        "key": key,
        "summary": tables.score_summary(read, key),
        "distribution": _embed(figures.score_distribution(read, key)),
        "gallery": _embed(figures.gallery(read, key)),
        "num_shown": len(read.examples.filter(pl.col("scores_key") == key)),
    }


def _costs(read: Tables) -> dict[str, Any] | None:
    found = costs.totals(read.costs.to_dicts(), read.workers.to_dicts())
    if not found:
        return None
    workers = [
        {"name": costs.worker_title(total), "lines": costs.worker_lines(total)}
        for total in found
        if total.is_campaign and total.workers
    ]
    return {
        "columns": costs.HEADINGS,
        "lines": [costs.cells(total) for total in found],
        "worker_columns": costs.WORKER_HEADINGS,
        "workers": workers,
    }


def _influence(read: Tables) -> list[dict[str, Any]]:
    return [
        part | {"gallery": None if part["gallery"] is None else _embed(part["gallery"])}
        for part in influence.sections(read)
    ]


def _proxies(read: Tables) -> list[dict[str, Any]]:
    frame = proxies.proxy_table(read)
    parts = []
    for (scores,), group in frame.group_by("scores_key", maintain_order=True):
        lines = group.to_dicts()
        parts.append(
            {
                "scores": f"{str(scores)[:8]} ({lines[0]['models']} models, of {lines[0]['estimator']})",
                "columns": proxies.HEADINGS,
                "lines": [proxies.cells(line) for line in lines],
                "figure": _embed(proxies.figure(lines)),
            }
        )
    return parts


def _refinement(read: Tables, sweep: str) -> dict[str, Any] | None:
    frame = refinement.refinement_table(read, sweep)
    if not len(frame):
        return None
    contrasts = refinement.contrasts(read, sweep)
    return {
        "columns": refinement.HEADINGS,
        "parts": [
            {"name": name, "lines": [refinement.cells(line) for line in group.to_dicts()]}
            for (name,), group in frame.group_by("forget_set", maintain_order=True)
        ],
        "contrast_columns": refinement.CONTRAST_HEADINGS,
        "contrasts": [refinement.contrast_cells(line) for line in contrasts.to_dicts()],
    }


def _exact(part: exact.Comparison) -> dict[str, Any]:
    return {
        "title": part.title,
        "remarks": exact.remarks(part),
        "figure": None if part.scores_key is None else _embed(exact.figure(part)),
        "columns": exact.headings(part),
        "lines": [exact.cells(line) for line in part.lines],
    }


def _selections(read: Tables, sweep: str) -> dict[str, Any] | None:
    found = selections.choices(read, sweep)
    if not found:
        return None
    runs = tables.of_sweep(read, sweep)
    return {
        "criterion": found[0].criterion,
        "formula": found[0].formula,
        "remarks": selections.summary(found),
        "untuned": ", ".join(selections.untuned(read, sweep)),
        "columns": selections.HEADINGS,
        "parts": [
            {
                "name": name,
                "caption": selections.caption(part, runs),
                "lines": [selections.cells(choice) for choice in part],
            }
            for name, part in selections.by_set(found).items()
        ],
    }


def _tables(frame: pl.DataFrame) -> list[dict[str, Any]]:
    parts = []
    for (name,), group in frame.group_by("forget_set", maintain_order=True):
        lines = group.to_dicts()
        has_parts = lines[0]["forget_flipped_difference"] is not None
        columns = [*tables.HEADINGS, *(("forget, flipped", "forget, unflipped") if has_parts else ()), *_EXTRA]
        caption = (
            f"{tables.counted(group['num_runs'].to_list())} runs a line against {tables.references_said(lines)}; "
            f"reference minus run in points with 95 % interval, {tables.conditional_on(lines)}."
        )
        cells = [
            [
                *tables.cells(line, tables.ends),
                *((tables.ends(line, f"forget_{part}") for part in ("flipped", "unflipped")) if has_parts else ()),
                *(
                    f"{tables.number(line[name], 3)} ({tables.number(line[f'{name}_floor'], 3)})"
                    for name in ("tug_of_war_membership", "probability_distance")
                ),
                *(
                    f"{tables.number(line[attack])} ({tables.number(line[f'{attack}_references'])})"
                    for attack in tables.ATTACKS
                ),
                *(tables.number(line[f"{kind}_budget"], 4) for kind in ("realised", "effective")),
            ]
            for line in lines
        ]
        parts.append({"name": name, "caption": caption, "columns": columns, "lines": cells})
    return parts


def _paired(frame: pl.DataFrame) -> dict[str, Any] | None:
    if not len(frame):
        return None
    lines = [
        [
            line["forget_set"],
            name_of(line | {"arm": "del"}),
            _short(line["learning_rate"]),
            _short(line["budget"]),
            name_of({"arm": line["against"], "variant": line["against_variant"], "is_tuned": line["against_is_tuned"]}),
            _short(line["against_rate"]),
            line["num_pairs"],
            f"{line['difference']:+.3f}",
            "-" if line["low"] is None else f"{line['low']:+.3f} to {line['high']:+.3f}",
            tables.number(line["p"], 3),
            tables.number(line["p_holm"], 3),
        ]
        for line in frame.to_dicts()
    ]
    tested = frame["p_holm"].drop_nulls()
    return {"columns": _PAIRED, "lines": lines, "tested": len(tested), "significant": int((tested < 0.05).sum())}


def _paper(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "caption": paper.paper_caption(group.to_dicts()),
            "columns": paper.PAPER_HEADINGS,
            "lines": [paper.paper_cells(line) for line in group.to_dicts()],
        }
        for (name,), group in frame.group_by("forget_set", maintain_order=True)
    ]


def _ablations(frame: pl.DataFrame) -> list[dict[str, Any]]:
    parts = []
    for (name,), group in frame.group_by("forget_set", maintain_order=True):
        columns, lines = paper.ablation_grid(group)
        parts.append({"name": name, "floor": tables.number(group["floor"][0], 3), "columns": columns, "lines": lines})
    return parts


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _embed(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
