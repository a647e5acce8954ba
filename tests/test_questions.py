"""`questions`: a second program that reads the stories and agrees, odd settings, marking at its
edges, and readers who see too little."""

import json
import math
import re
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from answers import questions as answers

from llm_lab import questions as chapter
from llm_lab.core import LabError, check
from llm_lab.corpora import load_corpus
from llm_lab.questions import (
    FACT_WAYS,
    NAME_SETS,
    QUESTION_KINDS,
    Question,
    QuestionsConfig,
    answer_with,
    ask,
    baselines,
    candidates,
    conversation,
    drill,
    exact_match,
    exam,
    final_facts,
    first_mentioned,
    last_mentioned,
    most_mentioned,
    parse_story,
    question_only,
    questions_about,
    random_candidate,
    story_entropy,
    tale_drills,
    tale_questions,
    tale_states,
    tale_stories,
    wilson_interval,
    write_story,
)
from llm_lab.tales import END, POOLS

NOTEBOOK = Path(__file__).resolve().parent.parent / 'nbs' / '16_questions.ipynb'


def refused(f, message):
    with pytest.raises(LabError, match=re.escape(message)) as e:
        f()
    assert '\n' not in str(e.value)


# ---- a second program, which shares nothing with the first: sentences by regular expressions

CHANGES = [
    r'(?P<giver>\w+) gave the (?P<thing>\w+) to (?P<taker>\w+)\.',
    r'(?P<giver>\w+) handed (?P<taker>\w+) the (?P<thing>\w+)\.',
    r'(?P<taker>\w+) got the (?P<thing>\w+) from (?P<giver>\w+)\.',
    r'(?P<taker>\w+) was given the (?P<thing>\w+) by (?P<giver>\w+)\.',
]
MOVE = r'(?P<who>\w+) (?:went|ran) to the (?P<place>\w+)\.'
REST = r'(?P<who>\w+) sat down at the (?P<place>\w+)\.'
LOOK = r'\w+ looked at the (?P<thing>\w+)\. "How (?P<colour>\w+)!"'
OWNER = r'(?P<who>\w+)(?: had)? a (?P<colour>\w+) (?P<thing>\w+)(?=[,.]| and)'
MEETING = r'(?:One day|Once|On \w+,) (.*?) met at the (\w+)\.'


class Simulated:
    "The state of a text and its history: {fact: [(where the value ends, value), …]}"

    def __init__(self, text):
        self.text = text
        self.holder, self.colour, self.place, self.gifts = {}, {}, {}, []
        met = re.match(MEETING, text)
        self.people = re.split(r', | and ', met[1])
        for who in self.people:
            self.place[who] = [(met.end(2), met[2])]
        ends = text.index('.', met.end())
        for m in re.compile(OWNER).finditer(text, met.end(), ends + 1):
            self.holder[m['thing']] = [(m.end('who'), m['who'])]
            self.colour[m['thing']] = [(m.end('colour'), m['colour'])]
        found = []
        for pattern in CHANGES:
            found += [(m.start(), self.change, m) for m in re.finditer(pattern, text)]
        for pattern, then in ((MOVE, self.move), (REST, self.rest), (LOOK, self.look)):
            found += [(m.start(), then, m) for m in re.finditer(pattern, text)]
        for _, then, m in sorted(found, key=lambda each: each[0]):
            then(m)

    def change(self, m):
        history = self.holder[m['thing']]
        assert history[-1][1] == m['giver']  # nobody gives what they do not have
        assert self.place[m['giver']][-1][1] == self.place[m['taker']][-1][1]  # … or from afar
        history.append((m.end('taker'), m['taker']))
        gift = m['thing'], m['taker'], m['giver'], m.end('giver'), len(history) - 1
        self.gifts.append(gift)

    def move(self, m):
        assert self.place[m['who']][-1][1] != m['place']
        self.place[m['who']].append((m.end('place'), m['place']))

    def rest(self, m):
        assert self.place[m['who']][-1][1] == m['place']
        self.place[m['who']][-1] = (m.end('place'), m['place'])

    def look(self, m):
        assert self.colour[m['thing']][-1][1] == m['colour']
        self.colour[m['thing']] = [(m.end('colour'), m['colour'])]

    def answers(self, question):
        "All (answer, distance, hops) that are right"
        size = len(self.text)
        if m := re.fullmatch(r'Who has the (\w+) (\w+)\?', question):
            told = [h for x, h in self.holder.items() if (self.colour[x][-1][1], x) == m.groups()]
            return [(h[-1][1], size - h[-1][0], len(h) - 1) for h in told]
        if m := re.fullmatch(r'What does (\w+) have\?', question):
            told = [(x, h) for x, h in self.holder.items() if h[-1][1] == m[1]]
            return [(x, size - h[-1][0], len(h) - 1) for x, h in told]
        if m := re.fullmatch(r'What colour is the (\w+)\?', question):
            return [(c, size - at, 0) for at, c in self.colour[m[1]]]
        if m := re.fullmatch(r'Where is (\w+)\?', question):
            h = self.place[m[1]]
            return [(h[-1][1], size - h[-1][0], len(h) - 1)]
        m = re.fullmatch(r'Who gave the (\w+) to (\w+)\?', question)
        return [(g, size - at, hops) for x, to, g, at, hops in self.gifts if (x, to) == m.groups()]

    def askable(self):
        "How many questions have exactly one right answer"
        once = Counter(h[-1][1] for h in self.holder.values())
        gifts = Counter((thing, taker) for thing, taker, *_ in self.gifts)
        ones = sum(n == 1 for n in (*once.values(), *gifts.values()))
        return 2 * len(self.holder) + len(self.people) + ones


