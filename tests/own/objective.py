"""An objective of a reader's own, in one file outside the package: a model that writes from right
to left. Nothing of `llm_lab` is edited: training, evaluation, sampling and runs go on as ever."""

import torch
from torch.nn import functional as F

import llm_lab as lab
from llm_lab.core import rng
from llm_lab.sampling import sampling_probs


@lab.register
class RightToLeft(lab.Objective):
    "−ln P of a text, its last token first: 0 1 2 3 is read as 0 3 2 1, and 3, 2, 1 are predicted"

    def turned(self, rows):
        return torch.cat([rows[:, :1], rows[:, 1:].flip(1)], 1)

    def nats(self, model, rows):
        y = self.turned(rows)
        nats = F.cross_entropy(model(y[:, :-1]).transpose(1, 2), y[:, 1:], reduction='none')
        return nats.flip(1)  # of the tokens 1, 2, … of each row

    def loss(self, model, rows, number):
        return self.nats(model, rows).mean()

    @torch.no_grad()
    def score(self, model, ids, windows, batch_size=None, live=None):
        out = torch.full((len(ids),), torch.nan)
        training = model.training
        model.eval()
        for begin, first, end in windows.tolist():
            out[first:end] = self.nats(model, ids[None, begin:end])[0, first - begin - 1 :]
        model.train(training)
        return out

    @torch.no_grad()
    def generate(self, model, ids, max_new_tokens, seed=0, **sampling):
        draw = rng(seed, 'right to left')
        y = ids[:, -1:]
        found = []
        for _ in range(max_new_tokens):
            logits = model(y[:, -model.cfg.max_len :])[:, -1]
            new = torch.multinomial(sampling_probs(logits, **sampling), 1, generator=draw)
            found.insert(0, (logits, new[:, 0]))
            y = torch.cat([y, new], 1)
        yield from found

    def next_logits(self, model, ids):
        return model(ids[:, -1:])[:, -1]


@lab.register
class LastToken(lab.Objective):
    "−ln P of the last token of each row alone: no likelihood of a text, and it writes none"

    unit = 'of the last token'

    def loss(self, model, rows, number):
        return F.cross_entropy(model(rows[:, :-1])[:, -1], rows[:, -1])

    @torch.no_grad()
    def score(self, model, ids, windows, batch_size=None, live=None):
        out = torch.full((len(ids),), torch.nan)
        for begin, first, end in windows.tolist():
            nats = F.cross_entropy(model(ids[None, begin : end - 1])[0, -1:], ids[end - 1 : end])
            out[first:end] = nats
        return out
