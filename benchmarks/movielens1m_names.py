"""The second stage of benchmarks/movielens1m_base.py: from a poster to its film's title and genres.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from movielens1m_posters import Posters
from movielens1m_stages import (
    Clock,
    Scale,
    Stage,
    language_weights,
    plan,
    seen_posters,
    train,
    write_stage,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hanorec.base.batches import chunks
from hanorec.base.errors import InputError
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.movielens import read_movies_1m
from hanorec.losses import sft_loss
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import Part, Row, answer_ids, encode_row
from hanorec.studies.tiny_text import write_text_files

TITLE = "\nWhich film is this?\nAnswer with its title alone."
GENRES = "\nWhich genres has this film?\nAnswer with their names alone."

# Text alone, as SmolLM2 has it, but without a system prompt.
CHAT = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Language = tuple[nn.Module, Any]  # a causal model and its tokenizer


def read_genres(data: Path, catalog: Catalog) -> dict[str, list[str]]:
    """Item id -> genres, by the raw movies.dat. InputError where it lacks an item."""
    path = data / "movies.dat"
    if not path.exists():
        raise InputError(
            f"{path}: no such file, expected MovieLens-1M's raw file of titles and genres; copy it "
            "there"
        )
    _, genres = read_movies_1m(path)
    if missing := [item for item in catalog.ids if item not in genres]:
        raise InputError(
            f"{path}: no line for item {missing[0]!r}, and {len(missing)} lack one in all, "
            "expected every item of the titles file; is it the movies.dat of this data?"
        )
    return genres


def begin_language(catalog: Catalog, genres: dict[str, list[str]], scale: Scale) -> Language:
    """A language model at random, and a tokenizer learnt from the titles and the prompts."""
    names = sorted({name for of_item in genres.values() for name in of_item})
    texts = [*catalog.titles, *(100 * names), *(100 * [TITLE, GENRES])]
    with tempfile.TemporaryDirectory() as folder:
        write_text_files("qwen2_vl", Path(folder), texts, scale.vocabulary, context=2048)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.width,
        intermediate_size=3 * scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.width // 32,
        num_key_value_heads=max(1, scale.width // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


class Naming:
    """Posters as the frozen tower sees them, and the rows that name their films."""

    def __init__(
        self, backbone: Backbone, posters: Posters, catalog: Catalog, genres: dict[str, list[str]]
    ) -> None:
        self.backbone, self.catalog, self.genres = backbone, catalog, genres
        self.seen = seen_posters(backbone, posters)  # (P, 2, g^2, h)
        self.size, self.row = posters.size, posters.row.tolist()
        self.place = {row: i for i, row in enumerate(self.row)}

    def projector(self) -> list[nn.Parameter]:
        """The weights between tower and language part."""
        inner = self.backbone.model.model
        return [*inner.multi_modal_projector.parameters(), inner.image_newline]

    def pictures(self, rows: Sequence[int]) -> dict[int, ImageFeatures]:
        """Projected features of these items' posters, in the graph of the projector."""
        index, inner = [self.place[row] for row in rows], self.backbone.model.model
        features, _ = inner.pack_image_features(
            [*inner.multi_modal_projector(self.seen[index])],
            self.size[index],
            self.backbone.config.vision_feature_select_strategy,
            inner.image_newline,
        )
        return {row: ImageFeatures(f, None) for row, f in zip(rows, features, strict=True)}

    @torch.no_grad()
    def shown(self, rows: Sequence[int]) -> dict[int, ImageFeatures]:
        """`pictures` without a graph."""
        return self.pictures(rows)

    @torch.no_grad()
    def rows(self, chosen: Tensor) -> list[Row]:
        """Two rows, title and genres, of each of the posters chosen (P,)."""
        films = [row for row, take in zip(self.row, chosen.tolist(), strict=True) if take]
        pictures, found = self.pictures(films), []
        for row in films:
            item, title = self.catalog.ids[row], self.catalog.titles[row]
            for question, answer in ((TITLE, title), (GENRES, ", ".join(self.genres[item]))):
                answers = [answer_ids(self.backbone, answer)]
                parts: list[Part] = [row, question]
                found.append(encode_row(self.backbone, item, parts, pictures, answers))
        return found

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Mean over the answers' tokens: ()."""
        films = sorted({item for row in rows for item in row.images})
        batch = collate(self.backbone, rows, self.pictures(films))
        return sft_loss(forward(self.backbone, batch), batch.labels)

    @torch.no_grad()
    def mean_loss(self, rows: Sequence[Row]) -> float:
        """`loss` of many rows, in nats a token."""
        total = tokens = 0
        for part in chunks(rows, 64):
            count = sum(row.answer_tokens for row in part)
            total += self.loss(part).item() * count
            tokens += count
        return total / tokens


def teach_names(
    before: Path, out: Path, work: Path, posters: Posters, catalog: Catalog,
    genres: dict[str, list[str]], scale: Scale, seed: int, device: str, clock: Clock,
) -> bool:
    """SFT-1 of a film's title, and of its genres, behind its poster."""
    backbone = load_backbone(str(before), "float32", device)
    naming = Naming(backbone, posters, catalog, genres)
    rows = naming.rows(~posters.held)
    steps = plan(len(rows), scale.batch, scale.names_epochs, seed)
    groups = [(naming.projector(), scale.names_rate)]
    if scale.names_language_rate:
        groups.append((language_weights(backbone), scale.names_language_rate))

    def loss(step: int) -> Tensor:
        return naming.loss([rows[i] for i in steps[step]])

    if not train(Stage(work, groups, len(steps), loss), clock):
        return False
    facts = {
        "nats_a_token_taught": naming.mean_loss(rows[:512]),
        "nats_a_token_held_out": naming.mean_loss(naming.rows(posters.held)),
    }
    print(facts)
    write_stage(before, out, backbone.model, steps=len(steps), films=len(rows) // 2, **facts)
    return True
