"""The budget: steps, minutes and signals end a run, on all ranks at once; bad losses are dated."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.training import budget
from pipelines.training.budget import Budget, Limits, NotFinite


class Ranks:
    """Stands for an Accelerator: this rank, and what the others contribute to a gather."""

    device = torch.device("cpu")

    def __init__(self, *others: tuple[float, float, float], main: bool = True) -> None:
        self.others, self.is_main_process = others, main
        self.gathers = 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.gathers += 1
        return torch.cat([mine, torch.tensor(self.others).reshape(-1, mine.shape[1])])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(budget.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {n: signal.getsignal(n) for n in budget.STOPPING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def make(ranks: Ranks, limits: Limits, **state: Any) -> Budget:
    return Budget(ranks, limits, **state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "step", "seconds", "progress"),
    [
        (Limits(10, None), 5, 1e9, 0.5),
        (Limits(10, None), 11, 0, 1.0),
        (Limits(None, 2), 10**9, 60, 0.5),
        (Limits(10, 2), 5, 90, 0.75),
        (Limits(10, 2), 9, 30, 0.9),
        (Limits(None, None), 5, 5, 0.0),
    ],
)
def test_whatever_is_reached_first_counts(
    limits: Limits, step: int, seconds: float, progress: float
) -> None:
    assert limits.progress(step, seconds) == progress


def test_steps_end_a_run_after_exactly_so_many(clock) -> None:
    budget = make(Ranks(), Limits(7, None))
    count = 0
    while not budget.spent:
        clock.seconds += 0.001
        assert budget.advance() is None
        count += 1
    assert (count, budget.step, budget.interrupted) == (7, 7, False)


def test_a_resumed_run_makes_the_rest(clock) -> None:
    budget = make(Ranks(), Limits(7, None), step=4, seconds=100.0)
    assert budget.progress == 4 / 7
    count = 0
    while not budget.spent:
        budget.advance()
        count += 1
    assert count == 3


def test_minutes_end_a_run_and_add_up_over_resumes(clock) -> None:
    budget = make(Ranks(), Limits(None, 1), step=5, seconds=50.0)
    while not budget.spent:
        clock.seconds += 0.5
        budget.advance()
    assert 60 <= budget.seconds <= 62


def test_ranks_agree_about_once_a_second_and_the_clock_stands_still_between(clock) -> None:
    ranks = Ranks()
    budget = make(ranks, Limits(None, 10))
    seen = set()
    for _ in range(1000):
        clock.seconds += 0.01
        budget.advance()
        seen.add(budget.progress)
    assert 5 <= ranks.gathers <= 30
    assert len(seen) <= ranks.gathers


def test_the_clock_is_that_of_rank_0(clock) -> None:
    # Rank 0 reports 90 seconds; the clock of this rank is not used.
    budget = make(Ranks((0, 90.0, 0), main=False), Limits(None, 3))
    clock.seconds += 10_000
    budget.advance()
    assert budget.seconds == 90
    assert budget.progress == 0.5


@pytest.mark.parametrize("number", budget.STOPPING)
def test_a_signal_ends_the_run_at_the_next_agreement(number: signal.Signals, clock) -> None:
    budget = make(Ranks(), Limits(1000, None))
    clock.seconds += 0.1
    budget.advance()
    assert budget.next_agreement == 11
    os.kill(os.getpid(), number)
    while budget.step < 10:
        assert not budget.interrupted
        budget.advance()
    assert not budget.interrupted
    budget.advance()
    assert budget.interrupted
    assert not budget.spent


def test_a_signal_to_one_rank_ends_all(clock) -> None:
    budget = make(Ranks((1, 0, 0)), Limits(100, None))
    budget.advance()
    assert budget.interrupted


def test_the_first_bad_loss_is_dated_however_late_it_is_noticed(clock) -> None:
    budget = make(Ranks(), Limits(100, None))
    budget.every, budget.next_agreement = 10, 10
    found = None
    for step in range(1, 11):
        value = float("nan") if step in (4, 6) else 1.0
        budget.watch(torch.tensor(value))
        found = budget.advance()
        assert (found is None) == (step < 10)
    assert found == NotFinite(4, ("loss",))


def test_a_bad_loss_of_another_rank_counts_and_the_earliest_wins(clock) -> None:
    budget = make(Ranks((0, 0, 3.0), (0, 0, 0), (0, 0, 2.0)), Limits(100, None))
    budget.watch(torch.tensor(float("inf")))
    assert budget.advance() == NotFinite(1, ("loss",))
    budget = make(Ranks((0, 0, 3.0), (0, 0, 0), (0, 0, 2.0)), Limits(100, None))
    budget.watch(torch.tensor(1.0))
    assert budget.advance() == NotFinite(2, ("loss",))


def test_what_was_not_finite_is_named(clock) -> None:
    budget = make(Ranks(), Limits(9, None), watched=("loss", "dice", "gradient"))
    budget.watch(torch.tensor([float("nan"), 0.5, float("inf")]))
    assert budget.advance() == NotFinite(1, ("loss", "gradient"))


def test_before_weights_are_saved_the_ranks_agree_that_they_are_finite(clock) -> None:
    ranks = Ranks()
    budget = make(ranks, Limits(1000, None), saves=lambda step: step == 30)
    found = {}
    for step in range(1, 31):
        clock.seconds += 1e-4
        if step == 29:
            budget.watch(torch.tensor(float("nan")))
        if bad := budget.advance():
            found[step] = bad
    assert found == {30: NotFinite(29, ("loss",))}
    assert ranks.gathers < 10
