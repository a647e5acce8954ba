"""How soon does a small model learn who is where, and who has what? One thread of a CPU.

    python experiments/tales_chat/recall.py --minutes 10 --vocab_size 1280 --qk_norm

Stories of chapter 16, each followed by its state in the end, one short sentence a fact, the key
before the value: "Mia was at the pond. The kite looked red. The kite was with Ben. Ben had got the
kite from Mia." That is some ten facts in sixty words, many more than the story itself recalls. In
`--ordered` of the stories the facts stand in the order in which the story names people and things,
in the others in any order. Every minute and at the end: of each kind of fact, the share of which
every token is the most likely one, in 100 stories that nobody trained on. A vocabulary of 1280 has
a token for each word, one of 320 nearly one for each letter.

With --drills, the first minutes are no stories: three to six such facts that are told four times,
each time in another order, so that one word of eight is a recall."""

import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random
import sys

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.bpe import BPETokenizer
from llm_lab.corpora import Corpus
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import keep_freed_memory
from llm_lab.llama_block import QKNorm, llama
from llm_lab.optim import muon
from llm_lab.package import save
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.questions import NAME_SETS, QuestionsConfig, write_story
from llm_lab.tales import END, POOLS
from llm_lab.train import batches, fit

EXAM = 100  # stories
RUNS = Path(__file__).parent / 'runs'
ONSETS = 'b br ch d dr f fl g gr h j k kl l m n p r s sh st t tr v w z'.split()
CODAS = ['', '', *'dklmnrst']


def facts_of(story):
    "(kind, what asks for it, the answer) of all that is true in the end"
    for who in story.people:
        yield 'place', f' {who} was at the', f' {story.now("place", who)}'
        if len(story.held_by(who)) == 1:
            yield 'thing', f' {who} had the', f' {story.held_by(who)[0]}'
    for thing in story.things:
        yield 'colour', f' The {thing} looked', f' {story.now("colour", thing)}'
        yield 'holder', f' The {thing} was with', f' {story.now("holder", thing)}'
    times = Counter((gift.thing, gift.taker) for gift in story.gifts)
    for gift in story.gifts:
        if times[gift.thing, gift.taker] == 1:
            yield 'giver', f' {gift.taker} had got the {gift.thing} from', f' {gift.giver}'


def ending(story, ordered):
    "Some facts of a story, in the story's order or in any"
    random = Random(story.text)
    facts = [*facts_of(story)]
    givers = [fact for fact in facts if fact[0] == 'giver']
    for fact in givers[3:]:  # of gifts, three are enough
        facts.remove(fact)
    if random.random() >= ordered:
        random.shuffle(facts)
    return facts


def document(story, ordered):
    "A story, and its ending"
    return f'{story.text} In the end{told(ending(story, ordered))}'


def shorter(cfg, key):
    "Half of the stories have fewer people and things, and less happens in them"
    random = Random(key)
    if random.random() < 0.5:
        return cfg
    people = random.randint(2, cfg.people)
    things = random.randint(1, min(people, cfg.things))
    return replace(cfg, people=people, things=things, events=random.randint(0, cfg.events))


def corpus_of(cfg, n, ordered, drilled):
    "n documents: stories with endings, and a share of drills"
    texts = []
    for k in range(n):
        if Random(f'kind/{k}').random() < drilled:
            texts.append(told(drill(f'mixed/{k}', cfg.names)))
        else:
            key = f'train/{k}'
            texts.append(document(write_story(key, shorter(cfg, key)), ordered))
    splits = dict(train=END.join(texts), val=texts[0], test=texts[0])
    return Corpus('endings', splits, END, 'Apache-2.0', 'made here', '', independent=True)


def drill(key, who):
    "[(kind, what asks for it, the answer)] of a made-up state, told four times in four orders"
    random = Random(key)
    names = random.sample(NAME_SETS[who], 6)
    things = random.sample(POOLS['thing'], 6)
    facts = [('drill', f' {who} was at the', f' {random.choice(POOLS["place"])}') for who in names]
    for thing in things:
        facts.append(('drill', f' The {thing} looked', f' {random.choice(POOLS["colour"])}'))
        facts.append(('drill', f' The {thing} was with', f' {random.choice(names)}'))
    some = random.sample(facts, random.randint(3, 6))
    return [fact for _ in range(4) for fact in random.sample(some, len(some))]


def told(facts):
    "Facts as a text"
    return ''.join(f'{asks}{answer}.' for _, asks, answer in facts)


def drills(n, who):
    "A corpus of n drills"
    texts = [told(drill(f'drill/{k}', who)) for k in range(n)]
    splits = dict(train=END.join(texts), val=texts[0], test=texts[0])
    return Corpus('drills', splits, END, 'Apache-2.0', 'made here', '', independent=True)


