"""From examples to rows, and from rows to batches, with all that it takes in one hand."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hanorec.base.config import DataConfig
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.interactions import Example
from hanorec.mllm import items, prompts
from hanorec.mllm.backbone import Backbone, ImageFeatures
from hanorec.mllm.collate import Batch, collate


@dataclass(frozen=True)
class PromptBuilder:
    """All that turns examples into rows, and rows into batches."""

    backbone: Backbone
    catalog: Catalog
    pictures: dict[int, ImageFeatures]
    config: DataConfig

    def ranking_row(self, example: Example, answers: Sequence[int]) -> prompts.Row:
        """The ranking prompt of an example, answered by the titles of these catalogue rows."""
        images = self.config.candidate_images == "on"
        parts = prompts.ranking_parts(self.catalog, example.history, example.candidates, images)
        return self._row(example, parts, [self.catalog.titles[row] for row in answers])

    def binary_row(self, example: Example, target: int, answers: Sequence[str]) -> prompts.Row:
        """The binary prompt about one item, answered by Yes, No, or both."""
        parts = prompts.binary_parts(self.catalog, example.history, target)
        return self._row(example, parts, answers)

    def _row(
        self, example: Example, parts: list[prompts.Part], answers: Sequence[str]
    ) -> prompts.Row:
        tokens = [prompts.answer_ids(self.backbone, answer) for answer in answers]
        return prompts.encode_row(self.backbone, example.user, parts, self.pictures, tokens)

    def collate(self, rows: Sequence[prompts.Row], part: Sequence[int]) -> Batch:
        """The batch of those `rows` whose numbers are in `part`; unpacked with --plain."""
        chosen = [rows[i] for i in part]
        return collate(self.backbone, chosen, self.pictures, packed=not self.config.plain)

    def neighbors(self, k: int, form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
        """HN-1 to HN-3 of the catalogue, see `hanorec.mllm.items.neighbors`."""
        return items.neighbors(self.backbone, self.catalog, self.pictures, k, form)
