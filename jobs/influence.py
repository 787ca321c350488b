"""`unlearn influence`: which training examples change the models' answers on which test examples."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from jobs.progress import console
from jobs.session import Options, open_session
from orchestrator import campaigns, results
from orchestrator.campaigns import InfluenceSummary
from orchestrator.data import Dataset
from orchestrator.influence_pairs import Agreement
from orchestrator.registry import InputError
from orchestrator.specs import InfluenceSpec
from orchestrator.store import Store

_SHOWN = 15


@dataclass(frozen=True)
class Bounds:
    """Which pairs are kept; a `memorization` of -1 looks at every training example."""

    threshold: float
    memorization: float


def run(options: Options, bounds: Bounds) -> None:
    """Find, store and print the pairs of a campaign whose models are all there."""
    session = open_session(options)
    counts = session.plan.campaign_counts()
    if counts["missing"]:
        raise InputError(
            f"influence is estimated from the {session.study.campaign.models} subset models of the campaign, of which "
            f"{counts['missing']} are missing; `unlearn memorize {options.recipe}` with the same options trains them"
        )
    scores = session.study.scores_spec(session.dataset.fingerprint).model_copy(update={"estimator": "correctness"})
    spec = InfluenceSpec(
        scores=scores,
        threshold=bounds.threshold,
        memorization=None if bounds.memorization <= -1 else bounds.memorization,
    )
    summary = campaigns.influence(session.store, spec, session.dataset)
    console.print(_said(summary), highlight=False)
    if summary.num_pairs:
        Console(width=max(console.width, 100)).print(_strongest(session.store, summary, session.dataset))


def _said(summary: InfluenceSummary) -> str:
    of = "training examples"
    if summary.memorization is not None:
        of += f" with a memorization score of at least {summary.memorization:g}"
    text = (
        f"influence {summary.influence_key[:8]} from {summary.models} models: {summary.num_pairs} pairs of at least "
        f"{summary.threshold:g} among {summary.num_examples} {of}, on {summary.num_test} test examples; "
        f"{summary.num_above_zero} of their intervals are above zero"
    )
    if summary.first_half is None or summary.second_half is None or summary.both_halves is None:
        return text + "; too few models for halves"
    halves = Agreement(summary.first_half, summary.second_half, summary.both_halves)
    text += f"; half of the models finds {halves.first}, the other {halves.second}, both {halves.both}"
    return text + ("" if halves.jaccard is None else f" (Jaccard {halves.jaccard:.2f})")


def _strongest(store: Store, summary: InfluenceSummary, dataset: Dataset) -> Table:
    pairs = results.get_table(store, f"influence/{summary.influence_key}.parquet").slice(0, _SHOWN).to_pylist()
    columns = ("train", "label", "memorization", "test", "label", "influence", "95 % interval")
    table = Table(title=f"the {len(pairs)} strongest pairs", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "label" else "right")
    for pair in pairs:
        table.add_row(
            str(pair["train_index"]),
            dataset.class_names[pair["train_label"]],
            f"{pair['memorization']:.2f}",
            str(pair["test_index"]),
            dataset.class_names[pair["test_label"]],
            f"{pair['influence']:.3f} ± {pair['standard_error']:.3f}",
            f"{pair['low']:.2f} to {pair['high']:.2f}",
        )
    return table
