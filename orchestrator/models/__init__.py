"""Image classifiers, initialized by a generator that the caller names. Every module here is loaded on import."""

from orchestrator.models.base import MODELS, Factory, Transformer, factory, head_names, is_transformer
from orchestrator.registry import load_modules

load_modules(__name__)

__all__ = ["MODELS", "Factory", "Transformer", "factory", "head_names", "is_transformer"]
