"""A benchmark's questions, answered by several decoders."""
