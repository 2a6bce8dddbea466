"""Real-time chunking: a flow that is steered towards the actions already under way (RTC, Black, Galliker and Levine
2025, arXiv 2506.07339).

Each Euler step asks the velocity for the chunk it is heading to, compares it with the chunk that is being executed, and
pulls by the vector-Jacobian product of that difference through the denoiser (pseudo-inverse guidance). A soft mask
says how much each action counts: see `goals`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, find_head, gaussian, generators
from vla.decoding.chunks import goals, keep_committed
from vla.decoding.flow import FlowDecoder, euler
from vla.errors import ConfigError, explain
from vla.models.kv_cache import PrefixMemory

Velocity = Callable[[Tensor, float], Tensor]


class RealTimeFlowDecoder:
    """steps: of Euler's method, at least 1 (the paper: 5). beta: largest weight of the guidance, 0 or more (the paper:
    5). head: name of the flow head, "" for the first. A step costs a pass and its backward pass.

    The committed actions come back as they were committed, not only near: the flow was steered as if they stood there.
    Without a previous chunk it is FlowDecoder. Notes: "missed", by sample, largest distance, normalised, of the steered
    flow from the committed actions.
    """

    exact = False

    def __init__(self, steps: int = 5, beta: float = 5.0, head: str = ""):
        if steps < 1:
            raise ConfigError(explain("decoder.steps", "at least 1", steps, "The paper takes 5."))
        if beta < 0:
            raise ConfigError(explain("decoder.beta", "0 or more", beta, "The paper takes 5."))
        self.steps, self.beta, self.head = steps, beta, head

    def check(self, bundle: Bundle) -> None:
        find_head(bundle, self.head, "flow")

    def decode(self, given: DecodeInput) -> Decoded:
        targets, masks, counts = goals(given)
        if not masks.any():
            return FlowDecoder(self.steps, self.head).decode(given)
        with torch.inference_mode(False), torch.enable_grad():
            velocity = _velocity(given, find_head(given.bundle, self.head, "flow"))
            device = given.prefix.device
            wanted, mask = torch.from_numpy(targets).to(device), torch.from_numpy(masks).float().to(device)
            noise = gaussian(given, generators(given))
            actions = euler(guided(velocity, wanted, mask, self.beta), noise, self.steps).cpu().numpy()
        return Decoded(actions, self.steps, notes={"missed": keep_committed(actions, targets, counts)})


def guided(velocity: Velocity, target: Tensor, mask: Tensor, beta: float) -> Velocity:
    """A velocity towards actions that agree with `target` [B, T, A] as far as `mask` [B, T] says (equations 2 to 4).

    Time runs from 1, noise, to 0, actions; the paper's runs the other way.
    """

    def steered(noisy: Tensor, time: float) -> Tensor:
        noisy = noisy.detach().requires_grad_()
        speed = velocity(noisy, time)
        heading = noisy - time * speed
        error = (target - heading.detach()) * mask[..., None]
        (pull,) = torch.autograd.grad(heading, noisy, error)
        weight = beta if time >= 1 else min(beta, (time**2 + (1 - time) ** 2) / (time * (1 - time)))
        return speed.detach() - weight * pull

    return steered


def _velocity(given: DecodeInput, head: str) -> Velocity:
    """As Vla.velocity, but gradients flow: what the cache holds is copied, for it was made in inference mode, and the
    suffix is joined to it, for a graph must not be written over."""
    model, prefix, config = given.bundle.model, given.prefix, given.bundle.config
    expert = config.head(head).expert
    module: Any = model.heads[head]
    length, count, cache = prefix.length, config.horizon, prefix.cache
    layers = [(k[:, :, :length].clone(), v[:, :, :length].clone()) for k, v in zip(cache.keys, cache.values)]
    cos, sin = (table[:, :, :count].clone() for table in prefix.rotary)
    # The last of the chunk's rows sees all of them: within a chunk attention goes both ways.
    bias = prefix.bias[:, count - 1 : count, : length + count].expand(-1, count, -1).clone()

    def velocity(noisy: Tensor, time: float) -> Tensor:
        condition = module.condition(torch.full((given.batch,), time, device=noisy.device))
        streams: list[Tensor | None] = [None] * len(config.transformer.experts)
        streams[expert] = module.embed(noisy.to(cache.keys.dtype))
        memory = PrefixMemory(layers)
        hidden = model.transformer(streams, (cos, sin), bias, memory, length, condition=condition)[expert]
        assert hidden is not None
        return module.read(model.transformer.finish(expert, hidden, condition)).float()

    return velocity
