"""The task: its layout, that it asks what it says, and that windows cannot answer it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dsv4ref.accuracy.task import TASK, V4_TINY_TRAINED, VOCABULARY, Task, answers
from dsv4ref.config import LAYER_KINDS


def test_a_query_is_answered_by_its_operator_of_the_value_beside_its_key() -> None:
    v, examples = VOCABULARY, TASK.examples(3, 11)
    for row in examples.tokens.tolist():
        for position in examples.retrieval.tolist():
            operator, key = row[position - 1] - v.first_operator, row[position]
            (place,) = [p for p in range(examples.tail) if row[p] == key]
            value = row[place + 1] - v.first_value
            want = v.first_answer + int(answers(torch.tensor(operator), torch.tensor(value)))
            assert row[position + 1] == want, f"query at {position}: {row[position + 1]}, expected {want}"


def test_every_operator_is_a_permutation_and_the_first_is_plain_lookup() -> None:
    values = torch.arange(VOCABULARY.n_values)
    tables = [answers(torch.full_like(values, op), values) for op in range(VOCABULARY.n_operators)]
    assert all(table.sort().values.equal(values) for table in tables)
    assert tables[0].equal(values)
    assert not any(one.equal(other) for one, other in pairwise(tables))


def test_copying_asks_for_the_letters_again_within_the_window() -> None:
    examples = TASK.examples(3, 12)
    distance = TASK.letters + 1
    assert examples.targets(examples.copying).equal(examples.tokens[:, examples.copying + 1 - distance])
    assert distance < V4_TINY_TRAINED.window_size


def test_no_chain_of_windows_reaches_from_a_query_to_a_pair_and_top_k_drops_entries() -> None:
    examples, config = TASK.examples(4, 13), V4_TINY_TRAINED
    is_key = (examples.tokens >= VOCABULARY.first_key) & (examples.tokens < VOCABULARY.first_value)
    last_pair = int(is_key[:, : TASK.copy_start].nonzero()[:, 1].max()) + 1
    reach = config.n_layers * (config.window_size - 1)
    assert int(examples.retrieval[0]) - last_pair > reach
    assert int(examples.retrieval[0]) >= config.first_dropping_context
    assert int(examples.retrieval[0]) >= 2 * 128, "two C128 entries"


def test_a_pair_stands_in_one_group_and_no_group_holds_two() -> None:
    v, tokens = VOCABULARY, TASK.examples(8, 14).tokens[:, : 4 * TASK.groups]
    keys = (tokens >= v.first_key) & (tokens < v.first_value)
    rows, places = keys.nonzero(as_tuple=True)
    assert int(keys.sum()) == 8 * TASK.pairs
    assert bool((places % 4 < 3).all())
    assert int(keys.unflatten(1, (-1, 4)).sum(dim=2).max()) == 1
    beside = tokens[rows, places + 1]
    assert bool(((beside >= v.first_value) & (beside < v.first_answer)).all())


def test_the_seed_decides_everything() -> None:
    one, same, other = (TASK.examples(4, seed).tokens for seed in (3, 3, 4))
    assert one.equal(same)
    assert not one.equal(other)
    assert tuple(one.shape) == (4, TASK.length)


def test_the_model_has_every_kind_of_layer_and_the_widths_that_byte_formats_need() -> None:
    config = V4_TINY_TRAINED
    assert set(config.main_ratios) == set(LAYER_KINDS)
    assert {config.is_hash_layer(layer) for layer in range(config.n_layers)} == {True, False}
    assert (config.head_dim, config.nope_dim, config.index_n_heads, config.index_head_dim) == (512, 448, 64, 128)
    assert config.vocab_size == VOCABULARY.size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": 52}, "pairs: got 52, expected at most 48"),
        ({"groups": 8}, "pairs: got 24, expected at most 7"),
        ({"queries": 25}, "queries: got 25, expected at most pairs = 24"),
        ({"gap": 0}, "gap: got 0, expected a positive integer"),
        ({"operators": 7}, "operators: got 7, expected at most 6"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TASK, **changes)
    with pytest.raises(ValueError, match="count: got 0"):
        Task().examples(0, 1)
