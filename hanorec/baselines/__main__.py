"""The command of the comparison, which is `hanorec.studies.baselines`.

    python -m hanorec.baselines --data DATA --out OUT [--model MODEL]
"""

from hanorec.base import command
from hanorec.studies.baselines_flags import parser

if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

from hanorec.studies.baselines import main

__all__ = ["main"]
