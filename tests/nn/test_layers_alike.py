"""Similarity of layers against transformers' own outputs, invariants, and the choice of layers."""

from __future__ import annotations

from dataclasses import replace
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, tiny_model

from effbench.nn.pruning.slicing import Kept, KeptLayer, slice_model
from effbench.nn.sharing.ranking import block_ends, count_of, gap_cut, ranking, scores
from effbench.nn.sharing.similarity import cosines, layer_similarity
from effbench.report.layer_similarity import Layers, conclusions, heat_map, layers_table
from effbench.util.errors import UserError

FOUR = replace(SHAPE, num_layers=4)


def model_of(seed: int = 0) -> Any:
    return tiny_model(seed=seed, shape=FOUR).eval()


def text(seed: int = 0, length: int = 24) -> torch.Tensor:
    return torch.randint(3, SHAPE.vocab_size, (length,), generator=torch.manual_seed(seed))


# -- what is measured --------------------------------------------------------------------------


@torch.no_grad()
def test_maps_and_states_are_those_of_transformers() -> None:
    model, ids = model_of(), text()
    found = layer_similarity(model, ids)
    model.set_attn_implementation("eager")
    whole = model(ids[None], output_attentions=True, output_hidden_states=True)
    flat = torch.stack([a.double().flatten() for a in whole.attentions])
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(found.attention.double(), expected, atol=1e-6, rtol=0)
    states = torch.stack(whole.hidden_states[:-1]).double()[:, 0]  # the last one is normed
    cosine = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    for i in range(3):
        assert float(found.passed[i]) == pytest.approx(float(cosine[i, i + 1].mean()), abs=1e-6)
    angles = (cosine.clamp(-1, 1).acos() / pi).mean(-1)
    torch.testing.assert_close(found.distances[:4, :4].double(), angles, atol=2e-4, rtol=0)


@torch.no_grad()
def test_keys_and_values_are_compared_by_linear_cka() -> None:
    model, ids = model_of(), text()
    found = layer_similarity(model, ids)
    cache = model(ids[None], use_cache=True).past_key_values
    for name in ("keys", "values"):
        rows = [
            getattr(layer, name)[0].transpose(0, 1).flatten(1).double() for layer in cache.layers
        ]
        rows = [r - r.mean(0) for r in rows]
        for i, x in enumerate(rows):
            for j, y in enumerate(rows):
                cka = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
                assert float(getattr(found, name)[i, j]) == pytest.approx(float(cka), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_symmetric_in_bounds_and_one_on_the_diagonal(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    found = layer_similarity(model, text())
    for matrix in (found.attention, found.keys, found.values):
        assert matrix.equal(matrix.T)
        assert matrix.diagonal().equal(torch.ones(4))
        assert float(matrix.min()) >= 0
        assert float(matrix.max()) <= 1
        assert 0 < float(matrix[0, 1]) < 1
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_layers_with_equal_inputs_queries_and_keys_are_one() -> None:
    model = model_of()
    first, second = model.model.layers[1:3]
    for linear in (first.self_attn.o_proj, first.mlp.down_proj):
        linear.weight.zero_()
    for name in ("q_proj", "k_proj"):
        getattr(second.self_attn, name).weight.copy_(getattr(first.self_attn, name).weight)
    found = layer_similarity(model, text())
    assert float(found.attention[1, 2]) == pytest.approx(1, abs=1e-6)
    assert float(found.keys[1, 2]) == pytest.approx(1, abs=1e-6)
    assert float(found.values[1, 2]) < 0.99
    assert float(found.passed[1]) == pytest.approx(1, abs=1e-6)
    assert ranking(found.attention.tolist())[0] == 2


def test_layers_that_cannot_share_have_nothing_in_common() -> None:
    model = tiny_model(shape=replace(SHAPE, num_layers=3)).eval()
    groups = [torch.arange(2), torch.arange(1), torch.arange(0)]
    kept = [KeptLayer(torch.arange(2 * len(g)), g, torch.arange(128)) for g in groups]
    found = layer_similarity(slice_model(model, Kept(torch.arange(64), tuple(kept))), text())
    assert found.attention.equal(torch.eye(3))
    assert float(found.values[0, 1]) > 0  # CKA compares representations of any width
    assert found.values[2].tolist() == [0, 0, 1]


def test_a_model_that_hides_its_attention_is_refused() -> None:
    model = model_of()
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UserError, match="does not show its attention"):
        layer_similarity(model, text())


def test_absent_vectors_have_no_cosine() -> None:
    assert cosines([None, torch.ones(3), torch.ones(3)]).tolist() == [
        [1, 0, 0],
        [0, 1, 1],
        [0, 1, 1],
    ]


# -- what follows from it ----------------------------------------------------------------------


def test_scores_leave_the_layer_itself_out() -> None:
    assert scores([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]]) == pytest.approx([0.3, 0.4, 0.2])


