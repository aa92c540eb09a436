"""Interaction: a student that learns from a judge or a correcting teacher.

In rounds it writes on from prompts; scores and corrections become preferences and rewards; SimPO, PPO and RLOO
train on them. Every word of people, student and teacher is counted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checks": ["RUBRICS", "check_interaction", "held_out"],
        "correction": ["CORRECTORS"],
        "evaluation": ["judge_student"],
        "judges": ["JUDGES", "SERVER"],
        "prompts": ["read_correction", "read_rubric", "read_story", "rubric_names"],
        "replies": ["JudgeLimits", "LITTLE_MASS"],
        "settings": [
            "CONTEXTS",
            "CORRECTED",
            "DISTILL",
            "Interaction",
            "JUDGED",
            "NO_JUDGE",
            "PAIRED",
            "STORY",
            "taught_by",
        ],
        "training": ["InteractionConfig", "train_interactively"],
    },
)
