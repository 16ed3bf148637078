"""The audit of published tables: real figures are never called impossible, changed ones are, and files are read."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubs.cli import app
from gubs.errors import InputError, SettingsError
from gubs.evaluate.audit import (
    Averaging,
    Bar,
    Classes,
    Place,
    Quantity,
    Range,
    audit_row,
    conflicts,
    constants,
    detectable,
    exchanges,
    noise,
    place,
    reading,
    shares,
)
from gubs.evaluate.audit_sheet import audit, measured_bars
from gubs.evaluate.metrics import published_confusion
from gubs.evaluate.printed import case_names, read_printed
from gubs.evaluate.published import TABLE_2, TABLE_3

A, P, R, F, S, N, B = Quantity
TEN = Classes.per_user((10, 10), (10, 10))


def figures(tp, fp, fn, tn, empty=0.0):
    """Every quantity of a 2 x 2 table; `empty` is what 0/0 counts as."""

    def ratio(part, whole):
        return part / whole if whole else empty

    recall, specificity = ratio(tp, tp + fn), ratio(tn, fp + tn)
    return {
        A: ratio(tp + tn, tp + fp + fn + tn),
        P: ratio(tp, tp + fp),
        R: recall,
        F: ratio(2 * tp, 2 * tp + fp + fn),
        S: specificity,
        N: ratio(tn, fn + tn),
        B: (recall + specificity) / 2,
    }


def rounded(values, digits):
    """Cells as a table with so many decimals prints them."""
    half = 0.5 * 10.0**-digits
    return {q: Range(round(v, digits) - half, round(v, digits) + half) for q, v in values.items()}


def exact(**values):
    return {Quantity(q): Range(v, v) for q, v in values.items()}


def near(value):
    return Range(pytest.approx(value, abs=1e-5), pytest.approx(value, abs=1e-5))


counts = st.integers(0, 400)
tables = st.tuples(counts, counts, counts, counts).filter(lambda t: t[0] + t[2] and t[1] + t[3])


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(1, 4), st.sampled_from([0.0, 0.02]))
def test_a_pooled_table_is_never_called_impossible(table, digits, blur):
    share = (table[0] + table[2]) / sum(table)
    classes = Classes(Range(max(share - blur, 1e-6), min(share + blur, 1 - 1e-5)))
    within = reading(classes, Averaging.POOLED)
    values = figures(*table)
    cells = rounded(values, digits)
    assert within.holds(cells)
    left = within.bounds(F, {q: c for q, c in cells.items() if q is not F})
    assert left.low - 1e-5 <= values[F] <= left.high + 1e-5


users = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(users, st.integers(1, 4), st.sampled_from([0.0, 1.0, None]))
def test_means_over_users_are_never_called_impossible(hits, digits, empty):
    """Whatever 0/0 of a user counts as: 0, 1, or the user is left out of that mean."""
    each = [figures(tp, fp, 4 - tp, 6 - fp, np.nan if empty is None else empty) for tp, fp in hits]
    stacked = {q: np.array([e[q] for e in each]) for q in Quantity}
    means = {q: v[~np.isnan(v)].mean() for q, v in stacked.items() if not np.isnan(v).all()}
    within = reading(Classes.per_user((4, 4), (6, 6)), Averaging.USERS)
    assert within.holds(rounded(means, digits))


def test_users_of_different_sizes_are_covered():
    each = [figures(0, 0, 1, 3), figures(1, 1, 1, 1), figures(3, 1, 0, 0)]
    means = {q: float(np.mean([e[q] for e in each])) for q in Quantity}
    assert reading(Classes.per_user((1, 3), (1, 3)), Averaging.USERS).holds(rounded(means, 4))
    assert not reading(Classes.per_user((2, 2), (2, 2)), Averaging.USERS).holds(rounded(means, 4))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.2, 0.8), st.floats(0.35, 1), st.floats(0.05, 0.65), st.sampled_from([A, R, F]), st.sampled_from([-1, 1])
)
def test_a_changed_cell_of_a_pooled_row_is_found(share, recall, false_alarms, changed, sign):
    """Precision, recall and F1 fix each other, and with the share of positives the accuracy."""
    values = figures(share * recall, (1 - share) * false_alarms, share * (1 - recall), (1 - share) * (1 - false_alarms))
    within = reading(Classes(Range(share, share)), Averaging.POOLED)
    cells = rounded({q: values[q] for q in (A, P, R, F)}, 4)
    assert within.holds(cells)
    cells[changed] = Range(*(v + 0.02 * sign for v in (cells[changed].low, cells[changed].high)))
    assert not within.holds(cells)


def test_pooled_f1_lies_between_precision_and_recall_whatever_the_share():
    within = reading(Classes(Range(0.01, 0.99)), Averaging.POOLED)
    assert within.holds(exact(precision=0.9, recall=0.5, f1=2 * 0.45 / 1.4))
    for f1 in (0.49, 0.91, 0.7):
        assert not within.holds(exact(precision=0.9, recall=0.5, f1=f1))


def test_mean_f1_may_lie_below_both_means_but_never_above_their_harmonic_mean():
    """Users with (P, R) = (1, .1) and (.5, 1): the means are .75 and .55, mean F1 is .42."""
    within = reading(TEN, Averaging.USERS)
    left = within.bounds(F, exact(precision=0.75, recall=0.55))
    assert left.low < 0.43
    assert left.high <= 2 * 0.75 * 0.55 / 1.3 + 1e-5
    assert not within.holds(exact(precision=0.9, recall=0.5, f1=0.65))
    assert within.holds(exact(precision=0.9, recall=0.5, f1=0.5))
    assert not within.holds(exact(precision=0.9, recall=0.9, f1=0.79))
    assert not reading(TEN, Averaging.POOLED).holds(exact(precision=0.75, recall=0.55, f1=0.43))


@pytest.mark.parametrize("averaging", Averaging)
def test_accuracy_is_the_mean_of_both_recalls_in_either_averaging(averaging):
    within = reading(TEN, averaging)
    assert within.holds(exact(accuracy=0.7, recall=0.9, specificity=0.5, balanced_accuracy=0.7))
    assert not within.holds(exact(accuracy=0.72, recall=0.9, specificity=0.5))
    assert within.bounds(S, exact(accuracy=0.7, recall=0.9)) == near(0.5)


def test_a_conflict_names_the_cells_that_are_in_it_and_no_others():
    cells = exact(accuracy=0.7, precision=0.7, recall=0.7, f1=0.8)
    smallest = conflicts(cells, reading(TEN, Averaging.POOLED))
    assert [set(c.allowed) for c in smallest] == [{A, F}, {P, R, F}]
    assert smallest[1].allowed[F] == near(0.7)
    (alone,) = conflicts(exact(recall=1.2, f1=0.5), reading(TEN, Averaging.POOLED))
    assert set(alone.allowed) == {R}


def test_what_is_not_printed_follows_where_the_row_holds():
    readings = {a: reading(TEN, a) for a in Averaging}
    row = audit_row("x", exact(accuracy=0.7, recall=0.9), readings)
    assert row.possible == list(Averaging)
    assert row.implied[B] == near(0.7)
    assert row.implied[P].low < 9 / 14 < row.implied[P].high
    assert audit_row("y", exact(accuracy=0.2, recall=0.9), readings).implied == {}


def test_the_share_with_which_an_impossible_row_would_hold():
    values = figures(30, 20, 10, 40)  # 40 % positive
    cells = {q: values[q] for q in (A, R, F)}
    row = audit_row("x", rounded(cells, 4), {Averaging.POOLED: reading(TEN, Averaging.POOLED)})
    assert row.shares.low <= 0.4 <= row.shares.high
    assert row.shares.high - row.shares.low < 0.01
    assert shares(exact(precision=0.9, recall=0.5, f1=0.95)) is None
    assert audit_row("y", exact(accuracy=0.7), {Averaging.POOLED: reading(TEN, Averaging.POOLED)}).shares is None


def test_exchanged_columns_are_found():
    values = [figures(8, 1, 2, 9), figures(9, 5, 1, 5), figures(4, 1, 6, 9)]
    rows = [rounded({A: v[A], P: v[R], R: v[P]}, 4) for v in values]
    (best, *_) = exchanges(rows, {Averaging.POOLED: reading(TEN, Averaging.POOLED)})
    assert {best.first, best.second, best.after} == {P, R, 0}
    assert best.before == 3


def test_constants_and_places():
    bars = constants(Classes(Range(0.2, 0.25)))
    assert bars["always yes"][F] == Bar(pytest.approx(11 / 30), pytest.approx(1 / 30))
    assert bars["always no"][A] == Bar(pytest.approx(0.775), pytest.approx(0.025))
    for name, table in (("always yes", (10, 10, 0, 0)), ("always no", (0, 0, 10, 10))):
        expected = figures(*table)
        assert {q: bar.value for q, bar in constants(TEN)[name].items()} == expected
    assert place(Range(0.1, 0.2), Bar(0.35, 0.05)) is Place.BELOW
    assert place(Range(0.1, 0.3), Bar(0.35, 0.05)) is Place.ALIKE
    assert place(Range(0.5, 0.6), Bar(0.35, 0.05)) is Place.ABOVE
    assert place(Range(0.2, 0.29), Bar(0.35, 0.03), noise=0.04) is Place.BELOW
    assert place(Range(0.2, 0.31), Bar(0.35, 0.03), noise=0.04) is Place.ALIKE
    assert noise(0.5, 400) == pytest.approx(0.049)
    assert detectable(0.8, 20_000) == pytest.approx(0.0112, abs=1e-4)


def test_classes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        Classes(Range(0.0, 0.5))
    with pytest.raises(ValueError, match="an item of each class"):
        Classes.per_user((0, 10), (10, 10))
    with pytest.raises(ValueError, match="need the number"):
        reading(Classes(Range(0.5, 0.5)), Averaging.USERS)
    with pytest.raises(ValueError, match="too many tables"):
        reading(Classes.per_user((1, 60), (1, 60)), Averaging.USERS)


# The shipped tables


def test_no_row_of_table_3_is_pooled_and_all_can_be_means_over_users():
    for case, data in (("agent4rec", "MovieLens"), ("amazon-books", "Amazon Books")):
        checked = audit(read_printed(case))
        assert [r.name for r in checked.rows] == list(TABLE_3[data])
        assert all(r.possible == [Averaging.USERS] for r in checked.rows)


def test_two_rows_of_table_2_cannot_be():
    """The others are rebuilt from accuracy and play rate > 30 %, by a formula of its own."""
    checked = audit(read_printed("ifvr"))
    assert [r.name for r in checked.rows if not r.possible] == ["Video-R1", "VideoChat-R1"]
    for row in (r for r in checked.rows if r.possible):
        figures = TABLE_2[row.name]
        rebuilt = published_confusion(figures["judge_acc"], figures["play_rate_above_30"], 0.237)
        assert row.implied[B].low - 0.002 <= rebuilt.balanced_accuracy <= row.implied[B].high + 0.002
    against = checked.to_json()["rows"][-1]["against"]
    assert against["always no"] == {"accuracy": "below", "f1": "above"}


def test_rows_are_compared_with_the_bars_that_a_table_comes_with():
    against = {r["row"]: r["against"] for r in audit(read_printed("agent4rec")).to_json()["rows"]}
    assert against["GPT-4o"]["popularity"] == {"accuracy": "below"}
    assert against["SimUser"] == against["G-UBS"]
    assert against["G-UBS"]["popularity"] == {"accuracy": "above"}
    assert against["RecAgent"]["always yes"] == {"accuracy": "above", "f1": "below"}


# Files

COLUMNS = "columns: {acc: accuracy, rec: recall, f: f1}\npositives: 10\nnegatives: 10\n"


def files(folder, table="method,acc,rec,f\na,70,80,72.7\nb,70.0,-,\n", columns=COLUMNS):
    (folder / "t.csv").write_text(table)
    (folder / "c.yaml").write_text(columns)
    return str(folder / "t.csv"), folder / "c.yaml"


def test_cells_are_as_wide_as_their_digits(tmp_path):
    printed = read_printed(*files(tmp_path))
    assert printed.rows["a"][A] == Range(pytest.approx(0.695), pytest.approx(0.705))
    assert printed.rows["a"][F] == Range(pytest.approx(0.7265), pytest.approx(0.7275))
    assert set(printed.rows["b"]) == {A}
    for rounding, low, high in (("down", 0.70, 0.71), ("unknown", 0.69, 0.71)):
        printed = read_printed(*files(tmp_path, columns=f"{COLUMNS}rounding: {rounding}\n"))
        assert printed.rows["a"][A] == Range(pytest.approx(low), pytest.approx(high))
    shares = files(tmp_path, "m,acc,rec,f\na,.70,80%,**.727**\n", f"{COLUMNS}unit: share\nrows: [a]\n")
    assert read_printed(*shares).rows["a"][R] == Range(pytest.approx(0.795), pytest.approx(0.805))


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ("method,acc,rec,f\na,1,2\n", COLUMNS, "t.csv: row 2: 3 values, and the header has 4"),
        ('method,acc,rec,f\n"a\nb",1,2,3\nc,x,2,3\n', COLUMNS, "t.csv: row 4: accuracy: 'x' is not a number"),
        ("method,acc,f\na,1,2\n", COLUMNS, "no column 'rec'"),
        ("method,acc,rec,f\na,1,2,3\na,1,2,3\n", COLUMNS, "row 3, column 'method': 'a' occurs twice"),
        ("method,acc,rec,f\n", COLUMNS, "at least one row"),
        ("method,acc,rec,f\na,.7,.8,.7\n", COLUMNS, "say `unit: share`"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS + "unit: share", "say `unit: percent`"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS + "rows: [z]", "no row 'z', which c.yaml names"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS + "rouding: down", "c.yaml: rouding"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS + "share: 0.5", "either positives and negatives per user, or"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS.replace("recall", "f1"), "two columns print the same"),
        ("method,acc,rec,f\na,70,80,70\n", "columns: {acc: accuracy}\nshare: 1", "c.yaml: the share of positives"),
        ("method,acc,rec,f\na,70,80,70\n", "columns: {acc: accuracy}\nshare: .5\naveraging: users", "per user"),
        ("method,acc,rec,f\na,70,80,70\n", "columns: [", "c.yaml: cannot be read"),
        ("method,acc,rec,f\na,70,80,70\n", COLUMNS + "bars: {x: {f1: high}}", "c.yaml: bars.x.f1: 'high' is no"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, table, columns, message):
    with pytest.raises(InputError) as caught:
        read_printed(*files(tmp_path, table, columns))
    assert message in str(caught.value)


def test_a_figure_that_cannot_be_is_named_alone(tmp_path):
    printed = read_printed(*files(tmp_path, "m,acc,rec,f\na,170,80,72.7\nb,,,\n", f"{COLUMNS}users: 9\n"))
    sheet = audit(printed).sheet()
    assert "a: accuracy 170 is no such figure" in sheet.notes
    assert sheet.rows[1].cells[:3] == ["–", "–", "–"]


def test_tables_without_a_description_and_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="--columns"):
        read_printed(files(tmp_path)[0])
    with pytest.raises(InputError, match="agent4rec, amazon-books, ifvr"):
        read_printed("agent5rec")


# Bars


def public(*rows, protocol="interacted / unseen, published parts"):
    """An artifact `public` with these metrics: method, name, value; intervals are ± .01."""
    metrics = [
        {"protocol": protocol, "method": m, "name": n, "value": v, "low": v - 0.01, "high": v + 0.01}
        for m, n, v in rows
    ]
    return SimpleNamespace(stage="public", table=lambda _: pa.Table.from_pylist(metrics))


def measured(method, accuracy):
    names = ("click_acc", "click_balanced_acc", "click_f1", "click_recall", "click_precision", "user_acc", "user_f1")
    return [(method, name, accuracy) for name in (*names, "user_recall")]


def test_a_runs_baselines_are_the_bars_each_with_its_better_rule():
    rows = [*measured("coin", 0.5), *measured("popularity, top half", 0.767), *measured("popularity, threshold", 0.76)]
    rows += measured("user kNN, top half", 0.806)
    printed = read_printed("agent4rec")
    bars = measured_bars(public(*rows), printed)
    assert list(bars) == ["user kNN", "popularity"]
    assert bars["popularity"][A] == Bar(0.767, pytest.approx(0.01))
    assert F not in bars["popularity"]  # pooled or mean over users: it is not known which of them the table prints
    notes = "\n".join(audit(printed, public(*rows)).sheet().notes)
    assert "GPT-4o: accuracy below user kNN (80.6), popularity (76.7)" in notes
    assert "G-UBS: accuracy not to be told from user kNN (80.6)" in notes
    with pytest.raises(InputError, match="no protocol 'interacted / unseen, published parts'"):
        measured_bars(public(*rows, protocol="liked / disliked, random"), printed)


# The command


def test_the_command_lists_checks_and_gives_json(tmp_path, capsys):
    app(["audit"], standalone_mode=False)
    listed = capsys.readouterr().out
    assert all(name in listed for name in case_names())
    app(["audit", "ifvr"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "VideoChat-R1, pooled: accuracy, F1 and NPV cannot hold together" in text
    assert "G-UBS: accuracy below always no (76.3)" in text
    table, columns = files(tmp_path)
    app(["audit", table, "--columns", str(columns), "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["possible"] == ["pooled", "users"]
    with pytest.raises(SettingsError, match="--run"):
        app(["audit", "agent4rec", "source.kind=agent4rec"], standalone_mode=False)
