"""A word tokenizer and a random text encoder, written as they are published."""

import json
import pathlib

import numpy as np

from sora_jax.weights.tensor_files import write_tensors
from sora_jax.weights.text_encoders import config_from_encoder, encoder_shapes

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moves", "left", "right",
         "up", "down", "and", "green", "triangle")
UMT5 = {
    "model_type": "umt5", "architectures": ["UMT5EncoderModel"], "vocab_size": 32, "d_model": 24,
    "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}
TOWER = {
    "vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 1,
    "max_position_embeddings": 16,
}
CLIP = {"model_type": "clip_text_model", **TOWER}


def write_tokenizer(folder) -> pathlib.Path:
    """tokenizer.json of a tokenizer of words, which ends a text with </s>."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = [{"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, word in enumerate(WORDS[:3])]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [text, end],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)},
                  "unk_token": "<unk>"}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def write_encoder(folder, published: dict, seed: int = 0) -> pathlib.Path:
    """A folder of a random encoder: config.json and model.safetensors."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = encoder_shapes(config_from_encoder(published))
    tensors = {name: (0.3 * rng.normal(size=shape) + ("norm" in name)).astype(np.float32)
               for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(published))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder
