"""Where a run starts from: the weights of an earlier bundle, and which of them stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vla.errors import ConfigError, explain
from vla.models.vla import Vla


def take_weights(model: Vla, source: Vla, teachers: Mapping[str, str] | None = None) -> list[str]:
    """Copy the backbone of `source` into `model`, and its heads of the same name and shape with their experts.

    teachers: {head of `model`: head of `source`} where names differ. Returns the names of the heads that were taken.
    Registers that `source` does not have stay as `model` made them. ConfigError when the backbones differ.
    """
    mine, theirs = model.config, source.config
    for key in ("cameras", "state_dim", "action_dim", "horizon", "text_vocab", "text_length", "text_queries", "look"):
        if getattr(mine, key) != getattr(theirs, key):
            raise ConfigError(explain(f"model.{key}", getattr(theirs, key), getattr(mine, key), "As in init."))
    if theirs.registers is not None and mine.registers != theirs.registers:
        raise ConfigError(explain("model.registers", theirs.registers, mine.registers, "As in init."))
    trunk = [replace(c.transformer, experts=c.transformer.experts[:1]) for c in (mine, theirs)]
    if trunk[0] != trunk[1]:
        raise ConfigError(explain("model.transformer", trunk[1], trunk[0], "Choose the model of init."))
    experts: dict[int, int] = {0: 0}
    taken: dict[str, str] = {}
    for head in mine.heads:
        name = (teachers or {}).get(head.name, head.name)
        for other in theirs.heads:
            sizes = mine.transformer.experts[head.expert], theirs.transformer.experts[other.expert]
            # Of an older bundle no fingerprint is known; that tokenizers are the same is the trainer's care.
            alike = replace(head, name=name, expert=0, lookahead=0, exit_layer=0, tokenizer="") == replace(
                other, expert=0, lookahead=0, exit_layer=0, tokenizer=""
            )
            if alike and sizes[0] == sizes[1] and (head.expert == 0) == (other.expert == 0):
                experts[head.expert] = other.expert
                taken[head.name] = other.name
    weights = source.state_dict()

    def origin(name: str) -> str | None:
        parts = name.split(".")
        if parts[0] == "heads":
            parts[1] = taken.get(parts[1], "")
            return ".".join(parts) if parts[1] else None
        at = {"layers": 3, "final_norms": 2}.get(parts[1]) if parts[0] == "transformer" else None
        if at is not None:
            expert = int(parts[at])
            if expert not in experts:
                return None
            parts[at] = str(experts[expert])
        return ".".join(parts)

    found = {name: origin(name) for name in model.state_dict()}
    model.load_state_dict({name: weights[old] for name, old in found.items() if old in weights}, strict=False)
    return list(taken)


def train_heads_only(model: Vla, names: list[str]) -> None:
    """Leave nothing to train but these heads and their own experts."""
    model.requires_grad_(False)
    for name in names:
        model.heads[name].requires_grad_(True)
        index = model.config.head(name).expert
        if index:
            for layer in model.transformer.layers:
                layer[index].requires_grad_(True)
            model.transformer.final_norms[index].requires_grad_(True)
