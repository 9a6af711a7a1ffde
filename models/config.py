"""What the JSON files of a checkpoint may say: each key that is read here has a type and bounds, and no value is converted.

`"false"` is not a boolean, `8.0` is not a number of layers, and a model of 10**9 layers is refused before anything is made of it. What
a key means is its family's business; keys that nothing here reads may hold anything.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model

from suture.core.errors import UserError
from suture.core.reader import read_json
from suture.core.typed import Strict, check

REMEDY = "use the {name} that came with the weights"

Layers = Annotated[int, Field(ge=1, le=1000)]
Heads = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Vocabulary = Annotated[int, Field(ge=1, le=10_000_000)]
Length = Annotated[int, Field(ge=1, le=100_000_000)]
Buckets = Annotated[int, Field(ge=1, le=100_000)]
Token = Annotated[int, Field(ge=-1, le=10_000_000)]  # -1: none, as the first LLaMA has it
Small = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]


def _table(name: str, kinds: dict[Any, str], **others: Any) -> type[BaseModel]:
    """A model whose keys, all of them optional, have these types."""
    fields = {key: (kind | None, None) for kind, keys in kinds.items() for key in keys.split()}
    fields |= {key: (kind | None, None) for key, kind in others.items()}
    return create_model(name, __base__=Strict, **fields)


Rope = _table("Rope", {
    Positive: "factor low_freq_factor high_freq_factor rope_theta beta_fast beta_slow attention_factor mscale mscale_all_dim",
    Length: "original_max_position_embeddings", str: "rope_type type",
})  # fmt: skip
Quantization = _table("Quantization", {
    str: "quant_method version checkpoint_format", bool: "desc_act sym zero_point true_sequential", Annotated[int, Field(ge=1, le=16)]: "bits",
    Annotated[int, Field(ge=-1, le=1_000_000)]: "group_size q_group_size",
})  # fmt: skip
MptAttentionConfig = _table("MptAttentionConfig", {
    str: "attn_type attn_impl", bool: "alibi qk_ln prefix_lm", Positive: "softmax_scale clip_qkv",
    Annotated[float, Field(gt=0, le=1000)]: "alibi_bias_max",
})  # fmt: skip
Config = _table("Config", {
    Layers: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers",
    Heads: "num_attention_heads n_head n_heads num_heads num_key_value_heads encoder_attention_heads decoder_attention_heads",
    Width: "hidden_size n_embd d_model dim_model head_dim kv_channels dim_head intermediate_size n_inner ffn_dim dim_ff "
           "encoder_ffn_dim decoder_ffn_dim word_embed_proj_dim num_mel_bins expansion_ratio",
    Vocabulary: "vocab_size",
    Length: "max_position_embeddings n_positions n_ctx max_seq_len seq_length sliding_window max_source_positions "
            "max_target_positions",
    Buckets: "position_bias_num_buckets position_bias_max_distance position_bias_num_segment_buckets prompt_types prompt_length "
             "segment_types num_labels",
    Small: "rms_norm_eps layer_norm_epsilon layer_norm_eps eps",
    Positive: "rope_theta rotary_emb_base distance_scale",
    Share: "rotary_pct attention_dropout dropout attn_pdrop embd_pdrop resid_pdrop",
    bool: "tie_word_embeddings use_dynamic_ntk use_logn_attn scale_attn_weights no_bias attention_bias mlp_bias enable_bias "
          "multi_query do_layer_norm_before use_sliding_window is_encoder_decoder scale_embedding use_cache "
          "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn layer_norm_elementwise_affine int4",
    Token: "bos_token_id pad_token_id decoder_start_token_id",
    Token | list[Token]: "eos_token_id",
    str: "model_type hidden_act activation_function torch_dtype",
    list[str]: "architectures layer_types",
    list[Token]: "suppress_tokens begin_suppress_tokens",
}, max_window_layers=Annotated[int, Field(ge=0, le=1000)], rope_scaling=Rope, rope_parameters=Rope,
    quantization_config=Quantization, attn_config=MptAttentionConfig)  # fmt: skip
Generation = _table("Generation", {
    Token: "bos_token_id pad_token_id decoder_start_token_id no_timestamps_token_id",
    Token | list[Token]: "eos_token_id",
    list[Token]: "suppress_tokens begin_suppress_tokens",
    dict[str, Token]: "lang_to_id task_to_id",
})  # fmt: skip
Index = create_model("Index", __base__=Strict, weight_map=(dict[str, str], ...))

SHARES = (  # each of the first is one of so many equal parts of the second, unless a key of the third gives its size
    ("num_attention_heads", "hidden_size", ("head_dim", "kv_channels", "dim_head")),
    ("n_head", "n_embd", ()), ("n_heads", "d_model", ()), ("decoder_attention_heads", "d_model", ()),
    ("encoder_attention_heads", "d_model", ()), ("num_key_value_heads", "num_attention_heads", ()),
)  # fmt: skip


def read_config(file: Path) -> dict:
    """config.json as it stands. Raises UserError where it is not a JSON object, or a value is not what its key can have."""
    config = read_json(file, "name a checkpoint folder with a config.json")
    check_config(config, file)
    return config


def read_generation(file: Path) -> dict:
    """generation_config.json as it stands. Raises UserError as read_config does."""
    config = read_json(file, "put the checkpoint's own there")
    check(config, Generation, file, REMEDY.format(name=file.name))
    return config


def read_index(file: Path) -> dict[str, str]:
    """The shard that each tensor lies in, from model.safetensors.index.json. Raises UserError as read_config does."""
    content = read_json(file, "download the index again")
    check(content, Index, file, REMEDY.format(name=file.name))
    if not content["weight_map"]:
        raise UserError(file, "has no tensors in its weight_map", "download the index again")
    return content["weight_map"]


def check_config(config: dict, where: object) -> None:
    """Raises UserError, naming the file `where`, the key, its value and what it can be."""
    check(config, Config, where, REMEDY.format(name=Path(str(where)).name))
    for parts, whole, sizes in SHARES:
        count, width = config.get(parts), config.get(whole)
        if count and width and width % count and not any(config.get(size) for size in sizes):
            raise UserError(where, f"{whole} {width} is not a multiple of {parts} {count}", REMEDY.format(name="config.json"))


def required(config: dict, key: str, where: object) -> Any:
    """The value of a key. Raises UserError where there is none."""
    if config.get(key) is None:
        raise UserError(where, f"has no '{key}'", REMEDY.format(name=Path(str(where)).name))
    return config[key]
