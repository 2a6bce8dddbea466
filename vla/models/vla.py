"""The vision-language-action model: a prefix of images, text and state, and the suffixes of its heads.

The prefix attends to itself in both directions on the backbone, expert 0. Each head continues it with tokens of its own
on its own expert (or on the backbone), and heads never see each other. Everything here sees normalised states and
actions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.errors import ConfigError, explain
from vla.models.heads import FlowHead, HeadConfig, HybridHead, ParallelHead, RegressionHead, TokenHead
from vla.models.host import MOST_TOKENS, HostSuffix, HostWeights
from vla.models.kv_cache import KVCache, PrefixMemory
from vla.models.masks import MaskRule, Span, positions_of, segment_mask
from vla.models.pruning import RegisterConfig, TokenSelection, survivors
from vla.models.transformer import Transformer, TransformerConfig, additive
from vla.models.vision import CameraEncoder, CameraEncoderConfig

Memory = TypeVar("Memory", KVCache, PrefixMemory)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of the weights. Plain data: a bundle stores it.

    cameras: in the order of the prefix. state_dim S, action_dim A, horizon T: of the data. text_vocab, text_length L:
    of the text tokenizer. heads: at least one, each with a name of its own. auxiliary: {name: size}, read-outs of the
    state token that only training uses. text_queries: how many learned queries read the instruction for the image
    encoders (FiLM), 0 for encoders that do not know it. look: size of a linear read-out of the first camera's points
    token, only for training, 0 for none. registers: tokens that replace the visual ones after some layers, None for
    visual tokens in every layer; see vla.models.pruning.
    """

    cameras: tuple[CameraEncoderConfig, ...]
    transformer: TransformerConfig
    state_dim: int
    action_dim: int
    horizon: int
    text_vocab: int
    text_length: int
    heads: tuple[HeadConfig, ...]
    auxiliary: Mapping[str, int] = field(default_factory=dict)
    text_queries: int = 0
    look: int = 0
    registers: RegisterConfig | None = None

    def __post_init__(self) -> None:
        if self.look and not self.cameras[0].points:
            raise ValueError(f"look: expected a first camera with points, got {self.cameras[0].name} without. Set 0.")
        names = [head.name for head in self.heads]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"heads: expected at least one, each with its own name, got {names}")
        experts = self.transformer.experts
        for head in self.heads:
            if not 0 <= head.expert < len(experts):
                raise ValueError(f"heads.{head.name}.expert: expected 0..{len(experts) - 1}, got {head.expert}")
            if (head.kind == "flow") != (experts[head.expert].condition_width > 0):
                raise ValueError(
                    f"heads.{head.name}: expected an expert with condition_width {'above ' * (head.kind == 'flow')}0, "
                    f"got {experts[head.expert].condition_width}"
                )
        if self.registers is not None and self.registers.layer > self.transformer.depth:
            depth, layer = self.transformer.depth, self.registers.layer
            raise ConfigError(explain("model.register_layer", f"at most the depth, {depth}", layer, "Lower it."))

    def head(self, name: str) -> HeadConfig:
        return next(head for head in self.heads if head.name == name)

    @property
    def visual_tokens(self) -> int:
        """Grid tokens of all images; the tokens of points, which pruning never drops, are not counted."""
        return sum(camera.grid**2 for camera in self.cameras)

    @property
    def visual_layers(self) -> int:
        """How many layers visual tokens run through: the depth, unless registers take over sooner."""
        return self.transformer.depth if self.registers is None else self.registers.layer

    @property
    def suffix_room(self) -> int:
        """Cache entries behind the prefix that the longest head may need: a token stands for at least one value."""
        values, block = self.horizon * self.action_dim, self.horizon + 3
        room = {"tokens": values, "flow": self.horizon, "parallel": self.horizon, "hybrid": values + block}
        return max(room[head.kind] for head in self.heads)


