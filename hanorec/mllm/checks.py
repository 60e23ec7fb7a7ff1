"""What a checkpoint of the three families may hold, in its configuration and in its weights."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig

from hanorec.base.errors import InputError, shown
from hanorec.mllm.allowed import Only
from hanorec.mllm.attributes import ATTRIBUTES, EVERYWHERE, PARTS, UNLISTED
from hanorec.mllm.template import PARTS_AS_TEXT

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that a weight may have

# ---- configuration ----


def check_attributes(path: str, config: PreTrainedConfig) -> None:
    """InputError where a setting has a value that the table does not allow, or where a part is of a
    class that is not in it. A model of no family passes."""
    kind = type(config).__name__
    if kind not in PARTS:
        return
    parts = [("", config)]
    for name, kinds in zip(("text_config", "vision_config"), PARTS[kind], strict=True):
        part = getattr(config, name)
        if type(part).__name__ not in kinds:
            raise InputError(
                f"{path}: {name} in config.json is a {type(part).__name__}, expected one of "
                f"{', '.join(kinds)}; others have not been compared with Transformers"
            )
        parts.append((f"{name}.", part))
    for place, part in parts:
        _check_part(path, place, part)


def _check_part(path: str, place: str, part: PreTrainedConfig) -> None:
    kind = type(part).__name__
    table = EVERYWHERE | ATTRIBUTES[kind] | UNLISTED.get(kind, {})
    for name, verdict in table.items():
        if not isinstance(verdict, Only):
            continue
        value = _stated(part, name)
        if not verdict.allows(value, part):
            raise InputError(
                f"{path}: {place}{name} in config.json is {shown(value)}, expected "
                f"{verdict.expected}; {verdict.why}"
            )


def _stated(part: PreTrainedConfig, name: str) -> Any:
    """A setting's value, None where it is not set."""
    if name != "per_layer_config":
        return getattr(part, name, None)
    # Newer versions have a view of all layers by this name, whether or not they differ.
    if getattr(part, "is_heterogeneous", False):
        return "given"
    return vars(part).get(name)


def check_patches(path: str, image_processor: Any, tower: PreTrainedConfig) -> None:
    """InputError where Qwen's image processor cuts images otherwise than its vision tower reads
    them: features of other patches would be taken for theirs."""
    names = {
        "patch_size": "patch_size",
        "merge_size": "spatial_merge_size",
        "temporal_patch_size": "temporal_patch_size",
    }
    for name, of_tower in names.items():
        cut, read = getattr(image_processor, name), getattr(tower, of_tower)
        if cut != read:
            raise InputError(
                f"{path}: {name} in preprocessor_config.json is {shown(cut)}, but "
                f"vision_config.{of_tower} in config.json is {shown(read)}, expected the same; "
                "copy both files of one checkpoint"
            )


def check_image_text(path: str, tokenizer: Any, template: str | None, image: str) -> None:
    """InputError where the chat template writes images, but otherwise than `image`: then the tokens
    that config.json names are not those that the model was tuned on."""
    if template is None:
        return
    texts = []
    for parts in ([], [{"type": "image"}]):
        content = [*parts, {"type": "text", "text": "x"}]
        try:
            texts.append(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], chat_template=template, tokenize=False
                )
            )
        except Exception:  # noqa: BLE001  it takes strings alone, or is broken, which is told later
            return
    alone, with_image = texts
    if with_image == alone or image in with_image or PARTS_AS_TEXT.search(with_image):
        return
    raise InputError(
        f"{path}: an image is {shown(image)} by config.json, but its chat template writes "
        f"{shown(with_image)}, expected that in it; copy config.json and the template of one "
        "checkpoint"
    )


def window(text: PreTrainedConfig) -> int | None:
    """How many tokens, itself included, a token sees in those layers of a language model that see
    least; None where all see all before it."""
    if "sliding_window" not in ATTRIBUTES[type(text).__name__]:
        return None
    types = getattr(text, "layer_types", None) or ["sliding_attention"]  # Mistral's are alike
    return text.sliding_window if "sliding_attention" in types else None


# ---- weights ----


def check_stored_types(folder: Path) -> None:
    """InputError where a weight in a local folder is stored in anything but plain floats.

    Transformers would read the codes of a quantised weight as its values. Only the files' headers
    are read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dict
                if not key.endswith((".weight", ".bias")):
                    continue
                stored = file.get_slice(key).get_dtype()
                if stored not in FLOATS:
                    raise InputError(
                        f"{path}: {key} is stored as {stored}, expected F64, F32, F16 or BF16; use "
                        "a checkpoint that is not quantised"
                    )


def check_every_weight(path: str, loading: dict[str, Any]) -> None:
    """InputError where files and model do not hold the same weights. loading: what Transformers
    says of it."""
    missing = sorted(loading["missing_keys"])
    if missing == ["lm_head.weight"]:
        raise InputError(
            f"{path}: lm_head.weight is missing, and config.json does not say that the embeddings "
            "serve as it (tie_word_embeddings), expected one of the two; copy the checkpoint again"
        )
    if missing:  # Transformers would draw them at random and only warn
        raise InputError(
            f"{path}: {len(missing)} weights are missing, e.g. {missing[0]}, expected a whole "
            "checkpoint; copy it again"
        )
    # Positions are computed, not learnt; old files hold them.
    computed = ("position_ids", "inv_freq")
    extra = sorted(key for key in loading["unexpected_keys"] if not key.endswith(computed))
    if extra:  # left out with a warning: perhaps layers that config.json lacks
        raise InputError(
            f"{path}: {len(extra)} weights have no place in the model that config.json describes, "
            f"e.g. {extra[0]}; expected config.json and weights of one checkpoint; copy both again"
        )
