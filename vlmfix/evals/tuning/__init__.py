"""The search for a decoder's parameters."""

from vlmfix.extras import need

need("tune")
