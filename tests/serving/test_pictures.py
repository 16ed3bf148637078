"""Pictures from outside: only from allowed places, bounded, and never a reason to crash."""

import base64
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image
from video_files import make_video

from gubs.serving.pictures import PictureError, Pictures, Places, fitting
from gubs.serving.settings import LimitSettings
from gubs.video.clips import Clip
from gubs.video.decoded import DecodeOptions

OPTIONS = DecodeOptions(count=4, max_pixels=56 * 56, min_pixels=56 * 56)


def jpeg(width=64, height=48, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "{root}/../secret.mp4",
        "{root}/link.mp4",
        "{root}/missing.mp4",
        "{root}",
        "relative.mp4",
        "ftp://cdn.example.com/videos/a.mp4",
        "gopher://x",
        "data:video/mp4;base64,AAAA",
        "{root}\\..\\secret.mp4",
        "{root}/a.mp4\nHost: x",
        "\\\\host\\share",
        "s3://bucket/a.mp4",
    ],
)
def test_files_outside_the_allowed_folders_are_not_opened(tmp_path, uri):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"x")
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    places = Places([str(root)])
    assert places.local(f"{root}/a.mp4") == root / "a.mp4"
    assert places.local(f"file://{root}/a.mp4") == root / "a.mp4"
    with pytest.raises(PictureError):
        places.local(uri.format(root=root))


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1/videos/a.mp4",
        "http://localhost/videos/a.mp4",
        "http://[::1]/videos/a.mp4",
        "https://cdn.example.com.evil.org/videos/a.mp4",
        "https://cdn.example.com@evil.org/videos/a.mp4",
        "https://evil.org/videos/a.mp4",
        "https://cdn.example.com/other/a.mp4",
        "https://cdn.example.com/videos/../other/a.mp4",
        "https://cdn.example.com/videosX/a.mp4",
        "https://cdn.example.com:8443/videos/a.mp4",
        "http://cdn.example.com/videos/a.mp4",
        "https://cdn.example.com%2eevil.org/videos/a.mp4",
        "https:///videos/a.mp4",
        "https://cdn.example.com/videos/%2e%2e/private/a.mp4",
        "https://cdn.example.com/videos/.%2E/private/a.mp4",
        "https://cdn.example.com/videos/%252e%252e/private/a.mp4",
        "https://cdn.example.com/videos/%25252525252e%25252525252e/private/a.mp4",
        "https://cdn.example.com/videos/..%2fprivate/a.mp4",
        "https://cdn.example.com/videos/a%2fb.mp4",
        "https://cdn.example.com/videos/a%5cb.mp4",
        "https://cdn.example.com/videos/a%0d%0ab.mp4",
    ],
)
def test_urls_outside_the_allowed_prefixes_are_not_asked(monkeypatch, uri):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 443))])
    places = Places(["https://cdn.example.com/videos/"])
    for good in ("a.mp4", "My%20film%20100%25.mp4", "ü.mp4"):
        assert places.address(f"https://cdn.example.com/videos/{good}")[0] == "93.184.216.34"
    with pytest.raises(PictureError):
        places.address(uri)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.5", "169.254.169.254", "192.168.1.1", "::1", "fd00::1", "0.0.0.0"),
        *("64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::ffff:10.0.0.5"),
    ],
)
def test_a_name_that_leads_into_the_own_network_is_not_asked(monkeypatch, address):
    """Rebinding: the address is resolved once, checked, and connected to."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    with pytest.raises(PictureError):
        Places(["https://cdn.example.com/videos/"]).address("https://cdn.example.com/videos/a.mp4")


@pytest.mark.parametrize("answers", [["93.184.216.34", "10.0.0.5"], ["10.0.0.5", "93.184.216.34"]])
def test_what_was_checked_is_connected_to(monkeypatch, tmp_path, answers):
    """A name whose address changes between the look and the use; its server is still told the name."""
    asked = []

    def answer(request):
        asked.append((request.url.host, request.headers["host"], request.extensions["sni_hostname"]))
        return httpx.Response(404)

    class Client(httpx.AsyncClient):
        def __init__(self, **how):
            super().__init__(**how, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(httpx, "AsyncClient", Client)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (answers.pop(0), 443))])
    first, pictures = answers[0], Pictures(["https://cdn.example.com/videos/"], LimitSettings(), OPTIONS)
    try:
        with pytest.raises(PictureError):
            pictures.fetched("https://cdn.example.com/videos/a.mp4", cover=False)
    finally:
        pictures.close()
    name = "cdn.example.com"
    assert asked == ([] if first.startswith("10.") else [(first, name, name)])
    assert len(answers) == 1, "it is resolved once"


class Server(BaseHTTPRequestHandler):
    """A file server that redirects, compresses, dawdles and never ends, by path."""

    video = b""

    def do_GET(self):
        if "drip" in self.path:
            self.drip("header" in self.path)
            return
        if self.path.endswith("redirect.mp4"):
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
            return
        self.send_response(200)
        if self.path.endswith("zipped.mp4"):
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.path.endswith("video.mp4"):
            self.wfile.write(self.video)
            return
        size = 3 << 20 if self.path.endswith("large.mp4") else 100
        try:
            for _ in range(size // 100):
                self.wfile.write(b"x" * 100)
        except OSError:
            return

    def drip(self, header):
        """A byte now and then, for longer than anybody should wait."""
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: " + (b"" if header else b"x\r\n\r\n"))
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files():
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v/"
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("redirect.mp4", "answered 302"),
        ("large.mp4", "too large"),
        ("noise.mp4", "cannot be decoded"),
        ("zipped.mp4", "compresses"),
    ],
)
def test_what_a_server_sends_is_bounded(files, name, says):
    pictures = Pictures([files], LimitSettings(fetch_mb=1, fetch_s=20), OPTIONS)
    try:
        with pytest.raises(PictureError, match=says):
            pictures.fetched(f"{files}{name}", cover=False)
    finally:
        pictures.close()


@pytest.mark.parametrize("name", ["drip.mp4", "drip-header.mp4"])
def test_a_server_that_sends_a_byte_now_and_then_is_left(files, name):
    """Each byte in time, and the whole never: it would keep one of two threads for days."""
    pictures = Pictures([files], LimitSettings(fetch_s=0.5), OPTIONS)
    began = time.monotonic()
    with pytest.raises(PictureError, match="too long"):
        pictures.fetched(f"{files}{name}", cover=False)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("cover", [False, True])
def test_an_unknown_video_is_fetched_and_decoded(files, tmp_path, monkeypatch, cover):
    """From a folder and from a server: the same frames."""
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setattr(Server, "video", path.read_bytes())
    pictures = Pictures([files, str(tmp_path)], LimitSettings(), OPTIONS)
    try:
        near, far = (pictures.fetched(uri, cover=cover) for uri in (str(path), f"{files}video.mp4"))
    finally:
        pictures.close()
    assert near.frames.shape == far.frames.shape == (1 if cover else 4, 56, 56, 3)
    assert (near.frames == far.frames).all()
    assert near.key == far.key


def test_pictures_that_are_cut_elsewhere_are_others(monkeypatch):
    """Their key is also the engine's: a client could otherwise give its own pictures to another's request."""
    monkeypatch.setattr(
        Pictures, "_from_jpegs", lambda _, key, data, cover: Clip(key, np.zeros((2, 2, 2, 3), np.uint8))
    )
    pictures = Pictures([], LimitSettings(), OPTIONS)
    whole, half = (base64.b64encode(b).decode() for b in (b"onetwo", b"one"))
    rest = base64.b64encode(b"two").decode()
    assert pictures.sent([whole], cover=False).key != pictures.sent([half, rest], cover=False).key


def test_frames_of_a_request_become_a_clip():
    pictures = Pictures([], LimitSettings(), OPTIONS)
    clip = pictures.sent([jpeg(), jpeg(), jpeg()], cover=False)
    assert clip.frames.shape == (4, 56, 56, 3), "an even number, on the model's grid"
    assert pictures.sent([jpeg(), jpeg(), jpeg()], cover=False) is clip
    assert pictures.sent([jpeg()], cover=True).kind == "image"


def scans(more, **how):
    """A JPEG whose last scan comes so many times more."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((256, 256, 3), 90, np.uint8)).save(buffer, "JPEG", **how)
    whole = buffer.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return base64.b64encode(whole[:-2] + last * more + whole[-2:]).decode()


