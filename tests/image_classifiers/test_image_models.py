"""Image classifiers: which models are found by structure and which are refused, the published figures, weight files."""

import argparse
import copy
import re
from functools import cache

import pytest
import timm
import torch
from conftest import fast

from image_classifiers.models import (
    fill_weights,
    find_parts,
    load_classifier,
    locate_classifier,
    read_weight_file,
    save_classifier,
    skeleton,
)
from lib.allocation.formulas import heavy_tailed
from lib.core.errors import UserError
from lib.spectra.cache import Measurement
from lib.spectra.measure import measure


@cache
def built(name: str, **shape):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **shape).eval()


def tiny_vit(**changes):
    """Return a random ViT of three blocks for digits, always the same."""
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return copy.deepcopy(built("deit_tiny_patch16_224", **shape | changes))


def tiny_convnext(**changes):
    """Return a random ConvNeXt of six blocks in four stages for digits, always the same; its MLPs are linear layers."""
    shape = {"patch_size": 1, "dims": (8, 12, 16, 20), "depths": (2, 1, 2, 1), "kernel_sizes": 3}
    # Layer scale starts at 1e-6, which would leave hardly anything of the blocks in the output.
    return copy.deepcopy(built("convnext_tiny", **shape | {"ls_init_value": 0.5} | changes))


TINY = {"vit": tiny_vit, "convnext": tiny_convnext, "convnext_1x1": lambda: tiny_convnext(conv_mlp=True)}


def matrices(weights) -> dict[str, torch.nn.Module]:
    """Return the modules of the layers by name, in the model's order, looked up in the model itself."""
    return {layer.name: weights.model.get_submodule(layer.name) for layer in weights.layers}


def some_images(count: int = 7, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------------- structure

NAMED = {
    "vit_base_patch16_224": (12, 48),
    "vit_large_patch16_224": (24, 96),
    "deit_tiny_patch16_224": (12, 48),
    "deit_small_patch16_224": (12, 48),
    "deit_base_patch16_224": (12, 48),
    "convnext_atto": (12, 24),
    "convnext_tiny": (18, 36),
    "convnext_base": (36, 72),
    "convnext_large": (36, 72),
}


@pytest.mark.parametrize("name", fast(NAMED, 3))
def test_the_papers_models_are_found(name):
    blocks, count = NAMED[name]
    model, size, _ = skeleton(locate_classifier(name), None, None, None)
    parts = find_parts(model)
    pruned, measured = ([layer.name for layer in weights.layers] for weights in parts)
    assert size == 224 and len(pruned) == count
    names = {module: name for name, module in model.named_modules()}
    for weights in parts:  # what is lent under a name and an index is what the model has there
        lent = [(name, block.index, linear) for block in weights.visit() for name, linear in block.linears.items()]
        assert lent == [(layer.name, layer.block, model.get_submodule(layer.name)) for layer in weights.layers]
        assert all(layer.shape == linear.weight.shape for layer, (*_, linear) in zip(weights.layers, lent, strict=True))
        assert all(name.startswith(f"{names[weights.modules[i]]}.") for name, i, _ in lent)
    inner = [name.split("blocks.")[1].split(".", 1)[1] for name in measured]
    if "convnext" in name:  # three a block are measured, two are pruned; no downsampling, no stem, no head
        assert inner == ["conv_dw", "mlp.fc1", "mlp.fc2"] * blocks
        assert pruned == [name for name in measured if ".mlp." in name]
        assert len(parts.pruned.modules) == len(parts.measured.modules) == blocks + 3
    else:
        assert inner == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"] * blocks
        assert parts.pruned.layers == parts.measured.layers and len(parts.pruned.modules) == blocks


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "ResNet"),
        ("edgenext_small", "EdgeNeXt"),  # some of its stages hold ConvNeXt's blocks, the others would stay dense
        ("cait_xxs24_224", "Cait"),  # two lists of blocks
        ("vit_small_r26_s32_224", "VisionTransformer"),  # a ResNet before the blocks
        ("beit_base_patch16_224", "Beit"),  # its blocks hold position biases
    ],
)
def test_other_models_are_refused_by_name(name, kind):
    message = rf"^--model {name}: {kind} is not supported, .*; supported: .*ViT, DeiT and ConvNeXt"
    with pytest.raises(UserError, match=message):
        skeleton(locate_classifier(name), None, None, None)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_the_blocks_are_the_whole_way_from_stem_to_head(make):
    # What leaves the last entry of the chain, entry by entry, is what the model hands to its final norm.
    model, seen = make(), {}
    norm = model.norm if hasattr(model, "blocks") else model.head
    norm.register_forward_pre_hook(lambda _, args: seen.setdefault("out", args[0]))
    blocks = find_parts(model).pruned.modules
    blocks[0].register_forward_pre_hook(lambda _, args: seen.setdefault("in", args[0]))
    with torch.no_grad():
        model(some_images())
        hidden = seen["in"]
        for block in blocks:
            hidden = block(hidden)
    assert torch.equal(hidden, seen["out"])


