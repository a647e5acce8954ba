"""Which small model learns to answer questions about stories soonest, on one thread of a CPU?

    python experiments/tales_chat/trial.py --minutes 10 --tokenizer bpe --d_model 128 --n_layers 4

One training from random weights on whole conversations: a story, and some questions about it. Two
losses are added up, the mean over the story's tokens and the mean over the answers'; with --base,
the first minutes have the story's only. Each minute it prints both, and the share of right answers
in an exam on stories that were not trained on, with names that were (seen) and that were not
(unseen). An answer counts if each of its tokens is the most likely one, given those before it: just
what greedy sampling would write. The time is that of the processor, not of the clock."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F

import llm_lab as lab
from llm_lab.questions import QuestionsConfig, ask, exact_match, exam

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

MARKS = '<|user|>', '<|assistant|>', '<|end|>'
OTHER, STORY, ANSWER = 0, 1, 2  # what a token belongs to: questions and marks are not learned


def options():
    parser = bench.parser(__doc__)
    parser.add_argument('--minutes', type=float, default=10, help='of the processor')
    parser.add_argument('--base', type=float, default=0, help='minutes on stories alone, of these')
    parser.add_argument('--tokenizer', default='bpe', choices=['bpe', 'chars'])
    parser.add_argument('--vocab_size', type=int, default=512, help='of bpe')
    parser.add_argument('--d_model', type=int, default=128)
    parser.add_argument('--n_layers', type=int, default=4)
    parser.add_argument('--n_heads', type=int, default=4)
    parser.add_argument('--batch_size', type=int, default=8, help='conversations')
    parser.add_argument('--optimizer', default='muon', choices=['muon', 'adamw'])
    parser.add_argument('--lr', type=float, default=0.02)
    parser.add_argument('--rest_lr', type=float, default=0.004, help="muon's, of what it leaves")
    parser.add_argument('--n', type=int, default=10_000, help='conversations to train on')
    parser.add_argument('--events', type=int, default=5, help='of a story')
    parser.add_argument('--asides', type=int, default=2, help='of a story')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def tokenizer_of(o, documents):
    "(a tokenizer, learned from the first thousand conversations; the ids of the three marks)"
    texts = [f'{q.story} {q.question} {q.answer}\n' for d in documents[:1000] for q in d]
    if o.tokenizer == 'chars':
        marks = '\x01\x02\x03'  # characters that no text holds
        tok = lab.CharTokenizer.train(''.join(sorted({*''.join(texts), *marks})))
        return tok, tok.encode(marks)
    tok = lab.BPETokenizer.train(texts, o.vocab_size, special_tokens=MARKS)
    return tok, [tok.special_tokens[mark] for mark in MARKS]


def encoded(tok, marks, questions):
    "(ids, what each belongs to) of a conversation"
    user, assistant, end = marks
    ids, parts = [], []

    def add(new, part):
        ids.extend(new)
        parts.extend([part] * len(new))

    add([user], OTHER)
    add(tok.encode(questions[0].story + '\n'), STORY)
    for n, q in enumerate(questions):
        add(([user] if n else []) + tok.encode(q.question) + [end, assistant], OTHER)
        add(tok.encode(q.answer) + [end], ANSWER)
    return ids, parts


def rows(tok, marks, conversations):
    "Tensors (n, T): ids and parts, filled up with end marks that belong to nothing"
    both = [encoded(tok, marks, questions) for questions in conversations]
    T = max(len(ids) for ids, _ in both)
    ids = torch.full((len(both), T), marks[-1])
    parts = torch.zeros((len(both), T), dtype=torch.uint8)
    for n, (some, of) in enumerate(both):
        ids[n, : len(some)] = torch.tensor(some)
        parts[n, : len(of)] = torch.tensor(of)
    return ids, parts


def trimmed(ids, parts):
    "The same rows without columns in which nothing is learned any more"
    T = int(parts.bool().any(0).nonzero().max()) + 1
    return ids[:, :T], parts[:, :T]


def losses(model, ids, parts):
    "The means over the tokens of stories, and over those of answers"
    nats = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction='none')
    of = parts[:, 1:].flatten()
    return nats[of == STORY].mean(), nats[of == ANSWER].mean()


@torch.no_grad()
def marked(model, questions, ids, parts):
    "The exam, marked: an answer is right if greedy sampling would write it"
    model.eval()
    answers = []
    for k in range(0, len(questions), 50):
        some, of = trimmed(ids[k : k + 50], parts[k : k + 50])
        hit = (model(some[:, :-1]).argmax(-1) == some[:, 1:]) | (of[:, 1:] != ANSWER)
        answers += hit.all(1).tolist()
    model.train()
    return exact_match([q.answer if ok else '' for q, ok in zip(questions, answers)], questions)


def main():
    o = options()
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    cfg = QuestionsConfig(events=o.events, asides=o.asides, questions=5)
    documents = [ask(f'train/{k}', cfg) for k in range(o.n)]
    tok, marks = tokenizer_of(o, documents)
    ids, parts = rows(tok, marks, documents)
    exams = {}
    for names in ('seen', 'unseen'):
        questions = exam(400, replace(cfg, names=names))
        exams[names] = questions, *rows(tok, marks, [[q] for q in questions])
    longest = max(ids.shape[1], *(some.shape[1] for _, some, _ in exams.values()))
    sizes = dict(d_model=o.d_model, n_layers=o.n_layers, n_heads=o.n_heads, max_len=longest)
    model = lab.MiniGPT(lab.llama(vocab_size=tok.vocab_size, **sizes), o.seed)
    opt = lab.adamw(model, lr=o.lr)
    if o.optimizer == 'muon':
        opt = lab.muon(model, lr=o.lr, rest_lr=o.rest_lr)
    rates = [group['lr'] for group in opt.param_groups]
    draw, begin, told, step, lines = Random(o.seed), time.process_time(), 0, 0, []
    while (minutes := (time.process_time() - begin) / 60) < o.minutes:
        # a hundred steps up, and down to nothing over the second half of the time
        factor = min(1, (step + 1) / 100, 2 * (1 - minutes / o.minutes))
        for group, rate in zip(opt.param_groups, rates):
            group['lr'] = factor * rate
        chosen = draw.choices(range(o.n), k=o.batch_size)
        story, answer = losses(model, *trimmed(ids[chosen], parts[chosen]))
        (story if minutes < o.base else story + answer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        if minutes >= told + 1:
            told = int(minutes)
            line = dict(minutes=told, step=step, story=story.item(), answer=answer.item())
            for names, exam_rows in exams.items():
                line[names] = marked(model, *exam_rows).total.share
            lines.append(line)
            print(json.dumps(line), flush=True)
    for names, exam_rows in exams.items():
        print(f'{names} names\n{marked(model, *exam_rows)}')
    size = sum(p.numel() for p in model.parameters())
    bench.report(__file__, dict(vars(o), parameters=size, steps=step, lines=lines), o.save)


if __name__ == '__main__':
    main()
