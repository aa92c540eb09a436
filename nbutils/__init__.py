"""nbutils: the heavy loops behind the Soft Targets Workbook's notebooks.

Data flows one way: corpora -> documents -> packing -> models + objectives -> training -> evaluation -> runs ->
statistics -> figures -> report. Nothing here imports a heavy library at package level: `import nbutils` is free.
"""
