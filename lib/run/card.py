"""Card of a saved model: the README.md that the hub shows, with what was done to the model and what it costs."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path

from tabulate import tabulate

from lib import sparse
from lib.cli.settings import Experiment, OutputFlags, RecoveryFlags, ScaleFlags
from lib.core.errors import first_line
from lib.core.files import write_atomically
from lib.models.load import check_hub
from lib.pruning.walk import LayerReport

log = logging.getLogger(__name__)

CARD = "README.md"
_DATASETS = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext"}  # on the hub
_TAKEN_OVER = ("base_model", "license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# Flags that say where something is, and not what the model is.
_PLACES = {*OutputFlags.__annotations__, *ScaleFlags.__annotations__, "cache_dir", "save_plan", "save_calib"}
_BODY = """\
# {name}, pruned

## What it is worse at

Pruning removes knowledge: rare words, facts and long answers suffer first, and a chat model repeats itself more often
or does not end its answers. Perplexity on text like that of its calibration says little about this. Zeros save memory
and time only in programs that make use of them. It has all limits of the model that it was made from.

{loading}"""


@cache  # a run writes its cards several times
def _hub_card(place: str, cache_dir: str | None) -> Path:
    """Return the file of the card of a model of the hub."""
    from huggingface_hub import hf_hub_download

    check_hub()
    return Path(hf_hub_download(place, CARD, cache_dir=cache_dir))


def write_card(folder: Path, content: Mapping, rows: Sequence[LayerReport] = ()) -> None:
    """Write the card of the model in ``folder`` from the ``content`` of a record, with versions, and layer reports.

    From the base model's card, if there is one, license, language and tags are taken over. That of a model that was
    pruned before is kept, and what was done since is added.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, flags, base = content["model"], content["flags"], None
    place = model.get("path", model["given"])
    of_hub = not Path(place).is_dir() and place.count("/") == 1
    path = Path(place, CARD)
    try:
        path = _hub_card(place, model.get("cache_dir")) if of_hub else path
        base = ModelCard.load(path) if path.is_file() else None
    except Exception as error:  # those of the hub's client, of yaml, and of the class
        log.warning("%s: license and tags are not taken over (%s)", path, first_line(error))

    earlier = base.data.to_dict() if base else {}
    again = "pruning_method" in earlier
    data = {name: earlier[name] for name in _TAKEN_OVER if name in earlier and (again or name != "datasets")}
    data |= {"base_model": place} if of_hub and not again else {}
    reads = any(map(content.get, ("calibration", "recovery", "price_search", "epsilon_search")))
    text = str(flags.get("calib_data")) if reads else ""
    dataset = text.split(":")[1] if text.startswith("hf:") else _DATASETS.get(text)
    data["datasets"] = sorted({*data.get("datasets", ()), dataset} - {None}) or None
    data["base_model_relation"] = "finetune" if "base_model" in data else None  # as the hub has it for pruned models
    data["library_name"] = "timm" if "accuracy" in content else "transformers"
    data["pruning_method"] = earlier["pruning_method"] if again and not rows else content["method"]
    data["sparsity"] = round(content["sparsity"], 4)
    data["tags"] = [*earlier.get("tags", ()), "pruned", *data["pruning_method"].split("_")]

    load = f'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{folder}")'
    load = f'import timm\nmodel = timm.create_model("local-dir:{folder}")' if "accuracy" in content else load
    if sparse.is_packed(folder):
        load = f'from lib.sparse import load_packed\nmodel = load_packed("{folder}")'
        load += "  # its values are int8, the figures below are of those before" * sparse.holds_int8(folder)
    loading = f"## How to load it\n\n```python\n{load}\n```"
    text = base.text.strip() if again else _BODY.format(name=model["name"], loading=loading)
    # An earlier card says how the earlier model is loaded.
    text = loading.join(re.split(r"(?s)## How to load it\n+```python\n.*?```", text, maxsplit=1))
    parts = [text, f"# {content['method'].capitalize()}"] if again else [text]
    parts += ["## Figures", *_figures(content), "## How it was made", _made(content), *_by_block(rows)]
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    write_atomically(folder / CARD, str(card))


def _figures(content: Mapping) -> list[str]:
    """Return paragraphs and tables on the perplexity, or the accuracy, before and after each step."""
    lines = [f"{content['sparsity']:.1%} of the weights in its blocks' matrices are zero."]
    recovery, key = content.get("recovery"), "accuracy" if "accuracy" in content else "perplexity"
    if share := content["flags"].get("drop_experts"):
        lines.append(f"{share:g} of each block's experts, rounded down, were dropped by {content['flags']['drop_by']}.")
    if recovery:
        held = "{tokens} tokens of training changed the held-out loss from {held_before:.4f} to {held_after:.4f}."
        lines.append(held.format(**recovery))
    if content.get("evaluation"):
        lines.append("Perplexity on {windows} windows of {seqlen} tokens of `{text}`:".format(**content["evaluation"]))
    figures = {"dense": content.get("dense"), content["method"]: content.get(key)}
    figures |= {"before recovery": recovery["perplexity_before"]} if recovery else {}
    figures = {row["state"]: row["perplexity"] for row in content.get("merged", ())} or figures
    figures = {name: value["top1"] if isinstance(value, Mapping) else value for name, value in figures.items()}
    cells = [(name, f"{value:.2f}" if value else "-") for name, value in figures.items()]
    return [*lines, tabulate(cells, ("model", key), "github", disable_numparse=True)]


def _made(content: Mapping) -> str:
    """Return the flags that are not at their defaults, and versions."""
    usual = {item.name: str(item.default) for _, item, _ in Experiment.declared()}
    hidden = _PLACES if content.get("recovery") else _PLACES | {*RecoveryFlags.__annotations__}
    flags = [(name, str(value)) for name, value in content["flags"].items() if name not in hidden]
    flags = [f"--{key} {x}".removesuffix(" True") for key, x in flags if x not in ("None", "", usual.get(key, "False"))]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return f"`{' '.join(flags)}`\n\nVersions: {versions}; commit {content['git_commit'] or 'unknown'}."


def _by_block(rows: Sequence[LayerReport]) -> list[str]:
    """Return a heading, and a table of the planned and the measured sparsity of each block, if there are ``rows``."""
    blocks = defaultdict(list)
    for row in rows:
        size = prod(row.shape)
        blocks[re.sub(r"(\.\d+)\..*", r"\1", row.name)].append((size, size * row.ratio, size * row.sparsity))
    sums = {name: [sum(column) for column in zip(*layers, strict=True)] for name, layers in blocks.items()}
    cells = [(name, planned / size, zeros / size) for name, (size, planned, zeros) in sums.items()]
    table = tabulate(cells, ("block", "planned", "measured"), "github", floatfmt=".4f")
    return ["## Sparsity by block", table] if rows else []
