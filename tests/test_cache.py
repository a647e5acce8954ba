"""`kv_cache`: decoding with a cache is decoding without, at every length, for every kind of
attention, padded, in pieces, in windows.

The models are shaken: random biases and norms, large weights. A wrong mask or position is then
far above the tolerance, as the slips show."""

import random
from dataclasses import replace

import pytest
import torch
from cases import cases, crossed, some
from helpers import near, shaken

from llm_lab.bpe import BPETokenizer
from llm_lab.kv_cache import (
    CacheTransform,
    Completion,
    KVCache,
    RollingCache,
    with_kv_cache,
    complete,
    held_cache_bytes,
    select_rows,
    sliding_window,
)
from llm_lab.chars import CharTokenizer
from llm_lab.self_attention import Attention, causal
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import config_from, to_data
from llm_lab.parts import part
from llm_lab.gqa import GQA, planned_cache_bytes
from llm_lab.core import LabError, rng
from llm_lab.llama_block import SoftcapHead, QKNorm, RMSNorm, llama
from llm_lab.positions import RoPE, SinusoidalPositions, linear_scaling
from llm_lab.looking import attention_maps
from llm_lab.package import load, save
from llm_lab.sampling import DecodingState, sample_next, generate, prompt_ids, sample, stream

T = 40
SIZE = dict(vocab_size=30, d_model=32, n_heads=4, n_layers=3, max_len=T)
TOK = CharTokenizer.train('abcdefghijklmnopqrstuvwxyz .,\n')


def modern(n, *steps, mask=part(causal), bias=False, **kw):
    return llama(
        **SIZE | kw,
        attn=part(GQA, n_kv_heads=n, transforms=(*steps, part(RoPE)), mask=mask, bias=bias),
    )


def fade(i, j, h, layer):
    "A head looks 2, 3, 5, 9 back, deeper layers one more"
    return (j <= i) & (i - j <= 2**h + layer)


KINDS = {
    'GPT-2': GPTConfig(**SIZE),
    'no positions': GPTConfig(**SIZE, pos=None),
    'sines': GPTConfig(**SIZE, pos=part(SinusoidalPositions)),
    'tied': GPTConfig(**SIZE, tie=True, norm=part(RMSNorm)),
    'Llama': llama(**SIZE),
    'soft cap': llama(**SIZE, lm_head=part(SoftcapHead)),
    'interleaved, half': llama(**SIZE, rope=part(RoPE, interleaved=True, partial=0.5)),
    'slower hands': llama(**SIZE, rope=part(RoPE, scale=part(linear_scaling, factor=4.0))),
    '2 heads': modern(2),
    '1 head, QK-norm': modern(1, part(QKNorm)),
    '4 heads, biases': modern(4, bias=True),
    'wide heads': modern(2, d_head=16),
    'heads look apart': modern(2, mask=part(fade)),
    'window of 1': modern(2, mask=part(sliding_window, size=1)),
    'window of 5': modern(1, part(QKNorm), mask=part(sliding_window, size=5)),
    'window of 13': modern(4, mask=part(sliding_window, size=13)),
    'window of 39': modern(2, mask=part(sliding_window, size=T - 1)),
    'window beyond': modern(2, mask=part(sliding_window, size=99)),
    'window, learned': GPTConfig(**SIZE, attn=part(Attention, mask=part(sliding_window, size=6))),
    'window, none': GPTConfig(
        **SIZE, pos=None, attn=part(Attention, mask=part(sliding_window, size=6))
    ),
}
each = pytest.mark.parametrize('kind', KINDS)
plain = torch.no_grad()(lambda model, *args, **ctx: model(*args, **ctx))


pytestmark = pytest.mark.usefixtures('one_thread')


def ids_of(seed, B, n=T):
    return torch.randint(30, (B, n), generator=rng(seed, 'ids'))


