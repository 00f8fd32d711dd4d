"""Model shapes: DeepSeek-V4 Flash and Pro, a tiny V4 for CPU tests, and the parts of V3.2 that a chapter needs.

Released values, from DeepSeek's inference code and the published configurations. Two traps when comparing with other
code: the defaults of DeepSeek's own ``ModelArgs`` dataclass (rope factor 40, compressed theta 40000, 7 layers, 8
experts, no clamp, route scale 1) are not release values; and the layer list that transformers makes up when a
configuration has no ``compress_ratios`` puts C128 on layer 2, where the released models have C4. Here every model
carries the list, and what kind of layer is where is read off it.

Notation: H heads, G output groups, W window, r compression ratio of a layer. r is 0 (sliding window only, SWA), 4 (C4,
with the lightning indexer) or 128 (C128, every compressed entry attended).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

Scoring: TypeAlias = Literal["sqrtsoftplus", "sigmoid"]

SWA, C4, C128 = 0, 4, 128
LAYER_KINDS: Mapping[int, str] = MappingProxyType({SWA: "SWA", C4: "C4", C128: "C128"})

# Dimensions under one scale, in a cache entry and in an MXFP4 weight: a width that no scale divides has no byte layout.
_CACHE_SCALE_BLOCK = 64
_MXFP4_SCALE_BLOCK = 32


def _check_numbers(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Every int field holds an int, every float field a finite number, all above 0 except those that may be 0."""
    for item in fields(config):
        value = getattr(config, item.name)
        # Postponed annotations: a field's type is its source text.
        wanted = str(item.type).removesuffix(" | None")
        if wanted not in ("int", "float") or (value is None and wanted != item.type):
            continue
        accepted = (int,) if wanted == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise TypeError(f"{item.name}: got {value!r}, expected {'an integer' if wanted == 'int' else 'a number'}")
        if not math.isfinite(value) or value < 0 or (value == 0 and item.name not in may_be_zero):
            low = "0 or more" if item.name in may_be_zero else "above 0"
            raise ValueError(f"{item.name}: got {value!r}, expected a finite number {low}")


