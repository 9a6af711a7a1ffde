"""Makes tiny-sd's tokenizer: CLIP's, whose vocabulary is the bytes and the words that captions of drawn pictures are made of.

python models/tiny-sd/vocabulary.py        # writes models/tiny-sd/tokenizer
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from suture.models.drawn_pictures import BACKGROUNDS, COLOURS, KINDS

END = "</w>"  # of a word
LENGTH = 24  # tokens


def main() -> None:
    folder = Path(__file__).resolve().parent / "tokenizer"
    vocabulary, merges = entries()
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")


def entries() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Each token's id, in CLIP's order (bytes, bytes that end a word, merges, begin and end of text), and the merges."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({*COLOURS, *BACKGROUNDS, *KINDS, *["a", "and", "on", "background", "left", "right", "above", "below", "of"]})
    learned = Tokenizer(BPE(end_of_word_suffix=END))
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.train_from_iterator(
        words, trainers.BpeTrainer(end_of_word_suffix=END, show_progress=False)
    )  # until each is one token
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    tokens = [*characters, *(each + END for each in characters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}, merges


if __name__ == "__main__":
    main()
