"""Training: exact resume, what a step sees, clear refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tests.models.test_vla import inputs, make
from vla.cli import info
from vla.data.lerobot import LeRobotDataset
from vla.data.transforms import resize
from vla.errors import ConfigError, DataError, StatisticsError
from vla.models.heads import HeadConfig
from vla.models.masks import MaskRule
from vla.models.transformer import ExpertConfig, TransformerConfig
from vla.tokenizers import FastTokenizer
from vla.training import objectives
from vla.training.branches import branches, draw
from vla.training.dataset import IGNORE, TrainingData, sample_frames
from vla.training.recipes import HeadRecipe, TokenizerRecipe
from vla.training.trainer import Trainer, train


def curve(folder) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_killed_run_continues_on_the_same_loss_curve(tiny_dataset, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny_config(tiny_dataset, whole))
    trainer = Trainer(tiny_config(tiny_dataset, killed))
    for _ in range(4):  # the checkpoint of step 3 is what a kill at step 4 leaves behind
        trainer.step()
        if trainer.step_number == 3:
            trainer.save()
    del trainer
    rows = []
    train(tiny_config(tiny_dataset, killed), rows.append)
    assert rows[-1]["event"] == "validation"
    start = next(row for row in rows if row["event"] == "start")
    assert start["resumed"] and start["step"] == 3
    expected, got = curve(whole), curve(killed)
    assert {step: got[step] for step in (4, 5, 6)} == {step: expected[step] for step in (4, 5, 6)}
    a = torch.load(whole / "checkpoint.pt", weights_only=True)
    b = torch.load(killed / "checkpoint.pt", weights_only=True)
    for part in ("model", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part


def test_another_configuration_does_not_continue_a_run(tiny_dataset, tmp_path) -> None:
    Trainer(tiny_config(tiny_dataset, tmp_path)).save()
    with pytest.raises(ConfigError, match="batch_size, lr"):
        Trainer(tiny_config(tiny_dataset, tmp_path, lr=5e-4, batch_size=4)).resume()


def test_a_damaged_checkpoint_is_named(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path))
    trainer.save()
    trainer.checkpoint_path.write_bytes(trainer.checkpoint_path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"checkpoint\.pt"):
        trainer.resume()


def test_loss_falls_when_a_batch_is_repeated(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path, steps=60, lr=3e-3, look_steps=0))
    trainer.data.train_frames = trainer.data.train_frames[:8]
    first = float(trainer.step()["loss"])
    for _ in range(40):
        last = float(trainer.step()["loss"])
    assert last < 0.7 * first


def test_targets_see_the_future_only(tiny_dataset) -> None:
    data = TrainingData(LeRobotDataset(tiny_dataset), horizon=16)
    frames = data.val_frames
    chunk = data.chunks(frames)
    actions = data.action_normalizer.normalize(np.asarray(data.dataset.column("action"), np.float32))
    assert np.array_equal(chunk[:, 0], actions[frames])
    assert not set(data.train_frames) & set(data.val_frames)
    # a keyframe is where the gripper changes, or the end; never before the frame, never in another episode
    keyframes = data._keyframe_rows
    owner = np.asarray(data.dataset.episode_of)
    assert (keyframes >= np.arange(len(keyframes))).all() and (owner[keyframes] == owner).all()
    gripper = np.sign(np.asarray(data.dataset.column("action"))[:, -1])
    for frame in frames[::7]:
        inside = gripper[frame : keyframes[frame] + 1]
        assert (inside == inside[0]).all()


def test_every_frame_is_seen_once_per_epoch() -> None:
    frames = np.arange(100, 164)
    seen = np.concatenate([sample_frames(3, step, frames, 8) for step in range(8)])
    assert sorted(seen) == list(frames)
    assert not np.array_equal(seen[:8], sample_frames(3, 8, frames, 8))
    assert np.array_equal(sample_frames(3, 11, frames, 8), sample_frames(3, 11, frames, 8))


def test_padding_carries_no_loss(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path))
    batch = trainer.data.batch(trainer.data.train_frames[:8])
    for row in batch.tokens["fast"]:
        ids = row[row != IGNORE]
        assert (row[len(ids) :] == IGNORE).all()
        assert int(trainer.tokenizers["fast"].token_lengths[ids].sum()) == 16 * 7


def test_missing_statistics_stop_training(tiny_dataset, tmp_path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(tiny_dataset, copy)
    stats = json.loads((copy / "meta/stats.json").read_text())
    del stats["action"]
    (copy / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(StatisticsError, match="action"):
        Trainer(tiny_config(copy, tmp_path / "out"))


def test_divergence_is_an_error(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path, look_steps=0))
    with torch.no_grad():
        trainer.model.heads["fast"].logits.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.step()


def test_rollouts_are_called_with_the_bundle(tiny_dataset, tmp_path) -> None:
    seen = []

    def rollout(bundle, step):
        seen.append((step, bundle.embodiment.name))
        return {"success": 0.5}

    train(tiny_config(tiny_dataset, tmp_path, rollout_every=3), rollout=rollout)
    assert seen == [(3, "tabletop"), (6, "tabletop")]


def test_a_run_can_start_from_a_bundle(tiny_dataset, tiny_bundle, tmp_path) -> None:
    from vla.checkpoints import bundle as bundles

    start = bundles.load(tiny_bundle)
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path, init=str(tiny_bundle)))
    mine, theirs = trainer.model.state_dict(), start.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert trainer.tokenizers["fast"].fingerprint() == start.action_tokenizers["fast"].fingerprint()
    other = tiny_config(tiny_dataset, tmp_path, init=str(tiny_bundle))
    changed = replace(other, model=replace(other.model, text_length=12))
    with pytest.raises(ConfigError, match="text_length"):
        Trainer(changed)


def test_a_tokenizer_of_another_kind_than_the_starts_is_refused(tiny_dataset, tiny_bundle, tmp_path) -> None:
    """The name `fast` would train another tokenizer than its recipe says."""

    def asking(recipe):
        heads = {"fast": HeadRecipe("tokens", recipe, 16, 32)}
        return tiny_config(tiny_dataset, tmp_path / "out", init=str(tiny_bundle), heads=heads)

    with pytest.raises(ConfigError, match=r"heads\.fast\.tokenizer: expected init's FastTokenizer, got bins"):
        Trainer(asking(TokenizerRecipe("bins")))
    steps = np.random.default_rng(0).normal(size=(40, 16, 7)).cumsum(axis=1).astype(np.float32) / 4
    FastTokenizer.fit(steps, 128, 5.0).save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"heads\.fast\.tokenizer: .*fast_file .*other"):
        Trainer(asking(TokenizerRecipe("fast_file", path=str(tmp_path / "other"))))


def test_what_to_look_for_is_ahead_and_standardised(tiny_dataset) -> None:
    data = TrainingData(LeRobotDataset(tiny_dataset), 16)
    episode = data.dataset.episodes[0]
    frames = np.arange(episode.start, episode.stop)
    looks = data._looks(frames)
    rows = data._first_keyframes[0]
    assert rows[0] == data._keyframe_rows[episode.start] and rows[0] <= rows[1] < episode.stop
    for i, row in enumerate(rows):
        assert np.isnan(looks[frames > row, i]).all()
        ahead = looks[frames <= row, i]
        assert np.array_equal(ahead, np.broadcast_to(ahead[0], ahead.shape), equal_nan=True)
    targets = data._look_targets.reshape(-1, data.states.shape[1])
    used = ~np.isnan(targets).any(axis=0)
    assert used.any()
    assert np.allclose(targets[:, used].mean(axis=0), 0, atol=1e-4)
    assert np.allclose(targets[:, used].std(axis=0), 1, atol=1e-4)


def test_targets_without_a_value_carry_no_loss_and_no_gradient() -> None:
    prediction = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    loss = objectives.l1(prediction, torch.tensor([[0.0, float("nan"), 5.0]]))
    assert loss.item() == pytest.approx(1.5)
    loss.backward()
    assert prediction.grad.tolist() == [[0.5, 0.0, -0.5]]
    assert objectives.l1(prediction.detach(), torch.full((1, 3), float("nan"))).item() == 0.0


def test_the_first_steps_train_the_points_alone(tiny_dataset, tmp_path) -> None:
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path))
    assert trainer.look_steps == 2
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    starts = {episode.start for episode in trainer.data.dataset.episodes}
    assert set(trainer.data.first_frames.tolist()) <= starts
    assert set(trainer.step()) == {"loss", "look", "gradient_norm"}
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"look.weight", "cameras.agentview.points.queries.weight", "text.weight"} <= changed
    assert not any(name.startswith(("transformer", "head", "cameras.wrist")) for name in changed)
    trainer.step()
    assert "fast" in trainer.step()
    assert trainer.learning_rate(1) == trainer.config.look_lr
    assert trainer.learning_rate(2) == trainer.config.lr / 2  # the main schedule begins with its own warm-up


def test_a_run_too_short_for_actions_is_refused(tiny_dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"look_steps: .*fewer than steps=6"):
        Trainer(tiny_config(tiny_dataset, tmp_path, look_steps=6))


def test_early_frames_count_more(tiny_dataset) -> None:
    dataset = LeRobotDataset(tiny_dataset)
    plain = TrainingData(dataset, 16).train_frames
    weighted = TrainingData(dataset, 16, early_steps=5, early_repeat=3).train_frames
    starts = np.array([episode.start for episode in dataset.episodes])[dataset.episode_of]
    frames, counts = np.unique(weighted, return_counts=True)
    assert np.array_equal(frames, plain)
    assert np.array_equal(counts, np.where(frames - starts[frames] < 5, 3, 1))


def test_late_frames_are_thinned_and_take_no_memory(tiny_dataset, tmp_path) -> None:
    dataset = LeRobotDataset(tiny_dataset)
    every = TrainingData(dataset, 16)
    thin = TrainingData(dataset, 16, early_steps=5, late_stride=4)
    starts = np.array([episode.start for episode in dataset.episodes])[dataset.episode_of]
    since = np.arange(len(dataset)) - starts
    keep = (since < 5) | ((since - 5) % 4 == 0)
    assert np.array_equal(thin.train_frames, every.train_frames[keep[every.train_frames]])
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path, early_steps=5, late_stride=4))
    images = trainer.data.images
    assert len(images["wrist"]) == len(thin.train_frames) + len(thin.val_frames)
    row = int(thin.train_frames[-1])
    assert np.array_equal(images.take("wrist", np.array([row]))[0], resize(dataset.frame("wrist", row), 32, 32))
    with pytest.raises(DataError, match="rows of this store"):
        images.take("wrist", np.flatnonzero(~keep)[:1])


def test_a_run_can_stop_early_on_its_schedule_and_go_on(tiny_dataset, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(tiny_dataset, whole))
    report = train(tiny_config(tiny_dataset, parts, stop_step=2))
    assert report.steps == 2
    train(tiny_config(tiny_dataset, parts))
    assert curve(whole) == curve(parts)


BINS = TokenizerRecipe("bins")
ALL_HEADS = {
    "fast": HeadRecipe("tokens", TokenizerRecipe("fast", 128, 5.0), 16, 32),
    "bins": HeadRecipe("tokens", BINS, 16, 32, lookahead=2, exit_layer=1),
    "flow": HeadRecipe("flow", None, 16, 32, condition_width=8),
    "parallel": HeadRecipe("parallel", None, 0),
    "hybrid": HeadRecipe("hybrid", BINS, 24, 32, noise_steps=10),
}


def test_heads_train_together_as_if_alone(tiny_dataset, tiny_bundle, tmp_path) -> None:
    """Branches neither see nor move each other: the loss of a head is the same beside four others."""
    alone = Trainer(tiny_config(tiny_dataset, tmp_path / "a", init=str(tiny_bundle)))
    beside = Trainer(tiny_config(tiny_dataset, tmp_path / "b", init=str(tiny_bundle), heads=ALL_HEADS))
    frozen = Trainer(tiny_config(tiny_dataset, tmp_path / "c", init=str(tiny_bundle), heads=ALL_HEADS, freeze=True))
    assert beside.taken == ["fast"]
    frames = alone.data.val_frames[:8]
    with torch.no_grad():
        one, all_of_them, behind = (
            trainer._losses(trainer.model, trainer._tensors(frames, None)) for trainer in (alone, beside, frozen)
        )
    for name in set(behind) - {"loss"}:
        assert float(behind[name]) == pytest.approx(float(all_of_them[name]), rel=1e-4), name
    for name in ("fast", "fast_accuracy", "keyframe", "chunk", "look"):
        assert float(one[name]) == pytest.approx(float(all_of_them[name]), rel=1e-5), name
    assert {"bins", "bins_exit", "bins_guess", "flow", "parallel", "hybrid", "hybrid_noise"} <= set(all_of_them)
    assert float(all_of_them["hybrid_noise"]) == pytest.approx(1.0, abs=0.1)  # zero-initialised: predicts no noise


def test_repeated_noise_is_more_of_the_same_loss(tiny_dataset, tiny_bundle, tmp_path) -> None:
    """The mean over the noises and times that would be drawn one by one; nothing else changes."""
    heads = {name: ALL_HEADS[name] for name in ("fast", "hybrid")}
    often = {**heads, "hybrid": replace(heads["hybrid"], noise_repeats=3)}
    for freeze in (False, True):
        one, three = (
            Trainer(
                tiny_config(
                    tiny_dataset, tmp_path / f"{freeze}{len(out)}", init=str(tiny_bundle), freeze=freeze, heads=out
                )
            )
            for out in (heads, often)
        )
        with torch.no_grad():
            for trainer in (one, three):  # opinions about the noise
                torch.manual_seed(1)
                trainer.model.heads["hybrid"].noise[2].weight.normal_(std=0.3)
        frames = one.data.train_frames[:4]
        given, more = one._tensors(frames, 5), three._tensors(frames, 5)
        assert torch.equal(given["noise"], more["noise"]) and torch.equal(given["time"], more["time"])
        assert more["noises"].shape == (2, *given["noise"].shape) and len(more["progresses"]) == 2
        drawn = zip((given["noise"], *more["noises"]), (given["progress"], *more["progresses"]))
        with torch.no_grad():
            each = [
                one._losses(one.model, {**given, "noise": noise, "progress": progress}) for noise, progress in drawn
            ]
            together = three._losses(three.model, more)
        assert len({float(losses["hybrid_noise"]) for losses in each}) == 3
        expected = np.mean([float(losses["hybrid_noise"]) for losses in each])
        assert float(together["hybrid_noise"]) == pytest.approx(expected, rel=1e-4)
        assert float(together["hybrid_tokens"]) == pytest.approx(float(each[0]["hybrid_tokens"]), rel=1e-4)
        assert float(together["fast"]) == pytest.approx(float(each[0]["fast"]), rel=1e-4)
    assert set(draw([1], 2, 3, 4)) == {"noise", "time", "progress"}


def test_only_noise_is_repeated(tiny_dataset, tmp_path) -> None:
    for name, key, value in (
        ("flow", "noise_repeats", 2), ("hybrid", "noise_repeats", 0), ("flow", "noise_weight", 2.0),
        ("hybrid", "noise_weight", 0.0), ("hybrid", "noise_weight", float("nan")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"heads\.{name}\.{key}"):
            tiny_config(tiny_dataset, tmp_path, heads={name: replace(ALL_HEADS[name], **{key: value})})


def test_noise_weighs_as_much_beside_tokens_as_asked(tiny_dataset, tmp_path) -> None:
    def losses(**changes):
        heads = {"hybrid": replace(ALL_HEADS["hybrid"], **changes)}
        trainer = Trainer(tiny_config(tiny_dataset, tmp_path / str(changes), heads=heads, look_steps=0))
        with torch.no_grad():
            return trainer._losses(trainer.model, trainer._tensors(trainer.data.val_frames[:8], None))

    plain, heavy = losses(), losses(noise_weight=5.0)
    assert float(heavy["hybrid_noise"]) == pytest.approx(float(plain["hybrid_noise"]))
    added = 4 * float(plain["hybrid_noise"])
    assert float(heavy["hybrid"]) == pytest.approx(float(plain["hybrid"]) + added)
    assert float(heavy["loss"]) == pytest.approx(float(plain["loss"]) + added)


def test_frozen_backbone_stays_and_heads_learn(tiny_dataset, tiny_bundle, tmp_path) -> None:
    config = tiny_config(
        tiny_dataset, tmp_path, init=str(tiny_bundle), heads=ALL_HEADS, freeze=True, steps=60, lr=3e-3, image_shift=1
    )
    trainer = Trainer(config)
    assert trainer.look_steps == 0
    trainer.data.train_frames = trainer.data.train_frames[:8]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    first = {name: float(value) for name, value in trainer.step().items()}
    for _ in range(40):
        last = {name: float(value) for name, value in trainer.step().items()}
    for name in ("fast", "bins", "bins_exit", "bins_guess", "flow", "parallel", "hybrid"):
        assert last[name] < 0.95 * first[name], name
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    own = ("heads.", *(f"transformer.layers.{layer}.{e}." for layer in range(2) for e in range(1, 5)))
    assert all(name.startswith((*own, *(f"transformer.final_norms.{e}" for e in range(1, 5)))) for name in changed)
    assert {name.split(".")[1] for name in changed if name.startswith("heads.")} == set(ALL_HEADS)


def test_heads_of_the_start_that_are_not_trained_stay(tiny_dataset, tiny_bundle, tmp_path) -> None:
    from vla.checkpoints import bundle as bundles

    heads = {name: ALL_HEADS[name] for name in ("flow", "bins")}
    train(tiny_config(tiny_dataset, tmp_path, init=str(tiny_bundle), heads=heads, freeze=True))
    start, end = bundles.load(tiny_bundle), bundles.load(tmp_path / "bundle")
    assert [head.name for head in end.config.heads] == ["fast", "flow", "bins"]
    told = info.describe(tmp_path / "bundle")["heads"]
    assert told["flow"] == "flow" and told["bins"].startswith("tokens, bins of")
    assert sorted(end.action_tokenizers) == ["bins", "fast"]
    old, new = start.model, end.model
    assert torch.equal(old.heads["fast"].logits.weight, new.heads["fast"].logits.weight)
    before, after = (model.transformer.layers[1][model.config.head("fast").expert] for model in (old, new))
    assert torch.equal(before.qkv.weight, after.qkv.weight)


def test_guesses_do_not_change_what_greedy_decoding_says(tiny_dataset, tmp_path) -> None:
    """The same run with and without heads that look ahead ends with the same policy."""
    plain, ahead = (
        Trainer(tiny_config(tiny_dataset, tmp_path / str(n), look_steps=0,
                            heads={"bins": HeadRecipe("tokens", BINS, 16, 32, lookahead=n)}, clip=1e9))
        for n in (0, 2)
    )  # fmt: skip
    ahead.model.load_state_dict(plain.model.state_dict(), strict=False)
    for trainer in (plain, ahead):
        trainer.step()
    mine, theirs = plain.model.state_dict(), ahead.model.state_dict()
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine)


def test_freezing_needs_something_to_keep(tiny_dataset, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train\.freeze.*init"):
        tiny_config(tiny_dataset, tmp_path, freeze=True)
    with pytest.raises(ConfigError, match=r"train\.heads"):
        tiny_config(tiny_dataset, tmp_path, heads={})


@pytest.mark.parametrize("kind", ["flow", "parallel"])
@torch.no_grad()
def test_actions_of_one_chunk_see_each_other_in_training(kind: str) -> None:
    experts = ExpertConfig(32, 64), ExpertConfig(16, 32, condition_width=8 if kind == "flow" else 0)
    model = make(heads=(HeadConfig("own", kind, 1),), transformer=TransformerConfig(experts, 2, 4, 2, 8))
    for weight in model.parameters():  # norms and read-outs that start at zero would hide what is asked
        weight.add_(0.1 * torch.randn_like(weight))
    (head,), args = model.config.heads, inputs()
    given = {"chunk": torch.randn(2, 4, 2), "noise": torch.randn(2, 4, 2), "time": torch.full((2,), 0.5)}
    (segment,), _ = branches(model, head, given)
    assert segment.rule is MaskRule.BLOCK and segment.embeddings.shape[1] == 4
    moved = replace(segment, embeddings=segment.embeddings.clone())
    moved.embeddings[:, -1] += 1
    condition = model.heads["own"].condition(given["time"]) if kind == "flow" else None
    trunk = model.prefix_segments(*args)
    first, other = (model.run([*trunk, one], condition)[-1][:, 0] for one in (segment, moved))
    assert (first - other).abs().max() > 1e-3
