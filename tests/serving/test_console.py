"""The console in a real browser: a person asks, looks at why, reads groups and figures, by mouse and by keyboard."""

import re
import shutil

import pytest

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