def test_the_largest_gap_leaves_a_prefix_and_a_suffix() -> None:
    cut = gap_cut([0.1, 0.12, 0.5, 0.55, 0.15, 0.6, 0.52, 0.11])
    assert (cut.first, cut.stop, cut.odd) == (2, 7, (4,))
    assert cut.gap == pytest.approx(0.35)
    all_inside = gap_cut([0.5, 0.1, 0.5])
    assert (all_inside.first, all_inside.stop, all_inside.odd) == (0, 3, (1,))


def test_a_run_of_shared_layers_ends_a_block() -> None:
    assert block_ends([2, 5, 4, 3, 7]) == (5, 7)
    assert block_ends([]) == ()


def test_the_ranking_shares_the_most_similar_layer_next() -> None:
    matrix = [
        [1.0, 0.2, 0.1, 0.1, 0.1],
        [0.2, 1.0, 0.9, 0.3, 0.2],
        [0.1, 0.9, 1.0, 0.8, 0.4],
        [0.1, 0.3, 0.8, 1.0, 0.5],
        [0.1, 0.2, 0.4, 0.5, 1.0],
    ]
    # After layer 2, layer 3 would have layer 1 as its source, which it is little like.
    assert ranking(matrix) == [2, 3, 1]
    assert ranking(matrix, keep_first=2, keep_last=0) == [2, 4, 3]
    assert ranking(matrix, keep_first=5) == []


def test_a_share_is_rounded_to_layers() -> None:
    assert [count_of(r, 22) for r in (0, 0.23, 0.41, 0.77)] == [0, 5, 9, 17]


# -- what is shown -----------------------------------------------------------------------------


def rows() -> Layers:
    matrix = [[1.0, 0.2, 0.1], [0.2, 1.0, 0.9], [0.1, 0.9, 1.0]]
    return Layers(
        [
            {
                "layer": i,
                "score": [scores(matrix)[i], None, None],
                "influence": [(0.5, 0.1, 0.3)[i], 0.05, 0.6],
                "attention": matrix[i],
                "keys": matrix[i],
                "values": matrix[i],
                "distances": [[0.5, 0.5, 0.6], [0.1, 0.4], [0.3]][i],
            }
            for i in range(3)
        ]
    )


def test_table_conclusions_and_heat_map(tmp_path: Path) -> None:
    found = rows()
    table = layers_table(found)
    assert [row[0] for row in table.rows] == [0, 1, 2]
    assert [row[-1] for row in table.rows] == ["", "band", "band"]
    assert table.rows[2][2] == 0.9
    lines = conclusions(found, 0.34, ["model=tiny", "evaluator.similarity.tokens=8"])
    assert "layers 1 to 2 make the inner band; outside it: 0." in lines[0]
    assert "To drop, best first: 1, 2, 0" in lines
    assert "The 1 layers in a row that turn their input least are 1 to 1: 0.100 pi." in lines
    assert found.block(2) == (1, 0.4)
    for line in lines:
        assert not line.startswith("effbench") or line.endswith("model=tiny")
    drawn = heat_map(found, tmp_path / "map.svg", "tiny").read_text()
    assert "<!-- 2 -->" in drawn and "<!-- 0.5 -->" not in drawn, "there is no half a layer"
    with pytest.raises(UserError, match="not a kind of picture"):
        heat_map(found, tmp_path / "map.doc")


def test_the_command_measures_shows_and_draws(cli: Any, inline: list[int], tmp_path: Path) -> None:
    words = ["model=tiny", "dataset=arithmetic", "run.results=r", "run.progress=false"]
    words += ["evaluator.similarity.tokens=8", "evaluator.similarity.samples=3"]
    status, out, err = cli("similarity", *words, "--ratio", "0.5")
    assert (status, inline) == (0, [0])
    assert "To share attention, best first" in out and "influence" in out
    assert "Heat map: r/runs/" in err
    status, again, _ = cli("similarity", *words, "--ratio", "0.5", "--plot", "map.png")
    assert (status, inline, again) == (0, [0], out)
    assert (tmp_path / "map.png").is_file()
