"""Making cells: what is shared, what is kept, what resumes, what is refused. Makers are stand-ins; stages are real."""

import contextlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from small_world import WORLD

from gubs import stages
from gubs.ablate import again, command, sheet
from gubs.ablate.cells import Store, estimate, make_cell, standing, to_make
from gubs.ablate.command import ablate
from gubs.ablate.grid import Cell, Choice, cells, find_grid
from gubs.artifacts import Run, StageJob, fingerprint
from gubs.errors import ArtifactError
from gubs.evaluate.arms import compare_arms, read_answers
from gubs.evaluate.bars import STORED
from gubs.evaluate.judge import HELD_OUT, MODES, PREDICTIONS, decided_again
from gubs.evaluate.sensitivity import ANSWERS
from gubs.evaluate.sheets import print_sheet
from gubs.stages import StaleError, Status

OWN = [*WORLD, "evaluate.bootstrap=200"]


class Makers:
    """Stand-ins for all stages but the simulated data: they write what decides them, and note who was made where."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.fails_at = ""

    def load(self, place: str):
        real = {"gubs.simulator.stage:make_raw", "gubs.simulator.stage:make_truth", "gubs.data.build:make"}
        if place in real:
            return REAL(place)
        if place.endswith((":identity", ":files_identity")):
            return lambda **_: "of what lies outside"
        return (lambda _: "page") if place.endswith(":write_page") else self.make

    def make(self, job: StageJob, **_: object) -> str:
        if job.stage == self.fails_at:
            raise ArtifactError("killed")
        self.made.append((Path(job.run.root).name, job.stage))
        with job.writing() as out:
            out.write_table("key", pa.table({"key": [fingerprint(job.stage, job.recipe.model_dump())]}))
            if job.stage.startswith("eval-"):
                out.write_table("predictions", pa.Table.from_pylist(answers(job), schema=PREDICTIONS))
                out.write_table("held_out", pa.Table.from_pylist(held_out(job), schema=HELD_OUT))
            if job.stage.startswith("sensitivity-"):
                out.write_table("answers", pa.Table.from_pylist(changed(job), schema=ANSWERS))
            if job.stage == "bars":
                bar_rows = [{**r, "method": "logistic, by reward", "score": r["skip"]} for r in answers(job)]
                out.write_table("predictions", pa.Table.from_pylist(bar_rows, schema=STORED))
                out.info = {"sequential": {"by_reward": ["logistic, by reward"]}}
            if job.stage == "grpo":
                steps = {"reward_raw/T": [1.0, 2.0, 2.5]}
                out.write_table("steps", pa.table(steps))
                out.info = {"tasks": ["sequential", "click"]}
            out.summary = "made"
        return out.summary


REAL = stages._load


def answers(job: StageJob) -> list[dict[str, object]]:
    """Thirty users with four targets each; the policy of rule `weighted` is right more often than others and bars."""
    good = job.run.name.startswith("weighted")
    rows = []
    for n in range(120):
        gold = "ABCD"[n % 4]
        option = gold if good or n % 3 else "B"
        for mode in MODES:
            rows.append(
                {
                    "interaction_id": f"i{n:03}",
                    "user_id": f"u{n % 30:02}",
                    "task": "sequential",
                    "mode": mode,
                    "natural": True,
                    "balanced": True,
                    "gold": gold,
                    "predicted": option,
                    "skip": 0.2 if option == "A" else 0.8,
                    "reward": 3.0 if option == gold else 1.0,
                    "play_rate": 0.9 if gold == "A" else 0.1,
                }
            )
    return rows


def held_out(job: StageJob) -> list[dict[str, object]]:
    """The same answers as those of held-out users."""
    rows = [r for r in answers(job) if r["mode"] == "greedy"]
    return [{**r, "skipped": r["gold"] != "A", "options": [1 - r["skip"], r["skip"], 0.0, 0.0]} for r in rows]


def changed(job: StageJob) -> list[dict[str, object]]:
    """Reversed histories change nothing; with permuted letters it always says A."""
    rows = [r for r in answers(job) if r["mode"] == "greedy"]
    return [
        {
            **r,
            "condition": condition,
            "video_id": "v",
            **({"predicted": "A", "skip": 0.1} if "letters" in condition else {}),
        }
        for condition in ("own prompt", "history reversed", "letters permuted", "no title")
        for r in rows
    ]


def aged(folder: Path, stage: str, version: int) -> None:
    """Says that an earlier version made a stage."""
    manifest = folder / stage / "manifest.json"
    content = json.loads(manifest.read_text())
    content["recipe"]["version"] = version
    manifest.write_text(json.dumps(content))


@pytest.fixture
def makers(monkeypatch) -> Makers:
    made = Makers()
    monkeypatch.setattr(stages, "_load", made.load)
    monkeypatch.setattr(stages, "_preflight", lambda *_: None)
    for module in (stages, command, again):
        monkeypatch.setattr(module, "ray_session", lambda _: contextlib.nullcontext())
    return made


def chosen(
    name: str = "rule", arms=("plain", "weighted"), worlds=(0,), seeds=(0, 1), levels=(), *more: str
) -> list[Cell]:
    return cells(name, Choice(worlds, seeds, arms, levels), "tiny", [*OWN, *more])


def made_by(makers: Makers, stage: str) -> list[str]:
    return [run for run, name in makers.made if name == stage]


def test_cells_share_what_they_have_in_common(tmp_path, makers):
    """Data once per world, SFT once per world and seed, GA-GRPO once per cell."""
    store = Store(Run(tmp_path))
    for cell in chosen(worlds=(0, 1)):
        make_cell(cell, store)
    counts = {n: len(made_by(makers, n)) for n in ("frames", "ugm", "sft", "labels", "sft_model", "grpo", "eval-grpo")}
    assert counts == {"frames": 2, "ugm": 2, "sft": 2, "labels": 2, "sft_model": 4, "grpo": 8, "eval-grpo": 8}
    later = store.run(chosen()[-1])
    assert Path(later.path("ifvr")).is_symlink()
    assert not Path(later.path("grpo")).is_symlink()
    assert later.artifact("grpo").manifest.recipe.settings["ufm.seed"] == 1
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Store(Run(moved)).run(chosen()[-1]).has("ifvr"), "links hold when the folder moves"


def test_arms_that_change_groups_share_all_but_groups(tmp_path, makers):
    store = Store(Run(tmp_path))
    for cell in chosen("T5", (), (0,), (0,)):
        make_cell(cell, store)
    assert {n: len(made_by(makers, n)) for n in ("sft_model", "ugm", "grpo")} == {"sft_model": 1, "ugm": 3, "grpo": 3}


def test_two_ablations_in_a_folder_share_equal_policies(tmp_path, makers):
    """`weighted` of the advantage rules is what other grids call by other names."""
    for name, arm in (("rule", "weighted"), ("T10", "all three"), ("T9", "pictures")):
        store = Store(Run(tmp_path))  # as another command does
        make_cell(chosen(name, (arm,), seeds=(0,))[0], store)
    assert len(made_by(makers, "grpo")) == len(made_by(makers, "eval-grpo")) == 1


def test_levels_of_noise_have_logs_of_their_own(tmp_path, makers):
    store = Store(Run(tmp_path))
    for cell in chosen("noise", ("plain", "weighted, oracle", "SFT"), (0,), (0,), ("0 %", "40 %")):
        make_cell(cell, store)
    counts = {n: len(made_by(makers, n)) for n in ("videos", "sft_model", "oracle", "ugm", "grpo", "eval-sft_model")}
    assert counts == {"videos": 2, "sft_model": 2, "oracle": 2, "ugm": 0, "grpo": 4, "eval-sft_model": 2}


def test_a_finished_cell_is_never_made_again_and_a_killed_one_goes_on(tmp_path, makers):
    makers.fails_at = "eval-grpo"
    with pytest.raises(ArtifactError, match="killed"):
        ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "weighted")), "tiny", OWN)
    assert len(made_by(makers, "grpo")) == 1
    makers.fails_at = ""
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "weighted")), "tiny", OWN)
    assert len(made_by(makers, "grpo")) == 2, "the first training was finished"
    before = list(makers.made)
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "weighted")), "tiny", OWN)
    assert makers.made == before


def test_other_settings_are_refused_with_what_changed(tmp_path, makers):
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain",)), "tiny", OWN)
    before = list(makers.made)
    with pytest.raises(
        StaleError, match=r"plain-w0-s0 was made with other settings: grpo: ufm\.grpo\.beta=0\.04, now 1"
    ):
        ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain",)), "tiny", [*OWN, "ufm.grpo.beta=1"])
    assert makers.made == before, "nothing is made before it is refused"


def test_bars_of_other_data_are_refused(tmp_path, makers):
    """Wrong here: bars that are there are read, whatever they were made from."""
    once = lambda: ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain",)), "tiny", OWN)  # noqa: E731
    once()
    manifest = tmp_path / "cells/rule/plain-w0-s0/bars/manifest.json"
    content = json.loads(manifest.read_text())
    content["recipe"]["inputs"]["ifvr"] = "other data"
    manifest.write_text(json.dumps(content))
    with pytest.raises(StaleError, match="bars"):
        once()


def test_evaluations_with_the_same_answers_count_and_their_filter_decides_again(tmp_path, makers, monkeypatch):
    """Wrong here: a grid that took days is refused, or its filters keep thresholds that were chosen another way."""
    choice, decided = Choice((0,), (0,), ("plain", "weighted")), []
    ablate("rule", Run(tmp_path), choice, "tiny", OWN)
    monkeypatch.setattr(sheet, "decided_again", lambda *a: decided.append(1) or decided_again(*a))
    for cell in ("plain-w0-s0", "weighted-w0-s0"):
        aged(tmp_path / "cells/rule" / cell, "eval-grpo", 2)
    before = list(makers.made)
    ablate("rule", Run(tmp_path), choice, "tiny", OWN)
    assert makers.made == before
    assert len(decided) == 2
    aged(tmp_path / "cells/rule/plain-w0-s0", "eval-grpo", 1)
    with pytest.raises(StaleError, match="made by an earlier version"):
        ablate("rule", Run(tmp_path), choice, "tiny", OWN)


def test_bars_of_an_earlier_version_are_made_anew_and_trainings_never(tmp_path, makers):
    folder, choice = Run(tmp_path / "folder"), Choice((0,), (0,), ("plain",))
    ablate("rule", folder, choice, "tiny", OWN)
    cell = tmp_path / "folder/cells/rule/plain-w0-s0"
    aged(cell, "bars", 1)
    ablate("rule", folder, choice, "tiny", OWN)
    assert made_by(makers, "bars") == ["plain-w0-s0"] * 2
    aged(cell, "bars", 1)
    cell.joinpath("bars").rename(tmp_path / "elsewhere")
    cell.joinpath("bars").symlink_to(tmp_path / "elsewhere")
    ablate("rule", folder, choice, "tiny", OWN)
    assert not cell.joinpath("bars").is_symlink(), "what another cell has made stays as it is"
    aged(cell, "grpo", 0)
    with pytest.raises(StaleError, match="grpo: made by an earlier version"):
        ablate("rule", folder, choice, "tiny", OWN)
    assert len(made_by(makers, "grpo")) == 1


def test_finished_policies_are_asked_again_in_another_order_and_none_is_trained(tmp_path, makers, capsys):
    choice = Choice((0,), (0, 1), ("plain", "weighted"))
    with pytest.raises(ArtifactError, match="no finished policy to ask again: `gubs ablate rule`"):
        ablate("order", Run(tmp_path), choice, "tiny", OWN)
    ablate("rule", Run(tmp_path), Choice((0,), (0, 1), ("plain",)), "tiny", OWN)
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("weighted",)), "tiny", OWN)
    trained = len(made_by(makers, "grpo"))
    capsys.readouterr()
    ablate("order", Run(tmp_path), choice, "tiny", OWN, dry_run=True)
    assert capsys.readouterr().out.count("is asked again") == 3
    assert not made_by(makers, "sensitivity-grpo")
    ablate("order", Run(tmp_path), choice, "tiny", OWN)
    shown = capsys.readouterr()
    assert len(made_by(makers, "grpo")) == trained
    assert made_by(makers, "sensitivity-grpo") == ["plain-w0-s0", "weighted-w0-s0", "plain-w0-s1"]
    assert "1 of 4 policies are left out: they are not finished" in shown.err
    assert "plain, letters permuted" in shown.out
    table = Run(tmp_path).artifact("ablate-order")
    figures = {(r["arm"], r["condition"], r["name"]): r for r in table.table("figures").to_pylist()}
    assert {condition for _, condition, _ in figures} == {"own prompt", "history reversed", "letters permuted"}
    own = figures["plain", "own prompt", "judge_balanced_acc"]
    assert (own["n"], own["users"], own["policies"]) == (240, 30, 2), "a user counts once, with all trainings"
    assert figures["plain", "letters permuted", "judge_balanced_acc"]["value"] == 0.5
    assert figures["plain", "history reversed", "changed"]["value"] == 0
    words = {(v["arm"], v["first"]): v["word"] for v in table.table("verdicts").to_pylist()}
    assert words["weighted", "letters permuted"] == "worse"
    assert words["weighted", "history reversed"] == "cannot tell"


def test_the_sheet_says_what_was_measured_of_the_papers_rule(tmp_path, makers, capsys):
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "weighted")), "tiny", OWN)
    assert "one third of the right answers" not in capsys.readouterr().out
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "paper")), "tiny", OWN)
    assert "rule `paper`: one third of the right answers get a negative advantage" in capsys.readouterr().out


def test_oracle_groups_that_are_no_better_than_shuffled_ones_are_called_augmentation(tmp_path, makers):
    """Holm's correction is over the pair too, and the drawing has a point per level."""
    arms, levels = ("plain", "weighted, oracle", "weighted, shuffled"), ("0 %", "40 %")
    ablate("noise", Run(tmp_path), Choice((0,), (0,), arms, levels), "tiny", OWN)
    chosen_cells = chosen("noise", arms, (0,), (0,), levels)
    made = sheet.tables(chosen_cells, Store(Run(tmp_path)))
    pairs = {(d.verdict.first, d.verdict.second) for d in made[0].comparison.differences}
    assert pairs == {(arms[1], "plain"), (arms[2], "plain"), (arms[1], arms[2])}
    first, *_ = sheet.sheets("noise", made)
    print_sheet(first)
    (note,) = [n for n in first.notes if n.endswith("samples about groups are augmentation only")]
    assert note.startswith("weighted, oracle is better than weighted, shuffled in no measure (detectable: reward 0.")
    assert any(n.startswith("judge F1, against weighted, shuffled: ") for n in first.notes)
    drawing = (tmp_path / "ablate-noise" / "levels.svg").read_text()
    assert drawing.startswith("<?xml")


