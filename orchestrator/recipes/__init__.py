"""Recipes: named experiments as functions that return a study; one derives from another. Modules load on import."""

from orchestrator.recipes.base import RECIPES
from orchestrator.registry import load_modules

load_modules(__name__)

__all__ = ["RECIPES"]