@pytest.mark.parametrize(
    'n, cfg',
    [
        (2000, QuestionsConfig()),
        (100, QuestionsConfig(names='unseen')),
        (100, QuestionsConfig(people=2, things=1)),
        (40, QuestionsConfig(people=9, things=9, events=40, asides=9)),
    ],
)
def test_a_second_program_finds_the_same_answers(n, cfg):
    for seed in range(n):
        story = write_story(seed, cfg)
        second = Simulated(story.text)
        found = questions_about(story)
        for q in found:
            assert second.answers(q.question) == [(q.word, q.distance, q.hops)], (seed, q)
            assert q.answer == answer_with(q.kind, q.word)
        assert len({q.question for q in found}) == len(found) == second.askable()


SETTINGS = [
    QuestionsConfig(),
    QuestionsConfig(names='unseen'),
    QuestionsConfig(names='all', people=9, things=2, events=20),
    QuestionsConfig(people=2, things=2, events=0, asides=0, questions=5),
    QuestionsConfig(people=3, things=1, events=1, asides=12),
]


@pytest.mark.parametrize('cfg', SETTINGS)
def test_stories_of_all_settings_are_read_back(cfg):
    for seed in range(60):
        story = write_story(seed, cfg)
        assert parse_story(story.text, cfg) == story, seed
        asked = ask(seed, cfg)
        assert len({q.question for q in asked}) == cfg.questions
        assert {q.story for q in asked} == {story.text}


def test_a_text_that_contradicts_its_state_is_no_story():
    for seed in range(200):
        text = write_story(seed).text
        if m := re.search(r' got the \w+ from (\w+)\.', text):
            other = next(n for n in NAME_SETS['seen'] if n not in text)
            wrong = text[: m.start(1)] + other + text[m.end(1) :]
            refused(lambda: parse_story(wrong), f'not a tale: nothing fits {other + "."!r}'[:30])
            break
    else:
        raise AssertionError('no story in which somebody gets something')
    refused(lambda: parse_story(text + ' The end.'), 'not a tale')
    refused(lambda: parse_story(text[:-30]), 'not a tale')
    refused(lambda: parse_story(''), 'not a tale')


def test_recalls_are_what_the_state_decides():
    "Who is named after 'from' or 'by' is certain, and costs who forgot log₂ 193 bits"
    for seed in range(50):
        pieces = write_story(seed).pieces
        for before, piece in zip(pieces, pieces[1:]):
            if before.text in (' from ', ' by '):
                assert (
                    piece.kind == 'recall'
                    and piece.bits == 0
                    and piece.worth == pytest.approx(math.log2(193))
                )
                assert piece.distance > 0


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(names='new'), "names='new': choose from seen, unseen, all"),
        (dict(people=1), 'people=1: give a whole number from 2 to 9'),
        (dict(things=0), 'things=0: give a whole number from 1 to 9'),
        (dict(things=4, people=3), 'things=4 of people=3: give at most one thing each'),
        (dict(events=-1), 'events=-1: give a whole number from 0 to 99'),
        (dict(asides=True), 'asides=True: give a whole number from 0 to 99'),
        (dict(questions=6), 'questions=6: give a whole number from 1 to 5'),
    ],
)
def test_settings_that_no_story_can_have(wrong, message):
    refused(lambda: QuestionsConfig(**wrong), message)


def test_names_that_are_held_out_can_be_spelled_and_are_met_nowhere():
    seen, unseen, both = (NAME_SETS[k] for k in ('seen', 'unseen', 'all'))
    assert len(seen) == len({*seen}) == 193 and len(unseen) == len({*unseen}) == 32
    assert seen + unseen == both and not {*seen} & {*unseen}
    others = {word for pool, words in POOLS.items() if pool != 'name' for word in words}
    assert not others & {*both}  # a name is nothing but a name
    assert {*''.join(unseen)} <= {*''.join(seen)}
    cfg = QuestionsConfig(names='unseen')
    assert {*re.findall(r'[A-Z]\w+', write_story(1, cfg).text)} & {*unseen}
    assert not {*re.findall(r'\w+', write_story(1, cfg).text)} & {*seen}


@pytest.mark.parametrize('cfg', [QuestionsConfig(), QuestionsConfig(people=9, things=9, events=20)])
def test_other_names_leave_the_story_as_it_was(cfg):
    "Of one seed, seen and unseen names make one exam: the same questions, about other people"
    for k in range(200):
        pair = []
        for names in ('seen', 'unseen'):
            numbers = {}
            texts = []
            for q in ask(k, replace(cfg, names=names)):
                texts += [q.story, q.question, q.answer, q.kind, str(q.hops)]
            for word in re.findall(r'\w+', ' '.join(texts)):
                if word in NAME_SETS[names]:
                    numbers.setdefault(word, f'#{len(numbers)}')
            assert len(numbers) == cfg.people
            pair.append(re.sub(r'\w+', lambda m: numbers.get(m[0], m[0]), ' '.join(texts)))
        assert pair[0] == pair[1]


def test_an_exam_has_one_question_a_story_and_all_kinds():
    questions = exam(1000)
    assert len({q.story for q in questions}) == 1000 and questions == exam(1000)
    assert not {q.story for q in questions} & {q.story for q in exam(1000, split='train')}
    kinds = Counter(q.kind for q in questions)
    assert set(kinds) == set(QUESTION_KINDS) and min(kinds.values()) > 120
    for q in questions:
        assert q.word in candidates(q) and 0 < q.distance <= len(q.story) < 400
    assert max(len(q.story) for q in exam(300, QuestionsConfig(names='all'))) < 400
    for seed in range(100):  # kinds are different as long as there are new ones
        assert len({q.kind for q in ask(seed)}) == 3
    assert all(ask(seed, QuestionsConfig(questions=1))[0] == ask(seed)[0] for seed in range(30))


# ---- readers who see too little

TOY = Question(
    'One day Mia and Tom met at the mill. Tom had a red kite and Mia a blue ball. Tom gave the '
    'kite to Mia. Tom spoke of the park.',
    'Who gave the kite to Mia?',
    'It was Tom.',
    'giver',
    50,
    1,
)


