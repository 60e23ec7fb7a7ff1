r"""CL4SRec: SASRec, and a contrast between two views of each sequence (CL-1 .. CL-5).

    s_1 .. s_n -> two of crop, mask, reorder -> z, z'      alike for one user, unlike between users

Views are made of the training inputs: the target of the last step is in none. Sequences and symbols
as in `hanorec.baselines.sequential`; n = items of a row, 2B views of B users. Source: Xie et al.
2020, arXiv 2010.14395.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hanorec.baselines.sequential import SASRec, last, lengths, newest, scattered, steps
from hanorec.ranking.sampler import NegativeSampler


def crop(sequences: Tensor, eta: float, n_items: int, generator: torch.Generator) -> Tensor:
    r"""A run of each row at a uniform start, at least one item: (B, T) -> (B, T)."""
    n = lengths(sequences, n_items, least=1)  # (B,)
    place = torch.arange(sequences.shape[1], device=n.device)  # (T,)
    # CL-1: \text{view} = s_c, \dots, s_{c+m-1}, \quad m = \max(1, \lfloor \eta n \rfloor), \quad
    #       c \sim \operatorname{Uniform}\{1, \dots, n - m + 1\}
    m = floor_share(n, eta).clamp_min(1)
    source = uniform(n - m + 1, generator)[:, None] + place  # (B, T)
    view = sequences.gather(1, source.clamp_max(len(place) - 1))
    return view.masked_fill(place >= m[:, None], n_items)


def mask(sequences: Tensor, gamma: float, n_items: int, generator: torch.Generator) -> Tensor:
    r"""Distinct items of each row become the mask token: (B, T) -> (B, T)."""
    # CL-2: \text{view}_t = [mask] \text{ if } t \in T, \text{ else } s_t, \quad
    #       T \subseteq \{1, \dots, n\}, \; |T| = \lfloor \gamma n \rfloor
    counts = floor_share(lengths(sequences, n_items), gamma)
    return sequences.masked_fill(scattered(sequences, counts, n_items, generator), n_items + 1)


def reorder(sequences: Tensor, beta: float, n_items: int, generator: torch.Generator) -> Tensor:
    r"""A run of each row at a uniform start is shuffled: (B, T) -> (B, T)."""
    n = lengths(sequences, n_items)  # (B,)
    place = torch.arange(sequences.shape[1], device=n.device)  # (T,)
    # CL-3: \text{view} = s_1, \dots, s_{c-1}, s_{\pi(c)}, \dots, s_{\pi(c+m-1)}, s_{c+m}, \dots,
    #       \quad m = \lfloor \beta n \rfloor, \; \pi \text{ uniform}
    m = floor_share(n, beta)
    start = uniform(n - m + 1, generator)[:, None]
    before, after = place < start, place >= start + m[:, None]  # (B, T) each
    key = torch.rand(sequences.shape, generator=generator, device=n.device)  # in 0 .. 1
    order = key.masked_fill(before, -1).masked_fill(after, 2).argsort(dim=1, stable=True)
    return sequences.gather(1, order)


def floor_share(n: Tensor, share: float) -> Tensor:
    r"""floor(share n): (B,) -> (B,) int64. As decimals: 0.29 of 100 is 29, not 28."""
    return (share * n.double() + 1e-9).long()


def uniform(n: Tensor, generator: torch.Generator) -> Tensor:
    """A whole number of 0 .. n - 1 each: (B,) -> (B,)."""
    return torch.randint(2**62, n.shape, generator=generator, device=n.device) % n


def contrastive_loss(one: Tensor, other: Tensor, tau: float) -> Tensor:
    r"""Each view is to find its partner among all other views.

    one, other: (B, d) states of the two views of each user -> (), the mean over the 2B views;
    ln(2B - 1) where all inner products are equal.
    """
    z = torch.cat([one, other])  # (2B, d)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    partner = torch.arange(len(z), device=z.device).roll(len(one))  # (2B,): k -> p(k)
    # CL-4: L_k = -\log \frac{\exp(z_k \cdot z_{p(k)} / \tau)}
    #                        {\sum_{m \ne k} \exp(z_k \cdot z_m / \tau)}
    return F.cross_entropy((z @ z.T / tau).masked_fill(itself, -torch.inf), partner)


class CL4SRec(SASRec):
    """SASRec whose loss has a second term.

    Args:
        sasrec: what `SASRec` takes.
        lam: weight of the contrast; 0 is SASRec bit for bit. tau: its temperature.
        eta, gamma, beta: shares of a sequence that is kept by a crop, masked, reordered.
    """

    def __init__(
        self, *sasrec: Any, lam: float, tau: float, eta: float, gamma: float, beta: float
    ) -> None:
        super().__init__(*sasrec)
        self.lam, self.tau = lam, tau
        self.operators = ((crop, eta), (mask, gamma), (reorder, beta))

    def views(self, inputs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views of each row, by two different operators drawn for it: (B, T) -> (B, T) each."""
        made = [f(inputs, share, self.n_items, generator) for f, share in self.operators]
        rows = torch.arange(len(inputs), device=inputs.device)
        drawn = torch.rand(len(rows), 3, generator=generator, device=rows.device).argsort(1)
        made = torch.stack(made)  # (3, B, T)
        return made[drawn[:, 0], rows], made[drawn[:, 1], rows]

    def loss(
        self, users: Tensor, sequences: Tensor, sampler: NegativeSampler,
        generator: torch.Generator,
    ) -> Tensor:
        """(B,), (B, T) -> (). The generator ends where SASRec's loss leaves it."""
        sas = super().loss(users, sequences, sampler, generator)
        own = offspring(generator)
        inputs, _ = steps(newest(sequences, self.length + 1, self.n_items), self.n_items)
        z = [last(self.encode(v, own), v, self.n_items) for v in self.views(inputs, own)]
        # CL-5: L = L_{SAS} + \lambda L_{CL}
        return sas + self.lam * contrastive_loss(*z, self.tau)


def offspring(generator: torch.Generator) -> torch.Generator:
    """A generator that follows from the state of another one, which is left as it is.

    So there is no second state to save with a checkpoint.
    """
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    seed = torch.randint(2**62, (), generator=twin, device=twin.device)
    return twin.manual_seed(int(seed))
