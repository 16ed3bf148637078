"""The report about a policy: what it says follows from the artifacts, and it can be looked at anywhere."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from artifact_helpers import put
from judged_run import POLICY, SETTINGS, make_run, put_bars, put_judged, stand_in

from gubs import stages
from gubs.artifacts import Run
from gubs.evaluate.breakdown import Judged, confusion_sheet, facts, slices_sheet, thresholds
from gubs.evaluate.judge import FILTER, GREEDY
from gubs.evaluate.verdicts import Verdict, Word
from gubs.records import Task
from gubs.report.cases import KINDS
from gubs.report.policy import _in_words, report, write_page
from gubs.ufm.questions import Questions


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Judged, and nothing more."""
    run = make_run(tmp_path_factory.mktemp("report"))
    put_judged(run)
    return run


@pytest.fixture(scope="module")
def run(bare, tmp_path_factory):
    """With baselines and answers to changed prompts."""
    whole = Run(tmp_path_factory.mktemp("whole") / "run")
    shutil.copytree(bare.root, whole.root)
    put_bars(whole)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        stages.make_stage(f"sensitivity-{POLICY}", whole, SETTINGS)
    return whole


@pytest.fixture(scope="module")
def made(run):
    return report(run, SETTINGS.evaluate, SETTINGS.seed)


def judged(run, task=Task.SEQUENTIAL):
    artifact = run.artifact(f"eval-{POLICY}")
    by_task = Judged.of(artifact.table("predictions").to_pylist(), artifact.manifest.info["decisions"])
    return next(j for j in by_task if j.task == task)


def test_verdicts_come_first_and_say_what_the_filter_is_worth(run, made):
    page = re.sub(r"\s+", " ", Path(write_page(run, made)).read_text())
    sentences = made.findings[0].sentences
    assert sentences[0].startswith("As a filter, it keeps ")
    assert any("random drop" in s for s in sentences)
    assert any(re.match(r"The greedy answers .*constants, a coin and random drop \([+-]", s) for s in sentences)
    assert any("logistic regression" in s for s in sentences)
    (kept,) = [s for s in sentences if s.startswith("In play rate at 70 % kept, the ")]
    assert "random drop (" in kept
    assert "logistic regression (" in kept
    assert "popularity" not in kept, "at the same share, chance and what was learned are the measure"
    assert sum("sequential: every predictor keeps 70 %" in s.title for s in made.sections[0].sheets) == 1
    (reward,) = [s for s in sentences if s.startswith("In reward (0 to 3), the calibrated answers ")]
    assert {"never skip", "always skip"} == set(re.findall(r"(never skip|always skip) \([+-]\d\.\d\d\)", reward))
    assert not any("never skip" in s for s in sentences if s != reward), "rewards are no points of accuracy"
    assert page.index("Verdicts") < page.index("Beside the baselines") < page.index("Slices") < page.index("Cases")


def test_a_verdict_names_three_of_each_kind_and_counts_the_rest():
    """The narrowest wins and the largest defeats; of eighteen baselines nobody reads all in a sentence."""
    beaten = [verdict(f"bar {n}", n / 100, Word.BETTER) for n in (9, 2, 5, 1, 7)]
    ahead = [verdict("boosting", -0.04, Word.WORSE), verdict("all", -0.06, Word.WORSE)]
    (sentence,) = _in_words([("The filter", v) for v in [*beaten, *ahead, verdict("near", 0.01, Word.UNKNOWN)]])
    assert sentence == (
        "The filter is better than 5 of 8: bar 1 (+1.0), bar 2 (+2.0), bar 5 (+5.0) and 2 more; "
        "is worse than all (-6.0), boosting (-4.0); cannot be told from near (+1.0) (95 users can show 3.0 points)."
    )


def test_what_ga_grpo_gained_is_a_sentence(run, tmp_path):
    """Wrong here: a policy is only compared with baselines, never with what it was trained from."""
    copy = Run(tmp_path / "run")
    shutil.copytree(run.root, copy.root)
    judged_now = copy.artifact(f"eval-{POLICY}")
    tables = {name: judged_now.table(name) for name in ("predictions", "held_out", "metrics")}
    put(copy, "eval-base", tables, settings=SETTINGS, info=judged_now.manifest.info)
    sentences = report(copy, SETTINGS.evaluate, SETTINGS.seed, POLICY).findings[0].sentences
    (gained,) = [s for s in sentences if s.startswith(f"{POLICY} against base: ")]
    assert "judge_balanced_acc +0.000, cannot tell" in gained
    assert "reward +0.000" in gained


def verdict(second: str, difference: float, word: Word) -> Verdict:
    return Verdict("judge_balanced_acc", "x", second, difference, 0, 0, 0, 0, 0, 0.03, 95, word)


def test_what_the_run_lacks_is_named_with_its_command(bare):
    made = report(bare, SETTINGS.evaluate, SETTINGS.seed)
    assert [re.search(r"`(.+)`", m)[1] for m in made.missing] == [
        f"gubs evaluate ifvr --run {bare.uri}",
        f"gubs evaluate sensitivity {POLICY} --run {bare.uri}",
    ]
    assert made.cases == []
    assert "gubs evaluate sensitivity" in Path(write_page(bare, made)).read_text()


def test_the_page_needs_nothing_else_and_shows_texts_as_texts(run, made):
    page = Path(write_page(run, made)).read_text()
    assert "Viewers &lt;b&gt;" in page
    assert "<script" not in page
    outside = re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"' >]+|url\((?!#)[^)]*\)""", page)
    assert outside == []
    assert page.count('src="data:image/jpeg;base64,') == sum(len(c.frames) for c in made.cases) > 4