def test_what_the_readers_see():
    assert candidates(TOY) == ['Tom'] * 4  # Mia stands in the question
    where = TOY._replace(question='Where is Mia?', answer='At the mill.', kind='place', hops=0)
    assert candidates(where) == ['mill', 'park']
    assert (first_mentioned(where), last_mentioned(where)) == ('At the mill.', 'At the park.')
    assert most_mentioned(where) == 'At the mill.' == where.answer  # of two, the first
    assert (where.word, TOY.word) == ('mill', 'Tom')
    what = TOY._replace(question='What does Tom have?', kind='thing')
    assert candidates(what) == ['kite', 'ball', 'kite'] and most_mentioned(what) == 'A kite.'
    colour = TOY._replace(question='What colour is the kite?', kind='colour')
    both = {random_candidate(colour._replace(hops=n)) for n in range(20)}
    assert both == {'It is red.', 'It is blue.'} and random_candidate(colour) in both


def test_the_question_alone_gives_the_most_frequent_answer_of_its_kind():
    park = TOY._replace(kind='place', answer='At the park.')
    rows = [TOY, TOY, TOY._replace(answer='It was Ben.'), park]
    reader = question_only(rows)
    assert reader(TOY._replace(story='')) == 'It was Tom.'
    assert reader(TOY._replace(kind='place')) == 'At the park.'
    assert reader(TOY._replace(kind='thing')) == ''  # never asked in training


@pytest.mark.parametrize('names', ['seen', 'unseen'])
def test_who_sees_too_little_stays_below_a_half(names, n=2000):
    "In total below 50 %, in each kind below 60 %, with three standard errors of room"
    questions = exam(n, QuestionsConfig(names=names), split='room')
    for reader in baselines(exam(1000, split='train')).values():
        marks = exact_match(map(reader, questions), questions)
        assert marks.total.share < 0.5 - 3 * (0.25 / n) ** 0.5
        for share in marks.kind.values():
            assert share.n > 200 and share.share < 0.6


# ---- marking


def test_each_question_counts_once_in_each_way_to_group():
    questions = exam(300)
    guesses = [q.answer if n % 3 else ' no ' for n, q in enumerate(questions)]
    marks = exact_match(iter(guesses), questions)
    assert (marks.total.right, marks.total.n) == (200, 300)
    for groups in (marks.kind, marks.hops, marks.distance):
        assert sum(s.right for s in groups.values()) == 200
        assert sum(s.n for s in groups.values()) == 300
    assert list(marks.distance) == ['≤100', '≤200', '>200'] and list(marks.kind) == [
        *QUESTION_KINDS
    ]
    rows = str(marks).split('\n')
    assert len(rows) == 1 + sum(len(g) for g in (marks.kind, marks.hops, marks.distance))
    assert rows[0].split()[1] == '66.7%' and '200 of 300' in rows[0]


def test_the_edges_of_the_groups_by_distance():
    questions = [TOY._replace(distance=d) for d in (1, 100, 101, 200, 201, 9999)]
    found = exact_match([TOY.answer] * 6, questions).distance
    assert {g: s.n for g, s in found.items()} == {'≤100': 2, '≤200': 2, '>200': 2}


@pytest.mark.parametrize(
    'answer, right',
    [
        ('It was Tom.', 1),
        (' It was Tom.\n', 1),
        ('It was tom.', 0),
        ('It was Tom', 0),
        ('It is Tom.', 0),
        ('Tom', 0),
        ('', 0),
    ],
)
def test_only_the_very_sentence_is_right(answer, right):
    assert exact_match([answer], [TOY]).total.right == right


def test_one_answer_to_each_question():
    refused(lambda: exact_match(['Tom'], [TOY, TOY]), '1 answers to 2 questions: give one to each')
    refused(lambda: exact_match([], []), '0 answers to 0 questions')


@pytest.mark.parametrize('right, n', [(0, 10), (1, 10), (5, 10), (10, 10), (863, 2000)])
def test_the_interval_solves_its_equation(right, n, z=1.96):
    "At each end p the share lies z standard errors of p away"
    low, high = wilson_interval(right, n)
    for p in (low, high):
        error = (p * (1 - p) / n) ** 0.5
        assert p in (0.0, 1.0) or abs(right / n - p) == pytest.approx(z * error)
    assert low <= right / n <= high