def _divides(config: Any, divisor: str, dividend: str) -> None:
    d, n = getattr(config, divisor), getattr(config, dividend)
    if n % d:
        raise ValueError(f"{divisor}: got {d}, expected a divisor of {dividend} = {n}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Shape of an expert router.

    ``n_groups`` and ``topk_groups`` are None where experts are not grouped (V4). ``norm_topk_prob`` renormalises the
    chosen weights to sum 1 before ``route_scale`` multiplies them.
    """

    n_experts: int
    top_k: int
    scoring: Scoring
    route_scale: float
    norm_topk_prob: bool = True
    n_groups: int | None = None
    topk_groups: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not isinstance(self.norm_topk_prob, bool):
            raise TypeError(f"norm_topk_prob: got {self.norm_topk_prob!r}, expected True or False")
        if self.scoring not in ("sqrtsoftplus", "sigmoid"):
            raise ValueError(f"scoring: got {self.scoring!r}, expected 'sqrtsoftplus' or 'sigmoid'")
        if self.n_groups is None or self.topk_groups is None:
            if self.n_groups is not self.topk_groups:
                raise ValueError(
                    f"topk_groups: got {self.topk_groups} with n_groups {self.n_groups}, expected both or neither"
                )
            candidates = self.n_experts
        else:
            _divides(self, "n_groups", "n_experts")
            if self.topk_groups > self.n_groups:
                raise ValueError(f"topk_groups: got {self.topk_groups}, expected at most n_groups = {self.n_groups}")
            if self.n_experts < 2 * self.n_groups:
                raise ValueError(
                    f"n_groups: got {self.n_groups}, expected at most n_experts / 2 = {self.n_experts // 2} "
                    "(a group is scored by its two best experts)"
                )
            candidates = self.n_experts // self.n_groups * self.topk_groups
        if self.top_k > candidates:
            raise ValueError(f"top_k: got {self.top_k}, expected at most {candidates}, the experts it chooses from")

    @property
    def experts_per_group(self) -> int | None:
        """Experts in one group, None where experts are not grouped."""
        return None if self.n_groups is None else self.n_experts // self.n_groups


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One DeepSeek-V4 model. A field with a default has that value in both released models.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a field contradicts another; the message names the field, what it is and what it should be.
    """

    name: str
    vocab_size: int
    hidden_size: int  # D
    n_layers: int
    n_mtp_layers: int = 1
    n_heads: int  # H
    n_kv_heads: int = 1
    head_dim: int = 512
    rope_head_dim: int = 64  # the LAST dimensions of a head
    q_lora_rank: int
    o_groups: int  # G
    o_lora_rank: int
    window_size: int = 128  # W, the query's own position included
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int
    n_shared_experts: int = 1
    moe_inter_dim: int  # I
    swiglu_limit: float = 10.0
    n_hash_layers: int
    router: RouterConfig
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0  # YaRN, on layers with r > 0 only
    original_seq_len: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    max_position: int = 1048576
    expert_dtype: str = "fp4"
    bos_id: int = 0
    eos_id: int = 1
    compress_ratios: tuple[int, ...] = field(repr=False)  # one per layer, then one per MTP block

    def __post_init__(self) -> None:
        _check_numbers(self, may_be_zero=("n_mtp_layers", "n_hash_layers", "bos_id", "eos_id"))
        if not isinstance(self.compress_ratios, tuple):
            raise TypeError(f"compress_ratios: got {type(self.compress_ratios).__name__}, expected a tuple")
        if len(self.compress_ratios) != self.n_layers + self.n_mtp_layers:
            raise ValueError(
                f"compress_ratios: got {len(self.compress_ratios)} entries, expected n_layers + n_mtp_layers = "
                f"{self.n_layers} + {self.n_mtp_layers} = {self.n_layers + self.n_mtp_layers}"
            )
        for layer, ratio in enumerate(self.compress_ratios):
            # False and 4.0 are keys of LAYER_KINDS too, and no lengths.
            if type(ratio) is not int or ratio not in LAYER_KINDS:
                raise ValueError(f"compress_ratios: entry {layer} is {ratio!r}, expected 0, 4 or 128")
            if layer >= self.n_layers and ratio != SWA:
                raise ValueError(f"compress_ratios: entry {layer} is an MTP block with ratio {ratio}, expected 0")
        if self.n_kv_heads != 1:
            raise ValueError(f"n_kv_heads: got {self.n_kv_heads}, expected 1 (all heads share one latent)")
        _divides(self, "o_groups", "n_heads")
        if self.rope_head_dim % 2 or not self.rope_head_dim < min(self.head_dim, self.index_head_dim):
            raise ValueError(
                f"rope_head_dim: got {self.rope_head_dim}, expected an even number below head_dim = {self.head_dim} "
                f"and index_head_dim = {self.index_head_dim}"
            )
        if self.nope_dim % _CACHE_SCALE_BLOCK:
            raise ValueError(
                f"head_dim: got {self.head_dim}, expected head_dim - rope_head_dim = {self.nope_dim} to be a multiple "
                f"of {_CACHE_SCALE_BLOCK}"
            )
        if self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim: got {self.index_head_dim}, expected a power of two (Hadamard transform)")
        for name in ("hidden_size", "moe_inter_dim"):
            if getattr(self, name) % _MXFP4_SCALE_BLOCK:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a multiple of {_MXFP4_SCALE_BLOCK} (MXFP4 scales)"
                )
        if not 0 <= self.n_hash_layers <= self.n_layers:
            raise ValueError(f"n_hash_layers: got {self.n_hash_layers}, expected 0 to n_layers = {self.n_layers}")
        for name in ("rope_theta", "compress_rope_theta"):
            if getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a base above 1")
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast: got {self.beta_fast}, expected at least beta_slow = {self.beta_slow}")
        if not isinstance(self.router, RouterConfig):
            raise TypeError(f"router: got {type(self.router).__name__}, expected a RouterConfig")
        if self.router.scoring != "sqrtsoftplus" or self.router.n_groups is not None:
            kind = "no groups" if self.router.n_groups is None else f"{self.router.n_groups} groups"
            raise ValueError(
                f"router: got {self.router.scoring} with {kind}, expected sqrtsoftplus with no groups (V4)"
            )

    # --- attention ---------------------------------------------------------------------------------------------------

    @property
    def nope_dim(self) -> int:
        """Dimensions of a head that carry no position: the first 448 of 512."""
        return self.head_dim - self.rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores: the whole head counts, nope and rope."""
        return float(self.head_dim**-0.5)

    @property
    def index_scale(self) -> float:
        """Scale folded into the indexer's head weights: index_head_dim^-0.5 * index_n_heads^-0.5."""
        return float(self.index_head_dim**-0.5 * self.index_n_heads**-0.5)

    @property
    def heads_per_group(self) -> int:
        """Heads whose outputs one group of the output projection reads, H / G."""
        return self.n_heads // self.o_groups

    @property
    def wo_a_input_width(self) -> int:
        """Input width of one group of ``wo_a``: heads_per_group * head_dim."""
        return self.heads_per_group * self.head_dim

    @property
    def wo_a_shape(self) -> tuple[int, int, int]:
        """``wo_a`` viewed per group, [G, o_lora_rank, wo_a_input_width]."""
        return self.o_groups, self.o_lora_rank, self.wo_a_input_width

    def heads_per_rank(self, tp: int) -> int:
        """Heads on one of ``tp`` tensor-parallel ranks.

        Raises:
            ValueError: ``tp`` does not divide o_groups: output groups are sharded with their heads, never split.
        """
        if tp < 1 or self.o_groups % tp:
            raise ValueError(f"tp: got {tp}, expected a divisor of o_groups = {self.o_groups}")
        return self.n_heads // tp

    # --- layers ------------------------------------------------------------------------------------------------------

    @property
    def main_ratios(self) -> tuple[int, ...]:
        """Compression ratios of the main layers, MTP left out."""
        return self.compress_ratios[: self.n_layers]

    @property
    def n_swa_layers(self) -> int:
        """Main layers with the sliding window only."""
        return self.main_ratios.count(SWA)

    @property
    def n_c4_layers(self) -> int:
        """Main layers with ratio 4 (and an indexer)."""
        return self.main_ratios.count(C4)

    @property
    def n_c128_layers(self) -> int:
        """Main layers with ratio 128."""
        return self.main_ratios.count(C128)

    def ratio(self, layer: int) -> int:
        """Compression ratio of a layer; ``n_layers`` and up are the MTP blocks."""
        if not 0 <= layer < len(self.compress_ratios):
            raise ValueError(f"layer: got {layer}, expected 0 to {len(self.compress_ratios) - 1} for {self.name}")
        return self.compress_ratios[layer]

    def layer_kind(self, layer: int) -> str:
        """``"SWA"``, ``"C4"`` or ``"C128"``."""
        return LAYER_KINDS[self.ratio(layer)]

    def layers(self, ratio: int) -> tuple[int, ...]:
        """Indices of the main layers with this compression ratio."""
        if ratio not in LAYER_KINDS:
            raise ValueError(f"ratio: got {ratio!r}, expected 0, 4 or 128")
        return tuple(layer for layer, r in enumerate(self.main_ratios) if r == ratio)

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the layer's experts come from the token id; MTP blocks route by score."""
        self.ratio(layer)
        return layer < self.n_hash_layers

    def uses_yarn(self, layer: int) -> bool:
        """Whether everything rotary in the layer is YaRN-scaled: layers with r > 0, never SWA-only ones."""
        return self.ratio(layer) != SWA

    def layer_rope_theta(self, layer: int) -> float:
        """RoPE base of everything rotary in the layer, its sliding-window keys included."""
        return self.compress_rope_theta if self.uses_yarn(layer) else self.rope_theta

    # --- how many keys a query sees ----------------------------------------------------------------------------------

    @property
    def topk_window_tokens(self) -> int:
        """Tokens that ``index_topk`` C4 entries cover, 4 * index_topk; up to here top-k keeps everything."""
        return C4 * self.index_topk

    @property
    def first_dropping_context(self) -> int:
        """Shortest context, in tokens, whose last query loses a C4 entry to top-k: (p + 1) // 4 exceeds index_topk."""
        return C4 * (self.index_topk + 1)

    def keys_per_query(self, layer: int, context: int) -> int:
        """Keys the last query of a context attends to in a layer.

        Args:
            layer: layer index, MTP blocks after the main ones.
            context: tokens up to and including the query, at least 1.

        Returns:
            Window keys plus selected compressed entries.
        """
        if context < 1:
            raise ValueError(f"context: got {context}, expected at least 1 token")
        ratio = self.ratio(layer)
        entries = context // ratio if ratio else 0
        return min(context, self.window_size) + (min(entries, self.index_topk) if ratio == C4 else entries)


