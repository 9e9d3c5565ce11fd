"""Zero-shot accuracy on lm-eval's tasks."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from lib import sparse
from lib.calibration.hidden import entry_device
from lib.core import processes
from lib.core.errors import UserError, first_line
from lib.core.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# The paper's seven tasks, by lm-eval's names.
ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Metrics to average over the tasks; acc_norm compares choices per byte of their length.
MEANS = ("acc", "acc_norm")
_LOCAL_TASKS = "task files that need no hub: --include_path DIR (data/tasks holds some), --tasks with their names"
# There is no automatic batch size on a CPU: running out of memory would kill the process.
_CPU_BATCH = 8


class Tasks(NamedTuple):
    """Tasks ready to be evaluated, with their data loaded. ``manager`` (lm-eval's) holds their sources."""

    tasks: list
    manager: object


class ZeroShot(NamedTuple):
    """lm-eval's ``full`` result, the ``means`` over the tasks that have the metric, and both as a ``table``."""

    full: dict
    means: dict[str, float]
    table: str


def find_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int) -> Tasks:
    """Load the tasks ``names`` (lm-eval's, or those defined in ``include_path``) and their data; groups are expanded.

    Raises:
        UserError: a name is unknown, its data cannot be loaded, or the task cannot be run in this way.
    """
    manager = _task_manager(names, include_path)
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # a task definition may run anything, and the hub may be out of reach
            raise UserError("tasks", name, f"cannot be loaded ({first_line(error)})", _LOCAL_TASKS) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError("tasks", name, "runs code that the model writes, or needs images", "leave it out")
        # Of a task with 0, lm-eval would keep to 0 and say so only in its log.
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise UserError("num_fewshot", num_fewshot, f"{name} is zero-shot by its definition", "leave one out")
        most = _worked_examples(task) if num_fewshot else num_fewshot
        if num_fewshot > most:
            raise UserError("num_fewshot", num_fewshot, f"{name} has {most} to draw from", f"give at most {most}")
    return Tasks(list(tasks.values()), manager)


def _worked_examples(task: object) -> int:
    """Return how many worked examples lm-eval can draw for a question of ``task``, which is never one of them."""
    split = task.fewshot_cfg.split
    among = split is not None and split == task.config.test_split
    docs = task.fewshot_docs()
    return len(docs if hasattr(docs, "__len__") else list(docs)) - among


def _task_manager(names: Sequence[str], include_path: str | None) -> object:
    """Return a manager that knows all of ``names``."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError("include_path", include_path, "folder not found", "give one with lm-eval task files")
        local = _tasks_in(include_path, include_defaults=False)
        if not local.all_tasks:
            raise UserError("include_path", include_path, "the folder holds no lm-eval task files (*.yaml)")
        if set(names) <= set(local.all_subtasks):  # lm-eval's own, over ten thousand, take seconds to list
            return local
    manager = _tasks_in(include_path)
    for name in names:  # all names are checked before the first data, which may have to be fetched
        if name not in manager.task_index:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError("tasks", name, f"unknown to lm-eval.{hint} For {_LOCAL_TASKS}")
    return manager


@cache
def _tasks_in(include_path: str | None, include_defaults: bool = True) -> object:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int | str = "auto",
) -> ZeroShot:
    """Return lm-eval's result for the model in memory on ``tasks``; with several processes, only the first has it.

    Args:
        limit: questions per task, None for all.
        batch_size: choices at a time; ``auto`` is the largest that fits on the GPU, and 8 on a CPU.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    if batch_size == "auto" and entry_device(model).type == "cpu":
        batch_size = _CPU_BATCH
    # lm-eval gives the tokenizer a padding token, which is not to end up in a saved folder.
    adapter = _data_parallel(HFLM)(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    with _bars_for_terminals(), sparse.zeros_skipped(model.modules()):
        full = simple_evaluate(
            adapter,
            tasks=list(tasks.tasks),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
        )
    _warn_of_nan(tasks)
    if not processes.is_main():
        return ZeroShot({}, {}, "")
    means = {}
    for metric in MEANS:
        figures = [row[f"{metric},none"] for row in full["results"].values() if f"{metric},none" in row]
        if figures:
            means[metric] = sum(figures) / len(figures)
    lines = [make_table(full).rstrip(), "", *(f"mean {metric}: {mean:.4f}" for metric, mean in means.items())]
    return ZeroShot(full, means, "\n".join(lines) + "\n")


def _data_parallel(adapter: type) -> type:
    """Return lm-eval's ``adapter`` of a model in memory, set up to share the questions among several processes.

    lm-eval does so only for a model that it loads itself; a model passed to it counts as the only one.
    """
    if processes.count() == 1:
        return adapter
    from accelerate import Accelerator

    class Shared(adapter):
        rank = property(lambda self: processes.rank())
        world_size = property(lambda self: processes.count())
        accelerator = Accelerator(cpu=processes.device() is None)

    return Shared


@contextmanager
def _bars_for_terminals() -> Iterator[None]:
    """Disable every tqdm bar, whatever its caller asks for, unless stderr is a terminal: bars would fill a log file."""
    original = tqdm.__init__

    def disabled(bar: tqdm, *args, **options) -> None:
        original(bar, *args, **options | {"disable": True})

    if not sys.stderr.isatty():
        tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original


def _warn_of_nan(tasks: Tasks) -> None:
    """Warn if log-likelihoods are NaN: lm-eval would take the first choice, which looks like an accuracy."""
    answers = [r for task in tasks.tasks for request in task.instances for r in request.resps if isinstance(r, tuple)]
    counts = processes.gathered((sum(math.isnan(likelihood) for likelihood, _ in answers), len(answers)))
    broken, total = map(sum, zip(*counts, strict=True))
    if broken:
        log.warning("%d of %d log-likelihoods are not a number: these accuracies mean nothing", broken, total)
