"""Checkpoints of the UFM: those made here (`tiny`, `small`), and how any Qwen2.5-VL checkpoint is loaded.

Both are the real Qwen2.5-VL architecture with Qwen's special tokens and a chat template of its form, so transformers
and vLLM load them like any other. `tiny` starts from nothing: random weights, a tokenizer trained on our own prompts.
`small` grafts the text model SmolLM2-135M (a Llama layer is a Qwen2 layer whose q, k, v biases are zero, and mRoPE
equals RoPE on text) under a new vision tower.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from gubs.artifacts import fingerprint_files
from gubs.errors import PlatformError, SettingsError
from gubs.llm.embedded import default_cache, prepare_embedded_model
from gubs.ufm.settings import ModelSettings, UFMSettings

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)
"""Special tokens of Qwen2.5-VL that its processor, chat template and generation need."""

ANSWER_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""In `tiny` one token each, not special: they stay in decoded text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_FORMAT = 5
"""Raised when what is made changes, so that older checkpoints are made anew."""
_TINY_VOCABULARY = 2048
_EMBEDDING_STD = 0.09
_PATCH, _MERGE = 14, 2


OnProgress = Callable[[int, int], None]
"""Told (lessons done, lessons in all)."""


def checkpoint(settings: ModelSettings, on_progress: OnProgress | None = None) -> Path:
    """Folder of the checkpoint to start from; makes it first where it is one of ours and not there yet.

    Raises:
        SettingsError: see `check`. PlatformError: see `init`.
    """
    check(settings)
    if not settings.path:
        return init(settings.size, lessons=settings.lessons, on_progress=on_progress)
    return Path(settings.path)


def check(settings: ModelSettings) -> None:
    """Looks whether there is, or can be made, a checkpoint to start from.

    Raises:
        SettingsError: `path` is not a Qwen2.5-VL checkpoint, or `size` not one that is made here.
    """
    if not settings.path:
        if settings.size not in _MAKERS:
            raise SettingsError(
                f"ufm.model.size={settings.size} is not made here: give a checkpoint, ufm.model.path=FOLDER"
            )
        return
    config = Path(settings.path) / "config.json"
    if not config.is_file():
        raise SettingsError(f"ufm.model.path={settings.path}: it has no config.json; give a checkpoint's folder")
    kind = json.loads(config.read_text()).get("model_type")
    if kind != "qwen2_5_vl":
        raise SettingsError(f"ufm.model.path={settings.path} holds a model of type {kind!r}, not 'qwen2_5_vl'")


def identity(ufm: UFMSettings, **_: object) -> str:
    """Identity of the checkpoint that training starts from: hash of its weights, or what is made here.

    Raises:
        SettingsError: see `check`.
    """
    settings = ufm.model
    check(settings)
    if not settings.path:
        return _home(settings.size, 0, settings.lessons).name
    return fingerprint_files(sorted(Path(settings.path).glob("*.safetensors")))


def made(settings: ModelSettings) -> bool:
    """Whether the checkpoint to start from is there already."""
    return bool(settings.path) or (_home(settings.size, 0, settings.lessons) / "config.json").is_file()


def init(
    size: str, folder: str | Path = "", seed: int = 0, lessons: int = 0, on_progress: OnProgress | None = None
) -> Path:
    """Makes a checkpoint, in a folder of its own in the user's cache unless `folder` is given; one that is there stays.

    Args:
        size: `tiny` or `small`.
        folder: where to.
        seed: of the new weights.
        lessons: steps of teaching for `tiny` (see lessons.py); 0 = random weights.
        on_progress: told of the lessons.

    Raises:
        SettingsError: another size. PlatformError: `small` needs the weights of SmolLM2, which are not installed.
    """
    if size not in _MAKERS:
        raise SettingsError(f"{size!r} is not made here, only {' and '.join(_MAKERS)} are")
    target = Path(folder) if folder else _home(size, seed, lessons)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        _MAKERS[size](temporary, seed)
        if lessons and size == "tiny":
            _teach(temporary, lessons, seed, on_progress)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(folder: str | Path, settings: ModelSettings, *, train: bool = False) -> Any:
    """The model of a checkpoint in `settings.dtype`, on the CPU; in evaluation mode unless `train`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, settings.dtype), attn_implementation=attention(settings)
    )
    if train and settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(train)


def attention(settings: ModelSettings) -> str:
    """The attention implementation: flash attention on GPUs that have it, in half precision; else SDPA."""
    if settings.attention != "auto":
        return settings.attention
    import importlib.util

    import torch

    half = settings.dtype == "bfloat16"
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if half and fits and importlib.util.find_spec("flash_attn") else "sdpa"


def _home(size: str, seed: int, lessons: int) -> Path:
    return default_cache() / f"ufm-{size}-v{_FORMAT}-{_recipe(size, seed, lessons)}"


