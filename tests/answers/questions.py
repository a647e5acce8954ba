"Answers to the exercises of `16_questions`, right and wrong ones; `test_questions.py` runs them."

import re


def sentences(story):
    "The sentences of a story; what is called out belongs to the one before"
    return re.findall(r'[^.]+\.(?: "[^"]+")?', story)


def who_has(story, thing):
    "Right: the last sentence that changes the holder says who it is"
    gives = re.compile(rf'(\w+) (?:gave the {thing} to (\w+)|handed (\w+) the {thing})\.')
    gets = re.compile(rf'(\w+) (?:got|was given) the {thing} (?:from|by) \w+\.')
    for sentence in reversed(sentences(story)):
        if found := gives.search(sentence):
            return found[2] or found[3]
        if found := gets.search(sentence):
            return found[1]
    return re.search(rf'(\w+)(?: had)? a \w+ {thing}\b', story)[1]


def last_name(story, thing):
    "Wrong: the last name of the last sentence that mentions the thing"
    told = [sentence for sentence in sentences(story) if re.search(rf'\b{thing}\b', sentence)]
    return re.findall(r'\b[A-Z]\w+', re.sub('".*', '', told[-1]))[-1]


def first_owner(story, thing):
    "Wrong: who had it at first"
    return re.search(rf'(\w+)(?: had)? a \w+ {thing}\b', story)[1]


def no_receiver_first(story, thing):
    "Wrong: knows two of the four ways to change hands"
    gives = re.compile(rf'(?:gave the {thing} to (\w+)|handed (\w+) the {thing})\.')
    found = gives.findall(story)
    return ''.join(found[-1]) if found else first_owner(story, thing)


RIGHT = [who_has]
WRONG = [last_name, first_owner, no_receiver_first]
