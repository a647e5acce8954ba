"""`lora`: models of all kinds with adapters, what moves and what must not, merging, files, and
equality with peft."""

import copy
import json
from functools import partial

import pytest
import torch
from helpers import near, one_line, printed, shake, shaken, tiny_model
from torch import nn

from llm_lab.chars import CharTokenizer
from llm_lab.chat import add_marks
from llm_lab.conversations import Chat
from llm_lab.config import check_resumable, config_from_dict, read_config
from llm_lab.core import rng
from llm_lab.efficient import StepRunner, apply_activation_checkpointing
from llm_lab.experts import active_params
from llm_lab.gpt import MLP, GPTConfig, MiniGPT
from llm_lab.gqa import GQA
from llm_lab.inference import bytes_per_token, for_inference
from llm_lab.init import spectral_init
from llm_lab.kv_cache import complete, with_kv_cache
from llm_lab.llama_block import SoftcapHead, llama
from llm_lab.lora import (
    LoRAExperts,
    LoRALinear,
    add_lora,
    base_sha256,
    base_state,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    train_rows,
    without_lora,
)
from llm_lab.moe import MoE, Router, moe_reference, sigmoid_top_k
from llm_lab.optim import muon, sgd
from llm_lab.package import load, require_faithful, save
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.runs import train_run
from llm_lab.train import adamw, fit, next_token_loss, train_step

pytestmark = pytest.mark.usefixtures('one_thread')

SIZED = dict(vocab_size=40, d_model=16, n_heads=4, n_layers=2, max_len=24)
IDS = torch.randint(40, (3, 20), generator=rng(0, 'ids'))
LETTERS = CharTokenizer(''.join(sorted({*'\n<|endoftext|>'})) + ''.join(map(chr, range(65, 94))))
EXPERTS = part(MoE, n_experts=4, top_k=2)
BALANCED = part(MoE, n_experts=4, router=part(Router, choose=part(sigmoid_top_k), bias_rate=0.1))
KINDS = dict(
    gpt=GPTConfig(**SIZED),
    tied=GPTConfig(**SIZED, tie=True),
    llama=llama(**SIZED),
    gqa=llama(**SIZED, attn=part(GQA, n_kv_heads=2, transforms=(part(RoPE),))),
    softcap=llama(**SIZED, lm_head=part(SoftcapHead, cap=5.0)),
    moe=llama(**SIZED, mlp=EXPERTS),
    biased_experts=GPTConfig(**SIZED, mlp=part(MoE, n_experts=4, expert=part(MLP, d_ff=24))),
    shared_expert=llama(**SIZED, mlp=part(MoE, n_experts=3, shared=1)),
    balanced=llama(**SIZED, mlp=BALANCED),
)
every_kind = pytest.mark.parametrize('kind', KINDS)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids)


def adapted(kind='llama', rank=3, **kw):
    "A shaken model with adapters that are shaken, too: B is not zero"
    model = add_lora(shaken(KINDS[kind]), rank, **kw)
    draw = rng(5, 'adapters')
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return model


def bits_of(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def batch(step):
    return torch.randint(40, (2, 21), generator=rng(step, 'rows'))


# ---- the same function at first, merged and taken off


@every_kind
def test_it_begins_as_the_model_that_it_is_put_on(kind):
    model = shaken(KINDS[kind])
    before = logits(model)
    assert torch.equal(logits(add_lora(model)), before)
    assert any(isinstance(m, LoRALinear) for m in model.modules())


@every_kind
def test_merged_is_unmerged_and_a_package_comes_back(kind, tmp_path):
    model = adapted(kind)
    train_rows(model, [3, 7])
    with torch.no_grad():
        for m in lora_parameters(model)[:2]:
            m.add_(1.0)
    want = logits(model)
    merged = merge_lora(model)
    near(logits(merged), want)
    assert not torch.allclose(logits(merged), logits(shaken(KINDS[kind])), atol=1e-2)
    require_faithful(merged)
    assert merged.cfg == model.cfg and all(p.requires_grad for p in merged.parameters())
    assert torch.equal(logits(model), want)  # a copy: the model itself is as it was


@every_kind
def test_taken_off_and_switched_off_it_is_the_old_model(kind):
    plain = shaken(KINDS[kind])
    model = train_rows(adapted(kind), [0, 39])
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(0.1)
    changed = logits(model)
    with without_lora(model):
        assert torch.equal(logits(model), logits(plain))
        with without_lora(model):
            pass
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), changed)
    assert remove_lora(model) is model
    require_faithful(model)
    for name, t in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    assert (model.lm_head.weight is model.tok.weight) == model.cfg.tie


