"""The report of a run: what one policy is worth, from stored artifacts alone. Verdicts come first.

`write_page` puts `report.html` into the run's folder. What the run lacks is named with the command that makes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from gubs.artifacts import Artifact, JsonObject, Manifest, Run
from gubs.evaluate.bars import BARS
from gubs.evaluate.breakdown import (
    Judged,
    calibration_sheet,
    confusion_sheet,
    facts,
    reliability_curves,
    slices_sheet,
    thresholds,
)
from gubs.evaluate.compare import Block, compare, judged_policies, verdict_on
from gubs.evaluate.judge import CALIBRATED, FILTER, GREEDY, MIXES, STAGE_PREFIX, as_predictions
from gubs.evaluate.predictors import REWARD
from gubs.evaluate.scores import compared_by
from gubs.evaluate.sensitivity import STAGE_PREFIX as SENSITIVITY
from gubs.evaluate.settings import EvalSettings
from gubs.evaluate.sheets import Sheet, sensitivity_sheets
from gubs.evaluate.table import VERDICT_METRIC, Table, tables
from gubs.evaluate.verdicts import Verdict, Word, by_pair, verdicts
from gubs.records import Task
from gubs.report import pages
from gubs.report.cases import PER_KIND, Case, cases
from gubs.report.charts import INK, SERIES, drawing, legend_above
from gubs.report.evaluation import kept_chart, sheets_of
from gubs.ufm.questions import Questions
from gubs.ufm.settings import InputSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "report.html"
_CONSTANTS = "constants, a coin and random drop"
_ANSWERS = {GREEDY: "The greedy answers", FILTER: "The filter"}
_PHRASES = {Word.BETTER: "{} better than", Word.WORSE: "{} worse than", Word.UNKNOWN: "cannot be told from"}
_NAMED = 3
"""Others that a verdict names; the tables below have them all."""


@dataclass(frozen=True)
class Chart:
    """One drawing, and what it shows."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Finding:
    """What the policy is worth in one task, in sentences."""

    task: str
    about: str
    sentences: list[str]


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    lead: str
    sheets: Sequence[Sheet] = ()
    charts: Sequence[Chart] = ()
    missing: Sequence[str] = ()
    """What the run lacks for it, with the command that makes it."""


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    policy: str
    manifest: Manifest
    """Of the evaluation."""
    findings: list[Finding]
    stale: list[str]
    """Artifacts that do not fit the others."""
    sections: list[Section]
    cases: list[Case]

    @property
    def missing(self) -> list[str]:
        """What the run lacks, with the commands that make it."""
        return [m for s in self.sections for m in s.missing]

    def to_json(self) -> JsonObject:
        """Sentences and tables as plain JSON, without drawings and cases."""
        sheets = [asdict(sheet) for section in self.sections for sheet in section.sheets]
        return {
            "policy": self.policy,
            "findings": [asdict(f) for f in self.findings],
            "tables": sheets,
            "stale": self.stale,
            "missing": self.missing,
        }


def report(run: Run, evaluate: EvalSettings, seed: int, policy: str = "") -> Report:
    """Computes the report.

    Args:
        run: has the artifact `eval-<policy>`.
        evaluate: number of resamples, and the fewest users and targets.
        seed: of the resamples.
        policy: that was judged; empty = of these, the one trained last.

    Raises:
        ArtifactError: it was not judged, or none was.
    """
    policy = policy or next(reversed(judged_policies(run)), "")
    blocks = [b for b in compare(run, [policy] if policy else []) if b.mix == MIXES[0]]
    evaluation, fine = run.artifact(STAGE_PREFIX + policy), {"resamples": evaluate.bootstrap, "seed": seed}
    judged = list(Judged.of(evaluation.table("predictions").to_pylist(), evaluation.manifest.info.get("decisions", {})))
    ifvr = tables(run, {}, least_users=evaluate.least_users, **fine) if run.has(BARS) else []
    sensitivity = run.artifact(SENSITIVITY + policy) if run.has(SENSITIVITY + policy) else None
    return Report(
        policy=policy,
        manifest=evaluation.manifest,
        findings=[_finding(policy, b, j, ifvr, fine) for b, j in zip(blocks, judged, strict=True)],
        stale=[m for a in (evaluation, sensitivity) if a for m in _made_from_others(a)],
        sections=[
            _tables(run, ifvr),
            _thresholds(judged),
            _calibration(judged),
            _confusion(judged),
            _slices(evaluation, judged, evaluate.least_slice, fine),
            _sensitivity(run, policy, sensitivity),
        ],
        cases=cases(sensitivity) if sensitivity and not _made_from_others(sensitivity) else [],
    )


def _made_from_others(artifact: Artifact) -> list[str]:
    remade = ", ".join(artifact.remade_inputs())
    return [f"{artifact.stage} was made from another {remade}: see `gubs status {artifact.run.uri}`"] if remade else []


