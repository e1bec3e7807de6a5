"""Grid search with extensions."""

import math
from dataclasses import dataclass

from antransformer.runs.search import EXTENSIONS, GridSearch, extension, grid_powers, neighbours
from antransformer.runs.settings import flatten, unflatten
from helpers.fake_queue import FakeQueue


@dataclass
class NamedJob:
    name: str
    value: float

    @property
    def config(self):
        return self


def search_with(loss, seeds=1):
    return GridSearch(
        FakeQueue(loss), lambda key, value: [NamedJob(f"{key}{value:g}s{s}", value) for s in range(seeds)]
    )


def test_grid_powers():
    assert list(grid_powers(5)) == [-2, -1, 0, 1, 2] and list(grid_powers(2)) == [-1, 0]


def test_a_grid_is_extended_four_times_at_most():
    losses = {value: 1 / value for value in (1.0, 2.0, 4.0)}
    for _ in range(20):
        added = extension(losses, 3, 2.0)
        if not added:
            break
        losses |= {value: 1 / value for value in added}
    assert len(losses) == 3 + EXTENSIONS


def test_a_grid_is_extended_where_the_best_is_at_an_edge():
    assert extension({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}, 3, 2.0) == []
    assert extension({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, 3, 2.0) == [8.0]
    assert extension({1.0: 1.0, 2.0: 2.0, 4.0: math.inf}, 3, 2.0) == [0.5]
    assert extension({2.0: math.inf, 1.0: math.inf, 4.0: math.inf}, 3, 2.0) == [0.5]  # all diverged: lower
    assert neighbours({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}, 4.0) == [0.5, 8.0]


def test_grids_are_extended_in_rounds_until_every_best_is_inside():
    search, extensions = search_with(lambda job: abs(job.value - (8 if job.name.startswith("a") else 2))), []
    grids = {"a": [1.0, 2.0, 4.0], "b": [1.0, 2.0, 4.0]}
    search.run_grids(grids, lambda key, losses: extension(losses, 3, 2.0), lambda: extensions.append(1))
    assert search.queue.calls == [["a1s0", "a2s0", "a4s0", "b1s0", "b2s0", "b4s0"], ["a8s0"], ["a16s0"]]
    assert len(extensions) == 2 and min(search.losses("a"), key=search.losses("a").get) == 8


def test_the_loss_of_a_value_is_the_mean_over_seeds():
    search = search_with(lambda job: job.value + int(job.name[-1]), seeds=3)
    search.run({"a": [1.0, 2.0]})
    assert search.losses("a") == {1.0: 2.0, 2.0: 3.0} and len(search.results["a"][1.0]) == 3


def test_nothing_is_run_without_grids():
    search = search_with(lambda job: 1.0)
    search.run_grids({}, lambda key, losses: [])
    assert search.queue.calls == [] and search.results == {}


def test_flatten_inverts_unflatten():
    assert unflatten("model.s_scale", 1) == {"model": {"s_scale": 1}} and unflatten("lr", 2) == {"lr": 2}
    assert flatten({"lr": 2, "model": {"s_scale": 1}}) == {"lr": 2, "model.s_scale": 1}