@dataclass
class Segment:
    """A run of tokens of one kind: the unit from which training sequences and masks are built.

    embeddings: [B, n, D of its expert]. valid: bool[B, n], False for padding. hidden_from, branch, seen_by: see Span.
    """

    kind: str
    expert: int
    embeddings: Tensor
    valid: Tensor
    rule: MaskRule
    hidden_from: tuple[str, ...] = ()
    branch: str = ""
    seen_by: tuple[str, ...] = ()

    @property
    def span(self) -> Span:
        return Span(self.kind, self.embeddings.shape[1], self.rule, self.hidden_from, self.branch, self.seen_by)

    @property
    def visual(self) -> bool:
        """Whether these are the grid tokens of a camera."""
        return self.kind.startswith("image:")


@dataclass
class Prefix:
    """A prefix that ran: its cache, and what each suffix token needs to continue, made once for all passes.

    length: P, entries of the prefix in the cache. rotary: cos and sin [B, 1, S, head_dim] for the S suffix tokens that
    there is room for. bias: [B, S, P + S], what a causal suffix token may see (`transformer.additive`). kept: places in
    the unpruned prefix of the visual tokens that were chosen, int64[B, k], None when nobody asked.
    """

    cache: KVCache
    length: int
    rotary: tuple[Tensor, Tensor]
    bias: Tensor
    kept: Tensor | None = None

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
        words = F.rms_norm(words.float(), words.shape[-1:]).to(self.places.dtype) + self.places
        scores = torch.einsum("bld,qd->bql", words, self.queries).masked_fill(~valid[:, None], -torch.inf)
        return self.mix((scores.softmax(dim=-1) @ words).flatten(1))


