"""What a training step of BR-MRS costs, and how much of it is drawing negatives and scoring the
pool.

    python benchmarks/brmrs.py [--rounds N]

CPU time of one thread, medians, on random interactions of two sizes; an epoch is the steps over all
training pairs, without the validation ranking, which stands in its own column. A step is propagate,
draw, score, loss, backward and Adam, at the default settings; "draw" is BR-1, "pool" is scoring the
pool under both modalities and BR-2. The sampler is also compared with Python loops that draw again
until the item is new to the user: one as lean as such a loop gets, and one that draws as the MMRec
toolbox does, with random.sample.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from measure import interleaved
from torch import Tensor

from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.brmrs.model import BRMRS, rivals
from hanorec.ranking.full_ranking import Seen, evaluate
from hanorec.ranking.sampler import NegativeSampler
from hanorec.studies.scripts import script

# users, items, training pairs; the first is MovieLens-100K's
SIZES = [(943, 1682, 80_000), (50_000, 60_000, 500_000)]
# a small sentence encoder's and a small image encoder's; wider features make a step slower, not the
# pool
WIDTHS = {"t": 384, "v": 512}
POOLS = (2, 4, 16)


def interactions(n_users: int, n_items: int, n_pairs: int) -> tuple[Tensor, Tensor]:
    """Distinct pairs, items by a power law as in real logs."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(10, n_items + 10) ** 0.7
    keys = np.array([], np.int64)
    while len(keys) < n_pairs:
        item = rng.choice(n_items, n_pairs, p=popularity / popularity.sum())
        keys = np.unique(np.concatenate([keys, rng.integers(0, n_users, n_pairs) * n_items + item]))
    keys = torch.from_numpy(rng.permutation(keys)[:n_pairs])
    return keys // n_items, keys % n_items


def reject(seen: list[set[int]], users: Tensor, n: int, draw: Callable[[], int]) -> Tensor:
    """(B,) -> (B, n): draw, look, draw again."""
    drawn = []
    for user in users.tolist():
        for _ in range(n):
            item = draw()
            while item in seen[user]:
                item = draw()
            drawn.append(item)
    return torch.tensor(drawn).view(-1, n)


def measure(n_users: int, n_items: int, n_pairs: int, rounds: int) -> list[str]:
    """A line of the table for each pool size."""
    users, items = interactions(n_users, n_items, n_pairs)
    base, lines = BrmrsConfig(), []
    model = BRMRS(
        n_users, n_items, {m: torch.randn(n_items, width) for m, width in WIDTHS.items()}, users,
        items, base,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=base.learning_rate)
    sampler, steps = NegativeSampler(users, items, n_users, n_items), -(-n_pairs // base.batch)
    step_loss = script("train_brmrs").step_loss
    u, i, everyone = users[: base.batch], items[: base.batch], list(range(n_items))
    seen: list[set[int]] = [set() for _ in range(n_users)]
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        seen[user].add(item)
    emb = model.propagate()
    # one held-out item a user
    targets = torch.stack([torch.arange(n_users), sampler.draw(torch.arange(n_users), 1)[:, 0]])
    validation = interleaved(
        {"validation": lambda: evaluate(emb, targets, Seen(users, items, n_users), targets[1])}, 1,
        "cpu",
    )["validation"]
    for n in POOLS:
        pool, config = sampler.draw(u, n), replace(base, pool=n)

        def step(config: BrmrsConfig = config) -> None:
            loss, _ = step_loss(model, u, i, sampler, config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        t = interleaved(
            {
                "step": step,
                "draw": partial(sampler.draw, u, 1 + n),
                "pool": partial(rivals, emb, u, pool, "cross"),
                "lean": partial(reject, seen, u, 1 + n, partial(random.randrange, n_items)),
                "toolbox": partial(reject, seen, u, 1 + n, lambda: random.sample(everyone, 1)[0]),
            },
            rounds, "cpu",
        )
        shares = " | ".join(
            f"{part / t['step']:.1%}" for part in (t["draw"], t["pool"], t["draw"] + t["pool"])
        )
        lines.append(
            f"{n} | {1e3 * t['step']:.1f} | {steps * t['step']:.2f} | {shares} | {validation:.2f} "
            f"| {1e3 * t['draw']:.2f} | {t['lean'] / t['draw']:.1f}x | "
            f"{t['toolbox'] / t['draw']:.1f}x"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, one CPU thread, process time; features of {WIDTHS['t']} "
        f"(text) and {WIDTHS['v']} (image) numbers, "
        f"batch {BrmrsConfig().batch}\n\nusers x items, pairs | n | step, ms | epoch, s | draw | "
        "pool | both | validation, s | sampler, ms | "
        "lean loop | toolbox's loop\n" + "---|" * 10 + "---"
    )
    for n_users, n_items, n_pairs in SIZES:
        for line in measure(n_users, n_items, n_pairs, rounds):
            print(f"{n_users:,} x {n_items:,}, {n_pairs:,} | {line}", flush=True)


if __name__ == "__main__":
    main()
