"""A small Whisper for speech: windows of one second, tokens of one byte."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
END, START, EN, DE, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = range(256, 263)
CONFIG = {
    "vocab_size": 264, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 80, "init_std": 0.3,
    "max_target_positions": 40, "max_source_positions": 50, "pad_token_id": END, "bos_token_id": END, "eos_token_id": END,
    "decoder_start_token_id": START, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
GENERATION = {
    "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE}, "no_timestamps_token_id": NO_TIMESTAMPS,
    "suppress_tokens": [3, 5, 9, *range(128, 264)], "begin_suppress_tokens": [32, END], "is_multilingual": True, "max_length": 40,
}  # fmt: skip


def write(folder: Path) -> Path:
    """Its checkpoint, random from a fixed seed; a byte-level vocabulary, of which only ASCII is ever written."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(0)
    WhisperForConditionalGeneration(WhisperConfig(**CONFIG)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder
