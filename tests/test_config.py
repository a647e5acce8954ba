"What a config may say is what there is: the words of optimizers, schedules, the keys of a model."

from dataclasses import MISSING, fields

from llm_lab.config import ModelConfig, TrainConfig
from llm_lab.efficient import PRECISIONS
from llm_lab.gpt import GPTConfig
from llm_lab.optim import OPTIMIZERS, SCHEDULES

BRIEFLY = ('block', 'n_kv_heads')  # short for recipes
DECIDED = ('vocab_size', 'max_len')  # by the data


def test_the_words_of_the_keys_are_those_that_exist():
    words = {f.name: f.metadata.get('of') for f in fields(TrainConfig)}
    assert {*words['optimizer']} == {*OPTIMIZERS}
    assert {*words['schedule']} == {*SCHEDULES}
    assert {*words['precision']} == {*PRECISIONS, 'auto'}


def test_the_keys_of_a_model_are_those_of_its_configuration():
    mine = [f.name for f in fields(ModelConfig) if f.name not in BRIEFLY]
    assert mine == [f.name for f in fields(GPTConfig) if f.name not in DECIDED]


def test_sizes_have_the_same_defaults():
    sizes = {
        f.name: f.default
        for f in fields(ModelConfig)
        if f.default not in (None, MISSING) and f.name not in BRIEFLY
    }
    assert sizes == {k: getattr(GPTConfig(), k) for k in sizes}
    assert {'d_model', 'n_layers', 'n_heads', 'dropout', 'tie'} == {*sizes}
