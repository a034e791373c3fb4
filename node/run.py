"""One training run: its folder, its log, the order of its problems; when it saves, evaluates, stops and resumes.

What a run does when it is asked to stop, by Ctrl-C or SIGTERM:

    while it starts      It ends at once (node/folder.py).
    in a step            It finishes the step, saves it, and ends. Asked again, it ends at once: then the step before is
                         saved, unless it is already, if its weights are still there.
    in an evaluation     It ends at once. The step before is saved, unless it is already.
    while it saves       It ends afterwards.

Several ranks must save together, and one that leaves alone would let the others wait. So they finish an evaluation as
well, and if they are asked again, they end without saving.
"""

import hashlib
import importlib
import json
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from heads import Heads
from node import checkpoint, ranks
from node.output import mean_interval, minutes, read_lines, write_whole
from node.samples import spell_sample

# The largest mean |logp_vllm - logp_torch| that rounding can explain. Above it, the sampler has other weights.
# In bfloat16 the size of rounding errors depends on the model. So after the first GAP_STEPS steps since the start, or
# since --resume, the limit is GAP_FACTOR times their mean, but at least LEAST_LIMIT, because these steps may have had
# few tokens.
# On a GPU vLLM multiplies float32 numbers in TF32, which has ten bits.
GAP_LIMIT = {"float32": 1e-3, "TF32": 1e-2, "bfloat16": 0.3}
GAP_STEPS, GAP_FACTOR, LEAST_LIMIT = 3, 5, 0.02
DYNAMIC_BATCHES = 4  # batches that --dynamic may draw for one step
SKIP_LIMIT = 3  # steps in a row with a gradient that is not finite
EQUAL_STEPS, SAY_AGAIN = 5, 20  # steps in a row without any unequal group, before the run says so; and says so again
REPORTS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # --report, and the module that it needs
LOCK = "lock"  # the file that says which process works in a run's folder
STEP, EVALUATION, SAVING, ENDING = "step", "evaluation", "saving", "ending"  # what a run is doing
SAME_SIGNAL = 1.0  # seconds; a scheduler and torchrun may both pass on one request to stop
SHOWN = {"reward": ".2f", "gap_mean": ".0e", "entropy": ".2f", "tokens_per_s": ".0f"}  # beside the progress bar


