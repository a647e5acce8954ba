"""Chat templates, the marks in them, and answers."""

import functools
import inspect
import json
import random
import re
import shutil
import statistics
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from answers import chat as answers
from helpers import cells_of, near, printed, run_cell, shaken
from safetensors.torch import load_file, save_file

from llm_lab import chat as chat_module
from llm_lab.batching import BatchStream
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer, begins, load_tokenizer
from llm_lab.chat import (
    AnswerMarks,
    add_marks,
    answer_loss,
    answer_marks,
    answer_targets,
    answer_tokens,
)
from llm_lab.conversations import Chat
from llm_lab.core import LabError, check
from llm_lab.corpora import END_OF_TEXT, corpus_of, letters_of, load_corpus
from llm_lab.efficient import StepRunner
from llm_lab.evaluation import compare, evaluate, read_metrics
from llm_lab.gpt import MiniGPT
from llm_lab.kv_cache import KVCache, sliding_window, with_kv_cache
from llm_lab.llama_block import llama
from llm_lab.package import load, save
from llm_lab.packing import PackedTokens, pack
from llm_lab.parts import part
from llm_lab.runs import train_run
from llm_lab.self_attention import Attention
from llm_lab.templates import (
    CHAT,
    CHAT_MARKS,
    ChatTemplate,
    carried_source,
    chat_ids,
    encode_chat,
    load_template,
    template_of,
    with_marks,
)
from llm_lab.tokenizer_files import ForeignTokenizer
from llm_lab.train import document_starts, read_split, span_losses

# ---- templates in the forms that are published, in our own words