class Vla(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.transformer.experts[0].width
        text_width = width if config.text_queries else 0
        self.cameras = nn.ModuleDict({c.name: CameraEncoder(c, width, text_width) for c in config.cameras})
        self.summary = TextSummary(config.text_queries, config.text_length, width) if config.text_queries else None
        self.text = nn.Embedding(config.text_vocab, width)
        self.state = nn.Sequential(nn.Linear(config.state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer = Transformer(config.transformer)
        self.heads = nn.ModuleDict({head.name: self._make_head(head) for head in config.heads})
        self.auxiliary = nn.ModuleDict({name: RegressionHead(width, size) for name, size in config.auxiliary.items()})
        self.look = nn.Linear(width, config.look) if config.look else None
        self._host: dict[str, HostWeights] = {}
        nn.init.normal_(self.text.weight, std=0.02)
        registers = config.registers
        self.registers = None if registers is None else nn.Parameter(torch.randn(registers.count, width) * 0.02)

    def _make_head(self, head: HeadConfig) -> nn.Module:
        config, expert = self.config, self.config.transformer.experts[head.expert]
        if head.kind == "tokens":
            return TokenHead(expert.width, head.vocab, head.lookahead)
        if head.kind == "flow":
            return FlowHead(expert.width, expert.condition_width, config.action_dim)
        if head.kind == "parallel":
            return ParallelHead(expert.width, config.horizon, config.action_dim)
        return HybridHead(expert.width, config.action_dim, head.vocab, head.noise_steps)

    # ---- segments ----
    def prefix_segments(
        self, images: Mapping[str, Tensor], text: Tensor, text_valid: Tensor, state: Tensor
    ) -> list[Segment]:
        """images: {camera: uint8[B, size, size, 3]}. text: int64[B, L]. text_valid: bool[B, L]. state: float[B, S]."""
        batch = len(state)
        segments = []
        words = self.text(text)
        summary = None if self.summary is None else self.summary(words, text_valid)
        seen_by: tuple[str, ...] = ()
        if self.config.visual_layers < self.config.transformer.depth:
            seen_by = (*(f"image:{camera.name}" for camera in self.config.cameras), "registers")
        for camera in self.config.cameras:
            if camera.name not in images:
                raise KeyError(f"camera {camera.name!r} is missing, got {sorted(images)}")
            tokens = self.cameras[camera.name](images[camera.name], summary)
            grid, points = tokens.tensor_split((camera.grid**2,), dim=1)
            segments.append(
                Segment(f"image:{camera.name}", 0, grid, _all_valid(grid), MaskRule.PREFIX, seen_by=seen_by)
            )
            if camera.points:
                segments.append(Segment(f"points:{camera.name}", 0, points, _all_valid(points), MaskRule.PREFIX))
        if self.registers is not None:
            tokens = self.registers.expand(batch, -1, -1)
            segments.append(Segment("registers", 0, tokens, _all_valid(tokens), MaskRule.PREFIX))
        segments.append(Segment("text", 0, words, text_valid, MaskRule.PREFIX))
        token = self.state(state.to(self.state[0].weight.dtype)).view(batch, 1, -1)
        segments.append(Segment("state", 0, token, _all_valid(token), MaskRule.PREFIX))
        return segments

    def look_ahead(self, images: Mapping[str, Tensor], text: Tensor, text_valid: Tensor) -> Tensor:
        """What the points of the first camera say of where the words send the arm: [B, look]. Only for training."""
        assert self.look is not None and self.summary is not None
        name = self.config.cameras[0].name
        return self.look(self.cameras[name](images[name], self.summary(self.text(text), text_valid))[:, -1])

    def suffix_segment(
        self, head: str, embeddings: Tensor, valid: Tensor | None = None, rule: MaskRule = MaskRule.CAUSAL
    ) -> Segment:
        """Tokens of one head, [B, n, D of its expert], as its own branch of a training sequence."""
        valid = _all_valid(embeddings) if valid is None else valid
        return Segment(head, self.config.head(head).expert, embeddings, valid, rule, branch=head)

    def run(self, segments: Sequence[Segment], condition: Tensor | None = None) -> list[Tensor]:
        """One uncached pass over all segments; returns each segment's normed hidden states, in order.

        condition: [B, C] for the experts with adaptive norms.
        """
        return self.run_with_exits(segments, (), condition)[-1]

    def run_with_exits(
        self, segments: Sequence[Segment], exits: Sequence[int], condition: Tensor | None = None
    ) -> list[list[Tensor]]:
        """As `run`, read after each number of layers in `exits` too, ascending; the whole depth comes last.

        With registers, segments of visual tokens are empty where they have left.
        """
        order = [segment.expert for segment in segments]
        if order != sorted(order):
            raise ValueError(f"segments: expected ordered by expert, got experts {order}")
        valid = torch.cat([segment.valid for segment in segments], dim=1)
        spans = [segment.span for segment in segments]
        sizes = [span.length for span in spans]
        mask = segment_mask(spans, valid)
        count = len(self.config.transformer.experts)
        parts = [[segment.embeddings for segment in segments if segment.expert == e] for e in range(count)]
        streams = [torch.cat(part, dim=1) if part else None for part in parts]
        positions, depth, leave = positions_of(valid, spans), self.config.transformer.depth, self.config.visual_layers
        read, done = [], 0
        for until in (*exits, depth):
            for layers in (range(done, min(until, leave)), range(max(done, leave), until)):
                if not layers:
                    continue
                if layers.start == leave and streams[0] is not None:
                    places = _visual_places(segments)
                    stay = survivors(None, places, valid)
                    own = stay[:, : streams[0].shape[1] - len(places)]
                    streams = [_rows(streams[0], own), *streams[1:]]
                    positions, mask = positions.gather(1, stay), _square(mask, stay)
                    sizes = [0 if segment.visual else size for segment, size in zip(segments, sizes)]
                streams = self.transformer(streams, positions, mask, layers=layers, condition=condition)
            done = until
            finished = [None if x is None else self.transformer.finish(e, x, condition) for e, x in enumerate(streams)]
            offsets = [0] * count
            out = []
            for segment, length in zip(segments, sizes):
                start, stream = offsets[segment.expert], finished[segment.expert]
                assert stream is not None
                out.append(stream[:, start : start + length])
                offsets[segment.expert] += length
            read.append(out)
        return read

    def run_behind(
        self, trunk: Sequence[Segment], branches: Sequence[Segment], exits: Sequence[int], condition: Tensor | None
    ) -> list[list[Tensor]]:
        """What `run_with_exits` gives for the branches, with no gradient into the trunk, which runs once.

        Each branch attends to the trunk and itself only, so many long ones cost what they cost alone.
        """
        depth = self.config.transformer.depth
        begin = torch.cat([segment.valid for segment in trunk], dim=1).sum(dim=1, keepdim=True)
        with torch.no_grad():
            memory, valid, _ = self._fill(trunk, PrefixMemory())
        read: list[list[Tensor]] = [[] for _ in range(len(exits) + 1)]
        for segment in branches:
            span = replace(segment.span, branch="")
            own = segment_mask([span], segment.valid)
            mask = torch.cat((valid[:, None].expand(-1, span.length, -1), own), dim=2)
            positions = begin + positions_of(segment.valid)
            stream, done = segment.embeddings, 0
            for place, until in enumerate((*exits, depth)):
                layers = range(done, until)
                out = self.transformer(
                    self._streams(segment.expert, stream), positions, mask, memory.behind(), 0, layers, condition
                )[segment.expert]
                assert out is not None
                stream, done = out, until
                read[place].append(self.transformer.finish(segment.expert, stream, condition))
        return read

    # ---- cached inference ----
    def prefix(
        self, segments: Sequence[Segment], suffix_tokens: int, selection: TokenSelection | None = None
    ) -> Prefix:
        """Run prefix segments once into a fresh cache with room for `suffix_tokens` more.

        selection: which visual tokens to keep, or to score, on the way; see vla.models.pruning. ConfigError when the
        model cannot be pruned so.
        """
        if selection is not None:
            selection.check(self.config)
        begin = torch.cat([segment.valid for segment in segments], dim=1).sum(dim=1, keepdim=True)
        batch, length = len(begin), sum(segment.embeddings.shape[1] for segment in segments)
        cache = self.transformer.new_cache(batch, length + suffix_tokens, segments[0].embeddings.dtype)
        cache, valid, kept = self._fill(segments, cache, suffix_tokens, selection)
        length = valid.shape[1]
        cache.advance(length)
        steps = torch.arange(suffix_tokens, device=valid.device)
        seen = torch.cat(
            (
                valid[:, None].expand(-1, suffix_tokens, -1),
                (steps[:, None] >= steps)[None].expand(batch, -1, -1),
            ),
            dim=2,
        )
        return Prefix(cache, length, self.transformer.rotary(begin + steps), additive(seen, cache.keys.dtype), kept)

    def _fill(
        self, segments: Sequence[Segment], memory: Memory, room: int = 0, selection: TokenSelection | None = None
    ) -> tuple[Memory, Tensor, Tensor | None]:
        """Run prefix segments into a fresh memory; visual tokens leave on the way when registers or `selection` say so.

        Returns a memory of the entries that stay, with `room` for more, their valid bool[B, P'], and `Prefix.kept`.
        """
        valid = torch.cat([segment.valid for segment in segments], dim=1)
        mask = segment_mask([segment.span for segment in segments], valid)
        x, positions = torch.cat([segment.embeddings for segment in segments], dim=1), positions_of(valid)
        layers, kept = range(self.config.transformer.depth), None
        leave = self.config.visual_layers if selection is None else selection.layer
        if leave < len(layers):
            first, layers = layers[:leave], layers[leave:]
            out = self.transformer(self._streams(0, x), positions, mask, memory, 0, first)[0]
            assert out is not None
            x, places = out, _visual_places(segments)
            kept = None if selection is None else selection.choose(x, places, valid)
            if selection is None or selection.drop:
                stay = survivors(kept, places, valid)
                memory = memory.picked(stay, len(first), room)
                x, mask = _rows(x, stay), _square(mask, stay)
                positions, valid = positions.gather(1, stay), valid.gather(1, stay)
        self.transformer(self._streams(0, x), positions, mask, memory, 0, layers, fill_only=True)
        return memory, valid, kept

    def extend(
        self, prefix: Prefix, expert: int, x: Tensor, at: int, both_ways: bool = False,
        condition: Tensor | None = None, layers: range | None = None,
    ) -> Tensor:  # fmt: skip
        """Run x [B, Q, D] as the suffix tokens from number `at` on, into the cache; its lengths stay as they are.

        They see the prefix, the suffix tokens before `at`, and each other left to right, or in both directions.
        Returns their hidden states [B, Q, D] after `layers` (default: all), without the final norm.
        """
        end = at + x.shape[1]
        cos, sin = prefix.rotary
        bias = prefix.bias[:, at:end, : prefix.length + end]
        if both_ways:
            bias = prefix.bias[:, end - 1 : end, : prefix.length + end].expand(-1, end - at, -1)
        out = self.transformer(
            self._streams(expert, x.to(prefix.cache.keys.dtype)), (cos[:, :, at:end], sin[:, :, at:end]), bias,
            prefix.cache, prefix.length + at, layers, condition,
        )[expert]  # fmt: skip
        assert out is not None
        return out

    def velocity(self, prefix: Prefix, head: str, noisy: Tensor, time: Tensor) -> Tensor:
        """Velocity of a flow head behind a cached prefix. noisy [B, T, A], time [B] -> [B, T, A]."""
        flow: FlowHead = self.heads[head]
        return flow.read(self._behind(prefix, head, flow.embed(noisy), both_ways=True, time=time))

    def parallel_actions(self, prefix: Prefix, head: str) -> Tensor:
        """All actions of a parallel head in one pass behind a cached prefix: [B, T, A]."""
        parallel: ParallelHead = self.heads[head]
        queries = parallel.queries[None].expand(prefix.batch, -1, -1)
        return parallel.read(self._behind(prefix, head, queries, both_ways=True))

    def noise(self, prefix: Prefix, head: str, noisy: Tensor, step: Tensor) -> Tensor:
        """Predicted noise of a hybrid head. noisy [B, T, A], step int64[B] -> [B, T, A].

        The T + 3 entries stay in the cache as the suffix's first; a second call writes over them.
        """
        hybrid: HybridHead = self.heads[head]
        return hybrid.noise(self._behind(prefix, head, hybrid.embed(noisy, step))[:, 2:-1])

    def _behind(
        self, prefix: Prefix, head: str, x: Tensor, both_ways: bool = False, time: Tensor | None = None
    ) -> Tensor:
        """Normed hidden states of a head's first suffix tokens x, [B, Q, D]. time: [B] of a flow."""
        host = self.host_suffix(prefix, head, time) if x.shape[1] <= MOST_TOKENS else None
        if host is not None:
            return torch.from_numpy(host.hidden(x[0].numpy(), 0, prefix.length, both_ways))[None]
        expert = self.config.head(head).expert
        condition = None if time is None else self.heads[head].condition(time)
        return self.transformer.finish(expert, self.extend(prefix, expert, x, 0, both_ways, condition), condition)

    def host_suffix(self, prefix: Prefix, head: str, time: Tensor | None = None) -> HostSuffix | None:
        """Passes in numpy behind a prefix; None where torch has to run them. time: [1] of a flow."""
        weights = self.host_weights(head) if prefix.batch == 1 and prefix.device.type == "cpu" else None
        if weights is None:
            return None
        return HostSuffix(weights, prefix.cache, prefix.rotary, prefix.bias, None if time is None else float(time))

    def host_weights(self, head: str) -> HostWeights | None:
        """Copies for passes in numpy, made anew when weights changed; None where torch has to run them."""
        if torch.is_grad_enabled():
            return None
        kept = self._host.get(head)
        if kept is None or not kept.current:
            expert = self.config.head(head).expert
            if not HostWeights.serves(self.transformer, expert):
                return None
            self._host[head] = kept = HostWeights(self.transformer, expert, self.heads[head])
        return kept

    def _streams(self, expert: int, x: Tensor) -> list[Tensor | None]:
        return [x if index == expert else None for index in range(len(self.config.transformer.experts))]


def _all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _visual_places(segments: Sequence[Segment]) -> Tensor:
    """Where the grid tokens of the images stand in a sequence, int64[N]."""
    flags = [segment.visual for segment in segments for _ in range(segment.embeddings.shape[1])]
    return torch.tensor([place for place, flag in enumerate(flags) if flag], device=segments[0].valid.device)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """[B, P, ...] -> [B, n, ...]: the rows at `places`, int64[B, n]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _square(mask: Tensor, places: Tensor) -> Tensor:
    """[B, P, P] -> [B, n, n]: the rows and columns at `places`, int64[B, n]."""
    return _rows(_rows(mask, places).transpose(1, 2), places).transpose(1, 2)
