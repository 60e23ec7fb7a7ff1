r"""SASRec, and the losses of a sequence model (SAS-2, SAS-3).

    items s_1 .. s_T -> F_1 .. F_T            (F_t: what the user may want after step t)
    score of item i after step t = F_t . M[i]

What every sequence model of the baselines offers, and a training loop relies on:

    state(users, sequences) -> (B, d')        of the next item, from each row's last item
    item_rows() -> (N, d')                    score of item i = state . item_rows[i]
    loss(users, sequences, sampler, generator) -> ()

Rows 0 .. N - 1 of a table are the catalogue's, row N is padding, row N + 1 the mask token; neither
of these two is ever a class of a softmax. Sequences are (B, T) int64 and padded on the right, so a
causal mask alone keeps items from seeing padding. All that is random, dropout too, comes from the
generator that is handed over; without one there is no dropout.

N = items, B = users, T = steps, L = the most steps that a model sees, S = real steps of a batch,
d = width. Source: Kang and McAuley 2018, arXiv 1808.09781.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.errors import InputError
from hanorec.baselines.attention import Encoder
from hanorec.ranking.sampler import NegativeSampler

# ---- losses ----


def step_bce(positive: Tensor, negative: Tensor) -> Tensor:
    r"""Each next item against one that the user has no training pair with.

    positive, negative: (S,) scores after the same steps -> (), a mean over steps; 2 ln 2 where all
    scores are 0.
    """
    # SAS-2: L = -\frac{1}{S}\sum_t [\log\sigma(r_{t, s_{t+1}}) + \log(1 - \sigma(r_{t, j_t}))]
    return -(F.logsigmoid(positive) + F.logsigmoid(-negative)).mean()


def step_ce(states: Tensor, item_rows: Tensor, targets: Tensor) -> Tensor:
    r"""Each next item against all items.

    states (S, d), item_rows (N, d), targets (S,) in 0 .. N - 1 -> (), a mean over steps; ln N where
    all scores are equal.
    """
    # SAS-3: L = -\frac{1}{S}\sum_t \log\operatorname{softmax}_i(r_{t i})[s_{t+1}],
    #        r_{t i} = F_t \cdot M_i, \; i < N
    return F.cross_entropy(states @ item_rows.T, targets)


# ---- sequences ----


def lengths(sequences: Tensor, n_items: int, least: int = 0) -> Tensor:
    """(B,) how many items each row has before its padding; the mask token counts.

    Raises:
        InputError: a row of fewer than `least`, named.
    """
    n = (sequences != n_items).sum(1)
    if least and (n < least).any():
        row = int((n < least).nonzero()[0])
        raise InputError(
            f"sequence {row} of a batch: {int(n[row])} items, expected at least {least}; leave "
            "that user out"
        )
    return n


def newest(sequences: Tensor, most: int, n_items: int) -> Tensor:
    """Each row's last `most` items: (B, T) -> (B, min(T, most)), padded on the right as before."""
    if sequences.shape[1] <= most:
        return sequences
    first = (lengths(sequences, n_items) - most).clamp_min(0)  # (B,)
    return sequences.gather(1, first[:, None] + torch.arange(most, device=sequences.device))


def steps(sequences: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """Inputs s_1 .. s_(n-1) and targets s_2 .. s_n of each row: (B, T) -> (B, T - 1) each.

    Raises:
        InputError: a row of fewer than two items.
    """
    lengths(sequences, n_items, least=2)
    targets = sequences[:, 1:]
    return sequences[:, :-1].masked_fill(targets == n_items, n_items), targets


def scattered(
    sequences: Tensor, counts: Tensor, n_items: int, generator: torch.Generator | None
) -> Tensor:
    """`counts` (B,) distinct items of each row, drawn uniformly: (B, T) -> (B, T) bool."""
    key = torch.rand(sequences.shape, generator=generator, device=sequences.device)
    key = key.masked_fill(sequences == n_items, 2)  # padding comes last
    return key.argsort(1).argsort(1) < counts[:, None]


def last(states: Tensor, sequences: Tensor, n_items: int) -> Tensor:
    """The state after each row's last item: (B, T, d), (B, T) -> (B, d).

    Raises:
        InputError: a row without an item.
    """
    n = lengths(sequences, n_items, least=1)  # (B,)
    return states[torch.arange(len(n), device=n.device), n - 1]


# ---- SASRec ----


class SASRec(nn.Module):
    """Causal attention over the last L items.

    Args:
        norm: as in `Block`. loss: "ce" (SAS-3) or "bce" (SAS-2).
    """

    def __init__(
        self, n_items: int, length: int, d: int, blocks: int, heads: int, dropout: float,
        norm: str = "pre", loss: str = "ce",
    ) -> None:
        super().__init__()
        self.n_items, self.length, self.bce = n_items, length, loss == "bce"
        self.encoder = Encoder(n_items, length, d, blocks, heads, dropout, norm, causal=True)

    def encode(self, sequences: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """F: (B, T <= L) -> (B, T, d), after each step."""
        return self.encoder(sequences, generator)

    def state(self, users: Tensor, sequences: Tensor) -> Tensor:
        """(B,), (B, T) -> (B, d), of the last L items."""
        sequences = newest(sequences, self.length, self.n_items)
        return last(self.encode(sequences), sequences, self.n_items)

    def item_rows(self) -> Tensor:
        """M: (N, d)."""
        return self.encoder.items.weight[: self.n_items]

    def loss(
        self, users: Tensor, sequences: Tensor, sampler: NegativeSampler,
        generator: torch.Generator,
    ) -> Tensor:
        """Every step of the last L + 1 training items of each user: (B,), (B, T) -> ()."""
        inputs, targets = steps(newest(sequences, self.length + 1, self.n_items), self.n_items)
        real = targets != self.n_items  # (B, T)
        states, positives = self.encode(inputs, generator)[real], targets[real]  # (S, d), (S,)
        if not self.bce:
            return step_ce(states, self.item_rows(), positives)
        negatives = sampler.draw(users, targets.shape[1], generator)[real]  # (S,)
        M = self.item_rows()
        return step_bce((states * M[positives]).sum(1), (states * M[negatives]).sum(1))
