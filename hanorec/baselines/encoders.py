r"""GRU4Rec (GR-1), Caser (CA-1) and BERT4Rec (BE-1), each with the cross-entropy over all items.

Symbols, and what each offers to a training loop, as in `hanorec.baselines.sequential`. Sources:
Hidasi et al. 2016, arXiv 1511.06939; Tang and Wang 2018, arXiv 1809.07426; Sun et al. 2019,
arXiv 1904.06690. Where later codes differ from these papers, a class says whose form it has.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.errors import InputError
from hanorec.baselines.attention import EPS, INITIAL_STD, Encoder, dropout, item_table
from hanorec.baselines.sequential import last, lengths, newest, scattered, step_ce, steps
from hanorec.ranking.sampler import NegativeSampler


class GRU4Rec(nn.Module):
    """A recurrent network over all items that it is given, as in RecBole: without gate biases.

    Args:
        d: width of the items. hidden: width of h. dropout: of the items.
    """

    def __init__(self, n_items: int, d: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.n_items, self.p = n_items, dropout
        self.items = item_table(n_items, d)  # M
        self.gru = nn.GRU(d, hidden, bias=False, batch_first=True)
        self.map = nn.Linear(hidden, d)  # W, b

    def encode(self, sequences: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """F: (B, T) -> (B, T, d), after each step."""
        x = dropout(self.items(sequences), self.p, generator)  # (B, T, d)
        # GR-1: h_t = \operatorname{GRU}(h_{t-1}, M[s_t]), \; h_0 = 0, \quad F_t = W h_t + b
        return self.map(self.gru(x)[0])

    def state(self, users: Tensor, sequences: Tensor) -> Tensor:
        """(B,), (B, T) -> (B, d)."""
        return last(self.encode(sequences), sequences, self.n_items)

    def item_rows(self) -> Tensor:
        """M: (N, d)."""
        return self.items.weight[: self.n_items]

    def loss(
        self, users: Tensor, sequences: Tensor, sampler: NegativeSampler,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Every step of the training items of each user: (B,), (B, T) -> ()."""
        inputs, targets = steps(sequences, self.n_items)
        real = targets != self.n_items  # (B, T - 1)
        return step_ce(self.encode(inputs, generator)[real], self.item_rows(), targets[real])


