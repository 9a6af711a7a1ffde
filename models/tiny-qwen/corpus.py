"""tiny-qwen's data: the Python sources of CPython's standard library, split by whole files, and a vocabulary for them.

`prepare` writes a folder that is the checkpoint without its weights (config.json, qwen.tiktoken, heldout.txt) and what
training needs beside it (train.npy, validation.txt, corpus.json).
"""

import base64
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from suture.models.tokenizer import PATTERN, SPECIALS, VOCABULARY, open_tokenizer

RANKS = 2048
# Encodings and html/entities.py are tables, pydoc_data is one file of generated help.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "lib-dynload"}
TEST_FOLDERS = {"test", "tests", "idle_test"}  # repetitive: to train on, not to measure by
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "re/_casefix.py"}
SPLITS = {"heldout": 130_000, "validation": 130_000}  # bytes; training gets the rest
SPLIT_FILE_SIZES = range(4_000, 30_000)  # bytes: a split of many files, none of which dominates it

CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 1408,
    "kv_channels": 64,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 4096,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 256,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": -(-(RANKS + len(SPECIALS)) // 128) * 128,
}


def prepare(library: Path, out: Path) -> None:
    """Writes the folder `out` from the sources below `library`. The same library gives the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    texts = read_sources(library)
    splits = split(texts)
    for name in SPLITS:
        (out / f"{name}.txt").write_text("".join(texts[file] for file in splits[name]), encoding="utf-8")
    training = [texts[file] for file in splits["train"]]

    ranks = train_vocabulary(training)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (out / VOCABULARY).write_bytes(b"".join(lines))
    tokenizer = open_tokenizer(out)
    ids = [token for text in training for token in [tokenizer.end_of_text, *tokenizer.encode(text)]]
    np.save(out / "train.npy", np.array(ids, dtype=np.uint16))

    corpus = {
        "source": f"standard library of CPython {platform.python_version()}",
        "sha256": hashlib.sha256("".join(texts.values()).encode()).hexdigest(),
        "train_files": len(training),
        "train_bytes": sum(len(text.encode()) for text in training),
        "train_tokens": len(ids),
        **{f"{name}_files": splits[name] for name in SPLITS},
    }
    (out / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    print(f"{len(training)} files, {corpus['train_bytes']} bytes, {len(ids)} tokens to train on")


def read_sources(library: Path) -> dict[str, str]:
    """Path below the library → text, in the order of paths."""
    texts = {}
    for path in sorted(library.rglob("*.py")):
        file = path.relative_to(library)
        skipped = SKIPPED_FOLDERS & set(file.parts) or file.as_posix() in SKIPPED_FILES
        if not skipped and not file.parts[0].startswith(("config-", "_sysconfigdata")):
            try:
                texts[file.as_posix()] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the tests have sources that are wrong on purpose
    return texts


def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """Whole files, drawn by the hash of their path, until a split is large enough."""
    rest = sorted(texts, key=lambda file: hashlib.sha256(file.encode()).digest())
    splits = {}
    for name, size in SPLITS.items():
        chosen, total = [], 0
        for file in rest:
            measures = not TEST_FOLDERS & set(Path(file).parts) and len(texts[file].encode()) in SPLIT_FILE_SIZES
            if total < size and measures:
                chosen.append(file)
                total += len(texts[file].encode())
        splits[name] = sorted(chosen)
        rest = [file for file in rest if file not in chosen]
    return splits | {"train": sorted(rest)}


def train_vocabulary(texts: list[str]) -> dict[bytes, int]:
    """Byte-level BPE under Qwen's own pattern: the 256 bytes, then merged tokens in the order of merging."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    byte_of = _bytes_of_characters()
    by_rank = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[character] for character in token): rank for token, rank in by_rank}


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