def write_page(run: Run, made: Report) -> str:
    """Writes the page and returns its path."""
    return pages.write(run, PAGE, pages.render("report", run=run.name, r=made, per_kind=PER_KIND))


# Verdicts


def _finding(policy: str, block: Block, judged: Judged, ifvr: Sequence[Table], fine: dict[str, int]) -> Finding:
    lines = [line.strip().removeprefix(f"{block.task}: ") for line in verdict_on(block)]
    sentences = [f"As a filter, it {lines[0]}.", *(f"{line[0].upper()}{line[1:]}." for line in lines[1:])]
    about = f"{block.items:,} targets of {block.users:,} test users, as they come"
    if len(lines) == 1:  # one kind of target only
        return Finding(block.task, about, sentences)
    if (kept := _kept(judged)) in (0.0, 1.0):
        sentences.append(f"A filter that {'keeps' if kept else 'drops'} everything tells nothing apart.")
    sentences += _in_words(_beside_constants(judged, fine))
    for table in (t for t in ifvr if t.task == block.task):
        sentences += _beside_the_bars(policy, table)
    return Finding(block.task, about, sentences)


def _beside_the_bars(policy: str, table: Table) -> Iterator[str]:
    """What one table says of a policy: beside the baselines, at the same share kept, and beside other policies."""
    names = {policy: _ANSWERS[GREEDY], f"{policy}, {FILTER}": _ANSWERS[FILTER]}
    names[f"{policy}, {CALIBRATED}"] = "The calibrated answers"
    task, own = Task(table.task), [v for v in table.verdicts if v.first in names]
    bars = [v for v in own if v.second not in table.policies]
    calibrated = f"{policy}, {CALIBRATED}"
    accuracy = [v for v in bars if v.metric == VERDICT_METRIC[task] and v.first != calibrated]
    rewards = [v for v in bars if v.metric == REWARD and v.first == calibrated]
    yield from _in_words([(names[v.first], v) for v in accuracy])
    yield from _in_words([("In reward (0 to 3), the calibrated answers", v) for v in rewards])
    for metric in compared_by(task):
        at_share = [v for v in bars if v.metric == metric and v.first == calibrated]
        at_share = at_share or [v for v in bars if v.metric == metric]  # its ranking is that of the greedy answers
        yield from _in_words([(f"In {metric}, {names[v.first].lower()}", v) for v in at_share])
    yield from (f"{line}." for line in by_pair([v for v in own if v.second in table.policies]))


def _kept(judged: Judged) -> float:
    return float(as_predictions(judged.by_mode[FILTER], judged.task).kept.mean())


def _beside_constants(judged: Judged, fine: dict[str, int]) -> list[tuple[str, Verdict]]:
    """Filter and greedy answers against what has a balanced accuracy of one half."""
    predictions = {mode: as_predictions(judged.by_mode[mode], judged.task) for mode in (FILTER, GREEDY)}
    constant = as_predictions([{**r, "predicted": "A"} for r in judged.by_mode[GREEDY]], judged.task)
    pairs = [(mode, _CONSTANTS) for mode in predictions]
    metric = VERDICT_METRIC[judged.task]
    return [(_ANSWERS[v.first], v) for v in verdicts({**predictions, _CONSTANTS: constant}, pairs, metric, **fine)]


def _in_words(made: Sequence[tuple[str, Verdict]]) -> Iterator[str]:
    """One sentence per predictor: what it is better than, worse than, and cannot be told from."""
    for who in dict.fromkeys(name for name, _ in made):
        own = [v for name, v in made if name == who]
        scale, digits, unit = (1, 2, "") if own[0].metric == REWARD else (100, 1, " points")
        verb = "is" if who == _ANSWERS[FILTER] else "are"
        least = scale * max(v.detectable for v in own)
        power = f" ({own[0].users:,} users can show {least:.{digits}f}{unit})" if least else ""
        parts = []
        for word, phrase in _PHRASES.items():
            # The largest defeat and the narrowest win first: they say most about the policy.
            of_word = sorted((v for v in own if v.word is word), key=lambda v: v.difference)
            if of_word:
                names = [f"{v.second} ({scale * v.difference:+.{digits}f})" for v in of_word[:_NAMED]]
                rest = len(of_word) - len(names)
                count = f"{len(of_word)} of {len(own)}: " if rest else ""
                more = f" and {rest} more" if rest else ""
                shown = power if word is Word.UNKNOWN else ""
                parts.append(f"{phrase.format(verb)} {count}{', '.join(names)}{more}{shown}")
        yield f"{who} {'; '.join(parts)}."


# Sections


def _tables(run: Run, ifvr: list[Table]) -> Section:
    lead = (
        "In per cent, with half the width of the 95 % interval over users. Every predictor on the targets that all of "
        "them answered; baselines cannot be left out. What filters keep cannot be compared where they keep "
        "different shares, so the second table has every predictor at the same share."
    )
    caption = "what is kept when the videos that look best to each predictor are kept"
    charts = [Chart(f"{t.task}: videos kept", kept_chart(t), caption) for t in ifvr if t.curves]
    missing = [] if ifvr else [f"baselines beside the policy: `gubs evaluate ifvr --run {run.uri}`"]
    return Section("Beside the baselines", lead, sheets_of(run, ifvr), charts, missing)