def _teach(folder: Path, lessons: int, seed: int, on_progress: OnProgress | None) -> None:
    """Gives the model in a folder its lessons, in float32 and on all cores: a Ray job's driver is told to use one."""
    import torch

    from gubs.ufm.inputs import Inputs
    from gubs.ufm.lessons import teach
    from gubs.ufm.settings import InputSettings

    model = load(folder, ModelSettings(dtype="float32", gradient_checkpointing=False), train=True)
    before = torch.get_num_threads()
    torch.set_num_threads(cpu_threads(1))
    try:
        teach(model, Inputs(folder, InputSettings()), lessons, seed, on_progress)
    finally:
        torch.set_num_threads(before)
    model.eval().save_pretrained(folder)


@cache
def _recipe(size: str, seed: int, lessons: int) -> str:
    texts = "".join(_texts()) if size == "tiny" else ""
    return hashlib.sha256(f"{_FORMAT} {size} {seed} {lessons} {texts} {CHAT_TEMPLATE}".encode()).hexdigest()[:8]


def _make_tiny(folder: Path, seed: int) -> None:
    tokenizer = _train_tokenizer()
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": len(tokenizer),
        "rope_parameters": _rope(1e6, [4, 6, 6]),
    }
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
    config = _config(tokenizer, text, {**vision, "fullatt_block_indexes": [1]})
    model = _new_model(config, seed)
    _widen(model, seed)
    model.save_pretrained(folder)
    _save_processor(tokenizer, folder)


def _widen(model: Any, seed: int) -> None:
    """Draws the weights of a narrow model from N(0, 1 / fan-in), embeddings from N(0, 0.09^2), and keys like queries.

    The usual 0.02 is meant for widths of thousands: at 128 signals die out, and nothing is learned within minutes. Keys
    that begin as copies of the queries make each token find its equals from the start, which reading stands on
    (compare the mimetic initialisation of Trockman and Kolter, 2023).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                std = _EMBEDDING_STD if "embed" in name else min(_EMBEDDING_STD, weight[0].numel() ** -0.5)
                weight.normal_(0.0, std, generator=generator)
        for layer in model.model.language_model.layers:
            heads = layer.self_attn
            keys, queries = heads.k_proj.weight, heads.q_proj.weight
            dim = heads.head_dim
            shared = queries.view(len(keys) // dim, -1, dim, queries.shape[1])
            keys.copy_(shared[:, 0].reshape(keys.shape))


def _make_small(folder: Path, seed: int) -> None:
    """SmolLM2-135M as the text model; the vision tower is new and random."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = prepare_embedded_model()
    donor = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    c = donor.config
    head_dim = c.hidden_size // c.num_attention_heads
    text = {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "vocab_size": len(tokenizer),
        "rope_parameters": _rope(_theta(c), [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]),
    }
    vision = {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_heads": 4,
        "out_hidden_size": c.hidden_size,
    }
    config = _config(tokenizer, text, {**vision, "fullatt_block_indexes": [1, 3]})
    model = _new_model(config, seed).to(torch.bfloat16)
    _graft(model, donor)
    model.save_pretrained(folder)
    _save_processor(tokenizer, folder)


def _graft(model: Any, donor: Any) -> None:
    """Copies a Llama model's weights into the text part; biases, which Llama has not, become zero."""
    import torch

    target = model.model.language_model
    source = donor.model.state_dict()
    rows = source["embed_tokens.weight"].shape[0]
    with torch.no_grad():
        for name, weight in target.state_dict().items():
            if name == "embed_tokens.weight":
                weight[:rows] = source[name]
                weight[rows:] = source[name].mean(0)  # the vision tokens: like an average token
            elif name in source:
                weight.copy_(source[name])
            elif name.endswith(".bias"):
                weight.zero_()
            else:
                raise PlatformError(f"the donor model has no weight {name!r}: it is not of the Llama kind")


def _theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def _rope(theta: float, section: list[int]) -> dict[str, Any]:
    """mRoPE: the head's frequencies are dealt to time, height and width; the sections sum to half of the head."""
    return {"rope_type": "default", "type": "mrope", "mrope_section": section, "rope_theta": theta}


def _config(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": end},
        vision_config={**vision, "patch_size": _PATCH, "spatial_merge_size": _MERGE, "tokens_per_second": 2},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _new_model(config: Any, seed: int) -> Any:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    end = config.text_config.eos_token_id
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    return model


def _save_processor(tokenizer: Any, folder: Path) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


def _train_tokenizer() -> Any:
    """Byte-level BPE on our own prompts and the words of the simulated app; any other text falls back on bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY - len(ANSWER_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ANSWER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    """Prompts of all kinds about a simulated app that no run uses, and every whole number up to 600."""
    from gubs.ufm.lessons import corpus

    yield from corpus()


_MAKERS = {"tiny": _make_tiny, "small": _make_small}


def cpu_threads(workers_here: int, wanted: int = 0) -> int:
    """Threads for one of several workers on this machine."""
    return wanted or max(1, (os.cpu_count() or 1) // max(1, workers_here))


def beside(name: str, device: Any) -> ThreadPoolExecutor:
    """A thread for work ahead of the training.

    On a CPU it computes without a team of OpenMP threads: libgomp gives each thread its own, and in a process with more
    of them than CPUs none waits actively any more (SFT took 1.15 times as long).
    """
    import torch

    alone: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)} if device.type == "cpu" else {}
    return ThreadPoolExecutor(1, name, **alone)
