"""Batch: how runs are made.

One variant in a kernel of its own, whatever ends it; many on this machine or on Ray, with retries; what they will
cost, checked before anything starts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["make_parser"],
        "batch": ["Batch", "Engine", "is_going_on", "register_plan", "select"],
        "cost": ["PEAK", "check_gpu", "flops_per_token"],
        "fork_server": ["PRELOADED"],
        "kernels": ["NotebookFailed", "execute"],
        "listing": ["plan_listing", "variant_names"],
        "local_engine": ["LocalEngine", "default_workers"],
        "preflight": ["data_card", "is_finished"],
        "progress": ["duration", "Display", "text_table"],
        "ray_engine": ["RayEngine"],
        "differences": ["Change", "changes", "in_few", "listed"],
        "repeating": ["repeat"],
        "runner": ["DONE", "REFUSED", "flat_variant", "run_variant", "summary"],
        "status": ["folder_status", "plan_folders", "plan_status", "recorded_status", "watch"],
    },
)
