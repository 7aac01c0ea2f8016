"""A check over what Hypothesis draws: a few examples in the suite, always the same; rounds of chance in `make fuzz`."""

from __future__ import annotations

import os
import random
import time

from hypothesis import HealthCheck, Phase, given, seed, settings

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
"""For each check; 0 stands for the suite."""
SEED = os.environ.get("FUZZ_SEED")

COMMON = settings(
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


class Rounds:
    """What one test does, and what it tells of it.

    Args:
        item: The test.
    """

    def __init__(self, item):
        self._item = item
        self.long = MINUTES > 0

    def note(self, text):
        """A line for the end of the session."""
        self._item.user_properties.append(("fuzz", text))

    def __call__(self, check, *, suite, about="", **strategies):
        """Runs a check, which raises what is wrong.

        Args:
            check: Called with one draw of each strategy.
            suite: Examples in the suite, and in each round of `make fuzz`, which has a seed of its own.
            about: What is counted, beside the name of the test.
            **strategies: By argument of ``check``.
        """
        name = f"{self._item.name}{f' ({about})' if about else ''}"
        examples = 0

        def counted(**drawn):
            nonlocal examples
            examples += 1
            check(**drawn)

        def round_of(**how):
            return settings(COMMON, max_examples=suite, **how)(given(**strategies)(counted))

        if not self.long:
            round_of(derandomize=True)()
            self.note(f"{name}: {examples} examples")
            return
        first = number = int(SEED) if SEED else random.SystemRandom().randrange(1 << 32)
        started = time.monotonic()
        try:
            while time.monotonic() - started < 60 * MINUTES:
                seed(number)(round_of())()
                number += 1
        except BaseException as error:
            error.add_note(f"again: make fuzz FUZZ_SEED={number} ARGS='-k {self._item.originalname}'")
            raise
        finally:
            spent = time.monotonic() - started
            self.note(f"{name}: {examples} examples in {spent:.0f} s, seeds {first} to {number}")