def test_an_error_within_switches_them_on_again():
    model = adapted()
    want = logits(model)
    with pytest.raises(RuntimeError), without_lora(model):
        raise RuntimeError
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize('kind', ['llama', 'gqa', 'moe'])
def test_merged_weights_survive_hugging_face(kind, tmp_path):
    hub = pytest.importorskip('llm_lab.hub')
    cfg = KINDS[kind]
    if kind == 'moe':
        quiet = part(Router, z=0.0)  # Mixtral's files have no word for it
        cfg = llama(**SIZED, mlp=part(MoE, n_experts=4, router=quiet))
    model = add_lora(shaken(cfg), 3)
    shake(model)
    back = hub.from_hf(hub.to_hf(tmp_path / 'hf', merge_lora(model))).model
    near(logits(back), logits(model))


def test_an_update_is_added_in_float32():
    model = adapted().bfloat16()
    layer = model.blocks[0].attn.qkv
    W, A, B = (t.detach().double() for t in (layer.base.weight, layer.A, layer.B))
    want = W + 16 / 3 * B @ A
    assert layer.merged().dtype == torch.bfloat16
    assert torch.equal(layer.merged(), want.float().bfloat16())


def test_each_expert_has_an_adapter_of_its_own():
    model = adapted('biased_experts')
    moe = model.blocks[1].mlp
    assert type(moe.experts.up) is LoRAExperts and moe.experts.up.A.shape == (4, 3, 16)
    x = torch.randn(2, 9, 16, generator=rng(1, 'x'))
    with torch.no_grad():
        want = moe_reference(merge_lora(model).blocks[1].mlp, x)
        near(moe(x), want)
        moe.experts.up.A[2] += 1.0  # only tokens of expert 2 may notice
        chosen = moe.router(x.flatten(0, 1))[1]
        moved = (moe(x) - want).flatten(0, 1).abs().amax(1) > 1e-4
    assert torch.equal(moved, (chosen == 2).any(1)) and moved.any() and not moved.all()


def test_what_a_token_reads_of_the_experts():
    plain, model = shaken(KINDS['moe']), adapted('moe')
    more = sum(p.numel() for p in lora_parameters(model))
    assert 0 < bytes_per_token(model) - bytes_per_token(plain) < 4 * more
    assert active_params(model) > active_params(plain)


# ---- what moves


OPTIMIZERS = dict(
    adamw=partial(adamw, lr=0.02, weight_decay=0.5),
    muon=partial(muon, lr=0.02, weight_decay=0.5),
    sgd=partial(sgd, lr=0.5, weight_decay=0.1, momentum=0.9),
)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('kind', ['gpt', 'tied', 'softcap', 'balanced'])
def test_only_adapters_and_rows_move_by_a_bit(kind, optimizer):
    model = train_rows(add_lora(shaken(KINDS[kind]), 2), [39, 5])
    before = bits_of(model)
    table, head = model.tok.weight.detach().clone(), model.lm_head.weight.detach().clone()
    made = OPTIMIZERS[optimizer](model)
    fit(model, batch, steps=4, optimizer=made)
    trained = {id(p) for p in lora_parameters(model)}
    for name, t in model.state_dict(keep_vars=True).items():
        is_bias_of_router = name.endswith('router.bias')
        moved = not torch.equal(before[name], t)
        assert moved == (id(t) in trained or is_bias_of_router), name
    for weight, old in ((model.tok.weight, table), (model.lm_head.weight, head)):
        assert (weight != old).any(1).nonzero()[:, 0].tolist() == [5, 39]
    assert {id(p) for p in made.state if made.state[p]} <= trained  # no state for frozen ones
    fit(merge_lora(model), batch, steps=1)  # all is trained again


def test_rows_and_adapters_in_either_order():
    one = add_lora(train_rows(shaken(KINDS['tied']), [1, 2]), 2)
    two = train_rows(add_lora(shaken(KINDS['tied']), 2), torch.tensor([2, 1, 1]))
    for model in (one, two):
        fit(model, batch, steps=2)
    assert torch.equal(logits(one), logits(two))
    assert len({id(p) for p in lora_parameters(one)}) == len(lora_parameters(one)) == 17


