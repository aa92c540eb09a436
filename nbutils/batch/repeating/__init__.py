"""A finished run made again from its manifest alone, and whether the numbers are the same.

    python -m nbutils run --from runs/quick/cosine-alpha0.5-seed1-noise_seed0/manifest.json

Same notebook, parameters, inputs and threads, executed anew in runs/.repeated/<plan>/<variant>, where no report looks.
On a CPU in float32 the numbers are the same bit for bit; where they are not, the files, the sizes of the differences,
and what else is different are told.
"""

from nbutils.batch.repeating.making import Repeat, repeat

__all__ = ["Repeat", "repeat"]
