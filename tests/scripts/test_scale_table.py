"""Table of what large models need: parameters, memory and operations against figures worked out by hand."""

import pytest

from scripts import scale_table

SETTINGS = scale_table.Table(nsamples=2, seqlen=8)


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], scale_table.Needs]:
    return {(row.size, row.method): row for size in ("7B", "70B") for row in scale_table.needs(size, SETTINGS)}


def test_weights_are_those_of_the_published_models(rows):
    assert rows["7B", "wanda"].weights == 2 * 6_738_415_616  # parameters of Llama 2
    assert rows["70B", "wanda"].weights == 2 * 68_976_648_192


def test_operations_by_hand():
    # One block of q k v o [2, 2], gate up [3, 2], down [2, 3]: 16 + 12 + 6 = 34 weights; 5 tokens, two passes.
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (2, 2))
    shapes |= {"gate_proj": (3, 2), "up_proj": (3, 2), "down_proj": (2, 3)}
    passes = 2 * 5 * 2 * 34
    assert scale_table.work(shapes, 1, "magnitude", 5) == 0
    assert scale_table.work(shapes, 1, "wanda", 5) == passes and scale_table.work(shapes, 3, "wanda", 5) == 3 * passes
    hessians = 2 * 5 * (4 + 4 + 4 + 9)
    factors = 2 / 3 * (8 + 8 + 8 + 27)  # Cholesky and inverse of each
    solves = 6 * 4 + 2 * 4 + 6 * 4 + 2 * 9
    assert scale_table.work(shapes, 1, "sparsegpt", 5) == pytest.approx(passes + hessians + factors + solves)


def test_more_work_and_memory_for_what_is_more(rows):
    for size in ("7B", "70B"):
        one = {method: rows[size, method] for method in scale_table.METHODS}
        assert one["wanda"].work < one["sparsegpt"].work < one["alps"].work
        assert one["wanda"].gpu < one["sparsegpt"].gpu < one["wanda_price"].gpu
        assert one["sparsegpt"].streamed < one["sparsegpt"].gpu and one["wanda_price"].streamed is None
        assert one["magnitude"].hidden == 0 and one["wanda"].hidden == 2 * 16 * scale_table.SIZES[size][0]


def test_command_prints_hours_at_the_given_rate(capsys):
    assert scale_table.main(["--tflops", "1000", "--nsamples", "128", "--seqlen", "2048"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 70B | wanda |"))
    work, hours = (float(cell) for cell in line.split("|")[-3:-1])
    assert hours == pytest.approx(work / 3600, rel=0.05)  # PFLOP at 1 PFLOP/s; two digits
