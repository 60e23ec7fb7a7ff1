"""The comparison of `hanorec.studies.baselines_flags`, from its flags to its table."""

import argparse
import difflib
import shlex
from collections.abc import Sequence

from hanorec.base.errors import InputError
from hanorec.base.files import write_json, write_text
from hanorec.base.lock import lock_folder
from hanorec.base.terminal import aligned
from hanorec.baselines.rows import ALWAYS, CONTROL, ROWS, TRIALS, Baseline
from hanorec.studies.baselines_flags import STAGES, parser
from hanorec.studies.baselines_makers import MAKERS
from hanorec.studies.baselines_runs import Comparison
from hanorec.studies.baselines_scoring import load_asked, rank_popular, untrained_share
from hanorec.studies.baselines_table import summarise, table

OWN = ["--split", "--adapter", "--out", "--retriever", "--user"]  # not to be given by --test


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags, with its rows, and the flags of each stage.

    InputError for what does not go together.
    """
    args = parser().parse_args(argv)

    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    if not 1 <= args.trials <= TRIALS:
        raise InputError(
            f"--trials {args.trials}: expected 1 .. {TRIALS}, since each row has so many settings")
    args.rows = chosen_rows(args.rows, args.model)
    args.flags = {stage: shlex.split(getattr(args, stage)) for stage in STAGES}
    used = {"test", *(MAKERS[row.maker].stage for row in args.rows.values())}
    for stage in STAGES:
        if args.flags[stage] and stage not in used:
            print(f"note: --{stage}: no chosen row takes flags of {STAGES[stage]}")
    for flag in args.flags["test"]:
        if flag.partition("=")[0] in OWN:
            raise InputError(
                f"--test {args.test!r}: holds {flag}, expected flags of evaluate.py other than "
                f"{', '.join(OWN)}")
    return args


def chosen_rows(asked: str | None, model: str | None) -> dict[str, Baseline]:
    """The rows asked for, what they stand on, popularity, and with a checkpoint the control, in the
    order of `ROWS`."""
    if asked is None:
        names = [name for name, row in ROWS.items() if model or not MAKERS[row.maker].model]
        if model is None:
            print(f"note: no --model, so {len(ROWS) - len(names)} rows that need one are left out")
    else:
        names = [name.strip() for name in asked.strip("; ").split(";")]
        names = [name for name in names if name != "chance"]  # which is no recommender
    for name in names:
        if name not in ROWS:
            near = [row for row in ROWS if name.casefold() in row.casefold()][:2]
            near = near or difflib.get_close_matches(name, ROWS, n=1, cutoff=0)
            raise InputError(
                f"--rows: no row {name!r}, is {' or '.join(map(repr, near))} meant? Expected some "
                f"of {'; '.join(ROWS)}")
        if model is None and MAKERS[ROWS[name].maker].model:
            raise InputError(
                f"--rows: the row {name!r} needs a checkpoint and there is none, expected --model; "
                "give it, or leave the row out")
    wanted = {*names, ALWAYS, *([CONTROL] if model else [])}
    for name in reversed(ROWS):  # a row stands on one before it
        if name in wanted and (below := ROWS[name].below):
            wanted.add(below)
    return {name: row for name, row in ROWS.items() if name in wanted}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_command(argv)
    study = Comparison(
        args.data, args.model, args.out, args.split, args.rows, args.flags, args.trials)
    study.check_flags(args.seed)  # before the first row trains
    asked = load_asked(study.test(args.split))
    lock_folder(args.out)
    seeds = {}
    for seed in range(args.seed, args.seed + args.seeds):
        seeds[seed] = study.run_seed(seed)

    results = summarise(study, seeds, untrained_share(asked), rank_popular(asked))
    report, text = args.out / f"results-{args.split}.json", table(results)
    write_json(report, results)
    write_text(args.out / f"table-{args.split}.md", text)
    print(f"{aligned(text)}\nwrote {report} and table-{args.split}.md")
