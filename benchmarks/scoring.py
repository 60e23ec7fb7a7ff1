#!/usr/bin/env python3
"""Scoring 10 candidates of 5 to 20 tokens under one prompt of 512, against a forward for each
candidate in Transformers.

    python benchmarks/scoring.py [--vocabulary V] [--rounds N] [--device cuda]

A score is the sum of the candidate's log-probabilities, its end token included. Both sides start
from lists of token ids and run the same weights (toys.py).
"""

import argparse
import sys
from collections.abc import Callable

import torch
from measure import agree, begin, gemm_rate, interleaved, measure_memory, peak_memory
from torch import Tensor
from toys import Work, examples, forward_flops, load, model

from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.scoring import answer_log_probs

LENGTHS = [5, 7, 8, 10, 12, 13, 15, 17, 18, 20]


def build(work: Work, device: str) -> dict[str, Callable[[], Tensor]]:
    """Every row of the table: a function that returns the ten scores."""
    backbone, (row,), pictures = load(work, examples(work, LENGTHS), device)
    theirs = model(work).requires_grad_(False).to(device).eval()

    def packed() -> Tensor:
        batch = collate(backbone, [row], pictures)
        return answer_log_probs(forward(backbone, batch), batch)[0]

    def score(ids: list[int], kept: int) -> Tensor:
        """kept: how many positions' logits Transformers computes, 0 = all."""
        n = len(ids) - len(row.prompt)
        found = (
            theirs(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=kept)
            .logits[0, -n - 1 : -1]
            .log_softmax(-1)
        )
        return found.gather(1, torch.tensor(ids[-n:], device=device)[:, None]).sum()

    def full() -> Tensor:
        return torch.stack([score(row.prompt + answer, 0) for answer in row.answers])

    def kept() -> Tensor:
        return torch.stack([score(row.prompt + answer, len(answer) + 1) for answer in row.answers])

    return {
        "hanorec, packed": packed, "10 forwards": full,
        "10 forwards, logits of the answers alone": kept,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--memory", metavar="SIDE", help="measure the peak of one call of this side alone"
    )
    args = parser.parse_args()
    work = Work(prompts=1, vocabulary=args.vocabulary)
    if args.memory:
        torch.set_num_threads(1)
        print(measure_memory(build(work, args.device)[args.memory], args.device))
        return
    begin(args.device)
    sides = build(work, args.device)
    memory = {name: peak_memory([__file__, *sys.argv[1:], "--memory", name]) for name in sides}
    ours, *peers = [side() for side in sides.values()]
    for name, scores in zip(list(sides)[1:], peers, strict=True):
        agree(f"scores, {name}", ours, scores, 1e-5)
    rate = gemm_rate(args.device)
    floor = forward_flops(work, LENGTHS) / rate
    seconds = interleaved(sides, args.rounds, args.device)
    print(f"\nGEMM 1024: {rate / 1e9:.0f} GFLOP/s; floor {1000 * floor:.0f} ms\n")
    print(
        "| ten scores | ms | times the floor | peak memory, MB | this / hanorec |\n"
        "|---|---|---|---|---|"
    )
    for name, time in seconds.items():
        print(
            f"| {name} | {1000 * time:.0f} | {time / floor:.2f} | {memory[name]:.0f} | "
            f"{time / seconds['hanorec, packed']:.2f} |"
        )


if __name__ == "__main__":
    main()
