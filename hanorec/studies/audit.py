"""The figures of docs/audit.md: one part an entry, each prints a Markdown table.

    python -m hanorec.studies.audit run RUN
        Posterland: SFT, HaNoRec and w/o NoDO (5 epochs), the binary task; about 12 CPU minutes
    python -m hanorec.studies.audit PART [RUN]
        lambda, rewards, crossover, nodo, checkpointing, forgotten, auc read RUN; eta, micro,
        chance, synergy do not
    python -m hanorec.studies.audit titles DATA ...
        DATA: folders in the native layout
    python -m hanorec.studies.audit length MODEL DATA [ADAPTER] [--users N]

Deterministic, seed 2025. The noise curve is `hanorec.studies.noise_curve`. All else is the
package's own code on the package's own generated data.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from hanorec.base import command
from hanorec.base.flags import Parser

# Part -> how many paths it needs.
PATHS = {
    "run": 1, "lambda": 1, "eta": 0, "micro": 0, "rewards": 1, "crossover": 1, "nodo": 1,
    "checkpointing": 1, "forgotten": 1, "auc": 1, "chance": 0, "synergy": 0, "titles": 1,
    "length": 2,
}


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.studies.audit")
    result.add_argument("part", choices=PATHS)
    result.add_argument("paths", nargs="*", help="RUN; DATA ...; or MODEL DATA [ADAPTER]")
    result.add_argument(
        "--users", type=int, default=100, help="of length: the last so many of the test split")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import torch

from hanorec.studies.audit_candidates import part_chance, part_titles
from hanorec.studies.audit_checkpointing import part_checkpointing, part_forgotten
from hanorec.studies.audit_noise import part_nodo, part_rewards
from hanorec.studies.audit_run import SEED, make_run
from hanorec.studies.audit_scores import part_auc, part_length, part_synergy
from hanorec.studies.audit_weights import part_crossover, part_eta, part_lambda, part_micro

PARTS: dict[str, Callable[[Path], None]] = {
    "run": make_run,
    "lambda": part_lambda,
    "eta": part_eta,
    "micro": part_micro,
    "rewards": part_rewards,
    "crossover": part_crossover,
    "nodo": part_nodo,
    "checkpointing": part_checkpointing,
    "forgotten": part_forgotten,
    "auc": part_auc,
    "chance": part_chance,
    "synergy": part_synergy,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if len(args.paths) < (needed := PATHS[args.part]):
        parser().error(
            f"{args.part} {' '.join(args.paths)}: expected at least {needed} path(s); see --help")

    torch.manual_seed(SEED)
    if args.part == "titles":
        part_titles(args.paths)
    elif args.part == "length":
        model, data, *adapter = args.paths
        part_length(model, data, args.users, adapter[0] if adapter else None)
    else:
        PARTS[args.part](Path(args.paths[0] if args.paths else "."))
