"""The comparison, `hanorec.studies.baselines`, as a command: python -m hanorec.baselines."""

from hanorec.base import command
from hanorec.studies.baselines import main

if __name__ == "__main__":
    command.run(main)
