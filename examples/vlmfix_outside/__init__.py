"""Shows what adds to vlmfix from outside: a decoder, a family, a profiler and a benchmark."""
