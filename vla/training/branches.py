"""How each kind of head trains: its tokens as a branch of the sequence, and its losses from their hidden states.

One pass serves all heads: branches see the prefix and not each other (see vla.models.masks).

Consistency distillation (CEED-VLA, Song et al. 2025; CLLM, Kou et al. 2024) is a second branch of a token head, whose
inputs are an unfinished iterate of its own Jacobi decoding (see vla.training.distillation): it learns to say there
what it says behind the fixed point, or what its teacher does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.models.heads import HeadConfig, TokenHead
from vla.models.masks import MaskRule
from vla.models.vla import Segment, Vla
from vla.training import objectives
from vla.training.dataset import IGNORE
from vla.training.recipes import HeadRecipe

# Hidden states of each of the head's branches, after its exit layer (absent without one) and after the whole depth, to
# named losses; the one called "loss" is trained, the others are for the eye.
Read = Callable[[list[list[Tensor]]], dict[str, Tensor]]


def draw(seed: list[int], batch: int, horizon: int, action_dim: int, repeats: int = 1) -> dict[str, np.ndarray]:
    """The random numbers of one step: noise float32[B, T, A], flow time float32[B], and how far into the diffusion's
    schedule, float32[B] in [0, 1). With repeats also noises float32[R - 1, B, T, A] and progresses float32[R - 1, B].

    Flow times are pi0's (Black et al. 2024, appendix B): Beta(1.5, 1), towards noise, which is time 1 here.
    """
    rng = np.random.default_rng(seed)
    out = {
        "noise": rng.standard_normal((batch, horizon, action_dim), np.float32),
        "time": (rng.beta(1.5, 1.0, batch) * 0.999 + 0.001).astype(np.float32),
        "progress": rng.random(batch, np.float32),
    }
    if repeats > 1:  # drawn last: the others are the same with and without
        out["noises"] = rng.standard_normal((repeats - 1, batch, horizon, action_dim), np.float32)
        out["progresses"] = rng.random((repeats - 1, batch), np.float32)
    return out


def branches(
    model: Vla, head: HeadConfig, given: dict[str, Any], recipe: HeadRecipe | None = None
) -> tuple[list[Segment], Read]:
    """given: tokens {head: int64[B, K]}, chunk [B, T, A], what `draw` made, and for heads that are distilled iterate
    and settled {head: int64[B, K]}, consistency and anchor {head: weight}; all as tensors. recipe: the head's, None for
    one with defaults; as many noises and times per sample as it repeats were drawn."""
    recipe = recipe or HeadRecipe(head.kind)
    module: Any = model.heads[head.name]
    if head.kind == "tokens":
        tokens = given["tokens"][head.name]
        segment = model.suffix_segment(head.name, module.embed(module.shift(tokens)), tokens != IGNORE)
        if head.name in given.get("iterate", {}):
            return _distilled(model, head, segment, given, recipe.target_head)
        return [segment], lambda hidden: _token_losses(module, hidden[0], tokens)
    chunk, noise = given["chunk"], given["noise"]
    if head.kind == "flow":
        time = given["time"][:, None, None]
        noisy = time * noise + (1 - time) * chunk
        segment = model.suffix_segment(head.name, module.embed(noisy), rule=MaskRule.BLOCK)
        return [segment], lambda hidden: {"loss": objectives.mean_square(module.read(hidden[0][-1]), noise - chunk)}
    if head.kind == "parallel":
        queries = module.queries[None].expand(len(chunk), -1, -1)
        segment = model.suffix_segment(head.name, queries, rule=MaskRule.BLOCK)
        return [segment], lambda hidden: {"loss": objectives.l1(module.read(hidden[0][-1]).flatten(1), chunk)}
    tokens = given["tokens"][head.name]
    noises = [noise, *given.get("noises", ())[: recipe.noise_repeats - 1]]
    times = [given["progress"], *given.get("progresses", ())[: recipe.noise_repeats - 1]]
    steps = [(time * head.noise_steps).long() for time in times]
    leads = [
        module.embed(objectives.noised(chunk, drawn, step, head.noise_steps), step)
        for drawn, step in zip(noises, steps)
    ]
    lead = leads[0]
    words = module.tokens.embed(module.tokens.shift(tokens))
    valid = torch.cat((torch.ones_like(lead[..., 0], dtype=torch.bool), tokens != IGNORE), dim=1)
    segment = model.suffix_segment(head.name, torch.cat((lead, words.to(lead.dtype)), dim=1), valid)
    others = [
        replace(model.suffix_segment(head.name, again), branch=f"{head.name}/{place}")
        for place, again in enumerate(leads[1:])
    ]
    count = lead.shape[1]

    def read(hidden: list[list[Tensor]]) -> dict[str, Tensor]:
        errors = [
            objectives.mean_square(module.noise(states[-1][:, 2 : count - 1]), drawn)
            for states, drawn in zip(hidden, noises)
        ]
        denoised = torch.stack(errors).mean()
        spoken = _token_losses(module.tokens, [hidden[0][-1][:, count:]], tokens)
        return {**spoken, "noise": denoised, "loss": spoken["loss"] + recipe.noise_weight * denoised}

    return [segment, *others], read


def _distilled(
    model: Vla, head: HeadConfig, segment: Segment, given: dict[str, Any], teacher: str
) -> tuple[list[Segment], Read]:
    """`segment` holds the labels: the anchor that keeps greedy decoding what it is. Two more branches: the fixed point,
    whose distributions are the target, and the iterate. With a teacher its distributions there are the target of both,
    a third branch: the student's own drift with the student."""
    module: Any = model.heads[head.name]
    settled, unfinished = (given[key][head.name] for key in ("settled", "iterate"))
    asked = [(head.name, settled), (head.name, unfinished), *([(teacher, settled)] if teacher else ())]
    others = []
    for place, (name, ids) in enumerate(asked):
        who: Any = model.heads[name]
        own = model.suffix_segment(name, who.embed(who.shift(ids)))
        others.append(replace(own, branch=f"{head.name}/{place}"))

    def read(hidden: list[list[Tensor]]) -> dict[str, Tensor]:
        out = _token_losses(module, hidden[0], given["tokens"][head.name])
        fixed, guess = (module.logits(states[-1]) for states in hidden[1:3])
        target = model.heads[teacher].logits(hidden[3][-1]) if teacher else fixed
        far = out["consistency"] = objectives.divergence(target.detach(), guess)
        if teacher:
            out["fidelity"] = objectives.divergence(target.detach(), fixed)
            far = far + out["fidelity"]
        out["loss"] = given["anchor"][head.name] * out["loss"] + given["consistency"][head.name] * far
        return out

    return [segment, *others], read


