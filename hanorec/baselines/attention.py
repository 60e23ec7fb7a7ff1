r"""What sequence models are made of: a table of items, dropout, and SASRec's attention (SAS-1).

Symbols as in `hanorec.baselines.sequential`. Source: Kang and McAuley 2018, arXiv 1808.09781.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.errors import InputError

INITIAL_STD = 0.02  # RecBole's, of all tables, and of all matrices of an `Encoder`
EPS = 1e-8  # of a layer norm: the authors'


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
            raise InputError(
                f"{heads} heads of a width of {d} in all: expected a divisor of it; change --heads "
                "or --dim"
            )
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
