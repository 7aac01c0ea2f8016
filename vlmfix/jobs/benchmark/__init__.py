"""Lets several decoders answer a benchmark's questions."""
