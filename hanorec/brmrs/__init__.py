"""BR-MRS: `losses` (BR-2 .. BR-6), `graph`, and `model`, which puts them together."""

from hanorec.brmrs.losses import bpr_loss, chns_loss, hard_negatives, synergy_loss

__all__ = ["bpr_loss", "chns_loss", "hard_negatives", "synergy_loss"]
