"""Qwen's tiktoken vocabulary in the form that servers and other libraries read: tokenizer.json, and ChatML as a chat template.

The same ids for the same text, but for one thing: there, a text that has a special token's name in it has that token."""

import json
from pathlib import Path

from suture.models.tokenizer import END_OF_TEXT, IM_END, PATTERN, SPECIALS, SYSTEM, VOCABULARY, read_ranks

FILES = ("tokenizer.json", "tokenizer_config.json")
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim if message.role == 'assistant' else message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def has_tiktoken(folder: Path) -> bool:
    return (folder / VOCABULARY).is_file()


def write_library_files(folder: Path, out: Path) -> None:
    """Of the vocabulary in a checkpoint's `folder`, FILES in `out`. Raises UserError where it is malformed."""
    from tokenizers import normalizers  # here: transformers takes a second
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        def load_tiktoken_bpe(self, ranks: dict[bytes, int]) -> dict[bytes, int]:
            return ranks  # tiktoken's own reader would keep a copy by the file's name

    made = Converter(read_ranks(folder), PATTERN, extra_special_tokens=list(SPECIALS)).converted()
    made.normalizer = normalizers.NFC()
    made.save(str(out / FILES[0]))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (out / FILES[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