def in_pieces(model, ids, cut, pad=None):
    "All logits, read in pieces"
    quick = model if 'cache' in model.needs else with_kv_cache(model)
    cache, at, out = quick.cache(len(ids), ids.shape[1]), 0, []
    for piece in ids.split(cut, 1):
        i = torch.arange(at, at := at + piece.shape[1])
        if pad is not None:
            i = (i - pad[:, None]).clamp_min(-1)
        out.append(plain(quick, piece, i=i, cache=cache))
    return torch.cat(out, 1)


@each
def test_every_length_of_prompt_and_every_next_token(kind):
    model, ids = shaken(KINDS[kind]), ids_of(0, 2)
    want = plain(model, ids)
    near(in_pieces(model, ids, [1] * T), want)
    for n in some(range(1, T), 4):
        near(in_pieces(model, ids, [n] + [1] * (T - n)), want)


@each
def test_pieces_of_any_size(kind):
    model = shaken(KINDS[kind], 1)
    ids = ids_of(1, 3)
    draw = random.Random(kind)
    want = plain(model, ids)
    for _ in range(cases(8)):
        marks = sorted(draw.sample(range(1, T), draw.randint(0, 9)))
        near(in_pieces(model, ids, [b - a for a, b in zip([0, *marks], [*marks, T])]), want)


@pytest.mark.parametrize('kind,pad', crossed(KINDS, [(0, 4, 33), (1, 1, 1), (38, 0, 12)]))
def test_texts_side_by_side_are_texts_alone(kind, pad):
    model = shaken(KINDS[kind], 2)
    ids = ids_of(2, 3)
    pad = torch.tensor(pad)
    for cut in ([T], [1] * T, [T - 1, 1], [3, 20, 1, 1, 15]):
        got = in_pieces(model, ids, cut, pad)
        for b, p in enumerate(pad.tolist()):
            near(got[b : b + 1, p:], plain(model, ids[b : b + 1, p:]))


@pytest.mark.parametrize('kind,n', crossed(KINDS, [20, T - 1, T, T + 1, 3 * T]))
def test_a_reader_reads_what_the_plain_model_reads(kind, n):
    "Also where the text slides: a plain model sees the last max_len tokens"
    model, ids = shaken(KINDS[kind], 3), ids_of(3, 3, n)
    endless = 'window' in kind and model.cfg.pos is None
    pad = torch.tensor([0, 5, 2])
    for chunk in (7, 512):
        quick = DecodingState(with_kv_cache(model), n, pad, chunk)
        simple = DecodingState(model, n, pad)
        for piece in ids.split([n - 6, 1, 3, 1, 1], 1):
            got, slow = quick(piece), simple(piece)
        if not endless or n <= T:
            near(got, slow)
        seen = 10**9 if endless else T
        want = torch.cat(
            [plain(model, ids[b : b + 1, p:][:, -seen:])[:, -1] for b, p in enumerate(pad.tolist())]
        )
        near(got, want, 2e-5)


@each
def test_the_text_is_the_same_and_each_token_goes_through_once(kind):
    model, prompt = shaken(KINDS[kind], 4), ids_of(4, 2, 9)
    texts, seen = [], []
    for m in (model, with_kv_cache(model)):
        hook = m.tok.register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
        texts.append(
            [
                torch.stack(list(generate(m, prompt, 25, **kw)), 1)
                for kw in (dict(temperature=0), dict(seed=3, top_k=9))
            ]
        )
        hook.remove()
        if m is model:
            seen.clear()
    assert all((a == b).all() for a, b in zip(*texts))
    assert sum(seen) == 2 * 2 * (9 + 24)


@each
def test_picked_rows_go_on_as_themselves(kind):
    model, ids = shaken(KINDS[kind], 5), ids_of(5, 4)
    reader = DecodingState(with_kv_cache(model), T, torch.tensor([0, 3, 9, 1]))
    rows = [2, 0, 2]
    reader(ids[:, :20])
    select_rows(reader, rows)
    got = [reader(ids[rows, t : t + 1]) for t in range(20, 25)][-1]
    near(got, torch.cat([plain(model, ids[b : b + 1, [0, 3, 9, 1][b] : 25])[:, -1] for b in rows]))


