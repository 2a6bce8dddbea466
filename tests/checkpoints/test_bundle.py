"""Bundles: complete or refused, plain data only."""

import dataclasses
import json
import shutil

import pytest
import torch

from vla.checkpoints import bundle as bundles
from vla.errors import BundleError
from vla.models.pruning import RegisterConfig
from vla.models.vla import Vla
from vla.resources import bundle_path


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(path, change, rehash: bool = True) -> None:
    content = json.loads((path / bundles.MARKER).read_text())
    change(content)
    if rehash:
        body = {key: value for key, value in content.items() if key not in ("hashes", bundles.DATA)}
        content["hashes"]["content"] = bundles._sha256_json(body)
    (path / bundles.MARKER).write_text(json.dumps(content))


def test_round_trip(copy, tmp_path) -> None:
    first = bundles.load(copy)
    fingerprint = bundles.save(first, tmp_path / "again")
    second = bundles.load(tmp_path / "again")
    assert fingerprint == second.fingerprint and first.config == second.config
    assert first.action_tokenizers["fast"].fingerprint() == second.action_tokenizers["fast"].fingerprint()
    a, b = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_saving_over_a_bundle_keeps_what_lies_beside_it(copy) -> None:
    (copy / "CARD.md").write_text("how it was made")
    bundles.save(bundles.load(copy), copy)
    assert (copy / "CARD.md").read_text() == "how it was made"
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]  # nothing half-written stays


@pytest.mark.parametrize("name", [bundles.MARKER, bundles.WEIGHTS])
def test_missing_file(copy, name) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        bundles.load(copy)


def test_cut_weights(copy) -> None:
    weights = copy / bundles.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match="copy it again"):
        bundles.load(copy)


def test_changed_content(copy) -> None:
    edit(copy, lambda content: content["action_normalizer"]["q01"].__setitem__(0, 9.0), rehash=False)
    with pytest.raises(BundleError, match="sha256"):
        bundles.load(copy)


def test_not_json(copy) -> None:
    (copy / bundles.MARKER).write_text("{")
    with pytest.raises(BundleError, match="JSON"):
        bundles.load(copy)


def test_unknown_field_is_refused_with_the_nearest_name(copy) -> None:
    edit(copy, lambda content: content["model"].update(horizn=3))
    with pytest.raises(BundleError, match="horizon"):
        bundles.load(copy)


def test_unknown_family_and_version(copy) -> None:
    edit(copy, lambda content: content.update(format_version=99))
    with pytest.raises(BundleError, match="format_version"):
        bundles.load(copy)
    edit(copy, lambda content: content.update(family="vlaa"))
    with pytest.raises(BundleError, match="vla"):
        bundles.load(copy)


def test_missing_statistics(copy) -> None:
    edit(copy, lambda content: content["action_normalizer"].pop("q99"))
    with pytest.raises(BundleError, match="q99"):
        bundles.load(copy)


def test_wrong_tokenizer_for_these_weights(copy) -> None:
    from vla.tokenizers import BinTokenizer

    edit(copy, lambda content: content.update(action_tokenizers={"fast": BinTokenizer().to_dict()}))
    with pytest.raises(BundleError, match=r"action_tokenizers\.fast: expected the head's \d+ tokens, got 256 tokens"):
        bundles.load(copy)


def test_another_tokenizer_of_the_same_size_is_refused_where_the_head_knows_its_own(copy, tmp_path) -> None:
    """With hashes that are right: somebody put a policy together from two."""
    first = bundles.load(copy)
    own = first.action_tokenizers["fast"]
    assert first.config.head("fast").tokenizer == own.fingerprint()
    edit(copy, lambda content: content["action_tokenizers"]["fast"].update(scale=own.scale * 2))
    said = (
        rf"action_tokenizers\.fast: expected the one that the head was trained with, {own.fingerprint()[:12]}, got .*"
    )
    with pytest.raises(BundleError, match=said + r"Copy the whole bundle again, or train heads\.fast anew"):
        bundles.load(copy)
    edit(copy, lambda content: content["model"]["heads"][0].pop("tokenizer"))  # as bundles were written before
    old = bundles.load(copy)
    assert old.config.head("fast").tokenizer == "" and old.action_tokenizers["fast"].scale == own.scale * 2
    assert bundles.save(old, tmp_path / "again") == old.fingerprint


