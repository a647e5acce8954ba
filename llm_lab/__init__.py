"A book that is a library: build a language model, one notebook at a time"
import os

__version__ = "0.2.0"

# OpenMP's threads meet after every operation, and a thread that waits there spins, which keeps a core
# from the very thread it waits for when another program runs, too: a step then takes several times
# as long. A short spin costs little where the machine is idle (experiments/busy_machine). OpenMP reads
# this once, when PyTorch is loaded, so it stands here; whoever has chosen already is obeyed.
if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '2000'
