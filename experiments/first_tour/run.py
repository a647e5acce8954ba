"""What the first screen of the README shows: a tour of three minutes, as `make tour` makes it.

    python experiments/first_tour/run.py [--minutes 3] [--save]

The tour's package is kept in runs/. The result has, beside what the tour says, the last text
that it printed, and an attention map of its model: of the head that looks most from a word that
is told again to the letter after its earlier twin (an induction score). One line of JSON at the
end."""

import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.first_tour import tour
from llm_lab.hardware import machine
from llm_lab.looking import attention_of
from llm_lab.package import load

RUNS = Path(__file__).parent / 'runs'
TEXT = 'Once Emma found a red ball. Emma'  # the second name repeats the first


class Both(StringIO):
    "What is printed, kept and shown"

    def write(self, text):
        sys.__stdout__.write(text)
        return super().write(text)


def copying_head(weights):
    "(layer, head) that looks most from the second name to the letter after its twin in the first"
    first, second = (found.start() for found in re.finditer('Emma', TEXT))
    pairs = [(second + k, first + k + 1) for k in range(3)]
    return max(
        ((layer, head) for layer in range(len(weights)) for head in range(len(weights[layer]))),
        key=lambda at: sum(float(weights[at[0]][at[1]][i, j]) for i, j in pairs),
    )


def main(minutes):
    shutil.rmtree(RUNS, ignore_errors=True)  # of an earlier tour
    os.environ['LLM_LAB_HOME'] = str(RUNS)
    with redirect_stdout(Both()) as said:
        result = tour(minutes=minutes)
    model, tok, _ = load(RUNS / 'artifacts/tour')
    told = re.findall(r'--- after (\d+) s and ([\d,]+) steps.*?:\n(.*?)\n\n', said.getvalue(), re.S)
    seconds, steps, text = told[-1]
    weights, tokens = attention_of(model, tok, TEXT)
    layer, head = copying_head(weights)
    rows = [[round(float(w), 2) for w in row] for row in weights[layer][head]]
    attention = dict(text=TEXT, tokens=tokens, layer=layer, head=head, weights=rows)
    return dict(minutes=minutes, text=text, attention=attention, **result, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--minutes', type=float, default=3)
    args = ap.parse_args()
    bench.report(__file__, main(args.minutes), args.save)
