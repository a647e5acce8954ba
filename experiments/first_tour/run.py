"""What the first screen of the README shows: a tour of three minutes, as `make tour` makes it.

    python experiments/first_tour/run.py [--minutes 3] [--save]

Kept are what the tour says, what it wrote on the way, and one attention map of its model: of the
head that looks most at the letter before, with what it would give that letter if it looked at all
letters alike. The tour is made once, and lies in runs/. One line of JSON at the end."""

import os
import re
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
TEXT = 'So Ben took the purple lamp home.'
LOOK = r'--- after (\d+) s and ([\d,]+) steps, .*?, (\d+)% above the floor:\n(.*?)\n\n'


class Both(StringIO):
    "What is printed, kept and shown"

    def write(self, text):
        sys.__stdout__.write(text)
        return super().write(text)


def toured(minutes):
    "A tour, and what it wrote on the way: [(seconds, steps, % above the floor, text), …]"
    os.environ['LLM_LAB_HOME'] = str(RUNS)
    with redirect_stdout(Both()) as said:
        result = tour(minutes=minutes, name='tour')
    told = re.findall(LOOK, said.getvalue(), re.S)
    told = [(int(s), int(n.replace(',', '')), int(above), text) for s, n, above, text in told]
    return dict(minutes=minutes, told=told, **result, **machine())


def attention():
    "The map of the head that looks most at the letter before: {text, layer, head, weights, …}"
    model, tok, _ = load(RUNS / 'artifacts/tour')
    weights, _ = attention_of(model, tok, TEXT)  # (L, H, T, T)
    before = weights.diagonal(-1, -2, -1).mean(-1)  # (L, H): share of the letter before
    layer, head = divmod(int(before.argmax()), before.shape[1])
    rows = [[round(float(w), 3) for w in row] for row in weights[layer, head]]
    alike = sum(1 / (i + 1) for i in range(1, len(TEXT))) / (len(TEXT) - 1)
    best = float(before[layer, head])
    return dict(text=TEXT, layer=layer, head=head, weights=rows, before=best, alike=alike)


def main(minutes):
    found = bench.kept(RUNS / 'tour.json', lambda: toured(minutes))
    return dict(**found, attention=attention())


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--minutes', type=float, default=3)
    args = ap.parse_args()
    bench.report(__file__, main(args.minutes), args.save)
