"""The console in a real browser: a person asks, looks at why, reads groups and figures, by mouse and by keyboard."""

import base64
import io
import re
import shutil

import pytest
from PIL import Image
from ray import serve
from serving_helpers import make_filter
from video_files import frame_number, make_video, picture

from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.frame_store import FrameStore

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, service):
    """The console with a key typed in; any message in the browser's log and any request elsewhere fails the test."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    messages, elsewhere = [], []
    page.on("console", lambda m: messages.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((service.url, "data:", "blob:")) else elsewhere.append(r.url))
    service.traffic(filter_a=1.0)
    page.goto(service.url)
    page.get_by_label("This service asks for a key").fill(service.key)
    page.get_by_role("button", name="Use it").click()
    playwright.expect(page.get_by_role("heading", name="Which videos would this user skip?")).to_be_visible()
    playwright.expect(page.get_by_label("User")).not_to_have_value("")
    yield page
    assert [m for m in messages if "Failed to load resource" not in m] == [], "4xx are told on the page"
    assert elsewhere == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing scrolls sideways"
    context.close()


def accessible(page):
    violations = [
        f"{v['id']}: {v['help']} {v['nodes'][0]['html'][:120]}" for v in axe.Axe().run(page).response["violations"]
    ]
    assert violations == []


def ask(page, videos=("v1", "v2")):
    page.get_by_label("User").fill("u0")
    page.get_by_label("Candidates").fill("\n".join(videos))
    page.get_by_role("button", name="Ask").click()


def test_a_person_asks_and_looks_at_why(page):
    accessible(page)
    ask(page)
    row = page.get_by_role("row", name=re.compile("^v2"))
    playwright.expect(row).to_contain_text("drop")
    playwright.expect(row).to_contain_text("B: skip: the video")
    playwright.expect(row).to_contain_text("about cars")
    playwright.expect(page.get_by_role("row", name=re.compile("^v1"))).to_contain_text("keep")
    page.get_by_role("button", name="Why? v2").click()
    playwright.expect(page.get_by_role("heading", name="Why: Title 2")).to_be_visible()
    for whose in ("The user's own profile", "A similar user's", "The group's", "No profile"):
        playwright.expect(page.get_by_role("heading", name=whose)).to_be_visible()
    accessible(page)


def test_by_keyboard_alone(page):
    page.get_by_label("Candidates").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("v4")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    why = page.get_by_role("button", name="Why? v4")
    playwright.expect(why).to_be_visible()
    why.focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#why")).to_be_focused()


def test_an_error_is_told(page):
    page.get_by_label("User").fill("nobody")
    page.get_by_role("button", name="Ask").click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("unknown_user")


def test_groups_figures_and_the_api_page(page):
    ask(page)
    page.get_by_role("link", name="Groups").click()
    playwright.expect(page.get_by_role("heading", name="g00: Pet lovers")).to_be_visible()
    accessible(page)
    page.get_by_role("link", name="Live").click()
    playwright.expect(page.get_by_role("row", name=re.compile("^filter-a"))).to_be_visible()
    playwright.expect(page.locator("#figures")).to_contain_text("Median")
    playwright.expect(page.get_by_text("of the ingress replica that answered")).to_be_visible()
    accessible(page)
    page.get_by_role("link", name="API").click()
    playwright.expect(page.get_by_role("heading", name="POST /v1/filter")).to_be_visible()
    accessible(page)


def test_texts_are_never_markup(page):
    evil = "<img src=x onerror=alert(1)>"
    ask(page, (evil,))
    playwright.expect(page.get_by_role("row", name=re.compile("img src"))).to_be_visible()
    assert page.locator("#results img").count() == 0


def test_a_page_may_load_nothing_from_elsewhere(service):
    import httpx

    service.traffic(filter_a=1.0)
    headers = httpx.get(service.url).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    for path in ("/console/../settings.py", "/console/__init__.py", "/console/x.js", "/console/%2e%2e%2fsettings.py"):
        assert httpx.get(service.url + path).status_code == 404


NUMBERS = [10, 20, 30, 40]
"""The frames of v2, by the number that each shows."""


def picture_file(number, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def seeing(service, tmp_path_factory):
    """A version that shows frames, and has those of v2."""
    folder = tmp_path_factory.mktemp("seeing")
    store = FrameStore(str(folder / "store"), DecodeOptions(max_pixels=160 * 96))
    jpegs = [picture_file(n, "JPEG") for n in NUMBERS]
    decoded = Decoded(Verdict.OK, frames=jpegs, cover=jpegs[0], times_s=[0.0, 1.0, 2.0, 3.0], duration_s=4.0)
    store.write_part("v2", [("hash-of-v2", decoded)])
    usual, service.filter = service.filter, make_filter(folder / "run", frames={"v2": "hash-of-v2"}, store=store)
    service.deploy("seeing")
    service.filter = usual
    yield "seeing"
    serve.delete("seeing")


@pytest.fixture
def viewer(page, service, seeing):
    """The console in front of the version that shows frames."""
    service.traffic(seeing=1.0)
    return page


def shown_after(page, name):
    """Numbers on the frames that are shown once a person asks why; the browser has to draw each."""
    page.get_by_role("button", name=f"Why? {name}").click()
    frames = page.get_by_role("list", name="What the model saw").get_by_role("img")
    playwright.expect(frames.first).to_be_visible()
    assert all(frames.evaluate_all("images => images.map(i => i.complete && i.naturalWidth > 0)"))
    sources = frames.evaluate_all("images => images.map(i => i.src)")
    assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
    return [frame_number(base64.b64decode(s.partition(",")[2])) for s in sources]


def drop(page, name, kind, data):
    """A file is dragged from elsewhere onto the console."""
    make = """([name, type, text]) => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type }));
        return files;
    }"""
    dragged = page.evaluate_handle(make, [name, kind, base64.b64encode(data).decode()])
    page.get_by_label("Candidates").fill("")
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": dragged})


def test_the_frames_of_a_candidate_are_shown(viewer):
    ask(viewer, ("v2",))
    assert shown_after(viewer, "v2") == NUMBERS
    accessible(viewer)


def test_a_dropped_video_becomes_a_candidate(viewer, tmp_path):
    """Eight frames, spread over its two seconds; its name is its title."""
    file = make_video(tmp_path / "race cars.webm", codec="libvpx", size=(160, 96), frames=48)
    drop(viewer, file.name, "video/webm", file.read_bytes())
    playwright.expect(viewer.locator("#added")).to_have_text("race cars.webm: 8 frames taken")
    playwright.expect(viewer.get_by_label("Candidates")).to_have_value("race cars.webm")
    viewer.get_by_role("button", name="Ask").click()
    playwright.expect(viewer.get_by_role("row", name=re.compile("^race cars"))).to_contain_text("drop")
    numbers = shown_after(viewer, "race cars.webm")
    assert numbers == pytest.approx([3, 9, 15, 21, 27, 33, 39, 45], abs=1)


def test_a_dropped_picture_becomes_a_candidate(viewer):
    for kind, number in (("PNG", 99), ("JPEG", 77)):
        name = f"kittens.{kind}"
        drop(viewer, name, f"image/{kind.lower()}", picture_file(number, kind))
        playwright.expect(viewer.locator("#added")).to_have_text(f"{name}: 1 frame taken")
        viewer.get_by_role("button", name="Ask").click()
        playwright.expect(viewer.get_by_role("row", name=re.compile(f"^{name}"))).to_contain_text("keep")
        assert set(shown_after(viewer, name)) == {number}


def test_a_dropped_file_that_shows_nothing_is_told(viewer):
    for kind, says in (("video/mp4", "play"), ("image/png", "show"), ("text/plain", "play")):
        drop(viewer, "notes", kind, b"no pictures")
        playwright.expect(viewer.get_by_role("alert")).to_have_text(f"this browser cannot {says} the file")
        playwright.expect(viewer.get_by_label("Candidates")).to_have_value("")
