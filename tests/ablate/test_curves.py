"""Drawings of an ablation: levels stand where their numbers are, and every arm has its figures."""

from gubs.ablate.curves import f1_by_arm, level_places
from gubs.ablate.sheet import Table
from gubs.evaluate.arms import MEASURES, Comparison, Result


def test_levels_stand_at_their_numbers_or_in_a_row():
    assert level_places(["0 %", "10 %", "40 %"]) == {"0 %": 0, "10 %": 10, "40 %": 40}
    assert level_places(["none", "much"]) == {"none": 0, "much": 1}


def test_each_arm_has_the_calibrated_f1_of_its_levels():
    def result(arm, measure, value):
        return Result(measure, arm, value, value, value, 0.0, 0.0, {(0, 0): value}, 10)

    tables = [
        Table(level, Comparison(tuple(result(a, m, v) for a in "ab" for m in MEASURES), ()), [])
        for level, v in (("0 %", 0.7), ("40 %", 0.5))
    ]
    for name in ("judge_f1", "reason_f1"):
        by_arm = f1_by_arm(tables, name)
        values = {(arm, level): r.value for arm, of in by_arm.items() for level, r in of.items()}
        assert values == {(arm, level): v for arm in "ab" for level, v in (("0 %", 0.7), ("40 %", 0.5))}
        assert {r.measure.mode for of in by_arm.values() for r in of.values()} == {"calibrated"}
