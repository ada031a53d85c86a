import doctest
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.rows import schedule
from lesa.rows.schedule import Schedule

LAW = settings(deadline=None, derandomize=True, max_examples=50)
PAPER = {
    5: (0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47),
    7: (0, 1, 2, 3, 9, 16, 23, 30, 37, 44),
    8: (0, 1, 2, 3, 10, 18, 26, 34, 42),
    10: (0, 1, 2, 3, 12, 22, 32, 42),
}
SCHEDULES = st.one_of(
    st.builds(Schedule.paper, st.integers(1, 20), st.integers(1, 8)),
    st.builds(Schedule.every, st.integers(1, 20), st.integers(1, 8)),
    st.builds(Schedule.ratio, st.floats(1, 20)),
)
RUNS = st.integers(1, 80).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps - 1)))


@pytest.mark.parametrize("interval", PAPER)
def test_the_papers_schedule_is_the_papers(interval):
    assert Schedule.paper(interval).full_steps(50) == PAPER[interval]


def test_every_counts_from_the_last_step_of_the_warmup():
    assert Schedule.every(5).full_steps(12) == (0, 5, 10)
    assert Schedule.every(6, warmup=4).full_steps(22) == (0, 1, 2, 3, 9, 15, 21)
    assert Schedule.every(1).full_steps(4) == (0, 1, 2, 3)


def test_a_warmup_longer_than_the_run_makes_every_step_full():
    for rule in (Schedule.paper(5, warmup=9), Schedule.every(5, warmup=9)):
        assert rule.full_steps(4) == (0, 1, 2, 3)


@LAW
@given(st.floats(1, 60), st.integers(1, 80))
def test_ratio_spreads_as_many_full_steps_as_it_says(ratio, steps):
    full = Schedule.ratio(ratio).full_steps(steps)
    count = max(1, round(steps / ratio))
    assert full == tuple(floor(k * steps / count) for k in range(count))
    gaps = np.diff([*full, steps])
    assert full[0] == 0 and gaps.max() - gaps.min() <= 1


@LAW
@given(SCHEDULES, RUNS)
def test_rules_begin_at_the_start_of_the_run(rule, run):
    steps, start = run
    assert rule.full_steps(steps, start) == tuple(start + step for step in rule.full_steps(steps - start))


@LAW
@given(SCHEDULES, RUNS)
def test_full_steps_begin_with_the_start_increase_and_stay_in_the_run(rule, run):
    steps, start = run
    full = rule.full_steps(steps, start)
    assert full[0] == start and list(full) == sorted(set(full)) and full[-1] < steps


def test_named_steps_are_absolute():
    named = Schedule.at([0, 3, 9])
    assert named.full_steps(12) == (0, 3, 9)
    assert named.full_steps(12, start=3) == (3, 9)
    assert Schedule.at(np.array([0, 3, 9])) == named


@LAW
@given(SCHEDULES)
def test_a_schedule_reads_what_it_writes(rule):
    assert Schedule.parse(str(rule)) == rule
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize("text", ["paper:7", "paper:7:4", "every:5", "every:5:3", "at:0,3,9", "ratio:5", "ratio:5.56"])
def test_a_schedule_writes_what_it_reads(text):
    assert str(Schedule.parse(text)) == text


def test_a_drawing_shows_every_step():
    assert Schedule.paper(5).draw(20) == "####...#....#....#.."
    assert Schedule.at([0, 3, 5]).draw(8, start=3) == "---#.#.."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.paper(0), "interval .* got 0"),
        (lambda: Schedule.paper(5, warmup=0), "warmup .* got 0"),
        (lambda: Schedule.every(0), "interval .* got 0"),
        (lambda: Schedule.every(2.5), "interval .* got 2.5"),
        (lambda: Schedule.every(5, warmup=-1), "warmup .* got -1"),
        (lambda: Schedule.ratio(0.5), "at least 1, got 0.5"),
        (lambda: Schedule.ratio(float("nan")), "at least 1, got nan"),
        (lambda: Schedule.at([]), r"got \[\]"),
        (lambda: Schedule.at([-1, 3]), r"got \[-1, 3\]"),
        (lambda: Schedule.at([0, 3, 3]), r"got \[0, 3, 3\]"),
        (lambda: Schedule.at([0, 9, 3]), r"got \[0, 9, 3\]"),
        (lambda: Schedule.at([0, 1.5]), r"got \[0, 1.5\]"),
        (lambda: Schedule.at([3, 9]).full_steps(12), "begins at step 0 .* add 0"),
        (lambda: Schedule.at([0, 9]).full_steps(12, start=3), "begins at step 3 .* add 3"),
        (lambda: Schedule.at([0, 12]).full_steps(12), "below 12, got 12"),
        (lambda: Schedule.paper(5).full_steps(12, start=12), "got start 12"),
        (lambda: Schedule.paper(5).full_steps(12, start=-1), "got start -1"),
        (lambda: Schedule.parse("paper"), "got 'paper'"),
        (lambda: Schedule.parse("paper:x"), "got 'paper:x'"),
        (lambda: Schedule.parse("paper:7:3:1"), "got 'paper:7:3:1'"),
        (lambda: Schedule.parse("every:0"), "interval .* got 0"),
        (lambda: Schedule.parse("at:0,,3"), "got 'at:0,,3'"),
        (lambda: Schedule.parse("often:3"), "got 'often:3'"),
    ],
)
def test_errors_say_what_was_got(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_examples():
    assert doctest.testmod(schedule) == (0, 2)
