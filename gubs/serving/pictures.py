"""Pictures of candidates: from the frame store, sent with the request, or fetched and decoded from allowed places.

A file is fetched with limits on place, size and time, and decoded in the bounded process of `gubs.video`. The model
only ever gets arrays of pixels.
"""

import asyncio
import base64
import binascii
import hashlib
import io
import ipaddress
import queue
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

import numpy as np

from gubs.errors import GubsError
from gubs.serving.settings import LimitSettings
from gubs.video.clips import ByteCache, Clip
from gubs.video.decoded import USABLE, DecodeOptions
from gubs.video.decoder_process import DecoderProcess

if TYPE_CHECKING:
    from httpx import Response

_CACHE_BYTES = 256 << 20
DECODERS = 2
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SCAN = b"\xff\xda"
_MOST_SCANS = 20
"""Scans of a JPEG. Encoders write at most a dozen; each may cost as much as all pixels, and take only 12 bytes."""
_MOST_RATIO = 200
"""Longer side by shorter side; Qwen's processor refuses more, and a whole chunk with it."""
_MOST_ENCODED = 4
"""How often a path may be percent-encoded on top of itself."""


class PictureError(GubsError):
    """A candidate's pictures cannot be had; its message may be shown to the client."""

    exit_code = 3

    def __init__(self, message: str, *, retryable: bool = False):
        super().__init__(message)
        self.retryable = retryable


class Places:
    """The folders and URL prefixes that files may be read from."""

    def __init__(self, roots: Sequence[str]):
        self._folders = [
            Path(r.removeprefix("file://")).resolve() for r in roots if "://" not in r or r.startswith("file://")
        ]
        self._urls = [urlsplit(r) for r in roots if r.startswith(("https://", "http://"))]

    def local(self, uri: str) -> Path | None:
        """The file's path if it is in an allowed folder, links resolved; None for a URL.

        Raises:
            PictureError: it is nowhere that may be read.
        """
        if any(ord(c) < 32 or c == "\\" for c in uri):
            raise PictureError("this place is not allowed")
        scheme = _parts(uri).scheme
        if scheme in ("http", "https"):
            return None
        if scheme not in ("", "file"):
            raise PictureError("this place is not allowed")
        path = Path(uri.removeprefix("file://"))
        if not path.is_absolute():
            raise PictureError("this place is not allowed")
        path = path.resolve()
        if not any(path.is_relative_to(folder) for folder in self._folders) or not path.is_file():
            raise PictureError("this place is not allowed, or there is no such file")
        return path

    def address(self, uri: str) -> tuple[str, str]:
        """(Host to connect to, URL) of an allowed URL. The address is resolved once and must be public unless its
        prefix names an address itself, so that a name cannot lead into the own network.

        Raises:
            PictureError: no prefix allows it, or its name leads to a private address.
        """
        parts = _parts(uri)
        if parts.username or parts.password or not parts.hostname or "%" in parts.netloc or not _is_plain(parts.path):
            raise PictureError("this place is not allowed")
        if not any(_below(parts, root) for root in self._urls):
            raise PictureError("this place is not allowed")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            addresses = socket.getaddrinfo(parts.hostname, port, proto=socket.IPPROTO_TCP)
        except (OSError, ValueError):
            raise PictureError("this place cannot be reached") from None
        address = addresses[0][4][0]
        literal = _is_address(parts.hostname)
        if not literal and not _is_public(str(address)):
            raise PictureError("this place is not allowed")
        return str(address), uri


def _parts(uri: str) -> SplitResult:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        raise PictureError("this place is not allowed") from None
    return parts


def _is_plain(path: str) -> bool:
    """Whether a path leads nowhere else when the server decodes it, perhaps more than once: it has no `..`, and no
    slash, backslash or control character behind percent signs.
    """
    for _ in range(_MOST_ENCODED):
        decoded = unquote(path)
        if ".." in decoded or "\\" in decoded or decoded.count("/") != path.count("/"):
            return False
        if any(ord(c) < 32 for c in decoded):
            return False
        if decoded == path:
            return True
        path = decoded
    return False


def _below(parts: SplitResult, root: SplitResult) -> bool:
    same = (parts.scheme, parts.hostname, parts.port) == (root.scheme, root.hostname, root.port)
    return same and parts.path.startswith(root.path if root.path.endswith("/") else f"{root.path}/")