def test_the_interval_is_that_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    for right, n in ((0, 7), (3, 7), (400, 1000)):
        want = stats.binomtest(right, n).proportion_ci(0.95, method='wilson')
        assert wilson_interval(right, n, 1.959964) == pytest.approx((want.low, want.high), abs=1e-6)


# ---- conversations and corpora


def test_a_conversation_tells_the_story_once():
    asked = ask('x')
    messages = conversation(asked)
    assert [m['role'] for m in messages] == ['user', 'assistant'] * 3
    assert messages[0]['content'] == f'{asked[0].story}\n{asked[0].question}'
    assert [m['content'] for m in messages[2::2]] == [q.question for q in asked[1:]]
    assert [m['content'] for m in messages[1::2]] == [q.answer for q in asked]
    refused(lambda: conversation(ask(1) + ask(2)), '6 questions about 2 stories: give questions')
    refused(lambda: conversation([]), '0 questions about 0 stories')


def messages_of(document):
    "A document, read back"
    found = re.findall(r'<\|(user|assistant)\|>(.*?)<\|end\|>', document, re.S)
    return [dict(role=role, content=content) for role, content in found]


def test_the_corpora_hold_the_same_stories():
    talks, tales = tale_questions(200), tale_stories(200)
    assert (talks.name, tales.name) == ('tale_questions', 'tale_stories')
    for split, n in dict(train=200, val=4, test=4).items():
        rows = talks.documents(split)
        assert len(rows) == len({*rows}) == n
        for k, (talk, tale) in enumerate(zip(rows, tales.documents(split), strict=True)):
            assert messages_of(talk) == conversation(ask(f'{split}/{k}'))
            assert tale == write_story(f'{split}/{k}').text
            left = talk
            for mark in chapter._MARKS:
                left = left.replace(mark, '')
            assert '<|' not in left and '|>' not in left
    assert talks.independent and talks.sha256 != tales.sha256 != tale_stories(250).sha256
    held_out = tale_stories(50, QuestionsConfig(names='unseen')).text('train')
    assert any(name in held_out for name in NAME_SETS['unseen'])
    refused(lambda: tale_stories(49), 'n=49: give a whole number of at least 50 documents')


@pytest.mark.parametrize('cfg', [QuestionsConfig(), QuestionsConfig(names='unseen', events=1)])
def test_the_floor_is_what_other_stories_cost(cfg, n=1000):
    "The code lengths of stories that were not used to estimate it, within four standard errors"
    floor = story_entropy(cfg)
    above = []
    for k in range(n):
        story = parse_story(write_story(f'other/{k}', cfg).text, cfg)
        bits = sum(piece.bits for piece in story.pieces)
        above.append(bits - floor * (len(story.text) + len(END)))
    error = (statistics.variance(above) * (1 / n + 1 / 2000)) ** 0.5
    assert abs(statistics.mean(above)) < 4 * error < 0.02 * floor * 300
    assert tale_stories(50, cfg).floor == floor and tale_questions(50, cfg).floor is None


# ---- what is true in the end, told behind a story and on its way


def read_fact(sentence):
    "(kind, a, b, the word) of a sentence that tells a fact, by regular expressions; else None"
    for kind, ways in FACT_WAYS.items():
        for way in ways:
            pattern = re.escape(way.strip()).replace(r'\{a\}', r'(?P<a>\w+)')
            pattern = pattern.replace(r'\{b\}', r'(?P<b>\w+)') + r' (?P<word>\w+)\.'
            if m := re.fullmatch(pattern, sentence):
                return kind, m['a'], m.groupdict().get('b'), m['word']
    return None


def is_true(fact, second):
    "By the second program"
    kind, a, b, word = fact
    if kind == 'giver':
        return [g for x, to, g, *_ in second.gifts if (x, to) == (a, b)] == [word]
    if kind == 'thing':
        return [x for x, h in second.holder.items() if h[-1][1] == a] == [word]
    return getattr(second, kind)[a][-1][1] == word


