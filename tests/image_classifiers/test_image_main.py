"""Image classifiers: whole runs, the files they leave, the images they read, and bad input."""

import json
import re
import subprocess
from functools import partial

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from test_image_models import matrices, some_images, tiny_convnext, tiny_vit
from test_image_pruning import exact
from torchvision import transforms

from image_classifiers import data, main, models
from image_classifiers.models import find_parts, save_classifier
from image_classifiers.settings import TRAINING_FLAGS, ImageExperiment
from image_classifiers.subject import accuracy
from lib.allocation.block_scores import outlier_ratio, score_blocks
from lib.cli.command import parse
from lib.core.errors import UserError
from lib.spectra import measure
from lib.spectra.cache import Measurement


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


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Return the folder of a tiny ViT for two classes."""
    folder = tmp_path_factory.mktemp("classifiers") / "two"
    model = tiny_vit()
    model.reset_classifier(2)
    save_classifier(model, 8, folder)
    return folder


def call(capsys, *flags) -> tuple[int, str]:
    """Return the exit status of the command line and what it said on stderr."""
    status = main.main([word for flag in flags for word in str(flag).split()])
    return status, capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- whole runs


@torch.no_grad()
def logits_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and labels of all test digits, prepared by hand."""
    images = data.digits(None, None, train=False).items
    mean, std = (torch.tensor(values)[:, None, None] for values in data.MEAN_STD[True])
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std for image, _ in images]
    return model(torch.stack(pixels)), torch.tensor([label for _, label in images])


def test_dense_evaluation_and_images_in_folders(two_classes, imagenet, tmp_path, capsys):
    common = f"--model {two_classes} --save_dir {tmp_path} --num_workers 0"
    assert call(capsys, common, f"--data_path {imagenet}")[0] == 0
    imnet = json.loads((tmp_path / "run_dense_sparsity_0.0.json").read_text())
    folders = f"--data_set image_folder --data_path {imagenet}/train --eval_data_path {imagenet}/val"
    assert call(capsys, common, folders, "--prune_metric wanda --sparsity 0.5 --nsamples 12")[0] == 0
    folder = json.loads((tmp_path / "run_wanda_sparsity_0.5.json").read_text())
    assert imnet["dense"] == imnet["accuracy"] == folder["dense"] and imnet["dense"]["images"] == 6
    assert imnet["dense"]["top5"] == 100  # of two classes