@each
def test_maps_through_a_cache_are_rows_of_the_maps_of_the_whole(kind):
    model, ids = shaken(KINDS[kind], 7), ids_of(7, 2)
    want, quick = attention_maps(model, ids), with_kv_cache(model)
    cache, at = quick.cache(2, T), 0
    for piece in ids.split([20, 1, 1, 5, 13], 1):
        end = at + piece.shape[1]
        got = attention_maps(quick, piece, torch.arange(at, end), cache=cache)
        near(got, want[:, :, :, at:end, :end], 1e-6)
        at = end


@each
def test_a_cache_is_a_recipe_like_any_other(kind, tmp_path):
    if 'apart' in kind:
        return  # its pattern lives in this file and has no address to save
    model = shaken(KINDS[kind], 6)
    quick = with_kv_cache(model)
    assert config_from(to_data(quick.cfg)) == quick.cfg and with_kv_cache(quick) is quick
    assert str(MiniGPT(quick.cfg)) == str(quick)
    save(tmp_path / 'p', quick, TOK)
    again, tok, _ = load(tmp_path / 'p')
    assert sample(again, tok, 'ab', 20, seed=1) == sample(model, TOK, 'ab', 20, seed=1)
    assert [type(c) for c in again.cache(1, 9).values()] == [
        type(c) for c in quick.cache(1, 9).values()
    ]


def test_random_recipes():
    from test_parts import SEEDS, drawn

    for seed in SEEDS:
        cfg = replace(drawn(seed), vocab_size=30)
        model, ids = shaken(cfg, seed), ids_of(seed, 2, cfg.max_len)
        for cut in ([1] * 12, [5, 1, 1, 5]):
            near(in_pieces(model, ids, cut), plain(model, ids))


