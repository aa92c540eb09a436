"""What a teacher said about prepared data, per token position: paid once for a sweep of students.

cache = build_cache(teacher, data, "hidden", temperature=2.0, top_k=0, batch_size=8)   # made, or opened if it is there
rows = WithTeacher(data.blocks["train"].with_format("numpy"), cache, "train")          # items bring what it said
model = ObjectiveModel(student, distillation("forward"), cache)                         # no teacher needs to run

`exactness.py` says how near it is to the live teacher.
"""

from nbutils.models.teacher_cache.building import build_cache
from nbutils.models.teacher_cache.reading import TeacherCache, WithTeacher, open_cache

__all__ = ["TeacherCache", "WithTeacher", "build_cache", "open_cache"]
