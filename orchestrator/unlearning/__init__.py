"""Unlearning methods. Every module here is loaded on import: a new method is one function in one of them."""

from orchestrator.registry import load_modules
from orchestrator.unlearning.base import METHODS, Stage

load_modules(__name__)

__all__ = ["METHODS", "Stage"]
