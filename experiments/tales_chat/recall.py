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
import re
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
from llm_lab.package import load, save
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.questions import NAME_SETS, QuestionsConfig, write_story
from llm_lab.tales import END, POOLS
from llm_lab.train import batches, fit

EXAM = 100  # stories
RUNS = Path(__file__).parent / 'runs'
ONSETS = 'b br ch d dr f fl g gr h j k kl l m n p r s sh st t tr v w z'.split()
CODAS = ['', '', *'dklmnrst']


# {kind: ways to tell a fact; what comes last is its answer}. The first stands right beside what it
# is about, the others a few words away; {a} and {b} are what the fact is about
WAYS = dict(
    place=(' {a} was at the', ' Where one found {a}: at the', ' As for {a}: at the'),
    thing=(' {a} had the', ' What {a} had: a', ' In the hands of {a}: a'),
    colour=(' The {a} looked', ' What colour the {a} had: it was', ' As for the {a}: it was'),
    holder=(' The {a} was with', ' Who had the {a}: it was', ' The {a} was in the hands of'),
    giver=(
        ' {b} had got the {a} from',
        ' Who had given the {a} to {b}: it was',
        ' The {a} had come to {b} from',
    ),
)


def facts_of(story):
    "(kind, a, b, the answer) of all that is true in the end"
    for who in story.people:
        yield 'place', who, None, story.now('place', who)
        if len(story.held_by(who)) == 1:
            yield 'thing', who, None, story.held_by(who)[0]
    for thing in story.things:
        yield 'colour', thing, None, story.now('colour', thing)
        yield 'holder', thing, None, story.now('holder', thing)
    times = Counter((gift.thing, gift.taker) for gift in story.gifts)
    for gift in story.gifts:
        if times[gift.thing, gift.taker] == 1:
            yield 'giver', gift.thing, gift.taker, gift.giver


def said(fact, random, ways):
    "(kind, what asks for it, the answer), in one of the first so many ways"
    kind, a, b, answer = fact
    return kind, random.choice(WAYS[kind][:ways]).format(a=a, b=b), f' {answer}'


def ending(story, ways, most=10):
    "At most so many facts of a story, in any order and in any of some ways; first, who has what"
    random = Random(story.text)
    facts = [*facts_of(story)]
    random.shuffle(facts)
    facts.sort(key=lambda fact: random.random() - (fact[0] in ('holder', 'thing', 'giver')) / 2)
    chosen = facts[:most]
    random.shuffle(chosen)
    return [said(f, random, ways) for f in chosen]


def holders_at(story, end):
    "Who has what after so many characters: facts"
    held = {}
    for thing in story.things:
        held[thing] = [who for at, who in story.facts['holder', thing] if at <= end][-1]
    facts = [('holder', thing, None, who) for thing, who in held.items()]
    for who in story.people:
        if [*held.values()].count(who) == 1:
            (thing,) = [thing for thing, by in held.items() if by == who]
            facts.append(('thing', who, None, thing))
    return facts


def as_it_goes(story, ways):
    "A story that says after its sentences who has what: mostly what has just changed"
    random = Random(story.text)
    told_text, before, start = '', None, 0
    ends = [m.end() for m in re.finditer(r'[.!]"?(?= |$)', story.text)]
    for n, end in enumerate(ends):
        told_text += story.text[start:end]
        start = end
        if n == 0:
            continue  # until people have things
        now = holders_at(story, end)
        new = [fact for fact in now if before is not None and fact not in before]
        before = now
        some = random.sample(new, min(len(new), random.randint(0, 1)))
        if random.random() < 0.3:
            some.append(random.choice(now))
        told_text += told([said(fact, random, ways) for fact in some])
    return f'{told_text} In the end:{told(ending(story, ways, most=3))}'


def document(story, ways):
    "A story, and its ending"
    return f'{story.text} In the end:{told(ending(story, ways))}'


def shorter(cfg, key):
    "Half of the stories have fewer people and things, and less happens in them"
    random = Random(key)
    if random.random() < 0.5:
        return cfg
    people = random.randint(2, cfg.people)
    things = random.randint(1, min(people, cfg.things))
    return replace(cfg, people=people, things=things, events=random.randint(0, cfg.events))


def corpus_of(cfg, n, ways, drilled, going):
    "n documents: stories with endings, and a share of drills"
    texts = []
    for k in range(n):
        if Random(f'kind/{k}').random() < drilled:
            texts.append(told(drill(f'mixed/{k}', cfg.names, ways)))
        else:
            key = f'train/{k}'
            form = as_it_goes if Random(f'going/{k}').random() < going else document
            texts.append(form(write_story(key, shorter(cfg, key)), ways))
    splits = dict(train=END.join(texts), val=texts[0], test=texts[0])
    return Corpus('endings', splits, END, 'Apache-2.0', 'made here', '', independent=True)


def drill(key, who, ways):
    "Facts of a made-up state, told four times in four orders, as `said`"
    random = Random(key)
    names = random.sample(NAME_SETS[who], 6)
    facts = [('place', n, None, random.choice(POOLS['place'])) for n in names]
    for thing in random.sample(POOLS['thing'], 6):
        facts.append(('colour', thing, None, random.choice(POOLS['colour'])))
        facts.append(('holder', thing, None, random.choice(names)))
    some = random.sample(facts, random.randint(3, 5))
    return [said(f, random, ways) for _ in range(4) for f in random.sample(some, len(some))]


def told(facts):
    "Facts as a text"
    return ''.join(f'{asks}{answer}.' for _, asks, answer in facts)


def drills(n, who, ways):
    "A corpus of n drills"
    texts = [told(drill(f'drill/{k}', who, ways)) for k in range(n)]
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


def exam_of(tok, cfg, ways):
    "Endings of stories, and the last telling of drills"
    stories = [write_story(f'val/{k}', cfg) for k in range(EXAM)]
    found = [marked(tok, f'{s.text} In the end:', ending(s, ways)) for s in stories]
    for k in range(EXAM):
        facts = [('drill', *rest) for _, *rest in drill(f'exam/{k}', cfg.names, ways)]
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
    corpus = corpus_of(cfg, a.stories, a.ways, a.drilled, a.going)
    some = [document(write_story(f'train/{k}', cfg), a.ways) for k in range(3000)]
    some += [told(drill(f'drill/{k}', a.names, a.ways)) for k in range(300)]
    tok = BPETokenizer.train(some, a.vocab_size, special_tokens=['<|endoftext|>'])
    model = model_of(tok, a)
    if a.start:
        model, tok, _ = load(RUNS / a.start)
        model.train()
    exam = exam_of(tok, cfg, a.ways)
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
        train(drills(a.stories, a.names, a.ways), a.drills, rising)
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
    ap.add_argument('--going', type=float, default=0.4, help='share of stories told as they go')
    ap.add_argument('--ways', type=int, default=3, help='to tell a fact')
    ap.add_argument('--start', help='the package in runs/ from which to go on')
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
