"""Model folders as people have them: what is wrong with one is said in one line, and what does no harm loads."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, T5Config

import eval as evaluation
import tasks
from grpo import token_logprobs
from node import checkpoint, prepare, ranks, settings
from rollout import Chat, TorchActor, tokenize
from tests.test_train import tiny_args

WEIGHT = "model.layers.3.mlp.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def copy_tiny(folder):
    return shutil.copytree(settings.TINY, folder / "model")


def set_fields(file, **fields):
    def change(folder):
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def change_weights(change):
    def apply(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def prefix(text):
    return change_weights(lambda weights: {text + name: x for name, x in weights.items()})


def add_marks(before=(), after=()):
    """The tokenizer puts these of its tokens around each text; <unk> is its start-of-text token."""

    def change(folder):
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        processor, ids = tokenizer["post_processor"], {"<eos>": 1, "<unk>": 2}
        marks = [[{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (before, after)]
        processor["single"] = [*marks[0], *processor["single"], *marks[1]]
        processor["special_tokens"] = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*before, *after)}
        path.write_text(json.dumps(tokenizer))
        set_fields("tokenizer_config", bos_token="<unk>")(folder)

    return change


def add_padding(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # number 30, where the model has rows 0 to 29
    tokenizer.save_pretrained(folder)


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["maths"])
    tokenizer.save_pretrained(folder)


def add_image_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # number 30
    tokenizer.save_pretrained(folder)


WRONG_WEIGHTS = {
    "a layer is missing": (
        change_weights(lambda weights: {name: x for name, x in weights.items() if ".layers.7." not in name}),
        "lack 11 of the model's weights, for example model.layers.7.input_layernorm.weight",
    ),
    "no output head": (set_fields("config", tie_word_embeddings=False), "for example lm_head.weight"),
    "torch.compile's prefix": (prefix("_orig_mod."), "hold _orig_mod.model.embed_tokens.weight, which is none of them"),
    "DDP's prefix": (prefix("module."), "hold module.model.embed_tokens.weight, which is none of them"),
    "NaN": (
        change_weights(lambda weights: weights | {WEIGHT: weights[WEIGHT] * torch.nan}),
        f"{WEIGHT} holds numbers that are not finite",
    ),
    "other shapes": (set_fields("config", intermediate_size=280), r"in the files, but \[.*280.*\] by config.json"),
    "no weights": (remove("*.safetensors"), "no file named|no .safetensors files"),
    "quantized": (set_fields("config", quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
}
WRONG_FILES = {
    "weights cut off": (cut("model.safetensors"), "model.safetensors is damaged"),
    "weights not fetched": (write("model.safetensors", LFS), "model.safetensors is a Git LFS pointer"),
    "tokenizer not fetched": (write("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "tokenizer cut off": (cut("tokenizer.json"), "tokenizer.json is damaged"),
    "generation config cut off": (cut("generation_config.json"), "generation_config.json is damaged"),
    "config not fetched": (write("config.json", LFS), "config.json' is not a valid JSON file"),
    "adapter beside the weights": (write("adapter_config.json", "{}"), r"holds an adapter \(adapter_config.json\)"),
    "adapter alone": (
        lambda folder: (remove("*")(folder), write("adapter_config.json", "{}")(folder)), "holds an adapter"
    ),
    "another kind of model": (
        lambda folder: T5Config().save_pretrained(folder), "no causal language model of the type 't5'"
    ),
    "field of another type": (set_fields("config", vocab_size="30"), "cannot load a model from .*vocab_size"),
    "end is text": (set_fields("generation_config", eos_token_id="1"), "generation_config.json: eos_token_id '1'"),
    "end is null": (set_fields("generation_config", eos_token_id=[1, None]), r"eos_token_id \[1, None\]"),
    "end is a list": (set_fields("generation_config", eos_token_id=[[1]]), r"eos_token_id \[\[1\]\]"),
    "generation config is a list": (write("generation_config.json", "[1]"), "generation_config.json: "),
    "end appended": (add_marks(after=["<eos>"]), "appends '<eos>' to each text"),
    "a token without a row": (add_token, "31 tokens and the model's embedding 30: .*'maths' has no row"),
    "start doubled": (add_marks(before=["<unk>", "<unk>"]), "a prompt starts with <unk> twice"),
}  # fmt: skip
HARMLESS = {
    "names without model.": change_weights(lambda weights: {k.removeprefix("model."): x for k, x in weights.items()}),
    "padding without a row": add_padding,
    "an image token without a row": add_image_token,
    "padding of config.json without a row": set_fields("config", pad_token_id=30),
    "no padding": lambda folder: (set_fields("tokenizer_config", pad_token=None)(folder),
                                  set_fields("config", pad_token_id=None)(folder)),
    "an end that no token has": set_fields("generation_config", eos_token_id=[1, -1, 99]),
    "a kernel that is not installed": set_fields("config", attn_implementation="flash_attention_2"),
    "tuples": set_fields("config", return_dict=False),
    "maps": set_fields("config", output_attentions=True, output_hidden_states=True),
    "one start": add_marks(before=["<unk>"]),
}  # fmt: skip


@pytest.fixture
def process_group():
    """Under one, weights are read in shares, as on a GPU."""
    is_mine = not dist.is_initialized()  # or vLLM has made one
    if is_mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if is_mine:
        dist.destroy_process_group()


def assert_one_line(message, load, folder):
    with pytest.raises(ValueError, match=message) as e:
        load(str(folder))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert str(folder) in str(e.value)


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_one_line(case, tmp_path):
    change, message = WRONG_FILES[case]
    folder = copy_tiny(tmp_path)
    change(folder)
    assert_one_line(message, settings.load_tokenizer, folder)


def test_a_prompt_with_a_token_without_a_row_is_one_line(tmp_path, monkeypatch):
    folder = str(copy_tiny(tmp_path))
    add_image_token(folder)
    tokenizer = settings.load_tokenizer(folder)
    settings.check_rows(tokenizer, [tokenizer("1 2").input_ids, []])
    with pytest.raises(ValueError, match=r"'<image>', for which .* has no row .*: '1<image>2'"):
        settings.check_rows(tokenizer, [tokenizer("1 2").input_ids, tokenizer("1<image>2").input_ids])
    # train.py and eval.py look at their problems.
    problems = {split: [tasks.Problem(f"{split == 'test':d}<image>2")] * 9 for split in ("train", "test")}
    monkeypatch.setattr(tasks, "load", lambda name, split, *more, **how: problems[split])
    with pytest.raises(ValueError, match="has no row"):
        prepare.load_problems(tiny_args(model=folder, prompts=2), tokenizer)
    args, _ = settings.fill_defaults(evaluation.Args(model=[folder]), evaluation.DEFAULTS, folder)
    with pytest.raises(ValueError, match="has no row"):
        evaluation.plan(args)


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_wrong_weights_are_one_line_for_both_loaders(case, tmp_path, request):
    change, message = WRONG_WEIGHTS[case]
    folder = copy_tiny(tmp_path)
    change(folder)
    assert_one_line(message, settings.load_model, folder)
    request.getfixturevalue("process_group")
    assert_one_line(message, lambda name: checkpoint.load_sharded(name, torch.device("cpu")), folder)


def test_ends_are_kept_by_a_model_that_is_read_in_shares(tmp_path, process_group):
    folder = copy_tiny(tmp_path)
    set_fields("generation_config", eos_token_id=[1, 5])(folder)
    model = checkpoint.load_sharded(str(folder), torch.device("cpu"))
    assert model.generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_loads_samples_and_saves(case, tmp_path):
    folder = copy_tiny(tmp_path)
    HARMLESS[case](folder)
    model, tokenizer = settings.load_model(str(folder))
    groups = TorchActor(model, tokenizer).generate(["3 7 5>38\n<think>", "1"], max_tokens=9, temperature=0)
    if case != "one start":  # which the tiny model does not know
        assert groups[0][0].text == "7*3=21,21"
    model.config.save_pretrained(tmp_path / "saved")


def test_weights_that_the_model_does_not_have_are_said(tmp_path, capsys, request):
    folder = copy_tiny(tmp_path)
    change_weights(lambda weights: weights | {"value_head.weight": torch.zeros(2)})(folder)
    settings.load_model(str(folder))
    request.getfixturevalue("process_group")
    checkpoint.load_sharded(str(folder), torch.device("cpu"))
    assert capsys.readouterr().out.count("the files also hold value_head.weight") == 2


def test_a_start_that_the_chat_template_or_the_prompt_doubles_is_refused(tmp_path):
    folder = copy_tiny(tmp_path)
    add_marks(before=["<unk>"])(folder)
    tokenizer = settings.load_tokenizer(str(folder))
    assert tokenize(tokenizer, ["1"])[0][0] == 2
    with pytest.raises(ValueError, match=r"a prompt starts with <unk> twice.*'<unk><unk>1'"):
        tokenize(tokenizer, ["<unk>1"])
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"a prompt starts with <unk> twice"):
        tokenize(tokenizer, ["1"], Chat())


def test_ends_are_those_of_tokenizer_config_and_generation_config(tmp_path):
    folder = copy_tiny(tmp_path)
    set_fields("config", eos_token_id=[5, 9])(folder)
    set_fields("generation_config", eos_token_id=0)(folder)
    model, tokenizer = settings.load_model(str(folder))
    assert settings.end_tokens(tokenizer, model.config, model.generation_config) == [0, 1, 5, 9]
    (folder / "generation_config.json").unlink()
    assert settings.load_generation_config(str(folder)) is None


def test_dropout_is_off_with_gradient_checkpointing_too(tmp_path, monkeypatch):
    """OPT's layers drop out in training mode, which gradient checkpointing needs."""
    monkeypatch.setattr(prepare, "load_problems", lambda args, tokenizer: ([], []))
    folder = copy_tiny(tmp_path)
    config = OPTConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=4, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=None, dropout=0.5,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    device = ranks.start()
    ids = torch.arange(3, 30, device=device)[None]
    scored = []
    for flag in (False, True):
        args = tiny_args(max_model_len=256, gradient_checkpointing=flag)
        model = prepare.load(args, folder, device)[0]
        logprobs, _ = token_logprobs(model, ids, ids > 3)
        logprobs.sum().backward()
        scored.append((logprobs.detach(), model.get_input_embeddings().weight.grad))
    assert any(module.training for module in model.modules())
    torch.testing.assert_close(scored[0], scored[1], rtol=0, atol=1e-6)


def test_a_misspelt_folder_is_named(tmp_path):
    (tmp_path / "checkpoint-40").mkdir()
    with pytest.raises(ValueError, match=r"no such folder: .*Did you mean .*checkpoint-40\?") as e:
        settings.load_config(f"{tmp_path}/chekpoint-40")
    assert "\n" not in str(e.value)
