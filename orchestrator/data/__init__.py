"""Data sets, and the containers that the core passes around. Every module here is loaded on import."""

from orchestrator.data.base import (
    DATASETS,
    SPLITS,
    Augment,
    Dataset,
    Examples,
    Outputs,
    SplitOutputs,
    Splits,
    flip_labels,
    noisy,
    stratified_split,
)
from orchestrator.registry import load_modules

load_modules(__name__)

__all__ = [
    "DATASETS",
    "SPLITS",
    "Augment",
    "Dataset",
    "Examples",
    "Outputs",
    "SplitOutputs",
    "Splits",
    "flip_labels",
    "noisy",
    "stratified_split",
]