class Clock:
    """Seconds by phase: with clock("generate"): ..."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Run:
    """The state of a run, and what it leaves in its folder. state: a checkpoint's, None for a new run.

    problems: which training and held-out problems it has (prepare.identify_problems), kept in its checkpoints.
    """

    def __init__(
        self, args, folder: Path, model, tokenizer, optimizer, state: dict | None = None, problems: dict | None = None
    ):
        self.args, self.model, self.tokenizer, self.optimizer = args, model, tokenizer, optimizer
        self.folder, self.problems = folder, problems
        if state and state["step"] > args.steps:
            raise ValueError(f"--steps {args.steps}: {args.resume} has already done {state['step']} steps")
        self.began, self.stopping, self._asked_at = time.perf_counter(), False, None
        if ranks.rank() == 0:
            write_args(args, self.folder)  # a resumed run may have been given more steps
        state = state or {"step": 0, "data_position": 0, "baseline_success": None, "skips": 0, "heads": None}
        self.step, self.data_position, self.skips = state["step"], state["data_position"], state["skips"]
        self.started_at = self.saved_step = self.step
        self.evaluated_step = None
        if ranks.rank() == 0:
            saves_left = math.ceil(args.steps / args.save_every) - self.step // args.save_every
            checkpoint.try_saving(self.folder, model, tokenizer, args.keep, saves_left)
        self.doing, self.weights_changed = EVALUATION, False
        optimizer.register_step_pre_hook(self._note_change)
        self.baseline_success = state["baseline_success"]  # held-out success of each problem before training
        device = next(model.parameters()).device
        self.heads = state["heads"] and Heads(state["heads"][0], *(x.to(device) for x in state["heads"][1:]))
        resumed_at = self.step if args.resume else None
        self.log = Log(self.folder, resumed_at, args)
        self.samples = JsonLines(self.folder / "samples.jsonl", resumed_at)
        self.evaluations = JsonLines(self.folder / "evaluations.jsonl", resumed_at)
        self.said_equal_at = -math.inf  # the step at which the run last said that it learns nothing
        self.evaluation_is_due = self._evaluates_here() or self.log.must_evaluate_again

    @property
    def is_done(self) -> bool:
        """Whether all steps are made, or somebody has asked to stop."""
        return self.stopping or self.step >= self.args.steps

    def begin_step(self, problems: list) -> tuple[list, torch.Generator]:
        """Seed the sampling of the next step. Returns its problems, chosen from all, and its random generator.

        The seeds depend on --seed and the step only. So evaluations do not change what is sampled in training, and a
        run that is resumed samples as if it had not been stopped.
        """
        self.doing = STEP
        set_seed(self._seed("step"))
        return self.next_problems(problems), self.generator()

    def begin_evaluation(self) -> None:
        """Seed the sampling of an evaluation."""
        set_seed(self._seed("evaluation"))

    def _seed(self, what: str) -> int:
        return random.Random(f"{self.args.seed}, {what} {self.step}, rank {ranks.rank()}").getrandbits(32)

    def generator(self) -> torch.Generator:
        """The random generator of the next step. It depends on --seed and the step only, as a resumed run needs."""
        return torch.Generator().manual_seed(random.Random(f"{self.args.seed}, step {self.step}").getrandbits(32))

    def next_problems(self, problems: list) -> list:
        """The problems of the next step; with --dynamic, several batches to draw from."""
        batches = DYNAMIC_BATCHES if self.args.dynamic else 1
        return take_problems(problems, self.data_position, batches * self.args.prompts, self.args.seed)

    def finish_step(self, record: dict) -> None:
        """Log a step, save when due, and stop a run that cannot go on."""
        # Count and log it.
        self.doing, self.weights_changed = SAVING, False
        self.step += 1
        self.data_position += record["problems"]
        sample = record.pop("sample")
        self.log({"step": self.step, **record})
        if ranks.rank() == 0:
            self.samples.append({"step": self.step, **spell_sample(sample, self.tokenizer)})
        self.bar.set_postfix({name: format(record[name], spec) for name, spec in SHOWN.items()})
        self.bar.update()
        # What goes on, but should be known.
        unequal_groups = record["unequal_groups"]
        if self.args.dynamic and unequal_groups < self.args.prompts:
            self.say(
                f"step {self.step}: --dynamic found {unequal_groups} groups of unequal reward among "
                f"{record['problems']}, not {self.args.prompts}"
            )
        warning = describe_equal_groups([r for r in self.log.records if "reward" in r])
        is_news = self.step - self.said_equal_at >= SAY_AGAIN
        if warning and ((is_news and self.step >= EQUAL_STEPS) or self.step == self.args.steps):
            self.said_equal_at = self.step
            self.say(f"step {self.step}: {warning} To read the responses: python -m node.look {self.folder}")
        # What ends the run: a fault, or somebody who has asked for it. It is saved first.
        self.skips = self.skips + 1 if record["skipped"] else 0
        self._stop_if_broken(record)
        if self.step == self.args.steps or self.step % self.args.save_every == 0:
            self.save()
        self._stop_if_asked()
        # What comes next. A run that was asked to stop is evaluated only if this was its last step.
        self.doing = EVALUATION
        self.evaluation_is_due = self._evaluates_here() and (not self.stopping or self.step == self.args.steps)

    def _stop_if_asked(self) -> None:
        """End the run here, saved, if any rank was asked to."""
        self.stopping = ranks.any_rank(self._asked_at is not None)
        if self.stopping and self.saved_step != self.step:
            self.save()

    def _evaluates_here(self) -> bool:
        every = self.args.eval_every
        return self.step in (0, self.args.steps) or (every > 0 and self.step % every == 0)

    def gap_limit(self) -> float:
        """The gap_mean above which the run stops, at this step."""
        steps = [r for r in self.log.records if "gap_mean" in r and r["step"] > self.started_at]
        first = [r["gap_mean"] for r in steps[:GAP_STEPS]]
        if self.args.dtype == "float32" or len(steps) <= GAP_STEPS:
            return gap_limit_at_start(self.args.dtype)
        return max(GAP_FACTOR * sum(first) / len(first), LEAST_LIMIT)

    def _stop_if_broken(self, record: dict) -> None:
        # The reward. If it raises now and then, the run goes on.
        if record["reward_errors"]:
            text = f"{record['reward_errors']} rewards raised and count as 0. The first: {record['first_reward_error']}"
            if record["reward_errors"] == record["problems"] * self.args.group:
                self.save()
                ranks.exit_with_error(f"step {self.step}: all {text}. The run is saved in {self.folder}")
            self.say(f"step {self.step}: {text}")
        # The sampler: its weights, and its log-probabilities.
        gap = record["gap_mean"]
        if record["stale_weight"]:
            self.save()
            ranks.exit_with_error(
                f"step {self.step}: after the reload the sampler does not hold {record['stale_weight']} as the trainer "
                f"does, so it would sample from another model. The trainer's weights are saved in {self.folder}"
            )
        if not gap <= self.gap_limit():  # not a number counts as too much
            if gap > 0:
                self.save()
            ranks.exit_with_error(
                f"step {self.step}: the sampler's log-probabilities differ from the trainer's by {gap:.4f} on average, "
                f"more than rounding can explain (limit {self.gap_limit():.4f}). Its weights were not reloaded (or, if "
                f"the difference is not a number, the update diverged: lower --lr). See {self.log.path}. In bfloat16 "
                "--resume measures the limit anew"
            )
        # The update.
        if self.skips == SKIP_LIMIT:
            ranks.exit_with_error(
                f"step {self.step}: gradients were not finite in {self.skips} steps in a row. These updates were "
                f"skipped. Lower --lr, or resume from the last checkpoint. See {self.log.path}"
            )

    def log_evaluation(self, success: Tensor, problems: list) -> None:
        """Log held-out success and draw the curve. success [P]: mean reward of each of the P problems."""
        self.evaluation_is_due = False
        mean, half = mean_interval(success)
        self.log({"step": self.step, "success": mean, "half_width_95": half})
        per_problem = [round(x, 4) for x in success.tolist()]
        self.evaluations.append({"step": self.step, "problems": fingerprint(problems), "success": per_problem})
        if ranks.rank() == 0:
            plot(self.folder, self.log.records)
        if self.baseline_success is None:
            self.baseline_success = success
            self.say(f"held-out success before: {100 * mean:.1f} %")
        self.final_success, self.evaluated_step = success, self.step
        self._stop_if_asked()

    def save(self) -> None:
        """Write a checkpoint. If it cannot be written, the run ends."""
        self.doing = SAVING
        state = {
            "step": self.step,
            "data_position": self.data_position,
            "baseline_success": self.baseline_success,
            "skips": self.skips,
            "heads": self.heads and tuple(self.heads),
            "problems": self.problems,
        }
        with ranks.errors_in_one_line():
            checkpoint.save(self.folder, state, self.model, self.tokenizer, self.optimizer, self.args.keep, self.args)
        self.saved_step = self.step

    @contextmanager
    def stopping_softly(self) -> Iterator[None]:
        """Within the context, SIGTERM and Ctrl-C end the run as the first lines of this file say."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(initial=self.step, total=self.args.steps, desc=self.args.credit, disable=ranks.rank() > 0)
        try:
            yield
        except KeyboardInterrupt:
            self._end_at_once()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        """Note a request to stop, and say what follows; or end what the run is doing, by KeyboardInterrupt."""
        now, alone = time.monotonic(), ranks.world_size() == 1
        is_second = self._asked_at is not None and now - self._asked_at > SAME_SIGNAL
        can_end = is_second or (self.doing == EVALUATION and alone)
        if self.doing in (STEP, EVALUATION) and can_end:
            self.doing, self._asked_at = ENDING, now  # further signals change nothing
            raise KeyboardInterrupt
        if self._asked_at is None:
            self._asked_at = now
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            plan = {
                STEP: f"finishing step {self.step + 1}, then saving. A second {name} stops now",
                EVALUATION: f"finishing the evaluation. A second {name} stops now",
                SAVING: f"saving step {self.step}, then stopping",
            }
            if ranks.rank() == 0:
                with suppress(OSError):  # the terminal may be gone. print() may not be called within another print()
                    os.write(2, f"\n{name}: {plan[self.doing]}\n".encode())

    def _end_at_once(self) -> None:
        """After a KeyboardInterrupt: save the last finished step, unless it is saved. If it cannot be, exit."""
        self.stopping = True
        unsaved, alone = self.saved_step != self.step, ranks.world_size() == 1
        if alone and unsaved and not self.weights_changed:
            self.optimizer.zero_grad()
            ranks.reshard(self.model)
            if ranks.has_own_weights(self.model):
                self.say(f"saving step {self.step}")
                self.save()
                unsaved = False
        if unsaved or not alone:
            first_lost = self.saved_step + 1
            lost = f"steps {first_lost} to {self.step}" if first_lost < self.step else f"step {self.step}"
            what = f"{lost} could not be saved" if unsaved else "every finished step is saved"
            self.say(f"stopped at once, as asked; {what}. To resume: {resume_command(self.folder)}")
            sys.exit(ranks.INTERRUPTED)

    def _note_change(self, optimizer, args, kwargs) -> None:
        self.weights_changed = True

    def say(self, text: str) -> None:
        """Print it once, above the progress bar."""
        if ranks.rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def summary(self) -> str:
        """The last lines: what came out and where it is, or how to resume."""
        # The last step is always evaluated, so a run without this evaluation was stopped.
        if self.evaluated_step != self.args.steps:
            where = f"after step {self.step}" if self.step else "before the first step"
            return f"stopped {where}, as asked. To resume: {resume_command(self.folder)}"
        phases = [r["seconds"] for r in self.log.records if "seconds" in r]
        spent = {name: sum(p[name] for p in phases) for name in phases[0]}
        gain, half = mean_interval(self.final_success - self.baseline_success)
        return (
            "time: " + ", ".join(f"{name} {100 * s / sum(spent.values()):.1f} %" for name, s in spent.items()) + "\n"
            f"held-out success {100 * self.baseline_success.mean():.1f} % -> {100 * self.final_success.mean():.1f} %, "
            f"{100 * gain:+.1f} points (95 % interval {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}), "
            f"{minutes(time.perf_counter() - self.began)}: {self.folder}"
        )


