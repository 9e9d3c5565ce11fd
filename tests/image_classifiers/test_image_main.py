"""Image classifiers: whole runs, the files they leave, the images they read, and bad input."""

import json
import logging
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, fast
from PIL import Image
from test_image_models import matrices, some_images, tiny_convnext, tiny_vit
from test_image_pruning import exact
from torchvision import transforms

from image_classifiers import data, main, models
from image_classifiers.models import find_parts, save_classifier
from image_classifiers.settings import TRAINING_FLAGS, ImageExperiment
from image_classifiers.subject import accuracy
from lib.allocation import formulas
from lib.allocation.block_scores import outlier_ratio, score_blocks
from lib.cli.command import parse
from lib.core.errors import UserError
from lib.spectra import measure

PROGRAM = ROOT / "image_classifiers" / "main.py"


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers") / "tiny-vit"
    save_classifier(tiny_vit(), 8, folder)
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Return a folder in ImageNet's layout: two classes, of six training and three validation images each."""
    root = tmp_path_factory.mktemp("imagenet")
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01", "n02"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (12, 10 + i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def call(capsys, *flags) -> tuple[int, str]:
    """Return the exit status of the command line and what it said on stderr."""
    status = main.main([str(flag) for flag in flags])
    return status, capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_run_as_published_from_inside_the_folder(vit_folder, tmp_path):
    flags = (
        f"--model {vit_folder} --data_set digits --prune_metric wanda_ww --sparsity 0.6 --nsamples 200 --batch_size 64"
    )
    flags += f" --WW_metric alpha_mid --epsilon 0.2 --save_dir {tmp_path}/out --metric_cache {tmp_path}/cache"
    flags += f" --save_model {tmp_path}/models --num_workers 0"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "main.py", *flags.split()], cwd=PROGRAM.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "0.6.txt",
        "run_wanda_ww_sparsity_0.6.json",
        "layers_wanda_ww_sparsity_0.6.tsv",
    }
    record = json.loads((out / "run_wanda_ww_sparsity_0.6.json").read_text())
    text = (out / "0.6.txt").read_text()
    assert re.fullmatch(r"Accuracy of the network on 450 test images: \d+\.\d{5}%\n", text)

    # The saved model, loaded by timm and evaluated by a plain loop, has the accuracy and sparsity that were written.
    model = timm.create_model(f"local-dir:{tmp_path}/models/wanda_ww_0.6", pretrained=True).eval()
    logits, labels = logits_of(model)
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    top5 = 100 * np.mean(
        [label in row.sort(descending=True).indices[:5] for row, label in zip(logits, labels, strict=True)]
    )
    assert float(text.split()[-1].rstrip("%")) == pytest.approx(top1, abs=1e-5)
    assert record["accuracy"] == pytest.approx({"top1": top1, "top5": top5, "images": 450})
    layers = matrices(find_parts(model).pruned)
    zeros = [(layer.weight == 0).double().mean().item() for layer in layers.values()]
    sizes = [layer.weight.numel() for layer in layers.values()]
    assert record["sparsity"] == pytest.approx(np.average(zeros, weights=sizes), rel=1e-12)
    assert abs(record["sparsity"] - 0.6) <= len(layers) / sum(sizes)

    # What stands in the table of layers, and the dense accuracy.
    rows = [line.split("\t") for line in (out / "layers_wanda_ww_sparsity_0.6.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(layers)
    assert [float(row[4]) for row in rows] == pytest.approx(zeros, abs=1e-6)
    assert sorted(rows, key=lambda row: float(row[2])) == sorted(rows, key=lambda row: float(row[3]))
    logits, labels = logits_of(tiny_vit())
    assert record["dense"]["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert "dense" in done.stdout and "wanda_ww" in done.stdout and f"{top1:.2f}" in done.stdout
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["tiny-vit"]


@torch.no_grad()
def logits_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and labels of all test digits, prepared by hand."""
    images = data.digits(None, None, train=False).items
    mean, std = (torch.tensor(values)[:, None, None] for values in data.MEAN_STD[True])
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std for image, _ in images]
    return model(torch.stack(pixels)), torch.tensor([label for _, label in images])


def test_convnext_keeps_its_metric_under_its_own_name(tmp_path, capsys):
    for name, changes in (("one", {}), ("two", {"dims": (12, 16, 20, 24)})):
        save_classifier(tiny_convnext(**changes), 8, tmp_path / name)
        flags = [
            "--model",
            tmp_path / name,
            "--data_set",
            "digits",
            "--prune_metric",
            "magnitude_ww",
            "--sparsity",
            0.5,
        ]
        flags += ["--save_dir", tmp_path / "out", "--metric_cache", tmp_path / "cache", "--num_workers", 0]
        assert call(capsys, *flags)[0] == 0
        assert len(np.load(tmp_path / "cache" / name / "alpha_mid.npy")) == 18  # three a block
    # The second run reads what the first one wrote; values that are not those of the weights show in its ratios.
    kept = np.load(tmp_path / "cache" / "two" / "alpha_mid.npy")
    np.save(tmp_path / "cache" / "two" / "alpha_mid.npy", np.where(np.arange(18) == 17, 2 * kept.max(), kept))
    before = (tmp_path / "out" / "layers_magnitude_ww_sparsity_0.5.tsv").read_text().splitlines()
    assert call(capsys, *flags)[0] == 0
    after = (tmp_path / "out" / "layers_magnitude_ww_sparsity_0.5.tsv").read_text().splitlines()
    assert float(after[-1].split("\t")[3]) > float(before[-1].split("\t")[3]) and before[0] == after[0]


def test_dense_evaluation_and_images_in_folders(vit_folder, imagenet, tmp_path, capsys):
    save_classifier(tiny_vit(num_classes=2), 8, tmp_path / "two")
    common = ["--model", tmp_path / "two", "--save_dir", tmp_path / "out", "--num_workers", 0]
    assert call(capsys, *common, "--data_path", imagenet)[0] == 0
    imnet = json.loads((tmp_path / "out" / "run_dense_sparsity_0.0.json").read_text())
    folders = ["--data_set", "image_folder", "--data_path", imagenet / "train", "--eval_data_path", imagenet / "val"]
    pruning = ["--prune_metric", "wanda", "--sparsity", 0.5, "--nsamples", 12]
    assert call(capsys, *common, *folders, *pruning)[0] == 0
    folder = json.loads((tmp_path / "out" / "run_wanda_sparsity_0.5.json").read_text())
    assert imnet["dense"] == imnet["accuracy"] == folder["dense"] and imnet["dense"]["images"] == 6
    assert imnet["dense"]["top5"] == 100  # of two classes


@pytest.mark.slow
def test_results_depend_neither_on_the_batch_size_nor_on_the_workers(vit_folder, tmp_path, capsys):
    common = ["--model", vit_folder, "--data_set", "digits", "--prune_metric", "wanda", "--sparsity", 0.7]
    common += ["--nsamples", 50, "--published_calibration"]
    masks = []
    for batch, workers in ((50, 0), (7, 0), (16, 1)):
        out = tmp_path / f"{batch}"
        flags = ["--batch_size", batch, "--num_workers", workers, "--save_dir", out, "--save_model", out]
        assert call(capsys, *common, *flags)[0] == 0
        model = timm.create_model(f"local-dir:{out}/wanda_0.7", pretrained=True)
        masks.append(torch.cat([layer.weight.flatten() == 0 for layer in matrices(find_parts(model).pruned).values()]))
    # float32 sums in another order may swap the two scores at a threshold, in a matrix or two
    assert all((masks[0] != mask).sum() <= 4 for mask in masks[1:])


@pytest.mark.parametrize("suffix", fast(formulas.ALLOCATIONS, 4))
def test_every_allocation_adds_up_to_the_target(suffix, tmp_path, capsys):
    model = tiny_convnext(conv_mlp=True)
    save_classifier(model, 8, tmp_path / "tiny")
    method = f"magnitude_{suffix}".rstrip("_")
    flags = ["--model", tmp_path / "tiny", "--data_set", "digits", "--prune_metric", method, "--sparsity", 0.5]
    flags += ["--save_dir", tmp_path, "--num_workers", 0, "--nsamples", 24]
    flags += ["--metric_cache", tmp_path] if suffix == "ww" else []
    assert call(capsys, *flags)[0] == 0
    layers = matrices(find_parts(model).pruned)
    record = json.loads((tmp_path / f"run_{method}_sparsity_0.5.json").read_text())
    assert abs(record["sparsity"] - 0.5) <= len(layers) / sum(layer.weight.numel() for layer in layers.values())
    rows = [line.split("\t") for line in (tmp_path / f"layers_{method}_sparsity_0.5.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(layers)
    assert (len({row[3] for row in rows}) == 1) == (suffix == "")


def test_scores_of_blocks_are_those_of_the_dense_model():
    # OWL's share of outliers from statistics of our own, downsampling between the blocks included.
    model = tiny_convnext(conv_mlp=True)
    parts, images = find_parts(model), some_images()
    wanted = {}
    layers = matrices(parts.pruned)
    means = dict(zip(layers, exact(model, "squared_norms", images), strict=True))
    for index in {layer.block for layer in parts.pruned.layers}:
        names = [layer.name for layer in parts.pruned.layers if layer.block == index]
        scores = [layers[name].weight.detach().double().flatten(1).abs() * means[name].sqrt() for name in names]
        flat = torch.cat([score.flatten() for score in scores])
        wanted |= dict.fromkeys(names, 100 * (flat > 2 * flat.mean()).double().mean().item())
    inputs = models.block_inputs(parts.pruned, [(images[:3], None), (images[3:], None)], None)
    found = score_blocks(parts.pruned, inputs, partial(outlier_ratio, multiple=2.0))
    assert found == pytest.approx(wanted) and len(set(found.values())) > 1


@pytest.mark.parametrize("metric", measure.METRICS)
def test_every_metric_is_measured(metric):
    parts = find_parts(tiny_convnext(conv_mlp=True, dims=(16, 24, 32, 40), kernel_sizes=5))
    values = measure.measure(metric, parts.measured).values
    assert list(values) == list(matrices(parts.measured))
    assert np.isfinite(list(values.values())).all() and len(set(values.values())) > 1


def test_metrics_of_weightwatcher_are_refused_for_convolutions(tmp_path, capsys):
    save_classifier(tiny_convnext(), 8, tmp_path / "tiny")
    flags = ["--model", tmp_path / "tiny", "--data_set", "digits", "--prune_metric", "magnitude_ww", "--sparsity", 0.5]
    status, said = call(capsys, *flags, "--WW_metric", "mp_softrank", "--save_dir", tmp_path / "out")
    assert status == 2 and "--WW_metric mp_softrank: is for matrices" in said and not (tmp_path / "out").exists()


@pytest.fixture
def pruning_run(vit_folder, tmp_path):
    """Return the flags of a run that prunes and saves its model, its three files' paths, and the model's folder."""
    out, run = tmp_path / "out", "wanda_ww_sparsity_0.5"
    flags = ["--model", vit_folder, "--data_set", "digits", "--prune_metric", "wanda_ww", "--sparsity", 0.5]
    flags += ["--nsamples", 20, "--batch_size", 99, "--num_workers", 0, "--metric_cache", tmp_path / "cache"]
    flags += ["--save_dir", out, "--save_model", tmp_path / "models"]
    paths = [out / f"layers_{run}.tsv", out / f"run_{run}.json", out / "0.5.txt"]
    return flags, paths, tmp_path / "models" / "wanda_ww_0.5"


def fails_after(count: int, error: BaseException):
    """Return ``accuracy``, but that it raises ``error`` from the call number ``count`` (from 0) on."""
    calls = []

    def measured(*args):
        calls.append(args)
        if len(calls) > count:
            raise error
        return accuracy(*args)

    return measured


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError(None, "x.png", "cannot be read"), 2, "error: x.png: cannot be read"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of GPU memory (CUDA out of memory); lower --batch_size"),
        (RuntimeError("a bug"), None, ""),
    ],
    ids=["user", "memory", "bug"],
)
def test_a_failed_evaluation_leaves_the_model_and_the_figures(
    error, status, said, pruning_run, tmp_path, capsys, caplog, monkeypatch
):
    flags, (table, run, line), folder = pruning_run
    monkeypatch.setattr("image_classifiers.subject.accuracy", fails_after(1, error))  # the dense model's comes first
    if status is None:
        with pytest.raises(RuntimeError, match="a bug"):
            call(capsys, *flags)
    else:
        found, printed = call(capsys, *flags)
        assert found == status and said in printed and "Traceback" not in printed
    record = json.loads(run.read_text())
    assert record["complete"] is False and record["accuracy"] is None and not line.exists()
    assert len(table.read_text().splitlines()) == 13 and record["dense"]["images"] == 450

    # What is told is where the figures are, and a command that measures the model that was saved, as it was asked to.
    (warning,) = [entry.getMessage() for entry in caplog.records if "figures so far" in entry.getMessage()]
    assert f"figures so far: {tmp_path}/out/*_wanda_ww_sparsity_0.5.*" in warning and str(folder) in warning
    monkeypatch.undo()
    words = warning.split("image_classifiers/main.py ")[1].split()
    assert words[words.index("--batch_size") + 1] == "99"
    assert call(capsys, *words, "--save_dir", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "run_dense_sparsity_0.0.json").read_text())
    assert again["dense_zeros"] == record["sparsity"] and abs(again["dense_zeros"] - 0.5) < 0.01


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError(None, None, "the disk is full"), 2), (KeyboardInterrupt(), 130)],
    ids=["user", "ctrl-c"],
)
def test_a_failed_save_leaves_the_figures(error, status, pruning_run, capsys, caplog, monkeypatch):
    flags, (table, run, line), folder = pruning_run

    def fail(*args):
        raise error

    monkeypatch.setattr(models, "save_classifier", fail)
    found, printed = call(capsys, *flags)
    assert found == status and "Traceback" not in printed
    record = json.loads(run.read_text())
    assert record["complete"] is False and record["saved_model"] is None and not folder.exists()
    assert len(table.read_text().splitlines()) == 13 and abs(record["sparsity"] - 0.5) < 0.01
    if status == 2:  # for the user to fix: the accuracy is measured all the same, and the error comes last
        assert printed.rstrip().splitlines()[-1].endswith("error: the disk is full")
        assert record["accuracy"]["images"] == 450 and line.exists()
    else:
        assert "figures so far" in caplog.text and "the same command starts again" in caplog.text
        assert record["accuracy"] is None and not line.exists()


def test_figures_that_cannot_be_written_are_not_promised(pruning_run, capsys, caplog, monkeypatch):
    flags, (_, run, _), folder = pruning_run

    def fail(*args):
        raise UserError(None, None, "the disk is full")

    monkeypatch.setattr("lib.run.record.write_atomically", fail)
    status, said = call(capsys, *flags)
    assert status == 2 and said.rstrip().endswith("error: the disk is full") and not run.exists()
    assert "no figures were written; the pruned model is saved" in caplog.text and str(folder) in caplog.text


def test_the_model_and_the_table_are_written_before_the_evaluation(pruning_run, capsys, monkeypatch):
    flags, (table, run, line), folder = pruning_run
    seen = []

    def measured(*args):
        there = (folder / "model.safetensors").exists(), table.exists(), run.exists(), line.exists()
        seen.append((*there, run.exists() and json.loads(run.read_text())["complete"]))
        return accuracy(*args)

    monkeypatch.setattr("image_classifiers.subject.accuracy", measured)
    assert call(capsys, *flags)[0] == 0
    assert seen == [(False, False, False, False, False), (True, True, True, False, False)]
    record = json.loads(run.read_text())
    assert record["complete"] is True and line.exists()
    stages = ["prepare", "load", "evaluate dense", "measure", "allocate", "prune", "save", "evaluate"]
    assert list(record["stages"]) == stages


def test_the_records_flags_are_the_command_lines(pruning_run, capsys):
    flags, (_, run, _), _ = pruning_run
    assert call(capsys, *flags, "--epochs", 3)[0] == 0
    kept = json.loads(run.read_text())["flags"]
    offered = {action.option_strings[0][2:] for action in main.PARSER._actions[1:]}
    assert set(kept) == offered - set(TRAINING_FLAGS)  # nothing internal, such as `given`, and no flag without effect
    assert (kept["sparsity"], kept["prune_metric"], kept["batch_size"]) == (0.5, "wanda_ww", 99)


def test_published_switches_take_true_and_false():
    for words, wanted in (("", False), ("--use_amp", True), ("--use_amp true", True), ("--use_amp false", False)):
        assert parse(ImageExperiment, ["--model", "m", *words.split()], main.PARSER).use_amp is wanted


@pytest.mark.parametrize("uniform", ["magnitude", "wanda"])
def test_published_flags_of_ww_are_accepted_with_a_uniform_method(uniform):
    words = f"--model m --prune_metric {uniform} --sparsity 0.5 --WW_metric alpha_mid --epsilon 0.2 --metric_cache c"
    assert parse(ImageExperiment, words.split(), main.PARSER).task().allocation == ""


def test_propagate_reaches_the_walk(vit_folder, tmp_path, capsys):
    zeros = {}
    for how in ("default", "dense", "pruned"):
        flags = ["--model", vit_folder, "--data_set", "digits", "--prune_metric", "wanda", "--sparsity", 0.7]
        flags += ["--nsamples", 50, "--num_workers", 0, "--save_dir", tmp_path / how, "--save_model", tmp_path / how]
        assert call(capsys, *flags, *([] if how == "default" else ["--statistics", how]))[0] == 0
        model = timm.create_model(f"local-dir:{tmp_path / how}/wanda_0.7", pretrained=True)
        zeros[how] = [layer.weight == 0 for layer in matrices(find_parts(model).pruned).values()]
    same = [torch.equal(a, b) for a, b in zip(zeros["dense"], zeros["pruned"], strict=True)]
    assert all(same[:4]) and not any(same[4:])  # four layers a block
    assert all(map(torch.equal, zeros["default"], zeros["dense"]))


def test_half_precision_evaluates_nearly_the_same():
    model, images = tiny_vit(), data.digits(None, None, train=False)
    prepared = data.Prepared(images, range(450), data.evaluation_transform(8, None, data.MEAN_STD[True]))
    one, other = (accuracy(model, data.batches(prepared, 100, 0), amp) for amp in (False, True))
    assert one.images == other.images == 450 and abs(one.top1 - other.top1) < 3


# --------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("size", "crop_pct", "steps"),
    [
        (224, None, [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]),
        (224, 0.9, [transforms.Resize(248, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]),
        (384, None, [transforms.Resize((384, 384), transforms.InterpolationMode.BICUBIC)]),
        (32, None, [transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC)]),
    ],
)
@pytest.mark.parametrize("imagenet_mean", [True, False])
def test_images_are_prepared_as_published(size, crop_pct, steps, imagenet_mean):
    pixels = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mean = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if imagenet_mean else ([0.5] * 3, [0.5] * 3)
    wanted = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*mean)])(image)
    found = data.evaluation_transform(size, crop_pct, data.MEAN_STD[imagenet_mean])(image)
    assert found.shape == (3, size, size) and torch.allclose(found, wanted, atol=1e-6)


def test_draws():
    images = data.digits(None, None, train=True)
    draws = [data.draw_images(images, 1000, seed, replacement=False) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 1000 and max(draw) < 1347 for draw in draws)
    again = data.draw_images(images, 4096, 0, replacement=True)
    assert again == data.draw_images(images, 4096, 0, replacement=True) and len(again) == 4096 > len(set(again))


def test_images_come_with_their_own_labels_in_the_order_that_is_asked_for():
    images = data.digits(None, None, train=True)
    transform = data.evaluation_transform(8, None, data.MEAN_STD[True])
    pixels, labels = next(data.batches(data.Prepared(images, [900, 3, 77], transform), 3, 0))
    assert labels.tolist() == [images.items[i][1] for i in (900, 3, 77)]
    assert torch.equal(pixels, torch.stack([transform(images.items[i][0]) for i in (900, 3, 77)]))


def test_digits_are_split_by_class_and_nothing_is_in_both():
    train, test = (data.digits(None, None, train=train) for train in (True, False))
    assert (len(train.items), len(test.items)) == (1347, 450)
    share = np.bincount([label for _, label in test.items]) / np.bincount(
        [label for _, label in (*train.items, *test.items)]
    )
    assert np.allclose(share, 450 / 1797, atol=0.005)


def test_published_calibration_is_seeded_per_image_and_augmented():
    images = data.digits(None, None, train=True)
    transform = data.augmenting_transform(16, data.MEAN_STD[True])
    one, other, third = (data.Prepared(images, [5, 5, 9], transform, seed) for seed in (0, 0, 1))
    assert torch.equal(one[1][0], other[1][0]) and not torch.equal(one[1][0], third[1][0])
    assert not torch.equal(one[0][0], one[1][0])  # the same image, drawn twice, looks different


# ------------------------------------------------------------------------------------------------- the command line


def test_published_command_is_understood():
    command = (
        "--model convnext_base --data_path IMAGENET --resume WEIGHTS --prune_metric wanda_ww --sparsity 0.8 "
        "--save_dir OUT --WW_metric alpha_mid --epsilon 0.2"
    )
    task = parse(ImageExperiment, command.split(), main.PARSER).task()
    assert (task.method, task.allocation, task.target) == ("wanda_ww", "ww", 0.8)
    assert task.pruner is models.IMAGE_PRUNERS["wanda"]


def test_defaults_are_the_published_ones():
    flags = parse(ImageExperiment, ["--model", "m"], main.PARSER).flags()
    published = {"nsamples": 4096, "batch_size": 256, "seed": 0, "data_set": "IMNET", "WW_metric": "alpha_mid"}
    published |= {"sparsity": 0, "crop_pct": None, "imagenet_default_mean_and_std": True, "use_amp": False}
    ours = {"metric_cache": "./metric_cache", "statistics": "dense", "published_calibration": False, "device": "auto"}
    ours |= {"epsilon": 0.2, "save_dir": "results"}
    assert {name: flags[name] for name in published | ours} == published | ours


def test_training_flags_are_answered_with_one_warning(vit_folder, tmp_path, capsys, caplog):
    flags = ["--model", vit_folder, "--data_set", "digits", "--save_dir", tmp_path, "--num_workers", 0]
    with caplog.at_level(logging.WARNING):
        assert call(capsys, *flags, "--epochs", 300, "--opt_betas", 0.9, 0.999, "--model_ema", "true", "--eval")[0] == 0
    warnings = [record.getMessage() for record in caplog.records if "do nothing" in record.getMessage()]
    assert warnings == [
        "flags of the published training script, which do nothing here: --epochs, --eval, --model_ema, --opt_betas"
    ]


WANDA = "--prune_metric wanda --sparsity 0.5"
OWL = "--sparsity 0.5 --prune_metric wanda_owl"
MAGNITUDE = "--sparsity 0.5 --prune_metric magnitude"
# Flags (M: a good model, I: images in folders), and what is said: known from the command line alone ...
BY_THE_COMMAND_LINE = {
    "--model M --data_set digits --eval_data_path I": "--eval_data_path does nothing with --data_set digits",
    "--model M --data_set digits --prune_metric wanda_w --sparsity 0.5": "Did you mean 'wanda_ww'?",
    "--model M --data_set digits --prune_metric wanda": "--prune_metric wanda without a sparsity; add --sparsity",
    "--model M --data_set digits --sparsity 0.5": "--sparsity does nothing without --prune_metric",
    "--model M --data_set digits --prune_metric wanda --sparsity 1": "--sparsity 1.0: must be at least 0 and below 1",
    f"--model M --data_set digits {WANDA} --owl_m 3": "--owl_m does nothing with wanda",
    "--model M --data_set digits --crop_pct 1.5": "--crop_pct 1.5: must be at least 0.1 and at most 1",
    f"--model M --data_set digits {WANDA} --seed 99999999999999999999": "--seed 99999999999999999999: must be between",
    "--model M --data_set digits --save_model out": "--save_model does nothing without --prune_metric",
    "--model M --data_set digits --data_path I": "--data_path does nothing with --data_set digits",
    "--model M --data_set digits --owl_m 3": "--prune_metric; it is for the methods with _owl",
    f"--model M --data_set digits {OWL} --epsilon 0.1": "--epsilon does nothing with wanda_owl; it is for the methods",
    f"--model M --data_set digits {OWL} --WW_metric alpha_mid": "--WW_metric does nothing with wanda_owl; it is for",
    f"--model M --data_set digits {OWL} --metric_cache c": "--metric_cache does nothing with wanda_owl; it is for the",
    "--model M --data_set digits --propagate dense": "--statistics does nothing without --prune_metric",
    "--model M --data_set digits --hidden_device cpu": "--hidden_device does nothing without --prune_metric",
    "--model M --data_set digits --published_calibration": "_calibration does nothing without --prune_metric",
    f"--model M --data_set digits {MAGNITUDE} --propagate pruned": "--statistics does nothing with magnitude;",
    f"--model M --data_set digits {MAGNITUDE} --hidden_device cpu": "--hidden_device does nothing with magnitude;",
    f"--model M --data_set digits {MAGNITUDE}_owl --propagate pruned": "--statistics does nothing with magnitude_owl;",
    f"--model M --data_set digits {MAGNITUDE} --published_calibration": "--published_calibration does nothing with",
    "--model M --data_set digits --sparsity_ratio 0.5": "unrecognized arguments: --sparsity_ratio 0.5. Did you mean",
}

# ... and from files and folders, before the weights are loaded.
BEFORE_LOADING = {
    "--model deit_tinny_patch16_224": "unknown to timm. Did you mean 'deit_tiny_patch16_224'?",
    "--model resnet18 --data_path I": "ResNet is not supported",
    "--model I": "the folder holds no config.json",
    "--model I/train/n01/0.png": "is a file; give the model's name",
    "--model deit_tiny_patch16_224.nosuch --data_path I": "timm cannot create it",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I": "deit_tiny_patch16_224 are for 1000 classes",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I --resume I/val/n01/0.png": "cannot be read as weights",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I --resume M/model.safetensors": "its weights do not fit",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I --resume nosuch.pth": "nosuch.pth: file not found",
    "--model convnext_atto --input_size 8 --nb_classes 2 --data_path I": "convnext_atto cannot take images of",
    "--model M": "--data_path is missing",
    "--model M --data_path nosuch": "--data_path nosuch: folder nosuch/val not found",
    "--model M --data_path I/train/n01": "n01/val not found",
    "--model M --data_set image_folder --eval_data_path I/train/n01": "should hold a folder of images per class",
    "--model M --data_path I": "2 classes of images, and the model has 10; for a model that has 2, add --nb_classes 2",
    "--model M --data_set digits --nb_classes 7": "--nb_classes 7: the model in",
    "--model M --data_set digits --input_size 16": "--input_size 16: the model in",
    f"--model M --data_set digits {WANDA}": "--nsamples 4096: there are only 1347 training images; lower it",
    "--model M --data_set digits --device cuda:99": "cannot be used",
    "--model M --data_set digits --save_dir M/config.json": "cannot be written",
}


@pytest.mark.parametrize(("flags", "says"), BY_THE_COMMAND_LINE.items(), ids=str)
def test_refused_by_the_command_line(flags, says):
    with pytest.raises(UserError) as error:
        parse(ImageExperiment, flags.split(), main.PARSER)
    assert says in error.value.spelled(ImageExperiment.spelling)


@pytest.mark.parametrize("flags", BEFORE_LOADING)
def test_bad_input_is_one_line_and_leaves_nothing(flags, vit_folder, imagenet, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"M": vit_folder, "I": imagenet}
    words = [re.sub(r"^[MI](?=/|$)", lambda found: str(places[found[0]]), word) for word in flags.split()]
    status, said = call(capsys, *words)
    assert status == 2 and BEFORE_LOADING[flags] in said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in said and said.rstrip().endswith(errors[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(workers, imagenet, tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    good = (imagenet / "val" / "n01" / "0.png").read_bytes()
    for name, content in (("1.png", good), ("2.png", good[: len(good) // 2]), ("3.png", good)):
        (root / "a" / name).write_bytes(content)
    images = data.image_folder(None, str(root), train=False)
    prepared = data.Prepared(images, range(3), data.evaluation_transform(8, None, data.MEAN_STD[True]))
    with pytest.raises(UserError, match=rf"^{root}/a/2\.png: cannot be read as an image \(.*\); replace or remove it$"):
        list(data.batches(prepared, 2, workers))


def test_classes_of_calibration_and_test_must_be_the_same(imagenet, tmp_path, capsys):
    save_classifier(tiny_vit(num_classes=2), 8, tmp_path / "two")
    (tmp_path / "other").mkdir()
    for name in ("n01", "n03"):
        (tmp_path / "other" / name).symlink_to(imagenet / "train" / "n01")
    flags = ["--model", tmp_path / "two", "--data_set", "image_folder", "--data_path", tmp_path / "other"]
    status, said = call(
        capsys, *flags, "--eval_data_path", imagenet / "val", *WANDA.split(), "--save_dir", tmp_path / "out"
    )
    assert status == 2 and "calibration and test images differ in their classes (n02, n03)" in said


@pytest.mark.parametrize("script", sorted((ROOT / "image_classifiers").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_refuse_what_is_not_there(script, tmp_path):
    bad = {"download_weights.sh": [tmp_path, "resnet18"], "prune.sh": ["resnet18", tmp_path]}.get(
        script.name, [tmp_path]
    )
    done = subprocess.run(["bash", script, *map(str, bad)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_scripts_flags_are_the_parsers():
    text = (ROOT / "image_classifiers" / "scripts" / "prune.sh").read_text().replace("\\\n", " ")
    flags = re.findall(r"--\w+", text.split("main.py", 1)[1])
    assert len(flags) > 7 and set(flags) <= set(main.PARSER._option_string_actions)