def test_cases_are_the_first_of_their_kind(run, made):
    rows = run.artifact(f"sensitivity-{POLICY}").table("answers").to_pylist()
    own = [r for r in rows if r["condition"] == "own prompt" and r["task"] == "sequential"]
    drawn = [r["user_id"] + r["video_id"] for r in own]
    for kind in KINDS.values():
        cases = [c for c in made.cases if c.kind == kind and c.task == "sequential"]
        places = [drawn.index(c.user + c.video) for c in cases]
        assert places == sorted(places)
        assert len(cases) <= 2
    case = next(c for c in made.cases if c.task == "sequential" and c.kind == "Right skip")
    assert case.answers[0].condition == "own prompt"
    assert case.answers[0].option.startswith("B: ")
    assert len(case.frames) == 2
    assert case.history


def test_confusion_counts_every_target(run):
    j = judged(run)
    rows = j.by_mode[GREEDY]
    sheet = confusion_sheet(j, GREEDY)
    counted = [[int(cell.split()[0].replace(",", "")) for cell in r.cells] for r in sheet.rows]
    assert sum(total for total, *_ in counted) == len(rows)
    assert all(total == sum(cells) for total, *cells in counted)
    assert counted[0][1] == sum(r["gold"] == "A" and r["predicted"] == "A" for r in rows)


def test_thresholds_drop_what_is_likelier_to_be_skipped(run):
    j = judged(run)
    at = thresholds(j)
    skip, _ = j.scored()
    assert at["kept"][50] == pytest.approx((skip < 0.5).mean())
    assert at["lost"][0] == 1
    assert np.all(np.diff(at["kept"]) >= 0)
    chosen = j.decision["threshold"]["value"]
    kept = [r["predicted"] == "A" for r in j.by_mode[FILTER]]
    assert np.mean(kept) == pytest.approx((skip < chosen).mean()), "the line stands where the filter decides"


def test_small_slices_are_not_shown_and_named(run):
    j, questions = judged(run), Questions(run, SETTINGS.ufm.inputs)
    groups = {u: ["x" if n else "y"] for n, u in enumerate(sorted(questions.ifvr.split_users(Task.SEQUENTIAL, "test")))}
    facts_of = facts(questions.ifvr, Task.SEQUENTIAL, groups)
    assert all(
        sum(name.startswith(kind) for name in own) == 1 for own in facts_of.values() for kind in ("age", "activity")
    )
    size = sum(r["user_id"] in facts_of and "group: y" in facts_of[r["user_id"]] for r in j.by_mode[GREEDY])
    sheet = slices_sheet(j, facts_of, least=size + 1, resamples=20, seed=0)
    names = [r.name for r in sheet.rows]
    assert names[0] == "all"
    assert "group: x" in names
    assert "group: y" not in names
    assert f"group: y ({size})" in sheet.notes[0]
    assert int(sheet.rows[0].cells[1]) == len(j.by_mode[GREEDY])


def test_what_does_not_fit_together_is_told(run, tmp_path):
    copy = Run(tmp_path / "run")
    shutil.copytree(run.root, copy.root)
    put(copy, POLICY, {"steps": pa.table({"step": [1]})}, settings=SETTINGS)
    result = report(copy, SETTINGS.evaluate, SETTINGS.seed)
    assert [m.split(" was made from")[0] for m in result.stale] == [f"eval-{POLICY}", f"sensitivity-{POLICY}"]
    assert result.cases == []


def test_a_policy_that_answers_nothing_readable_has_a_page_too(bare, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(bare.root, run.root)
    old = run.artifact(f"eval-{POLICY}")
    rows = [r | {"predicted": None, "skip": None, "failure": "empty"} for r in old.table("predictions").to_pylist()]
    predictions = pa.Table.from_pylist(rows, schema=old.table("predictions").schema)
    put(run, "eval-mute", {"predictions": predictions, "metrics": old.table("metrics")}, settings=SETTINGS)
    made = report(run, SETTINGS.evaluate, SETTINGS.seed, "mute")
    assert any("calibration" in m for m in made.missing)
    assert "no option" in Path(write_page(run, made)).read_text()


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.engine
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desktop", "phone, dark"])
def test_the_page_is_accessible_and_fits(run, made, browser, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    page, messages = context.new_page(), []
    page.on("console", lambda m: messages.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(f"file://{write_page(run, made)}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing scrolls sideways"
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    narrow = "[...document.querySelectorAll('.sheet tbody th')].filter(e => e.clientWidth < 90).map(e => e.innerText)"
    assert page.evaluate(narrow) == [], "names of rows can be read"
    violations = axe.Axe().run(page).response["violations"]
    assert [f"{v['id']}: {v['help']} {v['nodes'][0]['html'][:120]}" for v in violations] == []
    assert messages == [], "axe is let in by the test, the page itself asks for nothing"
    context.close()


@pytest.mark.engine
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_print_cuts_nothing_and_is_light(run, made, browser):
    context = browser.new_context(viewport={"width": 718, "height": 1000}, color_scheme="dark")  # A4 without margins
    page = context.new_page()
    page.emulate_media(media="print")
    page.goto(f"file://{write_page(run, made)}")
    cut = page.evaluate(
        "[...document.querySelectorAll('.wide, .card, figure, svg')].filter(e => e.getBoundingClientRect().right > "
        "innerWidth + 1 || e.scrollWidth > e.clientWidth + 1).map(e => e.className + e.innerText.slice(0, 60))"
    )
    assert cut == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()
