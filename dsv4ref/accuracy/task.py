"""The task of the trained model: look up pairs far outside the window, apply an operator to what was found, and copy.

A sequence, all of one layout (numbers of `TASK`)::

    bos f f f | f k v f | f f f f | k v f f | ...   52 groups of 4: 24 of them hold a key and its value, the rest filler
    f f f ... f                                     a gap of 32 filler tokens: no window, not even three layers of
                                                    windows one behind the other, reaches from a query back to a pair
    <copy> x1 .. x7 <again> x1 .. x7                copying: always 8 tokens back, within the window
    op k a | op k a | ...                           12 queries; the answer a is due at k

    a = (m_op * v + c_op) mod 32                    v the value that stands beside k, op one of six operators, the
                                                    first of which leaves v as it is

Only a C4 layer leads from a query to its pair: windows are too short, an entry of C128 pools 128 tokens. The context is
beyond the point where the indexer's top-k drops entries, so that the indexer has to be right. And five answers of six
are not the value that was found: five permutations of 32 values are 160 facts, which the experts hold.

`V4_TINY_TRAINED` has every kind of layer (SWA with hashed experts, C4 and C128 with learned routers) and the widths
that byte formats need: heads of 512, so that the 584-byte FP8 cache carries them, and 64 index heads of 128, because
with few of them exact-zero score ties let two correct implementations differ. What is small: the hidden width, the
window of 16, the top-k of 8 entries, one expert per token. With that window a C128 layer does not see those tokens of
its open group that are further back than 16; released models never leave such a hole.

Source: the two tasks are the common ones for long-context attention (associative recall, copying); nothing published is
claimed for this composition.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dsv4ref.config import C4, C128, SWA, ModelConfig, RouterConfig

__all__ = ["TASK", "V4_TINY_TRAINED", "VOCABULARY", "Examples", "Task", "Vocabulary", "answers"]


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: four markers, then one range per kind of token, in this order."""

    bos: int = 0
    eos: int = 1
    copy: int = 2
    again: int = 3
    n_operators: int = 6
    n_keys: int = 48
    n_values: int = 32
    n_letters: int = 16
    n_fillers: int = 12

    @property
    def first_operator(self) -> int:
        """The first of ``n_operators``."""
        return 4

    @property
    def first_key(self) -> int:
        """The first of ``n_keys``."""
        return self.first_operator + self.n_operators

    @property
    def first_value(self) -> int:
        """The first of ``n_values``, as written beside keys."""
        return self.first_key + self.n_keys

    @property
    def first_answer(self) -> int:
        """The first of ``n_values`` answers: other tokens than the values."""
        return self.first_value + self.n_values

    @property
    def first_letter(self) -> int:
        """The first of ``n_letters``, which are copied."""
        return self.first_answer + self.n_values

    @property
    def first_filler(self) -> int:
        """The first of ``n_fillers``."""
        return self.first_letter + self.n_letters

    @property
    def size(self) -> int:
        """Tokens in all."""
        return self.first_filler + self.n_fillers


VOCABULARY = Vocabulary()

V4_TINY_TRAINED = ModelConfig(
    name="v4-tiny-trained",
    vocab_size=VOCABULARY.size,
    hidden_size=64,
    n_layers=3,
    n_mtp_layers=0,
    n_heads=2,
    q_lora_rank=24,
    o_groups=2,
    o_lora_rank=32,
    window_size=16,
    index_topk=8,
    moe_inter_dim=32,
    n_hash_layers=1,
    router=RouterConfig(n_experts=32, top_k=1, scoring="sqrtsoftplus", route_scale=1.5),
    max_position=4096,
    compress_ratios=(SWA, C4, C128),
)
"""The shape that data/tiny_v4.safetensors holds weights for."""

# a = (m v + c) mod 32: with m odd every operator is a permutation of the values, the first one the identity.
_FACTORS = (1, 5, 11, 19, 27, 13)
_OFFSETS = (0, 7, 21, 12, 30, 3)


def answers(operators: Tensor, values: Tensor) -> Tensor:
    """What an operator makes of a value.

    Args:
        operators: int64, 0 to 5.
        values: int64 of the same shape, 0 to 31.

    Returns:
        int64 of that shape, 0 to 31; for each operator a permutation of the values.
    """
    factors, offsets = torch.tensor(_FACTORS), torch.tensor(_OFFSETS)
    return (factors[operators] * values + offsets[operators]) % VOCABULARY.n_values


