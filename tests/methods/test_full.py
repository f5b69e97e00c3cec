from helpers import SHAPE, adamw, counted, prepared, stated, tiny_model, train

from effbench.methods.chain import chain_cost
from effbench.methods.full import Full


def test_everything_trains_from_float32_masters():
    model, ctx = prepared(Full())
    assert Full().weights == "float32"
    assert all(p.requires_grad for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(Full(), model, ctx, 8, adamw(model, lr=1e-3), same_batch=True)
    assert losses[-1] < losses[0] - 0.1
    assert all(not before[n].equal(p) for n, p in model.named_parameters())


def test_cost_is_what_is_counted():
    model, _ = prepared(Full())
    assert stated(Full()) == counted(model)
    bytes_held = [
        chain_cost([Full()], SHAPE, dtype).resident_bytes for dtype in ("bfloat16", "float32")
    ]
    assert bytes_held == [4 * SHAPE.params] * 2


def test_save_and_load_give_the_same_weights(tmp_path):
    model, ctx = prepared(Full())
    train(Full(), model, ctx, 1)
    Full().save(model, tmp_path)
    again = Full().load(tiny_model(seed=3), tmp_path, ctx)
    assert all(p.equal(dict(again.named_parameters())[n]) for n, p in model.named_parameters())
