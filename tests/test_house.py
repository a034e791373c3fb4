"""What imports what: the algorithm stands alone, arrows run one way, import train is light, five files work alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [
    p for p in ROOT.rglob("*.py") if not {".venv", ".venv-verl", "runs", "tests"} & set(p.relative_to(ROOT).parts)
]
ALGORITHM = ("attention", "heads", "metrics", "credit", "grpo")
LOOP = ("rollout", "train", "eval")


def list_imports(path: Path) -> list[str]:
    """The modules that a file imports anywhere but under `if __name__ == "__main__"`."""
    tree = ast.parse(path.read_text())
    as_program = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    skipped = {inner for node in as_program for inner in ast.walk(node)}
    names = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def imports_of(folder: str) -> set[tuple[str, str]]:
    """(file, the first part of what it imports) of the files of a folder."""
    files = [p for p in SOURCES if p.relative_to(ROOT).parts[0] == folder]
    assert files
    return {(p.name, name.split(".")[0]) for p in files for name in list_imports(p)}


def test_the_top_holds_the_algorithm_and_the_loop():
    assert {p.stem for p in ROOT.glob("*.py")} == {*ALGORITHM, *LOOP}


def test_the_algorithm_imports_torch_transformers_and_itself():
    ours = {p.stem for p in SOURCES} | {"node", "tasks", "lab", "examples"}
    for name in ALGORITHM:
        imported = {module.split(".")[0] for module in list_imports(ROOT / f"{name}.py")}
        assert imported & ours <= set(ALGORITHM), name
        assert imported - ours - set(sys.stdlib_module_names) <= {"torch", "transformers"}, name


def test_each_file_of_the_algorithm_knows_only_what_lies_before_it():
    may_know = {"attention": set(), "heads": set(), "credit": set(), "grpo": set(),
                "metrics": {"attention", "heads", "grpo"}}  # fmt: skip
    for name, known in may_know.items():
        assert set(list_imports(ROOT / f"{name}.py")) & set(ALGORITHM) <= known, name


def test_arrows_never_run_upwards():
    """node/ imports neither the loop's ends nor the laboratory; tasks/ imports nothing of ours but itself."""
    assert not {(file, name) for file, name in imports_of("node") if name in ("train", "eval", "lab", "examples")}
    ours = {*ALGORITHM, *LOOP, "node", "lab", "examples"}
    assert not {(file, name) for file, name in imports_of("tasks") if name in ours}


def test_the_laboratory_is_not_in_the_reference():
    outside = [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in ("lab", "examples")]
    reserved = ("lab", "examples", "scipy", "trl", "peft", "accelerate")
    assert not {(p.name, name) for p in outside for name in list_imports(p) if name.split(".")[0] in reserved}


def test_the_paper_in_one_file_needs_no_other_of_ours_but_the_task():
    ours = {p.stem for p in SOURCES} | {"node", "lab", "examples", "tests"}
    assert set(list_imports(ROOT / "examples" / "minimal.py")) & ours <= {"tasks"}


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


def test_five_files_in_an_empty_folder_work_with_torch_and_transformers_alone(tmp_path):
    for name in ALGORITHM:
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    (tmp_path / "own.py").write_text(COPIED)
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 40])" in done.stdout and not {"node", "tasks", "lab"} & set(done.stdout.split())
