"""nbutils: the heavy loops behind the Soft Targets Workbook's notebooks.

Data flows one way: corpora -> documents -> packing -> models + objectives -> training -> evaluation -> runs ->
statistics -> figures -> report. Nothing here imports a heavy library at package level: `import nbutils` is free.
"""

import warnings

# tqdm would draw a widget in a notebook and complains where it cannot; the workbook logs lines instead.
warnings.filterwarnings("ignore", message="IProgress not found")
