"""``python -m vlmfix``."""

from __future__ import annotations

from vlmfix.cli import main

if __name__ == "__main__":
    main()
