"""Problems and rewards: the built-in tasks, tasks in files of yours, and the judging of responses.

| file | what |
|---|---|
| problem.py | what a problem and a task are |
| countdown.py | makes its problems, and judges them |
| benchmarks.py | fetches public datasets of mathematics and question answering, which verify.py judges |
| boxes.py | where the answer stands in a response |
| spelling.py | how it is written: one spelling for what means the same |
| lists.py | the elements of lists, tuples and intervals |
| answers.py | whether it is right: rules, and questions to math-verify |
| verify.py, worker.py | run math-verify in processes of its own |
| audit.py | prints which answers of a dataset the judge cannot read |

This folder imports nothing else of ours.
"""

import importlib.util
import multiprocessing
import os
import random
import sys
import threading
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.countdown import VARIANTS, Countdown
from tasks.problem import Problem, Task

TASKS: dict[str, Task] = {**VARIANTS, **BENCHMARKS}
COLUMNS = "a JSON, JSONL or parquet file with columns question and answer for gsm8k, prompt and solution for math"
HELP = f"one of {', '.join(TASKS)}; or a Python file with two functions, load and reward (examples/my_task.py)"


@lru_cache
def get(name: str) -> Task:
    """The task of this name, or the one in this Python file. ValueError, in one line, for anything else."""
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".py"):
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}, or give a Python file, my_task.py")
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"--task {name}: no such file")
    sys.path.append(str(path.parent))  # it may import what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses and pickle look for the file's own classes
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever the user's file raises
        raise ValueError(f"--task {name} cannot be imported: {_where(e, path)}") from e
    for function in ("load(split, data=None)", "reward(problem, text)"):
        if not callable(getattr(module, function.partition("(")[0], None)):
            raise ValueError(f"--task {name} has no function {function}: see examples/my_task.py")
    return module


def load(name: str, split: str = "test", n: int | None = None, seed: int = 0, data: str | None = None) -> list[Problem]:
    """n problems of a task, the same for the same arguments. data: a local file to read, for tasks that read one.

    Those of a dataset or of a file come in its order if n is None, all of them; otherwise seed draws n of them.
    Countdown's are made from seed; None means the task's own number of them.
    Raises ValueError, in one line, for an unknown task or split, naming the choices; for fewer than n problems; and for
    a dataset or file that cannot be read.
    """
    task, rng = get(name), random.Random(f"{name}/{split}/{seed}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose train or test")
    if n is not None and n < 0:
        raise ValueError(f"{n} problems of task {name!r}: ask for none or more")
    if isinstance(task, Countdown):
        return task.load(split, data, n, rng)
    if name in TASKS and data is None and split not in task.splits:  # a local file is the split that is asked for
        others = [t for t, other in TASKS.items() if isinstance(other, Countdown) or split in other.splits]
        way_out = "; train.py takes one of them as --eval_task, or a file as --eval_data" if split == "test" else ""
        raise ValueError(f"task {name!r} has no {split} split; these have one: {', '.join(others)}{way_out}")
    found = task.load(split, data) if name in TASKS else _load_from_file(name, task, split, data)
    if n is not None and n > len(found):
        raise ValueError(f"task {name!r} has no {n} distinct {split} problems, only {len(found)}")
    return found if n is None else rng.sample(found, n)


def _load_from_file(name: str, task: Task, split: str, data: str | None) -> list[Problem]:
    """The problems of a task in a file of the user's, where anything can be wrong."""
    call = f"--task {name}: load({split!r}, {data!r})"
    try:
        found = list(task.load(split, data))
    except Exception as e:  # whatever the user's file raises
        raise ValueError(f"{call} raised {_where(e, Path(name).resolve())}") from e
    for i, problem in enumerate(found):
        if not isinstance(getattr(problem, "prompt", None), str):
            raise ValueError(f"{call}: item {i} is {problem!r:.80}, not a Problem(prompt, answer) with a text prompt")
    if not found:
        raise ValueError(f"{call} returned no problems")
    return found


def samples(name: str) -> int:
    """How many samples of each problem the task's evaluation takes: 16 makes avg@16.

    >>> samples("aime24"), samples("math500"), samples("countdown")
    (16, 1, 4)
    """
    return getattr(get(name), "samples", 1)


def stops(name: str, given: list[str] | None, chat: bool) -> list[str]:
    """The texts that end a response: --stop, or else the task's own, which belong to its prompts without --chat."""
    if given is not None:
        return given
    return [] if chat else list(getattr(get(name), "stop", ()))


