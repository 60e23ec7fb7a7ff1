"""Which flags would bring rows under a model's context: found by trying them."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hanorec.base.errors import InputError
from hanorec.datasets.interactions import Example
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.builder import PromptBuilder, cut_title
from hanorec.mllm.outline import load_outline, outline_builder
from hanorec.mllm.prompts import text_ids
from hanorec.mllm.ruler import Ruler

Sizes = Mapping[int, tuple[int, int]]  # catalogue row -> width and height of its image

LEAST_PIXELS = 28 * 28  # what one token of Qwen's covers
LEAST_TITLE = 8  # tokens; what is left of a title should still name an item


@dataclass(frozen=True)
class Long:
    """An example with a row that exceeds the context."""

    split: str
    example: Example
    tokens: int
    of_images: int


@dataclass(frozen=True)
class Trials:
    """Rows that exceed the context, the longest first, and what they were made from."""

    ruler: Ruler
    rows: Sequence[Long]
    sizes: Sizes
    max_pixels: int

    @property
    def builder(self) -> PromptBuilder:
        return self.ruler.builder

    def fit(self, builder: PromptBuilder, history: int | None = None) -> bool:
        """Whether all rows would, made by that builder, with so many past items."""
        ruler = replace(self.ruler, builder=builder)
        for row in self.rows:
            example = row.example
            if history is not None:
                example = replace(example, history=example.history[-history:])
            if not ruler.fits(example, row.split == "train"):
                return False
        return True

    @cached_property
    def images_matter(self) -> bool:
        """Whether no row is too long by its text alone."""
        context = self.builder.backbone.context
        return all(row.tokens - row.of_images <= context for row in self.rows)

    @cached_property
    def smaller_images(self) -> dict[int, Backbone]:
        """Fewer pixels, by halves -> the checkpoint with them, where that can help."""
        found: dict[int, Backbone] = {}
        backbone = self.builder.backbone
        pixels = self.max_pixels // 2 if self.images_matter else 0
        while pixels >= LEAST_PIXELS and not backbone.images_are_smallest:
            try:
                backbone = found[pixels] = load_outline(backbone.path, pixels)
            except InputError:  # less than a token
                break
            pixels //= 2
        return found

    def with_images(self, backbone: Backbone) -> PromptBuilder:
        return outline_builder(backbone, self.builder.catalog, self.sizes, self.builder.config)

    def without_candidate_images(self, builder: PromptBuilder) -> PromptBuilder:
        return replace(builder, config=replace(builder.config, candidate_images="off"))

    def with_titles(self, most: int) -> PromptBuilder:
        """With the titles of the rows cut to so many tokens."""
        catalog = self.builder.catalog
        titles = list(catalog.titles)
        for item in self.items():
            titles[item] = cut_title(self.builder.backbone, titles[item], most)
        return replace(self.builder, catalog=replace(catalog, titles=tuple(titles)))

    def items(self) -> set[int]:
        """Those that the rows show."""
        found: set[int] = set()
        for row in self.rows:
            found.update(row.example.history, row.example.candidates)
        return found


def remedies(trials: Trials) -> str:
    """The flags of which each, at its mildest value, is enough for all rows."""
    builder, images = trials.builder, trials.smaller_images
    longest_history = max(len(row.example.history) for row in trials.rows)
    titles = [builder.catalog.titles[item] for item in trials.items()]
    longest_title = max(len(text_ids(builder.backbone, title)) for title in titles)

    pixels = mildest(list(images), lambda p: trials.fit(trials.with_images(images[p])))
    without = trials.images_matter and trials.fit(trials.without_candidate_images(builder))
    history = mildest(range(longest_history - 1, 0, -1), lambda n: trials.fit(builder, n))
    most = mildest(
        range(longest_title - 1, LEAST_TITLE - 1, -1), lambda n: trials.fit(trials.with_titles(n))
    )
    enough = []
    if pixels:
        enough.append(f"--max-pixels {pixels}")
    if without:
        enough.append("--candidate-images off")
    if history:
        enough.append(f"--history {history}")
    if most:
        enough.append(f"--max-title-tokens {most}")
    if enough:
        return f"enough, each alone: {', '.join(enough)}"
    return _together(trials)


def _together(trials: Trials) -> str:
    """Where no flag is enough alone."""
    flags, builder = "--history 1", trials.builder
    if trials.smaller_images:
        least = min(trials.smaller_images)
        flags = f"{flags} --max-pixels {least}"
        builder = trials.with_images(trials.smaller_images[least])
    if trials.images_matter and builder.config.task == "ranking":
        flags = f"{flags} --candidate-images off"
        builder = trials.without_candidate_images(builder)
    if trials.fit(builder, history=1):
        return f"no flag is enough alone, but {flags} is"
    return f"not even {flags} is enough; use a checkpoint with a longer context"


def mildest(values: Sequence[int], enough: Callable[[int], bool]) -> int | None:
    """The first of the values that is enough, where each is stricter than the one before."""
    if not values or not enough(values[-1]):
        return None
    return values[bisect_left(values, True, key=enough)]
