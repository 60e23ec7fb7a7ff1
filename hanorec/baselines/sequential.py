r"""SASRec (SAS-1), and the losses of a sequence model (SAS-2, SAS-3).

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

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.errors import InputError
from hanorec.ranking.sampler import NegativeSampler

INITIAL_STD = 0.02  # RecBole's, of all tables, and of all matrices of an `Encoder`
EPS = 1e-8  # of a layer norm: the authors'

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


def lengths(sequences: Tensor, n_items: int) -> Tensor:
    """(B,) how many items each row has before its padding; the mask token counts."""
    return (sequences != n_items).sum(1)


def newest(sequences: Tensor, most: int, n_items: int) -> Tensor:
    """Each row's last `most` items: (B, T) -> (B, min(T, most)), padded on the right as before."""
    if sequences.shape[1] <= most:
        return sequences
    first = (lengths(sequences, n_items) - most).clamp_min(0)  # (B,)
    return sequences.gather(1, first[:, None] + torch.arange(most, device=sequences.device))


def steps(sequences: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets: s_1 .. s_(n-1) and s_2 .. s_n, (B, T) -> (B, T - 1) each.

    Raises:
        InputError: a row of fewer than two items, named.
    """
    short = lengths(sequences, n_items) < 2  # (B,)
    if short.any():
        raise InputError(
            f"training sequence {int(short.nonzero()[0])} of a batch: fewer than 2 items, expected "
            "an input and a target; leave that user out of training"
        )
    targets = sequences[:, 1:]
    return sequences[:, :-1].masked_fill(targets == n_items, n_items), targets


def last(states: Tensor, sequences: Tensor, n_items: int) -> Tensor:
    """The state after each row's last item: (B, T, d), (B, T) -> (B, d).

    Raises:
        InputError: a row without an item, named.
    """
    n = lengths(sequences, n_items)  # (B,)
    if (n == 0).any():
        raise InputError(
            f"sequence {int((n == 0).nonzero()[0])} of a batch: no item, expected at least one "
            "before the target; leave that example out"
        )
    return states[torch.arange(len(n), device=n.device), n - 1]


# ---- parts ----


def item_table(n_items: int, d: int) -> nn.Embedding:
    """(N + 2, d): items, padding, which stays 0, and the mask token."""
    table = nn.Embedding(n_items + 2, d, padding_idx=n_items)
    nn.init.normal_(table.weight, std=INITIAL_STD)
    with torch.no_grad():
        table.weight[n_items] = 0
    return table


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Entries zeroed with probability p, the others over 1 - p; x itself without a generator."""
    if generator is None or p == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator) / (1 - p)


class Block(nn.Module):
    """Self-attention, then two linear maps on each position alone.

    Args:
        norm: "pre", the paper's: norms before the parts, relu, width d inside, no map behind the
            heads. "post", BERT's and RecBole's: norms behind the sums, GELU, width 4 d inside.
    """

    def __init__(self, d: int, heads: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.heads, self.p, self.pre = heads, dropout, norm == "pre"
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out = nn.Identity() if self.pre else nn.Linear(d, d)
        inner = d if self.pre else 4 * d
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d, EPS), nn.LayerNorm(d, EPS)])

    def forward(self, x: Tensor, allowed: Tensor, generator: torch.Generator | None) -> Tensor:
        """x (B, T, d) -> (B, T, d). allowed: bool, broadcast to (B, heads, T, T): who sees whom."""
        attention = partial(self.attention, allowed=allowed, generator=generator)
        for g, norm in zip((attention, self.feed_forward), self.norms, strict=True):
            if self.pre:
                # SAS-1: x \leftarrow x + \operatorname{Drop}(g(\operatorname{LN}(x))), \quad
                #        g = \operatorname{softmax}(Q K^\top / \sqrt{d_h})\, V,
                #        \text{ then } g = W_2 \operatorname{relu}(W_1 x + b_1) + b_2
                x = x + dropout(g(norm(x)), self.p, generator)
            else:
                x = norm(x + dropout(g(x), self.p, generator))
        return x

    def attention(self, x: Tensor, allowed: Tensor, generator: torch.Generator | None) -> Tensor:
        """x (B, T, d) -> (B, T, d), d_h = d / heads."""
        parts = [f(x).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v)]
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, heads, T, d_h) each
        s = q @ k.transpose(2, 3) / q.shape[3] ** 0.5  # (B, heads, T, T)
        a = s.masked_fill(~allowed, -torch.inf).softmax(3)
        return self.out((dropout(a, self.p, generator) @ v).transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d), each position alone."""
        act = F.relu if self.pre else F.gelu
        return self.down(act(self.up(x)))


class Encoder(nn.Module):
    """Items and positions, then `Block`s: what SASRec and BERT4Rec share.

    Args:
        causal: a position sees itself and those before it; else all but padding.
    Raises:
        InputError: heads that do not divide d.
    """

    def __init__(
        self, n_items: int, length: int, d: int, blocks: int, heads: int, dropout: float,
        norm: str, causal: bool,
    ) -> None:
        super().__init__()
        if d % heads:
            raise InputError(f"{heads} heads of a width of {d} in all: expected a divisor of it")
        self.n_items, self.p, self.pre, self.causal = n_items, dropout, norm == "pre", causal
        self.items = item_table(n_items, d)  # M
        self.positions = nn.Parameter(torch.randn(length, d) * INITIAL_STD)  # P
        self.blocks = nn.ModuleList([Block(d, heads, dropout, norm) for _ in range(blocks)])
        self.norm = nn.LayerNorm(d, EPS)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)

    def forward(self, sequences: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, T <= L) -> (B, T, d). Position t is counted from the row's first item."""
        x = self.items(sequences)  # (B, T, d)
        # E_t = \sqrt{d} M[s_t] + P[t]; post-norm has no \sqrt{d}, and its norm here.
        x = (x * x.shape[2] ** 0.5 if self.pre else x) + self.positions[: x.shape[1]]
        x = dropout(x if self.pre else self.norm(x), self.p, generator)
        if self.causal:
            step = torch.arange(x.shape[1], device=x.device)
            allowed = step <= step[:, None]  # (T, T)
        else:
            allowed = (sequences != self.n_items)[:, None, None, :]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, allowed, generator)
        return self.norm(x) if self.pre else x


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
