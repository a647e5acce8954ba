"""A base model for questions: how soon does a small model learn who is where, and who has what?

    cd experiments/tales_chat
    python recall.py --name drills --sort drills --names syllables --steps 1200 --steady
    python recall.py --name regular --start drills --names syllables
    python recall.py --name base --start regular --steps 2400

It reads documents of chapter 16 in which much is looked up, on one thread of a CPU: first drills
(`tale_drills`), then stories that tell their state (`tale_states`). All names are made up, so it
knows none that an exam uses, and no document asks a question or has the marks of a chat. Every 200
steps, and at the end: of each kind of fact, the share that the model would have written, of which
every token is the most likely one, in 100 stories that nobody trained on; and the same of the last
telling of drills. The package and this curve are kept in runs/NAME and runs/NAME.json.

Regular names, of syllables, are copied soon. Names that are put together of real ones fall into
more pieces; a model that copies the regular ones learns them soon, another one late.

--start goes on from a package in runs/, with what it took so far added up; --steady keeps the rate,
as is right where more is to come. The other options show what matters: without --qk_norm words of
one token are not copied; --sort leaves out drills or stories."""

import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.bpe import BPETokenizer
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import keep_freed_memory
from llm_lab.llama_block import QKNorm, llama
from llm_lab.optim import muon
from llm_lab.package import load, save
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.questions import (
    QuestionsConfig,
    drill,
    final_facts,
    tale_drills,
    tale_states,
    write_story,
)
from llm_lab.train import batches, fit

EXAM = 100  # stories
RUNS = Path(__file__).parent / 'runs'
END = '<|endoftext|>'


def marked(tok, text, facts, asked=None):
    "(ids of a text and facts, [(kind, first, after the last) of the answers of the last `asked`])"
    ids = tok.encode(f'{END}{text}', allowed_special=[END])
    places = []
    for fact in facts:
        ids += tok.encode(fact.asks)
        first = len(ids)
        ids += tok.encode(fact.word)
        places.append((fact.kind, first, len(ids)))
        ids += tok.encode('.')
    return torch.tensor([ids]), places[-asked:] if asked else places


def exam_of(tok, cfg):
    "Facts at the ends of stories, and the last telling of drills"
    found = []
    for k in range(EXAM):
        story = write_story(f'val/{k}', cfg)
        found.append(marked(tok, f'{story.text} In the end:', final_facts(story, k)))
        facts = [fact._replace(kind='drill') for fact in drill(f'exam/{k}', cfg.names)]
        found.append(marked(tok, '', facts, len(facts) // 4))
    return found


@torch.no_grad()
def shares_right(model, exam):
    "{kind: the share of facts that the model would have written}"
    right = defaultdict(list)
    model.eval()
    for ids, places in exam:
        likeliest = model(ids[:, :-1]).argmax(-1)[0]  # at position t, for t + 1
        for kind, first, end in places:
            right[kind].append(torch.equal(likeliest[first - 1 : end - 1], ids[0, first:end]))
    model.train()
    return {kind: round(sum(found) / len(found), 3) for kind, found in sorted(right.items())}


def new_model(a, cfg):
    "(Llama's block, with or without QK-norm; a tokenizer of the words, in which names are pieces)"
    some = tale_states(100_000, cfg).documents('train')[:3000]
    tok = BPETokenizer.train(some, a.vocab_size, special_tokens=[END])
    size = dict(d_model=a.d_model, n_layers=a.n_layers, n_heads=4, max_len=a.length, tie=True)
    cfg = llama(tok.vocab_size, **size)
    if a.qk_norm:
        attn = part(cfg.attn.func, bias=False, transforms=(part(QKNorm), part(RoPE)))
        cfg = replace(cfg, attn=attn)
    return MiniGPT(cfg, seed=a.seed), tok


def main(a):
    torch.set_num_threads(1)
    keep_freed_memory()
    cfg = QuestionsConfig(names=a.names)
    before = []  # the stages until now
    if a.start:
        model, tok, _ = load(RUNS / a.start)
        model.train()
        before = json.loads((RUNS / f'{a.start}.json').read_text())['stages']
    else:
        model, tok = new_model(a, cfg)
    exam = exam_of(tok, cfg)
    start = time.process_time()
    curve = []
    stage = dict(options=vars(a), curve=curve)

    def falling(step, steps):
        "A hundred steps up, and down to nothing over the second half"
        rise = min(1.0, (step + 1) / 100)
        return rise if a.steady else min(rise, 2 * (1 - step / steps))

    def look(run):
        minutes = (time.process_time() - start) / 60
        loss = sum(run.losses[-25:]) / 25
        right = shares_right(model, exam)
        curve.append(dict(minutes=round(minutes, 1), step=run.step, loss=round(loss, 3), **right))
        print(json.dumps(curve[-1]), flush=True)
        save(RUNS / a.name, model, tok, about=dict(step=run.step))

    corpus = dict(drills=tale_drills, states=tale_states)[a.sort](100_000, cfg)
    rows = batches(corpus, tok, a.batch_size, a.length, whole=True, seed=a.seed)
    optimizer = muon(model, a.lr, 0.1, a.lr / 2)
    fit(model, rows, a.steps, optimizer=optimizer, callbacks={200: look}, schedule=falling)
    stages = [*before, stage]
    minutes = sum(stage['curve'][-1]['minutes'] for stage in stages)
    found = dict(stages=stages, minutes=minutes, params=model.n_params, **bench.one_thread())
    (RUNS / f'{a.name}.json').write_text(json.dumps(found))
    return found


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--name', required=True, help='of the package in runs/')
    ap.add_argument('--sort', default='states', choices=['drills', 'states'])
    ap.add_argument('--names', default='made-up', choices=['syllables', 'made-up'])
    ap.add_argument('--start', help='the package in runs/ from which to go on')
    ap.add_argument('--steps', type=int, default=8000)
    ap.add_argument('--steady', action='store_true', help='a rate that does not fall')
    ap.add_argument('--vocab_size', type=int, default=640)
    ap.add_argument('--qk_norm', action=bench.argparse.BooleanOptionalAction, default=True)
    ap.add_argument('--d_model', type=int, default=128)
    ap.add_argument('--n_layers', type=int, default=4)
    ap.add_argument('--lr', type=float, default=0.01, help='of Muon')
    ap.add_argument('--batch_size', type=int, default=14)
    ap.add_argument('--length', type=int, default=256)
    ap.add_argument('--seed', type=int, default=0)
    print(json.dumps(main(ap.parse_args())))
