"""The server: which updates it takes and which it refuses, in any order, and its state on disk.

What each method does with the updates is tested in `test_algorithms` and `test_merging`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core_fixture import (
    ALL_METHODS,
    equal,
    made_delta,
    make_updates,
    net,
    norm_net,
    normal,
    play,
    soup_tensors,
)
from fedmerge import tickets
from fedmerge.algorithms import (
    IFCA,
    FedAvg,
    FedMerge,
    FedMergePaper,
    Ticket,
    Updates,
    make_method,
)
from fedmerge.errors import ConfigError, ModelError, StateError
from fedmerge.soup import Soup
from fedmerge.tickets import Refusal

COHORTS = (("a", "b", "c"), ("b", "d"), ("a", "d", "e", "c"))


def make_soup(method: Any = None, **options: Any) -> Soup:
    return Soup(method or FedMerge(d=3, sketch=8), net(), **options)


def changed(updates: Updates, i: int, **values: Any) -> Updates:
    """`updates` with entry i of the given fields replaced."""
    fields = {
        name: getattr(updates, name).clone() for name in ("delta", "n_examples", "steps", "lr")
    }
    for name, value in values.items():
        if name != "ticket":
            fields[name][i] = value
    tickets = list(updates.tickets)
    tickets[i] = values.get("ticket", tickets[i])
    return Updates(tuple(tickets), **fields)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "values"),
    [
        ("unknown", {"ticket": Ticket("nobody", 1, "00")}),
        ("stale", {"ticket": Ticket("b", 0, "00")}),
        ("stale", {"ticket": Ticket("b", 1, "00")}),
        ("non-finite", {"delta": float("nan")}),
        ("non-finite", {"delta": float("-inf")}),
        ("non-finite", {"lr": float("nan")}),
        ("non-finite", {"lr": float("inf")}),
        ("non-finite", {"lr": 0.0}),
        ("empty", {"n_examples": 0}),
        ("empty", {"n_examples": -3}),
        ("empty", {"steps": 0}),
    ],
)
def test_an_unsound_update_is_refused_and_changes_nothing(
    reason: str, values: dict[str, Any]
) -> None:
    clean, soup = make_soup(), make_soup()
    for one in (clean, soup):
        play(one, [("a", "b", "c")])
    sent = soup.send(("a", "b", "c"))
    delta = made_delta(soup, 3, 5)
    good = make_updates(sent, delta)
    refusals = soup.fold(changed(good, 1, **values))
    name = "nobody" if reason == "unknown" else "b"
    assert refusals == [Refusal(name, reason)]
    assert soup.refused == {reason: 1}
    # Invented names are counted, but not kept: they would fill the memory.
    assert soup.refused_by == ({} if reason == "unknown" else {name: {reason: 1}})
    # One bad number in a row of good ones is enough.
    if "delta" in values:
        single = good.delta.clone()
        single[1, 3] = values["delta"]
        assert soup.fold(make_updates(sent, single).take([1])) == [Refusal("b", reason)]
        assert soup.refused == {reason: 2}
    assert soup.commit() == ("a", "c")
    clean.send(("a", "b", "c"))
    clean.fold(good.take([0, 2]))
    clean.commit()
    assert equal(soup_tensors(soup), soup_tensors(clean))


def test_a_client_that_was_refused_may_send_a_sound_update() -> None:
    soup = make_soup()
    sent = soup.send(("a", "b"))
    good = make_updates(sent, made_delta(soup, 2, 5))
    assert len(soup.fold(changed(good, 1, steps=0))) == 1
    assert soup.fold(good.take([1])) == []
    assert sorted(soup.commit()) == ["a", "b"]


def test_a_sum_that_overflows_is_not_taken_for_a_bad_number() -> None:
    soup = Soup(FedAvg(), net(dtype=torch.float64))
    sent = soup.send(("a",))
    delta = torch.full((1, soup.setup.layout.size), 1e308, dtype=torch.float64)
    assert soup.fold(make_updates(sent, delta)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda delta: delta[:, :-1],
        lambda delta: delta[:, :0],
        lambda delta: torch.cat([delta, delta], 1),
        lambda delta: delta.double(),
        lambda delta: delta.half(),
        lambda delta: delta.long(),
    ],
)
def test_an_update_of_another_shape_or_dtype_is_refused(spoil: Any) -> None:
    soup = make_soup()
    sent = soup.send(("a", "b"))
    before = soup_tensors(soup)
    delta = spoil(made_delta(soup, 2, 5))
    refusals = soup.fold(make_updates(sent, delta))
    assert refusals == [Refusal("a", "shape"), Refusal("b", "shape")]
    assert soup.commit() == ()
    assert equal(soup_tensors(soup), before)


def test_a_second_fold_of_a_ticket_is_a_duplicate() -> None:
    clean, soup = make_soup(), make_soup()
    for one in (clean, soup):
        sent = one.send(("a", "b"))
        updates = make_updates(sent, made_delta(one, 2, 5))
        assert one.fold(updates) == []
    assert soup.fold(updates.take([1])) == [Refusal("b", "duplicate")]
    assert soup.fold(changed(updates, 0, delta=9.0).take([0])) == [Refusal("a", "duplicate")]
    assert soup.commit() == clean.commit() == ("a", "b")
    assert equal(soup_tensors(soup), soup_tensors(clean))
    # Twice within one call as well.
    sent = soup.send(("a", "a"))
    updates = make_updates(sent, made_delta(soup, 2, 6))
    assert soup.fold(updates) == [Refusal("a", "duplicate")]


def test_a_ticket_of_an_earlier_round_is_stale() -> None:
    soup = make_soup()
    old = soup.send(("a", "b"))
    late = make_updates(old, made_delta(soup, 2, 5))
    soup.fold(late.take([0]))
    soup.commit()
    assert soup.fold(late.take([1])) == [Refusal("b", "stale")]


def test_a_ticket_of_a_client_whose_row_moved_is_stale() -> None:
    """Same round, but merged from another row: the update is for a model it no longer gets."""
    soup = make_soup()
    play(soup, COHORTS)
    sent = soup.send(("a", "b"))
    tensors, facts = soup.state()
    tensors["rows.logits"][0, 0, 0] += 1e-9
    soup.restore(tensors, facts, "here")
    assert soup.fold(make_updates(sent, made_delta(soup, 2, 5))) == [Refusal("a", "stale")]


def test_an_update_of_unknown_clients_only_is_refused() -> None:
    soup, other = make_soup(), make_soup()
    updates = make_updates(other.send(("x", "y")), made_delta(soup, 2, 5))
    assert soup.fold(updates) == [Refusal("x", "unknown"), Refusal("y", "unknown")]
    assert soup.clients == ()


def test_counts_add_up_over_rounds_and_reasons() -> None:
    soup = make_soup()
    for t in range(3):
        sent = soup.send(("a", "b"))
        updates = make_updates(sent, made_delta(soup, 2, t))
        soup.fold(changed(updates, 0, steps=0))
        soup.fold(updates.take([1]))
        soup.commit()
    assert soup.refused == {"empty": 3, "duplicate": 3}
    assert soup.refused_by == {"a": {"empty": 3}, "b": {"duplicate": 3}}


# -- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_commit_of_an_empty_round_moves_nothing(method: str) -> None:
    soup = make_soup(make_method(method))
    soup.send(("a", "b"))
    before = soup_tensors(soup)
    assert soup.commit() == ()
    assert soup.version == 1
    assert equal(soup_tensors(soup), before)


def test_clients_join_at_any_round_with_a_uniform_row() -> None:
    soup = make_soup()
    play(soup, [("a", "b"), ("a", "b")])
    before = soup.rows(("a", "b"))
    soup.join(["b", "z", "z", "a"])
    assert soup.clients == ("a", "b", "z")
    assert equal(soup.rows(("a", "b")), before)
    weights = soup.weights(("z",))
    assert weights is not None
    assert torch.allclose(weights, torch.full((1, 2, 3), 1 / 3, dtype=torch.float64))
    sent = soup.send(("z", "new"))
    assert torch.equal(sent.message[0], sent.message[1])
    assert soup.fold(make_updates(sent, made_delta(soup, 2, 9))) == []
    assert soup.commit() == ("z", "new")
    assert not equal(soup.rows(("z",)), {n: v[:1] for n, v in before.items()})


def test_rows_are_in_the_order_asked_for_and_copies() -> None:
    soup = make_soup()
    play(soup, COHORTS)
    ab, ba = soup.rows(("a", "b")), soup.rows(("b", "a"))
    assert equal({n: v.flip(0) for n, v in ab.items()}, ba)
    before = soup_tensors(soup)
    ab["logits"].zero_()
    assert equal(soup_tensors(soup), before)
    whole, none = soup.weights(), soup.weights(())
    assert whole is not None
    assert none is not None
    assert len(whole) == 5
    assert len(none) == 0
    with pytest.raises(ConfigError, match='client "q" has not joined'):
        soup.rows(("a", "q"))


@pytest.mark.parametrize("call", ["join", "send", "used", "tickets", "rows", "weights"])
def test_a_text_is_not_taken_for_a_list_of_clients(call: str) -> None:
    soup = make_soup()
    soup.send(("a", "b"))
    told = 'clients = "ab": wanted a list of client names, e.g. ["ab"]'
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        getattr(soup, call)("ab")
    with pytest.raises(ConfigError, match="wanted a list of client names"):
        getattr(soup, call)("")
    assert soup.clients == ("a", "b")


def test_sending_changes_nothing() -> None:
    soup = make_soup()
    play(soup, COHORTS)
    before = soup_tensors(soup)
    first, second = soup.send(("a", "b")), soup.send(("b", "a"))
    assert torch.equal(first.message, second.message.flip(0))
    assert first.tickets == second.tickets[::-1] == soup.tickets(("a", "b"))
    used = soup.used(("a", "b"))
    assert torch.equal(used, soup.used(("b", "a")).flip(0))
    assert not torch.equal(used, first.message)  # others came in the last round
    assert equal(soup_tensors(soup), before)


@pytest.mark.parametrize("method", [FedMerge(d=3), FedMergePaper(d=3), FedAvg()])
def test_a_message_may_be_written_to_the_memory_of_an_earlier_one(method: Any) -> None:
    soup = make_soup(method)
    play(soup, COHORTS)
    wanted = soup.send(("d", "a"))
    earlier = torch.full_like(soup.used(("a", "b", "c")), 9.0)
    sent = soup.send(("d", "a"), out=earlier)
    assert torch.equal(sent.message, wanted.message)
    assert sent.tickets == wanted.tickets
    reused = sent.message.data_ptr() == earlier.data_ptr()
    assert reused is not isinstance(method, FedAvg)  # which sends everybody the same memory
    assert len(soup.send(("a", "b", "c", "d"), out=earlier).message) == 4


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("ordered", [False, True])
def test_updates_are_the_callers_again_after_a_fold(method: str, ordered: bool) -> None:
    made = []
    for spoil in (False, True):
        soup = Soup(make_method(method), net(), ordered=ordered)
        clients = tuple("abcdefghijklmn")
        sent = soup.send(clients)
        k, r = sent.message.shape[:2]
        extra = {
            "choice": torch.zeros(k, dtype=torch.int64),
            "membership": torch.full((k, 4), 0.25),
            "gain": normal(0, k, 5),
        }
        shape = soup.algorithm.update_shape(soup.setup.layout)
        delta = normal(1, k, *((r, shape[-1]) if len(shape) == 2 else shape))
        soup.fold(make_updates(sent, delta, extra=extra))
        if spoil:
            delta.fill_(7)
        soup.commit()
        made.append(soup_tensors(soup))
    assert equal(*made)


def test_joining_one_by_one_is_joining_at_once() -> None:
    names = [f"c{i}" for i in range(40)]
    at_once, one_by_one = make_soup(), make_soup()
    at_once.join(names)
    for name in names:
        one_by_one.join([name])
    play(one_by_one, [names[:3]])
    play(at_once, [names[:3]])
    assert equal(soup_tensors(one_by_one), soup_tensors(at_once))
    assert one_by_one.clients == at_once.clients == tuple(names)


def test_joining_moves_rows_to_larger_memory_a_few_times_only() -> None:
    soup = make_soup()
    places = set()
    for i in range(200):
        soup.join([f"c{i}"])
        places.add(soup._roster.tables["logits"].data_ptr())
    assert len(places) <= 9  # of 1, 2, 4, ... 256 rows


def folded(method: str, order: list[int], cuts: list[int], *, ordered: bool) -> Soup:
    """A round of five clients whose updates come in `order`, in chunks that end at `cuts`."""
    soup = Soup(make_method(method), net(dtype=torch.float64), seed=1, ordered=ordered)
    clients = ("e", "b", "a", "d", "c")
    for t in range(2):
        sent = soup.send(clients)
        extra = {
            "choice": torch.tensor([0, 1, 0, 1, 1]) % max(1, len(soup.shared.get("models", []))),
            "membership": normal(t, 5, 4, dtype=torch.float64).softmax(1),
            "gain": normal(t, 5, 5, dtype=torch.float64),
        }
        several = [made_delta(soup, 5, t + 10 * j) for j in range(sent.message.shape[1])]
        shape = soup.algorithm.update_shape(soup.setup.layout)
        delta = torch.stack(several, dim=1) if len(shape) == 2 else made_delta(soup, 5, t)
        updates = make_updates(
            sent, delta.to(torch.float64)[..., : shape[-1]].contiguous(), extra=extra
        )
        for start, stop in itertools.pairwise([0, *cuts, 5]):
            assert soup.fold(updates.take(order[start:stop])) == []
        soup.commit()
    return soup


@pytest.mark.parametrize(
    "method", [*ALL_METHODS, "ifca-warm:warm=1", "fesem:warm=1", "cfl:warm=0:eps1=1:eps2=0"]
)
def test_order_and_chunks_of_updates_do_not_matter(method: str) -> None:
    method = f"{method}:d=3" if "merge" in method or "ifca" in method else method
    first = folded(method, [0, 1, 2, 3, 4], [], ordered=False)
    exact = folded(method, [0, 1, 2, 3, 4], [], ordered=True)
    for order, cuts in (([4, 2, 0, 1, 3], [2, 3]), ([3, 4, 1, 0, 2], [1, 2, 3, 4])):
        a, b = soup_tensors(first), soup_tensors(folded(method, order, cuts, ordered=False))
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-7)
            if name != "rows.own":  # float32
                torch.testing.assert_close(b[name], a[name], rtol=1e-11, atol=1e-12)
        again = folded(method, order, cuts, ordered=True)
        assert equal(soup_tensors(again), soup_tensors(exact))


def test_statistics_are_merged_by_the_server_and_variances_stay_positive() -> None:
    soup = Soup(FedMerge(d=3), norm_net)
    layout = soup.setup.layout
    for t in range(6):
        sent = soup.send(("a", "b", "c"))
        delta = made_delta(soup, 3, t)
        delta[:, layout.n_params :] *= 0.1  # variances far below the initial ones
        delta[:, layout.counters] = float(t + 1)
        soup.fold(make_updates(sent, delta))
        soup.commit()
        variance = layout.views(soup.send(("a", "new")).message[:, 0])["1.running_var"]
        sent_back = layout.views(delta)["1.running_var"]
        assert bool((variance >= sent_back.amin(0) - 1e-6).all())
        assert bool((variance <= sent_back.amax(0) + 1e-6).all())
        assert soup.shared["models"][:, layout.counters].unique().tolist() == [t + 1]


# -- on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedMerge(d=3), FedMergePaper(d=3), FedAvg()])
def test_save_load_and_go_on_is_the_same_to_the_bit(method: Any, tmp_path: Path) -> None:
    whole = Soup(method, net())
    play(whole, COHORTS, seed=0)
    half = Soup(method, net())
    play(half, COHORTS[:1], seed=0)
    half.fold(changed(make_updates(half.send(("a",)), made_delta(half, 1, 0)), 0, steps=0))
    half.save(tmp_path)
    play(half, COHORTS, seed=7)  # what happens after a save does not change it
    loaded = Soup.open(tmp_path, method, net())
    assert (loaded.version, loaded.clients) == (1, COHORTS[0])
    assert loaded.refused == {"empty": 1}
    assert loaded.refused_by == {"a": {"empty": 1}}
    play(loaded, COHORTS[1:], seed=1)
    assert equal(soup_tensors(loaded), soup_tensors(whole))
    assert loaded.clients == whole.clients


def test_a_state_stays_what_it_was_when_the_server_goes_on() -> None:
    soup = make_soup()
    play(soup, COHORTS)
    tensors, facts = soup.state()
    kept = {name: value.clone() for name, value in tensors.items()}
    play(soup, COHORTS, seed=5)
    assert equal(tensors, kept)
    soup.restore(tensors, facts, "here")
    play(soup, COHORTS, seed=6)
    assert equal(tensors, kept)


def test_a_saved_state_does_not_hold_the_open_round(tmp_path: Path) -> None:
    soup = make_soup()
    play(soup, COHORTS)
    before = soup_tensors(soup)
    sent = soup.send(("a", "b"))
    updates = make_updates(sent, made_delta(soup, 2, 5))
    soup.fold(updates)
    soup.save(tmp_path)
    soup.load(tmp_path)
    assert equal(soup_tensors(soup), before)
    assert soup.fold(updates) == []  # not a duplicate: that round was dropped
    assert soup.commit() == ("a", "b")


def test_open_makes_a_new_soup_where_there_is_none(tmp_path: Path) -> None:
    soup = Soup.open(tmp_path / "none", FedAvg(), net(), seed=4)
    assert equal(soup_tensors(soup), soup_tensors(Soup(FedAvg(), net(), seed=4)))


@pytest.mark.parametrize(
    ("what", "method", "hidden", "options"),
    [
        ("method", FedAvg(), 4, {}),
        ("method", FedMerge(d=3, sketch=8, cap=0.2), 4, {}),
        ("model", FedMerge(d=3, sketch=8), 5, {}),
        ("model", FedMerge(d=3, sketch=8), 4, {"blocks": "whole"}),
        ("seed", FedMerge(d=3, sketch=8), 4, {"seed": 1}),
    ],
)
def test_a_state_of_another_run_is_refused(
    what: str, method: Any, hidden: int, options: dict[str, Any], tmp_path: Path
) -> None:
    soup = make_soup()
    play(soup, COHORTS)
    soup.save(tmp_path)
    with pytest.raises(StateError, match=f"is of another run: its {what} is") as caught:
        Soup.open(tmp_path, method, net(hidden), **options)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# -- a soup by itself -----------------------------------------------------------------------------


def test_what_depends_on_the_number_of_clients_has_a_value_without_it() -> None:
    for method, d in ((FedMerge(), 12), (FedMergePaper(), 5), (IFCA(), 4), (IFCA(warm=2), 1)):
        soup = Soup(method, net())
        assert len(soup.shared["models"]) == d
        assert soup.send(("a",)).message.shape[0] == 1


def test_half_precision_rows_are_folded() -> None:
    soup = Soup(FedMerge(d=3), net(dtype=torch.float16))
    play(soup, COHORTS)
    message: Tensor = soup.used(("a",))
    assert message.dtype == torch.float16
    assert bool(message.isfinite().all())


def test_one_huge_update_does_not_spoil_the_rows_of_others() -> None:
    soup = make_soup()
    sent = soup.send(("a", "b"))
    delta = made_delta(soup, 2, 0)
    delta[0] = 1e25
    soup.fold(make_updates(sent, delta))
    soup.commit()
    play(soup, COHORTS)
    for value in soup_tensors(soup).values():
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("choice", [torch.tensor([0, 7]), torch.tensor([0.0, 1.0]), None])
def test_what_is_sent_beside_an_update_is_checked_too(choice: Tensor | None) -> None:
    soup = make_soup(IFCA(d=2))
    sent = soup.send(("a", "b"))
    good = make_updates(sent, made_delta(soup, 2, 1))
    extra = {} if choice is None else {"choice": choice}
    bad = Updates(good.tickets, good.delta, good.n_examples, good.steps, good.lr, extra)
    refused = soup.fold(bad)
    assert Refusal("b", "shape") in refused
    right = Updates(
        good.tickets,
        good.delta,
        good.n_examples,
        good.steps,
        good.lr,
        {"choice": torch.ones(2).long()},
    )
    taken = {"a", "b"} - {r.client for r in soup.fold(right) if r.reason != "duplicate"}
    assert taken == {"a", "b"}
    assert set(soup.commit()) == {"a", "b"}


@pytest.mark.parametrize("unit", ["rows.unit", "shared.peak"])
def test_a_state_with_other_tables_is_of_another_version_and_changes_nothing(unit: str) -> None:
    soup, other = make_soup(), make_soup()
    soup.join(["a"])
    tensors, facts = soup.state()
    kind, _, name = unit.partition(".")
    tensors[f"{kind}.old"] = tensors.pop(unit)
    with pytest.raises(
        StateError, match=rf"state was made by another version.* keeps .*old.*{name}"
    ):
        other.restore(tensors, facts, "state")
    assert other.clients == ()


def test_parts_of_another_length_than_the_tickets_are_refused_whole() -> None:
    soup = make_soup()
    good = make_updates(soup.send(("a", "b")), made_delta(soup, 2, 1))
    short = Updates(good.tickets, good.delta, good.n_examples[:1], good.steps, good.lr)
    with pytest.raises(ModelError, match="2 tickets"):
        soup.fold(short)
    assert soup.fold(good) == []


@pytest.mark.parametrize("part", ["delta", "n_examples", "steps", "lr", "extra"])
def test_a_part_that_is_no_tensor_of_rows_is_told_in_a_line(part: str) -> None:
    soup = make_soup()
    good = make_updates(soup.send(("a", "b")), made_delta(soup, 2, 1))
    for given, told in (([1, 2], "a list"), (torch.tensor(3), "a single number")):
        name, value = ("gain", {"gain": given}) if part == "extra" else (part, given)
        with pytest.raises(ModelError, match=f"^{name} of the updates is {told}: wanted a tensor"):
            soup.fold(replace(good, **{part: value}))
    assert soup.fold(good) == []


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("ordered", [False, True])
def test_updates_count_by_their_values_whatever_graph_they_carry(
    method: str, ordered: bool
) -> None:
    made = []
    for graph in (False, True):
        soup = Soup(make_method(method), net(), ordered=ordered)
        sent = soup.send(("a", "b", "c", "d"))
        shape = soup.algorithm.update_shape(soup.setup.layout)
        extra = {
            "choice": torch.zeros(4, dtype=torch.int64),
            "membership": torch.full((4, 4), 0.25).requires_grad_(graph),
            "gain": normal(0, 4, 5).requires_grad_(graph),
        }
        delta = normal(1, 4, *shape).requires_grad_(graph)
        lr = torch.full((4,), 0.1, dtype=torch.float64).requires_grad_(graph)
        updates = make_updates(sent, delta * 1.0, lr=lr * 1.0, extra=extra)
        refusals = [soup.fold(updates.take(places)) for places in ([0], [1, 2, 3])]
        assert updates.delta.requires_grad is graph
        committed = soup.commit()
        tensors = soup_tensors(soup)
        assert not any(tensor.requires_grad for tensor in tensors.values())
        made.append((refusals, committed, tensors))
    assert made[0][:2] == made[1][:2]
    assert equal(made[0][2], made[1][2])


def test_an_abandoned_round_can_be_played_again() -> None:
    once, twice = make_soup(), make_soup()
    for soup in (once, twice):
        updates = make_updates(soup.send(("a", "b")), made_delta(soup, 2, 1))
        if soup is twice:
            soup.fold(updates.take([0]))
            soup.abandon()
        assert soup.fold(updates) == []
        soup.commit()
    assert equal(soup_tensors(once), soup_tensors(twice))


def test_equal_parameters_still_get_models_that_differ() -> None:
    def zeros() -> torch.nn.Module:
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        return layer

    models = Soup(FedMerge(d=3, init_noise=0.1), zeros).shared["models"]
    assert 0.05 < float(models.std()) < 0.2


@pytest.mark.parametrize("blocks", ["layer", "whole"])
def test_the_reference_rule_judges_by_the_last_layer_whatever_the_blocks(blocks: Any) -> None:
    soup = Soup(FedMergePaper(d=3), net(), blocks=blocks)
    start, stop = soup.setup.layout.last_layer
    n_head = 4 * 3 + 3
    assert (start, stop) == (soup.setup.layout.n_params - n_head, soup.setup.layout.n_params)
    delta = made_delta(soup, 3, 5)
    updates = make_updates(soup.send(("a", "b", "c")), delta)
    soup.fold(updates)
    soup.commit()
    moved = soup.rows(["a", "b", "c"])["logits"]
    other = Soup(FedMergePaper(d=3), net(), blocks=blocks)
    body = delta.clone()
    body[:, :start] = 0  # what the earlier layers did must not matter to the rows
    other.fold(make_updates(other.send(("a", "b", "c")), body))
    other.commit()
    assert torch.equal(moved, other.rows(["a", "b", "c"])["logits"])
    assert float(moved.abs().max()) > 0


def test_each_row_is_hashed_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    original = tickets._digests

    def counting(rows: Any, k: int) -> list[str]:
        hashed.append(k)
        return original(rows, k)

    monkeypatch.setattr(tickets, "_digests", counting)
    soup = make_soup()
    sent = soup.send(["a", "b", "c"])
    assert soup.send(["c", "a"]).tickets == (sent.tickets[2], sent.tickets[0])
    assert not soup.fold(make_updates(sent, made_delta(soup, 3, 5)))
    assert hashed == [3]
    soup.commit()
    after = soup.send(["a", "b", "c"]).tickets
    assert hashed == [3, 3]
    names = ["a", "b", "c"]
    named = soup._roster.rows(
        names, ("logits", "count")
    )  # all of a row that `send` reads, and more
    assert [ticket.row for ticket in after] == original(named, 3)
    assert not {t.row for t in after} & {t.row for t in sent.tickets}


def test_a_client_that_joins_in_an_open_round_is_known_from_then_on() -> None:
    soup, other = make_soup(), make_soup()
    soup.send(["a"])
    updates = make_updates(other.send(["a", "b"]), made_delta(soup, 2, 5))
    assert soup.fold(updates) == [Refusal("b", "unknown")]
    soup.join(["b"])
    assert soup.fold(updates.take([1])) == []


@pytest.mark.parametrize("chunk", [1, 3, 10, 19])
def test_the_reference_rule_uses_every_update_whatever_came_together(chunk: int) -> None:
    soup = Soup(FedMergePaper(d=3), net())
    names = [f"c{i:02d}" for i in range(19)]
    models, delta = soup.shared["models"].clone(), made_delta(soup, 19, 5)
    updates = make_updates(soup.send(names), delta)
    for first in range(0, 19, chunk):
        assert not soup.fold(updates.take(range(first, min(first + chunk, 19))))
    soup.commit()
    share = torch.softmax(soup.rows(names)["logits"][:, 0], -1) * updates.n_examples[:, None]
    wanted = models - (share.T @ delta.double() / share.sum(0)[:, None])
    assert torch.allclose(soup.shared["models"].double(), wanted, atol=1e-6)
