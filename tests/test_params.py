"""A module as one row: where everything lies, that it is shared or copied as said, what is refused.

Training and merging of rows have test files of their own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from core_fixture import net, norm_net, normal
from fedmerge.errors import ModelError
from fedmerge.params import Layout, build


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b)


@pytest.mark.parametrize("blocks", ["layer", "whole"])
def test_row_and_load_give_the_module_back_to_the_bit(blocks: str) -> None:
    first, second = build(norm_net, 0), build(norm_net, 1)
    first.train()
    first(normal(2, 8, 5))  # statistics and counters that are not the initial ones
    layout = Layout.of(first, blocks)
    row = layout.row(first)
    assert row.shape == (layout.size,)
    assert not same(values(second), values(first))
    layout.load(second, row)
    assert same(values(second), values(first))
    # Both keep memory of their own.
    row.zero_()
    assert same(values(second), values(first))


def test_load_rounds_counters_and_keeps_their_dtype() -> None:
    module = norm_net()
    layout = Layout.of(module)
    row = layout.row(module)
    row[layout.counters] = 6.9999995
    layout.load(module, row)
    counter = module.get_buffer("1.num_batches_tracked")
    assert counter.dtype == torch.int64
    assert int(counter) == 7
    layout.bind(module, row)
    assert int(module.get_buffer("1.num_batches_tracked")) == 7


def test_a_row_holds_every_parameter_where_the_layout_says() -> None:
    module = net()()
    layout = Layout.of(module)
    row = layout.row(module)
    for name, part in layout.views(row).items():
        assert torch.equal(part, module.get_parameter(name))
    stacked = layout.views(torch.stack([row, row + 1]))
    assert torch.equal(stacked["2.bias"][1], module.get_parameter("2.bias") + 1)
    stacked["2.bias"].zero_()
    assert torch.equal(layout.views(row)["2.bias"], module.get_parameter("2.bias"))
    assert layout.n_bytes == layout.size * 4 == sum(p.numel() for p in module.parameters()) * 4


def test_training_a_bound_module_writes_into_the_row() -> None:
    module = norm_net()
    layout = Layout.of(module)
    row = layout.row(module)
    before = row.clone()
    layout.bind(module, row)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(normal(3, 8, 5)).square().sum().backward()
    optimiser.step()
    layout.collect(module, row)
    changed = row != before
    # Not one number stays: weights by the step, statistics and the counter by the forward pass.
    # (A ReLU may leave a unit without gradient, so weights are compared layer by layer.)
    for entry in layout.entries:
        if entry.name != "0.bias":  # BatchNorm takes the mean out: its gradient is zero
            assert changed[entry.start : entry.stop].any(), entry.name
    assert torch.equal(layout.row(module), row)
    assert row[layout.counters].tolist() == [1.0]


def test_blocks_by_layer_whole_mapping_and_function() -> None:
    module = net()()
    assert Layout.of(module).blocks == ("0", "2")
    assert Layout.of(module, "whole").blocks == ("model",)
    mapping = {"0.weight": "body", "0.bias": "body", "2.weight": "head", "2.bias": "head"}
    assert Layout.of(module, mapping).blocks == ("body", "head")
    kinds = Layout.of(module, lambda name: name.split(".")[1])
    assert kinds.blocks == ("weight", "bias")


def test_a_block_of_parameters_that_are_not_adjacent_is_adjacent_in_the_row() -> None:
    module = net(hidden=4)()
    layout = Layout.of(module, lambda name: name.split(".")[1])
    assert [e.name for e in layout.entries] == ["0.weight", "2.weight", "0.bias", "2.bias"]
    assert layout.spans == ((0, 32), (32, 39))
    assert layout.segments == ((0, 32, 0), (32, 39, 1))
    row = layout.row(module)
    assert torch.equal(row[20:32], module.get_parameter("2.weight").reshape(-1))
    assert torch.equal(row[32:36], module.get_parameter("0.bias"))
    other = build(net(hidden=4), 5)
    layout.load(other, row)
    assert same(values(other), values(module))


def test_gradient_places_follow_the_module_not_the_row() -> None:
    module = net(hidden=4)()
    layout = Layout.of(module, lambda name: name.split(".")[1])
    assert layout.gradient_places(module) == [(0, 20), (32, 36), (20, 32), (36, 39)]


def test_statistics_belong_to_the_block_of_their_layer() -> None:
    layout = Layout.of(norm_net())
    assert layout.blocks == ("0", "1", "3")
    kinds = {e.name: (e.kind, e.block) for e in layout.entries}
    assert kinds["1.running_var"] == ("buffer", 1)
    assert kinds["1.num_batches_tracked"] == ("counter", 1)
    assert layout.n_params == layout.size - 9
    assert layout.counters == slice(layout.size - 1, layout.size)
    # Spans are parameters only; segments cover the row.
    assert layout.spans[-1][1] == layout.n_params
    ends = [0, *(stop for _, stop, _ in layout.segments)]
    assert [start for start, _, _ in layout.segments] == ends[:-1]
    assert ends[-1] == layout.size


def test_a_tied_parameter_has_one_place() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    module = Tied()
    layout = Layout.of(module)
    assert [e.name for e in layout.entries] == ["a.weight", "a.bias", "b.bias"]
    layout.bind(module, torch.zeros(layout.size))
    assert module.b.weight is module.a.weight
    assert not module.b.weight.any()


def test_frozen_parameters_and_non_persistent_buffers_do_not_travel() -> None:
    module = net()()
    module[0].weight.requires_grad_(False)
    module.register_buffer("mask", torch.ones(3), persistent=False)
    module.register_buffer("scale", torch.ones(2))
    layout = Layout.of(module)
    assert [e.name for e in layout.entries] == ["0.bias", "2.weight", "2.bias", "scale"]
    other = build(net(), 5)
    other[0].weight.requires_grad_(False)
    other.register_buffer("mask", torch.zeros(3), persistent=False)
    other.register_buffer("scale", torch.zeros(2))
    frozen = other.get_parameter("0.weight").clone()
    layout.bind(other, layout.row(module))
    assert torch.equal(other.get_parameter("0.weight"), frozen)
    assert not other.get_buffer("mask").any()
    assert other.get_buffer("scale").all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    module = net(dtype=dtype)()
    layout = Layout.of(module)
    row = layout.row(module)
    assert row.dtype == layout.dtype == dtype
    assert layout.n_bytes == layout.size * dtype.itemsize
    with pytest.raises(ModelError, match=r"wanted 39 of"):
        layout.load(module, row.float())


def test_what_cannot_be_laid_out_is_refused() -> None:
    with pytest.raises(ModelError, match=r"dtype torch\.float32, torch\.float64.*module\.to"):
        Layout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    with pytest.raises(ModelError, match="ReLU has no trainable parameter"):
        Layout.of(nn.ReLU())
    with pytest.raises(ModelError, match=r'blocks = "layers": wanted "layer", "whole"'):
        Layout.of(net()(), "layers")
    with pytest.raises(ModelError, match=r'no block for the parameter "2\.weight"'):
        Layout.of(net()(), {"0.weight": "a", "0.bias": "a"})


@pytest.mark.parametrize("call", ["row", "load", "bind"])
def test_a_module_of_another_architecture_is_refused(call: str) -> None:
    layout = Layout.of(net(hidden=4)())
    row = torch.zeros(layout.size)

    def use(module: nn.Module) -> None:
        if call == "row":
            layout.row(module)
        else:
            getattr(layout, call)(module, row)

    with pytest.raises(ModelError, match=r'"0\.weight" has shape \(6, 5\), wanted \(4, 5\)'):
        use(net(hidden=6)())
    with pytest.raises(ModelError, match=r'no "2\.weight"'):
        use(nn.Sequential(nn.Linear(5, 4)))
    with pytest.raises(ModelError, match=r'unexpected parameter "3\.weight"'):
        use(nn.Sequential(*net(hidden=4)(), nn.Linear(3, 3)))


@pytest.mark.parametrize("call", ["load", "bind"])
def test_several_rows_are_not_taken_for_one(call: str) -> None:
    module = net()()
    layout = Layout.of(module)
    row = layout.row(module)
    for rows in (row[None], torch.stack([row, row]), row[0]):
        with pytest.raises(ModelError, match=r"^a row of shape \(.*\), wanted \(\d+,\): take one"):
            getattr(layout, call)(module, rows + 1)
    assert torch.equal(layout.row(module), row)


def test_the_fingerprint_tells_architectures_blocks_and_dtypes_apart() -> None:
    prints = [
        Layout.of(net()()).fingerprint,
        Layout.of(net(hidden=5)()).fingerprint,
        Layout.of(net()(), "whole").fingerprint,
        Layout.of(net(dtype=torch.float64)()).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert Layout.of(build(net(), 9)).fingerprint == prints[0]


def test_an_update_is_a_difference_of_parameters_and_the_values_of_buffers() -> None:
    layout = Layout.of(norm_net())
    start, end = normal(1, 2, layout.size), normal(2, 2, layout.size)
    kept = start.clone(), end.clone()
    update = layout.update(start, end)
    n = layout.n_params
    assert torch.equal(update[:, :n], (start - end)[:, :n])
    assert torch.equal(update[:, n:], end[:, n:])
    assert torch.equal(start, kept[0])
    assert torch.equal(end, kept[1])
    back = layout.end(start, update)
    torch.testing.assert_close(back, end)
    assert torch.equal(back[:, n:], end[:, n:])


def test_build_gives_independent_models_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    module = net()()
    torch.set_rng_state(state)
    layout = Layout.of(module)
    for source in (net(), module):
        rows = [layout.row(build(source, 3, j)) for j in range(3)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            # Not one weight in common.
            assert not (rows[i] == rows[j]).any()
        assert torch.equal(rows[1], layout.row(build(source, 3, 1)))
        assert not torch.equal(rows[1], layout.row(build(source, 4, 1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_index_zero_of_a_module_keeps_its_values_and_the_module_is_not_touched() -> None:
    module = net()()
    before = copy.deepcopy(module)
    made = build(module, 3)
    assert same(values(made), values(module))
    for parameter in made.parameters():
        parameter.data.zero_()
    build(module, 3, 1)
    assert same(values(module), values(before))


def test_a_model_function_must_return_a_module() -> None:
    with pytest.raises(ModelError, match="returned int, not a Module"):
        build(lambda: 3, 0)