def test_each_fact_is_true_where_it_is_told():
    counted = Counter()
    for k, document in enumerate(tale_states(300).documents('train')):
        if ' met at the ' not in document:
            continue  # a drill
        read = ''
        in_the_end = False
        for sentence in re.findall(r'.*?[.!]"?(?: |$)', document.replace(' In the end:', ' @')):
            in_the_end |= sentence.startswith('@')
            sentence = sentence.removeprefix('@ ').strip()
            fact = read_fact(sentence)
            # 'Mia had the ball' is a fact; 'Mia had a red ball' belongs to the story
            if fact is None:
                assert not in_the_end
                read += f'{sentence} '
            else:
                assert is_true(fact, Simulated(read.strip())), (k, sentence)
                counted[fact[0], in_the_end] += 1
    assert {kind for kind, at_the_end in counted if at_the_end} == {*QUESTION_KINDS}
    assert {kind for kind, at_the_end in counted if not at_the_end} == {'holder', 'thing'}


def test_facts_are_as_many_as_asked_for_and_follow_the_seed():
    story = write_story(3)
    assert len(final_facts(story, 0, limit=4)) == 4
    assert final_facts(story, 0) == final_facts(story, 0) != final_facts(story, 1)
    everything = final_facts(story, 0, limit=99)
    assert Counter((f.kind, f.word.strip()) for f in everything) == Counter(
        (q.kind, q.word) for q in questions_about(story)
    )


@pytest.mark.parametrize('names', ['seen', 'made-up'])
def test_a_drill_tells_each_fact_four_times(names):
    for seed in range(200):
        told = [read_fact(fact.told.strip()) for fact in drill(seed, names)]
        times = Counter(told)
        assert 3 <= len(times) <= 5 and {*times.values()} == {4}
        size = len(times)
        for start in range(0, len(told), size):
            assert {*told[start : start + size]} == {*times}  # each telling is of all
        assert len({fact[:3] for fact in times}) == size  # nothing is said to be two things


@pytest.mark.parametrize('names, n', [('syllables', 4000), ('made-up', 8000)])
def test_names_that_are_made_up_belong_to_nobody(names, n):
    made_up = NAME_SETS[names]
    words = {word for pool in POOLS.values() for word in pool}
    assert len({*made_up}) == len(made_up) == n
    assert not {*made_up} & {*NAME_SETS['all']} and not {*map(str.lower, made_up)} & words
    assert all(re.fullmatch('[A-Z][a-z]{2,7}', name) for name in made_up)


def test_half_of_the_made_up_names_are_of_two_real_names_halves():
    seen = NAME_SETS['seen']
    firsts = {name[: (len(name) + 1) // 2] for name in seen}
    lasts = {name[len(name) // 2 :] for name in seen}
    halves = NAME_SETS['made-up'][1::2]
    for name in halves:
        assert any(name[:k] in firsts and name[k:] in lasts for k in range(1, len(name))), name


def test_documents_to_learn_from_hold_no_name_of_an_exam():
    for corpus in (tale_states(100), tale_drills(100)):
        assert not {*re.findall(r'\w+', corpus.text('train'))} & {*NAME_SETS['all']}
        assert corpus.independent and corpus.floor is None


def test_the_corpora_have_names(monkeypatch):
    made = []
    names = ['tale_questions', 'tale_stories', 'tale_states', 'tale_drills']
    for name in names:
        monkeypatch.setattr(chapter, name, lambda name=name: made.append(name))
        load_corpus(name)
    assert made == names


# ---- the exercise


def verdict(answer):
    "What the notebook's own check says of it"
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    (source,) = [''.join(c['source']) for c in cells if 'def who_has(' in ''.join(c['source'])]
    names = dict(vars(chapter), check=check)
    exec(source, names)
    return check(answer, names['who_has_spec'], *names['cases'])


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_the_answer_of_the_exercise_is_right(answer):
    assert verdict(answer) == f'{answer.__name__}: right on 150 cases'


@pytest.mark.parametrize('answer', answers.WRONG)
def test_a_wrong_answer_gets_a_counter_example(answer):
    assert 'expected' in verdict(answer)


def test_a_setting_may_be_changed_alone():
    assert replace(QuestionsConfig(), names='all') == QuestionsConfig('all', 4, 3, 5, 2, 3)