# --------------------------------------------------------------------------------------------- published figures


def published(name: str) -> tuple[list[float], list[float]]:
    """Return metric and ratios (0.5, epsilon 0.2) of the model ``name`` with the weights that seed 0 gives it."""
    torch.manual_seed(0)
    parts = find_parts(timm.create_model(name, pretrained=False))
    values = measure(Measurement("alpha_mid"), parts.measured).values
    ratios = heavy_tailed(parts.pruned.layers, 0.5, values=values, epsilon=0.2, mapping_type="layer_wise")
    sizes = [matrix.weight.numel() for matrix in matrices(parts.pruned).values()]
    assert sum(r * n for r, n in zip(ratios.values(), sizes, strict=True)) == pytest.approx(0.5 * sum(sizes), rel=1e-12)
    return list(values.values()), list(ratios.values())


def near(values: list[float], tolerance: float):
    # Scaling a model by 0.9 or 1.1, which an exponent should not see, moves its float32 alphas by up to 6e-6 and its
    # ratios by up to 3e-6; another linear algebra library does no more. The published figures have six digits.
    return pytest.approx(values, abs=tolerance + 5e-7)


ALPHA, RATIO = 1e-5, 5e-6


def test_published_figures_of_deit():
    values, ratios = published("deit_tiny_patch16_224")
    assert len(values) == len(ratios) == 48
    assert [min(values), max(values), sum(values) / 48] == near([2.101373, 3.589770, 3.056628], ALPHA)
    assert values[:4] == near([3.129592, 2.128230, 3.463622, 3.534076], ALPHA)
    assert [min(ratios), max(ratios)] == near([0.357907, 0.536860], RATIO)
    assert ratios[:4] == near([0.481532, 0.361136, 0.521693, 0.530164], RATIO)


def test_published_figures_of_convnext():
    values, ratios = published("convnext_atto")
    assert (len(values), len(ratios)) == (36, 24)
    assert [min(ratios), max(ratios)] == near([0.375293, 0.562940], RATIO)
    assert ratios[:4] == near([0.394137, 0.375293, 0.434558, 0.438876], RATIO)


# ------------------------------------------------------------------------------------------------- weight files


def metas_convnext(state: dict) -> dict:
    """Return ``state`` of a timm ConvNeXt under the names of Meta's own code."""
    rules = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"^head\.fc\.", "head."),
        (r"^head\.norm\.", "norm."),
    ]
    renamed = {}
    for key, value in state.items():
        for pattern, into in rules:
            key = re.sub(pattern, into, key)
        renamed[key] = value.flatten(1) if "pwconv" in key and key.endswith("weight") else value
    return renamed