def test_oracle_groups_that_help_are_not_called_augmentation(tmp_path, makers):
    """Of the stand-ins, `weighted` is right more often: so it is in the cell whose name begins with it."""
    cells_of = {"oracle": "weighted", "shuffled": "plain"}
    ablate("rule", Run(tmp_path), Choice((0,), (0,), ("plain", "weighted")), "tiny", OWN)
    store = Store(Run(tmp_path))
    arms = {
        arm: {(0, 0): read_answers(sheet._rows(chosen("rule", (name,), (0,), (0,))[0], store))}
        for arm, name in cells_of.items()
    }
    comparison = compare_arms(arms, {}, resamples=100, seed=0, pairs=[("oracle", "shuffled")])
    (note,) = sheet._of_pairs(find_grid("groups").pairs, comparison.differences)
    assert note.startswith("oracle is better than shuffled in reward +")
    assert "reason F1 +" in note


def test_a_dry_run_makes_nothing_and_counts_what_is_shared_once(tmp_path, makers, capsys):
    choice = Choice((0, 1), (0, 1), ("plain", "weighted"))
    ablate("rule", Run(tmp_path / "r"), choice, "tiny", OWN, dry_run=True)
    printed = capsys.readouterr().out
    assert "rule/plain-w0-s0" in printed
    assert "8 of 8 cells are unfinished" in printed
    assert "2 raw" in printed
    assert "4 sft_model" in printed
    assert "8 grpo" in printed
    assert "no cell has taken any time yet" in printed
    assert not (tmp_path / "r").exists()
    assert not makers.made