class Caser(nn.Module):
    """Convolutions over the last L items, and a vector of each user.

    As in RecBole: cross-entropy of the next item alone, short windows padded on the right.

    Args:
        n_h: filters of each height 1 .. L, across the whole width. n_v: filters over the L steps,
            each coordinate alone. dropout: of what the filters give.
    """

    def __init__(
        self, n_items: int, n_users: int, length: int, d: int, n_h: int, n_v: int, dropout: float
    ) -> None:
        super().__init__()
        self.n_items, self.length, self.p = n_items, length, dropout
        self.items = item_table(n_items, d)  # M
        self.users = nn.Embedding(n_users, d)  # P
        nn.init.normal_(self.users.weight, std=INITIAL_STD)
        self.across = nn.ModuleList([nn.Conv1d(d, n_h, h) for h in range(1, length + 1)])
        self.down = nn.Linear(length, n_v)
        self.map_filters = nn.Linear(length * n_h + n_v * d, d)  # W, b
        self.map_state = nn.Linear(2 * d, d)  # W', b'

    def windows(self, sequences: Tensor) -> Tensor:
        """The last L items at each step, padded on the right: (B, T) -> (B, T, L)."""
        step = torch.arange(sequences.shape[1], device=sequences.device)[:, None]  # (T, 1)
        first = (step - self.length + 1).clamp_min(0)
        place = first + torch.arange(self.length, device=sequences.device)  # (T, L)
        return sequences[:, place.minimum(step)].masked_fill(place > step, self.n_items)

    def encode(
        self, users: Tensor, windows: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """F: (S,), (S, L) -> (S, d)."""
        E = self.items(windows).transpose(1, 2)  # (S, d, L)
        o = [F.relu(conv(E)).amax(2) for conv in self.across]  # (S, n_h) each
        o_v = self.down(E).transpose(1, 2).flatten(1)  # (S, n_v d)
        filters = dropout(torch.cat([o_v, *o], 1), self.p, generator)
        # CA-1: z = \operatorname{relu}(W[\tilde o; o] + b), \quad F = W'[z; P_u] + b',
        #       o_{hk} = \max_t \operatorname{relu}(\langle C_{hk}, E_{t .. t+h-1}\rangle + c_{hk}),
        #       \tilde o_k = v_k^\top E + \tilde c_k
        z = F.relu(self.map_filters(filters))  # (S, d)
        return self.map_state(torch.cat([z, self.users(users)], 1))

    def state(self, users: Tensor, sequences: Tensor) -> Tensor:
        """(B,), (B, T) -> (B, d).

        Raises:
            InputError: a user who was not trained, a row without an item.
        """
        unknown = (users < 0) | (users >= len(self.users.weight))
        if unknown.any():
            raise InputError(
                f"user {int(users[unknown][0])}: expected 0 .. {len(self.users.weight) - 1}, since "
                "Caser has a vector for each user of training; leave that user out"
            )
        lengths(sequences, self.n_items, least=1)
        window = newest(sequences, self.length, self.n_items)
        missing = self.length - window.shape[1]
        return self.encode(users, F.pad(window, (0, missing), value=self.n_items))

    def item_rows(self) -> Tensor:
        """M: (N, d)."""
        return self.items.weight[: self.n_items]

    def loss(
        self, users: Tensor, sequences: Tensor, sampler: NegativeSampler,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Every window of the training items of each user: (B,), (B, T) -> ()."""
        inputs, targets = steps(sequences, self.n_items)
        real = targets != self.n_items  # (B, T - 1)
        owners = users[:, None].expand_as(targets)[real]  # (S,)
        states = self.encode(owners, self.windows(inputs)[real], generator)  # (S, d)
        return step_ce(states, self.item_rows(), targets[real])


class BERT4Rec(nn.Module):
    """Attention in both directions: what is hidden is told from all the other items.

    Args:
        length: L, the items that it reads beside the mask token of the one asked for.
        mask: the share of a training sequence that is hidden, at least one item.
    """

    def __init__(
        self, n_items: int, length: int, d: int, blocks: int, heads: int, dropout: float,
        mask: float,
    ) -> None:
        super().__init__()
        self.n_items, self.length, self.share = n_items, length, mask
        self.encoder = Encoder(
            n_items, length + 1, d, blocks, heads, dropout, "post", causal=False
        )
        self.map = nn.Linear(d, d)  # W, b
        nn.init.normal_(self.map.weight, std=INITIAL_STD)
        nn.init.zeros_(self.map.bias)
        self.norm = nn.LayerNorm(d, EPS)
        self.bias = nn.Parameter(torch.zeros(n_items))  # beta

    def encode(self, sequences: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """F: (B, T <= L + 1) -> (B, T, d + 1), at each position; the last coordinate is 1."""
        x = self.encoder(sequences, generator)  # (B, T, d)
        # BE-1: F_t = \operatorname{LN}(\operatorname{gelu}(W x_t + b)), \quad
        #       r_{ti} = F_t \cdot M_i + \beta_i
        return F.pad(self.norm(F.gelu(self.map(x))), (0, 1), value=1.0)

    def state(self, users: Tensor, sequences: Tensor) -> Tensor:
        """(B,), (B, T) -> (B, d + 1), at a mask token behind the last L items."""
        items = newest(sequences, self.length, self.n_items)
        end = lengths(items, self.n_items)[:, None]  # (B, 1)
        asked = F.pad(items, (0, 1), value=self.n_items).scatter(1, end, self.n_items + 1)
        return last(self.encode(asked), asked, self.n_items)

    def item_rows(self) -> Tensor:
        """M and the bias: (N, d + 1)."""
        M = self.encoder.items.weight[: self.n_items]
        return torch.cat([M, self.bias[:, None]], 1)

    def loss(
        self, users: Tensor, sequences: Tensor, sampler: NegativeSampler,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The hidden ones of the last L + 1 training items of each user: (B,), (B, T) -> ()."""
        sequences = newest(sequences, self.length + 1, self.n_items)
        n = lengths(sequences, self.n_items, least=2)  # (B,)
        counts = (self.share * n.double()).round().clamp_min(1)
        hidden = scattered(sequences, counts, self.n_items, generator)  # (B, T)
        inputs = sequences.masked_fill(hidden, self.n_items + 1)
        return step_ce(self.encode(inputs, generator)[hidden], self.item_rows(), sequences[hidden])
