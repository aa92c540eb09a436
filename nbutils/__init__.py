"""nbutils: the heavy loops behind the Soft Targets Workbook's notebooks.

Rooms import downwards only: foundation < data < models < objectives < evaluation < training < interaction < runs <
batch < report < search, benchmarks. Each room's `__init__` is its door. Nothing heavy is imported before it is used.
"""

import warnings

# tqdm would draw a widget in a notebook and complains where it cannot; the workbook logs lines instead.
warnings.filterwarnings("ignore", message="IProgress not found")
