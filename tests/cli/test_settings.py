"""Settings of main.py: traits of a run, the flags that do nothing, and what published command lines may contain."""

import pytest
from conftest import settings

from lib.core.errors import UserError

RUN = "--model m --prune_method"


@pytest.mark.parametrize(
    ("flags", "traits"),
    [
        ("--model m", {"uniform", "evaluation"}),
        ("--model m --metrics_only", {"_ww"}),
        (f"{RUN} magnitude --sparsity_ratio 0.5 --eval_wikitext false", {"uniform", "pruning", "magnitude"}),
        (f"{RUN} magnitude --sparsity_ratio 0.5 --refit 2", {"uniform", "pruning", "calibration", "refit"}),
        (f"{RUN} wanda_ww --sparsity_ratio 0.5 --epsilon auto", {"_ww", "pruning", "wanda", "calibration", "search"}),
        (f"{RUN} magnitude_owl --sparsity_ratio 0.5", {"_owl", "pruning", "magnitude", "calibration"}),
        (f"{RUN} magnitude_price --sparsity_ratio 0.5", {"_price", "pruning", "search"}),
    ],
)
def test_traits_of_a_run(flags, traits):
    named = {"uniform", "evaluation", "pruning", "calibration", "search", "_ww", "_owl", "_price"}
    found = settings(flags).traits()
    assert found >= traits and found & named <= traits | {"evaluation"}


def test_published_flags_of_ww_do_nothing_with_a_uniform_method_and_are_accepted():
    published = "--ww_metric alpha_mid --ww_metric_cache data/m --epsilon 0.2 --mapping_type layer_wise"
    assert settings(f"{RUN} wanda --sparsity_ratio 0.5 {published}").task().allocation == ""
    assert settings(f"--model m {published}").task().method == "dense"
    for flag in ("--ww_metric alpha_mid", "--epsilon 0.2", "--mapping_type layer_wise"):
        with pytest.raises(UserError, match="does nothing with wanda_owl; it is for the methods with _ww"):
            settings(f"{RUN} wanda_owl --sparsity_ratio 0.5 {flag}")