@dataclass(frozen=True, kw_only=True)
class V32Config:
    """The parts of DeepSeek-V3.2 that the router, metadata and fill chapters use; nothing here is a V4 field.

    ``qk_dim`` is the absorbed-MLA query and key width (512 latent + 64 rope), ``v_dim`` the value width; every layer
    attends to the ``index_topk`` best single tokens (ratio 1), and ``n_moe_layers`` of the layers have a router.
    """

    name: str
    hidden_size: int
    n_layers: int
    n_moe_layers: int
    n_heads: int
    qk_dim: int
    v_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_inter_dim: int
    router: RouterConfig

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.n_moe_layers > self.n_layers:
            raise ValueError(f"n_moe_layers: got {self.n_moe_layers}, expected at most n_layers = {self.n_layers}")
        if self.v_dim > self.qk_dim:
            raise ValueError(f"v_dim: got {self.v_dim}, expected at most qk_dim = {self.qk_dim}")

    @property
    def rope_head_dim(self) -> int:
        """Rotary dimensions, the part of a key that is not also value."""
        return self.qk_dim - self.v_dim


def _ratios(first_two: int, n_layers: int, n_mtp_layers: int = 1) -> tuple[int, ...]:
    """Two layers of one ratio, then C4 on even and C128 on odd layers, then SWA-only MTP blocks."""
    alternating = tuple(C4 if layer % 2 == 0 else C128 for layer in range(2, n_layers))
    return (first_two,) * 2 + alternating + (SWA,) * n_mtp_layers


