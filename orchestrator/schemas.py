"""The exported tables: their columns, and the version that all files of an export carry."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from orchestrator import costs

SCHEMA_VERSION = "5"

_S, _I, _F = pa.string(), pa.int64(), pa.float64()
_LIST = pa.list_(pa.field("element", _F))
TABLES: Mapping[str, pa.Schema] = {
    name: pa.schema([pa.field(column, kind, nullable) for column, kind, nullable in columns])
    for name, columns in {
        "runs": [
            ("key", _S, False),
            ("status", _S, False),
            ("data", _S, False),
            ("model", _S, False),
            ("forget_set", _S, False),
            ("forget_draw", _I, False),
            ("method", _S, False),
            ("strategy", _S, True),
            ("granularity", _S, True),
            ("budget", _F, True),
            ("realised_budget", _F, True),
            ("effective_budget", _F, True),
            ("learning_rate", _F, True),
            ("seed", _I, False),
            ("original_seed", _I, True),
            ("options", _S, False),
            ("memorization_key", _S, True),
            ("steps_ratio", _F, True),
            ("seconds", _F, True),
            ("localization_seconds", _F, True),
            ("moved", _I, True),
            ("distance", _F, True),
            ("numerics", _S, True),
            ("git_commit", _S, True),
        ],
        "members": [(column, _S, False) for column in ("sweep", "recipe", "arm", "key", "role")],
        "sweeps": [("sweep", _S, False), ("recipe", _S, False), ("caution", _S, True)],
        "selections": [
            *((name, _S, False) for name in ("sweep", "selection", "arm", "forget_set")),
            *((name, _S, True) for name in ("strategy", "granularity")),
            ("budget", _F, True),
            ("setting", _S, False),
            ("candidate", _I, False),
            ("options", _S, False),
            ("chosen", pa.bool_(), False),
            *((name, _S, False) for name in ("criterion", "criterion_version", "formula", "seeds", "tuning_set")),
            ("tuning_draw", _I, False),
            ("used_references", pa.bool_(), False),
            ("num_references", _I, False),
            ("n", _I, False),
            ("mean", _F, True),
            ("standard_error", _F, True),
            ("values", _LIST, False),
            ("by_reference", _LIST, True),
            ("error", _S, True),
            ("confirmed_n", _I, True),
            ("confirmed_mean", _F, True),
            ("confirmed_standard_error", _F, True),
            ("confirmed_values", _LIST, True),
            ("confirmed_by_reference", _LIST, True),
        ],
        "metrics": [("key", _S, False), ("metric", _S, False), ("split", _S, False), ("value", _F, False)],
        "comparisons": [
            ("key", _S, False),
            ("reference_key", _S, False),
            ("metric", _S, False),
            ("split", _S, False),
            ("value", _F, False),
        ],
        "layers": [
            ("key", _S, False),
            ("parameter", _S, False),
            ("entries", _I, False),
            ("reset", _I, False),
            ("trainable", _I, False),
            ("moved", _I, True),
        ],
        "memorization": [
            ("scores_key", _S, False),
            ("index", _I, False),
            ("label", _I, False),
            ("true_label", _I, False),
            ("in_mean", _F, False),
            ("out_mean", _F, False),
            ("score", _F, False),
            ("standard_error", _F, False),
            ("low", _F, False),
            ("high", _F, False),
            ("num_in", _I, False),
            ("num_out", _I, False),
        ],
        "campaigns": [
            ("scores_key", _S, False),
            ("setting", _S, True),
            ("estimator", _S, False),
            ("models", _I, False),
            ("in_accuracy", _F, False),
            ("hard_in_accuracy", _F, True),
            ("test_accuracy", _F, False),
            ("split_half", _F, True),
            ("top_overlap", _F, True),
            ("standard_error", _F, True),
            ("model_seconds", _F, False),
            ("stopping", _S, True),
        ],
        "proxies": [
            ("proxies_key", _S, False),
            ("setting", _S, False),
            ("proxy", _S, False),
            ("index", _I, False),
            ("value", _F, False),
            ("seconds", _F, False),
            ("training_seconds", _F, False),
        ],
        "examples": [
            ("scores_key", _S, False),
            ("index", _I, False),
            ("label_name", _S, False),
            ("true_label_name", _S, False),
            ("png", pa.binary(), False),
        ],
        "exact": [
            *((name, _S, False) for name in ("exact_key", "setting", "selection", "estimator")),
            *((name, _I, False) for name in ("index", "label", "true_label", "num_in", "num_out")),
            *((name, _F, False) for name in ("in_mean", "out_mean", "score", "standard_error", "low", "high")),
            *((name, _F, False) for name in ("accuracy", "test_accuracy", "model_seconds")),
        ],
        "influence": [
            ("influence_key", _S, False),
            ("scores_key", _S, False),
            ("models", _I, False),
            ("threshold", _F, False),
            ("memorization", _F, True),
            ("num_examples", _I, False),
            ("num_pairs", _I, False),
            ("num_test", _I, False),
            ("num_above_zero", _I, False),
            ("first_half", _I, True),
            ("second_half", _I, True),
            ("both_halves", _I, True),
        ],
        "influence_pairs": [
            ("influence_key", _S, False),
            ("train_index", _I, False),
            ("test_index", _I, False),
            ("train_label", _I, False),
            ("test_label", _I, False),
            ("influence", _F, False),
            ("standard_error", _F, False),
            ("low", _F, False),
            ("high", _F, False),
            ("memorization", _F, False),
        ],
        "influence_examples": [
            ("influence_key", _S, False),
            ("split", _S, False),
            ("index", _I, False),
            ("label_name", _S, False),
            ("true_label_name", _S, False),
            ("png", pa.binary(), False),
        ],
        "series": [("key", _S, False), ("metric", _S, False), ("epoch", _I, False), ("value", _F, False)],
        **costs.COLUMNS,
    }.items()
}
"""The exported tables: name -> schema. `runs` has one line per run, references and identity included; a run
that was tried and has no row has the status of its last try. `memorization` and `examples` have one line per scores
key and example. `members`: a run whose role is `tuning` is one that settings were chosen by, and enters no
reported number. `selections` has one line per candidate of a cell whose options were chosen; `confirmed_` is the
criterion on the runs that report the choice. `values` are the criterion by run (by draw where there are several),
`by_reference` against each reference, null where references add no scatter of their own; standard errors cover both.
`influence` has one line per estimate of influence, `influence_pairs` one per pair of examples that it found."""