@dataclass(frozen=True)
class Examples:
    """Sequences of one layout, and where in them something is asked.

    Args:
        tokens: int64 ``[B, T]``.
        retrieval: int64 ``[Q]``, positions whose next token is the answer of a query.
        copying: int64 ``[C]``, positions whose next token repeats the one 7 before.
        tail: the position from which on tokens are decoded one by one; everything before is the prompt.
    """

    tokens: Tensor
    retrieval: Tensor
    copying: Tensor
    tail: int

    def targets(self, positions: Tensor) -> Tensor:
        """The tokens due after ``positions``: int64 ``[B, len(positions)]``."""
        return self.tokens[:, positions + 1]


@dataclass(frozen=True)
class Task:
    """A layout: how many groups, pairs, filler tokens, letters and queries a sequence has.

    Args:
        groups: groups of 4 tokens at the start, the first of them with bos.
        pairs: of the other groups, how many hold a pair.
        gap: filler tokens between groups and copying.
        letters: letters that are copied.
        queries: of the pairs, how many are asked for, each once.
        operators: of the six, how many are used, from the first; with one, an answer is the value itself.

    Raises:
        ValueError: more pairs than groups or keys, more operators than six, or more queries than
            pairs.
    """

    groups: int = 52
    pairs: int = 24
    gap: int = 32
    letters: int = 7
    queries: int = 12
    operators: int = 6

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{item.name}: got {value!r}, expected a positive integer")
        most = min(self.groups - 1, VOCABULARY.n_keys)
        if self.pairs > most:
            raise ValueError(f"pairs: got {self.pairs}, expected at most {most}: one per group and key, none with bos")
        if self.operators > VOCABULARY.n_operators:
            raise ValueError(f"operators: got {self.operators}, expected at most {VOCABULARY.n_operators}")
        if self.queries > self.pairs:
            raise ValueError(f"queries: got {self.queries}, expected at most pairs = {self.pairs}")

    @property
    def copy_start(self) -> int:
        """Position of the copy marker."""
        return C4 * self.groups + self.gap

    @property
    def query_start(self) -> int:
        """Position of the first query's operator; decoding starts here."""
        return self.copy_start + 2 * (self.letters + 1)

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.query_start + 3 * self.queries

    def examples(self, count: int, seed: int) -> Examples:
        """Random sequences.

        Args:
            count: B.
            seed: same count and seed, same sequences. Training draws from seeds of 1,000,000 and up.

        Returns:
            `Examples`.

        Raises:
            ValueError: ``count`` is not positive.
        """
        if count < 1:
            raise ValueError(f"count: got {count}, expected at least 1")
        v, rng = VOCABULARY, torch.Generator().manual_seed(seed)

        def draw(first: int, kinds: int, *shape: int) -> Tensor:
            return torch.randint(first, first + kinds, (count, *shape), generator=rng)

        def distinct(kinds: int, chosen: int) -> Tensor:
            return torch.rand(count, kinds, generator=rng).argsort(dim=1)[:, :chosen]

        tokens = draw(v.first_filler, v.n_fillers, self.length)  # [B, T]
        tokens[:, 0] = v.bos

        keys, values = distinct(v.n_keys, self.pairs), draw(0, v.n_values, self.pairs)  # [B, pairs]
        # A pair stands anywhere in its group, but never across two: an entry pools it whole.
        places = C4 * (1 + distinct(self.groups - 1, self.pairs)) + draw(0, C4 - 1, self.pairs)
        tokens.scatter_(1, places, v.first_key + keys)
        tokens.scatter_(1, places + 1, v.first_value + values)

        start, letters = self.copy_start, draw(v.first_letter, v.n_letters, self.letters)
        span = self.letters + 1
        tokens[:, start], tokens[:, start + span] = v.copy, v.again
        tokens[:, start + 1 : start + span] = letters
        tokens[:, start + span + 1 : start + 2 * span] = letters

        operators = draw(0, self.operators, self.queries)
        queries = self.query_start + 3 * torch.arange(self.queries)  # [Q]
        tokens[:, queries] = v.first_operator + operators
        tokens[:, queries + 1] = v.first_key + keys[:, : self.queries]
        tokens[:, queries + 2] = v.first_answer + answers(operators, values[:, : self.queries])
        return Examples(tokens, queries + 1, start + span + torch.arange(self.letters), self.query_start)


TASK = Task()
"""What the shipped weights are trained and scored on: 292 tokens."""
