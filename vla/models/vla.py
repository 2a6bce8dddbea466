"""The vision-language-action model: a prefix of images, text and state, and an action suffix.

The prefix attends to itself in both directions; the suffix is causal and reads the prefix. The suffix runs on its own
smaller expert, or on the backbone (`suffix_expert`). Everything here sees normalised states and actions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.models.heads import AutoregressiveHead, RegressionHead
from vla.models.host import MOST_TOKENS, HostSuffix, HostWeights
from vla.models.kv_cache import KVCache
from vla.models.masks import MaskRule, Span, positions_of, segment_mask
from vla.models.transformer import Transformer, TransformerConfig, additive
from vla.models.vision import CameraEncoder, CameraEncoderConfig


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of the weights. Plain data: a bundle stores it.

    cameras: in the order of the prefix. state_dim S, action_dim A, horizon T: of the data. text_vocab, text_length L:
    of the text tokenizer. action_vocab: of the action tokenizer. suffix_expert: the expert that runs action tokens.
    auxiliary: {name: size}, read-outs of the state token that only training uses. text_queries: how many learned
    queries read the instruction for the image encoders (FiLM), 0 for encoders that do not know it. look: size of a
    linear read-out of the first camera's points token, only for training, 0 for none.
    """

    cameras: tuple[CameraEncoderConfig, ...]
    transformer: TransformerConfig
    state_dim: int
    action_dim: int
    horizon: int
    text_vocab: int
    text_length: int
    action_vocab: int
    suffix_expert: int = 1
    auxiliary: Mapping[str, int] = field(default_factory=dict)
    text_queries: int = 0
    look: int = 0

    def __post_init__(self) -> None:
        if self.look and not self.cameras[0].points:
            raise ValueError(f"look: expected a first camera with points, got {self.cameras[0].name} without. Set 0.")


@dataclass
class Segment:
    """A run of tokens of one kind: the unit from which training sequences and masks are built.

    embeddings: [B, n, D of its expert]. valid: bool[B, n], False for padding. hidden_from: kinds that must not see it.
    """

    kind: str
    expert: int
    embeddings: Tensor
    valid: Tensor
    rule: MaskRule
    hidden_from: tuple[str, ...] = ()

    @property
    def span(self) -> Span:
        return Span(self.kind, self.embeddings.shape[1], self.rule, self.hidden_from)


@dataclass
class Prefix:
    """A prefix that ran: its cache, and what each suffix token needs to continue, made once for all passes.

    length: P, entries of the prefix in the cache. rotary: cos and sin [B, 1, S, head_dim] for the S suffix tokens that
    there is room for. bias: [B, S, P + S], what a causal suffix token may see (`transformer.additive`). host: runs the
    suffix passes where it can, None where it cannot.
    """

    cache: KVCache
    length: int
    rotary: tuple[Tensor, Tensor]
    bias: Tensor
    host: HostSuffix | None = None

    @property
    def batch(self) -> int:
        return len(self.bias)

    @property
    def device(self) -> torch.device:
        return self.bias.device


