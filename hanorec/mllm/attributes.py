"""What each setting of a checkpoint's config.json does here: honoured, without effect, or refused.

Transformers' own modules compute the vision tower and the layers, and honour what is theirs. What
this package does itself is attention over packed rows, positions, prompts and loading: there a
setting could be dropped without a word. So the table names every attribute of every configuration
class, and `hanorec.mllm.checks` refuses what is not allowed by it. A test walks the classes of the
installed Transformers and fails where they have an attribute that is not here; others compare the
logits under each.
"""

from hanorec.mllm.allowed import (
    AUTO_MAP,
    CAUSAL,
    FEATURE_LAYER,
    HEAD_WIDTH,
    LAST_STATES,
    LAYER_TYPES,
    LAYERS,
    MROPE,
    NOT_CAUSAL,
    ONE_TYPE,
    QUANTIZATION,
    RETURN_DICT,
    RGB,
    ROPE,
    STRATEGY,
    TOWER_ROPE,
    WINDOW,
    Only,
)

HONOURED = "honoured"  # logits are Transformers' own, whatever the value
NO_EFFECT = "no effect"  # logits are the same, whatever the value

Table = dict[str, str | Only]


def all_of(verdict: str, names: str) -> Table:
    """One verdict for several names, which stand in one string."""
    return dict.fromkeys(names.split(), verdict)


COMMON = {
    **all_of(NO_EFFECT, "architectures transformers_version output_hidden_states problem_type"),
    **all_of(NO_EFFECT, "id2label label2id is_encoder_decoder chunk_size_feed_forward"),
    "dtype": NO_EFFECT,  # --dtype decides
    "return_dict": RETURN_DICT,
}

# ---- the whole model ----

MLLM = COMMON | all_of(HONOURED, "text_config vision_config tie_word_embeddings")
QWEN = {
    **MLLM,
    **all_of(HONOURED, "image_token_id vision_start_token_id vision_end_token_id"),
    "video_token_id": NO_EFFECT,  # no prompt has a video
}
LLAVA = {
    **MLLM,
    **all_of(HONOURED, "image_token_index projector_hidden_act multimodal_projector_bias"),
    "image_grid_pinpoints": HONOURED,  # those of at most --max-pixels
    "vision_feature_layer": FEATURE_LAYER,
    "vision_feature_select_strategy": STRATEGY,
    "image_seq_length": NO_EFFECT,  # features are counted
}

# ---- the language model ----

TEXT = {
    **COMMON,
    **all_of(HONOURED, "vocab_size hidden_size intermediate_size hidden_act rms_norm_eps"),
    **all_of(HONOURED, "num_hidden_layers num_attention_heads num_key_value_heads"),
    "attention_dropout": HONOURED,  # in training
    "max_position_embeddings": HONOURED,  # longer rows are refused
    "rope_parameters": ROPE,
    **all_of(NO_EFFECT, "initializer_range use_cache pad_token_id bos_token_id"),
    "eos_token_id": NO_EFFECT,  # an answer ends as the template and the tokenizer say
}
WINDOWS = {  # rows longer than a window are refused
    **all_of(HONOURED, "use_sliding_window max_window_layers"),
    "sliding_window": WINDOW,
    "layer_types": LAYER_TYPES,
}
QWEN_TEXT = TEXT | WINDOWS | {"rope_parameters": MROPE}
LLAMA = {
    **TEXT,
    **all_of(HONOURED, "attention_bias mlp_bias head_dim tie_word_embeddings"),
    "pretraining_tp": NO_EFFECT,
}
MISTRAL = TEXT | all_of(HONOURED, "head_dim tie_word_embeddings") | {"sliding_window": WINDOW}
QWEN2 = TEXT | WINDOWS | {"tie_word_embeddings": HONOURED}

# ---- the vision tower ----

QWEN_TOWER = {
    **COMMON,
    **all_of(HONOURED, "depth hidden_size hidden_act num_heads"),
    **all_of(HONOURED, "patch_size spatial_merge_size temporal_patch_size"),
    "in_channels": RGB,
    "rope_parameters": TOWER_ROPE,
    "initializer_range": NO_EFFECT,
}
QWEN2_5_TOWER = {
    **QWEN_TOWER,
    **all_of(HONOURED, "intermediate_size out_hidden_size window_size fullatt_block_indexes"),
    "tokens_per_second": NO_EFFECT,  # of a video
}
TOWER = {
    **COMMON,
    **all_of(HONOURED, "hidden_size intermediate_size num_hidden_layers num_attention_heads"),
    **all_of(HONOURED, "image_size patch_size hidden_act layer_norm_eps"),
    "num_channels": RGB,
    "attention_dropout": NO_EFFECT,  # it is never trained
}

ATTRIBUTES: dict[str, Table] = {
    "Qwen2VLConfig": QWEN,
    "Qwen2VLTextConfig": QWEN_TEXT,
    "Qwen2VLVisionConfig": QWEN_TOWER | all_of(HONOURED, "embed_dim mlp_ratio"),
    "Qwen2_5_VLConfig": QWEN,
    "Qwen2_5_VLTextConfig": QWEN_TEXT,
    "Qwen2_5_VLVisionConfig": QWEN2_5_TOWER,
    "LlavaNextConfig": LLAVA,
    "LlamaConfig": LLAMA,
    "MistralConfig": MISTRAL,
    "Qwen2Config": QWEN2,
    "CLIPVisionConfig": TOWER
    | all_of(NO_EFFECT, "projection_dim initializer_range initializer_factor"),
    "SiglipVisionConfig": TOWER | {"vision_use_head": NO_EFFECT},
}

# ---- what no class lists, though Transformers reads it where config.json has it ----

EVERYWHERE = {
    "quantization_config": QUANTIZATION,
    "per_layer_config": LAYERS,
    "auto_map": AUTO_MAP,
    "tie_last_hidden_states": LAST_STATES,
    "output_attentions": NO_EFFECT,
    "is_causal": NOT_CAUSAL,
}
OF_QWEN_TEXT = {"is_causal": CAUSAL, "head_dim": HEAD_WIDTH, "tie_word_embeddings": HONOURED}
UNLISTED: dict[str, Table] = {
    "Qwen2VLTextConfig": OF_QWEN_TEXT,
    "Qwen2_5_VLTextConfig": OF_QWEN_TEXT,
    "Qwen2_5_VLVisionConfig": {"head_dim": HEAD_WIDTH},
    "LlamaConfig": {"is_causal": CAUSAL},
    "MistralConfig": {"is_causal": CAUSAL, "layer_types": ONE_TYPE},
    "Qwen2Config": {"is_causal": CAUSAL, "head_dim": HONOURED},
}

# Which classes may stand in text_config and in vision_config.
PARTS = {
    "Qwen2VLConfig": (["Qwen2VLTextConfig"], ["Qwen2VLVisionConfig"]),
    "Qwen2_5_VLConfig": (["Qwen2_5_VLTextConfig"], ["Qwen2_5_VLVisionConfig"]),
    "LlavaNextConfig": (
        ["LlamaConfig", "MistralConfig", "Qwen2Config"], ["CLIPVisionConfig", "SiglipVisionConfig"]
    ),
}
