"""Models: configurations, loading, teachers, and what teachers said.

`load_model` gives a model from a name, a folder or a shape; `teacher_cache` keeps what a teacher said about
prepared data, so that many students pay for it once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": [
            "WEIGHT_FILES",
            "build_config",
            "check_model",
            "check_vocabulary",
            "count_parameters",
            "head_matrices",
            "load_model",
            "load_trained",
            "output_vocabulary",
            "saved_model",
            "weight_files",
        ],
        "products": ["add_matrix_product", "chunk_rows", "matrix_product", "product_precision"],
        "shapes": ["CONFIGURATIONS", "TOKENIZERS"],
        "teacher_cache.building": ["build_cache"],
        "teacher_cache.reading": ["TeacherCache", "WithTeacher"],
        "teacher_target": ["TeacherStates", "TeacherTarget", "TopTokens"],
        "teachers": [
            "CACHES",
            "LiveTeacher",
            "NO_DIVERGENCE",
            "before_training",
            "check_cache",
            "check_distillation",
            "check_shared_vocabulary",
            "check_teacher",
            "load_teachers",
            "model_of",
        ],
    },
)