def test_the_shipped_heads_are_read_by_no_other_tokenizer(tmp_path) -> None:
    folder = tmp_path / "tabletop"
    shutil.copytree(bundle_path("tabletop"), folder)
    heads = {head.name for head in bundles.load(folder).config.heads if head.vocab}
    assert heads == {"fast", "bins", "draft", "hybrid", "distilled"}
    for head in sorted(heads):
        kept = (folder / bundles.MARKER).read_text()
        edit(folder, lambda content, head=head: content["action_tokenizers"].update({head: other_of(content, head)}))
        with pytest.raises(
            BundleError, match=rf"action_tokenizers\.{head}: expected the one .* train heads\.{head} anew"
        ):
            bundles.load(folder)
        (folder / bundles.MARKER).write_text(kept)


def other_of(content: dict, head: str) -> dict:
    """A FAST tokenizer with as many tokens as this head has."""
    data = content["action_tokenizers"]["fast"]
    data = {**data, "scale": 2 * data["scale"]}
    count = next(known["vocab"] for known in content["model"]["heads"] if known["name"] == head)
    kept = set(data["vocab"][:count])
    merges = [pair for pair in data["merges"] if {*pair, "".join(pair)} <= kept]
    return {**data, "vocab": data["vocab"][:count], "merges": merges}


def test_a_class_path_in_a_file_is_never_followed(copy) -> None:
    edit(copy, lambda content: content["model"].update(_target_="os.system"))
    with pytest.raises(BundleError, match="_target_"):
        bundles.load(copy)


def test_registers_are_part_of_a_bundle_and_absent_where_there_are_none(copy, tmp_path) -> None:
    plain = bundles.load(copy)
    assert plain.config.registers is None
    assert "registers" not in json.loads((copy / bundles.MARKER).read_text())["model"]  # as before there were any
    config = dataclasses.replace(plain.config, registers=RegisterConfig(3, 1))
    bundles.save(dataclasses.replace(plain, model=Vla(config)), tmp_path / "with")
    again = bundles.load(tmp_path / "with")
    assert again.config == config and again.model.registers.shape == (3, 32)
    for change, message in (
        (lambda registers: registers.update(cuont=3), "Did you mean 'count'"),
        (lambda registers: registers.pop("layer"), "layer"),
        (lambda registers: registers.update(layer=9), "at most the depth, 2"),
        (lambda registers: registers.update(count=4), "registers"),  # not that many weights
    ):
        edited = shutil.copytree(tmp_path / "with", tmp_path / "edited", dirs_exist_ok=True)
        edit(edited, lambda content, change=change: change(content["model"]["registers"]))
        with pytest.raises(BundleError, match=message):
            bundles.load(edited)


def test_a_bundle_from_before_there_were_registers_loads_and_is_written_as_it_was(tmp_path) -> None:
    shipped = bundle_path("tabletop")
    bundle = bundles.load(shipped)
    assert bundle.config.registers is None
    assert bundles.save(bundle, tmp_path / "again") == bundle.fingerprint


def test_what_the_data_looks_like_travels_with_the_bundle_and_is_no_part_of_its_identity(copy, tmp_path) -> None:
    first = bundles.load(copy)
    assert first.data is not None and list(first.data.cameras) == ["agentview", "wrist"]  # as `vla train` made it
    without = dataclasses.replace(first, data=None)
    assert bundles.save(without, tmp_path / "without") == first.fingerprint
    assert bundles.load(tmp_path / "without").data is None and bundles.read_data(tmp_path / "without") is None
    weights = (tmp_path / "without" / bundles.WEIGHTS).read_bytes()
    bundles.describe_data(tmp_path / "without", first.data)
    again = bundles.load(tmp_path / "without")
    assert again.fingerprint == first.fingerprint and again.data.to_dict() == first.data.to_dict()
    assert (tmp_path / "without" / bundles.WEIGHTS).read_bytes() == weights


def test_changed_data_and_data_of_another_robot_are_refused(copy) -> None:
    content = bundles.load(copy).data
    with pytest.raises(BundleError, match="that it was trained on"):
        bundles.describe_data(copy, dataclasses.replace(content, state=dict(list(content.state.items())[1:])))
    edit(copy, lambda c: c["data"]["state"]["ee_x"].update(max=9.0))
    with pytest.raises(BundleError, match="sha256"):
        bundles.load(copy)


def test_the_shipped_policy_knows_what_its_data_looked_like() -> None:
    bundle = bundles.load(bundle_path("tabletop"))
    assert bundle.fingerprint.startswith("11fab65551a2")  # the one that its card and the docs measure
    assert list(bundle.data.cameras) == ["agentview", "wrist"] and bundle.data.state["gripper"].first_min > 0.07


def test_who_may_read_the_marker_may_read_the_weights(copy) -> None:
    bundles.save(bundles.load(copy), copy)
    assert (copy / bundles.WEIGHTS).stat().st_mode == (copy / bundles.MARKER).stat().st_mode