def _is_public(address: str) -> bool:
    """Whether an address is one of the internet, and no wrapping of a private one (NAT64, 6to4)."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(ip.packed[12:]) if ip in _NAT64 else ip.sixtofour or ip.ipv4_mapped
        if inner is not None:
            return inner.is_global
    return ip.is_global


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Pictures:
    """Clips of videos that the frame store does not have; thread-safe, with few decoder processes."""

    def __init__(self, roots: Sequence[str], limits: LimitSettings, options: DecodeOptions):
        self._places, self._limits, self._options = Places(roots), limits, options
        self._clips = ByteCache[Clip](_CACHE_BYTES, lambda clip: clip.frames.nbytes)
        self._free: queue.Queue[DecoderProcess] = queue.Queue()
        for _ in range(DECODERS):
            self._free.put(DecoderProcess(options, timeout_s=limits.fetch_s))

    def sent(self, frames: Sequence[str], *, cover: bool) -> Clip:
        """The clip of base64 JPEG frames.

        Raises:
            PictureError: one is not a picture, or too large.
        """
        data = [_decoded(frame) for frame in frames[: 1 if cover else None]]
        key = _key(data)
        return self._clips.get(f"sent-{key}{'-cover' if cover else ''}", lambda: self._from_jpegs(key, data, cover))

    def fetched(self, uri: str, *, cover: bool) -> Clip:
        """The clip of a file in an allowed place.

        Raises:
            PictureError: the place is not allowed, or the file cannot be fetched or decoded.
        """
        return self._clips.get(f"{uri}{'-cover' if cover else ''}", lambda: self._decode(uri, cover))

    def close(self) -> None:
        """Ends the decoder processes."""
        while not self._free.empty():
            self._free.get().close()

    def _decode(self, uri: str, cover: bool) -> Clip:
        with self._file(uri) as path:
            try:
                decoder = self._free.get(timeout=self._limits.fetch_s)
            except queue.Empty:
                raise PictureError("all decoders are busy") from None
            try:
                decoded = decoder.decode(str(path))
            finally:
                self._free.put(decoder)
        if decoded.verdict not in USABLE or not decoded.frames:
            raise PictureError(f"the video cannot be decoded: {decoded.verdict}")
        jpegs = [decoded.cover or decoded.frames[0]] if cover else decoded.frames
        key = _key(jpegs)
        return Clip(f"{key}-cover" if cover else key, _stacked(jpegs), 0.0 if cover else decoded.duration_s or 0.0)

    @contextmanager
    def _file(self, uri: str) -> Iterator[Path]:
        path = self._places.local(uri)
        if path is not None:
            if path.stat().st_size > self._limits.fetch_mb * 2**20:
                raise PictureError("the file is too large")
            yield path
            return
        with tempfile.NamedTemporaryFile(suffix=Path(urlsplit(uri).path).suffix[:8]) as copy:
            asyncio.run(self._download(uri, copy))  # in a thread without a loop
            copy.flush()
            yield Path(copy.name)

    async def _download(self, uri: str, copy: IO[bytes]) -> None:
        """Copies what is at a URL; connects to the address that was checked, and follows no redirect. The time limit is
        for all of it, header included: a server may send a byte now and then for days.
        """
        import httpx

        host, _ = self._places.address(uri)
        parts = urlsplit(uri)
        headers = {"Host": parts.netloc, "Accept-Encoding": "identity"}
        try:
            target = httpx.URL(uri).copy_with(host=host)
            async with (
                asyncio.timeout(self._limits.fetch_s),
                httpx.AsyncClient(timeout=self._limits.fetch_s, follow_redirects=False, trust_env=False) as client,
                client.stream("GET", target, headers=headers, extensions={"sni_hostname": parts.hostname}) as response,
            ):
                await self._copy(response, copy)
        except TimeoutError:
            raise PictureError("the file takes too long", retryable=True) from None
        except (httpx.HTTPError, httpx.InvalidURL):
            raise PictureError("the file cannot be fetched") from None

    async def _copy(self, response: "Response", copy: IO[bytes]) -> None:
        """Copies an answer as it is sent: compressed, a small one could become any size."""
        if response.status_code != 200:
            raise PictureError(f"the file's server answered {response.status_code}")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise PictureError("the file's server compresses it")
        size = 0
        async for block in response.aiter_raw():
            size += len(block)
            if size > self._limits.fetch_mb * 2**20:
                raise PictureError("the file is too large")
            copy.write(block)

    def _from_jpegs(self, key: str, data: Sequence[bytes], cover: bool) -> Clip:
        try:
            pictures = _resized(data, self._options, self._limits.frame_pixels)
        except (OSError, ValueError):
            raise PictureError("a frame is not a picture, or too large") from None
        if cover:
            return Clip(f"{key}-cover", pictures[:1])
        if len(pictures) % 2:  # the model merges pairs of frames
            pictures = np.concatenate([pictures, pictures[-1:]])
        return Clip(key, pictures, len(pictures) / 2.0)


def fitting(clip: Clip | None) -> Clip | None:
    """The clip, if the model takes pictures of its shape.

    Raises:
        PictureError: it does not.
    """
    if clip is not None:
        _, height, width, _ = clip.frames.shape
        if max(height, width) > _MOST_RATIO * min(height, width):
            raise PictureError(f"one side of its pictures is more than {_MOST_RATIO} times the other")
    return clip


def _key(files: Sequence[bytes]) -> str:
    """A key of pictures: of one joined text, others could be cut elsewhere and get the same."""
    return hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()


def _decoded(frame: str) -> bytes:
    try:
        return base64.b64decode(frame, validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("a frame is not base64") from None


def _resized(jpegs: Sequence[bytes], options: DecodeOptions, most: int) -> "np.ndarray":
    """Pictures as the decoder would have stored them. Raises ValueError or OSError."""
    from PIL import Image

    from gubs.video.decode import target_size

    images = []
    for jpeg in jpegs:
        if jpeg.count(_SCAN) > _MOST_SCANS:  # pixels cannot look like this marker
            raise ValueError("too many scans")
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            if image.width * image.height > most:
                raise ValueError("too many pixels")
            images.append(image.convert("RGB"))
    size = target_size(*images[0].size, options.min_pixels, options.max_pixels)
    return np.stack([np.asarray(image.resize(size)) for image in images])


def _stacked(jpegs: Sequence[bytes]) -> "np.ndarray":
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(j)).convert("RGB")) for j in jpegs])