def test_a_dry_run_estimates_by_what_was_measured(tmp_path, makers, capsys):
    store, made = Store(Run(tmp_path)), chosen(seeds=(0, 1))
    make_cell(made[0], store)
    times = Path(store.run(made[0]).path("seconds.json"))
    assert json.loads(times.read_text()).keys() >= {"raw", "sft_model", "grpo", "eval-grpo"}
    times.write_text(json.dumps({"sft_model": 100.0, "grpo": 1000.0, "eval-grpo": 500.0}))
    standings = [standing(c, store) for c in made]
    assert [s.status for s in standings] == [Status.CURRENT, *[Status.MISSING] * 3]
    counts = to_make(standings, store)
    assert counts == {"ugm": 1, "sft_model": 1, "grpo": 3, "eval-grpo": 3}, "plain has no groups"
    assert estimate(counts, store.seconds()) == (100 + 3000 + 1500, ["ugm"])
    capsys.readouterr()
    ablate("rule", Run(tmp_path), Choice((0,), (0, 1), ("plain", "weighted")), "tiny", OWN, dry_run=True)
    printed = capsys.readouterr().out
    assert "rule/plain-w0-s0" + " " * 29 + "finished" in printed
    assert "about 1.3 h" in printed
    assert "not counted, since none was made here yet: ugm" in printed


