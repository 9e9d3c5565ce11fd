"""Settings of the image classifiers' command: its groups of flags, and checks for contradictions."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from image_classifiers import data, models
from image_classifiers.price import EFFORT
from lib.allocation import price
from lib.cli.flags import Flags, flag
from lib.cli.settings import CALIBRATED, AllocationFlags, MethodFlags, OutputFlags, PruningFlags
from lib.core.errors import UserError
from lib.spectra.cache import Measurement

TRAINING_FLAGS = (
    "aa auto_resume clip_grad color_jitter cutmix cutmix_minmax disable_eval dist_eval dist_on_itp dist_url drop_path "
    "enable_wandb epochs eval finetune head_init_scale layer_decay layer_scale_init_value local_rank log_dir lr min_lr "
    "mixup mixup_mode mixup_prob mixup_switch_prob model_ema model_ema_decay model_ema_eval model_ema_force_cpu "
    "model_key model_prefix momentum opt opt_betas opt_eps output_dir pin_mem project recount remode reprob resplit "
    "save_ckpt save_ckpt_freq save_ckpt_num smoothing start_epoch train_interpolation update_freq wandb_ckpt "
    "warmup_epochs warmup_steps weight_decay weight_decay_end world_size"
).split()

CALIBRATES = "calibration | search"  # Traits of a run that reads calibration images.


def redeclared(group: type[Flags], name: str, default: Any, **changes: Any) -> Any:
    """Declare the flag ``name`` of ``group`` with another default, and other ``changes`` to its declaration."""
    metadata = group.__dataclass_fields__[name].metadata | {"title": group._title} | changes
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ClassifierFlags(Flags):
    _title: ClassVar[str] = "model"

    model: str = flag(MISSING, f"name that timm knows, or a folder written by --save_model; {models.CLASSIFIERS}")
    resume: str | None = flag(None, "weights in timm's or the original layout (default: timm's own)", metavar="FILE")
    input_size: int | None = flag(None, "side of the images, pixels (default: the model's own)", least=1)
    nb_classes: int | None = flag(None, "classes of the model, a count (default: the model's own)", least=2)
    device: str = flag("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    seed: int = flag(0, "random seed for sampling calibration images", least=-(2**63), most=2**64 - 1)


@dataclass(kw_only=True)
class ImageFlags(Flags):
    _title: ClassVar[str] = "data"

    data_set: str = flag("IMNET", "{choices}; IMNET and image_folder: a folder per class", choices=data.IMAGE_SETS)
    data_path: str | None = flag(None, "IMNET: train/ and val/; image_folder: to calibrate on", metavar="DIR")
    eval_data_path: str | None = flag(None, "image_folder only: images to test on", metavar="DIR")
    nsamples: int = flag(4096, "calibration images, a count", least=1)
    published_calibration: bool = flag(False, "calibrate on augmented images, drawn with replacement", only=CALIBRATES)
    batch_size: int = flag(256, "images at a time, a count", least=1)
    num_workers: int | None = flag(None, "processes that read images (default: one per core, at most 10)", least=0)
    crop_pct: float | None = flag(None, "share of an image that is kept (default: 224/256)", least=0.1, most=1)
    imagenet_default_mean_and_std: bool = flag(True, "normalise by ImageNet's statistics; false: by 0.5 and 0.5")
    use_amp: bool = flag(False, "evaluate in half precision (autocast)", nargs="?", title="evaluation")


@dataclass(kw_only=True)
class ImageMethodFlags(MethodFlags):
    """The flags that say what a classifier is pruned by, some with other defaults."""

    _pruners: ClassVar = models.IMAGE_PRUNERS

    statistics: str = redeclared(
        PruningFlags, "statistics", "dense", only=CALIBRATED.removesuffix(" | refit"), aliases=["propagate"]
    )
    hidden_device: str | None = flag(
        None, "device of hidden states; cpu saves GPU memory", only=CALIBRATES, metavar="DEVICE", title="pruning"
    )
    ww_metric: str = redeclared(AllocationFlags, "ww_metric", "alpha_mid", only="_ww")
    ww_metric_cache: str = redeclared(
        AllocationFlags, "ww_metric_cache", "./metric_cache", help="cached in DIR/<model>", only="_ww",
        aliases=["ww_metric_cache"],
    )  # fmt: skip
    epsilon: float = redeclared(AllocationFlags, "epsilon", 0.2, help="half width of the map to sparsity, in [0, 1]")
    mapping_type: str = "layer_wise"  # a ratio for each matrix, as published


@dataclass(kw_only=True)
class ImageExperiment(ClassifierFlags, ImageFlags, ImageMethodFlags, OutputFlags):
    """The flags of image_classifiers/main.py."""

    _without: ClassVar[list[str]] = (
        "sparsity_type use_variant pruner_iterations damping refit calib_dtype mapping_type esd_driver farms "
        "farms_rows farms_ratio farms_steps price_effort metrics_only plan save_plan export_llmcompressor only "
        "drop_experts drop_by expert_weighting packed"
    ).split()
    _spelled: ClassVar[dict[str, str]] = {
        "prune_method": "prune_metric",
        "sparsity_ratio": "sparsity",
        "ww_metric": "WW_metric",
        "ww_metric_cache": "metric_cache",
        "save": "save_dir",
    }
    _ignored: ClassVar[list[str]] = TRAINING_FLAGS

    def check(self) -> None:
        super().check()
        for name, readers in data.READERS.items():
            if getattr(self, name) and self.data_set not in readers:
                fix = f"it is for --data_set {' or '.join(readers)}"
                raise UserError(name, None, f"does nothing with --data_set {self.data_set}", fix)
        self.task()

    def measurement(self, model: str) -> Measurement:
        """Return how the metric of the ``model`` is measured, and where it is cached."""
        return Measurement(self.ww_metric, Path(self.ww_metric_cache) / model)

    def price_options(self) -> price.SearchOptions:
        """Return the options of the search for prices."""
        return EFFORT._replace(steps=self.price_steps)
