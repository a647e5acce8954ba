"""What do a longer context and more minutes buy on Tiny Tales?

python experiments/tales_context/run.py [--minutes 3] [--long 10] [--save]

The tour itself, with nothing changed but the context (and the batch, so that a step reads as
many characters), and then with less and with more time. Stories are at most some 300 characters
long: a context of 288 holds 99 of 100 of them whole. Each cell is kept under runs/ and not
repeated; delete that folder to measure anew. The last line is JSON; `--save` keeps it in
result.json."""

import os
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.first_tour import tour
from llm_lab.hardware import machine

HERE = Path(__file__).parent
CONTEXTS = 72, 144, 288, 576


def cell(context, minutes):
    "The tour's figures, measured once and kept with what it printed"
    file = HERE / 'runs' / f'{context}-{minutes:g}.json'
    return bench.kept(file, lambda: toured(context, minutes))


def toured(context, minutes):
    "A tour in a home of its own, which nothing that was made before can shorten"
    settings = [('length', context), ('batch_size', round(1024 / context))]
    with tempfile.TemporaryDirectory() as home, redirect_stdout(StringIO()) as said:
        os.environ['LLM_LAB_HOME'] = home
        result = tour('tiny_tales', minutes, settings)
    return dict(result, said=said.getvalue(), **machine())


def row(context, minutes):
    "Above the floor, as shares of the floor: in all, and by what was not understood"
    r = cell(context, minutes)

    def part(*names):
        bits = sum(v for k, v in r['excess_bits'].items() if k.startswith(names))
        return bits / r['floor']

    shares = dict(
        total=r['above_floor'],
        choices_literals=part('choice', 'literal'),
        near=part('recall ≤'),
        far=part('recall >'),
    )
    line = ''.join(f'{v:10.1%}' for v in shares.values())
    print(f'{context:7}{minutes:9g}{r["tokens"] / 1e6:10.2f}M{r["bits"]:11.3f}{line}', flush=True)
    return dict(
        context=context,
        minutes=minutes,
        tokens=r['tokens'],
        bits=r['bits'],
        floor=r['floor'],
        **shares,
    )


def main(minutes, long):
    print(
        'context  minutes    chars   bits/char     total    ch.+lit.   rec≤128   rec>128   '
        '(above the floor)'
    )
    rows = [row(c, minutes) for c in CONTEXTS]
    rows += [row(288, m) for m in (minutes / 3, long)]
    return dict(rows=rows, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--minutes', type=float, default=3)
    ap.add_argument('--long', type=float, default=10)
    a = ap.parse_args()
    bench.report(__file__, main(a.minutes, a.long), a.save)