def marked(tok, text, facts, asked=None):
    "(ids of a text and facts, [(kind, first, after the last) of the answers of the last `asked`])"
    ids = tok.encode(f'<|endoftext|>{text}', allowed_special=['<|endoftext|>'])
    places = []
    for kind, asks, answer in facts:
        ids += tok.encode(asks)
        first = len(ids)
        ids += tok.encode(answer)
        places.append((kind, first, len(ids)))
        ids += tok.encode('.')
    return torch.tensor([ids]), places[-asked:] if asked else places


def exam_of(tok, cfg):
    "Endings of stories, and the last telling of drills"
    stories = [write_story(f'val/{k}', cfg) for k in range(EXAM)]
    found = [marked(tok, f'{s.text} In the end', ending(s, ordered=0.0)) for s in stories]
    tests = [drill(f'exam/{k}', cfg.names) for k in range(EXAM)]
    return found + [marked(tok, '', facts, len(facts) // 4) for facts in tests]


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
    return {kind: round(sum(found) / len(found), 3) for kind, found in right.items()}


def model_of(tok, a):
    "Llama's block, with or without QK-norm"
    cfg = llama(
        tok.vocab_size,
        d_model=a.d_model,
        n_layers=a.n_layers,
        n_heads=4,
        max_len=a.length,
        tie=True,
    )
    if a.qk_norm:
        attn = part(cfg.attn.func, bias=False, transforms=(part(QKNorm), part(RoPE)))
        cfg = replace(cfg, attn=attn)
    return MiniGPT(cfg, seed=a.seed)


def made_up(n):
    "n names that nobody has, of one or two syllables: Brol, Tim, Sera"
    random, found = Random(0), {}
    while len(found) < n:
        name = ''
        for _ in range(random.choice((1, 2, 2))):
            name += random.choice(ONSETS) + random.choice('aeiou')
        found[(name + random.choice(CODAS)).capitalize()] = None
    real = {*NAME_SETS['all'], *(w.capitalize() for words in POOLS.values() for w in words)}
    return [name for name in found if len(name) > 2 and name not in real]


def main(a):
    torch.set_num_threads(1)
    keep_freed_memory()
    NAME_SETS['made-up'] = made_up(4000)
    cfg = QuestionsConfig(names=a.names, people=a.people, things=a.things, events=a.events)
    corpus = corpus_of(cfg, a.stories, a.ordered, a.drilled)
    some = [document(write_story(f'train/{k}', cfg), 0.0) for k in range(3000)]
    some += [told(drill(f'drill/{k}', a.names)) for k in range(300)]
    tok = BPETokenizer.train(some, a.vocab_size, special_tokens=['<|endoftext|>'])
    model = model_of(tok, a)
    exam = exam_of(tok, cfg)
    start = time.process_time()
    curve = []
    rising = lambda step, steps: min(1.0, (step + 1) / 100)
    falling = lambda step, steps: min(rising(step, steps), 2 * (1 - step / steps))

    def look(run):
        minutes = (time.process_time() - start) / 60
        loss = sum(run.losses[-25:]) / 25
        right = shares_right(model, exam)
        curve.append(dict(minutes=round(minutes, 1), step=run.step, loss=round(loss, 3), **right))
        print(json.dumps(curve[-1]), flush=True)
        save(RUNS / a.name, model, tok, about=dict(step=run.step))

    def train(corpus, steps, schedule):
        "Train for some steps, with a warm-up of its own"
        rows = batches(corpus, tok, a.batch_size, a.length, whole=True)
        optimizer = muon(model, a.lr, 0.1, a.lr / 2)
        fit(model, rows, steps, optimizer=optimizer, callbacks={200: look}, schedule=schedule)

    if a.drills:
        train(drills(a.stories, a.names), a.drills, rising)
    train(corpus, a.steps, falling)
    found = dict(options=vars(a), curve=curve, params=model.n_params, **bench.one_thread())
    (RUNS / f'{a.name}.json').write_text(json.dumps(found))
    return found


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--steps', type=int, default=8000, help='on stories and drills')
    ap.add_argument('--drills', type=int, default=1200, help='steps on drills alone, before')
    ap.add_argument('--drilled', type=float, default=0.2, help='share of drills among stories')
    ap.add_argument('--names', default='all', choices=['all', 'made-up'])
    ap.add_argument('--name', default='recall', help='of the package in runs/')
    ap.add_argument('--vocab_size', type=int, default=1280)
    ap.add_argument('--qk_norm', action='store_true')
    ap.add_argument('--ordered', type=float, default=0.2, help='share of endings in order')
    ap.add_argument('--d_model', type=int, default=128)
    ap.add_argument('--n_layers', type=int, default=4)
    ap.add_argument('--lr', type=float, default=0.01, help='of Muon')
    ap.add_argument('--batch_size', type=int, default=14)
    ap.add_argument('--length', type=int, default=216)
    ap.add_argument('--stories', type=int, default=100_000)
    ap.add_argument('--people', type=int, default=4)
    ap.add_argument('--things', type=int, default=3)
    ap.add_argument('--events', type=int, default=5)
    ap.add_argument('--seed', type=int, default=0)
    print(json.dumps(main(ap.parse_args())))