def test_the_end_is_a_table_in_the_folder_and_on_the_screen(tmp_path, makers, capsys):
    ablate("rule", Run(tmp_path), Choice((0,), (0, 1), ("plain", "weighted")), "tiny", OWN)
    printed = capsys.readouterr().out
    assert "rule, advantage rules: worlds 0, trainings 0, 1 each, 30 test users in all" in printed
    assert "never skip" in printed
    table = Run(tmp_path).artifact("ablate-rule")
    figures = {(r["measure"], r["arm"]): r for r in table.table("figures").to_pylist()}
    assert figures["reward sequential natural calibrated", "weighted"]["value"] == 3
    plain = figures["reward sequential natural calibrated", "plain"]
    assert plain["seeds"] == 0, "both trainings are alike"
    measure = "judge_balanced_acc sequential natural calibrated"
    bar, same = figures[measure, "logistic, by reward"], figures[measure, "plain"]
    assert (bar["value"], bar["bar"]) == (same["value"], True), "the same answers"
    assert bar["low"] < bar["value"] < bar["high"]
    assert made_by(makers, "bars") == ["plain-w0-s0"], "once per world"
    differences = {r["measure"]: r for r in table.table("differences").to_pylist()}
    assert differences["reward sequential natural calibrated"]["word"] == "better"
    assert differences["reward sequential natural calibrated"]["agree"] == 2
    assert len(table.table("cells").filter(pa.compute.field("arm") == "plain")) == 2 * len(differences) + 2 * 2
    assert (tmp_path / "ablate-rule" / "curves.svg").read_text().startswith("<?xml")
    assert table.manifest.info["cells"] == [c.name for c in chosen()]