def test_a_frame_of_very_many_scans_is_refused_undecoded(monkeypatch):
    """Twelve bytes each, and each costs as much as all pixels: one frame could take 39 s."""
    pictures = Pictures([], LimitSettings(), OPTIONS)
    assert pictures.sent([scans(0, progressive=True)], cover=True)
    monkeypatch.setattr(Image, "open", None)
    for how in ({"progressive": True}, {}):
        with pytest.raises(PictureError):
            pictures.sent([scans(60, **how)], cover=True)


@pytest.mark.parametrize(("shape", "fits"), [((28, 28 * 200), True), ((28 * 256, 28), False), ((28, 28 * 256), False)])
def test_pictures_that_the_model_refuses_are_one_candidates_error(shape, fits):
    clip = Clip("long", np.zeros((2, *shape, 3), np.uint8))
    if fits:
        assert fitting(clip) is clip
    else:
        with pytest.raises(PictureError, match="200 times"):
            fitting(clip)
    assert fitting(None) is None


@pytest.mark.parametrize(
    "frame",
    ["not base64!", base64.b64encode(b"no picture").decode(), jpeg(kind="PNG"), jpeg(2000, 2000), "", jpeg()[:60]],
)
def test_a_bad_frame_is_an_error_of_its_candidate(frame):
    with pytest.raises(PictureError):
        Pictures([], LimitSettings(), OPTIONS).sent([frame], cover=False)
