"""The stages of a long command as it comes to them, and how long all will still take."""

import time
from collections.abc import Mapping

from hanorec.base.progress import duration


class Clock:
    """Stages of known shares.

    Args:
        shares: stage -> how long it takes beside the others.
        rounds: how many times all stages come.
    """

    def __init__(self, shares: Mapping[str, float], rounds: int = 1) -> None:
        self.shares, self.count = shares, rounds * len(shares)
        self.whole, self.begun = rounds * sum(shares.values()), 0.0
        self.number, self.start = 0, time.monotonic()

    def begin(self, stage: str) -> None:
        """Say that this stage begins; the stages before it are done."""
        self.number += 1
        spent, left = time.monotonic() - self.start, ""
        if self.begun > 0:
            seconds = spent * (self.whole - self.begun) / self.begun
            left = f" (about {duration(seconds)} left for all)"
        print(f"\nstage {self.number} of {self.count}: {stage}{left}", flush=True)
        self.begun += self.shares[stage]
