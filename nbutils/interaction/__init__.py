"""A student that learns from a judge: prompts, samples, scores and corrections become preferences and rewards."""
