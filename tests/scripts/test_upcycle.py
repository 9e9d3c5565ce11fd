"""A mixture cut from a dense model: its own logits with all experts, k-means by pencil, what the command writes."""

import re

import torch
import transformers
import upcycle


@torch.no_grad()
def test_with_all_experts_it_is_the_dense_model(tiny_model, monkeypatch):
    monkeypatch.setattr(upcycle, "SPREAD", 0.0)  # all experts count alike
    windows = torch.randint(tiny_model.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    mixture = upcycle.cut(tiny_model, windows, upcycle.Upcycling(experts=4, active=4))
    logits = [model(windows, use_cache=False).logits for model in (mixture, tiny_model)]
    # The same sums in another order.
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    inner = tiny_model.config.intermediate_size
    experts, shared = mixture.model.layers[0].mlp.experts.down_proj, mixture.config.shared_expert_intermediate_size
    assert shared >= inner / 4 and len(experts) == 4 and 4 * experts.shape[2] + shared == inner


def test_fewer_experts_are_fitted(tiny_model, monkeypatch):
    """Least squares brings the block's output closer to the dense one's than neurons that are merely left out."""
    errors, x = [], torch.randn(400, tiny_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    mlp, settings = tiny_model.model.layers[0].mlp, upcycle.Upcycling(experts=4, active=2)
    for damping in (upcycle.DAMPING, 1e9):
        monkeypatch.setattr(upcycle, "DAMPING", damping)
        mixture = upcycle.empty_mixture(tiny_model, settings).model.layers[0].mlp
        with torch.no_grad():
            upcycle.split(mlp, mixture, x, torch.Generator().manual_seed(0))
            errors.append((mixture(x[None])[0] - mlp(x)).norm() / mlp(x).norm())
    assert errors[0] < errors[1] < 1


def test_clusters_by_pencil():
    features = torch.tensor([[1, 0], [0, 2], [3, 0.1], [0.1, 1]])
    assert sorted(upcycle.clusters(features, 2, torch.Generator().manual_seed(0)).tolist()) == [[0, 2], [1, 3]]


def test_command_writes_what_transformers_reads(tiny_folder, tiny_text, tmp_path, capsys):
    flags = ["--model", str(tiny_folder), "--calib_data", str(tiny_text), "--save_model", str(tmp_path / "mixture")]
    flags += "--experts 4 --active 2 --seqlen 16 --tokens 320".split()
    assert upcycle.main(flags) == 0
    before, after = re.search(r"held-out loss: (\S+) -> (\S+), 320 tokens", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert model.config.model_type == "qwen2_moe" and model.config.num_experts_per_tok == 2
    assert upcycle.main(flags) == 2 and "already exists" in capsys.readouterr().err


def test_more_active_experts_than_there_are(capsys):
    assert upcycle.main(["--active", "9"]) == 2 and "--active 9: is more than the 8 experts" in capsys.readouterr().err