def _thresholds(judged: Sequence[Judged]) -> Section:
    lead = (
        "What the filter keeps of the test users' targets at each threshold of the calibrated P(skip). The one in use "
        "is chosen for a goal, on training users that no policy is trained on."
    )
    charts = []
    for j in judged:
        if j.decision and len(j.scored()[0]):
            chosen = j.decision["threshold"]["value"]
            with drawing(f"threshold-{j.task}", (5.2, 3.2)) as chart:
                _draw_thresholds(chart.axes, j, chosen)
            where = (
                f"the dotted line is the threshold in use, {chosen:.2f}" if chosen <= 1 else "the one in use is above 1"
            )
            charts.append(
                Chart(f"{j.task}: thresholds", chart.svg, f"videos from the threshold on are dropped; {where}")
            )
    return Section("Thresholds", lead, charts=charts, missing=_uncalibrated(judged))


def _calibration(judged: Sequence[Judged]) -> Section:
    lead = (
        "How often a target is skipped (not clicked) when P(skip) says so. Held-out training users are predicted "
        "by a fit without them; the diagonal is what should be."
    )
    charts, calibrated = [], [j for j in judged if j.decision]
    for j in calibrated:
        with drawing(f"reliability-{j.task}", (4.6, 3.8)) as chart:
            _draw_reliability(chart.axes, j)
        charts.append(Chart(f"{j.task}: reliability", chart.svg, "ten bins of equally many targets"))
    return Section("Calibration", lead, [calibration_sheet(j) for j in calibrated], charts)


def _confusion(judged: Sequence[Judged]) -> Section:
    lead = "Greedy answers as they are written, and what the filter makes of P(skip)."
    return Section("Gold and predicted", lead, [confusion_sheet(j, m) for j in judged for m in (GREEDY, FILTER)])


def _slices(evaluation: Artifact, judged: Sequence[Judged], least: int, fine: dict[str, int]) -> Section:
    lead = "Parts of the test users, with intervals over the users of each part. A user may be in several groups."
    settings = evaluation.manifest.settings["ufm"]["inputs"]
    inputs = {name: settings[name] for name in InputSettings.model_fields if name in settings}
    questions = Questions(evaluation.run, InputSettings(**inputs))
    groups = {u: [questions.groups[g].name for g in ids] for u, ids in questions.memberships.items()}
    sheets = [slices_sheet(j, facts(questions.ifvr, j.task, groups), least=least, **fine) for j in judged]
    missing = [] if groups else [f"slices by group: `gubs ugm --run {evaluation.run.uri}`"]
    return Section("Slices", lead, sheets, missing=missing)


def _sensitivity(run: Run, policy: str, artifact: Artifact | None) -> Section:
    lead = (
        "The same targets, asked about with one thing changed in the prompt. Greedy answers; each is compared with "
        "that to the user's own prompt, paired by user."
    )
    if artifact:
        return Section("What the answers depend on", lead, sensitivity_sheets(artifact))
    command = f"`gubs evaluate sensitivity {policy} --run {run.uri}`"
    return Section("What the answers depend on", lead, missing=[f"answers to changed prompts, and cases: {command}"])


def _uncalibrated(judged: Sequence[Judged]) -> list[str]:
    return [
        f"calibration and threshold, {j.task}: no answer about held-out users can be read, or they all did the same "
        "(see ufm.held_out, evaluate.decision)"
        for j in judged
        if not j.decision
    ]


# Drawings


def _draw_thresholds(axes: "Axes", judged: Judged, chosen: float) -> None:
    at = thresholds(judged)
    good = "clicked" if judged.task is Task.CLICK else "not skipped"
    lines = {"kept": "videos kept", "good": f"{good}, of those kept", "lost": f"{good}, but dropped"}
    for (name, label), colour in zip(lines.items(), SERIES, strict=False):
        axes.plot(at["threshold"], 100 * at[name], color=colour, label=label)
    if chosen <= 1:
        axes.axvline(chosen, color=INK, linestyle=":")
    axes.set_xlabel("threshold of P(skip)")
    axes.set_ylabel("%")
    legend_above(axes)


def _draw_reliability(axes: "Axes", judged: Judged) -> None:
    axes.plot([0, 100], [0, 100], color=INK, linestyle=":", linewidth=1)
    for (name, bins), colour in zip(reliability_curves(judged).items(), SERIES, strict=False):
        points = 100 * np.array([(b.predicted, b.happened) for b in bins]).reshape(-1, 2)
        axes.plot(*points.T, "o", color=colour, label=name, markersize=5)
    axes.set_xlabel("P(skip), %")
    axes.set_ylabel("not clicked, %" if judged.task is Task.CLICK else "skipped, %")
    legend_above(axes)