def test_rows_alone_freeze_the_tables_only():
    model = train_rows(shaken(KINDS['gpt']), [4])
    before = bits_of(model)
    fit(model, batch, steps=2)
    after = model.state_dict()
    still = {name for name in after if torch.equal(before[name], after[name])}
    tables = {
        f'{m}.parametrizations.weight.{t}'
        for m in ('tok', 'lm_head')
        for t in ('original', '0.ids')
    }
    assert still == tables
    near(logits(merge_lora(model)), logits(model))


def test_a_zero_b_learns_and_the_first_a_depends_on_seed_and_name():
    model = add_lora(shaken(KINDS['llama']), 2)
    same = add_lora(shaken(KINDS['llama']), 2, targets='qkv')
    other = add_lora(shaken(KINDS['llama']), 2, seed=1)
    first = model.blocks[1].attn.qkv
    assert torch.equal(first.A, same.blocks[1].attn.qkv.A)
    assert not torch.equal(first.A, other.blocks[1].attn.qkv.A)
    assert not torch.equal(first.A, model.blocks[0].attn.qkv.A)
    assert not first.B.any()
    train_step(model, adamw(model), batch(0))
    assert all(m.B.any() for m in model.modules() if isinstance(m, LoRALinear))


def test_dropout_is_for_training_and_comes_from_the_generator_that_runs_keep():
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(adapted()))
    model.train()
    torch.manual_seed(0)
    one, other = model(IDS), model(IDS)
    torch.manual_seed(0)
    assert torch.equal(model(IDS), one) and not torch.equal(one, other)


# ---- with everything else


def test_a_cache_and_the_fast_form_write_the_same():
    model = train_rows(adapted('gqa'), [6])
    near(logits(with_kv_cache(model)), logits(model))
    fast, merged = for_inference(model), for_inference(merge_lora(model))
    for form in (fast, merged):
        with torch.no_grad():
            near(form(IDS), logits(model), 1e-4)


@pytest.mark.parametrize('kind', ['gpt', 'moe'])
def test_recomputed_activations_give_the_same_gradients(kind):
    grads = []
    for on in (False, True):
        model = apply_activation_checkpointing(adapted(kind).train(), on)
        loss = next_token_loss(model, IDS)
        loss.backward()
        grads.append([p.grad.clone() for p in lora_parameters(model)])
        assert not [
            n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad
        ]
    for a, b in zip(*grads):
        near(a, b)
        assert a.abs().sum() > 0


