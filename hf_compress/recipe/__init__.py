"""Recipes: one YAML file from a model and data to a smaller model, with every stage resumable."""

from typing import Any

__all__ = ["Recipe", "RunResult", "load_recipe", "run_recipe"]

_HOMES = {"Recipe": "schema", "load_recipe": "schema", "RunResult": "run", "run_recipe": "run"}


def __getattr__(name: str) -> Any:  # pydantic, torch and transformers are imported when a recipe is first used
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
