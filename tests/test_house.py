"""What imports what: the algorithm stands alone, the reference loads nothing that it does not need, lab is a leaf."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "runs", "tests"} & set(p.relative_to(ROOT).parts)]


def imported(path):
    """(module, whether at the top of the file) of each import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node in tree.body


def test_the_laboratory_is_not_in_the_reference():
    outside = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in ("lab", "examples")]
    reserved = ("lab", "examples", "scipy", "trl", "peft", "accelerate")
    found = {(p.name, name, top) for p in outside for name, top in imported(p) if name.split(".")[0] in reserved}
    assert not found


def test_the_reference_is_seven_modules_that_can_be_read_in_an_afternoon():
    top = {p.stem: len(p.read_text().splitlines()) for p in ROOT.glob("*.py")}
    assert set(top) == {"heads", "metrics", "credit", "grpo", "rollout", "train", "eval"}
    assert sum(top.values()) <= 1700 and top["train"] <= 300
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_import_train_loads_nothing_it_does_not_need():
    code = "import sys, train; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"train", "node", "tasks", "credit"} <= set(loaded.split())
    assert not {"lab", "matplotlib", "datasets", "math_verify", "vllm"} & set(loaded.split())


COPIED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from credit import coupled_rhythm
from grpo import shape_advantages
from metrics import observe
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=6,
                                     num_attention_heads=4, max_position_embeddings=64))
input_ids, mask = torch.randint(0, 50, (2, 40)), torch.arange(40).expand(2, 40) >= 8
signals = observe(model, input_ids, mask)
gamma = coupled_rhythm(signals.waad, signals.fai, mask)
print(shape_advantages(torch.tensor([1.0, -1.0]), gamma).shape)
import sys
print(*sorted(name for name in sys.modules if "." not in name and getattr(sys.modules[name], "__file__", None)))
"""


def test_four_files_in_an_empty_folder_work_with_torch_and_transformers_alone(tmp_path):
    for name in ("heads", "metrics", "credit", "grpo"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
        ours = {n for n, _ in imported(ROOT / f"{name}.py")} & {p.stem for p in SOURCES}
        assert ours <= {"heads", "metrics", "credit", "grpo"}
    (tmp_path / "own.py").write_text(COPIED)
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 40])" in done.stdout and not {"node", "tasks", "lab"} & set(done.stdout.split())