@pytest.mark.parametrize('kind', ['llama', 'moe'])
def test_bf16_autocast_trains(kind):
    model = add_lora(shaken(KINDS[kind]), 2)
    before = logits(model)
    state = fit(model, batch, steps=3, lr=0.02, step_fn=StepRunner(accumulate=2, precision='bf16'))
    assert state.step == 3 and not torch.allclose(logits(model), before, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_compiled_it_computes_the_same():
    model = train_rows(adapted(), [2])
    fast = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        near(fast(IDS), model(IDS))
        with without_lora(model):
            near(fast(IDS), model(IDS))


def test_a_layer_in_two_places_has_one_adapter(tmp_path):
    model = shaken(KINDS['gpt'])
    model.blocks[1].mlp.up = model.blocks[0].mlp.up
    add_lora(model, 2)
    assert model.blocks[1].mlp.up is model.blocks[0].mlp.up
    shake(model)
    near(logits(merge_lora(model)), logits(model))
    plain = remove_lora(copy.deepcopy(model))
    assert [*base_state(model)] == [*plain.state_dict()]
    again = load_lora(save_lora(tmp_path / 'a', model), plain)
    assert torch.equal(logits(again), logits(model))


def test_models_of_other_libraries_are_adapted_by_their_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    add_lora(model, 1, targets='2')
    assert isinstance(model[2], LoRALinear) and type(model[0]) is nn.Linear
    shake(model)
    x = torch.randn(5, 3, generator=rng(0, 'x'))
    near(merge_lora(model)(x), model(x))


# ---- files


@pytest.mark.parametrize('kind', ['tied', 'balanced', 'softcap'])
def test_saved_adapters_come_back(kind, tmp_path):
    model = train_rows(add_lora(shaken(KINDS[kind]), 2, alpha=3, dropout=0.1, targets='mlp'), [9])
    known = base_sha256(shaken(KINDS[kind]))
    assert base_sha256(model) == known
    fit(model, batch, steps=3)
    assert base_sha256(model) == known
    for _ in range(2):  # the second time over the first
        save_lora(tmp_path / 'adapters', model)
    assert {p.name for p in (tmp_path / 'adapters').iterdir()} == {
        'adapters.safetensors',
        'manifest.json',
    }
    again = load_lora(tmp_path / 'adapters', shaken(KINDS[kind]))
    assert torch.equal(logits(again), logits(model))
    assert [*again.state_dict()] == [*model.state_dict()]
    assert again.blocks[0].mlp is not model.blocks[0].mlp
    drops = {m.drop.p for m in again.modules() if isinstance(m, LoRALinear)}
    assert drops == {0.1}


def test_another_base_is_refused_and_left_as_it_is(tmp_path):
    save_lora(tmp_path / 'a', adapted())
    other = shaken(KINDS['llama'])
    with torch.no_grad():
        other.norm.weight[3] += 1e-6  # a single bit or two
    before = bits_of(other)
    one_line(lambda: load_lora(tmp_path / 'a', other), 'other weights', 'SHA-256', 'add_lora')
    one_line(lambda: load_lora(tmp_path / 'a', shaken(KINDS['gpt'])), 'other weights')
    assert before.keys() == other.state_dict().keys()
    one_line(lambda: load_lora(tmp_path / 'a', adapted()), 'has adapters already')


def test_a_changed_file_is_refused(tmp_path):
    folder = save_lora(tmp_path / 'a', adapted())
    file = folder / 'adapters.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = shaken(KINDS['llama'])
    one_line(lambda: load_lora(folder, model), 'wrong hash')
    said = json.loads((folder / 'manifest.json').read_text())
    said['lora']['rank'] = 4
    (folder / 'manifest.json').write_text(json.dumps(said))
    one_line(lambda: load_lora(folder, model), 'was changed')
    (folder / 'manifest.json').unlink()
    one_line(lambda: load_lora(folder, model), 'manifest.json')
    assert not lora_parameters(model)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(rank=4),
        dict(layers=[]),
        dict(layers=['blocks.0.attn.qkv']),
        dict(ids=[3]),
        dict(ids=5),
        dict(rank='2'),
    ],
)
def test_a_manifest_that_does_not_fit_its_tensors_leaves_the_model_alone(
    wrong, tmp_path, monkeypatch
):
    import llm_lab.lora

    model = adapted()
    facts = llm_lab.lora._facts(model) | wrong
    monkeypatch.setattr(llm_lab.lora, '_facts', lambda model: facts)
    folder = save_lora(tmp_path / 'a', model)
    plain = shaken(KINDS['llama'])
    one_line(lambda: load_lora(folder, plain))
    require_faithful(plain)
    assert not lora_parameters(plain) and all(p.requires_grad for p in plain.parameters())


def test_no_folder_of_another_kind_is_read(tmp_path):
    save(tmp_path / 'p', tiny_model(), CharTokenizer('abc'))
    one_line(lambda: load_lora(tmp_path / 'p', shaken(KINDS['gpt'])), 'manifest.json')
    save_lora(tmp_path / 'a', adapted())
    one_line(lambda: load(tmp_path / 'a'), str(tmp_path / 'a'))


# ---- one line each


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(rank=0), ('rank=0', 'at least 1')),
        (dict(rank=True), ('rank=True',)),
        (dict(alpha=0), ('alpha=0',)),
        (dict(alpha=float('nan')), ('alpha=nan',)),
        (dict(dropout=1), ('dropout=1',)),
        (dict(targets=()), ('targets=()',)),
        (dict(targets='qvk'), ("targets='qvk'", 'qkv')),
        (dict(targets=['mlp', 'lm_haed']), ("targets='lm_haed'", 'lm_head')),
        (dict(targets='lm_head'), ('shares its weight', 'train_rows')),
    ],
)
def test_slips_are_named(settings, words):
    model = shaken(KINDS['tied'])
    one_line(lambda: add_lora(model, **settings), *words)
    require_faithful(model)
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_merged_is_not_adapted(tmp_path):
    bound = MiniGPT(llama(**SIZED, init=part(spectral_init)))
    one_line(lambda: add_lora(bound), 'merge_spectral')
    one_line(lambda: add_lora(shaken(KINDS['softcap']), targets='lm_head'), 'no linear layer')
    plain = shaken(KINDS['gpt'])
    one_line(lambda: merge_lora(plain), 'no adapters', 'add_lora')
    one_line(lambda: save_lora(tmp_path / 'x', plain), 'no adapters')
    one_line(lambda: add_lora(adapted()), 'has an adapter already', 'merge_lora')
    one_line(lambda: train_rows(train_rows(plain, [1]), [2]), 'trained already')
    for ids in ([], [40], [-1], [True], ['a']):
        one_line(lambda: train_rows(shaken(KINDS['gpt']), ids), 'ids')
    one_line(lambda: save(tmp_path / 'y', adapted(), LETTERS), 'LoRALinear')


