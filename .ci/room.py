"""Holds every other room to the rule of vlmfix/upstream: nothing of another package's inside is named there.

Refused in vlmfix/, but for vlmfix/upstream/: a module below transformers' top level, an attribute with an underscore
that the file does not define itself, and the names under which transformers hands values inward. In tests/: the names.
Prints each place, and ends with 1 when there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTED = {"os._exit"}
"""What begins with an underscore and is no inside."""
OUTWARD = {"input_ids", "attention_mask", "position_ids", "pixel_values"}
"""Inputs that processors return and models document under these names."""


def main() -> int:
    """Checks all files."""
    sys.path.insert(0, str(ROOT))
    from vlmfix.upstream.names import KNOWN
    from vlmfix.upstream.positions import OFFSETS

    inward = {name for names in KNOWN.values() for name in names if "_" in name} - OUTWARD - {"hidden_states"}
    inward |= {OFFSETS, "next_sequence_length", "is_first_iteration"}
    found: list[str] = []
    for path in sorted((ROOT / "vlmfix").rglob("*.py")):
        if path.parent.name != "upstream":
            tree = ast.parse(path.read_text())
            found += [
                f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in (*_inside(tree), *_named(tree, inward))
            ]
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.parent.name != "upstream":
            text = path.read_text()
            if any(name in text for name in inward):
                found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in _named(ast.parse(text), inward)]
    print("\n".join(found) or "Nothing of another package's inside is named outside vlmfix/upstream.")
    return int(bool(found))


def _inside(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports below the top level, and underscores of what the file did not define."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        for module in _imported(node):
            if module.startswith("transformers.") or "._" in module:
                yield node.lineno, f"imports {module}"
        if (
            isinstance(node, ast.Attribute)
            and _private(node.attr)
            and not _is_self(node.value)
            and ast.unparse(node) not in DOCUMENTED
            and node.attr not in own
        ):
            yield node.lineno, f"touches {ast.unparse(node)}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "setattr", "hasattr", "delattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and _private(str(name.value)):
                yield node.lineno, f"touches {name.value} by {ast.unparse(node.func)}"


def _named(tree: ast.Module, inward: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in inward:
            yield node.lineno, f"spells {node.value}"
        elif isinstance(node, ast.keyword) and node.arg in inward:
            yield node.value.lineno, f"hands over {node.arg}"
        elif isinstance(node, ast.Attribute) and node.attr in inward:
            yield node.lineno, f"reads {node.attr}"
        elif isinstance(node, ast.arg) and node.arg in inward:
            yield node.lineno, f"takes {node.arg}"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module]
    if isinstance(node, ast.Call) and _last_name(node.func) == "import_module" and node.args:
        argument = node.args[0]
        return [str(argument.value)] if isinstance(argument, ast.Constant) else []
    return []


def _last_name(called: ast.expr) -> str:
    """Of what is called, the name behind the last dot."""
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in {"self", "cls"}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.startswith("_vlmfix")


if __name__ == "__main__":
    sys.exit(main())