LAYOUTS = {  # what a file holds, from the model's own state
    "meta convnext, training": (
        tiny_convnext,
        lambda state: {"model": metas_convnext(state), "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {}},
    ),
    "meta convnext into 1x1": (lambda: tiny_convnext(conv_mlp=True), lambda state: {"model": metas_convnext(state)}),
    "timm convnext": (tiny_convnext, dict),
    "deit": (tiny_vit, lambda state: {"model": dict(state)}),
    "jx_vit of 21k": (tiny_vit, lambda state: state | {"pre_logits.fc.weight": torch.ones(3, 3)}),
    "timm training": (tiny_vit, lambda state: {"state_dict": dict(state), "epoch": 1}),
    "data parallel": (tiny_vit, lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_original_weight_files_give_the_same_logits(layout, tmp_path):
    make, rename = LAYOUTS[layout]
    model, images = make(), some_images()
    torch.save(rename(model.state_dict()), tmp_path / "weights.pth")
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other(images), model(images))
        fill_weights(other, tmp_path / "weights.pth")
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_safetensors_and_saved_folders_give_the_same_logits(make, tmp_path):
    model, images, emptied = make(), some_images(), make()
    save_classifier(model, 8, tmp_path / "saved")
    torch.nn.init.zeros_(emptied.get_classifier().weight)
    fill_weights(emptied, tmp_path / "saved" / "model.safetensors")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    source = locate_classifier(str(tmp_path / "saved"))
    empty, size, options = skeleton(source, None, None, None)
    with torch.no_grad():
        loaded = (emptied, by_timm, load_classifier(source, None, options))
        assert all(torch.equal(same(images), model(images)) for same in loaded)
    assert (size, empty.num_classes) == (8, 10) and [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (tiny_vit, r"fit .*for VisionTransformer: Missing .* \"norm\.bias\"\. Unexpected .* \"extra\.weight\"\.\)$"),
        (lambda: tiny_vit(patch_size=4), r"patch_embed\.proj\.weight is \[24, 3, 2, 2\] and .* \[24, 3, 4, 4\]"),
        (tiny_convnext, "do not fit"),
    ],
)
def test_keys_that_do_not_fit_are_listed(make, said, tmp_path):
    state = tiny_vit().state_dict() | {"extra.weight": torch.ones(1)}
    del state["norm.bias"]
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=said) as error:
        fill_weights(make(), tmp_path / "w.pth")
    assert "\n" not in str(error.value)


def test_another_number_of_classes_is_explained(tmp_path):
    torch.save(tiny_vit().state_dict(), tmp_path / "w.pth")
    other = tiny_vit()
    other.reset_classifier(7)
    with pytest.raises(UserError, match=r"mismatch for head\.weight.* set the model's number .* --nb_classes$"):
        fill_weights(other, tmp_path / "w.pth")


def test_positions_for_another_size_are_resampled_with_a_warning(tmp_path, caplog):
    torch.save(tiny_vit().state_dict(), tmp_path / "w.pth")
    fill_weights(tiny_vit(img_size=12), tmp_path / "w.pth")
    assert "pos_embed is [1, 17, 24] and the model's [1, 37, 24]; it is resampled" in caplog.text


def test_without_a_file_the_hub_is_asked():
    message = r"^--model deit_tiny_patch16_224: timm's weights cannot be loaded .*--resume FILE"
    with pytest.raises(UserError, match=message):  # the tests are offline
        load_classifier(locate_classifier("deit_tiny_patch16_224"), None, {})


class Sly:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code in a weight file ran')",)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.pth", b"not a checkpoint at all", "cannot be read as weights"),
        ("w.safetensors", b"not a checkpoint at all", "cannot be read as weights"),
        ("w.pth", {"model": Sly()}, "cannot be read as weights"),
        ("w.pth", {"epoch": 3}, "holds no weights"),
        ("nosuch.pth", b"", "file not found"),
    ],
)
def test_bad_weight_files(name, content, said, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "w").with_suffix(name[name.index(".") :]).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=said) as caught:
        read_weight_file(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)
