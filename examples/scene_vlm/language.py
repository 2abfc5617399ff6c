"""The word-level language of the small models: its tokens, its tokenizer and its chat template.

It knows nothing of pictures but the marks that a family puts around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
USER, ASSISTANT = "<user>", "<assistant>"
WORD = re.compile(r"<\|?\w+\|?>|\w+|[^\w\s]")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PICTURE' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def chat_template(picture: str) -> str:
    """The template, with what stands for a picture in a family's prompts."""
    return CHAT_TEMPLATE.replace("PICTURE", picture)


def build_tokenizer(texts: Iterable[str], marks: Sequence[str], names: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of every word in the texts; text in usual spelling and spacing comes in and goes out.

    Args:
        texts: What the words are gathered from.
        marks: The family's own special tokens.
        names: The attributes by which the tokenizer is to know the marks, `image_token` for one; none if left out.
    """
    words = sorted({word for text in texts for word in WORD.findall(text)})
    special = [*marks, USER, ASSISTANT]
    tokens = [*SPECIAL.values(), *special, *words]
    rules = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL["unk_token"]))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    named = dict(zip([*names, "user_token", "assistant_token"], special, strict=True)) if names else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        padding_side="left",
        clean_up_tokenization_spaces=True,
        model_max_length=1024,
        **({"extra_special_tokens": named} if names else {"additional_special_tokens": special}),
        **SPECIAL,
    )
