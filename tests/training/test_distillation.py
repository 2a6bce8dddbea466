"""Consistency distillation: what a student learns from, and what it is kept from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tests.models.test_vla import make
from vla.checkpoints import bundle as bundles
from vla.data.lerobot import LeRobotDataset
from vla.errors import BundleError, ConfigError
from vla.tokenizers import BinTokenizer, FastTokenizer
from vla.training import objectives
from vla.training.branches import branches
from vla.training.recipes import DistillRecipe, HeadRecipe, TokenizerRecipe
from vla.training.trainer import Trainer, train

BINS = TokenizerRecipe("bins")


def test_distillation_shortens_the_way_to_the_fixed_point(tiny_dataset, tmp_path) -> None:
    """Fewer Jacobi passes after training on a head's own iterates, while greedy decoding still says the same."""
    from vla.decoding.jacobi import jacobi
    from vla.models.suffix import TokenSuffix

    bins = HeadRecipe("tokens", BINS, 32, 64)
    first = tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0, steps=120, lr=3e-3,
                        val_every=200, checkpoint_every=200)  # fmt: skip
    train(first)
    recipe = DistillRecipe(frames=48, passes=6, tolerance=float("inf"))
    second = tiny_config(
        tiny_dataset, tmp_path / "student", heads={"bins": replace(bins, distill=recipe)}, freeze=True, steps=121,
        init=str(tmp_path / "teacher/bundle"), lr=2e-3, val_every=200, checkpoint_every=200,
    )  # fmt: skip
    rows = []
    trainer = Trainer(second, rows.append)
    assert rows[-1]["event"] == "teacher" and len(trainer.data.train_frames) == 48
    parts = sorted((tmp_path / "student").glob("greedy-*/*.npy"))
    stamps = [part.stat().st_mtime_ns for part in parts]
    Trainer(second)
    assert stamps == [part.stat().st_mtime_ns for part in parts]  # they are collected once
    settled = trainer.taught["bins"].take(trainer.taught["bins"].frames)

    def passes(model):
        batch = trainer.data.batch(trainer.data.train_frames)
        images = {name: torch.from_numpy(value) for name, value in batch.images.items()}
        rest = [torch.from_numpy(x) for x in (batch.text, batch.text_valid, batch.state)]
        out, said = [], []
        with torch.inference_mode():
            for i in range(24):
                one = [x[i : i + 1] for x in rest]
                segments = model.prefix_segments({name: value[i : i + 1] for name, value in images.items()}, *one)
                suffix = TokenSuffix(model, model.prefix(segments, 112), "bins")
                decoded = jacobi(suffix, trainer._grammar("bins"), [()], 112)
                out.append(decoded.passes)
                said.append(decoded.ids[0])
        return float(np.mean(out)), np.array(said)

    before, teacher = passes(trainer.model.eval())
    assert (teacher == settled[np.isin(trainer.taught["bins"].frames, trainer.data.train_frames)][:24]).mean() > 0.99
    while trainer.step_number < second.steps:
        losses = trainer.step()
    assert "bins_consistency" in losses
    after, student = passes(trainer.model.eval())
    assert after < 0.8 * before
    assert (teacher == student).mean() > 0.8


def test_iterates_are_those_of_the_student_as_it_is_now(tiny_dataset, tmp_path) -> None:
    """Against uncached passes; what begins right may only be changed by the student itself."""
    from vla.training.distillation import iterate, way

    bins = HeadRecipe("tokens", BINS, 16, 32)
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0))
    trainer = Trainer(
        tiny_config(tiny_dataset, tmp_path / "student", init=str(tmp_path / "teacher/bundle"), freeze=True,
                    heads={"bins": replace(bins, distill=DistillRecipe(frames=16))})
    )  # fmt: skip
    for _ in range(3):
        trainer.step()
    model, given = trainer.model.eval(), trainer._tensors(trainer.data.train_frames[:4], 0)
    settled, head = given["settled"]["bins"], trainer.model.heads["bins"]
    for done, begin in ((0, 0), (0, 50), (1, 0), (3, 0), (3, 50)):
        guess = torch.where(torch.arange(112) < begin, settled, 0)
        for _ in range(done):
            with torch.no_grad():
                inputs = model.suffix_segment("bins", head.embed(head.shift(guess)))
                trunk = model.prefix_segments(given["images"], given["text"], given["text_valid"], given["state"])
                guess = head.logits(model.run([*trunk, inputs])[-1]).argmax(dim=-1)
        out = iterate(model, "bins", trainer._grammar("bins"), given, settled, done, begin)
        assert (out == guess).float().mean() > 0.99  # a near-tie may fall the other way
    ways = [way([7, step], 12, 112) for step in range(400)]
    assert {passes for passes, _ in ways} == set(range(12)) and 0.4 < np.mean([begin == 0 for _, begin in ways]) < 0.6
    assert max(begin for _, begin in ways) > 100


