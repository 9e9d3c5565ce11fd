"""Zero-shot accuracy on lm-eval's tasks."""

from __future__ import annotations

import copy
import io
import logging
import math
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from lib import sparse
from lib.calibration.hidden import entry_device
from lib.core import processes
from lib.core.errors import UserError, did_you_mean, first_line
from lib.core.lazy import accelerate, transformers

log = logging.getLogger(__name__)

# The paper's seven tasks, by lm-eval's names.
ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Metrics to average over the tasks; acc_norm compares choices per byte of their length.
MEANS = ("acc", "acc_norm")
_LOCAL_TASKS = "task files that need no hub: --include_path DIR (data/tasks holds some), --tasks with their names"


def find_tasks(names: str, include_path: str | None, num_fewshot: int) -> list:
    """Load the tasks (lm-eval's, or those defined in ``include_path``) and their data; groups are expanded.

    The ``names`` are separated by commas.

    Raises:
        UserError: an unknown name, data that cannot be loaded, or a task that cannot be run in this way.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not any(Path(include_path).rglob("*.yaml")):
        raise UserError("include_path", include_path, "there are no lm-eval task files (*.yaml)")
    names = list(dict.fromkeys(filter(None, names.split(","))))
    # lm-eval's own tasks are over ten thousand, which take seconds to list.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for name in names:  # all names are checked before the first data, which may have to be fetched
        if name not in manager.task_index:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError("tasks", name, f"unknown to lm-eval.{hint} For {_LOCAL_TASKS}")
    tasks = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # a task definition may run anything, and the hub may be out of reach
            raise UserError("tasks", name, f"cannot be loaded ({first_line(error)})", _LOCAL_TASKS) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError("tasks", name, "runs code that the model writes, or needs images", "leave it out")
        if not num_fewshot:
            continue
        if task.get_config("num_fewshot") == 0:  # lm-eval would keep to it, and only log that it does
            raise UserError("num_fewshot", num_fewshot, f"{name} is zero-shot by its definition", "leave one out")
        examples, split = task.fewshot_docs(), task.fewshot_cfg.split
        with_question = split is not None and split == task.config.test_split  # which is never its own example
        most = len(examples if hasattr(examples, "__len__") else list(examples)) - with_question
        if num_fewshot > most:
            raise UserError("num_fewshot", num_fewshot, f"{name} has {most} to draw from", f"give at most {most}")
    return list(tasks.values())


def zero_shot(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tasks: list,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int | str = "auto",
) -> tuple[dict, str]:
    """Return the results of a model in memory on ``tasks``, and their table; of several processes, the first has them.

    The results are lm-eval's own, ``lm_eval``, and the ``means`` over the tasks that have a metric.

    Args:
        limit: questions per task, None for all.
        batch_size: choices at a time; ``auto`` is the largest that fits on the GPU, and 8 on a CPU.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    if batch_size == "auto" and entry_device(model).type == "cpu":
        batch_size = 8  # trying larger ones until memory runs out, as on a GPU, would kill the process
    if processes.count() > 1:  # lm-eval shares the questions only for a model that it loads itself
        shared = {"rank": processes.rank(), "world_size": processes.count()}
        shared["accelerator"] = accelerate.Accelerator(cpu=processes.device() is None)
        HFLM = type("Shared", (HFLM,), shared)
    # lm-eval gives the tokenizer a padding token, which is not to end up in a saved folder.
    adapter = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    # lm-eval's bars would fill a log file; what is logged keeps its place.
    hidden = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    options = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size, "log_samples": False}
    options["task_manager"] = TaskManager(include_defaults=False)  # of no tasks: these are loaded
    with hidden, sparse.zeros_skipped(model.modules()):
        full = simple_evaluate(adapter, tasks=tasks, **options)

    # lm-eval takes the first choice if log-likelihoods are NaN, which looks like an accuracy.
    answers = [r for task in tasks for request in task.instances for r in request.resps if isinstance(r, tuple)]
    counts = processes.gathered((sum(math.isnan(likelihood) for likelihood, _ in answers), len(answers)))
    broken, total = map(sum, zip(*counts, strict=True))
    if broken:
        log.warning("%d of %d log-likelihoods are not a number: these accuracies mean nothing", broken, total)
    if not processes.is_main():
        return {}, ""
    rows = full["results"].values()
    figures = {metric: [row[f"{metric},none"] for row in rows if f"{metric},none" in row] for metric in MEANS}
    means = {metric: sum(values) / len(values) for metric, values in figures.items() if values}
    lines = [make_table(full).rstrip(), "", *(f"mean {metric}: {mean:.4f}" for metric, mean in means.items())]
    return {"means": means, "lm_eval": full}, "\n".join(lines) + "\n"
