"""How far long work has come: a bar in a terminal, and a line every so many steps in a file."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from tqdm import tqdm


class Progress:
    """Steps of a known number, of which `done` were done before.

    Of several processes the first one speaks alone. `brief` work, where it is short, needs no line
    of its own: its bar vanishes at the end.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, unit: str = "step", brief: bool = False
    ) -> None:
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.every = min(max(total // 10, 10), 50)
        self.bar = tqdm(
            desc=name, total=total, initial=done, unit=unit, leave=not brief, disable=None
        )
        self.lines = self.bar.disable and os.environ.get("RANK", "0") == "0"
        self.start, self.before = time.monotonic(), done

    def step(self, count: int = 1, **shown: Any) -> None:
        """`count` steps more are done; shown: numbers to stand beside."""
        texts = {}
        for name, value in shown.items():
            texts[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
        if texts:
            self.bar.set_postfix(texts, refresh=False)
        self.bar.update(count)

        self.done += count
        told = self.done // self.every > (self.done - count) // self.every
        if self.lines and told and self.done < self.total:
            spent = time.monotonic() - self.start
            left = spent * (self.total - self.done) / (self.done - self.before)
            parts = [f"{self.name}: {self.unit} {self.done} of {self.total}"]
            parts += [f"{name} {text}" for name, text in texts.items()]
            print(", ".join([*parts, f"{duration(left)} left"]), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def progress(things: Sequence[Any], name: str) -> Iterator[Any]:
    """The things one by one, while what is done with them is shown as brief work."""
    bar = Progress(name, len(things), brief=True)
    for thing in things:
        yield thing
        bar.step()
    bar.close()


def duration(seconds: float) -> str:
    """Hours, minutes and whole seconds."""
    return str(timedelta(seconds=round(seconds)))
