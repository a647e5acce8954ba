"""`experts`: the odd cases: layers and experts that are not there, models that cannot grow."""

import pytest
import torch

from llm_lab.core import LabError, rng
from llm_lab.experts import upcycle, without_experts
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.llama_block import SwiGLU, llama
from llm_lab.moe import MoE, routing
from llm_lab.parts import part

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(d_model=32, n_layers=2, n_heads=2)
IDS = torch.randint(64, (2, 20), generator=rng(6, 'ids'))


def mixture():
    return MiniGPT(llama(64, **SMALL, mlp=part(MoE, n_experts=8, top_k=2)), seed=3)


def test_an_expert_that_is_left_out_is_never_chosen():
    model = mixture()
    for layer in range(2):
        for e in range(8):
            with without_experts(model, layer, e):
                assert not (routing(model, IDS)[layer]['chosen'] == e).any()


def test_two_that_leave_out_an_expert_leave_out_two():
    model = mixture()
    router = model.blocks[0].mlp.router
    with without_experts(model, 0, 1), without_experts(model, 0, 2):
        assert router.off == (1, 2)
    assert router.off == ()


def test_none_left_out_is_no_change():
    model = mixture()
    with without_experts(model, 0):
        inside = model(IDS)
    assert torch.equal(inside, model(IDS))


def test_layers_and_experts_that_are_not_there():
    model = mixture()
    for layer, experts, words in (
        (7, (0,), r'layer=7: no experts there; choose from \[0, 1\]'),
        (0, range(7), 'leave 2 of them'),
        (0, (8,), 'choose from 0 to 7'),
    ):
        with pytest.raises(LabError, match=words):
            with without_experts(model, layer, *experts):
                pass
    with pytest.raises(LabError, match='there is no Router'):
        with without_experts(MiniGPT(GPTConfig()), 0, 0):
            pass


def test_a_model_that_cannot_grow():
    dense = MiniGPT(llama(64, **SMALL), seed=3)
    with pytest.raises(LabError, match='does not fit an MLP of the model'):
        upcycle(dense, part(MoE, expert=part(SwiGLU, d_ff=8)))
    grown = upcycle(dense, part(MoE, n_experts=4, expert=dense.cfg.mlp))
    with pytest.raises(LabError, match='this model has experts already'):
        upcycle(grown, part(MoE))
