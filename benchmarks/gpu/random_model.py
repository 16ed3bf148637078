"""A Qwen2.5-VL of the size of the 7B or 3B with random weights: `python benchmarks/gpu/random_model.py FOLDER 7b`.

Speed and memory do not depend on the weights' values, and no download is needed. Tokenizer and processor are those of
`tiny`, with the 7B's vocabulary size.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_FULL = {"fullatt_block_indexes": [7, 15, 23, 31]}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, list[int]]] = {
    "7b": (
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        {**_VISION, **_FULL, "out_hidden_size": 3584},
        False,
        [16, 24, 24],
    ),
    "3b": (
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        {**_VISION, **_FULL, "out_hidden_size": 2048},
        True,
        [16, 24, 24],
    ),
    "toy": (
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
        },
        {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256}
        | {"fullatt_block_indexes": [1, 3]},
        False,
        [8, 12, 12],
    ),
}
"""Text, vision, whether the head is the embedding, mRoPE's sections. `toy` is for a look at the scripts on a CPU."""
_PROCESSOR = ("tokenizer*.json", "*processor*.json", "chat_template.jinja", "special_tokens_map.json")


def main() -> None:
    """Makes the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", choices=SIZES)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        make(args.folder, args.size)


def make(folder: Path, size: str) -> None:
    """Draws the weights, on the GPU if there is one."""
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from gubs.ufm.model import init

    tiny = init("tiny")
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(tiny).get_vocab()
    text, vision, tied, section = SIZES[size]
    end = vocabulary["<|im_end|>"]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": section, "rope_theta": 1e6}
    words = {"max_position_embeddings": 32768, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": end}
    config = Qwen2_5_VLConfig(
        text_config={**text, **words, "rope_parameters": rope, "rms_norm_eps": 1e-6},
        vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "tokens_per_second": 2},
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="4GB")
    for pattern in _PROCESSOR:
        for file in tiny.glob(pattern):
            shutil.copy(file, partial)
    partial.rename(folder)
    print(json.dumps({"folder": str(folder), "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
