"""The command line: the composition root."""

import os

# Before numpy comes in. Our matrices are small: a pool of BLAS threads only spins, and takes the cores from the other
# processes of a run (episodes of two workers took twice as long with it). A value that the user set stays.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
