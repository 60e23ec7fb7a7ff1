"""A tiny base that can say Yes and No, for the rows that ask it (TALLRec, MLLM-MSR).

    python benchmarks/yes_no_base.py BASE DATA OUT

A base that was trained on titles alone has never had to write those two words: their rows in its
output matrix are those of any unused token (cosine above 0.99), and LoRA, which leaves that matrix
as it is, cannot tell them apart. A real MLLM can say both. So this trains the rows of their tokens,
and nothing else, on the binary prompts of the first 40% of the users, as many with Yes as with No:
OUT knows the words, and of anybody's taste what two words' rows can hold.
"""

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hanorec.base.command import run
from hanorec.base.config import DataConfig, TrainConfig
from hanorec.base.files import claim_folder
from hanorec.losses import sft_loss
from hanorec.mllm import prompts
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import load_examples, sft_rows

STEPS, BATCH, RATE = 120, 32, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    backbone = load_backbone(str(args.base), "float32", "cpu")
    data = DataConfig(data=str(args.data), users_to=0.4, images="none", task="binary")
    train = TrainConfig(out="", targets_per_user=1)
    builder, examples = load_examples(backbone, data, train)
    rows = list(sft_rows(builder, examples, train.seed))

    out = claim_folder(args.out)

    weight = backbone.model.get_output_embeddings().weight.requires_grad_(True)  # (V, e)
    encode = partial(backbone.tokenizer.encode, add_special_tokens=False)
    words = [encode(word) for word in (prompts.YES, prompts.NO)]
    first = [word[0] for word in words]
    print(f"cosine of the rows of Yes and No: {cosine(weight[first]):.3f}")
    teach(builder, rows, weight, {token for word in words for token in word}, train.seed)
    print(f"after it: {cosine(weight[first]):.3f}")

    shutil.copytree(args.base, out, dirs_exist_ok=True)
    backbone.model.requires_grad_(False)
    backbone.model.save_pretrained(out)
    print(f"wrote {args.out}")


def cosine(pair: Tensor) -> float:
    """Of two rows, (2, e)."""
    return torch.cosine_similarity(*pair.detach(), dim=0).item()


def teach(
    builder: PromptBuilder, rows: Sequence[Row], weight: Tensor, tokens: set[int], seed: int
) -> None:
    """SFT-1 of the rows in the tokens' rows of `weight`, (V, e), alone."""
    learnt = torch.zeros(len(weight), 1)
    learnt[list(tokens)] = 1
    optimizer = torch.optim.Adam([weight], lr=RATE)  # a row without a gradient stays as it is
    draw = torch.Generator().manual_seed(seed)
    bar = tqdm(range(STEPS), "Yes and No", disable=None)
    for step in bar:
        picked = torch.randint(len(rows), (BATCH,), generator=draw).tolist()
        batch = collate(builder.backbone, [rows[i] for i in picked], builder.pictures)
        loss = sft_loss(forward(builder.backbone, batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        weight.grad *= learnt
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            bar.write(f"step {step} of {STEPS}: {loss.item():.3f} nats a token of the answer")


if __name__ == "__main__":
    run(main)