V4_FLASH = ModelConfig(
    name="v4-flash",
    vocab_size=129280,
    hidden_size=4096,
    n_layers=43,
    n_heads=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    index_topk=512,
    moe_inter_dim=2048,
    n_hash_layers=3,
    router=RouterConfig(n_experts=256, top_k=6, scoring="sqrtsoftplus", route_scale=1.5),
    compress_ratios=_ratios(SWA, 43),
)

V4_PRO = ModelConfig(
    name="v4-pro",
    vocab_size=129280,
    hidden_size=7168,
    n_layers=61,
    n_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    index_topk=1024,
    moe_inter_dim=3072,
    n_hash_layers=3,
    router=RouterConfig(n_experts=384, top_k=6, scoring="sqrtsoftplus", route_scale=2.5),
    compress_ratios=_ratios(C128, 61),
)

# Not a released model. It keeps what kernels and traps depend on: 512-wide heads, window 128, six experts per token (no
# power of two), and 64 index heads, because with few of them exact-zero score ties make two correct models differ.
V4_TINY = ModelConfig(
    name="v4-tiny",
    vocab_size=512,
    hidden_size=256,
    n_layers=4,
    n_heads=8,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    index_topk=16,
    moe_inter_dim=128,
    n_hash_layers=1,
    router=RouterConfig(n_experts=16, top_k=6, scoring="sqrtsoftplus", route_scale=1.5),
    max_position=4096,
    compress_ratios=_ratios(SWA, 4),
)

V3_2 = V32Config(
    name="v3.2",
    hidden_size=7168,
    n_layers=61,
    n_moe_layers=58,
    n_heads=128,
    qk_dim=576,
    v_dim=512,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    moe_inter_dim=2048,
    router=RouterConfig(n_experts=256, top_k=8, scoring="sigmoid", route_scale=2.5, n_groups=8, topk_groups=4),
)

MODELS: Mapping[str, ModelConfig] = MappingProxyType({model.name: model for model in (V4_FLASH, V4_PRO, V4_TINY)})


def get_model(name: str) -> ModelConfig:
    """A V4 model by its name.

    Args:
        name: a key of ``MODELS``: ``"v4-flash"``, ``"v4-pro"`` or ``"v4-tiny"``.

    Raises:
        ValueError: no such model; the message names the nearest one.
    """
    model = MODELS.get(name)
    if model is not None:
        return model
    if name == V3_2.name:
        raise ValueError(f"name: {name!r} is no V4 model; its few shapes are config.V3_2. Models: {', '.join(MODELS)}")
    close = difflib.get_close_matches(name.lower().replace("_", "-"), MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"name: no model is called {name!r}; {hint}Models: {', '.join(MODELS)}")
