"""Checkpoints of the UFM: how `tiny` and `small` are made, and how any Qwen2.5-VL checkpoint is loaded.

Both have the real Qwen2.5-VL architecture, its special tokens and a chat template of the same form, so transformers
and vLLM load them like any other. `tiny` starts from random weights and a tokenizer trained on our own prompts.
`small` gives the text model SmolLM2-135M (a Llama layer is a Qwen2 layer whose q, k, v biases are zero, and mRoPE
equals RoPE on text) a new vision tower.
"""

import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from gubs.artifacts import JsonObject, fingerprint_files
from gubs.console import OnProgress
from gubs.errors import PlatformError, SettingsError
from gubs.llm.embedded import default_cache, prepare_embedded_model
from gubs.ufm.attention import install
from gubs.ufm.inputs import Inputs
from gubs.ufm.lessons import corpus, teach
from gubs.ufm.settings import InputSettings, ModelSettings, UFMSettings
from gubs.ufm.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS)
"""Special tokens that Qwen2.5-VL's processor, chat template and generation need."""

ANSWER_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each in `tiny`; not special, so they stay in decoded text."""

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
"""Raised when the checkpoints made here change, so that older ones are made again."""
_OWN_FORMAT = 1
"""The same for those taught a run's own words."""
_TINY_VOCABULARY = 2048
_EMBEDDING_STD = 0.09
_DONATED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps"),
)
"""Settings of SmolLM2 that `small` keeps."""


def checkpoint(settings: ModelSettings, on_progress: OnProgress | None = None, words: Vocabulary | None = None) -> Path:
    """Folder of the checkpoint to start from; `tiny` and `small` are made first if they are missing.

    Args:
        settings: which one.
        on_progress: gets the number of finished lesson steps.
        words: a run's own words, which `tiny` is taught instead of the simulated app's.

    Raises:
        SettingsError: see `check`. PlatformError: see `init`.
    """
    check(settings)
    if not settings.path:
        return init(settings.size, lessons=settings.lessons, on_progress=on_progress, words=words)
    return Path(settings.path)


def check(settings: ModelSettings) -> None:
    """Checks that a checkpoint to start from exists or can be made.

    Raises:
        SettingsError: `path` is not a Qwen2.5-VL checkpoint, or `size` cannot be made here.
    """
    if not settings.path:
        if settings.size not in _MAKERS:
            raise SettingsError(f"ufm.model.size={settings.size} is not made here: set ufm.model.path=FOLDER")
        return
    config = Path(settings.path) / "config.json"
    if not config.is_file():
        raise SettingsError(f"ufm.model.path={settings.path} has no config.json: give the folder of a checkpoint")
    kind = json.loads(config.read_text()).get("model_type")
    if kind != "qwen2_5_vl":
        raise SettingsError(f"ufm.model.path={settings.path} holds a model of type {kind!r}, not 'qwen2_5_vl'")


def identity(ufm: UFMSettings, **_: object) -> str:
    """Identity of the checkpoint that training starts from: a hash of its weights, or the recipe of one made here (of
    one in a run's own words without the words: they follow from the data set, which every training reads).

    Raises:
        SettingsError: see `check`.
    """
    settings = ufm.model
    check(settings)
    if not settings.path:
        return _home(settings.size, 0, settings.lessons).name + ("-own-words" if settings.own_words else "")
    return fingerprint_files(sorted(Path(settings.path).glob("*.safetensors")))


def exists(settings: ModelSettings, words: Vocabulary | None = None) -> bool:
    """Whether the checkpoint to start from exists already."""
    return bool(settings.path) or (_home(settings.size, 0, settings.lessons, words) / "config.json").is_file()


def init(
    size: str,
    folder: str | Path = "",
    seed: int = 0,
    lessons: int = 0,
    on_progress: OnProgress | None = None,
    words: Vocabulary | None = None,
) -> Path:
    """Makes a checkpoint if it does not exist yet, and returns its folder.

    Args:
        size: `tiny` or `small`.
        folder: where it goes; empty = a folder in the user's cache.
        seed: of the new weights.
        lessons: training steps on lessons for `tiny` (see lessons.py); 0 = random weights.
        on_progress: gets the number of finished lesson steps.
        words: see `checkpoint`; for `tiny` only.

    Raises:
        SettingsError: another size. PlatformError: `small` needs the weights of SmolLM2, which are not installed.
    """
    if size not in _MAKERS:
        raise SettingsError(f"{size!r} is not made here, only {' and '.join(_MAKERS)} are")
    words = words if size == "tiny" else None
    target = Path(folder) if folder else _home(size, seed, lessons, words)
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        tokenizer, model = _MAKERS[size](seed, words)
        model.save_pretrained(temporary)
        _save_processor(tokenizer, temporary)
        if lessons and size == "tiny":
            _teach(temporary, lessons, seed, on_progress, words)
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # otherwise another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load(folder: str | Path, settings: ModelSettings, *, train: bool = False) -> "Qwen2_5_VLForConditionalGeneration":
    """The model of a checkpoint in `settings.dtype`, on the CPU; in evaluation mode unless `train`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, settings.dtype), attn_implementation=attention(settings)
    )
    if attention(settings) == "sdpa":
        install(model)
    if train and settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(train)


def attention(settings: ModelSettings) -> str:
    """The attention implementation; auto = flash attention on GPUs that support it, in half precision; else SDPA."""
    if settings.attention != "auto":
        return settings.attention
    import importlib.util

    import torch

    half = settings.dtype == "bfloat16"
    supported = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if half and supported and importlib.util.find_spec("flash_attn") else "sdpa"


def _home(size: str, seed: int, lessons: int, words: Vocabulary | None = None) -> Path:
    return default_cache() / f"ufm-{size}-v{_FORMAT}-{_recipe(size, seed, lessons, words)}"


def _teach(folder: Path, lessons: int, seed: int, on_progress: OnProgress | None, words: Vocabulary | None) -> None:
    """Trains the model in a folder on lessons, in float32 and on all cores (Ray allows a job's driver only one)."""
    import torch

    model = load(folder, ModelSettings(dtype="float32", gradient_checkpointing=False), train=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(cpu_threads(1))
    try:
        teach(model, Inputs(folder, InputSettings()), lessons, seed, on_progress, words)
    finally:
        torch.set_num_threads(threads_before)
    model.eval().save_pretrained(folder)


def _recipe(size: str, seed: int, lessons: int, words: Vocabulary | None = None) -> str:
    if words is not None:
        return _own_recipe(words.identity, "".join(corpus(words)), seed, lessons)
    return _app_recipe(size, seed, lessons)


@cache
def _app_recipe(size: str, seed: int, lessons: int) -> str:
    texts = "".join(corpus()) if size == "tiny" else ""
    return hashlib.sha256(f"{_FORMAT} {size} {seed} {lessons} {texts} {CHAT_TEMPLATE}".encode()).hexdigest()[:8]


def _own_recipe(identity: str, texts: str, seed: int, lessons: int) -> str:
    text = f"{_FORMAT} {_OWN_FORMAT} {identity} {seed} {lessons} {texts} {CHAT_TEMPLATE}"
    return f"own-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _make_tiny(
    seed: int, words: Vocabulary | None = None
) -> "tuple[PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration]":
    tokenizer = _train_tokenizer(words)
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "fullatt_block_indexes": [1]}
    model = _new_model(tokenizer, text, vision, 1e6, seed)
    _widen(model, seed)
    return tokenizer, model