class TextSummary(nn.Module):
    """A few learned queries read the words, each by meaning and place: [B, L, D], bool[B, L] -> [B, D].

    A colour word means one thing as the first of a sentence and another as the second, so places are added to words.
    """

    def __init__(self, queries: int, length: int, width: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(length, width) * 0.3)
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.1)
        self.mix = nn.Sequential(nn.Linear(queries * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, words: Tensor, valid: Tensor) -> Tensor:
        words = F.rms_norm(words.float(), words.shape[-1:]) + self.places
        scores = torch.einsum("bld,qd->bql", words, self.queries).masked_fill(~valid[:, None], -torch.inf)
        return self.mix((scores.softmax(dim=-1) @ words).flatten(1))


class Vla(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        experts = config.transformer.experts
        if not 0 <= config.suffix_expert < len(experts):
            raise ValueError(f"suffix_expert: expected 0..{len(experts) - 1}, got {config.suffix_expert}")
        width = experts[0].width
        text_width = width if config.text_queries else 0
        self.cameras = nn.ModuleDict({c.name: CameraEncoder(c, width, text_width) for c in config.cameras})
        self.summary = TextSummary(config.text_queries, config.text_length, width) if config.text_queries else None
        self.text = nn.Embedding(config.text_vocab, width)
        self.state = nn.Sequential(nn.Linear(config.state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer = Transformer(config.transformer)
        self.head = AutoregressiveHead(experts[config.suffix_expert].width, config.action_vocab)
        self.auxiliary = nn.ModuleDict({name: RegressionHead(width, size) for name, size in config.auxiliary.items()})
        self.look = nn.Linear(width, config.look) if config.look else None
        self._host: HostWeights | None = None
        nn.init.normal_(self.text.weight, std=0.02)

    # ---- segments ----
    def prefix_segments(
        self, images: Mapping[str, Tensor], text: Tensor, text_valid: Tensor, state: Tensor
    ) -> list[Segment]:
        """images: {camera: uint8[B, size, size, 3]}. text: int64[B, L]. text_valid: bool[B, L]. state: float[B, S]."""
        batch = len(state)
        segments = []
        words = self.text(text)
        summary = None if self.summary is None else self.summary(words, text_valid)
        for camera in self.config.cameras:
            if camera.name not in images:
                raise KeyError(f"camera {camera.name!r} is missing, got {sorted(images)}")
            tokens = self.cameras[camera.name](images[camera.name], summary)
            segments.append(Segment(f"image:{camera.name}", 0, tokens, _all_valid(tokens), MaskRule.PREFIX))
        segments.append(Segment("text", 0, words, text_valid, MaskRule.PREFIX))
        token = self.state(state.to(self.state[0].weight.dtype)).view(batch, 1, -1)
        segments.append(Segment("state", 0, token, _all_valid(token), MaskRule.PREFIX))
        return segments

    def look_ahead(self, images: Mapping[str, Tensor], text: Tensor, text_valid: Tensor) -> Tensor:
        """What the points of the first camera say of where the words send the arm: [B, look]. Only for training."""
        assert self.look is not None and self.summary is not None
        name = self.config.cameras[0].name
        return self.look(self.cameras[name](images[name], self.summary(self.text(text), text_valid))[:, -1])

    def action_segment(self, ids: Tensor, valid: Tensor) -> Segment:
        """Causal action tokens; ids int64[B, K] are inputs (already shifted), valid bool[B, K]."""
        return Segment("action", self.config.suffix_expert, self.head.embed(ids), valid, MaskRule.CAUSAL)

    def run(self, segments: Sequence[Segment]) -> list[Tensor]:
        """One uncached pass over all segments; returns each segment's normed hidden states, in order."""
        order = [segment.expert for segment in segments]
        if order != sorted(order):
            raise ValueError(f"segments: expected ordered by expert, got experts {order}")
        valid = torch.cat([segment.valid for segment in segments], dim=1)
        mask = segment_mask([segment.span for segment in segments], valid)
        count = len(self.config.transformer.experts)
        streams = [
            torch.cat(parts, dim=1) if (parts := [s.embeddings for s in segments if s.expert == e]) else None
            for e in range(count)
        ]
        hidden = self.transformer(streams, positions_of(valid), mask)
        finished = [None if x is None else self.transformer.finish(e, x) for e, x in enumerate(hidden)]
        offsets = [0] * count
        out = []
        for segment in segments:
            start, length = offsets[segment.expert], segment.embeddings.shape[1]
            stream = finished[segment.expert]
            assert stream is not None
            out.append(stream[:, start : start + length])
            offsets[segment.expert] += length
        return out

    # ---- cached inference ----
    def prefix(self, segments: Sequence[Segment], suffix_tokens: int) -> Prefix:
        """Run prefix segments once into a fresh cache with room for `suffix_tokens` more."""
        valid = torch.cat([segment.valid for segment in segments], dim=1)
        mask = segment_mask([segment.span for segment in segments], valid)
        batch, length = valid.shape
        cache = self.transformer.new_cache(batch, length + suffix_tokens, segments[0].embeddings.dtype)
        streams: list[Tensor | None] = [None] * len(self.config.transformer.experts)
        streams[0] = torch.cat([segment.embeddings for segment in segments], dim=1)
        expert = self.config.suffix_expert
        self.transformer(streams, positions_of(valid), mask, cache, 0, fill_only=True)
        cache.advance(length)
        steps = torch.arange(suffix_tokens, device=valid.device)
        seen = torch.cat(
            (
                valid[:, None].expand(-1, suffix_tokens, -1),
                (steps[:, None] >= steps)[None].expand(batch, -1, -1),
            ),
            dim=2,
        )
        rotary = self.transformer.rotary(valid.sum(dim=1)[:, None] + steps)
        bias = additive(seen, cache.keys.dtype)
        host = None
        if batch == 1 and not torch.is_grad_enabled() and HostWeights.serves(self.transformer, expert):
            if self._host is None or not self._host.current:
                self._host = HostWeights(self.transformer, expert, self.head)
            host = HostSuffix(self._host, cache, rotary, bias)
        return Prefix(cache, length, rotary, bias, host)

    def suffix_logits(self, prefix: Prefix, ids: Tensor) -> Tensor:
        """Logits after each of Q new input tokens, written behind what the cache holds. int64[B, Q] -> [B, Q, V].

        Causal among the new tokens. The cache advances by Q; roll back with `prefix.cache.truncate`.
        """
        cache, expert = prefix.cache, self.config.suffix_expert
        count, end = ids.shape[1], cache.length + ids.shape[1]
        first, last = cache.length - prefix.length, end - prefix.length
        if prefix.host is not None and count <= MOST_TOKENS:
            logits = prefix.host.logits(ids[0].tolist(), first, cache.length)
            cache.advance(count)
            return torch.from_numpy(logits)[None]
        cos, sin = prefix.rotary
        streams: list[Tensor | None] = [None] * len(self.config.transformer.experts)
        streams[expert] = self.head.embed(ids).to(cache.keys.dtype)
        rotary = cos[:, :, first:last], sin[:, :, first:last]
        bias = prefix.bias[:, first:last, :end]
        hidden = self.transformer.run(streams, rotary, bias, cache, cache.length)[expert]
        assert hidden is not None
        cache.advance(count)
        return self.head.logits(self.transformer.finish(expert, hidden))


def _all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
