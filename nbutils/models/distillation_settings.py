"""What a distillation may be asked for; without torch, so that a plan is checked before anything is loaded."""

from __future__ import annotations

from nbutils.foundation import ParameterError, did_you_mean

NO_DIVERGENCE = "none"  # cross entropy alone: the control
DIVERGENCES = ("forward", "reverse", "jsd")
POSITIONS = ("all", "answers")
REDUCTIONS = ("token", "batchmean")
NO_CACHE = "off"
CACHES = ("hidden", "topk")


def check_distillation(
    divergence: str,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    beta: float,
    positions: str,
    reduction: str,
) -> None:
    """Raise ParameterError, naming the notebook's parameter, where a value cannot be, whether it is used or not."""
    for name, given, words in (
        ("divergence", divergence, (NO_DIVERGENCE, *DIVERGENCES)),
        ("kl_positions", positions, POSITIONS),
        ("kd_reduction", reduction, REDUCTIONS),
    ):
        if given not in words:
            raise ParameterError(f"{name} is {given!r}. {did_you_mean(given, words)}")
    if not 0 < temperature < float("inf"):
        raise ParameterError(f"kl_temperature is {temperature}; logits are divided by it, so give a number above 0.")
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ParameterError(f"{name} is {weight}; the weight of a term is a number of at least 0.")
    if ce_weight == kl_weight == 0:
        raise ParameterError("ce_weight and kl_weight are both 0, so nothing would be learned. Raise one of them.")
    if not 0 < beta < 1:
        raise ParameterError(
            f"jsd_beta is {beta}; it weighs teacher against student and lies between 0 and 1, both excluded. At the "
            "ends the divergence is one of two others: set divergence to forward or reverse."
        )


def check_cache(kind: str, divergence: str = "forward", top_k: int = 32) -> None:
    """Raise ParameterError where a notebook's teacher_cache cannot serve its objective; "off" is no cache."""
    if kind == NO_CACHE:
        return
    if kind not in CACHES:
        raise ParameterError(f"teacher_cache is {kind!r}. {did_you_mean(kind, (NO_CACHE, *CACHES))}")
    if kind == "topk" and divergence not in ("forward", NO_DIVERGENCE):
        raise ParameterError(
            f"divergence {divergence} needs the teacher's probability of every token, and teacher_cache topk holds "
            "those of a few. Set teacher_cache to hidden or off, or divergence to forward."
        )
    if kind == "topk" and top_k < 1:
        raise ParameterError(f"cache_top_k is {top_k}; give the number of tokens to keep at each position, 32 say.")