@pytest.mark.parametrize("method", ["magnitude_owl", "magnitude_ww"])
def test_allocations_add_up_to_the_target(method, tmp_path, capsys):
    model = tiny_convnext(conv_mlp=True)
    save_classifier(model, 8, tmp_path / "tiny")
    flags = f"--data_set digits --prune_metric {method} --sparsity 0.5 --num_workers 0 --nsamples 24"
    flags += f" --metric_cache {tmp_path}/cache" if method == "magnitude_ww" else ""
    assert call(capsys, flags, f"--model {tmp_path}/tiny --save_dir {tmp_path}")[0] == 0
    layers = matrices(find_parts(model).pruned)
    record = json.loads((tmp_path / f"run_{method}_sparsity_0.5.json").read_text())
    assert abs(record["sparsity"] - 0.5) <= len(layers) / sum(layer.weight.numel() for layer in layers.values())
    rows = [line.split("\t") for line in (tmp_path / f"layers_{method}_sparsity_0.5.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(layers) and len({row[3] for row in rows}) > 1
    if method == "magnitude_ww":  # under the model's name, three a block
        assert len(np.load(tmp_path / "cache" / "tiny" / "alpha_mid.npy")) == 18
        status, said = call(capsys, flags, f"--model {tmp_path}/tiny --save_dir {tmp_path} --WW_metric mp_softrank")
        assert status == 2 and "--WW_metric mp_softrank: is for matrices" in said


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
    values = measure.measure(Measurement(metric), parts.measured).values
    assert list(values) == list(matrices(parts.measured))
    assert np.isfinite(list(values.values())).all() and len(set(values.values())) > 1


@pytest.fixture
def pruning_run(vit_folder, tmp_path):
    """Return the flags of a run that prunes and saves its model, its three files' paths, and the model's folder."""
    out, run = tmp_path / "out", "wanda_ww_sparsity_0.5"
    flags = f"--model {vit_folder} --data_set digits --prune_metric wanda_ww --sparsity 0.5 --nsamples 20"
    flags += f" --batch_size 99 --num_workers 0 --metric_cache {tmp_path}/cache --save_dir {out}"
    paths = [out / f"layers_{run}.tsv", out / f"run_{run}.json", out / "0.5.txt"]
    return f"{flags} --save_model {tmp_path}/models", paths, tmp_path / "models" / "wanda_ww_0.5"


def test_a_failed_evaluation_leaves_the_model_and_the_figures(pruning_run, tmp_path, capsys, caplog, monkeypatch):
    flags, (table, run, line), folder = pruning_run
    measured = []

    def fail_when_pruned(*args):
        if measured:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measured.append(accuracy(*args))
        return measured[0]

    monkeypatch.setattr("image_classifiers.subject.accuracy", fail_when_pruned)
    status, said = call(capsys, flags)
    assert status == 2 and "out of GPU memory (CUDA out of memory); lower --batch_size" in said
    record = json.loads(run.read_text())
    assert record["complete"] is False and record["accuracy"] is None and not line.exists()
    assert len(table.read_text().splitlines()) == 13 and record["dense"]["images"] == 450

    # What is told is where the figures are, and where the model that was saved is.
    (warning,) = [entry.getMessage() for entry in caplog.records if "figures so far" in entry.getMessage()]
    assert f"figures so far: {tmp_path}/out/*_wanda_ww_sparsity_0.5.*" in warning and str(folder) in warning
    monkeypatch.undo()
    command = f"--model {folder} --data_set digits --num_workers 0 --save_dir {tmp_path}/again"
    assert "give it as --model" in warning and call(capsys, command)[0] == 0
    again = json.loads((tmp_path / "again" / "run_dense_sparsity_0.0.json").read_text())
    assert again["dense_zeros"] == record["sparsity"] and abs(again["dense_zeros"] - 0.5) < 0.01


def test_a_run_as_published(pruning_run, tmp_path, capsys, caplog):
    flags, (table, run, line), folder = pruning_run
    assert call(capsys, flags, "--epochs 300 --opt_betas 0.9 0.999 --model_ema true --eval")[0] == 0
    assert {path.name for path in table.parent.iterdir()} == {table.name, run.name, line.name}
    record, sentence = json.loads(run.read_text()), line.read_text()
    assert re.fullmatch(r"Accuracy of the network on 450 test images: \d+\.\d{5}%\n", sentence)

    # The saved model, loaded by timm and evaluated by a plain loop, has the accuracy and sparsity that were written.
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    logits, labels = logits_of(model)
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    top5 = 100 * (logits.argsort(descending=True)[:, :5] == labels[:, None]).any(1).double().mean().item()
    assert float(sentence.split()[-1].rstrip("%")) == pytest.approx(top1, abs=1e-5)
    assert record["accuracy"] == pytest.approx({"top1": top1, "top5": top5, "images": 450})
    layers = matrices(find_parts(model).pruned)
    zeros = [(layer.weight == 0).double().mean().item() for layer in layers.values()]
    sizes = [layer.weight.numel() for layer in layers.values()]
    assert record["sparsity"] == pytest.approx(np.average(zeros, weights=sizes), rel=1e-12)
    assert abs(record["sparsity"] - 0.5) <= len(layers) / sum(sizes)
    logits, labels = logits_of(tiny_vit())
    assert record["dense"]["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())

    # The table of layers, the flags and the stages.
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == list(layers)
    assert [float(row[4]) for row in rows] == pytest.approx(zeros, abs=1e-6)
    recorded, offered = record["flags"], {action.option_strings[0][2:] for action in main.PARSER._actions[1:]}
    assert set(recorded) == offered - set(TRAINING_FLAGS)  # nothing internal, and no flag without effect
    assert (recorded["sparsity"], recorded["prune_metric"], recorded["batch_size"]) == (0.5, "wanda_ww", 99)
    stages = ["prepare", "load", "evaluate dense", "measure", "allocate", "prune", "save", "evaluate"]
    assert record["complete"] is True and list(record["stages"]) == stages
    ignored = "--epochs, --eval, --model_ema, --opt_betas"
    assert f"flags of the published training script, which do nothing here: {ignored}" in caplog.messages
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-vit"]


@pytest.mark.parametrize("method", ["magnitude", "magnitude_ww", "wanda", "wanda_ww"])
def test_published_commands_are_understood(method):
    command = (
        "--model convnext_base --data_path IMAGENET --resume WEIGHTS --sparsity 0.8 --save_dir OUT "
        f"--prune_metric {method} --WW_metric alpha_mid --epsilon 0.2 --metric_cache c"
    )
    task, (pruner, _, suffix) = parse(ImageExperiment, command.split(), main.PARSER).task(), method.partition("_")
    assert (task.method, task.allocation, task.target) == (method, suffix, 0.8)
    assert task.pruner is models.IMAGE_PRUNERS[pruner]


def test_propagate_reaches_the_walk(vit_folder, tmp_path, capsys):
    zeros = {}
    for how in ("dense", "pruned"):
        flags = f"--data_set digits --prune_metric wanda --sparsity 0.7 --nsamples 50 --num_workers 0 --propagate {how}"
        places = f"--model {vit_folder} --save_dir {tmp_path / how} --save_model {tmp_path / how}"
        assert call(capsys, flags, places)[0] == 0
        model = timm.create_model(f"local-dir:{tmp_path / how}/wanda_0.7", pretrained=True)
        zeros[how] = [layer.weight == 0 for layer in matrices(find_parts(model).pruned).values()]
    same = [torch.equal(a, b) for a, b in zip(zeros["dense"], zeros["pruned"], strict=True)]
    assert all(same[:4]) and not any(same[4:])  # four layers a block


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
    pixels, labels = next(data.batches(data.PreparedImages(images, [900, 3, 77], transform), 3, 0))
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
    prepared, other_seed = (data.PreparedImages(images, [5, 5, 9], transform, seed) for seed in (0, 1))
    first, second, third = (prepared[i][0] for i in range(3))
    assert not torch.equal(first, second)  # the same image, drawn twice, looks different
    assert not torch.equal(second, other_seed[1][0])
    for batch_size, workers in ((3, 0), (2, 1)):  # which change nothing
        pixels = torch.cat([pixels for pixels, _ in data.batches(prepared, batch_size, workers)])
        assert torch.equal(pixels, torch.stack([first, second, third]))


# ------------------------------------------------------------------------------------------------- the command line


def test_defaults_are_the_published_ones():
    flags = parse(ImageExperiment, ["--model", "m"], main.PARSER).flags()
    published = {"nsamples": 4096, "batch_size": 256, "seed": 0, "data_set": "IMNET", "WW_metric": "alpha_mid"}
    published |= {"sparsity": 0, "crop_pct": None, "imagenet_default_mean_and_std": True, "use_amp": False}
    ours = {"metric_cache": "./metric_cache", "statistics": "dense", "published_calibration": False, "device": "auto"}
    ours |= {"epsilon": 0.2, "save_dir": "results"}
    assert {name: flags[name] for name in published | ours} == published | ours


WANDA = "--prune_metric wanda --sparsity 0.5"
PRICE = "--prune_metric wanda_price --sparsity 0.5"
OWL = "--sparsity 0.5 --prune_metric wanda_owl"
MAGNITUDE = "--sparsity 0.5 --prune_metric magnitude"
# Flags (M: a good model, I: images in folders), and what is said: known from the command line alone ...
BY_THE_COMMAND_LINE = {
    "--data_set digits --eval_data_path I": "--eval_data_path does nothing with --data_set digits",
    "--data_set digits --prune_metric wanda": "--prune_metric wanda without a sparsity; add --sparsity",
    "--data_set digits --sparsity 0.5": "--sparsity does nothing without --prune_metric",
    f"--data_set digits {WANDA} --seed 99999999999999999999": "--seed 99999999999999999999: must be at least -",
    f"--data_set digits {OWL} --epsilon 0.1": "--epsilon does nothing with wanda_owl; it is for the methods",
    f"--data_set digits {MAGNITUDE} --published_calibration": "--published_calibration does nothing with magnitude;",
    f"--data_set digits {MAGNITUDE}_owl --propagate pruned": "--statistics does nothing with magnitude_owl;",
}

# ... and from files and folders, before the weights are loaded.
BEFORE_LOADING = {
    "--model deit_tinny_patch16_224": "unknown to timm. Did you mean 'deit_tiny_patch16_224'?",
    "--model resnet18 --data_path I": "ResNet is not supported",
    "--model I": "the folder holds no config.json",
    "--model deit_tiny_patch16_224.nosuch --data_path I": "timm cannot create it",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I": "deit_tiny_patch16_224 are for 1000 classes",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I --resume I/val/n01/0.png": "cannot be read as weights",
    "--model deit_tiny_patch16_224 --nb_classes 2 --data_path I --resume M/model.safetensors": "its weights do not fit",
    "--model convnext_atto --input_size 8 --data_path I": "convnext_atto cannot take images of",
    "--model M": "--data_path is missing",
    "--model M --data_path nosuch": "--data_path nosuch: nosuch/val should hold a folder of",
    "--model M --data_path I": "2 classes of images, and the model has 10; for a model that has 2, add --nb_classes 2",
    "--model M --data_set digits --nb_classes 7": "--nb_classes 7: the weights of",
    f"--model M --data_set digits {WANDA} --nsamples 1348": "1348: there are only 1347 training images; lower it",
    f"--model M --data_set digits {PRICE} --nsamples 11": "--nsamples 11: the search for prices needs at least 12 dif",
    "--model M --data_set digits --device cuda:99": "cannot be used",
    "--model M --data_set digits --save_dir M/config.json": "cannot be written",
}


@pytest.mark.parametrize(("flags", "says"), BY_THE_COMMAND_LINE.items(), ids=str)
def test_refused_by_the_command_line(flags, says):
    with pytest.raises(UserError) as error:
        parse(ImageExperiment, ["--model", "m", *flags.split()], main.PARSER)
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


def test_an_image_that_cannot_be_read_is_named(imagenet, tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    good = (imagenet / "val" / "n01" / "0.png").read_bytes()
    for name, content in (("1.png", good), ("2.png", good[: len(good) // 2]), ("3.png", good)):
        (root / "a" / name).write_bytes(content)
    images = data.image_folder(None, str(root), train=False)
    prepared = data.PreparedImages(images, range(3), data.evaluation_transform(8, None, data.MEAN_STD[True]))
    with pytest.raises(UserError, match=rf"^{root}/a/2\.png: cannot be read as an image \(.*\); replace or remove it$"):
        list(data.batches(prepared, 2, workers=1))


def test_classes_of_calibration_and_test_must_be_the_same(two_classes, imagenet, tmp_path, capsys):
    for name in ("n01", "n03"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).symlink_to(imagenet / "train" / "n01")
    flags = f"--model {two_classes} --data_set image_folder --data_path {tmp_path}/other --eval_data_path"
    status, said = call(capsys, flags, f"{imagenet}/val --save_dir {tmp_path}/out", WANDA)
    assert status == 2 and "calibration and test images differ in their classes (n02, n03)" in said


@pytest.mark.parametrize("script", sorted((ROOT / "image_classifiers").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_refuse_what_is_not_there(script, tmp_path):
    special = {"download_weights.sh": [tmp_path, "resnet18"], "prune.sh": ["resnet18", tmp_path]}
    command = ["bash", script, *special.get(script.name, [tmp_path])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_scripts_flags_are_the_parsers():
    text = (ROOT / "image_classifiers" / "scripts" / "prune.sh").read_text().replace("\\\n", " ")
    flags = re.findall(r"--\w+", text.split("main.py", 1)[1])
    assert len(flags) > 7 and set(flags) <= set(main.PARSER._option_string_actions)
