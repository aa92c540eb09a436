"""A plan of a few variants."""

from __future__ import annotations

STUDY = """\
run_folder: str = ""  # where results go
data_folder: str = ""  # prepared data
alpha: float = 0.5  # in [0, 1]
optimizer: str = "adam"  # one of adam, sgd
seed: int = 42  # of everything
noise_seed: int = 0  # of dropout
"""

PLAN = """\
name: quick
stages:
  - name: data
    notebook: {here}/prep.ipynb
    params: {vocab_size: 2048}
  - name: cosine
    notebook: {here}/study.ipynb
    needs: {data_folder: data}
    params: {optimizer: sgd}
    matrix: {alpha: [0, 5e-1, 1], seed: [1, 2, 10], noise_seed: [0, 1]}
    exclude: [{alpha: 0.5, noise_seed: 1}, {alpha: 1.0, noise_seed: 1}]
contrasts:
  - name: mixing
    question: Is alpha 0.5 no worse?
    stage: cosine
    metric: test_ce_loss
    treatment: {alpha: 0.5, noise_seed: 0}
    control: {alpha: 0, noise_seed: 0}
    better: lower
    claim: no worse
    smallest_effect: 1e-2
    primary: true
noise_floor: {stage: cosine, treatment: {alpha: 0, noise_seed: 1}, control: {alpha: 0, noise_seed: 0}}
"""
