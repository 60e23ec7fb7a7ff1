"""The chat template: what a checkpoint writes around the user's text and around its own answer.

It is rendered once, with stand-ins for both texts, so that what stands around them is known as
text; `hanorec.mllm.prompts` puts the texts in and tokenizes the whole at once, as Transformers'
processors do. Tokens of the pieces, put together, would be others: a SentencePiece tokenizer begins
each text with a piece of its own, and tokens may reach over a seam.
"""

import re
from functools import partial
from typing import Any, NamedTuple

from jinja2 import TemplateError

from hanorec.base.errors import InputError

# What stands for the user's text and for the answer while a template is rendered: private-use
# characters.
USER, ANSWER = "\ue000", "\ue001"

NO_TEMPLATE = ("User: ", "\nAssistant: ")

STAND_IN = "x"  # a user's text without a marker

# In what a template has made of `_parts`: it is for strings, and has written out Python's list.
PARTS_AS_TEXT = re.compile("""['"]type['"]""", re.IGNORECASE)


class Turn(NamedTuple):
    """A conversation of one question and its answer, as text, without the two."""

    before: str  # up to the user's text, a default system prompt included
    after: str  # from there to where the assistant is to go on
    lead: str  # what the assistant's turn has before its text: a space, say
    ending: str  # what it has after it, up to its end token
    add_tokens: bool  # whether the tokenizer adds its own, <s> say: not where the template has <s>
    prompt: tuple[int, ...]  # the tokens of before + STAND_IN + after
    whole: tuple[int, ...]  # and with lead + STAND_IN + ending behind it

    @property
    def opening(self) -> str:
        """A prompt of a stand-in, for the tokens of what follows it."""
        return self.before + STAND_IN + self.after


# ---- which template ----


def choose_template(path: str, of_processor: Any, tokenizer: Any) -> str | None:
    """The chat template that Transformers would take: the processor's if it has read one, else the
    tokenizer's. Each may be nothing, a text, or several by name, of which `default` counts.

    The tokenizer is given it, so that it is saved with a merged model. InputError where there are
    several and none is called default.
    """
    found = tokenizer.chat_template if of_processor is None else of_processor
    if isinstance(found, (list, tuple)):  # the form that tokenizer_config.json has
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        if "default" not in found:
            raise InputError(
                f"{path}: its chat templates are named {', '.join(sorted(found))}, expected one "
                "named default; save the one to use as chat_template.jinja in that folder"
            )
        found = found["default"]
    tokenizer.chat_template = found
    return found


def is_marker(token: Any, template: str | None) -> bool:
    """Whether an added token may open or close a turn or an image, so that titles must not have it.

    The others are words that somebody added to the vocabulary, and white space.
    """
    text = token.content
    if token.special:
        return True
    if len(text) == 1 or text.isspace():
        return False
    return text in (template or "") or not text.replace(" ", "").isalnum()


# ---- what it writes ----


def read_turn(path: str, tokenizer: Any, template: str | None, image: str) -> Turn:
    """The turn of a checkpoint. image: the text of the image token.

    Raises InputError where the template is broken, or is no frame around one text, and where the
    tokenizer adds a token behind the prompt.
    """
    if template is None:
        before, after = NO_TEMPLATE
        lead, ending = "", tokenizer.eos_token
        print(
            f"note: {path} has no chat template: prompts are written as {before!r}, the text, "
            f"{after!r}; if the model was tuned on another form, save it as chat_template.jinja in "
            "that folder"
        )
    else:
        before, after, lead, ending = _around(path, tokenizer, template)
    if image in before or image in after:
        raise _no_frame(path)

    bos = tokenizer.bos_token
    add_tokens = not (bos and before.startswith(bos))
    opening = before + STAND_IN + after
    tokens = tokenizer.encode(opening, add_special_tokens=add_tokens)
    plain = tokenizer.encode(opening, add_special_tokens=False)
    if tokens[len(tokens) - len(plain) :] != plain:
        raise InputError(
            f"{path}: its tokenizer ends every text with {tokenizer.decode(tokens[-1:])!r}, so no "
            "answer could follow a prompt; take it out of post_processor in tokenizer.json, and "
            "set add_eos_token to false in tokenizer_config.json"
        )
    whole = tokenizer.encode(opening + lead + STAND_IN + ending, add_special_tokens=add_tokens)
    return Turn(before, after, lead, ending, add_tokens, tuple(tokens), tuple(whole))


def _around(path: str, tokenizer: Any, template: str) -> tuple[str, str, str, str]:
    """The first four of a `Turn`."""
    rendered = partial(_rendered, path, tokenizer, template)
    for form in (_parts, str):
        asked = {"role": "user", "content": form(USER)}
        prompt = rendered([asked], add_generation_prompt=True)
        if prompt is None or prompt.count(USER) != 1 or PARTS_AS_TEXT.search(prompt):
            continue
        answered = {"role": "assistant", "content": form(ANSWER)}
        around_answer = _around_answer(path, tokenizer, prompt, rendered([asked, answered]))
        before, after = prompt.split(USER)
        return before, after, *around_answer
    raise _no_frame(path)


def _parts(text: str) -> list[dict[str, str]]:
    """The form of content that templates of image-text models take; those of text models take a
    string."""
    return [{"type": "text", "text": text}]


def _around_answer(
    path: str, tokenizer: Any, prompt: str, whole: str | None
) -> tuple[str, str]:
    """Lead and ending, from a conversation that has its answer.

    The answer ends with the token that the template ends it with; templates that have none, as
    LLaVA-NeXT's, leave the tokenizer's end token.
    """
    goes_on = whole is not None and whole.startswith(prompt)
    if not goes_on or whole.count(ANSWER) != 1 or PARTS_AS_TEXT.search(whole):
        print(
            f"note: the chat template of {path} does not write an answer behind the prompt for it: "
            f"answers follow the prompt at once and end with {tokenizer.eos_token}"
        )
        return "", tokenizer.eos_token
    lead, tail = whole[len(prompt) :].split(ANSWER)
    added = tokenizer.added_tokens_decoder.values()
    texts = [re.escape(token.content) for token in added if not token.content.isspace()]
    longest_first = sorted(texts, key=len, reverse=True)
    end = re.match(rf"\s*(?:{'|'.join(longest_first)})", tail)
    return lead, end[0] if end else tokenizer.eos_token


def _rendered(
    path: str, tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any
) -> str | None:
    """The template's text of a conversation; None where it refuses this form of content."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except (TemplateError, TypeError):  # a template may refuse the form that it is not made for
        return None
    # 1 / 0, a range of 10^9, a macro that calls itself
    except (ValueError, ArithmeticError, RecursionError, LookupError, AttributeError) as error:
        raise InputError(
            f"{path}: its chat template cannot be rendered ({type(error).__name__}: {error}), "
            "expected one that renders a user's message; copy the template of the same checkpoint"
        ) from None


def _no_frame(path: str) -> InputError:
    return InputError(
        f"{path}: its chat template does not render the user's text once and without an image of "
        "its own, expected a template that does; is it the template of another model?"
    )