def test_it_writes_with_adapters_as_merged():
    model = adapted()
    said = [
        complete(m, LETTERS, ['ABC', 'D'], max_new_tokens=8, temperature=0)
        for m in (model, with_kv_cache(model), merge_lora(model))
    ]
    texts = [[c.text for samples in of_one for c in samples] for of_one in said]
    assert texts[0] == texts[1] == texts[2]


# ---- as peft


def test_equal_to_peft(tmp_path):
    "The same A and B on a LlamaForCausalLM: the same logits, before and after merging"
    peft = pytest.importorskip('peft', reason='peft is not installed: pip install peft')
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    from llm_lab.hub import to_hf

    model = adapted('llama', alpha=5.0)
    to_hf(tmp_path / 'hf', shaken(KINDS['llama']))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    how = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=names, lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, how).eval()
    _give(theirs, model)
    with torch.no_grad():
        near(theirs(IDS).logits, logits(model), 1e-6)
        merged = theirs.merge_and_unload()
        near(merged(IDS).logits, logits(merge_lora(model)), 1e-6)
        assert (logits(model) - logits(shaken(KINDS['llama']))).abs().max() > 0.1


def _give(theirs, model):
    """The adapters of a model of ours, in theirs. One layer of ours makes q, k and v: each of
    theirs gets the same A, and its rows of B. Ours rotates neighbours or halves as theirs does"""
    pieces = dict(
        qkv=('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
        up=('mlp.gate_proj', 'mlp.up_proj'),
    )
    for n, block in enumerate(model.blocks):
        layer = f'base_model.model.model.layers.{n}'
        ours = {
            ('self_attn.o_proj',): block.attn.out,
            ('mlp.down_proj',): block.mlp.out,
            pieces['qkv']: block.attn.qkv,
            pieces['up']: block.mlp.up,
        }
        for names, adapter in ours.items():
            for name, rows in zip(names, adapter.B.chunk(len(names))):
                their = theirs.get_submodule(f'{layer}.{name}')
                with torch.no_grad():
                    their.lora_A.default.weight.copy_(adapter.A)
                    their.lora_B.default.weight.copy_(rows)


# ---- by a config

START = dict(start_from='artifacts/start')


@pytest.mark.parametrize(
    'lora, words',
    [
        ('8', ("train.lora='8'", 'rank: 8')),
        ({'rnak': 8}, ('train.lora', 'rnak', 'rank')),
        ({'rank': 8.5}, ('train.lora.rank=8.5', 'a whole number')),
        ({'rank': True}, ('train.lora.rank=True',)),
        ({'targets': ['qkv', 3]}, ('train.lora.targets=', 'a list of texts')),
    ],
)
def test_a_config_names_the_setting_that_is_wrong(lora, words):
    one_line(lambda: config_from_dict(dict(train=dict(START, lora=lora))), *words)


def test_adapters_need_a_start_and_keep_their_settings():
    one_line(lambda: config_from_dict(dict(train=dict(lora=dict(rank=2)))), 'train.start_from')
    cfg = config_from_dict(dict(train=dict(START, lora={})))
    assert cfg.train.lora == {}  # all as `add_lora` has it
    other = config_from_dict(dict(train=dict(START, lora=dict(rank=4))))
    one_line(lambda: check_resumable(cfg, other), "train.lora={'rank': 4}: it was {}")
    said = read_config(dict(train=dict(START)), ['train.lora.rank=3', 'train.lora.targets=[qkv]'])
    assert said.train.lora == dict(rank=3, targets=['qkv'])


@pytest.mark.parametrize(
    'lora, words',
    [
        (dict(rank=0), ('train.lora: rank=0', 'at least 1')),
        (dict(targets='qvk'), ("train.lora: targets='qvk'", 'qkv')),
    ],
)
def test_what_no_adapter_can_have_is_said_before_anything_is_made(lora, words, home):
    save('start', shaken(GPTConfig(**SIZED)), LETTERS)
    (home / 'text.txt').write_text('ABCDEFGH' * 200)
    data = dict(corpus='text.txt')
    train = dict(start_from='start', lora=lora, steps=1, batch_size=2)
    one_line(lambda: train_run(dict(data=data, train=train)), *words)
    assert not (home / 'experiments').exists() and not (home / 'data').exists()


def test_a_run_of_adapters_and_rows_that_read_within_documents(home):
    save('start', shaken(GPTConfig(**SIZED)), LETTERS)
    (home / 'text.txt').write_text('\n<|endoftext|>\n'.join(['ABCDEFG', 'HIJKLMNOP'] * 99))
    data = dict(corpus='text.txt', mask_documents=True)
    train = dict(start_from='start', lora=dict(rank=2), steps=3, batch_size=2, recompute=True)
    more = dict(eval=dict(every=3, tokens=200), log=dict(every=1, checkpoint_every=2))
    job = train_run(dict(data=data, train=train, **more))
    near(logits(load(job.folder).model), logits(job.run.model))
    assert 'of them, the adapters, are trained' in repr(job)
    # a branch from an older checkpoint has the same weights under its adapters, a new run that
    # starts from this one has the merged model
    branch = train_run(resume=job.folder / 'checkpoints' / 'step-000002')
    assert branch.folder != job.folder and branch.run.step == 3
    assert base_sha256(branch.run.model) == base_sha256(load('start').model)
    assert torch.equal(logits(branch.run.model), logits(job.run.model))
    train = dict(start_from=str(job.folder), steps=1, batch_size=2)
    after = train_run(dict(data=data, train=train | dict(lr=1e-9), **more))
    near(logits(after.run.model), logits(job.run.model))


@pytest.mark.parametrize('tie', [False, True])
def test_a_model_of_stories_learns_to_chat_by_adapters_and_the_rows_of_its_marks(tie, home):
    start = MiniGPT(
        llama(len(LETTERS.chars), d_model=16, n_layers=1, n_heads=2, max_len=32, tie=tie)
    )
    save('start', start, LETTERS)
    turns = [('WHO', 'ANNA'), ('WHERE', 'HOME'), ('WHAT', 'BALL')]
    records = [
        dict(messages=[dict(role='user', content=q), dict(role='assistant', content=a)])
        for q, a in turns * 30
    ]
    (home / 'talk.jsonl').write_text('\n'.join(map(json.dumps, records)))
    train = dict(start_from='start', lora=dict(rank=2, targets='qkv'), loss='answers', steps=6)
    train |= dict(batch_size=4, lr=0.02)
    job = train_run(
        dict(
            data=dict(corpus='talk.jsonl', template='chat', rows='whole', mask_documents=True),
            train=train,
            eval=dict(every=3, tokens=200, sample_tokens=4),
        ),
        run='a',
    )
    n = len(LETTERS.chars)
    model, tokenizer, about = load(job.folder)
    new = sorted(set(tokenizer.special_tokens.values()))
    assert new == [*range(n, n + 5)] and model.cfg.vocab_size == n + 5
    assert 'the adapters and the rows of 5 new marks, are trained' in repr(job)
    # the rows of its marks have moved from where they were drawn, all others not by a bit
    drawn = base_state(job.run.model)
    assert load(f'{job.folder}/checkpoints/step-000003').model.cfg == model.cfg
    for name in ('tok.weight', 'lm_head.weight'):
        after, before = model.state_dict()[name], start.state_dict()[name]
        assert torch.equal(after[:n], before) and torch.equal(drawn[name][:n], before)
        assert (after[n:] != drawn[name][n:]).any(1).sum() >= 3  # <|system|> is in no conversation
    near(logits(model), logits(job.run.model))
    # saved alone, the adapters go on the grown start
    grown = add_marks(start, LETTERS, [m for m in tokenizer.special_tokens])[0]
    again = load_lora(save_lora('alone', job.run.model), grown)
    assert torch.equal(logits(again), logits(job.run.model))
    # and every command takes the run
    assert ''.join(Chat(model, tokenizer).send('WHO', 5)) is not None
    assert printed('sample', job.folder, '--tokens', 3)[0]
    assert 'written: hf' in printed('export', job.folder, 'hf')[0]
    near(logits(load('hf').model), logits(model))
