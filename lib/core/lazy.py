"""Lazy imports of libraries that load slowly, so that --help is answered immediately."""

from importlib import import_module


class Lazy:
    """A module that is imported on first use of one of its names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(import_module(self._name), attribute)


accelerate = Lazy("accelerate")
numpy = Lazy("numpy")
pandas = Lazy("pandas")
peft = Lazy("peft")
timm = Lazy("timm")
torch = Lazy("torch")
torchvision = Lazy("torchvision")
transformers = Lazy("transformers")
