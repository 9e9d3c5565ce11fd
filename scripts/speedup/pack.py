"""A pruned checkpoint becomes a small one, a bit per weight and the values other than zero, and comes back exactly."""

import argparse
import hashlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from checkpoints import Parser, check_free, check_sparse, command, open_checkpoint, written_folder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import UserError, results

# Not a name that transformers looks for: it would fill the weights that it does not find with random numbers.
SUFFIX = ".packed.safetensors"
KEY = "bitmask"  # of the file's metadata: what the tensors were
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as integers of its own width: -0.0 is no zero here, and every NaN keeps its payload."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a bit per entry (uint8, row by row, first entry highest) and the entries whose bits are not all zero.

    None where that would not be smaller than the tensor itself.
    """
    flat = _bits(tensor).flatten()
    kept = flat != 0
    size = int(kept.sum()) * tensor.element_size() + (flat.numel() + 7) // 8
    if size >= tensor.nbytes:
        return None
    return torch.from_numpy(np.packbits(kept.numpy())), flat[kept].view(tensor.dtype)


def unpack(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Return the tensor that ``pack`` was given; a mask and values that do not belong together are a ValueError."""
    count = int(np.prod(shape))
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=count).astype(bool))
    if int(kept.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for {int(kept.sum())} places")
    flat = torch.zeros(count, dtype=BITS[values.element_size()])
    flat[kept] = _bits(values)
    return flat.view(values.dtype).reshape(shape)


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's kind, shape and bits."""
    about = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return hashlib.sha256(about + _bits(tensor).numpy().tobytes()).hexdigest()


def _pack_file(source: Path, target: Path) -> Counter:
    """Write the packed form of one file; return its bytes before and after, and those of the tensors with a mask."""
    packed, about, size = {}, {}, Counter()
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
        for name in file.keys():
            tensor = file.get_tensor(name)
            about[name] = {"shape": list(tensor.shape), "sha256": digest(tensor)}
            parts = pack(tensor)
            if parts is None:
                packed[name] = tensor
                continue
            packed[f"{name}.mask"], packed[f"{name}.values"] = parts
            size.update(masked=tensor.nbytes, masked_after=sum(part.nbytes for part in parts))
    save_file(packed, target, metadata | {KEY: json.dumps(about)})
    size.update(all=source.stat().st_size, all_after=target.stat().st_size)
    return size


def _unpack_file(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a packed file and its metadata, every tensor checked against its hash."""
    tensors = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {}
        names = set(file.keys())
        for name, about in json.loads(metadata.pop(KEY, "{}")).items():
            parts = [name] if name in names else [f"{name}.mask", f"{name}.values"]
            parts = [file.get_tensor(part) for part in parts]
            try:
                tensors[name] = parts[0] if len(parts) == 1 else unpack(*parts, about["shape"])
                same = digest(tensors[name]) == about["sha256"]
            except ValueError:
                same = False
            if not same:
                raise UserError(f"{source}: {name} is not what was packed (its SHA-256 differs); the file is damaged")
    return tensors, metadata


def _copy_others(source: Path, target: Path) -> None:
    """Copy config, tokenizer and what else is no weight; not subfolders, such as an export of the weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, target)


def _weights(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffix))


def pack_folder(folder: Path, out: Path) -> Counter:
    """Write the packed form of a model's ``folder`` to ``out``; return bytes before and after, as ``_pack_file`` does.

    What was written is unpacked again and compared with the hashes before ``out`` appears.
    """
    files = _weights(folder, ".safetensors")
    results.prepare("--out", out.parent, sum(path.stat().st_size for path in files))
    size = Counter()
    with written_folder(out) as tmp:
        for path in files:
            target = tmp / path.name.replace(".safetensors", SUFFIX)
            size += _pack_file(path, target)
            _unpack_file(target)
        _copy_others(folder, tmp)
    return size


def unpack_folder(folder: Path, out: Path) -> int:
    """Write the model packed in ``folder`` to ``out``, every tensor bit for bit; return how many there are."""
    files = _weights(folder, SUFFIX) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: holds no *{SUFFIX}; give a folder that pack.py wrote")
    count = 0
    with written_folder(out) as tmp:
        for path in files:
            tensors, metadata = _unpack_file(path)
            count += len(tensors)
            save_file(tensors, tmp / path.name.replace(SUFFIX, ".safetensors"), metadata)
        _copy_others(folder, tmp)
    return count


def report(folder: Path, out: Path, sparsity: float) -> str:
    """Pack ``folder`` and return the lines on what was reached."""
    size = pack_folder(folder, out)
    return (
        f"{out}: {size['all_after'] / 1e6:.1f} MB, {size['all_after'] / size['all']:.4f} of {folder}'s "
        f"{size['all'] / 1e6:.1f} MB; every tensor comes back bit for bit (SHA-256)\n"
        f"  the tensors with zeros alone: {size['masked_after'] / size['masked']:.4f} of "
        f"{size['masked'] / 1e6:.1f} MB, at a sparsity of {sparsity:.4f} in the blocks"
    )


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_free("--out", out)
    if args.unpack:
        if args.format != "bitmask":
            raise UserError(f"--unpack with --format {args.format}: the packed folder says how; leave --format out")
        print(f"{out}: {unpack_folder(Path(args.model), out)} tensors, each with the SHA-256 of what was packed")
        return
    if args.format == "2of4":
        import two_of_four

        two_of_four.check_device()
    checkpoint = open_checkpoint(args.model)
    check_sparse(checkpoint, "prune it first: python main.py --prune_method ... --save_model DIR")
    if args.format == "2of4":
        found = two_of_four.measure(checkpoint)
    # Two of four and the mask's bit for each are as small as two numbers with their places: one container for both.
    print(report(checkpoint.folder, out, checkpoint.sparsity))
    if args.format == "2of4":
        two_of_four.leave(found, checkpoint, out)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="pack.py", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a pruned model; with --unpack: a folder that pack.py wrote")
    add("--out", required=True, metavar="DIR", help="folder to write; must not be there yet")
    add("--unpack", action="store_true", help="the other way: write the model again, every tensor bit for bit")
    add("--format", default="bitmask", choices=["bitmask", "2of4"],
        help="bitmask: any zeros; 2of4: a 2:4 model on a CUDA device, packed and timed against dense")  # fmt: skip
    return command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
