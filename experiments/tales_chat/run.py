"""From stories to answers: how much of 16's questions does a small model answer after ten minutes?

    python experiments/tales_chat/run.py [--seeds 3] [--save]

The base model is that of recall.py: it has read stories with their state in the end, and drills,
but no question; how long that took, and what it looks up, is printed. Then it is tuned on
conversations about other stories, with the loss on the answers and a little on the rest: all of
its weights, or adapters of several ranks (LoRA), which train the rows of the marks, too. Exams of
`--exam` questions each: on stories that nobody trained on, with the names of the tuning and with
names that no training knew. An answer is right if it is the whole answer, exactly, and ended; it
is written greedily. Beside it the baselines of 16, which see too little. What is forgotten: bits
per character, before and after, on held-out documents like the base's own (made-up names, with
their state in the end), and on stories with the names of the tuning, which the base never met.

Then, for each seed, from the tuned model: GRPO with the exam's own grading as its reward, and
further tuning for as long. All on one thread each; times are the processor's.

Cells are kept in runs/, and an interrupted experiment goes on. One line of JSON at the end."""

import copy
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chat import CHAT_MARKS, add_marks, answer_loss
from llm_lab.evaluation import evaluate
from llm_lab.hardware import keep_freed_memory
from llm_lab.lora import add_lora, merge_lora, train_rows
from llm_lab.optim import muon
from llm_lab.package import load, save
from llm_lab.questions import (
    QuestionsConfig,
    ask,
    baselines,
    conversation,
    exact_match,
    exam,
    tale_questions,
    tale_states,
    tale_stories,
)
from llm_lab.reward import grpo, sample_answers
from llm_lab.templates import CHAT, ChatTemplate, chat_ids
from llm_lab.train import adamw, batches, fit

HERE = Path(__file__).parent
RUNS = HERE / 'runs'
TALKS = 20_000
BATCH = 14
RATES = 0.008, 0.1, 0.004  # of Muon: matrices of the blocks, weight decay, and all else
LORA_RATE = 0.02  # of AdamW: Muon at full tuning's rates left adapters at a guess
REST = 0.15  # weight of what is no answer
CFG = QuestionsConfig()
# more of what counts in the same time
PRACTICE = QuestionsConfig(questions=5)
ASKED = 8  # questions of a step of GRPO
REWARD_RATE = 0.0003


def clock(work):
    "(what some work returns, the processor's minutes that it took)"
    start = time.process_time()
    found = work()
    return found, (time.process_time() - start) / 60


# ---- exams


def exams(n):
    "{names: questions}, each about another story of the test split"
    return {names: exam(n, replace(CFG, names=names)) for names in ('seen', 'unseen')}


def prompt(tok, question):
    "The ids of a question with its story, up to where the answer begins"
    return chat_ids(ChatTemplate(CHAT), tok, conversation([question])[:-1])


def answers(model, tok, questions):
    "What a model answers, greedily; an answer that does not end is none"
    end = tok.special_tokens['<|end|>']
    found = []
    for k in range(0, len(questions), 50):
        prompts = [prompt(tok, q) for q in questions[k : k + 50]]
        written = sample_answers(model, prompts, 1, 16, end, temperature=0)
        for ids in written.texts:
            found.append(tok.decode(ids[:-1]) if ids and ids[-1] == end else '')
    return found


def marked(model, tok, n):
    "The exams, marked: {names: {'total': [right, n], 'kind': …, 'hops': …, 'distance': …}}"
    found = {}
    for names, questions in exams(n).items():
        match = exact_match(answers(model, tok, questions), questions)
        print(f'{names} names\n{match}', flush=True)
        found[names] = as_numbers(match)
    return found


def as_numbers(match):
    "An `ExactMatch` as lists of numbers"
    groups = {name: getattr(match, name) for name in ('kind', 'hops', 'distance')}
    return dict(
        total=[match.total.right, match.total.n],
        **{g: {str(k): [s.right, s.n] for k, s in some.items()} for g, some in groups.items()},
    )


def without_reading(n):
    "The readers of 16 who see too little, in the same exams"
    training = [q for k in range(3000) for q in ask(f'train/{k}', CFG)]
    return {
        name: {
            names: as_numbers(exact_match(map(reader, questions), questions))['total']
            for names, questions in exams(n).items()
        }
        for name, reader in baselines(training).items()
    }


# ---- tuning


def started(base, rank=0):
    "The base model with the marks of a chat: all of it to be trained, or adapters of a rank"
    model, tok, _ = load(RUNS / base)
    old = tok.vocab_size
    model, tok = add_marks(model, tok, CHAT_MARKS)
    if rank:
        add_lora(model, rank, alpha=2 * rank)
        train_rows(model, range(old, tok.vocab_size))
    return model, tok


def practise(model, tok, steps, seed=0, rate=1.0, adapters=False):
    "Train on conversations, with the loss on the answers and a little on the rest"
    rows = batches(
        tale_questions(TALKS, PRACTICE), tok, BATCH, model.cfg.max_len, seed=seed, whole=True
    )
    loss = partial(answer_loss, tokenizer=tok, rest=REST)
    lr, decay, rest_lr = RATES
    if adapters:
        optimizer = adamw(model, LORA_RATE, weight_decay=0.0)
    else:
        optimizer = muon(model, rate * lr, decay, rate * rest_lr)
    return fit(model, rows, steps, optimizer=optimizer, loss_fn=loss, seed=seed)