def test_mixed_labels_follow_the_tolerance(tiny_dataset, tmp_path) -> None:
    bins = HeadRecipe("tokens", BINS, 16, 32)
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0))
    distances: list[float] = []  # of each teacher's chunk to the demonstration; known after the first round
    for which in (0.0, float("inf"), "between"):
        tolerance = float(np.mean(sorted(distances)[3:5])) if which == "between" else which
        config = tiny_config(
            tiny_dataset, tmp_path / str(tolerance), init=str(tmp_path / "teacher/bundle"), freeze=True,
            heads={"bins": replace(bins, distill=DistillRecipe(frames=16, tolerance=tolerance))},
        )  # fmt: skip
        trainer = Trainer(config)
        given = trainer._tensors(trainer.data.train_frames[:8], 0)
        batch, settled = trainer.data.batch(trainer.data.train_frames[:8]), given["settled"]["bins"].numpy()
        said = [BinTokenizer().decode(ids.tolist(), *chunk.shape) for ids, chunk in zip(settled, batch.chunk)]
        distances = [float(np.abs(a - b).mean()) for a, b in zip(said, batch.chunk)]
        near = [distance < tolerance for distance in distances]
        assert sum(near) == {0.0: 0, float("inf"): 8, "between": 4}[which]
        rows = zip(near, given["tokens"]["bins"].numpy(), settled, batch.tokens["bins"])
        for within, labels, ours, demonstrated in rows:
            assert not np.array_equal(ours, demonstrated)
            assert np.array_equal(labels, ours if within else demonstrated)
    with pytest.raises(ConfigError, match=r"heads\.bins\.distill"):
        tiny_config(tiny_dataset, tmp_path, heads={"bins": replace(bins, distill=DistillRecipe())})


def test_a_student_of_another_name_stands_beside_its_teacher(tiny_dataset, tmp_path) -> None:
    bins = HeadRecipe("tokens", BINS, 16, 32)
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0))
    recipe = replace(bins, distill=DistillRecipe(teacher="bins", frames=16))
    trainer = Trainer(
        tiny_config(tiny_dataset, tmp_path / "both", init=str(tmp_path / "teacher/bundle"), freeze=True,
                    heads={"student": recipe})
    )  # fmt: skip
    model = trainer.model
    assert [head.name for head in model.config.heads] == ["bins", "student"]  # the first is the default

    def weights(name):
        layers = [layer[model.config.head(name).expert].state_dict() for layer in model.transformer.layers]
        return [*model.heads[name].state_dict().values(), *(value for layer in layers for value in layer.values())]

    assert all(torch.equal(a, b) for a, b in zip(weights("student"), weights("bins")))
    trainer.step()
    assert not all(torch.equal(a, b) for a, b in zip(weights("student"), weights("bins")))
    with pytest.raises(ConfigError, match=r"heads\.student\.distill.*'other'"):
        Trainer(
            tiny_config(tiny_dataset, tmp_path / "none", init=str(tmp_path / "teacher/bundle"), freeze=True,
                        heads={"student": replace(bins, distill=DistillRecipe(teacher="other", frames=16))})
        )  # fmt: skip


def test_a_distilled_head_is_not_read_by_another_tokenizer_of_its_size(tiny_dataset, tmp_path) -> None:
    bins = HeadRecipe("tokens", BINS, 16, 32)
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0))
    recipe = replace(bins, distill=DistillRecipe(teacher="bins", frames=16))
    trainer = Trainer(
        tiny_config(tiny_dataset, tmp_path / "both", init=str(tmp_path / "teacher/bundle"), freeze=True,
                    heads={"student": recipe})
    )  # fmt: skip
    bundles.save(trainer.bundle(), tmp_path / "bundle")
    made = bundles.load(tmp_path / "bundle")
    assert {head.tokenizer for head in made.config.heads} == {BinTokenizer().fingerprint()}
    noise = np.random.default_rng(0).normal(size=(200, 8, 2)).astype(np.float32)
    other = FastTokenizer.fit(noise, vocab_size=256)
    assert other.vocab_size == 256 == made.config.head("student").vocab
    swapped = replace(made, action_tokenizers={**made.action_tokenizers, "student": other})
    with pytest.raises(BundleError, match=r"action_tokenizers\.student: .*or train heads\.student anew"):
        swapped.check()
    with pytest.raises(BundleError, match=r"action_tokenizers\.student"):
        bundles.save(swapped, tmp_path / "swapped")
    assert not (tmp_path / "swapped").exists()


