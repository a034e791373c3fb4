"""What a run leaves behind (its folder, its log, its curve) and the order in which it takes problems."""

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path

import parallel
from config import write_args


def new_run_folder(args, name: str) -> Path:
    """The run's folder, made, with args.json. args.out must be new; without it, the first free of runs/name-1, -2, …"""
    try:
        if args.out:
            folder = Path(args.out)
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"--out {args.out} already holds a run: give another folder, or remove it")
        else:
            Path("runs").mkdir(exist_ok=True)
            folder = next(f for i in count(1) if made(f := Path(f"runs/{name}-{i}")))
        folder.mkdir(parents=True, exist_ok=True)
        write_args(args, folder)
    except OSError as e:
        raise ValueError(f"--out {args.out or 'runs/'}: cannot write there ({e.strerror})") from e
    return folder


def made(folder: Path) -> bool:
    """Whether this call, and no other, made the folder."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


class Log:
    """The records of a run, in memory and in metrics.jsonl. Rank 0 writes."""

    def __init__(self, folder: Path, before: int | None = None):
        """before: a step to go on from; what was logged after its checkpoint was made is forgotten."""
        self.path, self.records = folder / "metrics.jsonl", []
        self.owed = False  # an evaluation that was forgotten and is to be made again
        if parallel.rank() == 0:
            self._begin(before)
        # Only rank 0 reads what it also rewrites: all must come to the same evaluations.
        self.records, self.owed = parallel.gather([(self.records, self.owed)])[0]

    def _begin(self, before: int | None) -> None:
        for line in self.path.read_text().splitlines() if before is not None and self.path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # the line that was being written
                break
            if record["step"] < before or (record["step"] == before and "reward" in record):
                self.records.append(record)
            self.owed |= record["step"] == before and "success" in record
        whole = self.path.with_suffix(".new")
        whole.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        whole.replace(self.path)

    def __call__(self, record: dict) -> None:
        self.records.append(record)
        if parallel.rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")


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
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def take(problems: list, position: int, count: int, seed: int) -> list:
    """`count` problems from a position on, of endless epochs of all of them, each in an order of its own."""
    places = (divmod(i, len(problems)) for i in range(position, position + count))
    return [problems[shuffled(len(problems), seed, epoch)[i]] for epoch, i in places]


@contextmanager
def stops_softly() -> Iterator[list[int]]:
    """Within the context, SIGTERM and Ctrl-C only add to the list, which is looked at between steps; asked twice, they
    interrupt."""
    asked: list[int] = []

    def note(number, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
