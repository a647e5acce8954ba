"Answers to the exercises of `62_chat`, right and wrong ones; `test_chat.py` runs them."

import torch


def _last(found):
    "The last position so far at which something was found; −1 where nothing was"
    return torch.arange(len(found)).where(found, -1).cummax(0).values


def by_last_position(row, header, end):
    "Right: inside where the last header came after the last end mark"
    row = torch.tensor(row)
    return (_last(row == header) > _last(row == end))[:-1].tolist()


def by_counting(row, header, end):
    "Wrong: users end their turns with the same mark, so ends are more than headers"
    row = torch.tensor(row)
    return ((row == header).cumsum(0) > (row == end).cumsum(0))[:-1].tolist()


def without_end_marks(row, header, end):
    "Wrong: the model would not learn when to stop"
    found = by_last_position(row, header, end)
    return [inside and id != end for inside, id in zip(found, row[1:])]


def with_headers(row, header, end):
    "Wrong: the header is written by the template, never by the model"
    found = by_last_position(row, header, end)
    return [inside or id == header for inside, id in zip(found, row[1:])]


RIGHT = [by_last_position]
WRONG = [by_counting, without_end_marks, with_headers]