def forgotten(model, tok):
    "{documents: bits per character}: the base's own, and stories with the names of the tuning"
    corpora = dict(own=tale_states(4000), stories=tale_stories(2000))
    return {name: evaluate(model, tok, corpus).bits for name, corpus in corpora.items()}


def tune(base, rank, steps, seed, n):
    "Tune all weights (rank 0), or adapters; exams before and after; what is forgotten, in bits"
    torch.set_num_threads(1)
    keep_freed_memory()
    model, tok = started(base, rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = forgotten(model, tok)
    minutes = 0.0
    if steps:
        _, minutes = clock(lambda: practise(model, tok, steps, seed, adapters=bool(rank)))
    if rank:
        model = merge_lora(model)
    model.eval()
    save(RUNS / f'tuned-{base}-{rank}-{steps}-{seed}', model, tok)
    after = forgotten(model, tok)
    return dict(
        minutes=round(minutes, 1),
        trained=trained,
        params=model.n_params,
        exams=marked(model, tok, n),
        bits={name: [bits, after[name]] for name, bits in before.items()},
    )


# ---- a reward in the place of answers


def with_reward(model, tok, steps, seed):
    "GRPO on stories that nobody has seen; the reward is the exam's marking: exactly right, or not"
    end = tok.special_tokens['<|end|>']
    right = {}  # {ids of a question: ids of its answer}

    def prompts(step):
        right.clear()
        for k in range(ASKED):
            q = ask(f'reward/{seed}/{step}/{k}', PRACTICE)[0]
            right[tuple(prompt(tok, q))] = [*tok.encode(q.answer), end]
        return [*map(list, right)]

    def reward(asked, answer):
        return float(list(answer) == right[tuple(asked)])

    reference = copy.deepcopy(model).eval()
    return grpo(model, reference, prompts, reward, steps, end, lr=REWARD_RATE, seed=seed)


def further(base, start_steps, way, steps, seed, n):
    "From a tuning that stopped early: for some steps more of the same, or the reward"
    torch.set_num_threads(1)
    keep_freed_memory()
    model, tok, _ = load(RUNS / f'tuned-{base}-0-{start_steps}-{seed}')
    if way == 'reward':
        notes, minutes = clock(lambda: with_reward(model, tok, steps, seed))
        found = dict(reward=[round(note['reward'], 3) for note in notes], kl=notes[-1]['kl'])
    else:
        _, minutes = clock(lambda: practise(model, tok, steps, seed + 100, rate=0.5))
        found = {}
    return dict(minutes=round(minutes, 1), exams=marked(model.eval(), tok, n), **found)


# ---- all of it


def kept(work, *job):
    "What a cell returns, from runs/ where it was done before"
    name = '-'.join(map(str, (work.__name__, *job)))
    return bench.kept(RUNS / f'{name}.json', lambda: work(*job))


def share(right_of_n):
    "[right, n] → the share"
    right, n = right_of_n
    return right / n


def show(label, cell):
    "A line of the table of tunings"
    exams = '  '.join(f'{names} {share(e["total"]):6.1%}' for names, e in cell['exams'].items())
    print(f'{label:24}{cell["minutes"]:6.1f} min  {exams}')


def main(seeds, base, steps, extra, ranks, n):
    found = dict(base=json.loads((RUNS / f'{base}.json').read_text()), exam=n, steps=steps)
    b = found['base']
    print(f'base: {b["minutes"]} min, {json.dumps(b["stages"][-1]["curve"][-1])}')
    found['before'] = kept(tune, base, 0, 0, 0, n)['exams']
    found['baselines'] = kept(without_reading, n)
    for name, exams in found['baselines'].items():
        print(f'{name:24}' + '  '.join(f'{k} {share(e):6.1%}' for k, e in exams.items()))
    found['tuned'] = {}
    for rank in (0, *ranks):
        cell = found['tuned'][rank] = kept(tune, base, rank, steps, 0, n)
        show(f'rank {rank}' if rank else 'all weights', cell)
        for name, (before, after) in cell['bits'].items():
            print(f'{"":24}{name} {before:.4f} → {after:.4f} bits; {cell["trained"]:,} trained')
    found['further'] = {way: [] for way in extra}
    for seed in range(seeds):
        for way, more in extra.items():
            kept(tune, base, 0, steps, seed, n)
            cell = kept(further, base, steps, way, more, seed, n)
            found['further'][way].append(cell)
            show(f'{way}, seed {seed}', cell)
    return found | bench.one_thread()


if __name__ == '__main__':
    ap = bench.parser(__doc__, seeds=3)
    ap.add_argument('--base', default='words', help='what recall.py was told to name')
    ap.add_argument('--steps', type=int, default=1300, help='of tuning')
    ap.add_argument('--rewarded', type=int, default=80, help='steps of GRPO')
    ap.add_argument('--further', type=int, default=450, help='steps of further tuning, as long')
    ap.add_argument('--ranks', type=int, nargs='*', default=[1, 4, 16])
    ap.add_argument('--exam', type=int, default=500, help='questions of an exam')
    a = ap.parse_args()
    extra = dict(reward=a.rewarded, practice=a.further)
    result = main(a.seeds, a.base, a.steps, extra, a.ranks, a.exam)
    bench.report(__file__, result, a.save)
