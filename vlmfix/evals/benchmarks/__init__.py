"""The benchmarks, one per file, and the words that they count."""
