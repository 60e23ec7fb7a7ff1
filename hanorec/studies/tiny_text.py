"""Tokenizer and chat template of the tiny checkpoints, in the shapes in which the hub has them.

    shape                  tokenizer                           chat template
    qwen2_vl, qwen2_5_vl   byte-level BPE behind NFC; markers  a system prompt unless one is given;
                           stand behind the vocabulary         <|im_start|>user ... <|im_end|>
    mistral                SentencePiece's BPE: a space is a   [INST] ... [/INST]
                           piece's first letter, bytes stand
                           for unknown letters, <s> is added
    vicuna                 the same                            USER: ... ASSISTANT:

The two templates of LLaVA-NeXT write no <s>, since the tokenizer does, and put a message's images
before its text. Neither ends an answer with </s>: Mistral's has "<\\s> " there, Vicuna's a space.
"""

import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hanorec.mllm import prompts

SYSTEM = "You are a helpful assistant."

QWEN_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
QWEN_WORDS = ["<tool_call>", "</tool_call>"]  # among the added tokens of Qwen2.5, but not special

LLAVA_TOKENS = ["<unk>", "<s>", "</s>"]
LLAVA_MORE = ["<image>", "<pad>"]  # behind the vocabulary

# What Qwen's tokenizers split a text into before they merge bytes: words with the character before
# them, single digits, other characters, line breaks, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGES_FIRST = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES_FIRST
    + "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\\\s> ' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + IMAGES_FIRST
    + "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

TEMPLATES = {
    "qwen2_vl": QWEN_TEMPLATE,
    "qwen2_5_vl": QWEN_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "vicuna": VICUNA_TEMPLATE,
}


def write_text_files(
    shape: str, out: Path, texts: Iterable[str], vocabulary: int, context: int
) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; the ids of the added
    tokens."""
    # the words of the prompts whole, too
    frame = [
        SYSTEM, "system", "user", "assistant", "USER:", "ASSISTANT:",
        prompts.HISTORY, prompts.WHICH, prompts.TITLE_ALONE, prompts.WHETHER, prompts.YES_OR_NO,
    ]
    texts = [*texts, *(200 * frame)]
    if shape.startswith("qwen"):
        words = QWEN_WORDS if shape == "qwen2_5_vl" else []
        tokenizer = qwen_tokenizer(texts, QWEN_TOKENS, words, vocabulary)
        settings = {
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
    else:
        tokenizer = llama_tokenizer(texts, vocabulary)
        settings = {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "legacy": True,
            "pad_token": "<pad>",
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        }
    added = tokenizer.get_added_tokens_decoder()
    settings |= {
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for number, token in added.items()
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATES[shape])
    return {token.content: number for number, token in added.items()}


def qwen_tokenizer(
    texts: Iterable[str], special: list[str], words: list[str], vocabulary: int
) -> Tokenizer:
    """256 bytes, merges learnt from the texts, then the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary - len(special) - len(words),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in words])
    return tokenizer


def llama_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """<unk>, <s>, </s>, 256 bytes, letters and merges learnt from the texts, <image>, <pad>.

    "\\u2581" stands for a space, and is put before each text, also behind an added token.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "removed"),  # a line break is a byte
        pre_tokenizers.Metaspace(),
    ])
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary - 256 - len(LLAVA_MORE),
        min_frequency=1,
        show_progress=False,
        special_tokens=LLAVA_TOKENS,
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
    ))
    learnt = json.loads(learner.to_str())["model"]
    pieces = [piece for piece in learnt["vocab"] if piece not in LLAVA_TOKENS]
    pieces = [*LLAVA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learnt["merges"]]

    tokenizer = Tokenizer(models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    ))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in (*LLAVA_TOKENS, *LLAVA_MORE)]
    )
    return tokenizer