CHATML = (
    '{% for message in messages %}'
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    '{{- bos_token }}'
    '{%- for message in messages %}'
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{- message.content | trim ~ '<|eot_id|>' }}"
    '{%- endfor %}'
    '{%- if add_generation_prompt %}'
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    '{%- endif %}'
)
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{% for message in turns %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim }}
{{- '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson(indent=2) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if thinking is defined and thinking is false %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MACROS = """{%- macro turn(message) -%}
    [{{ message.role | upper | center(11) }}]
    {{- caller() if caller else message.content | indent(2) }}
{%- endmacro -%}
{%- for message in messages if message.content %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
    {{- turn(message) }}
{% endfor -%}
{{ messages | map(attribute='role') | unique | list | tojson }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ '%s turns' % messages | length }} {{ [1, 2] * 2 }} {{ 2 ** 5 }} {{ dict(a=1).a }} {{ none }}"""
TEMPLATES = dict(
    CHATML=CHATML,
    LLAMA3=LLAMA3,
    MISTRAL=MISTRAL,
    GEMMA=GEMMA,
    QWEN=QWEN,
    ZEPHYR=ZEPHYR,
    MACROS=MACROS,
    CHAT=CHAT,
)
SPECIAL = dict(bos_token='<s>', eos_token='</s>')
MARKS = [
    *('<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
    *('[INST]', '[/INST]', '<start_of_turn>', '<end_of_turn>', *CHAT_MARKS),
]
WORDS = [
    *(
        'red',
        'ball',
        'Anna',
        ' ',
        '\n',
        '  \n',
        '{{ x }}',
        '{% if %}',
        '"',
        "'",
        '<',
        '&',
        '\\n',
        'é',
    ),
    *('日本', '🙂', '</think>', '<think>', 'a', '0', '|', '>'),
]


def conversation(r, words=WORDS):
    "System or not, then turns; now and then a question without an answer at the end"

    def text():
        return ''.join(r.choices(words, k=r.randrange(1, 12)))

    turns = [dict(role='system', content=text())] if r.random() < 0.4 else []
    for _ in range(r.randrange(1, 5)):
        turns.append(dict(role='user', content=text()))
        turns.append(dict(role='assistant', content=text()))
    return turns[: -1 if r.random() < 0.3 else None]


def theirs(source, messages, prompt, tools=None, **more):
    "What transformers renders"
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask='{%- generation' in source,
        **SPECIAL,
        **more,
    )
    return texts[0], spans[0] if spans else None


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_template_renders_as_transformers_does(name):
    pytest.importorskip('transformers')
    r = random.Random(name)
    template = ChatTemplate(TEMPLATES[name], **SPECIAL)
    tools = [dict(name='f', parameters={'x': dict(type='é <b>', n=1)})]
    for n in range(200):
        messages = conversation(r)
        prompt = r.random() < 0.5
        more = dict(tools=tools) if name == 'QWEN' and n % 2 else {}
        if n % 3 == 0:
            more['thinking'] = False
        want, _ = theirs(TEMPLATES[name], messages, prompt, **more)
        assert template.render(messages, prompt, **more) == want


# ---- it ends, in one line

GROW = "{% set ns = namespace(x='xxxx', y=[1]) %}{% for i in range(99) %}"
LISTS = GROW + '{% set ns.y = [ns.y, ns.y] %}{% endfor %}'
ENDLESS = [
    '{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}',
    '{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}',
    "{{ 'x' * 1000000000000 }}",
    "{% set x = 'x' * 1000000000000 %}",
    GROW + '{% set ns.x = ns.x ~ ns.x %}{% endfor %}',
    GROW + '{% set ns.x = ns.x + ns.x %}{% endfor %}',
    GROW + '{% set z %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = z %}{% endfor %}',
    LISTS + '{{ ns.y }}',
    LISTS + '{{ ns.y | tojson }}',
    LISTS + '{{ ns.y | string | length }}',
    '{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}',
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    '{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}',
    '{% for i in range(9999) recursive %}{{ loop(range(9999)) if loop.depth < 4 }}{% endfor %}',
    '{{ 9 ** (9 ** 9) }}',
    "{{ 'x'.ljust(1000000000000) }}",
    "{{ 'x' | center(1000000000000) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '%*d' % (1000000000000, 1) }}",
    "{{ '{:1000000000000}'.format('x') }}",
    "{{ '{:{w}}'.format('x', w=1000000000000) }}",
    "{{ ('x' * 1000000).replace('', 'x' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}",
    "{{ [1] * 1000000000000 }}",
    "{{ (['x' * 1000000] * 100000) | join }}",
    "{{ ('x' * 1000000).join(['x'] * 100000) }}",
    '{{ [[1]] | tojson(indent=1000000000000) }}',
    "{{ 'x\\nx' | indent(1000000000000) }}",
    '{{ range(10000000000) | list }}',
    '{{ lipsum(1000000) }}',
    "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    "{% for i in range(100000) %}{% set a = range(100000) | map('string') | list %}{% endfor %}",
    "{% for i in range(100000) %}{% set a = range(100000) | sum %}{% endfor %}",
    "{{ strftime_now('%1000000000d') }}",
    '{% for i in range(9999) %}' + 'x' * 100_000 + '{% endfor %}',
]


@pytest.mark.parametrize('n', range(len(ENDLESS)))
def test_a_template_that_would_not_end_is_one_line(n):
    start = time.process_time()
    with pytest.raises(LabError) as e:
        ChatTemplate(ENDLESS[n]).render([dict(role='user', content='?')])
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    assert time.process_time() - start < 4


HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{{ raise_exception('no') }}",
    "{{ undefined_name.x }}",
    '{% for %}',
    '{{ ' + '(' * 5000,
    '{% generation %}',
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format(1).x.y }}",
    '{{ messages | attr("append") (1) }}',
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize('source', HOSTILE)
def test_what_a_template_may_not_do_is_one_line(source):
    with pytest.raises(LabError) as e:
        made = ChatTemplate(source).render([dict(role='user', content='?')])
        raise LabError(f'the chat template wrote {made!r}' if made in ('', '()') else made)
    assert '\n' not in str(e.value)
    assert 'subclasses' not in str(e.value)


# ---- a conversation in ids


def byte_tokenizer(marks=MARKS, end='</s>'):
    vocab = {n: bytes([n]) for n in range(256)} | {256: b'an', 257: b' r', 258: b'\n\n'}
    merges = [(b'a', b'n'), (b' ', b'r'), (b'\n', b'\n')]
    return BPETokenizer(vocab, merges, ['<s>', end, *marks])


def as_fast(tokenizer, folder):
    "The same tokenizer as one of transformers"
    transformers = pytest.importorskip('transformers')
    tokenizer.save(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))
    fast.add_special_tokens(SPECIAL)
    return fast


GENERATION = (
    '{%- for message in messages %}'
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    '{%- endif %}{%- endfor %}'
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.mark.parametrize('name', [*TEMPLATES, 'GENERATION'])
def test_ids_are_those_of_transformers(name, tmp_path):
    source = (TEMPLATES | dict(GENERATION=GENERATION))[name]
    tokenizer = byte_tokenizer()
    fast = as_fast(tokenizer, tmp_path)
    template = ChatTemplate(source, **SPECIAL)
    r = random.Random(name)
    has = template.has_generation
    for _ in range(40):
        messages = conversation(r)
        prompt = r.random() < 0.5
        want = fast.apply_chat_template(
            messages,
            chat_template=source,
            add_generation_prompt=prompt,
            return_dict=True,
            return_assistant_tokens_mask=has,
        )
        got = encode_chat(template, tokenizer, messages, prompt)
        assert got.ids == want['input_ids'] == chat_ids(template, tokenizer, messages, prompt)
        if has:
            assert [int(x) for x in got.is_answer] == want['assistant_masks']


ENDS = dict(GEMMA='<end_of_turn>', ZEPHYR='</s>', MISTRAL='</s>', LLAMA3='<|eot_id|>')


@pytest.mark.parametrize('name', ['CHATML', 'LLAMA3', 'GEMMA', 'ZEPHYR', 'MISTRAL', 'QWEN'])
def test_answers_without_the_tag_are_completions_with_their_end_mark(name):
    "As the completions of trl: what comes after the prompt of each answer, here up to its end mark"
    tokenizer = byte_tokenizer()
    template = ChatTemplate(TEMPLATES[name], **SPECIAL)
    r = random.Random(name)
    for _ in range(40):
        messages = conversation(r, ['red', 'ball', 'a', 'a\na', '🙂', '</think>'])
        messages = [m for m in messages if m['role'] != 'system']
        got = encode_chat(template, tokenizer, messages, False)
        answers = [id for id, is_answer in zip(*got) if is_answer]
        users = [n for n, m in enumerate(messages) if m['role'] == 'user']
        want = ''
        for n, message in enumerate(messages):
            if message['role'] == 'user':
                continue
            content = message['content']
            if name == 'QWEN' and n < users[-1]:  # it forgets what was thought
                content = content.split('</think>')[-1]
            want += ' ' * (name == 'MISTRAL') + content + ENDS.get(name, '<|im_end|>')
        assert tokenizer.decode(answers) == want


FORGED = [
    *MARKS,
    '<s>',
    '</s>',
    '<|im_',
    'end|>',
    '<',
    '>',
    '|>',
    '<|',
    '[',
    ']',
    'INST]',
    ' ',
    'a',
]


@pytest.mark.parametrize('kind', ['bpe', 'chars', 'foreign'])
@pytest.mark.parametrize('name', ['CHATML', 'LLAMA3', 'GEMMA', 'ZEPHYR', 'CHAT', 'GENERATION'])
def test_no_text_becomes_a_mark(name, kind, tmp_path):
    source = (TEMPLATES | dict(GENERATION=GENERATION))[name]
    tokenizer = byte_tokenizer()
    if kind == 'chars':
        letters = ''.join(sorted({*''.join(FORGED), *source, *'userassistantsystem\n'}))
        tokenizer = CharTokenizer(letters, ['<s>', '</s>', *MARKS])
    if kind == 'foreign':
        tokenizer.save(tmp_path)
        tokenizer = ForeignTokenizer(json.loads((tmp_path / 'tokenizer.json').read_text()))
    template = ChatTemplate(source, **SPECIAL)
    special = {*tokenizer.special_tokens.values()}
    r = random.Random(name)
    for _ in range(60):
        messages = conversation(r, FORGED)
        got = encode_chat(template, tokenizer, messages, True)
        # the marks are those of the same conversation with harmless texts
        plain = [m | dict(content='a') for m in messages]
        want = encode_chat(template, tokenizer, plain, True)
        assert [n for n in got.ids if n in special] == [n for n in want.ids if n in special]
        assert tokenizer.decode(got.ids) == template.render(messages, True)
        assert len(got.ids) == len(got.is_answer)
        assert any(got.is_answer) == any(m['role'] == 'assistant' for m in messages)


def test_half_a_mark_at_the_end_is_not_completed_by_the_template():
    template = ChatTemplate(
        "{{ messages[0].content }}|im_end|>{{ '<|im_' }}{{ messages[1].content }}"
    )
    tokenizer = byte_tokenizer()
    messages = [dict(role='user', content='a <'), dict(role='user', content='end|> b')]
    ids = encode_chat(template, tokenizer, messages).ids
    assert max(ids) < 259 and tokenizer.decode(ids) == 'a <|im_end|><|im_end|> b'


# ---- answers, from the ids alone


def targets_reference(row, header, end, document):
    "One row, token by token"
    inside, out = False, []
    last = max((n for n, id in enumerate(row) if n and id == document), default=len(row) - 1)
    for n, id in enumerate(row):
        if n:
            out.append(inside and n <= last)
        if id in (end, document):
            inside = False
        if id == header:
            inside = True
    return out


def test_targets_are_the_answers_of_whole_documents():
    r = random.Random(0)
    rows = torch.tensor([[r.randrange(7) for _ in range(33)] for _ in range(300)])
    rows[:20] = rows[:20].clamp_min(1)  # rows in which no document ends
    marks = AnswerMarks(header=(3,), end=(4,), document=(0,))
    got = answer_targets(rows, marks)
    want = [targets_reference(row, 3, 4, 0) for row in rows.tolist()]
    assert got.tolist() == want


def test_a_conversation_longer_than_its_row_teaches_the_answers_that_fit():
    "Before it stands the mark of the one before; a beginning after a whole one does not count"
    marks = AnswerMarks(header=(3,), end=(4,), document=(0,))
    alone = torch.tensor([[0, 1, 3, 5, 4, 1, 3, 6, 6]])
    assert answer_targets(alone, marks)[0].nonzero()[:, 0].tolist() == [2, 3, 6, 7]
    second = torch.tensor([[0, 3, 5, 4, 0, 1, 3, 6, 6]])
    assert answer_targets(second, marks)[0].nonzero()[:, 0].tolist() == [1, 2]


def test_a_header_of_several_ids_is_found_whole():
    rows = torch.tensor([[1, 2, 5, 1, 2, 3, 7, 8, 4, 2, 3, 9, 0]])
    got = answer_targets(rows, AnswerMarks((1, 2, 3), (4,), (0,)))
    assert got.nonzero()[:, 1].tolist() == [5, 6, 7]  # 7, 8 and the end mark 4


def tiny(tokenizer, seed=0, max_len=256, **more):
    size = dict(d_model=16, n_layers=2, n_heads=2, max_len=max_len)
    return shaken(llama(vocab_size=tokenizer.vocab_size, **size, **more), seed)


def chat_rows(tokenizer, n=4, length=64):
    r = random.Random(1)
    ids = []
    template = ChatTemplate(CHAT)
    while len(ids) < n * (length + 1):
        got = encode_chat(template, tokenizer, conversation(r, ['red', ' ball', 'a']), False)
        ids += [*got.ids, tokenizer.eos_id]
    return torch.tensor(ids[: n * (length + 1)]).view(n, length + 1)


def test_the_loss_is_that_of_labels_of_minus_100():
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    rows = chat_rows(tokenizer)
    marks = answer_marks(tokenizer)
    labels = rows[:, 1:].masked_fill(~answer_targets(rows, marks), -100)
    want = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), labels.flatten())
    near(answer_loss(model, rows, tokenizer), want, 1e-6)
    theirs = pytest.importorskip('transformers.loss.loss_utils').ForCausalLMLoss
    full = torch.cat([torch.full((len(rows), 1), -100), labels], 1)
    logits = model(rows)  # one more: it predicts nothing
    near(theirs(logits, full, tokenizer.vocab_size), want, 1e-6)


def test_other_tokens_may_count_a_little():
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    rows = chat_rows(tokenizer)
    counts = answer_targets(rows, answer_marks(tokenizer))
    nats = torch.nn.functional.cross_entropy(
        model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction='none'
    ).view(counts.shape)
    want = nats[counts].mean() + 0.3 * nats[~counts].mean()
    near(answer_loss(model, rows, tokenizer, rest=0.3), want, 1e-6)


def half_a_batch(rank, folder):
    "What one of two processes does: the loss of its rows, and the mean of both gradients"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2
    )
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    loss = answer_loss(model, chat_rows(tokenizer)[2 * rank : 2 * rank + 2], tokenizer, rest=0.1)
    loss.backward()
    found = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    torch.distributed.all_reduce(found)
    if rank == 0:
        save_file(dict(found=found / 2), f'{folder}/found.safetensors')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(half_a_batch, (str(tmp_path),), nprocs=2)
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    rows = chat_rows(tokenizer)
    counts = answer_targets(rows, answer_marks(tokenizer)).sum(1)
    assert counts[:2].sum() != counts[2:].sum()  # else a mean of means would do
    loss = answer_loss(model, rows, tokenizer, rest=0.1)
    loss.backward()
    want = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    near(load_file(tmp_path / 'found.safetensors')['found'], want, 1e-5)


@pytest.mark.parametrize('rest', [0.0, 0.1])
def test_a_batch_in_parts_learns_what_it_learns_as_a_whole(rest):
    tokenizer = byte_tokenizer()
    rows = torch.cat([chat_rows(tokenizer, 3), torch.full((1, 65), 5)])  # the last has no answer
    counts = answer_targets(rows, answer_marks(tokenizer)).sum(1)
    assert len({*counts.tolist()}) == 4 and not counts[3]  # else a mean of means would do
    loss = partial(answer_loss, tokenizer=tokenizer, rest=rest)
    made = []
    for parts in (1, 2, 4):
        model = tiny(tokenizer)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = StepRunner(accumulate=parts)
        said = torch.stack(step(model, optimizer, rows, 1e9, loss))
        made.append(torch.cat([said, *(p.detach().flatten() for p in model.parameters())]))
    near(made[1], made[0], 1e-6)
    near(made[2], made[0], 1e-6)


def test_a_batch_without_an_answer_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(LabError, match='holds no whole answer'):
        answer_loss(tiny(tokenizer), torch.full((2, 9), 5), tokenizer)
    with pytest.raises(LabError, match="no mark '<|assistant|>'"):
        answer_loss(tiny(tokenizer), torch.full((2, 9), 5), BPETokenizer.train('abc', 256))


def test_a_model_of_blanks_has_no_loss_on_answers():
    from llm_lab.diffusion import diffusion_llama

    tokenizer = byte_tokenizer()
    model = MiniGPT(diffusion_llama(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2))
    with pytest.raises(LabError, match='answers: this model is trained for MaskedDiffusion'):
        answer_loss(model, torch.zeros(2, 9, dtype=torch.int64), tokenizer)


# ---- more marks


@pytest.mark.parametrize('tie', [False, True])
@pytest.mark.parametrize('kind', ['bpe', 'chars'])
def test_more_marks_leave_the_rest_as_it_was(kind, tie, tmp_path):
    tokenizer = CharTokenizer('abc |\n') if kind == 'chars' else byte_tokenizer(['[INST]'])
    model = tiny(tokenizer, tie=tie)
    grown, more = add_marks(model, tokenizer)
    n = tokenizer.vocab_size
    assert more.vocab_size == n + 4 == grown.cfg.vocab_size and tokenizer.vocab_size == n
    ids = torch.tensor([tokenizer.encode('abc abc')])
    near(grown(ids)[..., :n], model(ids))
    text = 'a<|user|>b'
    if kind == 'bpe':
        assert more.encode(text) == tokenizer.encode(text)
    assert more.decode(more.encode('a<|user|>b|', allowed_special='all')) == 'a<|user|>b|'
    new = grown.lm_head.weight[n:]
    assert new.isfinite().all() and len({*new[:, 0].tolist()}) == 4
    again, same = add_marks(grown, more)
    assert same is more and again.cfg == grown.cfg
    more.save(tmp_path)
    kept = load_tokenizer(tmp_path)
    assert kept.encode('a<|end|>', allowed_special='all') == more.encode('a<|end|>', 'all')


def test_a_foreign_tokenizer_takes_marks(tmp_path):
    tokenizer = byte_tokenizer(['[INST]'])
    tokenizer.save(tmp_path)
    foreign = ForeignTokenizer(json.loads((tmp_path / 'tokenizer.json').read_text()))
    more = with_marks(foreign)
    assert more.special_tokens['<|end|>'] == foreign.vocab_size + 3
    assert more.encode('a<|end|>b', '<|end|>') == [97, foreign.vocab_size + 3, 98]
    assert more.encode('a<|end|>b') == foreign.encode('a<|end|>b')


# ---- where templates come from


def test_templates_are_found_in_files_and_folders(tmp_path):
    messages = [dict(role='user', content='hi')]
    named = [dict(name='default', template='D{{ eos_token }}'), dict(name='tool_use', template='T')]
    config = dict(chat_template=named, eos_token=dict(content='</s>'), bos_token=None)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert load_template(tmp_path).render(messages) == 'D</s>'
    assert load_template(tmp_path, 'tool_use').render(messages) == 'T'
    with pytest.raises(LabError, match="no chat template 'rag': choose from default, tool_use"):
        load_template(tmp_path, 'rag')
    (tmp_path / 'chat_template.jinja').write_text('J{{ eos_token }}')
    assert load_template(tmp_path).render(messages) == 'J</s>'
    assert load_template(tmp_path / 'chat_template.jinja').render(messages) == 'J</s>'
    with pytest.raises(LabError, match='has no chat template'):
        load_template(tmp_path / 'nothing')


def test_a_package_keeps_its_template(tmp_path):
    from llm_lab.package import load, save

    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    save(tmp_path / 'a', model, tokenizer)
    assert load(tmp_path / 'a').tokenizer.chat_template is None
    assert template_of(load(tmp_path / 'a').tokenizer).source == CHAT
    tokenizer.chat_template = CHATML
    save(tmp_path / 'b', model, tokenizer)
    assert load(tmp_path / 'b').tokenizer.chat_template == CHATML
    assert template_of(load(tmp_path / 'b').tokenizer).source == CHATML
    assert load_template(tmp_path / 'b').source == CHATML
    (tmp_path / 'b' / 'chat_template.jinja').write_text('other')
    with pytest.raises(LabError, match='wrong hash'):
        load(tmp_path / 'b')
    with pytest.raises(LabError, match='no chat template'):
        template_of(byte_tokenizer(['[INST]']))


# ---- conversations as a corpus


def chats(n=60, seed=0):
    r = random.Random(seed)
    return [
        dict(messages=conversation(r, ['red ', 'ball ', 'Anna ', 'sees '])[-2:]) for _ in range(n)
    ]


def write_chats(path, records):
    path.write_text('\n'.join(json.dumps(x) for x in records), encoding='utf-8')
    return path


def test_a_file_of_conversations_is_a_corpus(tmp_path):
    records = chats()
    path = write_chats(tmp_path / 'c.jsonl', records)
    corpus = load_corpus(path, template='chat', splits=dict(val=0.2))
    assert corpus.marks == CHAT_MARKS and corpus.template == CHAT and corpus.independent
    template = ChatTemplate(CHAT)
    want = {template.render(x['messages']) for x in records}
    assert {d for s in ('train', 'val') for d in corpus.documents(s)} == want
    again = load_corpus(path, template='chat', splits=dict(val=0.2))
    assert again.splits == corpus.splits and again.sha256 == corpus.sha256
    (tmp_path / 'chatml.jinja').write_text(CHATML)
    corpus = load_corpus(path, template=tmp_path / 'chatml.jinja')
    assert set(corpus.marks) == {'<|im_start|>', '<|im_end|>'} and corpus.template == CHATML


def test_dolly_s_records_are_conversations(tmp_path):
    record = dict(instruction='Who?', context='Anna came.', response='Anna.', category='qa')
    path = write_chats(tmp_path / 'd.jsonl', [record, record | dict(context='')])
    documents = [*load_corpus(path, template='chat').documents('train')]
    assert documents[0] == '<|user|>Who?\n\nAnna came.<|end|><|assistant|>Anna.<|end|>'


@pytest.mark.parametrize(
    'record,why',
    [
        (dict(messages=[dict(role='user', content='a<|end|>')]), 'line 2.*holds .<.end.>.'),
        (dict(messages=[dict(role='user', content='<|endoftext|>')]), 'line 2.*endoftext'),
        (dict(messages=[dict(role='king', content='a')]), 'line 2.*role of a message'),
        (dict(messages=[dict(role='user')]), 'line 2'),
        (dict(messages='hello'), 'line 2.*no list of messages'),
        (dict(text='hello'), 'line 2 holds no conversation, only text'),
    ],
)
def test_a_record_that_cannot_be_learned_is_named(record, why, tmp_path):
    path = write_chats(tmp_path / 'c.jsonl', [chats(1)[0], record])
    with pytest.raises(LabError, match=why) as e:
        load_corpus(path, template='chat')
    assert '\n' not in str(e.value)


def test_what_holds_no_conversations_is_refused(tmp_path):
    (tmp_path / 'a.txt').write_text('once upon a time')
    with pytest.raises(LabError, match='data.template wants conversations'):
        load_corpus(tmp_path / 'a.txt', template='chat')
    with pytest.raises(LabError, match='no records of conversations'):
        load_corpus('tiny_tales', template='chat')
    path = write_chats(tmp_path / 'c.jsonl', chats(3))
    with pytest.raises(LabError, match='data.template=nothing: choose chat'):
        load_corpus(path, template='nothing')


@pytest.mark.parametrize('kind', ['bpe', 'chars'])
def test_marks_are_packed_as_special_tokens(kind, home, tmp_path):
    path = write_chats(tmp_path / 'c.jsonl', chats())
    corpus = load_corpus(path, template='chat')
    tokenizer = 300
    if kind == 'chars':
        tokenizer = with_marks(CharTokenizer.train(letters_of(corpus)), (END_OF_TEXT, *CHAT_MARKS))
    packed = pack(corpus, tokenizer, processes=1)
    train = PackedTokens(packed.folder, 'train')
    tok = train.tokenizer
    want = []
    for document in corpus.documents('train'):
        want += [*tok.encode(document, allowed_special=CHAT_MARKS), tok.eos_id]
    assert train.ids.tolist() == want
    assert tok.special_tokens['<|user|>'] in want
    assert not pack(corpus, tokenizer, processes=1).built
    assert pack(replace(corpus, marks=()), tokenizer, processes=1).folder != packed.folder
    ids, starts = read_split(corpus, tok, 'train')
    assert ids.tolist() == [tok.eos_id, *want]


def test_packing_in_several_processes_allows_the_same_marks(home, tmp_path, monkeypatch):
    from llm_lab import packing

    path = write_chats(tmp_path / 'c.jsonl', chats())
    corpus = load_corpus(path, template='chat')
    monkeypatch.setattr(packing, 'PIECE', 500)
    one = pack(corpus, 300, tmp_path / 'one', processes=1)
    two = pack(corpus, 300, tmp_path / 'two', processes=2)
    assert one.meta['files'] == two.meta['files']


# ---- rows of whole documents


def whole_reference(n, T, starts):
    "Next fit, document by document"
    ends = [*starts[1:], n - 1 if starts[0] == 0 else starts[0] + n]
    rows, begin = [], None
    for s, e in zip(starts, ends):
        if begin is None or e - begin > T:
            begin = s
            rows.append([])
        rows[-1].append((s, e))
    return rows


@pytest.mark.parametrize('seed', range(40))
def test_each_document_stands_whole_in_one_row_an_epoch(seed):
    r = random.Random(seed)
    lengths = [r.randrange(1, 12) for _ in range(r.randrange(3, 40))]
    ids = [0] if seed % 2 else []  # a mark before the first document, or not
    for n, length in enumerate(lengths):
        ids += [n + 1] * (length - 1) + [0]
    ids = torch.tensor(ids)
    starts = document_starts(ids, [0])
    starts = starts[:-1] if seed % 2 else starts
    T, B = 9, 2
    stream = BatchStream(ids, B, T, seed, starts=starts, whole=True)
    want = whole_reference(len(ids), T, starts.tolist())
    assert stream.per_epoch == len(want)
    assert stream.too_long == sum(length > T for length in lengths)
    for epoch in range(2):
        rows = [
            row.tolist()
            for k in range(epoch * len(want), (epoch + 1) * len(want))
            for row in [stream(k // B)[k % B]]
        ]
        found = []
        for row in rows:
            last = max([n for n, x in enumerate(row) if x == 0 and n], default=None)
            assert row[0] == 0
            found += [x for x in row[1 : None if last is None else last + 1] if x]
        whole = [
            n + 1 for n, length in enumerate(lengths) if length <= T for _ in range(length - 1)
        ]
        cut = [n + 1 for n, length in enumerate(lengths) if length > T for _ in range(T)]
        assert sorted(found) == sorted(whole + cut)


def test_rows_of_whole_documents_go_on_where_they_stopped():
    ids = torch.tensor([0, 1, 1, 0, 2, 0, 3, 3, 3, 0] * 9)
    starts = document_starts(ids, [0])
    one = BatchStream(ids, 2, 5, 3, starts=starts, whole=True)
    for _ in range(4):
        next(one)
    two = BatchStream(ids, 2, 5, 3, starts=starts, whole=True)
    two.load_state_dict(one.state_dict())
    assert next(one).equal(next(two))
    other = BatchStream(ids, 2, 5, 3, starts=starts)
    with pytest.raises(LabError, match='starts of the saved position'):
        other.load_state_dict(one.state_dict())
    with pytest.raises(LabError, match='give starts'):
        BatchStream(ids, 2, 5, whole=True)


# ---- a run


def config(path, **more):
    data = dict(
        corpus=str(path), template='chat', tokenizer='bpe', vocab_size=300, length=64, rows='whole'
    )
    model = dict(preset='llama', d_model=16, n_layers=1, n_heads=2)
    train = dict(steps=6, batch_size=4, loss='answers', lr=0.003, optimizer='adamw', threads=1)
    eval = dict(every=3, tokens=400, sample_every=100)
    made = dict(data=data, model=model, train=train, eval=eval, log=dict(every=1))
    for key, value in more.items():
        section, _, name = key.partition('__')
        made[section][name] = value
    return made


def test_a_run_learns_answers_and_is_resumed_exactly(home, tmp_path):
    path = write_chats(tmp_path / 'c.jsonl', chats(80))
    job = train_run(config(path, eval__tokens=100_000), run='a')
    rows = read_metrics(job.folder / 'metrics.jsonl')
    vals = [x for x in rows if 'val' in x]
    assert len(vals) == 2 and vals[-1]['val'] < vals[0]['val'] + 1
    model, tokenizer, about = load(job.folder)
    assert tokenizer.chat_template == CHAT and about['template'] == 'chat'
    ids = job.ids
    counts = answer_targets(ids[None], answer_marks(tokenizer))[0]
    losses = span_losses(job.run.model, ids, starts=job.starts)[1:]
    near(torch.tensor(vals[-1]['val']), losses[counts & ~losses.isnan()].mean().float(), 1e-5)
    assert corpus_of(about).sha256 == about['corpus_sha256']
    # the command judges it by its answers, too: as the validation did, but for the first
    # conversation, before which a packed text has no mark
    score = evaluate(model, tokenizer, job.texts['corpus'], only=answer_tokens(tokenizer))
    said = json.loads(printed('eval', job.folder, '--json')[0])
    assert said['only'] == 'answers' and said['loss'] == score.loss
    assert said['bits_per_byte'] == job.result['scores']['val']['bits_per_byte']
    val = [*job.texts['corpus'].documents('val')]
    later = replace(job.texts['corpus'], splits=dict(val=val[1:]))
    score = evaluate(model, tokenizer, later, only=answer_tokens(tokenizer))
    assert abs(vals[-1]['val'] - score.loss) < 1e-9
    assert abs(vals[-1]['val_text'] - evaluate(model, tokenizer, later).loss) < 1e-9
    assert abs(vals[-1]['val_bits_per_byte'] - score.bits_per_byte) < 1e-9
    assert 'val loss of answers' in printed('eval', job.folder)[0]
    assert 'answers  ' in printed('runs', job.folder)[0]
    save(tmp_path / 'odd', model, tokenizer, about | dict(answers=dict(header=1, end='x')))
    assert 'the model says answers=' in printed('eval', tmp_path / 'odd', code=1)[1]
    (job.folder / 'result.json').unlink()  # on the way, its losses are of the answers, too
    table = compare(job.folder)
    assert table.lines[0]['only'] == 'answers' and table.lines[0]['loss'] == vals[-1]['val']
    odd = replace(score, only='')
    assert 'cannot be compared' in compare({'a': score, 'b': odd}).remarks[0]
    assert '*' not in str(compare({'a': score, 'b': odd}))
    assert ''.join(Chat(model, tokenizer).send('red?', 5)) is not None
    short = train_run(
        config(path, train__steps=6, log__checkpoint_every=3), 'train.steps=6', run='b'
    )
    shutil.rmtree(short.folder / 'checkpoints' / 'step-000006')
    (short.folder / 'latest').write_text('step-000003\n')
    again = train_run(short.folder, resume='')
    for one, two in zip(job.run.model.parameters(), again.run.model.parameters()):
        assert one.equal(two)


def start_without_marks(folder, tokenizer, path):
    "A small model, saved; and a config that hardly moves it, with all it can leave out left out"
    model = MiniGPT(llama(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=64), 1)
    save(folder / 'start', model, tokenizer)
    said = config(path, train__start_from=str(folder / 'start'), train__steps=1, train__lr=1e-9)
    said['model'] = {}
    del said['data']['vocab_size'], said['data']['tokenizer'], said['data']['length']
    return model, said


def test_marks_that_a_start_does_not_have_get_rows(home, tmp_path):
    path = write_chats(tmp_path / 'c.jsonl', chats(80))
    tokenizer = BPETokenizer.train(['red ball Anna sees'] * 9, 270, ['<|endoftext|>'])
    model, said = start_without_marks(tmp_path, tokenizer, path)
    job = train_run(said, run='a')
    grown = job.run.model
    n = tokenizer.vocab_size
    assert grown.cfg.vocab_size == n + 4 == job.texts['tokenizer'].vocab_size
    near(grown.tok.weight[:n], model.tok.weight, 1e-6)
    want, more = add_marks(model, tokenizer)
    near(grown.tok.weight, want.tok.weight, 1e-6)
    assert more.special_tokens == job.texts['tokenizer'].special_tokens
    # another tokenizer is still refused
    other = BPETokenizer.train(['completely other words'] * 9, 262, ['<|endoftext|>'])
    other.save(tmp_path / 'other')
    said['data']['tokenizer'] = str(tmp_path / 'other')
    with pytest.raises(LabError, match='there and .* here'):
        train_run(said, run='b')


def test_a_start_of_characters_gets_an_end_mark_too(home, tmp_path):
    "Characters that the start never saw, such as <, are no part of its marks"
    conversations = chats(80)
    path = write_chats(tmp_path / 'c.jsonl', conversations)
    letters = {c for chat in conversations for m in chat['messages'] for c in m['content']}
    tokenizer = CharTokenizer(''.join(sorted(letters - {'<', '|', '>'})))
    model, said = start_without_marks(tmp_path, tokenizer, path)
    job = train_run(said, run='a')
    made = job.texts['tokenizer']
    assert made.vocab_size == tokenizer.vocab_size + 5 and made.eos_id is not None
    near(job.run.model.tok.weight[: tokenizer.vocab_size], model.tok.weight, 1e-6)


def test_a_validation_text_without_answers_is_refused(home, tmp_path):
    path = write_chats(
        tmp_path / 'c.jsonl', [dict(messages=[dict(role='user', content='hi ' * 9)])] * 90
    )
    with pytest.raises(LabError, match='there is no answer in the first tokens'):
        train_run(config(path), run='a')


# ---- to Hugging Face and back


@pytest.mark.parametrize('name', ['CHAT', 'CHATML', 'ZEPHYR', 'LLAMA3'])
def test_a_template_goes_to_hugging_face_and_comes_back(name, tmp_path):
    from llm_lab.hub import from_hf, to_hf

    transformers = pytest.importorskip('transformers')
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None if name == 'CHAT' else TEMPLATES[name]
    model = tiny(tokenizer)
    to_hf(tmp_path / 'm', model, tokenizer)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
    opened = from_hf(tmp_path / 'm')
    r = random.Random(name)
    for _ in range(10):
        messages = conversation(r, ['red', ' ball', 'a'])
        chat = Chat(model, tokenizer)
        chat.messages = messages
        back = Chat(opened.model, opened.tokenizer)
        back.messages = messages
        theirs = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert chat.prompt() == back.prompt() == theirs['input_ids']
    said = json.loads((tmp_path / 'm' / 'generation_config.json').read_text())
    end = {'CHAT': '<|end|>', 'CHATML': '<|im_end|>', 'ZEPHYR': '</s>', 'LLAMA3': '<|eot_id|>'}
    ends = said['eos_token_id']
    assert tokenizer.special_tokens[end[name]] in ends and chat.stops == ends
    assert {*ends} <= {*back.stops}


def test_texts_of_marks_that_a_folder_names_stay_with_its_template(tmp_path):
    "Qwen's end mark is another one than the first that its tokenizer.json suggests"
    tokenizer = byte_tokenizer()
    source = '\n{{ messages[0].content + eos_token }}é'
    template = ChatTemplate(source, eos_token='<|im_end|>')
    carried = carried_source(template, tokenizer)
    messages = [dict(role='user', content='a')]
    assert template.render(messages) == '\na<|im_end|>é'
    assert ChatTemplate(carried, tokenizer).render(messages) == '\na<|im_end|>é'
    assert carried_source(ChatTemplate(source, tokenizer), tokenizer) == source


# ---- the exercises of the lesson


lesson = functools.partial(cells_of, '62_chat')
run = functools.partial(run_cell, '62_chat')


@functools.cache
def small_world():
    "Eight conversations of one question; what the cells of the chapter need to tune on them"
    tokenizer = byte_tokenizer()
    template = ChatTemplate(CHAT)
    unseen = []
    for n, colour in enumerate(['red', 'tan'] * 4):
        question = dict(role='user', content=f'{n}?')
        unseen.append([question, dict(role='assistant', content=colour)])
    end = tokenizer.eos_id
    ids = [chat_ids(template, tokenizer, chat, add_generation_prompt=False) for chat in unseen]
    longest = max(map(len, ids))  # 'an' is one token
    rows = torch.tensor([[end, *x, *[end] * (1 + longest - len(x))] for x in ids])
    return dict(tokenizer=tokenizer, template=template, unseen=unseen, rows=rows)


def tuned_in_small(loss_fn, seed=0, steps=80):
    "A small model, tuned on the small world"
    world = small_world()
    model = tiny(world['tokenizer'], seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, world['rows']).backward()
        optimizer.step()
    return model


def exercises(tune, **stubs):
    "What `check` says of these answers in the chapter, {name: verdict}; and what its cells defined"
    said = {}
    of_spec = dict(last_answer_spec='my_targets', measured='my_guess', too_many_spec='too_many')

    def noted(f, spec, *cases):
        said[of_spec[spec.__name__]] = check(f, spec, *cases)

    world = small_world()
    tokenizer = world['tokenizer']
    space = world | dict(
        vars(chat_module),
        **dict(cache=functools.cache, median_low=statistics.median_low, check=noted, tune=tune),
        mark_ids=tokenizer.special_tokens,
        marks_in_ids=answer_marks(tokenizer),
        begins=begins,
        chat_ids=chat_ids,
        special={*tokenizer.special_tokens.values()},
        encoded=encode_chat(world['template'], tokenizer, world['unseen'][0], False),
        test_eq=lambda a, b: None,
    )
    for cell in ('def answers_spec', '@torch.no_grad()\ndef greedy'):
        run(cell, space)
    for cell in ('def my_targets', 'def without_end', 'def too_many'):
        run(cell, space, **stubs)
    return said, space


TUNED = []  # without end marks: the same for all answers


def tuned_once(loss_fn, seed, steps):
    if not TUNED:
        TUNED.append(tuned_in_small(loss_fn))
    return TUNED[0]


def each(answers):
    return [pytest.param(name, f, id=f.__name__) for name in answers for f in answers[name]]


@pytest.mark.parametrize('name,answer', each(answers.RIGHT))
def test_a_right_answer_is_told_so(name, answer):
    said, _ = exercises(tuned_once, **{name: answer})
    assert re.fullmatch(rf'{answer.__name__}: right on \d+ cases', said.pop(name))
    assert all(verdict.endswith(': not yet') for verdict in said.values())


@pytest.mark.parametrize('name,answer', each(answers.WRONG))
def test_a_wrong_answer_meets_a_counter_example(name, answer):
    said, _ = exercises(tuned_once, **{name: answer})
    assert 'expected' in said[name]


def test_without_a_guess_no_model_is_tuned():
    tuned = []
    said, _ = exercises(lambda *a, **k: tuned.append(a))
    assert said['my_guess'] == 'my_guess: not yet' and not tuned


def test_with_its_end_mark_in_the_loss_an_answer_ends():
    "The same small world, which can learn both: that the other loss does not end is no accident"
    _, space = exercises(tuned_once)
    model = tuned_in_small(lambda *a: answer_loss(*a, space['tokenizer']))
    for messages in space['unseen']:
        said = space['greedy'](model, messages[:1], 12)
        assert space['tokenizer'].decode(said) == messages[1]['content']


def test_what_the_third_exercise_breaks_shows_in_no_row_of_a_training():
    "As its answer says: `>=` counts too much only before the first mark, and rows begin with one"
    source = inspect.getsource(answer_targets)
    assert source.count('headers > closed') == 1
    space = dict(vars(chat_module))
    exec(source.replace('headers > closed', 'headers >= closed'), space)
    broken = space['answer_targets']
    rows = small_world()['rows']
    marks = answer_marks(small_world()['tokenizer'])
    assert broken(rows, marks).equal(answer_targets(rows, marks))
    assert not broken(rows[:, 1:], marks).equal(answer_targets(rows[:, 1:], marks))
