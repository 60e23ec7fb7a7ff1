"""A trained ranking by itself, as it lies on disk: what retrieves candidates."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hanorec.base.distributed import all_reduce
from hanorec.base.errors import InputError
from hanorec.base.files import read_object
from hanorec.ranking.full_ranking import Seen, own_blocks


@dataclass
class Retriever:
    """The trained ranking by itself: names, fused embeddings, and what is masked."""

    users: tuple[str, ...]
    items: tuple[str, ...]
    user: Tensor  # (U, d_f)
    item: Tensor  # (I, d_f)
    seen: Seen

    def top_n(self, rows: Tensor, n: int) -> Tensor:
        """The n best items of each user that are not among the training pairs, best first: rows (b,) int64 -> item rows (b, n).

        Several processes divide the users; each returns all.
        """
        least = len(self.items) - int(self.seen.degree[rows].max()) if len(rows) else n
        if not 1 <= n <= least:
            raise InputError(f"{n} items to retrieve: one of these users has {least} items without a training pair; choose 1 .. that many")
        found = rows.new_zeros(len(rows), n)
        for part in own_blocks(torch.arange(len(rows)), len(self.items)):
            s = self.user[rows[part]] @ self.item.T  # (b, I)
            s[self.seen.of(rows[part])] = -torch.inf
            found[part] = s.argsort(dim=1, descending=True, stable=True)[:, :n]  # stable: of equal scores the smaller row first
        all_reduce([found])  # each row is zero in all processes but one
        return found


def load_retriever(folder: str | Path) -> Retriever:
    """What train_brmrs.py left in its finished OUT folder, on the CPU."""
    folder = Path(folder)
    names, path = read_object(folder / "names.json"), folder / "embeddings.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected the --out folder of a finished train_brmrs.py; check the path") from None
    return Retriever(tuple(names["users"]), tuple(names["items"]), found["user"], found["item"], Seen(*found["train"], len(names["users"])))
