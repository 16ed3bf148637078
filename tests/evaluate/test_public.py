"""The stages `candidates` and `public` on files in MovieLens' layout: stored, shown, and rebuilt offline."""

import json
import shutil

import pytest
from evaluate_helpers import movielens_folder

from gubs import jobs, stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.protocols import from_table
from gubs.evaluate.public import read_feedback, stored_protocols
from gubs.evaluate.sheets import public_sheets

CHANGES = ("public.each=2", "least_profile=2", "evaluate.bootstrap=50", "sampled_users=15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return movielens_folder(tmp_path_factory.mktemp("public") / "data")


@pytest.fixture(scope="module")
def settings(folder):
    return load_settings("tiny", ["source.kind=movielens", f"source.path={folder}", *CHANGES])


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gubs.evaluate.baselines.statistics.TREES", 5)
        run = Run(tmp_path_factory.mktemp("public") / "run")
        stages.make(["public"], run, settings)
    return run


def test_the_manifest_says_how_candidates_were_drawn(run):
    info = run.artifact("candidates").manifest.info
    assert len(info["protocols"]) == 6
    facts = info["protocols"]["interacted / unseen, last in time"]
    assert (facts["users"], facts["positives"], facts["negatives"], facts["seed"]) == (15, 2, 2, 0)
    for word in ("ties", "masking", "order", "negatives_drawn", "unknown_item_rule"):
        assert word in facts
    protocols = stored_protocols(run.artifact("candidates"))
    assert [p.name for p in protocols] == list(info["protocols"])


def test_equal_data_and_seed_give_the_same_hash(run, settings, tmp_path):
    again = Run(tmp_path / "again")
    stages.make(["candidates"], again, settings)
    other = Run(tmp_path / "other")
    stages.make(["candidates"], other, settings.model_copy(update={"seed": 1}))
    digests = [r.artifact("candidates").manifest.info["digest"] for r in (run, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_stored_answers_stand_the_proof_and_give_the_figures(run):
    feedback = read_feedback(run.artifact("raw"))
    table = run.artifact("candidates").table("candidates")
    answers = run.artifact("public").table("answers").to_pandas()
    metrics = run.artifact("public").table("metrics").to_pandas()
    for protocol in stored_protocols(run.artifact("candidates")):
        candidates = from_table(table, feedback, protocol)
        part = answers[(answers["protocol"] == protocol.name) & (answers["method"] == "item kNN, top half")]
        assert len(part) == len(candidates)
        row = metrics[(metrics["protocol"] == protocol.name) & (metrics["method"] == "item kNN, top half")]
        (accuracy,) = row[row["name"] == "click_acc"]["value"]
        assert accuracy == pytest.approx((part["yes"] == part["positive"]).mean())
        assert set(row["averaging"]) == {"pooled", "per class", "per user"}


def test_tables_and_page_are_rebuilt_without_source_and_network(run, settings, folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run.uri, copy)
    jobs.evaluate_page(Run(copy), load_settings("tiny"))
    text = capsys.readouterr().out
    shown = ("always yes", "coin", "user's rate, threshold", "boosting, all", "SimUser, MovieLens (published)")
    for name in (*shown, "10 + 10, liked / disliked, last in time: ", "F1, mean over users (positive: click, per user"):
        assert name in text
    page = (copy / "evaluation.html").read_text()
    assert "Holm" in page
    assert run.artifact("candidates").manifest.info["digest"] in page
    with pytest.raises(ArtifactError, match="nothing evaluated yet"):
        jobs.evaluate_page(Run(tmp_path / "empty"), load_settings("tiny"))


def test_a_protocol_has_a_sheet_with_what_the_paper_prints_and_what_its_columns_mean(run):
    sheets = {s.title.split(":")[0].removeprefix("10 + 10, "): s for s in public_sheets([run.artifact("public")])}
    assert list(sheets) == list(run.artifact("candidates").manifest.info["protocols"])
    literature = sheets["interacted / unseen, random"]
    assert literature.columns == ["accuracy", "recall", "F1", "MCC", "F1, mean over users"]
    rows = {row.name: row for row in literature.rows}
    assert rows["G-UBS, MovieLens (published)"].cells == ["79.9", "76.2", "–", "–", "78.2"]
    assert rows["G-UBS, MovieLens (published)"].faint
    assert [c.split()[0] for c in rows["always yes"].cells] == ["50.0", "100.0", "66.7", "0.0", "66.7"]
    assert "user's rate, threshold" in rows
    assert not any("published" in row.name for row in sheets["liked / disliked, random"].rows)
    (zero,) = [n for n in literature.notes if n.startswith("0/0 = 0, no answer counts as wrong: ")]
    assert "F1 (positive: click, pooled, base rate 50.0 %)" in zero
    assert "F1, mean over users (positive: click, per user, base rate 50.0 %)" in zero


def test_a_published_table_is_audited_beside_the_runs_baselines(run, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("method,acc\nours,99.0\n")
    (tmp_path / "c.yaml").write_text("columns: {acc: accuracy}\npositives: 2\nnegatives: 2\n")
    jobs.audit(str(tmp_path / "t.csv"), tmp_path / "c.yaml", run.uri, "tiny", [], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {"always yes", "popularity", "user kNN", "boosting, all"} <= set(printed["bars"])
    metrics = {(m["method"], m["name"]): m for m in run.artifact("public").table("metrics").to_pylist()[::-1]}
    best = max(metrics[f"popularity, {rule}", "click_acc"]["value"] for rule in ("top half", "threshold"))
    assert printed["bars"]["popularity"]["accuracy"]["value"] == best
    assert printed["rows"][0]["against"]["popularity"] == {"accuracy": "above"}


def test_figures_come_as_json_too(run, settings, capsys):
    jobs.evaluate_public(run, settings, as_json=True)
    printed = json.loads(capsys.readouterr().out)["public"]
    assert {"metrics", "verdicts"} == set(printed)
    assert {"difference", "detectable", "p_holm", "effect", "word"} <= set(printed["verdicts"][0])


def test_data_without_enough_records_are_refused(settings, tmp_path):
    evaluate = settings.evaluate
    more = evaluate.model_copy(update={"public": evaluate.public.model_copy(update={"least_profile": 99})})
    with pytest.raises(InputError, match="no user has 2 \\+ 2 items and a profile"):
        stages.make(["candidates"], Run(tmp_path / "r"), settings.model_copy(update={"evaluate": more}))


@pytest.mark.parametrize(("kind", "filled"), [("movielens", ["public", "ranking"]), ("synthetic", ["ifvr"])])
def test_the_job_fills_the_tables_that_the_data_allow(kind, filled, settings, tmp_path, monkeypatch):
    done = []
    for name in ("public", "ranking", "ifvr"):
        monkeypatch.setattr(jobs, f"evaluate_{name}", lambda *_, name=name: done.append(name))
    monkeypatch.setattr(stages, "make", lambda *_, **__: None)
    source = settings.source.model_copy(update={"kind": kind})
    jobs.evaluate_job(Run(tmp_path / "r"), settings.model_copy(update={"source": source}))
    assert done == filled
