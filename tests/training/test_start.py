"""Registers in training, and where a run may start or go on: weights taken, settings that came later."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_config
from tests.training.test_trainer import ALL_HEADS
from vla.checkpoints import bundle as bundles
from vla.errors import ConfigError
from vla.models.pruning import RegisterConfig
from vla.training.trainer import Trainer, train


def with_registers(data, out, count: int = 3, layer: int = 1, **changes):
    config = tiny_config(data, out, **changes)
    return replace(config, model=replace(config.model, registers=count, register_layer=layer))


@pytest.fixture(scope="module")
def bundle(tiny_dataset, tmp_path_factory):
    """A bundle with registers, of six steps."""
    out = tmp_path_factory.mktemp("registers")
    train(with_registers(tiny_dataset, out))
    return out / "bundle"


def test_every_head_learns_behind_registers(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(with_registers(tiny_dataset, tmp_path, heads=ALL_HEADS, steps=60, lr=3e-3, look_steps=0))
    trainer.data.train_frames = trainer.data.train_frames[:8]
    before = trainer.model.registers.detach().clone()
    first = {name: float(value) for name, value in trainer.step().items()}
    for _ in range(20):
        last = {name: float(value) for name, value in trainer.step().items()}
    for name in ("fast", "bins", "bins_exit", "bins_guess", "flow", "parallel", "hybrid", "keyframe", "chunk", "look"):
        assert last[name] < 0.95 * first[name], name
    assert ((trainer.model.registers - before).abs().amax(dim=1) > 1e-3).all()


def test_heads_behind_registers_train_together_as_if_alone_and_frozen(tiny_dataset, bundle, tmp_path) -> None:
    alone = Trainer(with_registers(tiny_dataset, tmp_path / "a", init=str(bundle)))
    settings = {"init": str(bundle), "heads": ALL_HEADS}
    beside = Trainer(with_registers(tiny_dataset, tmp_path / "b", **settings))
    frozen = Trainer(with_registers(tiny_dataset, tmp_path / "c", **settings, freeze=True))
    frames = alone.data.val_frames[:8]
    with torch.no_grad():
        one, joint, behind = (t._losses(t.model, t._tensors(frames, None)) for t in (alone, beside, frozen))
    for name in set(behind) - {"loss"}:
        assert float(behind[name]) == pytest.approx(float(joint[name]), rel=1e-4), name
    for name in ("fast", "fast_accuracy", "keyframe", "chunk", "look"):
        assert float(one[name]) == pytest.approx(float(joint[name]), rel=1e-5), name
    assert not frozen.model.registers.requires_grad
    assert torch.equal(frozen.model.registers, bundles.load(bundle).model.registers)


def test_registers_are_added_to_a_model_that_has_none(tiny_dataset, tiny_bundle, tmp_path) -> None:
    start = bundles.load(tiny_bundle)
    trainer = Trainer(with_registers(tiny_dataset, tmp_path, init=str(tiny_bundle), look_steps=0))
    mine, theirs = trainer.model.state_dict(), start.model.state_dict()
    assert set(mine) - set(theirs) == {"registers"} and trainer.taken == ["fast"]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    before = trainer.model.registers.detach().clone()
    assert 0.01 < float(before.std()) < 0.04  # as small as words are at first
    trainer.step()
    assert not torch.equal(trainer.model.registers, before)
    made = trainer.bundle().check()
    assert made.config.registers == RegisterConfig(3, 1)
    assert made.training["init"] == start.training and "init" not in start.training  # how all of it came about


def test_starts_that_cannot_work_are_named(tiny_dataset, tiny_bundle, bundle, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train\.freeze: .*registers that init has.*freeze=false first"):
        Trainer(with_registers(tiny_dataset, tmp_path, init=str(tiny_bundle), freeze=True))
    for other in (
        with_registers(tiny_dataset, tmp_path, count=4, init=str(bundle)),
        with_registers(tiny_dataset, tmp_path, layer=2, init=str(bundle)),
        tiny_config(tiny_dataset, tmp_path, init=str(bundle)),
    ):
        with pytest.raises(ConfigError, match=r"model\.registers: expected RegisterConfig\(count=3, layer=1\)"):
            Trainer(other)
    with pytest.raises(ConfigError, match=r"model\.register_layer: expected at most the depth, 2"):
        Trainer(with_registers(tiny_dataset, tmp_path, layer=3))


def test_settings_that_came_later_do_not_stop_an_older_run(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path, heads=ALL_HEADS))
    trainer.save()
    state = torch.load(trainer.checkpoint_path, weights_only=True)
    identity = json.loads(state["identity"])
    for holder, keys in (
        (identity, ("image_shift", "init", "betas")), (identity["model"], ("registers", "register_layer")),
        (identity["model"]["cameras"][1], ("points",)), (identity["heads"]["bins"], ("weight", "distill")),
    ):  # fmt: skip
        for key in keys:
            del holder[key]
    torch.save({**state, "identity": json.dumps(identity)}, trainer.checkpoint_path)
    assert Trainer(tiny_config(tiny_dataset, tmp_path, heads=ALL_HEADS)).resume()
    for changes, name in (
        ({"heads": {**ALL_HEADS, "bins": replace(ALL_HEADS["bins"], weight=2.0)}}, "heads"),
        ({"heads": ALL_HEADS, "image_shift": 1}, "image_shift"),
        ({"heads": {"bins": ALL_HEADS["bins"]}}, "heads"),
    ):
        assert tiny_config(tiny_dataset, tmp_path, **changes).changed(identity) == [name]
    assert with_registers(tiny_dataset, tmp_path, heads=ALL_HEADS).changed(identity) == ["model"]
    assert tiny_config(tiny_dataset, tmp_path, heads=ALL_HEADS).changed({**identity, "gone": 1}) == ["gone"]