def resume_command(folder: Path) -> str:
    """The command that continues the run in this folder, with the script that was called and as many ranks."""
    world = ranks.world_size()
    command = "python" if world == 1 else f"torchrun --nproc-per-node {world} --shutdown-timeout 900"
    return f"{command} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"


def gap_limit_at_start(dtype: str) -> float:
    """The mean difference of log-probabilities above which a run stops in its first steps. dtype: --dtype, not auto."""
    return GAP_LIMIT["TF32" if dtype == "float32" and torch.cuda.is_available() else dtype]


def new_folder(out: str | None, name: str) -> Path:
    """Make a new run's folder: `out`, which must be empty, or the first free one of runs/NAME-1, runs/NAME-2, …"""
    try:
        if out is None:
            Path("runs").mkdir(exist_ok=True)
            return next(f for i in count(1) if try_mkdir(f := Path(f"runs/{name}-{i}")))
        folder = Path(out)
        if folder.is_dir() and any(file.name != LOCK for file in folder.iterdir()):
            raise ValueError(f"--out {out} already holds a run: give another folder, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as e:
        raise ValueError(f"--out {out or 'runs/'}: cannot write there ({e.strerror})") from e


def try_mkdir(folder: Path) -> bool:
    """Make the folder. Returns False if it exists already, for example because another run has just made it."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def write_args(args, folder: Path) -> None:
    """Write args.json, from which a run is resumed."""
    write_whole(folder / "args.json", json.dumps(asdict(args), indent=1))


def refuse_other_args(args, *allowed: str) -> None:
    """ValueError for arguments given beside --resume, except those allowed: the run has its own."""
    given = {name for name, value in asdict(args).items() if value != getattr(type(args)(), name)}
    if wrong := ", ".join(f"--{name}" for name in sorted(given - {"resume", *allowed})):
        raise ValueError(f"--resume {args.resume}: a resumed run takes its arguments from there. Remove {wrong}")


def read_args(args):
    """The arguments of the run in args.resume. Only --steps may differ."""
    old_default = {
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32"
    }  # args.json of older runs has no dtype
    try:
        saved = type(args)(**old_default | json.loads((Path(args.resume) / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"--resume {args.resume}: no run is there, or its args.json cannot be read ({e})") from e
    refuse_other_args(args, "steps", "dry_run")
    steps = saved.steps if args.steps is None else args.steps
    return replace(saved, resume=args.resume, steps=steps, dry_run=args.dry_run)


class JsonLines:
    """A file of a run with a JSON object in each line, each with its step. Rank 0 reads and writes it."""

    def __init__(self, path: Path, resumed_at: int | None = None):
        """resumed_at: the step of the checkpoint to resume from. What was written after the checkpoint is dropped.

        An evaluation ("success") at that step was made after the checkpoint was written, so it is dropped too.
        """
        self.path, self.dropped_evaluation = path, False
        if ranks.rank() > 0:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if resumed_at is not None and path.exists() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                break
            is_of_checkpoint = record["step"] == resumed_at
            if record["step"] < resumed_at or (is_of_checkpoint and "success" not in record):
                kept.append(line + "\n")
            if is_of_checkpoint and "success" in record:
                self.dropped_evaluation = True
        write_whole(path, "".join(kept))

    def append(self, record: dict) -> None:
        """Write a line."""
        if ranks.rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record, separators=(",", ":")) + "\n")


class Log(JsonLines):
    """metrics.jsonl, whose records are also in memory, on all ranks; --report gets them too."""

    def __init__(self, folder: Path, resumed_at: int | None, args):
        super().__init__(folder / "metrics.jsonl", resumed_at)
        records = read_lines(self.path) if ranks.rank() == 0 else []
        # Only rank 0 reads the file. All ranks must agree on what to evaluate.
        self.records, self.must_evaluate_again = ranks.from_rank_0((records, self.dropped_evaluation))
        self.args, self.folder, self.report = args, folder, None

    def __call__(self, record: dict) -> None:
        self.records.append(record)
        self.append(record)
        if ranks.rank() == 0 and self.report is None:  # now, so that a run that never starts sends nothing
            self.report = open_report(self.args, self.folder)
        if self.report:
            self.report(flatten_numbers(record), record["step"])


def import_report(name: str):
    """The module that --report NAME needs, None for "none". ValueError if it is not installed."""
    if name == "none":
        return None
    try:
        return importlib.import_module(REPORTS[name])
    except ImportError as e:
        raise ValueError(f"--report {name}: the package {name} is not installed. Run: pip install {name}") from e


def open_report(args, folder: Path) -> Callable[[dict[str, float], int], None] | None:
    """--report: a function that sends the numbers of a step to TensorBoard or to Weights & Biases."""
    module = import_report(args.report)
    if args.report == "wandb":
        # A resumed run is a new run there, in the same group.
        run = module.init(project=args.task, name=folder.name, group=str(folder), dir=folder, config=asdict(args))
        return lambda numbers, step: run.log(numbers, step=step)
    if args.report == "tensorboard":
        writer = module.SummaryWriter(folder)

        def send(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return send
    return None


def flatten_numbers(record: dict) -> dict[str, float]:
    """The numbers of a record by name, without its step; those of a dict inside it as NAME/KEY.

    >>> flatten_numbers({"step": 3, "reward": 0.5, "stale_weight": None, "seconds": {"score": 2.0}})
    {'reward': 0.5, 'seconds/score': 2.0}
    """
    numbers = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
    return numbers


def describe_equal_groups(steps: list[dict]) -> str | None:
    """What to say when no group of the last steps, EQUAL_STEPS at most, had unequal rewards; else None.

    steps: the records of all steps so far.
    """
    last = steps[-EQUAL_STEPS:]
    if not last or any(r["equal_groups"] < r["problems"] for r in last):
        return None
    if any("zero_reward" not in r for r in last):  # they are from an older version, before a resume
        return None

    responses = sum(r["responses"] for r in last)
    share = {name: sum(r[name] for r in last) / responses for name in ("empty", "truncated", "zero_reward")}
    if share["zero_reward"] < 0.5:
        advice = "The problems are too easy: choose a harder --task."
    elif share["truncated"] > 0.5:
        advice = "Most responses are cut off before their answer: raise --max_tokens."
    else:
        advice = (
            "Read some responses: do they answer in the form that the verifier expects? If so, the problems are too "
            "hard: choose an easier --task, a stronger --model or a larger --group."
        )
    return (
        f"nothing was learned in the last {len(last)} steps, because the rewards inside each group were equal. Of "
        f"their responses, {share['empty']:.0%} were empty, {share['truncated']:.0%} were cut off at --max_tokens, and "
        f"{share['zero_reward']:.0%} had reward 0 (no answer, or a wrong one). {advice}"
    )


def fingerprint(problems: list) -> str:
    """A short name for these problems and their answers, in this order. Runs with the same one can be compared problem
    by problem.

    Of an answer that is no text, number, list or dict of these, only the type counts: its text may hold an address.
    """
    content = [(str(p.prompt), getattr(p, "answer", None)) for p in problems]
    text = json.dumps(content, default=lambda other: type(other).__name__, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plot(folder: Path, log: list[dict]) -> None:
    """learning_curve.png: training reward of each step, held-out success with its interval, and the response length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r for r in log if "reward" in r]
    evals = [r for r in log if "success" in r]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot([r["step"] for r in steps], [100 * r["reward"] for r in steps], lw=1, alpha=0.6, label="training batch")
    left.errorbar(
        [r["step"] for r in evals], [100 * r["success"] for r in evals], [100 * r["half_width_95"] for r in evals],
        fmt="o-", capsize=3, label="held out (95 %)",
    )  # fmt: skip
    left.set(xlabel="step", ylabel="success, %", title="Success of sampled responses")
    left.legend()
    right.plot([r["step"] for r in steps], [r["length"] for r in steps], color="tab:green")
    right.set(xlabel="step", ylabel="tokens", title="Length of responses")
    fig.tight_layout()
    fig.savefig(folder / "learning_curve.png", dpi=120)
    plt.close(fig)


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A random order of the problems for one epoch."""
    return random.Random(f"{seed}/{epoch}").sample(range(size), size)


def take_problems(problems: list, position: int, number: int, seed: int) -> list:
    """`number` problems from a position on, in endless epochs. Each epoch has its own random order."""
    places = (divmod(i, len(problems)) for i in range(position, position + number))
    return [problems[epoch_order(len(problems), seed, epoch)[i]] for epoch, i in places]