def test_no_gradient_flows_through_the_fixed_point() -> None:
    """Of the three branches of a distilled head, that of the fixed point is a target and nothing more."""
    model = make()
    (head,) = model.config.heads
    ids = torch.randint(0, 11, (3, 2, 8))
    given = {name: {"words": value} for name, value in zip(("tokens", "settled", "iterate"), ids)}
    given |= {"anchor": {"words": torch.tensor(2.0)}, "consistency": {"words": torch.tensor(3.0)}}
    made, read = branches(model, head, given)
    assert [segment.branch for segment in made[1:]] == ["words/0", "words/1"] and len(made) == 3
    module = model.heads["words"]
    for segment, tokens in zip(made, ids):
        assert torch.equal(segment.embeddings, module.embed(module.shift(tokens)))
    labels, settled, iterate = hidden = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(3)]
    losses = read([[states] for states in hidden])
    losses["loss"].backward()
    assert settled.grad is None and labels.grad.abs().sum() > 0 and iterate.grad.abs().sum() > 0
    wanted, said = (module.logits(states).softmax(dim=-1) for states in (settled, iterate))
    divergence = (wanted * (wanted / said).log()).sum(dim=-1).mean()
    assert losses["consistency"].item() == pytest.approx(divergence.item(), rel=1e-4)
    anchor = objectives.action_cross_entropy(module.logits(labels), ids[0])
    assert losses["loss"].item() == pytest.approx(2 * anchor.item() + 3 * divergence.item(), rel=1e-4)


def test_a_teacher_as_the_target_holds_the_student_and_stays_as_it_is(tiny_dataset, tmp_path) -> None:
    """At first they say the same; a student that has gone astray comes back to its teacher's distributions."""
    bins = HeadRecipe("tokens", BINS, 16, 32)
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads={"bins": bins}, look_steps=0))
    recipe = replace(bins, distill=DistillRecipe(teacher="bins", frames=16, target="teacher", anchor=0.0))
    settings = {"init": str(tmp_path / "teacher/bundle"), "freeze": True, "lr": 3e-3, "steps": 90}
    trainer = Trainer(tiny_config(tiny_dataset, tmp_path / "both", heads={"student": recipe}, **settings))
    model, expert = trainer.model, trainer.model.config.head("bins").expert
    own = [model.heads["bins"], *(layer[expert] for layer in model.transformer.layers)]
    before = [weight.detach().clone() for module in own for weight in module.parameters()]
    assert float(trainer.step()["student_fidelity"]) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.heads["student"].logits.weight.add_(0.3 * torch.randn_like(model.heads["student"].logits.weight))
    astray = float(trainer.step()["student_fidelity"])
    for _ in range(40):
        near = float(trainer.step()["student_fidelity"])
    assert near < 0.5 * astray and astray > 0.01
    assert all(torch.equal(a, b) for a, b in zip(before, (w for module in own for w in module.parameters())))


@pytest.mark.parametrize(
    ("heads", "changes", "said"),
    [
        (("student",), {"target": "nobody"}, "expected own or teacher, got 'nobody'"),
        (("bins",), {"target": "teacher"}, "teacher '', which this run changes"),
        (("bins", "student"), {"target": "teacher", "teacher": "bins"}, "teacher 'bins', which this run changes"),
    ],
)
def test_targets_that_cannot_be_are_refused(tiny_dataset, tmp_path, heads, changes, said) -> None:
    bins = HeadRecipe("tokens", BINS, 16, 32)
    recipes = {name: bins for name in heads[:-1]} | {heads[-1]: replace(bins, distill=DistillRecipe(**changes))}
    with pytest.raises(ConfigError, match=said):
        tiny_config(tiny_dataset, tmp_path, init="somewhere", freeze=True, heads=recipes)


def test_fixed_points_are_asked_for_anew_when_teacher_or_data_change(tiny_dataset, tmp_path, monkeypatch) -> None:
    """Two students of one name and two teachers in one folder, and data that were recorded again."""
    bins = HeadRecipe("tokens", BINS, 16, 32)
    heads = {"bins": bins, "other": replace(bins)}
    train(tiny_config(tiny_dataset, tmp_path / "teacher", heads=heads, look_steps=0))

    def folders(teacher: str) -> int:
        recipe = replace(bins, distill=DistillRecipe(teacher=teacher, frames=16))
        Trainer(
            tiny_config(tiny_dataset, tmp_path / "both", init=str(tmp_path / "teacher/bundle"), freeze=True,
                        heads={"student": recipe})
        )  # fmt: skip
        return len(list((tmp_path / "both").glob("greedy-*")))

    assert [folders(teacher) for teacher in ("bins", "bins", "other")] == [1, 1, 2]
    monkeypatch.setattr(LeRobotDataset, "fingerprint", "recorded again")
    assert folders("bins") == 3