def test_the_weights_are_shared_and_the_model_is_left_alone():
    model, ids = shaken(KINDS['Llama']), ids_of(7, 1)
    before, said = str(model), plain(model, ids)
    quick = with_kv_cache(model.train())
    assert quick.training and str(model) == before and model.needs == set()
    assert all(a is b for a, b in zip(model.parameters(), quick.parameters()))
    quick(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        quick.lm_head.weight.mul_(2)
    near(plain(model.eval(), ids), 2 * said)
    tied = with_kv_cache(shaken(KINDS['tied']))
    assert tied.lm_head.weight is tied.tok.weight


def test_bfloat16_rounds_and_nothing_more():
    for kind in ('GPT-2', '2 heads', 'window of 5'):
        model, ids = shaken(KINDS[kind]), ids_of(8, 2)
        want, small = plain(model, ids), model.bfloat16()
        noise = (plain(small, ids).float() - want).abs().max()
        assert 0 < (in_pieces(small, ids, [20] + [1] * 20).float() - want).abs().max() < 2 * noise
        quick = with_kv_cache(small)
        cache = quick.cache(2, 9)
        plain(quick, ids[:, :4], cache=cache)
        assert held_cache_bytes(cache) == planned_cache_bytes(
            replace(small.cfg, attn=part(small.cfg.attn, mask=part(causal))),
            4,
            2,
            torch.bfloat16,
        )


@pytest.mark.parametrize(
    'slip', ['no mask', 'positions', 'values', 'ring written first', 'ring too small']
)
def test_a_slip_is_loud(slip, monkeypatch):
    "What the tests above would see is far above their tolerance"
    cfg, add = KINDS['window of 5'], RollingCache.add
    model, ids = shaken(cfg), ids_of(9, 2)
    want = plain(model, ids)  # in one piece, without a cache

    def instead(name, f):
        monkeypatch.setattr(RollingCache, name, f)

    if slip == 'no mask':
        monkeypatch.setattr(
            Attention, 'dense_mask', lambda self, i, j, **ctx: (j >= 0).expand(len(i), -1)
        )
    if slip == 'positions':
        instead('add', lambda self, k, v, j: add(self, k, v, j - j[0]))
    if slip == 'values':
        instead('add', lambda self, k, v, j: add(self, k, v.flip(-1) if self.n else v, j))
    if slip == 'ring too small':
        instead('__init__', lambda self, length: KVCache.__init__(self, length - 1))
    if slip == 'ring written first':
        instead(
            'add',
            lambda self, k, v, j: (add(self, k, v, j), (self.k, self.v, self.j))[
                self.n > k.shape[2]
            ],
        )
    assert (in_pieces(model, ids, [20, 1, 7, 12]) - want).abs().max() > 1e-2


def test_the_order_of_steps_is_a_matter_of_cost():
    "Keys that turn after they come back turn by the positions that came back with them"
    late = llama(**SIZE, attn=part(Attention, transforms=(part(CacheTransform), part(RoPE))))
    model, ids = shaken(late), ids_of(9, 2)
    near(in_pieces(model, ids, [20, 1, 7, 12]), plain(model, ids))


def test_places_and_rings():
    full = KVCache(4)
    kv = lambda n: torch.randn(2, 1, 2, n, 3)
    full.add(*kv(3), torch.arange(3))
    with pytest.raises(
        LabError, match='has 4 places, 5 are needed: make it, or the reader, longer'
    ):
        full.add(*kv(2), torch.arange(3, 5))
    assert full.n == 3 and full.j.tolist() == [0, 1, 2, -1]  # a refused piece leaves nothing
    for size in (1, 2, 5, 8):
        ring = RollingCache(size)
        all_j = torch.arange(60)
        draw = random.Random(size)
        at = 0
        while at < 50:
            n = draw.choice([1, 1, 1, 2, 3, size, size + 1, 2 * size + 3])
            j = all_j[at : at + n]
            k = j.float().view(1, 1, -1, 1)
            gk, gv, gj = ring.add(k, -k, j)
            needed = set(range(max(0, at - size + 1), at + n))
            assert needed <= set(gj.tolist()) and len(set(gj.tolist()) - {-1}) == (gj >= 0).sum()
            seen = gj >= 0
            assert (gk[0, 0, seen, 0] == gj[seen]).all() and (gv == -gk)[0, 0, seen].all()
            at += n
    assert held_cache_bytes({0: ring}) == 2 * 8 * 4


def test_bytes_are_those_of_the_formula():
    for kind in ('GPT-2', '2 heads', '1 head, QK-norm', 'wide heads'):
        model = with_kv_cache(shaken(KINDS[kind]))
        cache = model.cache(2, T)
        assert held_cache_bytes(cache) == 0
        first = next(iter(cache.values()))
        for n in (7, 1, 20):
            plain(model, ids_of(0, 2, n), i=torch.arange(n) + first.n, cache=cache)
            assert held_cache_bytes(cache) == planned_cache_bytes(model.cfg, first.n, 2)


def test_wrong_recipes_are_refused():
    for size in (4, 1):
        with pytest.raises(
            LabError,
            match=f'size={size} is too small a cache for '
            r'part\(sliding_window, size=5\), which reads 5',
        ):
            llama(
                **SIZE,
                attn=part(
                    Attention,
                    mask=part(sliding_window, size=5),
                    transforms=(part(CacheTransform, size=size),),
                ),
            )
    with pytest.raises(LabError, match='which reads all keys'):
        llama(**SIZE, attn=part(Attention, transforms=(part(CacheTransform, size=5),)))
    for size in (0, -1, 2.5, True, None):
        with pytest.raises((LabError, TypeError)):
            modern(2, mask=part(sliding_window, size=size))
    wide = llama(
        **SIZE,
        attn=part(
            Attention,
            mask=part(sliding_window, size=5),
            transforms=(part(RoPE), part(CacheTransform, size=9)),
        ),
    )
    # more than needed is fine
    near(in_pieces(shaken(wide), ids_of(1, 1), [1] * T), plain(shaken(wide), ids_of(1, 1)))


# ---- complete


class Marked(CharTokenizer):
    "Characters, one of which ends a text"

    def __init__(self, *args):
        super().__init__(*args)
        self.eos_id = 5


@pytest.mark.filterwarnings('ignore:the prompt has')
@pytest.mark.parametrize(
    'kind,how',
    crossed(
        ['GPT-2', '2 heads', 'window of 5', 'window of 13'],
        [
            dict(temperature=0),
            dict(temperature=0.9, top_p=0.9),
            dict(top_k=5, repetition_penalty=1.4),
            dict(stop=['b', 'e.']),
        ],
    ),
)
def test_completions_are_the_samples_of_each_alone(kind, how):
    model = shaken(KINDS[kind], 11)
    prompts = ['', 'a', 'some words', 'one more, and this one is much longer', 'ab' * 30]
    for tok in (TOK, Marked(TOK.chars)):
        got = complete(with_kv_cache(model), tok, prompts, 30, samples=3, seed=5, **how)
        ended = [c.ended for row in got for c in row]
        assert len(got) == 5 and all(len(row) == 3 for row in got)
        if tok is TOK:
            assert 'eos' not in ended and ('stop' in ended) == ('stop' in how)
        elif 'top_p' in how:
            assert 'eos' in ended
        for p, row in zip(prompts, got):
            for s, c in enumerate(row):
                alone = ''.join(stream(with_kv_cache(model), tok, p, 30, seed=5 + s, **how))
                assert c.text == alone and len(c.ids) == len(c.logprobs) <= 30
                assert (c.ended == 'length') == (len(c.ids) == 30) or c.ended == 'stop'
                ids = torch.tensor(c.ids, dtype=torch.long)
                whole = prompt_ids(model, tok, p)[0]
                if len(whole) + len(ids) <= T and len(ids):
                    row = plain(model, torch.cat([whole, ids])[None])[0].log_softmax(-1)[
                        len(whole) - 1 : -1
                    ]
                    near(torch.tensor(c.logprobs), row.gather(1, ids[:, None])[:, 0], 1e-4)


def test_bytes_make_whole_characters_in_a_batch():
    text = 'Où est le café ? Il est là-bas, à côté. ☕ «ça va» 😀 ' * 20
    tok = BPETokenizer.train(text, 300)
    model = with_kv_cache(shaken(llama(**SIZE | dict(vocab_size=tok.vocab_size, max_len=99))))
    for prompt, (c, d) in zip(
        ('é', 'Où est'),
        complete(model, tok, ['é', 'Où est'], 40, samples=2, seed=2, temperature=1.5),
    ):
        assert prompt + c.text == sample(model, tok, prompt, 40, seed=2, temperature=1.5)
        assert prompt + d.text == sample(model, tok, prompt, 40, seed=3, temperature=1.5)


def test_misuse_is_told_in_one_line():
    model, ids = shaken(KINDS['2 heads']), ids_of(12, 1)
    quick = with_kv_cache(model)
    cache = quick.cache(1, T)
    plain(quick, ids[:, :5], cache=cache)
    for call, word in (
        (lambda: quick(ids[:, 5:6], cache=cache), 'holds 5 tokens already: say where'),
        (
            lambda: quick(ids_of(1, 2, 1), torch.tensor([5]), cache=cache),
            'holds 1 texts, 2 are given',
        ),
        (lambda: with_kv_cache(torch.nn.Linear(2, 2)), 'a MiniGPT is needed'),
        (
            lambda: with_kv_cache(MiniGPT(GPTConfig(**SIZE, attn=part(hidden)))),
            'no attention is found',
        ),
        (
            lambda: complete(quick, TOK, 'a', samples=0),
            'samples=0: give a whole number of at least 1',
        ),
        (lambda: complete(quick, TOK, 'a', 2.5), 'max_new_tokens=2.5: give a whole number'),
        (lambda: complete(quick, TOK, 'a', stop=[3]), 'give a text to end at'),
        (lambda: DecodingState(quick, 9)(ids[:, :0]), 'an empty text'),
    ):
        with pytest.raises(LabError, match=word):
            call()
    with pytest.warns(UserWarning, match='the prompt has 99 tokens, the model sees the last 40'):
        complete(quick, TOK, ['a' * 99, 'a'], 2)


def hidden(cfg, layer=0):
    return Attention(cfg, layer)


def test_a_reader_survives_a_mistake():
    "Half a step is not kept: what comes after is right"
    model, ids = shaken(KINDS['2 heads']), ids_of(13, 1)
    for reader in (DecodingState(with_kv_cache(model), T), DecodingState(model, T)):
        reader(ids[:, :5])
        with pytest.raises(IndexError):
            reader(torch.tensor([[999]]))
        near(reader(ids[:, 5:6]), plain(model, ids[:, :6])[:, -1])


def test_nothing_to_write():
    model = with_kv_cache(shaken(KINDS['2 heads']))
    assert complete(model, TOK, []) == [] and complete(model, TOK, 'a', 0, samples=2) == [
        [Completion(), Completion()]
    ]
    assert complete(model, TOK, 'ab', 1)[0][0].ended == 'length'
    for bad, word in (
        (dict(top_k=0), 'top_k=0'),
        (dict(stop=['a', '']), 'give a text'),
        (dict(repetition_penalty=0), 'repetition_penalty=0'),
    ):
        with pytest.raises(LabError, match=word):
            complete(model, TOK, 'a', **bad)


# ---- transformers as the oracle


@pytest.mark.parametrize('family,penalty', crossed(['gpt2', 'llama', 'qwen3', 'phi3'], [1.0, 1.7]))
def test_a_padded_batch_is_transformers_own(family, penalty, tmp_path):
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    from llm_lab.hub import from_hf
    from test_hf import drawn as settings

    torch.manual_seed(0)
    said = settings(family, 1) | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **said)
    ).eval()
    theirs.save_pretrained(tmp_path / 'hf')
    ours = with_kv_cache(from_hf(tmp_path / 'hf')[0])
    V, lengths = ours.cfg.vocab_size, (9, 2, 6)
    texts = [torch.randint(V, (n,), generator=rng(n, 'prompt')) for n in lengths]
    pad = torch.tensor([9 - n for n in lengths])
    # transformers counts also what fills empty places as said: fill them with tokens of the prompt
    ids = torch.stack([torch.cat([t[:1].expand(9 - len(t)), t]) for t in texts])
    mask = (torch.arange(9) >= pad[:, None]).long()
    want = theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=30,
        min_new_tokens=30,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 9:]
    for b, text in enumerate(texts):  # alone
        got = torch.stack(
            list(generate(ours, text[None], 30, temperature=0, repetition_penalty=penalty)), 1
        )
        assert got[0].tolist() == want[b].tolist()
    reader, new, out = DecodingState(ours, 39, pad), ids, []  # together
    for _ in range(30):
        out.append(
            new := sample_next(
                reader(new), reader.ids, rng(0, 'x'), temperature=0, repetition_penalty=penalty
            )
        )
    assert torch.cat(out, 1).tolist() == want.tolist()


def test_values_that_are_narrower_than_keys_count_as_they_are():
    "As in latent attention, where a cache holds a latent and a rotated key"
    kept = KVCache(9)
    kept.add(torch.zeros(1, 1, 7, 16), torch.zeros(1, 1, 7, 8), torch.arange(7))
    assert held_cache_bytes({0: kept}) == 7 * (16 + 8) * 4
