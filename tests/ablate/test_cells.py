"""Making cells: what is shared, what is kept, what resumes, what is refused. Makers are stand-ins; stages are real."""

import contextlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from small_world import WORLD

from gubs import stages
from gubs.ablate import command
from gubs.ablate.cells import Store, estimate, make_cell, standing, to_make
from gubs.ablate.command import ablate
from gubs.ablate.grid import Cell, Choice, cells
from gubs.artifacts import Run, StageJob, fingerprint
from gubs.errors import ArtifactError
from gubs.evaluate.bars import STORED
from gubs.evaluate.judge import MODES, PREDICTIONS
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
            if job.stage == "bars":
                said = [{**r, "method": "logistic, by reward", "score": r["skip"]} for r in answers(job)]
                out.write_table("predictions", pa.Table.from_pylist(said, schema=STORED))
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
        said = gold if good or n % 3 else "B"
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
                    "predicted": said,
                    "skip": 0.2 if said == "A" else 0.8,
                    "reward": 3.0 if said == gold else 1.0,
                    "play_rate": 0.9 if gold == "A" else 0.1,
                }
            )
    return rows


@pytest.fixture
def makers(monkeypatch) -> Makers:
    made = Makers()
    monkeypatch.setattr(stages, "_load", made.load)
    monkeypatch.setattr(stages, "_preflight", lambda *_: None)
    for module in (stages, command):
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


def test_a_dry_run_makes_nothing_and_counts_what_is_shared_once(tmp_path, makers, capsys):
    choice = Choice((0, 1), (0, 1), ("plain", "weighted"))
    ablate("rule", Run(tmp_path / "r"), choice, "tiny", OWN, dry_run=True)
    said = capsys.readouterr().out
    assert "rule/plain-w0-s0" in said
    assert "8 of 8 cells are unfinished" in said
    assert "2 raw" in said
    assert "4 sft_model" in said
    assert "8 grpo" in said
    assert "no cell has taken any time yet" in said
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
    said = capsys.readouterr().out
    assert "rule/plain-w0-s0" + " " * 29 + "finished" in said
    assert "about 1.3 h" in said
    assert "not counted, since none was made here yet: ugm" in said


def test_the_end_is_a_table_in_the_folder_and_on_the_screen(tmp_path, makers, capsys):
    ablate("rule", Run(tmp_path), Choice((0,), (0, 1), ("plain", "weighted")), "tiny", OWN)
    said = capsys.readouterr().out
    assert "rule, advantage rules: worlds 0, trainings 0, 1 each, 30 test users in all" in said
    assert "never skip" in said
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
    found = {r["measure"]: r for r in table.table("differences").to_pylist()}
    assert found["reward sequential natural calibrated"]["word"] == "better"
    assert found["reward sequential natural calibrated"]["agree"] == 2
    assert len(table.table("cells").filter(pa.compute.field("arm") == "plain")) == 2 * len(found) + 2 * 2
    assert (tmp_path / "ablate-rule" / "curves.svg").read_text().startswith("<?xml")
    assert table.manifest.info["cells"] == [c.name for c in chosen()]