def _widen(model: "Qwen2_5_VLForConditionalGeneration", seed: int) -> None:
    """Draws the weights of a narrow model from N(0, 1 / fan-in), embeddings from N(0, 0.09^2), and keys like queries.

    The usual 0.02 is meant for widths of thousands: at 128, signals die out and nothing is learned within minutes. Keys
    that begin as copies of the queries make each token find its equals from the start, on which reading depends
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
            by_key_head = queries.view(len(keys) // heads.head_dim, -1, heads.head_dim, queries.shape[1])
            keys.copy_(by_key_head[:, 0].reshape(keys.shape))


def _make_small(
    seed: int,
    words: Vocabulary | None = None,  # noqa: ARG001 - it has been taught to read
) -> "tuple[PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration]":
    """SmolLM2-135M as the text model; the vision tower is new and random."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = prepare_embedded_model()
    donor = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    config = donor.config.to_dict()
    text = {name: config[name] for name in _DONATED}
    vision = {"depth": 4, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "fullatt_block_indexes": [1, 3]}
    model = _new_model(tokenizer, text, vision, config["rope_parameters"]["rope_theta"], seed).bfloat16()
    _graft(model, donor)
    return tokenizer, model


def _graft(model: "Qwen2_5_VLForConditionalGeneration", donor: "LlamaForCausalLM") -> None:
    """Copies a Llama model's weights into the text part; Llama has no biases, so they become zero."""
    import torch

    source = donor.model.state_dict()
    rows = len(source["embed_tokens.weight"])
    with torch.no_grad():
        for name, weight in model.model.language_model.state_dict().items():
            if name == "embed_tokens.weight":
                weight[:rows] = source[name]
                weight[rows:] = source[name].mean(0)  # the vision tokens: like an average token
            elif name in source:
                weight.copy_(source[name])
            elif name.endswith(".bias"):
                weight.zero_()
            else:
                raise PlatformError(f"the donor model has no weight {name!r}: it is not of the Llama kind")


def _new_model(
    tokenizer: "PreTrainedTokenizerBase", text: JsonObject, vision: JsonObject, theta: float, seed: int
) -> "Qwen2_5_VLForConditionalGeneration":
    """A model with random weights; mRoPE deals each head's frequencies to time, height and width as 2 : 3 : 3."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    end = ids["<|im_end|>"]
    share = text["hidden_size"] // text["num_attention_heads"] // 16
    section = [2 * share, 3 * share, 3 * share]
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": section, "rope_theta": theta}
    tower = {"out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2, "tokens_per_second": 2}
    words = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": end}
    config = Qwen2_5_VLConfig(
        text_config={**text, **words, "rope_parameters": rope},
        vision_config=vision | tower,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    return model


def _save_processor(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    images, videos = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    processor.save_pretrained(folder)


def _train_tokenizer(words: Vocabulary | None = None) -> "PreTrainedTokenizerBase":
    """Byte-level BPE on our own prompts and the words of the simulated app or of a run, whose tags stay in one piece
    (what is copied piece by piece is hard to learn); any other text falls back on bytes.
    """
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
    tokenizer.train_from_iterator(corpus(words), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ANSWER_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, single_word=True) for t in (words.names if words else ())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        clean_up_tokenization_spaces=False,
    )


_MAKERS = {"tiny": _make_tiny, "small": _make_small}


def cpu_threads(workers_here: int, wanted: int = 0) -> int:
    """Threads for one of several workers on this machine."""
    return wanted or max(1, (os.cpu_count() or 1) // max(1, workers_here))


def background_thread(name: str, device: "torch.device") -> ThreadPoolExecutor:
    """A thread that prepares work ahead of the training.

    On a CPU it computes without a team of OpenMP threads: libgomp gives each thread its own, and once a process has
    more of them than CPUs, none of them waits actively any more (SFT took 1.15 times as long).
    """
    import torch

    return ThreadPoolExecutor(1, name, partial(torch.set_num_threads, 1) if device.type == "cpu" else None)