def _token_losses(head: TokenHead, hidden: list[Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the next token, and of the tokens that exits and guesses name.

    Guesses learn from the hidden states as they are and through the read-out as it is: greedy decoding of a policy
    does not change because it learns to be decoded faster.
    """
    logits = head.logits(hidden[-1])
    loss = objectives.action_cross_entropy(logits, tokens)
    out = {"tokens": loss, "accuracy": objectives.token_accuracy(logits, tokens)}
    if len(hidden) > 1:
        early = head.logits(hidden[0])
        out["exit"] = objectives.action_cross_entropy(early, tokens)
        out["exit_accuracy"] = objectives.token_accuracy(early, tokens)
        loss = loss + 0.5 * out["exit"]
    if len(head.lookahead):
        states = hidden[-1].detach()
        read = torch.nn.functional.linear
        weight, bias = head.logits.weight.detach(), head.logits.bias.detach()
        terms = []
        for ahead, guess in enumerate(head.lookahead, start=1):
            later = torch.cat((tokens[:, ahead:], torch.full_like(tokens[:, :ahead], IGNORE)), dim=1)
            terms.append(objectives.action_cross_entropy(read(states + guess(states), weight, bias), later))
        out["guess"] = torch.stack(terms).mean()
        loss = loss + out["guess"]
    return {**out, "loss": loss}
