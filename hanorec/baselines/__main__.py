"""The command of the comparison, which is `hanorec.studies.baselines`.

    python -m hanorec.baselines --data DATA --out OUT [--model MODEL]
"""

from hanorec.base import command
from hanorec.studies.baselines import main

if __name__ == "__main__":
    command.run(main)