class Judged(NamedTuple):
    """How responses were judged."""

    rewards: list[list[float]]  # [P][n]
    errors: list[str]  # a line for each reward that raised; it counts as 0
    no_verdict: int = 0  # responses on which the built-in judge failed (out of time, killed); they count as 0


def judge(name: str, problems: list[Problem], texts: list[list[str]], processes: int = 1) -> Judged:
    """The rewards of several responses to each problem.

    A reward that raises, or is not from 0 to 1, counts as 0. processes: how many judge at the same time, each
    with the task loaded anew. The datasets have judging processes of their own, one for each core, and need none.

    >>> judge("countdown", [Problem("", ((3, 7, 5), 38))], [["<answer>5*7+3</answer>", "38"]])
    Judged(rewards=[[1.0, 0.0]], errors=[], no_verdict=0)
    """
    pairs = [(problem, text) for problem, responses in zip(problems, texts) for text in responses]
    if isinstance(task := get(name), Benchmark):
        verdicts = task.judge(pairs)
        judged = [(float(verdict or 0), None) for verdict in verdicts]
    else:
        verdicts = []
        if processes == 1:
            judged = [_judge_one(name, *pair) for pair in pairs]
        else:
            try:
                judged = _judge_in_processes(name, pairs, processes)
            except KeyboardInterrupt:  # the program ends: it should not wait for rewards that nobody needs
                for number in {1, processes}:
                    _kill(_pool(number))
                _pool.cache_clear()
                raise
    rewards, errors = iter([reward for reward, _ in judged]), [error for _, error in judged if error]
    return Judged([[next(rewards) for _ in responses] for responses in texts], errors, verdicts.count(None))


def _judge_in_processes(name: str, pairs: list[tuple[Problem, str]], processes: int) -> list[tuple[float, str | None]]:
    """_judge_one of each pair, by several processes.

    A process that dies of a response takes the jobs of all others with it. So pairs without a result are judged once
    more, one after the other. A response that its process dies of again counts as 0.
    """
    jobs: list[Future] = []
    with suppress(BrokenProcessPool):  # a process may die before the last job is handed over
        for pair in pairs:
            jobs.append(_pool(processes).submit(_judge_one, name, *pair))
    judged = [_result_of(job) for job in jobs]
    judged += [None] * (len(pairs) - len(jobs))
    if None in judged:
        _pool.cache_clear()  # a pool that has lost a process takes no more jobs
    for i, pair in enumerate(pairs):
        if judged[i] is None:
            judged[i] = _result_of(_pool(1).submit(_judge_one, name, *pair))
        if judged[i] is None:
            _pool.cache_clear()
            judged[i] = 0.0, f"a judging process died of the response {pair[1][:60]!r}"
    return judged


def _result_of(job: Future) -> tuple[float, str | None] | None:
    """What _judge_one returned in a process; None if the process died."""
    try:
        return job.result()
    except BrokenProcessPool:
        return None
    except Exception as e:  # a problem, or what the reward returned, cannot be sent between processes
        return 0.0, f"a judging process failed: {_where(e, Path())}"


def _judge_one(name: str, problem: Problem, text: str) -> tuple[float, str | None]:
    task = get(name)
    try:
        reward = float(task.reward(problem, text))
    except (Exception, SystemExit) as e:  # whatever the user's file raises: it is counted, and the first is printed
        where = _where(e, Path(name).resolve())
        return 0.0, f"reward raised {where}, for the response {text[:60]!r} to the prompt {problem.prompt[-60:]!r}"
    if not 0 <= reward <= 1:  # NaN is not, either
        return 0.0, (
            f"reward returned {reward}, which is not from 0 to 1, for the response {text[:60]!r} to the prompt "
            f"{problem.prompt[-60:]!r}"
        )
    return reward, None


@lru_cache
def _pool(processes: int) -> ProcessPoolExecutor:
    """Processes that judge. They are new ones (spawn), because a fork would copy the GPU's and vLLM's state."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_stand_apart)


def _stand_apart() -> None:
    """The first call in a judging process. Ctrl-C and SIGTERM, sent to the whole run, are the run's to handle: it still
    needs the rewards of this step. So the process gets a session of its own, and it ends when the run has ended."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()


def _kill(pool: ProcessPoolExecutor) -> None:
    """End its processes now, whatever they compute."""
    for process in list(pool._processes.values()):  # Python 3.14 has a method for this
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _where(e: BaseException, path: Path) -> str:
    """An exception in one line: its type, its text, and the last line of the user's file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
    text = (str(e).strip() or "no text").splitlines()[0]
    return f"{type(e).__name__}: {text}" + (f" ({path.name}, line {lines[-1]})" if lines else "")
