"""Questions about the documented parts of a module: "What does statistics.median do?" and the answer of its docstring.

The answer is the docstring's first sentence, where that reads as a sentence of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

WORDS, CHARACTERS = range(4, 41), range(20, 241)  # of a sensible answer
ROLE = re.compile(r":[\w:+-]+:`~?(?:[^`<]*<)?~?!?([^`<>]+)>?`")  # :func:`median`, :class:`~torch.Tensor`
QUOTED = re.compile(r"``([^`]+)``|`([^`<]+)(?:<[^`]+>)?`_{0,2}")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\bcf\.)\s+(?=[A-Z`\"'(*])")
MARKUP = re.compile(r"\.\. |::|>>>|\|\w+\||[{}\\`<>*_=]{2,}|\\\w|:\w+:|\S\.\.\.|->|https?:|[`\\$%]")
DEPRECATED = re.compile(r"deprecat|do not use|internal|todo|not implemented", re.IGNORECASE)


def module_questions(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(question, answer) for each public function, class and method of a public module, in the order of the source."""
    if any(part.startswith("_") for part in module.split(".")):
        return
    for name, node in _definitions(module, tree):
        answer = first_sentence(ast.get_docstring(node) or "")
        if answer:
            described = isinstance(node, ast.ClassDef) or any(_is_property(each) for each in node.decorator_list)
            yield f"What is {name}?" if described else f"What does {name} do?", answer


def first_sentence(docstring: str) -> str:
    """The first sentence on one line and without markup, "" where there is none that reads as an answer."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    plain = QUOTED.sub(lambda match: match[1] or match[2], ROLE.sub(r"\1", paragraph)).strip()
    sentence = SENTENCE_END.split(plain, maxsplit=1)[0]
    sound = sentence.endswith(".") and not sentence.endswith("..") and sentence[:1].isupper() and sentence.isascii()
    sized = len(sentence.split()) in WORDS and len(sentence) in CHARACTERS
    return sentence if sound and sized and not MARKUP.search(sentence) and not DEPRECATED.search(sentence) else ""


def _definitions(
    prefix: str, parent: ast.Module | ast.ClassDef
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions and classes with their dotted names; what stands inside a function is nobody's to call."""
    for node in parent.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(f"{prefix}.{node.name}", node)


def _is_property(decorator: ast.expr) -> bool:
    return "property" in ast.unparse(decorator)
