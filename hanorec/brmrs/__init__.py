"""BR-MRS: `losses` (BR-2 .. BR-6), `graph`, and `model`, which makes the scores they compare."""

from hanorec.brmrs.losses import bpr_loss, chns_loss, hard_negatives, synergy_loss, total_loss

__all__ = ["bpr_loss", "chns_loss", "hard_negatives", "synergy_loss", "total_loss"]
