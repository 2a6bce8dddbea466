"""`vla calibrate content`: an old bundle learns what its data looks like, and nothing else about it changes."""

import json
import shutil

from vla.checkpoints import bundle as bundles
from vla.cli import main


def test_a_bundle_from_before_gets_what_training_would_write(tiny_bundle, tiny_dataset, tmp_path, capsys) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle, old)
    manifest = json.loads((old / "bundle.json").read_text())
    del manifest["data"], manifest["hashes"]["data"]
    (old / "bundle.json").write_text(json.dumps(manifest))
    before = bundles.load(old)
    assert before.data is None
    weights = (old / "model.safetensors").read_bytes()

    assert main.main(["calibrate", "content", "--policy", str(old), "--data", str(tiny_dataset), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    after, trained = bundles.load(old), bundles.load(tiny_bundle)
    assert after.fingerprint == before.fingerprint and (old / "model.safetensors").read_bytes() == weights
    assert said["cameras"] == list(after.data.cameras) == list(trained.data.cameras)
    assert said["state"] == {name: [r.min, r.max] for name, r in after.data.state.items()}
    low, high = said["state"][next(iter(said["state"]))]
    assert low < high

    assert main.main(["calibrate", "content", "--policy", str(old), "--data", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
